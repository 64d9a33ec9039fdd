"""`hpc-core doctor` where libraries are broken: real packages that lie on the path and fail, asked by real child processes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from hpc_core.cli.doctor_checks.checks import LIBRARIES

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
VERSIONS = {
    "torch": "2.11.0",
    "transformers": "5.20.0",
    "peft": "0.21.0",
    "accelerate": "1.10.0",
    "bitsandbytes": "0.50.2",
}
TORCH = """
__version__ = "{version}"
class version: cuda = None
class cuda:
    is_available = staticmethod(lambda: False)
def ones(*shape, device=None): return shape
"""
QUANTIZES = "def quantize_4bit(tensor, quant_type): return tensor\n"
NO_LIBRARY = """
def quantize_4bit(tensor, quant_type):
    raise RuntimeError("\\n\\n  CUDA SETUP: Required library libbitsandbytes_cuda129.so not found")
"""


def stubs(folder: Path, changed: Mapping[str, str]) -> Path:
    """A folder of packages that import at once: all that doctor asks for, some of them `changed`."""
    for library in LIBRARIES:
        name = library.name.replace("-", "_")
        version = VERSIONS.get(library.name, "99.0")
        text = TORCH.format(version=version) if name == "torch" else f"__version__ = {version!r}\n"
        (folder / name).mkdir(parents=True)
        (folder / name / "__init__.py").write_text(changed.get(name, text))
    (folder / "bitsandbytes" / "functional.py").write_text(changed.get("bitsandbytes.functional", QUANTIZES))
    (folder / "bitsandbytes" / "cextension.py").write_text("lib = None\n")
    return folder


def doctor(folder: Path, *options: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "hpc_core.cli", "doctor", *options],
        env=os.environ | {"PYTHONPATH": str(folder)} | environment,
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def examined(folder: Path, *options: str) -> tuple[int, dict[str, Any], dict[str, Any]]:
    """Exit code, everything, and the checks by name."""
    done = doctor(folder, "--json", *options)
    assert "Traceback" not in done.stderr
    said = json.loads(done.stdout)
    return done.returncode, said, {check["name"]: check for check in said["checks"]}


def test_without_a_gpu_it_says_what_can_be_done(tmp_path: Path) -> None:
    """On a machine without a GPU and with a sound stack nothing must be done, and it says what runs and what is predicted."""
    done = doctor(stubs(tmp_path, {}), CUDA_VISIBLE_DEVICES="")

    assert done.returncode == 0
    assert "Nothing must be done." in done.stdout
    assert "CUDA_VISIBLE_DEVICES='' may hide it" in done.stdout
    assert "full-size ones are predicted: hpc-core predict CASE" in done.stdout


def test_a_bitsandbytes_that_cannot_be_imported_and_an_old_torch(tmp_path: Path) -> None:
    """An import that raises and a version that is too old each get a line with what was seen, and a command."""
    old = TORCH.format(version="1.13.1+cu117")
    broken = 'raise OSError("libcudart.so.12: cannot open shared object file")\n'

    code, said, checks = examined(stubs(tmp_path, {"torch": old, "bitsandbytes": broken}))

    assert (code, said["ok"]) == (1, False)
    assert (checks["torch"]["state"], checks["torch"]["seen"]) == ("too old", "1.13.1+cu117")
    assert "pip install -U 'torch>=2.11'" in checks["torch"]["advice"]
    assert checks["bitsandbytes"]["state"] == "broken"
    assert "libcudart.so.12" in checks["bitsandbytes"]["seen"]
    assert "pip install --force-reinstall bitsandbytes" in checks["bitsandbytes"]["advice"]


def test_a_bitsandbytes_without_its_compiled_library(tmp_path: Path) -> None:
    """One that imports and fails at the first weight is found by quantizing one, and says where to look."""
    code, _, checks = examined(stubs(tmp_path, {"bitsandbytes.functional": NO_LIBRARY}))

    assert code == 1
    assert "libbitsandbytes_cuda129.so not found" in checks["bitsandbytes"]["seen"]
    assert "python -m bitsandbytes" in checks["bitsandbytes"]["advice"]


def test_nothing_that_a_library_does_ends_the_examination(tmp_path: Path) -> None:
    """A crash, a hang, a flood on stdout, an exit, a missing dependency and a missing package each cost one line."""
    changed = {
        "transformers": "import os, signal; os.kill(os.getpid(), signal.SIGSEGV)\n",
        "peft": "import time; time.sleep(60)\n",
        "accelerate": "import sys; sys.exit('no')\n",
        "datasets": "print('noise\\n' * 5000)\n__version__ = '99.0'\n",
        "gguf": "import no_such_module_at_all\n",
        "matplotlib": "raise BaseException('odd')\n",
        "triton": "raise ModuleNotFoundError(\"No module named 'triton'\", name='triton')\n",
    }

    code, _, checks = examined(stubs(tmp_path, changed), "--limit", "4")

    assert code == 1
    assert "SIGSEGV" in checks["transformers"]["seen"]
    assert "longer than 4 s" in checks["peft"]["seen"]
    assert checks["accelerate"]["state"] == checks["matplotlib"]["state"] == "broken"
    assert (checks["datasets"]["state"], checks["datasets"]["seen"]) == ("ok", "99.0")
    assert "pip install no_such_module_at_all" in checks["gguf"]["advice"]
    assert checks["triton"]["state"] == "missing"
