"""`hpc-core doctor` reports what is missing, too old or hidden in one line with a command. Its packages are metadata on the path."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from hpc_core.cli import doctor as module
from hpc_core.cli import main
from tests.commands import exit_code

GPU = {"name": "NVIDIA H100 80GB HBM3", "memory_bytes": 80 * 2**30, "uuid": "GPU-1", "driver": "580.1", "index": 0}
METADATA = """\
Metadata-Version: 2.4
Name: {name}
Version: {version}
"""
OURS = """\
Requires-Dist: torch>=2.11; extra == 'run'
Requires-Dist: peft>=0.21.0; extra == 'run'
Requires-Dist: no-such-thing>=1.0; extra == 'quantization'
Requires-Dist: datasets>=4.0; extra == 'hub'
Requires-Dist: ruff>=0.12; extra == 'lint'
Requires-Dist: hpc-core[run]; extra == 'all'
"""
Doctor = Callable[..., tuple[int, str]]


@pytest.fixture
def doctor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Doctor:
    """Run doctor where hpc-core and these versions are installed, and return exit code and stdout."""

    def run(*options: str, **versions: str) -> tuple[int, str]:
        folder = tmp_path / "site"
        installed: dict[str, str] = {
            "hpc-core": "0.1.0",
            "torch": "2.11.0+cpu",
            "peft": "0.21.0",
            "datasets": "99",
        } | versions
        for name, version in installed.items():
            info = folder / f"{name.replace('-', '_')}-{version}.dist-info"
            info.mkdir(parents=True)
            text = METADATA.format(name=name, version=version)
            (info / "METADATA").write_text(text + (OURS if name == "hpc-core" else ""))
        monkeypatch.syspath_prepend(str(folder))
        code = exit_code(main, "doctor", *options)
        return code, capsys.readouterr().out

    return run


def checks(out: str) -> dict[str, dict[str, Any]]:
    return {check["name"]: check for check in json.loads(out)["checks"]}


def test_without_a_gpu_it_says_what_can_be_done(doctor: Doctor, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a machine without a GPU nothing is missing, and the output says what runs and what is predicted."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    code, out = doctor()
    assert code == 0
    assert "Nothing must be done." in out
    assert "CUDA_VISIBLE_DEVICES='' may hide it" in out
    assert "full-size ones are predicted: hpc-core predict CASE" in out
    assert "python -m torch.utils.collect_env, python -m bitsandbytes" in out


def test_packages_are_compared_with_what_hpc_core_needs(doctor: Doctor) -> None:
    """A package that is too old is an error, a missing optional one is not; each has its command."""
    code, out = doctor("--json", torch="1.13.1+cu117")
    by_name = checks(out)
    assert (code, json.loads(out)["ok"]) == (1, False)
    assert (by_name["torch"]["state"], by_name["torch"]["seen"]) == ("too old", "1.13.1+cu117, needs >=2.11")
    assert "pip install -U 'hpc-core[run]'" in by_name["torch"]["advice"]
    assert (by_name["no-such-thing"]["state"], by_name["no-such-thing"]["needed"]) == ("missing", False)
    assert (by_name["peft"]["state"], by_name["datasets"]["state"], "ruff" in by_name) == ("ok", "ok", False)


def test_predictions_and_baselines(doctor: Doctor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A missing compiler and missing baselines are notes with a command, not failures."""
    monkeypatch.setenv("PATH", str(tmp_path))
    code, out = doctor("--json", "--baselines", str(tmp_path))
    by_name = checks(out)
    assert code == 0
    assert (by_name["C++ compiler"]["state"], "g++" in by_name["C++ compiler"]["advice"]) == ("missing", True)
    assert (by_name["baselines"]["state"], "--perf-update" in by_name["baselines"]["advice"]) == ("note", True)


@pytest.mark.parametrize(
    ("script", "expected"),
    [
        ("import time; time.sleep(60)", "longer than 1 s"),
        ("raise RuntimeError('driver too old')", "driver too old"),
        ("import os; os.abort()", "exit code -6"),
        ("""print('noise'); print('{"cuda": null, "devices": 0}')""", "none visible, a CPU build"),
    ],
)
def test_a_torch_that_cannot_use_the_gpu_is_broken(
    doctor: Doctor, monkeypatch: pytest.MonkeyPatch, script: str, expected: str
) -> None:
    """Where NVML sees a GPU, a torch that hangs, raises, crashes or sees none gives one line."""
    monkeypatch.setattr(module, "visible_gpus", lambda: (GPU,))
    monkeypatch.setattr(module, "read_state", lambda index: {"persistence_mode": 0, "used_bytes": 2**30})
    monkeypatch.setattr(module, "_users", lambda pynvml, index: [{"pid": 7, "used_bytes": None}])
    monkeypatch.setattr(module, "_ASK_TORCH", script)
    code, out = doctor("--limit", "1")
    assert code == 1
    for text in (expected, "used by process 7", "persistence mode is off"):
        assert text in out
    assert sys.executable not in out
