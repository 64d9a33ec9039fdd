"""What is accepted as a baseline, how it is written, and what is refused."""

from __future__ import annotations

import datetime
import os
from pathlib import Path
from typing import Any

import pytest

from hpc_core.baselines.accept import accept
from hpc_core.baselines.history import HISTORY_LENGTH
from hpc_core.baselines.lookup import baseline_path, history_path
from hpc_core.case.errors import BaselineError
from hpc_core.case.limits import Limits
from hpc_core.record.metrics import WAITED
from hpc_core.record.record import Record, record_from_json
from hpc_core.report.lines import accepted_line
from tests.strategies import H100, a_case, a_record, around, busy, counted, failed_record, peak, stored_baseline, wall

AT = datetime.datetime(2026, 11, 23, 12, tzinfo=datetime.UTC)
CASE = "tiny/lora"


def place(root: Path) -> Path:
    return baseline_path(root, H100.key, CASE)


def test_what_is_accepted_is_found(tmp_path: Path) -> None:
    """The baseline holds the gated metrics, the case, machine and stack, and the reason."""
    record = a_record()
    done = accept(tmp_path, record, reason="first numbers", at=AT)
    assert (done.action, done.path) == ("created", str(place(tmp_path)))
    assert [(change.metric, change.old) for change in done.changes] == [
        (name, None) for name in ("busy_s", "operators", "peak_bytes")
    ]
    baseline = stored_baseline(tmp_path, record)
    assert baseline.metrics == {name: metric for name, metric in record.metrics.items() if name != "step_s"}
    assert (baseline.case, baseline.spec, baseline.digest) == (CASE, record.case, record.case.digest)
    assert (baseline.machine, baseline.stack) == (H100, record.circumstances.stack)
    assert (baseline.accepted.reason, baseline.accepted.at) == ("first numbers", "2026-11-23T12:00:00+00:00")


def test_the_file_reads_well(tmp_path: Path) -> None:
    """The file has one value per line, sorted, ends with a newline, is readable, and leaves no temporary file."""
    accept(tmp_path, a_record(), reason="größer", at=AT)
    text = place(tmp_path).read_text(encoding="utf-8")
    assert text.endswith("}\n")
    assert "größer" in text
    keys = [line.split('"')[1] for line in text.splitlines() if line.startswith('  "')]
    assert keys == sorted(keys)
    assert place(tmp_path).stat().st_mode & 0o400
    assert sorted(path.name for path in place(tmp_path).parent.iterdir()) == ["lora.history.jsonl", "lora.json"]


def test_the_same_numbers_do_not_rewrite_the_file(tmp_path: Path) -> None:
    """Accepting the same again leaves the baseline as it is, with its reason, and adds to the history."""
    accept(tmp_path, a_record(), reason="first", at=AT)
    before = place(tmp_path).read_bytes()
    done = accept(tmp_path, a_record(), reason="again")
    assert (done.action, done.changes) == ("unchanged", ())
    assert place(tmp_path).read_bytes() == before
    assert len(history_path(tmp_path, H100.key, CASE).read_bytes().splitlines()) == 2


def test_a_time_of_a_busy_machine_is_named_as_not_accepted(tmp_path: Path) -> None:
    """Wall time of calls that waited for a core enters no baseline, so it would be judged in no run: the line of the acceptance names it."""
    busy_machine = a_record({"peak_bytes": peak(2**30), "step_s": wall(0.5, note=f"5 of 5 {WAITED}")})
    line = accepted_line(accept(tmp_path, busy_machine, reason="first"))
    assert line.endswith(
        "; not accepted: step_s (5 of 5 waited for a core). Run again on a quiet machine to have it judged"
    )
    quiet = a_record({"peak_bytes": peak(2**30), "step_s": wall(0.5, gated=True)})
    assert "not accepted" not in accepted_line(accept(tmp_path, quiet, reason="again"))


@pytest.mark.parametrize(
    "record",
    [
        a_record({"peak_bytes": peak(2**30)}),
        a_record(circumstances=around(stack={"torch": "2.12.0"})),
        a_record(circumstances=around(settings={"OMP_NUM_THREADS": "4"})),
        a_record(case=a_case(seed=1)),
        a_record(case=a_case(limits=Limits(peak_bytes="5%"))),
    ],
    ids=["metrics", "stack", "settings", "digest", "limits"],
)
def test_what_differs_rewrites_the_file(tmp_path: Path, record: Record) -> None:
    """Other metrics, another stack, other settings, another case or other limits make another baseline."""
    accept(tmp_path, a_record(), reason="first")
    assert accept(tmp_path, record, reason="second").action == "updated"
    baseline = stored_baseline(tmp_path, record)
    assert baseline.accepted.reason == "second"


def test_changes_name_old_and_new(tmp_path: Path) -> None:
    """An acceptance lists the metrics that moved, with both values, and those that came or went."""
    accept(tmp_path, a_record({"peak_bytes": peak(100), "operators": counted(7)}), reason="first")
    done = accept(tmp_path, a_record({"peak_bytes": peak(90), "busy_s": busy(0.5)}), reason="second")
    changes = {change.metric: (change.old, change.new, change.unit) for change in done.changes}
    assert changes == {"peak_bytes": (100, 90, "bytes"), "busy_s": (None, 0.5, "s"), "operators": (7, None, "1")}


