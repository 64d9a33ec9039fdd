"""A transformers model as the decoder sees it: its layers' modules, sizes and rotary tables. Models that it cannot run are refused by name."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as functional

from hpc_core.builders.quantization import packing_of
from hpc_core.case.errors import SpecError

aten: Any = torch.ops.aten


class PackedWeight(NamedTuple):
    """An int4 weight as torchao packed it, for torch's tinygemm kernels; nothing is copied."""

    codes: torch.Tensor
    """Packed for the device: see `builders.quantization`."""
    scale_and_zero: torch.Tensor
    """(columns with padding / group, rows with padding, 2), bfloat16."""
    group: int
    """Weights of a row that share a scale and a zero."""
    rows: int
    """Rows of the weight without padding."""


class PackedLinear:
    """A linear layer with an int4 weight.

    torchao's own layer pads its input, and so copies it, even where no padding is needed; this one does not. Its tensors can be arguments of
    a compiled function, so one compiled layer serves all.
    """

    def __init__(self, module: Any):
        packed = module.weight
        self.weight = PackedWeight(
            packed.qdata, packed.scale_and_zero, int(packed.block_size[-1]), int(module.out_features)
        )
        self.bias = module.bias
        self.in_features, self.out_features = int(module.in_features), int(module.out_features)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """Return the layer's output (…, out) of x (…, in)."""
        return times(x, self.weight, self.bias)


def times(x: torch.Tensor, weight: torch.Tensor | PackedWeight, bias: torch.Tensor | None = None) -> torch.Tensor:
    """Return x (…, in) times the transpose of a plain or packed weight, plus the bias: (…, out)."""
    if not isinstance(weight, PackedWeight):
        return functional.linear(x, weight, bias)
    flat = x.reshape(-1, x.shape[-1])
    missing = weight.scale_and_zero.shape[0] * weight.group - x.shape[-1]
    if missing:
        flat = functional.pad(flat, (0, missing))
    product = aten._weight_int4pack_mm if x.is_cuda else aten._weight_int4pack_mm_for_cpu
    whole: torch.Tensor = product(flat, weight.codes, weight.group, weight.scale_and_zero)[:, : weight.rows]
    whole = whole.reshape(*x.shape[:-1], weight.rows)
    return whole if bias is None else whole + bias


SUPPORTED = ("LlamaForCausalLM", "Qwen2ForCausalLM")
_ADAPTED = "merge the adapter into its model first: model = model.merge_and_unload()"


@dataclass(frozen=True)
class Layer:
    """The modules of one decoder layer. Products that share an input are one field; an int4 layer is a `PackedLinear`."""

    input_norm: Any
    qkv: tuple[Any, Any, Any]
    output: Any
    post_norm: Any
    gate_up: tuple[Any, Any]
    down: Any

    @property
    def products(self) -> tuple[Any, ...]:
        """Return the seven linear layers."""
        return (*self.qkv, self.output, *self.gate_up, self.down)


