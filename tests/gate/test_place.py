"""What stands in a baseline's place, and baselines of something else: each has its own verdict and text."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import pytest

from hpc_core.baselines.accept import accept
from hpc_core.baselines.baseline import Baseline, Damaged, Missing, OlderSchema
from hpc_core.baselines.lookup import find
from hpc_core.case.case import AdapterSpec
from hpc_core.case.limits import Limits
from hpc_core.gate.judge import judge
from hpc_core.gate.verdict import Verdict
from hpc_core.record.record import Record
from tests.strategies import CPU, a_case, a_record, counted, peak

CPU_BYTES: dict[str, Any] = {"depends_on": ("case", "stack")}
UPDATE = 'pytest --benchmark --case tiny/lora --perf-update --reason "…"'


def baseline(record: Record, root: Path, **changes: Any) -> Baseline:
    accept(root, record, reason="r")
    found = find(root, record.circumstances.machine.key, record.case.id)
    assert isinstance(found, Baseline)
    return msgspec.structs.replace(found, **changes)


@pytest.mark.parametrize(
    ("lookup", "verdict", "fragments"),
    [
        (
            Missing(path="p", elsewhere=("cpu",)),
            "NO_BASELINE",
            ("no baseline of tiny/lora for nvidia", "one for cpu", UPDATE),
        ),
        (
            Damaged(path="p/q.json", reason="cut"),
            "INVALID",
            ("baseline damaged: cut", "git checkout -- p/q.json", UPDATE),
        ),
        (OlderSchema(path="p", found=0), "INCOMPATIBLE", ("older schema 0, this hpc-core reads 1", UPDATE)),
        (OlderSchema(path="p", found=7), "INCOMPATIBLE", ("newer schema 7", "Upgrade hpc-core")),
    ],
)
def test_what_stands_in_a_baselines_place(lookup: Any, verdict: str, fragments: tuple[str, ...]) -> None:
    """Each has its own verdict, text and next step, for the case and for every metric."""
    judgement = judge(a_record(), lookup)
    assert {judgement.verdict.value, *(row.verdict.value for row in judgement.metrics)} == {verdict}
    assert len(judgement.metrics) == 3
    for fragment in fragments:
        assert fragment in f"{judgement.headline} {judgement.next_step}"


def test_a_changed_case_is_stale(tmp_path: Path) -> None:
    """A baseline of another digest is STALE and says which fields changed; id, limits and timeout are none."""
    lookup = baseline(a_record(), tmp_path)
    case = a_case(adapter=AdapterSpec(rank=16), seed=3, timeout_s=9, limits=Limits(operators="1%"))
    judgement = judge(a_record(case=case), lookup)
    assert judgement.verdict is Verdict.INCOMPATIBLE
    assert judgement.headline.startswith(
        "STALE: the case changed since this baseline (adapter.rank default → 16, seed default → 3)"
    )
    assert judge(a_record(case=a_case(timeout_s=9)), lookup).verdict is Verdict.PASS


def test_a_copied_baseline(tmp_path: Path) -> None:
    """A baseline of another id, even of the same work, is not taken."""
    judgement = judge(a_record(case=a_case("tiny/other")), baseline(a_record(), tmp_path))
    assert judgement.verdict is Verdict.INCOMPATIBLE
    assert "the baseline is of tiny/lora, not of tiny/other" in judgement.headline


def test_a_foreign_machine(tmp_path: Path) -> None:
    """What depends on the machine is not compared with another's; what does not is."""
    record = a_record({"peak_bytes": peak(), "operators": counted()})
    judgement = judge(record, baseline(record, tmp_path, machine=CPU))
    assert [(row.metric, row.verdict.value) for row in judgement.metrics] == [
        ("peak_bytes", "INCOMPATIBLE"),
        ("operators", "PASS"),
    ]
    assert "the baseline is of cpu, this is nvidia-h100" in judgement.headline
