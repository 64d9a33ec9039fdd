"""The committed baselines, and the records they were accepted from, with one metric changed: nothing that is worse passes."""

from __future__ import annotations

import random
import shutil
from functools import cache
from pathlib import Path
from typing import Any

import msgspec
import pytest

from hpc_core.baselines import lookup
from hpc_core.baselines.baseline import Baseline
from hpc_core.baselines.history import last_accepted
from hpc_core.case.errors import SpecError
from hpc_core.gate.verdict import Judgement, Verdict
from hpc_core.record.record import Record, record_from_json
from hpc_core.report.entry import entries_of
from tests.gate.mutations import BARELY, IN_BASELINE, IN_RECORD, changed_metrics, changed_record

COMMITTED = Path(__file__).parents[2] / "baselines"
PASSES = {Verdict.PASS, Verdict.IMPROVED}


@cache
def sound() -> tuple[tuple[str, Baseline, Record], ...]:
    """Every committed baseline with the record that was accepted last, where that passes as it is."""
    found = []
    for path in sorted(COMMITTED.glob("*/*/*.json")):
        key, case = path.parts[-3], f"{path.parts[-2]}/{path.stem}"
        baseline, record = lookup.find(COMMITTED, key, case), last_accepted(COMMITTED, key, case)
        if isinstance(baseline, Baseline) and record is not None:
            found.append((key, baseline, record))
    return tuple(found)


def judgement(record: Record, root: Path) -> Judgement:
    """The verdict as a report gives it, with the accepted sessions."""
    [entry] = entries_of([record], root)
    assert entry.judgement is not None
    return entry.judgement


def test_most_records_pass_as_they_are() -> None:
    """Otherwise the changes below would show nothing."""
    passing = [judgement(record, COMMITTED).verdict in PASSES for _, _, record in sound()[::8]]
    assert len(passing) >= 10
    assert sum(passing) >= 0.9 * len(passing)


@pytest.mark.parametrize("count", [100, pytest.param(2000, marks=pytest.mark.nightly)])
def test_a_record_with_a_changed_metric_does_not_pass(count: int) -> None:
    """Worse, missing, negative, another quantity or no number: the verdict is another one, or the record is refused."""
    draw = random.Random(18)
    for number in range(count):
        _, _, record = draw.choice(sound())
        kind = [*IN_RECORD, BARELY][number % (len(IN_RECORD) + 1)]
        name, content = changed_record(record, kind, draw)
        try:
            changed = record_from_json(content)
        except SpecError:
            continue
        found = judgement(changed, COMMITTED)
        assert found.verdict not in PASSES, (record.case.id, kind, name, found.headline)


@pytest.mark.parametrize("count", [60, pytest.param(1000, marks=pytest.mark.nightly)])
def test_a_changed_baseline_does_not_pass(tmp_path: Path, count: int) -> None:
    """Although its checksum fits: a baseline that is better than what runs, or holds no measurement, lets nothing through."""
    draw = random.Random(18)
    for number in range(count):
        key, baseline, record = draw.choice(sound())
        kind = list(IN_BASELINE)[number % len(IN_BASELINE)]
        content: dict[str, Any] = msgspec.json.decode(lookup.render(baseline))
        del content["checksum"]
        name = changed_metrics(content["metrics"], kind, draw)
        root = tmp_path / str(number)
        path = lookup.baseline_path(root, key, baseline.case)
        path.parent.mkdir(parents=True)
        history = lookup.history_path(COMMITTED, key, baseline.case)
        shutil.copy(history, lookup.history_path(root, key, baseline.case))
        if any(isinstance(each["value"], int) and each["value"] >= 2**64 for each in content["metrics"].values()):
            continue  # msgspec does not write it
        path.write_bytes(lookup._rendered(content))
        found = judgement(record, root)
        assert found.verdict not in PASSES, (baseline.case, kind, name, found.headline)
        shutil.rmtree(root)


@pytest.mark.parametrize("count", [60, pytest.param(1000, marks=pytest.mark.nightly)])
def test_a_baseline_changed_by_hand_does_not_pass(tmp_path: Path, count: int) -> None:
    """Without a checksum that fits, no change of any number passes, also one that makes nothing worse."""
    draw = random.Random(18)
    for _ in range(count):
        key, baseline, record = draw.choice(sound())
        content = lookup.render(baseline)
        lines = content.splitlines(keepends=True)
        numbered = [at for at, line in enumerate(lines) if line.strip().startswith(b'"value"')]
        at = draw.choice(numbered)
        value = draw.choice([b"0", b"1", b"NaN", b"null", b"-1", b'"1"', b"1e400", b"true", b"[]"])
        lines[at] = lines[at].partition(b":")[0] + b": " + value + (b",\n" if lines[at].endswith(b",\n") else b"\n")
        path = lookup.baseline_path(tmp_path, key, baseline.case)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"".join(lines))
        if path.read_bytes() != content:
            assert judgement(record, tmp_path).verdict is Verdict.INVALID, (baseline.case, lines[at])
