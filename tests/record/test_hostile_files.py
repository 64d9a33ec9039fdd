"""Whatever a file holds: each reader gives one clear line or a verdict that is not PASS, and never another exception."""

from __future__ import annotations

import random
import shutil
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest

from hpc_core.baselines.accept import accept
from hpc_core.baselines.baseline import Baseline
from hpc_core.baselines.history import accepted_records, last_accepted, sessions
from hpc_core.baselines.lookup import baseline_path, find, history_path
from hpc_core.baselines.over_time import over_time
from hpc_core.baselines.profiles import profile_path
from hpc_core.baselines.reading import read_records
from hpc_core.case.errors import HpcCoreError
from hpc_core.cli import main
from hpc_core.explain.explain import stored_cause
from hpc_core.gate.judge import judge
from hpc_core.gate.verdict import Verdict
from hpc_core.record.files import read_record
from hpc_core.record.record import record_from_json, record_to_json
from hpc_core.report.entry import entries_of
from tests.commands import exit_code
from tests.explain.profiles import a_profile, weights
from tests.record.hostile_files import hostile, hostile_gzip
from tests.strategies import H100, a_record, around, busy, counted, peak, wall

CASE = "tiny/lora"
COUNTS = [40, pytest.param(1000, marks=pytest.mark.nightly)]
PROFILE = a_profile(weights())


def of_session(number: int, worse: float = 1) -> Any:
    """A record of six gated metrics, all of them worse by a factor: no three changes make all of them pass."""
    metrics = {f"operators_{part}": counted(round(1000 * worse)) for part in ("forward", "backward", "optimizer")}
    metrics |= {"peak_bytes": peak(round(2**31 * worse)), "busy_s": busy(0.25 * worse), "step_s": wall(0.5)}
    metrics["copies"] = counted(round(100 * worse))
    run = around(started_at=f"2026-11-{number:02d}T10:00:00+00:00", notes=("a note",))
    return a_record(metrics, circumstances=run, profile=PROFILE, losses=(2.0, 1.5), answers=("an answer",))


