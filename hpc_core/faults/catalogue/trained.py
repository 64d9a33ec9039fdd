"""Faults in what a training step does."""

from __future__ import annotations

from hpc_core.faults.fault import Fault

__all__ = ["TRAINED"]

TRAINED = (
    Fault(
        "extra-kernel",
        "every decoder layer launches one kernel more",
        "lora",
        ("kernels", "operators"),
        "training.extra_kernel",
    ),
    Fault(
        "extra-clone",
        "every LoRA layer copies its input first",
        "lora",
        ("operators", "peak_bytes"),
        "training.extra_clone",
    ),
    Fault(
        "math-attention",
        "the fused attention kernels are switched off",
        "lora",
        ("attention*", "operators"),
        "training.math_attention",
    ),
    Fault(
        "mask-built",
        "a mask of the whole square is built where none is needed",
        "lora",
        ("operators",),
        "training.mask_built",
    ),
    Fault(
        "logits-kept",
        "the last step's logits stay alive",
        "lora",
        ("peak_bytes", "peak_forward_bytes"),
        "training.logits_kept",
    ),
    Fault(
        "retained-64mib",
        "the optimizer's first step leaves 64 MiB behind",
        "lora",
        ("peak_bytes", "at_peak_other_bytes"),
        "training.retained_tensor",
    ),
    Fault(
        "growing-memory",
        "each step leaves 4 MiB behind",
        "lora-soak",
        ("memory_growth",),
        "training.growing_memory",
    ),
    Fault(
        "sync-per-layer",
        "the host reads a number in every layer",
        "lora",
        ("operators", "copies"),
        "training.sync_per_layer",
    ),
    Fault(
        "item-per-step",
        "the host reads the loss in every step",
        "lora",
        ("operators", "copies"),
        "training.item_per_step",
    ),
    Fault(
        "double-forward",
        "the forward runs twice",
        "lora",
        ("flops", "operators", "checkpointing*"),
        "training.double_forward",
    ),
    Fault(
        "gradients-kept",
        "gradients are zeroed in place of freed",
        "full-bf16",
        ("peak_forward_bytes", "operators", "peak_bytes"),
        "training.gradients_kept",
    ),
    Fault(
        "foreach-for-fused",
        "the optimizer runs operator by operator",
        "lora",
        ("operators", "optimizer*"),
        "training.foreach_for_fused",
    ),
    Fault(
        "half-the-tokens",
        "the second half of every row is not trained",
        "lora",
        ("trained_tokens",),
        "training.half_the_tokens",
    ),
    Fault(
        "mask-dropped",
        "the padding mask does not reach the model",
        "lora-padded",
        ("padded_tokens", "batch"),
        "training.mask_dropped",
    ),
    Fault(
        "padding-for-packing",
        "rows are padded where they should be packed",
        "lora-packed",
        ("padded_tokens", "tokens", "packed*"),
        "training.padding_for_packing",
    ),
    Fault(
        "optimizer-32bit",
        "an 8-bit optimizer keeps its state in float32",
        "lora-8bit",
        ("optimizer_state_dtype",),
        "training.optimizer_32bit",
    ),
    Fault(
        "loss-summed",
        "the loss is the sum over the labels, not their mean",
        "lora",
        ("loss", "loss_scale"),
        "training.loss_summed",
    ),
    Fault(
        "loss-scaled",
        "the loss goes into the backward pass four times as large; the one that is reported is right",
        "lora",
        ("loss_scale",),
        "training.loss_scaled",
    ),
)
