"""The command line: it starts without torch, reports mistakes in one line, and manages baselines."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest

from hpc_core.baselines.accept import accept
from hpc_core.baselines.profiles import profile_path
from hpc_core.cli import main
from hpc_core.record.record import record_to_json
from tests.commands import exit_code
from tests.explain.profiles import a_profile, weights
from tests.record.git_project import GitProject
from tests.strategies import a_case, a_record, around, failed_record, peak

ROOT = Path(__file__).parents[2]
RECORD = a_record(circumstances=around(settings={"OMP_NUM_THREADS": "4"}))


@pytest.fixture
def record(tmp_path: Path) -> Path:
    path = tmp_path / "records" / "tiny" / "lora.json"
    path.parent.mkdir(parents=True)
    path.write_bytes(record_to_json(RECORD))
    return path


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["run", "tiny/lroa"], "Near: tiny/lora"),
        (["baseline", "list", "--baselines", "nowhere"], "no such folder"),
        (["baseline", "accept", "nowhere.json", "--reason", "x"], "nowhere.json: No such file"),
        (["baseline", "diff", __file__], "Not a record"),
        (["baseline", "diff", __file__, "HEAD"], "compare two files, or two git revisions"),
        (["baseline", "diff", "v1"], "baselines: no such folder"),
        (["history", "tiny/lora"], "nothing is known of 'tiny/lora'"),
        (["history", "tiny/lora", "--plot", "a.svg"], "--plot draws one metric"),
        (["cases", "--cases", "nowhere.py"], "no such case file"),
        (["faults", "--only", "gc-off,no-such"], "No fault is called 'no-such'"),
        (["faults", "--only", "no-such", "--only", "gc-off"], "No fault is called 'no-such'"),
        (["faults", "--out", "here"], "--out needs --explain"),
        (["faults", "--explain", "--scale", "full", "--out", "there"], "needs a CUDA GPU"),
        (["report", __file__, "--html", "."], ".: this is a folder; --html takes the file to write"),
        (["report", "nowhere"], "nowhere: no such file or folder"),
        (["explain", "nowhere.json"], "nowhere.json: No such file"),
        (["predict", "tiny/lora", "--gpu", "voodoo"], "No GPU is called 'voodoo'"),
    ],
    ids=lambda value: "-".join(value[:2]) if isinstance(value, list) else "",
)
def test_a_mistake_is_one_line(
    arguments: list[str],
    expected: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    """Bad input gives exit code 2 and one line on stderr that names it, and nothing on stdout."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert exit_code(main, *arguments) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert expected in err
    assert err.count("\n") == 1


def test_it_starts_without_torch() -> None:
    """Listing the cases loads neither torch nor pytest."""
    code = "import sys; from hpc_core.cli import main\ntry: main(['cases', '--scale', 'tiny'])\nexcept SystemExit: pass\nprint('torch' in sys.modules, 'pytest' in sys.modules)"
    process = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=30, check=True, cwd=ROOT
    )
    assert process.stdout.splitlines()[-1] == "False False"
    assert any(line.startswith("tiny/lora ") for line in process.stdout.splitlines())


def test_cases_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    """Each line is a case."""
    assert exit_code(main, "cases", "--scale", "full", "--json") == 0
    assert {json.loads(line)["scale"] for line in capsys.readouterr().out.splitlines()} == {"full"}