@pytest.fixture(scope="module")
def accepted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Baselines with two accepted sessions."""
    root = tmp_path_factory.mktemp("accepted")
    for number in (1, 2):
        accept(root, of_session(number), reason="r")
    return root


@pytest.fixture
def root(accepted: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(accepted, tmp_path / "baselines"))


def tried(read: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
    """What a reader returns; None where it refuses with one clear line. Any other exception fails the test."""
    try:
        return read(*arguments, **options)
    except HpcCoreError as error:
        check_plain(str(error))
        return None


def check_plain(text: str, *, lines: bool = False) -> None:
    """No text holds what controls a terminal, and none is a page long."""
    assert len(text) < 20_000
    unseen = [char for char in text if unicodedata.category(char) in ("Cc", "Cs") and char not in "\n\t"]
    assert not unseen, ascii(text)


@pytest.mark.parametrize("count", COUNTS)
def test_hostile_records(root: Path, tmp_path: Path, count: int) -> None:
    """A record that is worse in six metrics and has up to three things wrong passes nowhere."""
    draw = random.Random(1)
    text = record_to_json(of_session(3, worse=2))
    limits = of_session(3).case.limits
    path = tmp_path / "record.json"
    for _ in range(count):
        content = hostile(text, draw)
        path.write_bytes(content)
        tried(record_from_json, content)
        reading = tried(read_records, [path])
        for entry in () if reading is None else entries_of(reading.records, root):
            check_plain(entry.row.change + entry.row.share + (entry.judgement.headline if entry.judgement else ""))
        record = tried(read_record, path)
        if record is None:
            continue
        key = record.circumstances.machine.key
        found = tried(find, root, key, record.case.id)
        if found is None:
            continue
        judgement = judge(record, found, limits)
        assert judgement.verdict not in (Verdict.PASS, Verdict.IMPROVED), content
        check_plain(judgement.headline + judgement.reason)
        cause = tried(stored_cause, root, record, judgement)
        check_plain("" if cause is None else "".join(cause.lines + cause.details))
        target = root.parent / "target"
        if tried(accept, target, record, reason="r") is not None:
            assert isinstance(find(target, key, record.case.id), Baseline), "what is accepted is sound"
            shutil.rmtree(target)


@pytest.mark.parametrize("count", COUNTS)
def test_hostile_baselines(root: Path, count: int) -> None:
    """A baseline that differs by a byte lets nothing pass, and every command says so."""
    draw = random.Random(2)
    path = baseline_path(root, H100.key, CASE)
    text, record = path.read_bytes(), of_session(3)
    for _ in range(count):
        path.write_bytes(hostile(text, draw))
        if path.read_bytes() == text:
            continue
        found = find(root, H100.key, CASE)
        judgement = judge(record, found)
        assert judgement.verdict in (Verdict.INVALID, Verdict.INCOMPATIBLE), path.read_bytes()
        check_plain(judgement.headline + judgement.reason)
        tried(read_records, [path])
        tried(read_record, path)
        tried(entries_of, [record], root)


@pytest.mark.parametrize("count", COUNTS)
def test_hostile_histories(root: Path, count: int) -> None:
    """A history gives its sessions or one clear line; whatever it holds, a record that is worse does not pass."""
    draw = random.Random(3)
    path = history_path(root, H100.key, CASE)
    text, record = path.read_bytes(), of_session(3, worse=2)
    for _ in range(count):
        path.write_bytes(hostile(text, draw))
        tried(sessions, root, H100.key, CASE)
        tried(accepted_records, root, H100.key, CASE)
        tried(over_time, root, H100.key, CASE, git=False)
        last_accepted(root, H100.key, CASE)
        tried(read_records, [path])
        [entry] = entries_of([record], root)
        assert entry.judgement is not None
        assert entry.judgement.verdict not in (Verdict.PASS, Verdict.IMPROVED), path.read_bytes()


@pytest.mark.parametrize("count", COUNTS)
def test_hostile_profiles(root: Path, count: int) -> None:
    """A profile explains, or is ignored."""
    draw = random.Random(4)
    path = profile_path(root, H100.key, CASE)
    packed, record = path.read_bytes(), of_session(3, worse=2)
    judgement = judge(record, find(root, H100.key, CASE))
    for _ in range(count):
        path.write_bytes(hostile_gzip(packed, draw))
        cause = stored_cause(root, record, judgement)
        assert cause is not None
        check_plain("".join(cause.lines + cause.details))


@pytest.mark.parametrize("count", [2, pytest.param(40, marks=pytest.mark.nightly)])
def test_commands_on_hostile_files(root: Path, tmp_path: Path, count: int, capsys: pytest.CaptureFixture[str]) -> None:
    """Every command that reads such files ends with an exit code and prints nothing that controls a terminal."""
    draw = random.Random(5)
    record, good = tmp_path / "record.json", tmp_path / "good.json"
    good.write_bytes(record_to_json(of_session(3)))
    files = {
        record: (record_to_json(of_session(3, worse=2), indent=2), hostile),
        baseline_path(root, H100.key, CASE): (baseline_path(root, H100.key, CASE).read_bytes(), hostile),
        history_path(root, H100.key, CASE): (history_path(root, H100.key, CASE).read_bytes(), hostile),
        profile_path(root, H100.key, CASE): (profile_path(root, H100.key, CASE).read_bytes(), hostile_gzip),
    }
    where = ("--baselines", root)
    commands: list[tuple[Any, ...]] = [
        ("baseline", "list", *where), ("baseline", "list", "--json", *where), ("baseline", "show", CASE, *where),
        ("baseline", "diff", record, *where), ("baseline", "diff", record, good), ("baseline", "diff", good, *where),
        ("baseline", "diff", good, record, "--json"), ("baseline", "add-profile", record, *where), ("explain", record, *where),
        ("explain", good, *where), ("explain", record, "--against", good), ("history", CASE, "--no-git", *where),
        ("history", CASE, "peak_bytes", "--no-git", "--records", tmp_path, *where), ("report", record, *where),
        ("report", root, "--json"), ("baseline", "accept", record, "--reason", "r", "--baselines", tmp_path / "other"),
    ]  # fmt: skip
    for _ in range(count):
        for path, (content, change) in files.items():
            path.write_bytes(change(content, draw) if draw.random() < 0.6 else content)
        for command in commands:
            code = exit_code(main, *command)
            out, err = capsys.readouterr()
            assert code in (0, 1, 2), command
            check_plain(err)
            if "--json" not in command:
                check_plain(out)
            if code == 2:
                assert out == "" or command[0] == "history"


def test_the_fuzzer_reaches_what_is_read() -> None:
    """Some of its records are read after all, so that the gate sees them, and most are refused."""
    draw = random.Random(1)
    text = record_to_json(of_session(3, worse=2))
    read = [tried(record_from_json, hostile(text, draw)) is not None for _ in range(200)]
    assert 10 <= sum(read) <= 150
    assert msgspec.json.decode(text)