@dataclass(frozen=True)
class Decoder:
    """A model in the form that the decoder needs. Nothing is copied: weights stay where the model has them."""

    layers: tuple[Layer, ...]
    embedding: torch.Tensor
    """(vocabulary, hidden)."""
    final_norm: Any
    head: Any
    rotary: Any
    heads: int
    groups: int
    """Heads of keys and values."""
    head_width: int
    eps: float
    ends: tuple[int, ...]
    """Ids that end a sequence."""

    @property
    def hidden(self) -> int:
        """Width of the residual stream."""
        return int(self.embedding.shape[1])

    @property
    def vocabulary(self) -> int:
        """Rows of the head."""
        return int(self.embedding.shape[0])

    @property
    def inner(self) -> int:
        """Width between the gate and down projections."""
        return int(self.layers[0].down.in_features)

    @property
    def dtype(self) -> torch.dtype:
        """Type of activations, cache and unquantized weights."""
        return self.embedding.dtype

    @property
    def device(self) -> torch.device:
        """Device of the model."""
        return self.embedding.device

    @property
    def four_bit(self) -> bool:
        """True if any layer is quantized to four bits by bitsandbytes."""
        return self._has("4-bit")

    @property
    def int4(self) -> bool:
        """True if any layer is packed in int4 by torchao."""
        return self._has("int4")

    def _has(self, kind: str) -> bool:
        return any(kind_of(module) == kind for layer in self.layers for module in layer.products)

    def turns(self, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return cosines and sines of the first `count` positions, (count, head width), rounded to the model's dtype as its layers do."""
        positions = torch.arange(count, device=self.device)[None]
        example = torch.zeros(1, device=self.device, dtype=self.dtype)
        with torch.no_grad():
            cos, sin = self.rotary(example, positions)
        return cos[0].to(self.dtype).contiguous(), sin[0].to(self.dtype).contiguous()


def decoder_of(model: Any, ends: Sequence[int] = ()) -> Decoder:
    """Return the model in the form that the decoder needs.

    Raises:
        SpecError: another architecture, an adapter that is not merged, 8-bit layers, sliding windows, another activation, several devices.
    """
    name = type(model).__name__
    if name not in SUPPORTED:
        hint = f" {_ADAPTED}." if hasattr(model, "peft_config") else ""
        raise SpecError(f"engine='graph' knows {' and '.join(SUPPORTED)}, this is {name}.{hint}")
    config = model.config.get_text_config()
    if config.hidden_act != "silu":
        raise SpecError(f"engine='graph' knows the activation silu, this model has {config.hidden_act!r}.")
    if getattr(config, "use_sliding_window", False):
        raise SpecError("engine='graph' attends to the whole cache, this model has a sliding window.")
    layers = tuple(_layer(part) for part in model.model.layers)
    decoder = Decoder(
        layers=layers,
        embedding=model.model.embed_tokens.weight,
        final_norm=model.model.norm,
        head=model.lm_head,
        rotary=model.model.rotary_emb,
        heads=int(config.num_attention_heads),
        groups=int(config.num_key_value_heads),
        head_width=int(layers[0].qkv[0].out_features) // int(config.num_attention_heads),
        eps=float(config.rms_norm_eps),
        ends=tuple(ends),
    )
    for module in (decoder.head, *(part for layer in layers for part in layer.products)):
        kind_of(module)
    biased = [part for layer in layers for part in (layer.output, *layer.gate_up, layer.down) if part.bias is not None]
    if biased or decoder.head.bias is not None:
        raise SpecError("engine='graph' knows biases of q, k and v; this model has one elsewhere.")
    devices = {str(parameter.device) for parameter in model.parameters()}
    if len(devices) > 1:
        raise SpecError(f"engine='graph' runs on one device, this model lies on {', '.join(sorted(devices))}.")
    return decoder


def _layer(part: Any) -> Layer:
    attention, mlp = part.self_attn, part.mlp
    return Layer(
        input_norm=part.input_layernorm,
        qkv=(_product(attention.q_proj), _product(attention.k_proj), _product(attention.v_proj)),
        output=_product(attention.o_proj),
        post_norm=part.post_attention_layernorm,
        gate_up=(_product(mlp.gate_proj), _product(mlp.up_proj)),
        down=_product(mlp.down_proj),
    )


def _product(module: Any) -> Any:
    int4 = type(module) is torch.nn.Linear and packing_of(module.weight) is not None
    return PackedLinear(module) if int4 else module


def kind_of(module: Any) -> str:
    """Return whether a layer is "plain", "4-bit" (bitsandbytes) or "int4" (torchao).

    Raises:
        SpecError: it is of another kind, such as LLM.int8 or LoRA.
    """
    name = type(module).__name__
    if isinstance(module, PackedLinear):
        return "int4"
    if type(module) is torch.nn.Linear:
        return "plain"
    if name == "Linear4bit" and not hasattr(module, "lora_A"):
        state = module.weight.quant_state
        if state is None or state.blocksize != 64:
            raise SpecError(
                f"engine='graph' reads blocks of 64 four-bit weights, got {getattr(state, 'blocksize', None)}."
            )
        return "4-bit"
    hint = f" {_ADAPTED}." if hasattr(module, "lora_A") else ""
    raise SpecError(
        f"engine='graph' multiplies by torch.nn.Linear, bitsandbytes' 4-bit layers and torchao's int4 weights, not by {name}.{hint}"
    )


def int8_rows(weight: torch.Tensor, rows: int = 8192) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the matrix (n, k) in int8 and a float32 scale for each row, quantized some rows at a time; a row's largest code is 127."""
    codes = torch.empty_like(weight, dtype=torch.int8)
    scales = torch.empty(weight.shape[0], dtype=torch.float32, device=weight.device)
    for start in range(0, weight.shape[0], rows):
        part = weight[start : start + rows].float()
        largest = part.abs().amax(dim=1).clamp(min=1e-12)
        scales[start : start + rows] = largest / 127
        codes[start : start + rows] = (part * (127 / largest)[:, None]).round().to(torch.int8)
    return codes, scales
