"""Faults in what is built: quantization, dtypes, adapters, checkpointing, attention."""

from __future__ import annotations

from types import FunctionType
from typing import Any

from hpc_core.faults.fault import Call, Fault, Injection, fault

_QUANTIZE = "hpc_core.builders.assemble:quantize"
_LOAD = "hpc_core.builders.assemble:causal_lm"
_ATTACH = "hpc_core.builders.assemble:attach_adapter"
_BNB_CONFIG = "transformers:BitsAndBytesConfig"
_LORA_CONFIG = "peft:LoraConfig"
_CHECKPOINTING = "transformers:PreTrainedModel.gradient_checkpointing_enable"
_SDPA = "transformers.modeling_utils:ALL_ATTENTION_FUNCTIONS[sdpa]"


@fault(
    "quantization-skipped",
    "layers silently stay unquantized",
    on="qlora",
    shows_in=("quantized_layers*", "weights_bytes"),
    predicted=("quantized_layers*",),
    patch=_QUANTIZE,
)
def quantization_skipped(original: Call, *args: Any, **kwargs: Any) -> None:
    """Quantize nothing."""


@fault(
    "compute-dtype-fp32",
    "4-bit layers compute in float32, the default of bitsandbytes",
    on="qlora",
    shows_in=("compute_dtype*",),
    patch=_BNB_CONFIG,
)
def compute_dtype_fp32(original: Call, *args: Any, **kwargs: Any) -> Any:
    """Ignore the compute dtype of the configuration."""
    import torch

    return original(*args, **(kwargs | {"bnb_4bit_compute_dtype": torch.float32}))


@fault(
    "double-quant-lost",
    "the block constants are not quantized again",
    on="generate-nf4-dq",
    shows_in=("double_quant*", "weights_bytes"),
    predicted=("double_quant*",),
    patch=_BNB_CONFIG,
)
def double_quant_lost(original: Call, *args: Any, **kwargs: Any) -> Any:
    """Ignore double quantization in the configuration."""
    return original(*args, **(kwargs | {"bnb_4bit_use_double_quant": False}))


@fault("fp4-for-nf4", "FP4 in place of NF4", on="qlora", shows_in=("quantization*",), patch=_BNB_CONFIG)
def fp4_for_nf4(original: Call, *args: Any, **kwargs: Any) -> Any:
    """Fall back to the default type of the configuration."""
    return original(*args, **(kwargs | {"bnb_4bit_quant_type": "fp4"}))


@fault(
    "embeddings-fp32",
    "the embedding table stays in float32",
    on="lora",
    shows_in=("embedding*", "weights_bytes"),
    predicted=("embedding*",),
    patch=_LOAD,
)
def embeddings_fp32(original: Call, *args: Any, **kwargs: Any) -> Any:
    """Load the embedding table, and with it the tied head, in float32."""
    import torch

    model = original(*args, **kwargs)
    table = model.get_input_embeddings()
    table.weight.data = table.weight.data.float()
    table.register_forward_hook(lambda _, __, out: out.to(torch.bfloat16))
    head = model.get_output_embeddings()
    head.register_forward_pre_hook(lambda _, args: (args[0].float(), *args[1:]))
    return model


@fault(
    "rank-16",
    "LoRA uses rank 16, whatever the case asks for",
    on="lora",
    shows_in=("trainable*", "adapter_weights_bytes"),
    predicted=("trainable*",),
    patch=_LORA_CONFIG,
)
def rank_16(original: Call, *args: Any, **kwargs: Any) -> Any:
    """Replace the rank."""
    return original(*args, **(kwargs | {"r": 16}))


@fault(
    "more-targets",
    "the adapter is also attached to the MLP",
    on="lora",
    shows_in=("trainable*", "adapter_weights_bytes"),
    predicted=("trainable*",),
    patch=_LORA_CONFIG,
)
def more_targets(original: Call, *args: Any, **kwargs: Any) -> Any:
    """Attach the adapter to every linear layer."""
    everything = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    return original(*args, **(kwargs | {"target_modules": everything}))


@fault(
    "fp32-adapters",
    "adapters are stored in float32, whatever the case asks for",
    on="lora-bf16",
    shows_in=("adapter_dtype",),
    predicted=("adapter_dtype",),
    patch=_ATTACH,
)
def fp32_adapters(original: Call, *args: Any, **kwargs: Any) -> Any:
    """Cast the adapter after attaching it."""
    from hpc_core.builders.adapter import adapter_parameters

    model = original(*args, **kwargs)
    for parameter in adapter_parameters(model).values():
        parameter.data = parameter.data.float()
    return model


@fault(
    "adapters-frozen",
    "half of the adapter is not trained",
    on="lora",
    shows_in=("trainable*",),
    predicted=("trainable*",),
    patch=_ATTACH,
)
def adapters_frozen(original: Call, *args: Any, **kwargs: Any) -> Any:
    """Freeze the down-projections of the adapter."""
    from hpc_core.builders.adapter import adapter_parameters

    model = original(*args, **kwargs)
    for name, parameter in adapter_parameters(model).items():
        parameter.requires_grad_("lora_A" not in name)
    return model


