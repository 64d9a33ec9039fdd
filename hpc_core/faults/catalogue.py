"""The faults by name: which variant each is tried on, what it must turn red, and the one door that injects them.

Knows no torch: a fault's patch lies in a module beside this one and is imported when the fault is injected.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass

from hpc_core.errors import SpecError

__all__ = ["FAULTS", "TWIN", "Fault", "Injection", "inject"]

TWIN = ".twin"
"""After a fault's name: put the patch in place and let it do what the original did. A twin must stay green."""


@dataclass(frozen=True)
class Fault:
    """One way to get slower, bigger or wrong, applied from outside the code that it worsens."""

    name: str
    summary: str
    variant: str
    """The variant it is tried on: `tiny/<variant>` on a CPU, `llama-3.2-3b/<variant>` on a GPU."""
    shows_in: tuple[str, ...]
    """Metrics or audit facts of which at least one must turn red; a trailing * stands for any ending."""
    patch: str
    """`module.function` in this package."""


@dataclass
class Injection:
    """A fault that is in place; `hits` counts how often its patched code ran."""

    fault: Fault
    active: bool = True
    """False in a no-op twin: the patch is there and does what the original did."""
    hits: int = 0

    def hit(self) -> bool:
        """The patched code runs; whether it is to do harm."""
        self.hits += 1
        return self.active


_LIST = (
    # What is built.
    Fault(
        "quantization-skipped",
        "layers stay unquantized, and nobody says so",
        "qlora",
        ("quantized_layers*", "weights_bytes"),
        "building.quantization_skipped",
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
    ),
    Fault("fp4-for-nf4", "FP4 code book in place of NF4", "qlora", ("quantization*",), "building.fp4_for_nf4"),
    Fault(
        "embeddings-fp32",
        "the embedding table is kept in float32",
        "lora",
        ("embedding*", "weights_bytes"),
        "building.embeddings_float32",
    ),
    Fault(
        "rank-16",
        "LoRA's rank is 16, whatever was asked for",
        "lora",
        ("trainable*", "adapter_weights_bytes"),
        "building.rank_16",
    ),
    Fault(
        "more-targets",
        "the adapter also sits on the MLP",
        "lora",
        ("trainable*", "adapter_weights_bytes"),
        "building.more_targets",
    ),
    Fault(
        "fp32-adapters",
        "adapters are stored in float32, whatever was asked for",
        "lora-bf16",
        ("adapter_dtype",),
        "building.float32_adapters",
    ),
    Fault("adapters-frozen", "half of the adapter is not trained", "lora", ("trainable*",), "building.adapters_frozen"),
    Fault(
        "gc-off",
        "checkpointing is asked for and silently not switched on",
        "lora-gc",
        ("checkpointing*",),
        "building.checkpointing_off",
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
    # What a training step does.
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
    # What generation does.
    Fault(
        "cache-off",
        "every token computes the whole prompt again",
        "generate-bf16",
        ("cache", "flops"),
        "generation.cache_off",
    ),
    Fault(
        "cache-copied", "the cache is copied at every token", "generate-bf16", ("operators",), "generation.cache_copied"
    ),
    Fault(
        "logits-whole-prompt",
        "prefill computes logits of every prompt token",
        "generate-bf16",
        ("flops_prefill", "peak_prefill_bytes"),
        "generation.logits_whole_prompt",
    ),
)

FAULTS: dict[str, Fault] = {fault.name: fault for fault in _LIST}
"""The catalogue."""


def inject(name: str) -> Injection:
    """Put the fault (or its twin, `NAME.twin`) in place, for the rest of this process.

    Raises:
        SpecError: no fault has this name; the message lists them.
    """
    fault = FAULTS.get(name.removesuffix(TWIN))
    if fault is None:
        known = "\n".join(f"  {known.name}: {known.summary}" for known in FAULTS.values())
        raise SpecError(f"No fault is called {name!r}. There are:\n{known}")
    injection = Injection(fault, active=not name.endswith(TWIN))
    module, _, function = fault.patch.partition(".")
    getattr(importlib.import_module(f"hpc_core.faults.{module}"), function)(injection)
    return injection
