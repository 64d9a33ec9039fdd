"""Faults in what is built: quantization, dtypes, adapters, checkpointing, attention. As an upgrade or a careless commit would."""

from __future__ import annotations

from types import FunctionType
from typing import Any

import torch

from hpc_core.builders import assemble
from hpc_core.builders.adapter import adapter_parameters
from hpc_core.builders.drawn import draw_weights
from hpc_core.builders.libraries import library
from hpc_core.faults.fault import Injection
from hpc_core.faults.replacing import replace

_TRANSFORMERS = "transformers"


def _with(injection: Injection, owner: Any, name: str, **changed: Any) -> None:
    """Call the original with other keyword arguments."""

    def make(original: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            return original(*args, **(kwargs | changed if injection.hit() else kwargs))

        return call

    replace(owner, name, make)


def _after(injection: Injection, owner: Any, name: str, change: Any) -> None:
    """Change what the original returned."""

    def make(original: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            result = original(*args, **kwargs)
            if injection.hit():
                change(result)
            return result

        return call

    replace(owner, name, make)


def quantization_skipped(injection: Injection) -> None:
    """The step that quantizes returns at once."""

    def make(original: Any) -> Any:
        def call(model: torch.nn.Module, *args: Any, **kwargs: Any) -> None:
            if not injection.hit():
                original(model, *args, **kwargs)

        return call

    replace(assemble, "quantize", make)


def compute_float32(injection: Injection) -> None:
    """transformers' configuration forgets the compute dtype."""
    _with(injection, library(_TRANSFORMERS, "This fault"), "BitsAndBytesConfig", bnb_4bit_compute_dtype=torch.float32)


def double_quant_lost(injection: Injection) -> None:
    """transformers' configuration forgets double quantization."""
    _with(injection, library(_TRANSFORMERS, "This fault"), "BitsAndBytesConfig", bnb_4bit_use_double_quant=False)


def fp4_for_nf4(injection: Injection) -> None:
    """transformers' configuration falls back to its default type."""
    _with(injection, library(_TRANSFORMERS, "This fault"), "BitsAndBytesConfig", bnb_4bit_quant_type="fp4")


def embeddings_float32(injection: Injection) -> None:
    """Loading leaves the embedding table in float32, and the tied head with it."""

    def change(model: Any) -> None:
        table = model.get_input_embeddings()
        table.weight.data = table.weight.data.float()
        table.register_forward_hook(lambda _, __, out: out.to(torch.bfloat16))
        head = model.get_output_embeddings()
        head.register_forward_pre_hook(lambda _, args: (args[0].float(), *args[1:]))

    _after(injection, assemble, "causal_lm", change)


def rank_16(injection: Injection) -> None:
    """peft's LoraConfig takes 16 for any rank."""
    _with(injection, library("peft", "This fault"), "LoraConfig", r=16)


def more_targets(injection: Injection) -> None:
    """peft's LoraConfig takes every linear layer for any target."""
    everything = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    _with(injection, library("peft", "This fault"), "LoraConfig", target_modules=everything)


def float32_adapters(injection: Injection) -> None:
    """Adapter weights are cast to float32 after they were attached."""

    def change(model: torch.nn.Module) -> None:
        for parameter in adapter_parameters(model).values():
            parameter.data = parameter.data.float()

    _after(injection, assemble, "attach_adapter", change)


def adapters_frozen(injection: Injection) -> None:
    """The down-projections of the adapter take no gradient."""

    def change(model: torch.nn.Module) -> None:
        for name, parameter in adapter_parameters(model).items():
            parameter.requires_grad_("lora_A" not in name)

    _after(injection, assemble, "attach_adapter", change)


def checkpointing_off(injection: Injection) -> None:
    """transformers' switch does nothing."""
    transformers: Any = library(_TRANSFORMERS, "This fault")

    def make(original: Any) -> Any:
        def switch(*args: Any, **kwargs: Any) -> None:
            if not injection.hit():
                original(*args, **kwargs)

        return switch

    replace(transformers.PreTrainedModel, "gradient_checkpointing_enable", make)


def checkpointing_on(injection: Injection) -> None:
    """Attaching an adapter switches checkpointing on, as `prepare` does."""

    def change(model: Any) -> None:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})

    _after(injection, assemble, "attach_adapter", change)


def checkpointing_reentrant(injection: Injection) -> None:
    """transformers' switch takes the reentrant kind for any."""
    transformers: Any = library(_TRANSFORMERS, "This fault")

    def make(original: Any) -> Any:
        def switch(model: Any, gradient_checkpointing_kwargs: Any = None, **kwargs: Any) -> None:
            harm = injection.hit()
            asked = {"use_reentrant": True} if harm else gradient_checkpointing_kwargs
            original(model, gradient_checkpointing_kwargs=asked, **kwargs)
            if harm:
                model.enable_input_require_grads()

        return switch

    replace(transformers.PreTrainedModel, "gradient_checkpointing_enable", make)


def eager_attention(injection: Injection) -> None:
    """The configuration falls back to eager attention."""

    def change(model: Any) -> None:
        model.config._attn_implementation = "eager"

    _after(injection, assemble, "causal_lm", change)


def attention_scaled(injection: Injection) -> None:
    """The fused attention takes its scores twice as large; eager attention is as it was."""
    _fused_attention(injection, lambda options: options | {"scaling": 2 * options["scaling"]})


def attention_not_causal(injection: Injection) -> None:
    """The fused attention forgets that it must not look ahead; eager attention is as it was."""
    _fused_attention(injection, lambda options: options | {"is_causal": False})


def _fused_attention(injection: Injection, change: Any) -> None:
    registry: Any = library("transformers.modeling_utils", "This fault").ALL_ATTENTION_FUNCTIONS
    original = registry["sdpa"]

    def attention(*args: Any, **options: Any) -> Any:
        return original(*args, **(change(options) if injection.hit() else options))

    registry["sdpa"] = attention


def weights_redrawn(injection: Injection) -> None:
    """Loading takes one layer's down-projection from another seed."""

    def change(model: Any) -> None:
        draw_weights(model.model.layers[1].mlp.down_proj, 1)

    _after(injection, assemble, "causal_lm", change)


def weights_shuffled(injection: Injection) -> None:
    """Loading puts the rows of one layer's down-projection in the opposite order, before it is quantized."""

    def change(model: Any) -> None:
        weight = model.model.layers[1].mlp.down_proj.weight
        weight.data = weight.data.flip(0)

    _after(injection, assemble, "causal_lm", change)


def foreign_forward(injection: Injection) -> None:
    """transformers' MLP gets a forward that was written elsewhere and computes the same, as Liger's patch of the whole process does."""
    mlp: Any = library("transformers.models.llama.modeling_llama", "This fault").LlamaMLP
    original = mlp.forward

    def forward(self: Any, x: torch.Tensor) -> Any:
        injection.hit()
        return original(self, x)

    if injection.active:
        # The same code, as if another package had brought it: it runs with that package's globals.
        elsewhere = {"__name__": "another_library.patches", "__builtins__": __builtins__}
        mlp.forward = FunctionType(forward.__code__, elsewhere, "forward", closure=forward.__closure__)
    else:
        mlp.forward = forward