@fault(
    "gc-off",
    "checkpointing silently stays off",
    on="lora-gc",
    shows_in=("checkpointing*",),
    predicted=("peak_bytes",),
    patch=_CHECKPOINTING,
)
def gc_off(original: Call, *args: Any, **kwargs: Any) -> None:
    """Enable nothing."""


@fault(
    "gc-on",
    "checkpointing is enabled although the case does not ask for it",
    on="lora",
    shows_in=("checkpointing*",),
    patch=_ATTACH,
)
def gc_on(original: Call, *args: Any, **kwargs: Any) -> Any:
    """Enable checkpointing with the adapter, as peft's `prepare_model_for_kbit_training` does."""
    model = original(*args, **kwargs)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return model


@fault(
    "gc-reentrant",
    "reentrant checkpointing in place of the other kind",
    on="lora-gc",
    shows_in=("checkpointing*", "operators"),
    patch=_CHECKPOINTING,
)
def gc_reentrant(original: Call, model: Any, gradient_checkpointing_kwargs: Any = None, **kwargs: Any) -> None:
    """Enable the reentrant kind, whatever the arguments say."""
    original(model, gradient_checkpointing_kwargs={"use_reentrant": True}, **kwargs)
    model.enable_input_require_grads()


@fault(
    "eager-attention",
    "attention by explicit matrix products and softmax",
    on="lora",
    shows_in=("attention*", "operators"),
    predicted=("peak_bytes", "operators"),
    patch=_LOAD,
)
def eager_attention(original: Call, *args: Any, **kwargs: Any) -> Any:
    """Fall back to eager attention."""
    model = original(*args, **kwargs)
    model.config._attn_implementation = "eager"
    return model


@fault(
    "attention-scaled",
    "the fused attention doubles its scores",
    on="full-fp32",
    shows_in=("equivalence",),
    patch=_SDPA,
)
def attention_scaled(original: Call, *args: Any, **kwargs: Any) -> Any:
    """Double the scale. Eager attention is unaffected."""
    return original(*args, **(kwargs | {"scaling": 2 * kwargs["scaling"]}))


@fault(
    "attention-not-causal",
    "the fused attention looks ahead",
    on="generate-bf16",
    shows_in=("equivalence",),
    patch=_SDPA,
)
def attention_not_causal(original: Call, *args: Any, **kwargs: Any) -> Any:
    """Drop causality. Eager attention is unaffected."""
    return original(*args, **(kwargs | {"is_causal": False}))


@fault(
    "weights-redrawn",
    "one layer holds other weights of the right size",
    on="lora",
    shows_in=("weights",),
    patch=_LOAD,
)
def weights_redrawn(original: Call, *args: Any, **kwargs: Any) -> Any:
    """Draw one layer's down-projection from another seed."""
    from hpc_core.builders.causal_lm import draw_weights

    model = original(*args, **kwargs)
    draw_weights(model.model.layers[1].mlp.down_proj, 1)
    return model


@fault(
    "weights-shuffled",
    "the rows of one quantized layer are in another order: same sums, same sizes",
    on="qlora",
    shows_in=("weights",),
    patch=_LOAD,
)
def weights_shuffled(original: Call, *args: Any, **kwargs: Any) -> Any:
    """Reverse the rows of one layer's down-projection before it is quantized."""
    model = original(*args, **kwargs)
    weight = model.model.layers[1].mlp.down_proj.weight
    weight.data = weight.data.flip(0)
    return model


@fault(
    "weights-transposed",
    "the down-projections are stored column by column: same values, same bytes",
    on="generate-bf16",
    shows_in=("weight_layout",),
    predicted=("weight_layout",),
    patch=_LOAD,
)
def weights_transposed(original: Call, *args: Any, **kwargs: Any) -> Any:
    """Store each layer's down-projection in another layout."""
    model = original(*args, **kwargs)
    for layer in model.model.layers:
        weight = layer.mlp.down_proj.weight
        weight.data = weight.data.T.contiguous().T
    return model


def _foreign_forward(original: Call, injection: Injection) -> Call:
    def forward(self: Any, x: Any) -> Any:
        injection.hit()
        return original(self, x)

    if not injection.active:
        return forward
    # The same code with the globals of another package, as if that package had defined it.
    elsewhere = {"__name__": "another_library.patches", "__builtins__": __builtins__}
    return FunctionType(forward.__code__, elsewhere, "forward", closure=forward.__closure__)


foreign_forward = Fault(
    name="foreign-forward",
    summary="the MLPs run the forward of another library, like a patch that an earlier case left behind",
    variant="lora",
    shows_in=("modules_own",),
    patch="transformers.models.llama.modeling_llama:LlamaMLP.forward",
    replacement=_foreign_forward,
)
"""Computes the same. Liger patches the whole process in this way."""