def test_accept_show_diff(record: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A record from elsewhere is accepted, listed and shown; another one is judged against it without running."""
    root = tmp_path / "baselines"
    root.mkdir()
    assert exit_code(main, "baseline", "diff", record, "--baselines", root) == 0  # NO_BASELINE is no failure
    assert exit_code(main, "baseline", "accept", record, "--baselines", root, "--reason", "from the H100") == 0
    assert exit_code(main, "baseline", "list", "--baselines", root) == 0
    assert "from the H100" in capsys.readouterr().out
    assert exit_code(main, "baseline", "show", "tiny/lora", "--baselines", root) == 0
    shown = capsys.readouterr().out
    assert "peak_bytes" in shown
    assert "Python 3.11.9" in shown
    assert "setting OMP_NUM_THREADS=4" in shown
    assert exit_code(main, "baseline", "diff", record, "--baselines", root) == 0
    worse = tmp_path / "worse.json"
    worse.write_bytes(record_to_json(a_record(RECORD.metrics | {"peak_bytes": peak(3 * 2**30)})))
    assert exit_code(main, "baseline", "diff", worse, "--baselines", root) == 1
    assert "REGRESSED" in capsys.readouterr().out


def test_a_folder_of_records_may_hold_what_its_run_wrote_besides(record: Path, tmp_path: Path) -> None:
    """The file on the pull request, and hidden ones, are no records and are left out."""
    for name in ("pull-request.json", ".code-states.json"):
        (record.parent / name).write_text("{}")
    assert exit_code(main, "baseline", "accept", record.parent, "--baselines", tmp_path / "b", "--reason", "x") == 0


def test_one_bad_record_accepts_none(record: Path, tmp_path: Path) -> None:
    """All records are read before the first is accepted."""
    bad = tmp_path / "bad.json"
    bad.write_text("{}")
    assert exit_code(main, "baseline", "accept", record, bad, "--baselines", tmp_path / "b", "--reason", "x") == 2
    assert not (tmp_path / "b").exists()


def test_profiles_are_added_to_existing_baselines_or_none(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """With --machine, cases without a baseline are skipped and named. If one record has no profile, nothing is written."""
    root, folder = tmp_path / "b", tmp_path / "records"
    profile = a_profile(weights())
    known = a_record(RECORD.metrics, profile=profile)
    unknown = a_record(RECORD.metrics, case=a_case().vary("other", seed=7), profile=profile)
    accept(root, msgspec.structs.replace(known, profile=None), reason="first", allow_dirty=True)
    key = known.circumstances.machine.key
    elsewhere = msgspec.structs.replace(known.circumstances.machine, key="nvidia-h200-140gib")
    for number, record in enumerate((known, unknown)):
        circumstances = msgspec.structs.replace(record.circumstances, machine=elsewhere)
        path = folder / f"{number}.json"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(record_to_json(msgspec.structs.replace(record, circumstances=circumstances)))
    stored_profile = profile_path(root, key, known.case.id)

    assert exit_code(main, "baseline", "add-profile", folder, "--baselines", root, "--machine", "nowhere") == 2
    assert f"Machines here: {key}" in capsys.readouterr().err
    (folder / "2.json").write_bytes(record_to_json(msgspec.structs.replace(known, profile=None)))
    assert exit_code(main, "baseline", "add-profile", folder, "--baselines", root, "--machine", key) == 2
    assert not stored_profile.exists()
    (folder / "2.json").unlink()
    assert exit_code(main, "baseline", "add-profile", folder, "--baselines", root, "--machine", key) == 0
    assert stored_profile.exists()
    printed = capsys.readouterr().out
    assert f"skipped, since {key} has no baseline of them: {unknown.case.id}" in " ".join(printed.split())


def test_a_failed_record_is_no_baseline(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Accepting a failed run is refused with its reason."""
    path = tmp_path / "failed.json"
    path.write_bytes(record_to_json(failed_record()))
    assert exit_code(main, "baseline", "accept", path, "--baselines", tmp_path / "b", "--reason", "x") == 2
    assert "80.1 GiB" in capsys.readouterr().err


def test_what_changed_between_revisions_and_files(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Baselines of two revisions, of a revision and the working tree, and two files of any kind are compared value by value."""
    project = GitProject(tmp_path / "project")
    monkeypatch.chdir(project.root)
    records = {"old": RECORD, "new": a_record(RECORD.metrics | {"peak_bytes": peak(3 * 2**30)})}
    for name, each in records.items():
        Path("records", name).mkdir(parents=True)
        Path("records", name, "lora.json").write_bytes(record_to_json(each))
        assert exit_code(main, "baseline", "accept", f"records/{name}", "--reason", f"the {name} one") == 0
        project.commit(name)
    capsys.readouterr()
    line = "nvidia-h100-80gb-hbm3-80gib/tiny/lora: peak_bytes 2.00 GiB → 3.00 GiB (+50 %); reason: the new one"
    for revisions in (["HEAD~1"], ["HEAD~1", "HEAD"]):
        assert exit_code(main, "baseline", "diff", *revisions) == 0
        assert capsys.readouterr().out == f"{line}\n"
    assert exit_code(main, "baseline", "diff", "HEAD") == 0
    assert "No baseline changed in" in capsys.readouterr().out
    stored = "baselines/nvidia-h100-80gb-hbm3-80gib/tiny/lora.json"
    assert exit_code(main, "baseline", "diff", "records/old/lora.json", stored) == 0
    assert "peak_bytes 2.00 GiB → 3.00 GiB (+50 %)" in capsys.readouterr().out


def test_uncommitted_code_needs_allow_dirty(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One dirty record among several accepts none of them, unless --allow-dirty is given."""
    for name, dirty in (("a", False), ("b", True)):
        case = a_case(f"tiny/{name}")
        (tmp_path / f"{name}.json").write_bytes(record_to_json(a_record(case=case, circumstances=around(dirty=dirty))))
    accept = (
        "baseline",
        "accept",
        tmp_path / "a.json",
        tmp_path / "b.json",
        "--reason",
        "x",
        "--baselines",
        tmp_path / "b",
    )
    assert exit_code(main, *accept) == 2
    assert "--allow-dirty" in capsys.readouterr().err
    assert not (tmp_path / "b").exists()
    assert exit_code(main, *accept, "--allow-dirty") == 0


def test_baselines_as_json(record: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Accepting, listing, showing and comparing can print JSON, with the same exit codes."""
    folder = ("--baselines", tmp_path / "kept", "--json")
    outputs = []
    for command in (
        ["accept", record, "--reason", "first", "--allow-dirty"],
        ["list"],
        ["show", "tiny/lora"],
        ["diff", record],
        ["diff", record, record],
    ):
        assert exit_code(main, "baseline", *command, *folder) == 0
        outputs.append(json.loads(capsys.readouterr().out))

    accepted, listed, shown, judged, alike = outputs
    assert (accepted[0]["action"], listed[0]["state"], listed[0]["case"]) == ("created", "sound", "tiny/lora")
    assert shown[0]["metrics"]["peak_bytes"]["value"] == RECORD.metrics["peak_bytes"].value
    assert (judged["judgement"]["verdict"], judged["cause"], alike["changes"]) == ("PASS", None, [])
    record.write_bytes(record_to_json(a_record({"peak_bytes": peak(4 * 2**30)})))
    assert exit_code(main, "baseline", "diff", record, *folder) == 1
    assert json.loads(capsys.readouterr().out)["cause"]["lines"][0].startswith("peak +2.00 GiB")
