"""Decoding by transformers' `generate` and by the graph engine, side by side in one session. Not part of the default suite.

    pytest --benchmark bench/decode_engine.py

Each case is measured and judged as ever; its record holds the engine's logits and greedy tokens beside the float32 reference and beside the stock
forward. What they say together is printed below the table.
"""

from __future__ import annotations

import pytest

from hpc_core import Case, perf_cases
from hpc_core.cases import generate, llama_3b
from hpc_core.plugin.fixture import Perf
from hpc_core.plugin.session import PerfSession
from hpc_core.record import Record
from hpc_core.spec import ModelSpec, QuantSpec

_NF4 = QuantSpec(kind="nf4", compute_dtype="bfloat16")
_bf16 = generate(llama_3b, variant="generate-bf16-100", prompts=2, prompt_length=100, new_tokens=128, timeout_s=600)
_nf4 = _bf16.vary("generate-nf4-100", quantization=_NF4)
_bf16_graph = _bf16.vary("generate-bf16-graph", engine="graph")
_nf4_graph = _nf4.vary("generate-nf4-graph", engine="graph")

CASES: tuple[Case, ...] = (
    _bf16,
    _bf16_graph,
    _bf16_graph.vary("generate-bf16-graph-torch", kernels="torch"),
    _bf16_graph.vary("generate-bf16-graph-inductor", kernels="inductor"),
    _bf16_graph.vary("generate-bf16-graph-int8-head", head="int8"),
    _bf16_graph.vary("generate-bf16-graph-sampled", temperature=0.8, top_k=50),
    _nf4,
    _nf4_graph,
    _nf4_graph.vary("generate-nf4-graph-int8-head", head="int8"),
    _nf4_graph.vary(
        "generate-nf4-dq-graph", quantization=QuantSpec(kind="nf4", compute_dtype="bfloat16", double_quant=True)
    ),
    *(
        case.vary(f"{case.id.rpartition('/')[2]}-b{batch}", batch=batch)
        for case in (_bf16, _bf16_graph, _nf4, _nf4_graph)
        for batch in (4, 16, 32)
    ),
    _bf16_graph.vary("generate-bf16-graph-4k", prompt_length=4096, prompts=1),
    *(
        generate(ModelSpec(shape=shape), variant=variant, prompts=2, prompt_length=100, new_tokens=128, **what)
        for shape in ("llama-3.2-1b", "llama-3.1-8b")
        for variant, what in (
            ("generate-bf16-100", {}),
            ("generate-bf16-graph", {"engine": "graph"}),
            ("generate-nf4-graph", {"engine": "graph", "quantization": _NF4}),
        )
    ),
)
"""Stock and engine, one thing changed at a time."""


@perf_cases(CASES)
def test_case(case: Case, perf: Perf) -> None:
    """The case runs as asked, and no gated metric is worse than its baseline."""
    perf(case)


@pytest.mark.gpu
def test_side_by_side(perf_session: PerfSession) -> None:
    """What this session measured of each case stands in one table."""
    records = [record for name, record in perf_session.records.items() if "decode_token_s" in record.metrics]
    if not records:
        pytest.skip("no sound record in this session")
    perf_session.show("Decoding, stock and engine", "\n".join(_line(record) for record in records))


def _line(record: Record) -> str:
    def value(name: str) -> float:
        metric = record.metrics.get(name)
        return float("nan") if metric is None else float(metric.value)

    batch = getattr(record.case.workload, "batch", 1)
    rate = batch / value("decode_token_s")
    return (
        f"{record.case.id:48} {rate:8.1f} tok/s  busy {value('busy_share'):4.0%}  of copy rate {value('mbu'):4.0%}  "
        f"peak {value('peak_bytes') / 2**30:6.2f} GiB  logits off {value('logits_error'):.2g}"
    )
