"""`hpc-core history` shows every session of baselines, git and folders once, in order, with what moved."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import msgspec
import pytest

from hpc_core.baselines import over_time as over_time_module
from hpc_core.baselines.accept import accept
from hpc_core.baselines.history import HISTORY_LENGTH
from hpc_core.baselines.lookup import baseline_path
from hpc_core.baselines.over_time import over_time
from hpc_core.cli import main
from hpc_core.record.record import Record, record_to_json
from tests.commands import exit_code
from tests.record.git_project import GitProject
from tests.strategies import H100, STACK, a_case, a_record, around, busy, counted, peak

CASE = "tiny/lora"


def of_day(day: int, *, operators: int = 10, busy_s: float = 0.25, **changes: Any) -> Record:
    """The record of another session."""
    fields = {"started_at": f"2026-11-{day:02d}T10:00:00+00:00", "commit": f"{day:010d}", "gpu": {"uuid": "GPU-1"}}
    metrics = {"operators": counted(operators), "peak_bytes": peak(), "busy_s": busy(busy_s, samples=(busy_s, busy_s))}
    return a_record(metrics, circumstances=around(**(fields | changes)))


@pytest.fixture(scope="module")
def twelve_days(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve accepted sessions, one per commit; with the seventh, operators grow and transformers moves."""
    git_project = GitProject(tmp_path_factory.mktemp("days") / "project")
    for day in range(1, 13):
        moved = day >= 7
        stack = STACK | ({"transformers": "5.24.0"} if moved else {})
        record = of_day(day, operators=12 if moved else 10, busy_s=0.25 + 0.001 * (day % 3) + 0.02 * moved, stack=stack)
        accept(git_project.root / "baselines", record, reason=f"day {day}")
        git_project.commit(f"day {day}")
    return git_project.root


@pytest.fixture
def project(twelve_days: Path, tmp_path: Path) -> GitProject:
    """A copy that a test may change."""
    return GitProject(Path(shutil.copytree(twelve_days, tmp_path / "project")))


def test_git_remembers_more_than_the_file_keeps(project: GitProject) -> None:
    """Sessions that no longer fit in the bounded history come back from its commits, each once, oldest first."""
    root = project.root / "baselines"
    history = over_time(root, H100.key, CASE).points
    assert [point.commit for point in history] == [f"{day:010d}" for day in range(1, 13)]
    assert [point.source for point in history].count("accepted") == HISTORY_LENGTH
    assert len(over_time(root, H100.key, CASE, git=False).points) == HISTORY_LENGTH


def test_a_baseline_without_its_history_is_a_point_too(project: GitProject) -> None:
    """A baseline whose record is gone from git still gives a point, from its accepted values."""
    root = project.root / "baselines"
    case = a_case("tiny/other")
    for day in (20, 21):
        accept(root, msgspec.structs.replace(of_day(day, operators=day), case=case), reason="r")
        next(root.rglob("other.history.jsonl")).unlink()
        project.commit(f"other {day}")
    history = over_time(root, H100.key, "tiny/other").points
    assert [(point.source, point.metrics["operators"].value) for point in history] == [("git", 20), ("git", 21)]


def test_records_of_folders_are_points(project: GitProject, tmp_path: Path) -> None:
    """Sound records of the case and machine are points, each once; a note counts the other files."""
    folder = tmp_path / "records" / "deep"
    folder.mkdir(parents=True)
    records = {"a": of_day(12, operators=12, busy_s=0.27, stack=STACK | {"transformers": "5.24.0"}), "b": of_day(25)}
    records["other"] = msgspec.structs.replace(of_day(26), case=a_case("tiny/other"))
    records["invalid"] = msgspec.structs.replace(of_day(27), status="invalid", reasons=("too fast",))
    for name, record in records.items():
        (folder / f"{name}.json").write_bytes(record_to_json(record))
    (folder / "junk.json").write_text("{}")
    history = over_time(project.root / "baselines", H100.key, CASE, [tmp_path / "records"])
    assert [point.commit for point in history.points[-2:]] == ["0000000012", "0000000025"]
    assert len(history.points) == 13
    assert history.notes == (
        "left out, not a record of this schema: 1 file of the folders",
        "left out, invalid or failed: 1 record",
    )


def test_a_changed_case_starts_a_new_series(project: GitProject) -> None:
    """Points of another digest are left out, with a note."""
    root = project.root / "baselines"
    accept(root, msgspec.structs.replace(of_day(20), case=a_case(seed=3)), reason="another seed")
    history = over_time(root, H100.key, CASE)
    assert [point.commit for point in history.points] == ["0000000020"]
    assert history.notes == ("left out, another digest of the case: 12 older points",)


def test_the_table_shows_where_and_what_moved(project: GitProject, capsys: pytest.CaptureFixture[str]) -> None:
    """An exact metric changes where its value does, a noisy one by a test; the commits and packages between are named."""
    root = project.root / "baselines"
    assert exit_code(main, "history", CASE, "operators", "--baselines", root) == 0
    printed = capsys.readouterr().out
    assert f"{CASE} on {H100.key}: 12 sessions, 2026-11-01 to 2026-11-12" in printed
    assert printed.count("\n*") == 1
    assert "+20 % (10 → 12); commits 0000000006..0000000007; moved: transformers 5.23.0 → 5.24.0" in printed
    assert exit_code(main, "history", CASE, "busy_s", "--baselines", root) == 0
    printed = capsys.readouterr().out
    assert printed.count("\n* 2026-11-07") == printed.count("\n*") == 1
    assert "p 0.0" in printed
    assert "with a chance of 5%" in printed
    assert exit_code(main, "history", CASE, "--baselines", root) == 0
    assert "peak_bytes  2.00 GiB  [12 sessions: no change]" in capsys.readouterr().out


