"""Compare measured numbers with the measured ceilings of the hardware, and measured bytes with their closed forms."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence

from hpc_core.bounds.adapter import has_closed_form
from hpc_core.bounds.cost import decode_bytes, int8_head_bytes, train_flops
from hpc_core.bounds.footprint import embedding_bytes, kv_bytes_per_token, unexplained_bytes
from hpc_core.case.case import Case
from hpc_core.case.workloads import FinetuneSpec, GenerateSpec
from hpc_core.record.findings import Findings
from hpc_core.record.metrics import metric


def share_of_copy(
    case: Case, found: Findings, ceilings: Mapping[str, float], prompt_widths: Sequence[int], new_tokens: int
) -> Findings:
    """Return `mbu`, the model bandwidth utilization of decoding: bytes that must be read, over wall time and the measured copy rate.

    Args:
        case: a generation.
        found: contains `weights_bytes` and `decode_token_s`.
        ceilings: measured rates; without `copy_bytes_per_s` the result is empty.
        prompt_widths: tokens per row of each prompt.
        new_tokens: tokens generated after each prompt.
    """
    workload, model = case.workload, case.model
    assert isinstance(workload, GenerateSpec)
    assert model is not None
    ceiling, shape = ceilings.get("copy_bytes_per_s"), model.sizes
    if ceiling is None or shape is None:
        return Findings()
    length = statistics.fmean(prompt_widths) + new_tokens / 2
    cache = int(kv_bytes_per_token(shape, model.dtype) * length * workload.batch)
    embedding = embedding_bytes(shape, model.dtype)
    weights = int(found.metrics["weights_bytes"].value)
    needed = decode_bytes(weights, embedding, shape.tie_word_embeddings, cache)
    if workload.head == "int8":
        needed -= embedding - int8_head_bytes(shape)
    per_token = needed / found.metrics["decode_token_s"].value
    note = "bytes a token must read over wall time and the measured copy rate"
    return Findings(metrics={"mbu": metric("mbu", per_token / ceiling, note=note)})


def share_of_matmul(case: Case, step_s: float, ceilings: Mapping[str, float]) -> Findings:
    """Return `mfu`, the model FLOPs utilization of training: FLOPs without recomputation, over wall time and the measured rate."""
    model, workload, adapter = case.model, case.workload, case.adapter
    assert model is not None
    assert isinstance(workload, FinetuneSpec)
    dtype = "bfloat16" if workload.precision == "autocast-bf16" else model.dtype
    ceiling, shape = ceilings.get(f"matmul_{dtype}_flop_per_s"), model.sizes
    if shape is None or ceiling is None or workload.data.source != "random":
        return Findings()
    if adapter is not None and not has_closed_form(shape, adapter):
        return Findings()  # an adapter on another module, such as the head, has no closed form
    needed = train_flops(shape, workload.batch, workload.length, adapter)
    note = "FLOPs without recomputation over wall time and the measured matmul rate"
    return Findings(metrics={"mfu": metric("mfu", needed / step_s / ceiling, note=note)})


def unexplained(case: Case, found: Findings, *, cached_tokens: int | None = None) -> Findings:
    """Return `unexplained_bytes`: by how much weights, adapter, gradients, optimizer state and KV cache differ from their closed forms.

    Absolute differences are added, so that too few bytes in one category cannot hide too many in another. Activations and temporaries
    have no closed form. Memory at the peak that belongs to no category has its own metric, `at_peak_other_bytes`.
    """
    measured = {name: int(each.value) for name, each in found.metrics.items() if name.endswith("_bytes")}
    differences = unexplained_bytes(case, measured, cached_tokens=cached_tokens)
    if not differences:
        return Findings()
    odd = [f"{name.removesuffix('_bytes')} {value:+,}" for name, value in sorted(differences.items()) if value]
    note = "measured minus closed form: " + (", ".join(odd) or f"equal in {len(differences)} categories")
    total = sum(abs(value) for value in differences.values())
    return Findings(metrics={"unexplained_bytes": metric("unexplained_bytes", total, note=note)})


def bound_by(share: float) -> str:
    """Return what bounds a step, by the share of wall time in which the device worked."""
    return "device-bound" if share >= 0.9 else "launch-bound: the device waits for the host"