def test_history_is_bounded_and_whole(tmp_path: Path) -> None:
    """The history holds the last accepted records, one per line, oldest first."""
    for value in range(1, HISTORY_LENGTH + 4):
        accept(tmp_path, a_record({"operators": counted(value)}), reason="step")
    lines = history_path(tmp_path, H100.key, CASE).read_bytes().splitlines()
    values = [record_from_json(line).metrics["operators"].value for line in lines]
    assert values == list(range(4, HISTORY_LENGTH + 4))


@pytest.mark.parametrize("junk", [b"{", b"null\n", b"\xff\n", b"[" * 100_000, b'{"case":{}}\n', b"\n\n"])
def test_damaged_history_stops_before_anything_is_written(tmp_path: Path, junk: bytes) -> None:
    """The error names the damaged history and what to do, and neither file changes."""
    accept(tmp_path, a_record(), reason="first")
    history = history_path(tmp_path, H100.key, CASE)
    history.write_bytes(history.read_bytes() + junk)
    before = place(tmp_path).read_bytes(), history.read_bytes()
    with pytest.raises(
        BaselineError, match=r"lora\.history\.jsonl, line 2: not a record .*Restore it from git or delete it"
    ):
        accept(tmp_path, a_record({"operators": counted(9)}), reason="second")
    assert (place(tmp_path).read_bytes(), history.read_bytes()) == before


def test_history_of_another_schema_is_kept(tmp_path: Path) -> None:
    """A line of an older schema stays in the history."""
    history = history_path(tmp_path, H100.key, CASE)
    history.parent.mkdir(parents=True)
    history.write_bytes(b'{"schema":0,"old":true}\n')
    accept(tmp_path, a_record(), reason="first")
    assert history.read_bytes().splitlines()[0] == b'{"schema":0,"old":true}'


@pytest.mark.parametrize(
    ("record", "reason", "fragment"),
    [
        (a_record(), "  ", "a baseline needs a reason"),
        (failed_record(), "r", "the record is failed, so it cannot be a baseline: 80.1 GiB"),
        (
            a_record(status="invalid", reasons=("too fast",)),
            "r",
            "the record is invalid, so it cannot be a baseline: too fast",
        ),
        (a_record(circumstances=around(fault="no-cache")), "r", "fault 'no-cache' was injected"),
        (a_record({"step_s": wall()}), "r", "none of 1 metrics is gated"),
        (a_record({"operators": counted(gated=False)}), "r", "none of 1 metrics is gated"),
        (a_record({"busy_s": busy(0.0)}), "r", "busy_s is 0 s, and zero proves nothing"),
        (a_record({"busy_s": busy(0.5, samples=(0.5, 0.0))}), "r", "a sample of busy_s is not above 0"),
        (a_record({"peak_bytes": peak(0)}), "r", "peak_bytes is 0 bytes, and zero proves nothing"),
        (a_record({"operators": counted(-1)}), "r", "operators is -1 1, below zero"),
    ],
)
def test_refused_records(tmp_path: Path, record: Record, reason: str, fragment: str) -> None:
    """A record that proves nothing never becomes a baseline, and leaves no file."""
    with pytest.raises(BaselineError, match=fragment):
        accept(tmp_path, record, reason=reason)
    assert list(tmp_path.iterdir()) == []


def test_code_that_no_commit_names_is_refused_unless_allowed(tmp_path: Path) -> None:
    """Numbers without a commit cannot be measured again, so they are refused unless allowed."""
    record = a_record(circumstances=around(commit=None, dirty=None))
    with pytest.raises(
        BaselineError, match=r"which code gives these numbers.*HPC_CORE_COMMIT.*--perf-allow-dirty.*--allow-dirty"
    ):
        accept(tmp_path, record, reason="r")
    assert list(tmp_path.iterdir()) == []
    accept(tmp_path, record, reason="r", allow_dirty=True)
    baseline = stored_baseline(tmp_path, record)
    assert baseline.accepted.commit is None


def test_a_dirty_tree_is_refused_unless_allowed(tmp_path: Path) -> None:
    """Numbers of uncommitted code are refused unless allowed, and then marked; a commit with unknown changes is accepted."""
    record = a_record(circumstances=around(dirty=True))
    with pytest.raises(BaselineError, match=r"uncommitted changes on 0123abc.*--perf-allow-dirty.*--allow-dirty"):
        accept(tmp_path, record, reason="r")
    assert list(tmp_path.iterdir()) == []
    accept(tmp_path, a_record(circumstances=around(dirty=None)), reason="r")
    accept(tmp_path, record, reason="r", allow_dirty=True)
    accept(
        tmp_path, a_record({"operators": counted(1)}, circumstances=around(dirty=True)), reason="r", allow_dirty=True
    )
    baseline = stored_baseline(tmp_path, record)
    assert baseline.accepted.dirty is True


@pytest.mark.parametrize("failing", ["fsync", "replace"])
def test_the_old_file_survives_a_failed_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: str) -> None:
    """A full disk costs the new baseline, not the old one, and leaves no temporary file."""
    accept(tmp_path, a_record(), reason="first")
    before = place(tmp_path).read_bytes()

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    owner: Any = os if failing == "fsync" else Path
    monkeypatch.setattr(owner, failing, full)
    with pytest.raises(BaselineError, match=r"cannot be written: .*No space left"):
        accept(tmp_path, a_record({"operators": counted(9)}), reason="second")
    assert place(tmp_path).read_bytes() == before
    assert len(list(place(tmp_path).parent.iterdir())) == 2