def test_few_sessions_say_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Four sessions of a noisy metric say how many a change point needs; without git there is a note."""
    for day, seconds in enumerate((0.2, 0.2, 0.4, 0.4), start=1):
        accept(tmp_path / "b", of_day(day, busy_s=seconds), reason="r")
    assert exit_code(main, "history", CASE, "busy_s", "--baselines", tmp_path / "b") == 0
    out, err = capsys.readouterr()
    assert "4 sessions cannot show a change: no order of them would be rarer than 5% by chance; 8 are needed." in out
    assert "\n*" not in out
    assert "note: nothing from git" in err


def test_json_and_pictures(project: GitProject, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """JSON holds points and change points; the picture is the same bytes each time and names the change."""
    pytest.importorskip("vl_convert")
    root = project.root / "baselines"
    picture = tmp_path / "history.svg"
    assert exit_code(main, "history", CASE, "operators", "--baselines", root, "--json", "--plot", picture) == 0
    printed = json.loads(capsys.readouterr().out)["metrics"]["operators"]
    assert [point["value"] for point in printed["points"]] == [10] * 6 + [12] * 6
    assert printed["changes"] == [{"index": 6, "before": 10, "after": 12, "p": None}]
    first = picture.read_bytes()
    assert b"+20 % (10 " in first
    assert exit_code(main, "history", CASE, "operators", "--baselines", root, "--plot", picture) == 0
    assert picture.read_bytes() == first


def test_several_machines_need_a_choice(project: GitProject, capsys: pytest.CaptureFixture[str]) -> None:
    """A case of two machines, or a metric that no session holds, gives one line on stderr and exit code 2."""
    root = project.root / "baselines"
    assert exit_code(main, "history", CASE, "no_such_metric", "--baselines", root) == 2
    assert "There are: busy_s, operators, peak_bytes." in capsys.readouterr().err
    accept(root, a_record(circumstances=around(msgspec.structs.replace(H100, key="cpu"))), reason="r")
    assert exit_code(main, "history", CASE, "--baselines", root) == 2
    assert "choose one with --machine" in capsys.readouterr().err
    assert exit_code(main, "history", CASE, "--baselines", root, "--machine", "cpu") == 0


def test_only_the_newest_points_are_shown(project: GitProject, monkeypatch: pytest.MonkeyPatch) -> None:
    """More points than can be searched in a second are left out, oldest first, with a note."""
    monkeypatch.setattr(over_time_module, "MOST_POINTS", 5)
    history = over_time(project.root / "baselines", H100.key, CASE)
    assert [point.commit for point in history.points] == [f"{day:010d}" for day in range(8, 13)]
    assert history.notes == ("left out, more than 5: 7 older points",)


def test_only_so_many_bytes_of_git_are_read(project: GitProject, monkeypatch: pytest.MonkeyPatch) -> None:
    """The newest versions count; what is left out is in a note."""
    place = baseline_path(project.root / "baselines", H100.key, CASE)
    monkeypatch.setattr(over_time_module, "_MOST_BYTES", 2 * place.with_suffix(".history.jsonl").stat().st_size)
    history = over_time(project.root / "baselines", H100.key, CASE)
    assert [point.commit for point in history.points] == [f"{day:010d}" for day in range(5, 13)]
    assert "21 older versions in git" in history.notes[0]
    monkeypatch.setattr(over_time_module, "_LARGEST_VERSION", 10)
    history = over_time(project.root / "baselines", H100.key, CASE)
    assert history.notes == ("left out, more than 10 B each: 24 versions in git",)


@pytest.mark.parametrize("name", ["lora.history.jsonl", "lora.profile.json.gz"])
@pytest.mark.parametrize("kind", ["pipe", "endless", "folder", "huge"])
def test_what_is_no_history_or_profile_is_not_read(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, kind: str
) -> None:
    """A pipe would block and a device never end: a history gives one clear line, and a profile only explains less."""
    accept(tmp_path, of_day(1), reason="r")
    place = baseline_path(tmp_path, H100.key, CASE)
    path = place.with_name(name)
    path.unlink(missing_ok=True)
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "endless":
        path.symlink_to("/dev/zero")
    elif kind == "folder":
        path.mkdir()
    else:
        with path.open("wb") as file:
            file.truncate(2**30)
    record = tmp_path / "record.json"
    record.write_bytes(record_to_json(of_day(2, operators=11)))
    assert exit_code(main, "history", CASE, "--baselines", tmp_path, "--no-git") == (2 if "history" in name else 0)
    err = capsys.readouterr().err
    assert err.count("\n") == (1 if "history" in name else 0)
    assert ("the history cannot be read" in err) == ("history" in name)
    assert exit_code(main, "explain", record, "--baselines", tmp_path) == 0
    assert exit_code(main, "report", record, "--baselines", tmp_path) == 0
