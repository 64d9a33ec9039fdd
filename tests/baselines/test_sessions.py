"""Accepted sessions, from which statistics are computed, and baselines as they were at a commit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import pytest

from hpc_core.baselines.accept import accept
from hpc_core.baselines.at_commit import PastBaselines, baseline_changes
from hpc_core.baselines.baseline import Baseline, Damaged, Missing
from hpc_core.baselines.history import HISTORY_BYTES, HISTORY_LENGTH, sessions
from hpc_core.baselines.lookup import history_path
from hpc_core.case.errors import BaselineError
from hpc_core.record.record import Record, record_from_json
from tests.record.git_project import GitProject
from tests.strategies import CPU, H100, a_case, a_record, around, busy, counted, peak, wall

CASE = "tiny/lora"


def of_session(number: int, **changes: Any) -> Record:
    """The record of another session."""
    fields: dict[str, Any] = {
        "started_at": f"2026-11-{number:02d}T10:00:00+00:00",
        "commit": f"c{number}",
        "gpu": {"before": {"uuid": f"GPU-{number}"}, "cuda": "13.0"},
        "canary": {"compute": 0.1, "memory": 0.2},
    }
    metrics = {
        "busy_s": busy(0.25, samples=(0.24, 0.25, 0.26)),
        "peak_bytes": peak(100 + number),
        "step_s": msgspec.structs.replace(wall(0.5), samples=(0.4, 0.5, 0.6)),
    }
    return a_record(metrics, circumstances=around(**(fields | changes)))


def test_a_session_is_what_was_accepted(tmp_path: Path) -> None:
    """A session has time, commit, GPU, stack, canary and metrics; busy time has one value per process."""
    for number in (1, 2):
        accept(tmp_path, of_session(number), reason="r")
    first, second = sessions(tmp_path, H100.key, CASE)
    assert (first.at, first.commit, first.gpu_uuid) == ("2026-11-01T10:00:00+00:00", "c1", "GPU-1")
    assert first.stack["torch"] == "2.11.0+cu130"
    assert first.metrics == {"busy_s": (0.24, 0.25, 0.26), "peak_bytes": (101.0,), "step_s": (0.5,)}
    assert first.canary == {"compute": (0.1,), "memory": (0.2,)}
    assert second.metrics["peak_bytes"] == (102.0,)


def test_sessions_of_another_case_or_twice_the_same_do_not_count(tmp_path: Path) -> None:
    """Sessions before a change of the case do not count, and a session accepted twice counts once."""
    accept(tmp_path, of_session(1), reason="r")
    changed = msgspec.structs.replace(of_session(2), case=a_case(seed=5))
    accept(tmp_path, changed, reason="r")
    accept(tmp_path, changed, reason="again")
    assert [each.commit for each in sessions(tmp_path, H100.key, CASE)] == ["c2"]
    assert [each.commit for each in sessions(tmp_path, H100.key, CASE, digest=a_case().digest)] == ["c1"]
    assert sessions(tmp_path, "cpu", CASE) == ()


def test_a_damaged_history_gives_no_sessions(tmp_path: Path) -> None:
    """Statistics never use a damaged file."""
    accept(tmp_path, of_session(1), reason="r")
    path = history_path(tmp_path, H100.key, CASE)
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(BaselineError, match="line 1: not a record"):
        sessions(tmp_path, H100.key, CASE)
    path.write_bytes(b'{"schema":0,"old":true}\n')
    assert sessions(tmp_path, H100.key, CASE) == ()


def test_the_history_is_bounded_in_bytes_too(tmp_path: Path) -> None:
    """Large records push older ones out whole; a record larger than a history is refused and changes nothing."""
    answer = "x" * (HISTORY_BYTES // 4)
    for number in range(1, HISTORY_LENGTH):
        accept(tmp_path, msgspec.structs.replace(of_session(number), answers=(answer,)), reason="r")
    path = history_path(tmp_path, H100.key, CASE)
    assert path.stat().st_size <= HISTORY_BYTES
    commits = [record_from_json(line).circumstances.commit for line in path.read_bytes().splitlines()]
    assert commits == ["c5", "c6", "c7"]
    before = path.read_bytes()
    with pytest.raises(BaselineError, match="a whole history at most 1,048,576"):
        accept(tmp_path, msgspec.structs.replace(of_session(9), answers=(answer * 5,)), reason="r")
    assert path.read_bytes() == before


def test_baselines_of_a_commit(tmp_path: Path) -> None:
    """Each baseline is what it was at a commit; changes since are listed with old value, new value and reason."""
    project = GitProject(tmp_path / "project")
    root = project.root / "baselines"
    accept(root, a_record(), reason="first")
    accept(root, a_record(circumstances=around(CPU)), reason="first")
    accept(root, a_record(case=a_case("tiny/gone")), reason="first")
    first = project.commit("first")
    accept(root, a_record({"peak_bytes": peak(3 * 2**30), "operators": counted()}), reason="more on purpose")
    accept(root, a_record(case=a_case("tiny/new")), reason="a new case")
    for path in (root / H100.key / "tiny").glob("gone.*"):
        path.unlink()
    (root / "cpu" / "tiny" / "lora.json").write_text("{}")

    past = PastBaselines(root, "HEAD")
    assert len(sessions(root, H100.key, CASE)) == 2
    assert [each.metrics["peak_bytes"] for each in past.sessions(H100.key, CASE)] == [(2.0 * 2**30,)]
    assert past.sessions(H100.key, "tiny/new") == ()
    baseline = past.find(H100.key, CASE)
    assert past.commit == first
    assert isinstance(baseline, Baseline)
    assert baseline.metrics["peak_bytes"] == peak()
    assert past.find("cpu", "tiny/gone") == Missing(
        path=f"{first[:10]}:baselines/cpu/tiny/gone.json", elsewhere=(H100.key,)
    )
    changes = {change.path: change for change in baseline_changes(root, past)}
    assert sorted(changes) == [
        "cpu/tiny/lora.json",
        *(f"{H100.key}/tiny/{name}.json" for name in ("gone", "lora", "new")),
    ]
    lora = changes[f"{H100.key}/tiny/lora.json"]
    assert lora.reason == "more on purpose"
    assert {each.metric: (each.old, each.new) for each in lora.metrics} == {
        "busy_s": (0.25, None),
        "peak_bytes": (2 * 2**30, 3 * 2**30),
    }
    assert isinstance(changes["cpu/tiny/lora.json"].new, Damaged)
    assert isinstance(changes[f"{H100.key}/tiny/gone.json"].new, Missing)
    project.commit("second")
    assert set(changes) == {change.path for change in baseline_changes(root, past, PastBaselines(root, "HEAD"))}
    assert baseline_changes(root, PastBaselines(root, "HEAD")) == ()
