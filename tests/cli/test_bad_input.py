"""Whatever a command is given: one clear line, no traceback, and no file half written."""

from __future__ import annotations

import io
import os
import subprocess
import sys
import unicodedata
from pathlib import Path

import pytest

from hpc_core.baselines.accept import accept
from hpc_core.cli import main
from hpc_core.record.record import record_to_json
from tests.strategies import a_record

ROOT = Path(__file__).parents[2]
NOT_UTF8 = os.fsdecode(b"bad\xff.json")
KINDS = (
    "missing.json", "empty.json", "junk.json", "deep.json", "folder.json", "pipe.json", "zeros.json", NOT_UTF8, "gone\udcfe.json",
    "a\x1b[31m\n.json", "good.json/below.json", f"{'x' * 300}.json", "/dev/null", "", "loop.json", "/proc/none/x.json", "-",
    "tiny/**x", "tiny/\udcff", "../../etc", "baselines/nvidia-h100-80gb-hbm3-80gib/tiny/lora.json",
)  # fmt: skip
COMMANDS = {
    "explain": "explain BAD", "explain --against": "explain good.json --against BAD",
    "diff": "baseline diff BAD", "diff of two": "baseline diff good.json BAD", "diff --baselines": "baseline diff good.json --baselines BAD",
    "accept": "baseline accept BAD --reason r", "accept --baselines": "baseline accept good.json --reason r --baselines BAD/x",
    "add-profile": "baseline add-profile BAD", "add-profile --machine": "baseline add-profile good.json --machine BAD",
    "list": "baseline list --baselines BAD", "show": "baseline show BAD", "show --baselines": "baseline show tiny/lora --baselines BAD",
    "history": "history BAD", "history metric": "history tiny/lora BAD", "history --records": "history tiny/lora --records BAD",
    "history --machine": "history tiny/lora --machine BAD", "history --plot": "history tiny/lora peak_bytes --plot BAD",
    "report": "report BAD", "report --baselines": "report good.json --baselines BAD", "report --case": "report good.json --case BAD",
    "report --csv": "report good.json --csv BAD", "report --json": "report BAD --json",
    "cases": "cases --cases BAD", "run": "run BAD", "run --cases": "run tiny/lora --cases BAD",
    "predict": "predict BAD", "predict --gpu": "predict tiny/lora --gpu BAD", "predict --set": "predict tiny/lora --set BAD",
    "predict --set batch": "predict tiny/lora --set batch=BAD", "predict --sweep": "predict tiny/lora --sweep BAD",
    "predict --fit": "predict tiny/lora --fit BAD", "predict --margin": "predict tiny/lora --margin BAD",
    "predict --over": "predict tiny/lora --plot m.svg --over BAD", "predict --cases": "predict tiny/lora --cases BAD",
    "faults": "faults --only BAD", "profile": "profile BAD", "profile --cases": "profile tiny/lora --cases BAD",
    "ab --cases": "ab HEAD --cases BAD", "ab --budget": "ab HEAD --budget BAD", "bisect": "bisect BAD peak_bytes",
    "bisect --package": "bisect tiny/lora peak_bytes --package BAD",
    "bisect --versions": "bisect tiny/lora peak_bytes --package torch --versions BAD",
    "prediction-table": "prediction-table --only BAD", "prediction-table --gpu": "prediction-table --gpu BAD",
}  # fmt: skip


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a baseline, a good record, and something wrong of each kind."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    accept(tmp_path / "baselines", a_record(), reason="r")
    Path("good.json").write_bytes(record_to_json(a_record()))
    for name, content in {
        "empty.json": b"",
        "junk.json": b"\xff\x00{",
        "deep.json": b"[" * 10**5,
        NOT_UTF8: b"{}",
    }.items():
        Path(name).write_bytes(content)
    Path("a\x1b[31m\n.json").write_bytes(b"{}")
    Path("folder.json").mkdir()
    os.mkfifo("pipe.json")
    Path("zeros.json").symlink_to("/dev/zero")
    Path("loop.json").symlink_to("loop.json")
    return tmp_path


def outcome(monkeypatch: pytest.MonkeyPatch, arguments: list[str]) -> tuple[int, str, str]:
    """Run a command on streams that are strict about characters; return its exit code and what it printed."""
    streams = [io.TextIOWrapper(io.BytesIO(), encoding="ascii") for _ in range(2)]
    with monkeypatch.context() as patch:
        for name, stream in zip(("stdout", "stderr"), streams, strict=True):
            patch.setattr(sys, name, stream)
        code = 0
        try:
            main(arguments)
        except SystemExit as end:
            code = int(end.code or 0)
    printed = []
    for stream in streams:
        stream.flush()
        printed.append(stream.buffer.getvalue().decode("ascii"))
    return code, printed[0], printed[1]


@pytest.mark.parametrize("step", [len(KINDS), pytest.param(1, marks=pytest.mark.nightly)])
@pytest.mark.parametrize("command", COMMANDS.values(), ids=COMMANDS)
def test_bad_input_is_one_line(folder: Path, monkeypatch: pytest.MonkeyPatch, command: str, step: int) -> None:
    """Of each kind of bad input: exit code 2 with one line, or a result; on a terminal that knows only ASCII."""
    for kind in KINDS[list(COMMANDS.values()).index(command) % step :: step]:
        arguments = [word.replace("BAD", kind) for word in command.split()]
        code, out, err = outcome(monkeypatch, arguments)
        assert code in (0, 1, 2), (kind, code)
        if code == 2 and not err.startswith("Usage"):
            assert err.splitlines()[-1].startswith("hpc-core: "), (kind, err)
            assert all(line.startswith(("hpc-core: ", "note: ")) for line in err.splitlines()), (kind, err)
        assert "Traceback" not in err
        assert not [char for char in out + err if unicodedata.category(char) == "Cc" and char not in "\n\t"], kind
        assert not list(folder.rglob("*.tmp"))
    assert Path("pipe.json").is_fifo()
    assert Path("zeros.json").is_symlink()
    assert Path("/dev/null").is_char_device()


@pytest.mark.parametrize("output", ["/dev/full", "ascii"])
def test_output_that_cannot_be_written(tmp_path: Path, output: str) -> None:
    """A full disk is one line and exit code 2; a character that the terminal lacks is escaped."""
    path = tmp_path / os.fsdecode("é.json".encode())
    path.write_bytes(record_to_json(a_record()))
    environment = os.environ | {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "hpc_core.cli", "report", str(path)]
    with Path("/dev/full").open("wb") as full:
        where = full if output == "/dev/full" else subprocess.PIPE
        ran = subprocess.run(command, stdout=where, stderr=subprocess.PIPE, env=environment, check=False, timeout=60)
    if output == "ascii":
        assert (ran.returncode, ran.stderr) == (0, b"")
        assert b"\\xb7" in ran.stdout
    else:
        assert (ran.returncode, ran.stderr) == (2, b"hpc-core: No space left on device.\n")


def test_a_closed_pipe_keeps_the_exit_code(tmp_path: Path) -> None:
    """A reader that ends early, such as head, hides no verdict."""
    path = tmp_path / "record.json"
    path.write_text("{}")
    command = f"{sys.executable} -m hpc_core.cli cases | true; echo ${{PIPESTATUS[0]}}"
    ran = subprocess.run(["bash", "-c", command], capture_output=True, check=True, timeout=60, cwd=ROOT)
    assert b"Traceback" not in ran.stderr
    assert b"Exception ignored" not in ran.stderr
