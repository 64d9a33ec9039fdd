"""Faults in what generation does."""

from __future__ import annotations

from hpc_core.faults.fault import Fault

__all__ = ["GENERATED"]

GENERATED = (
    Fault(
        "cache-off",
        "every token computes the whole prompt again",
        "generate-bf16",
        ("cache", "flops"),
        "generation.cache_off",
        predicted=("flops",),  # at few layers in decode bytes too, at many not
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
        predicted=("peak_prefill_bytes", "peak_bytes"),
    ),
    Fault(
        "decode-sleep",
        "the host sleeps 5 ms at every token",
        "generate-bf16",
        ("decode_token_s", "query_s"),
        "generation.decode_sleep",
        needs="A/B",
    ),
)
