"""Faults in what is built."""

from __future__ import annotations

from hpc_core.faults.fault import Fault

__all__ = ["BUILT"]

BUILT = (
    Fault(
        "quantization-skipped",
        "layers stay unquantized, and nobody says so",
        "qlora",
        ("quantized_layers*", "weights_bytes"),
        "building.quantization_skipped",
        predicted=("quantized_layers*",),
    ),
    Fault(
        "compute-dtype-fp32",
        "4-bit layers compute in float32, bitsandbytes' default",
        "qlora",
        ("compute_dtype*",),
        "building.compute_float32",
    ),
    Fault(
        "double-quant-lost",
        "the constants are not quantized again",
        "generate-nf4-dq",
        ("double_quant*", "weights_bytes"),
        "building.double_quant_lost",
        predicted=("double_quant*",),
    ),
    Fault("fp4-for-nf4", "FP4 code book in place of NF4", "qlora", ("quantization*",), "building.fp4_for_nf4"),
    Fault(
        "embeddings-fp32",
        "the embedding table is kept in float32",
        "lora",
        ("embedding*", "weights_bytes"),
        "building.embeddings_float32",
        predicted=("embedding*",),
    ),
    Fault(
        "rank-16",
        "LoRA's rank is 16, whatever was asked for",
        "lora",
        ("trainable*", "adapter_weights_bytes"),
        "building.rank_16",
        predicted=("trainable*",),
    ),
    Fault(
        "more-targets",
        "the adapter also sits on the MLP",
        "lora",
        ("trainable*", "adapter_weights_bytes"),
        "building.more_targets",
        predicted=("trainable*",),
    ),
    Fault(
        "fp32-adapters",
        "adapters are stored in float32, whatever was asked for",
        "lora-bf16",
        ("adapter_dtype",),
        "building.float32_adapters",
        predicted=("adapter_dtype",),
    ),
    Fault(
        "adapters-frozen",
        "half of the adapter is not trained",
        "lora",
        ("trainable*",),
        "building.adapters_frozen",
        predicted=("trainable*",),
    ),
    Fault(
        "gc-off",
        "checkpointing is asked for and silently not switched on",
        "lora-gc",
        ("checkpointing*",),
        "building.checkpointing_off",
        predicted=("peak_bytes",),
    ),
    Fault(
        "gc-on",
        "checkpointing is switched on though nobody asked",
        "lora",
        ("checkpointing*",),
        "building.checkpointing_on",
    ),
    Fault(
        "gc-reentrant",
        "the reentrant kind of checkpointing in place of the other",
        "lora-gc",
        ("checkpointing*", "operators"),
        "building.checkpointing_reentrant",
    ),
    Fault(
        "eager-attention",
        "attention by explicit products and softmax",
        "lora",
        ("attention*", "operators"),
        "building.eager_attention",
        predicted=("peak_bytes", "operators"),
    ),
    Fault(
        "attention-scaled",
        "the fused attention takes its scores twice as large",
        "full-fp32",
        ("equivalence",),
        "building.attention_scaled",
    ),
    Fault(
        "attention-not-causal",
        "the fused attention looks ahead",
        "generate-bf16",
        ("equivalence",),
        "building.attention_not_causal",
    ),
    Fault(
        "weights-redrawn",
        "one layer holds other weights of the right size",
        "lora",
        ("weights",),
        "building.weights_redrawn",
    ),
    Fault(
        "weights-shuffled",
        "the rows of one quantized layer are in another order: same sums, same sizes",
        "qlora",
        ("weights",),
        "building.weights_shuffled",
    ),
    Fault(
        "foreign-forward",
        "the MLPs run another library's forward, as a patch left behind by an earlier case would",
        "lora",
        ("modules_own",),
        "building.foreign_forward",
    ),
)
