"""Compare decoding by transformers' `generate` and by the graph engine in one session. Not part of the default suite.

    pytest --benchmark bench/decode_engine.py
    pytest --benchmark bench/decode_engine.py --case '*-b16' --case '*-4k'      # only the batch of 16 and the long prompts

Each case is measured and judged as usual. Its record compares the engine's logits and greedy tokens with the float32 reference and with
the stock forward. A comparison of all cases is printed below the table.
"""

from __future__ import annotations

import pytest

from hpc_core import Case, perf_cases
from hpc_core.catalogue import SWEEP, TUNED
from hpc_core.plugin.fixture import Perf, PerfSession
from hpc_core.record.record import Record

CASES: tuple[Case, ...] = tuple(case for case in (*TUNED, *SWEEP) if case.kind == "generate")
"""Stock and engine cases, with one change at a time."""


@perf_cases(CASES)
def test_case(case: Case, perf: Perf) -> None:
    """The case runs as asked, and no gated metric is worse than its baseline."""
    perf(case)


@pytest.mark.perf_gpu
def test_comparison(perf_session: PerfSession) -> None:
    """One table shows what this session measured of each case."""
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
        f"{record.case.id:48} {rate:8.1f} tok/s  {value('energy_token_j'):6.3f} J  busy {value('busy_share'):4.0%}  of copy rate {value('mbu'):4.0%}  "
        f"peak {value('peak_bytes') / 2**30:6.2f} GiB  logits off {value('logits_error'):.2g}"
    )
