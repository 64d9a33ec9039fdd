"""The empty CUDA device is compiled once per torch and cached, never left half written, and refused in one sentence where it cannot be built."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
LOAD = """
from hpc_core.case.errors import PredictError
from hpc_core.predict import shim
try:
    shim.load()
    print(shim.compiled())
except PredictError as error:
    print("refused:", error)
"""


def _start(cache: Path, code: str = LOAD, **environment: str) -> subprocess.Popen[str]:
    variables = os.environ | {"XDG_CACHE_HOME": str(cache)} | environment
    return subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, cwd=ROOT, env=variables)


def _printed(process: subprocess.Popen[str]) -> str:
    out, _ = process.communicate(timeout=300)
    assert process.returncode == 0
    return out.strip()


def _cached_files(cache: Path) -> list[str]:
    return sorted(path.name for path in cache.rglob("*") if path.is_file())


def test_a_missing_compiler_is_refused_with_its_name(tmp_path: Path) -> None:
    """A missing compiler is named with the variable that chooses another, and no file is left."""
    printed = _printed(_start(tmp_path, CXX="/nonexistent"))
    assert printed.startswith("refused: Prediction compiles a small C++ file once, but the compiler '/nonexistent'")
    assert "environment variable CXX" in printed
    assert _cached_files(tmp_path) == []


def test_a_failing_compiler_is_quoted(tmp_path: Path) -> None:
    """A failing compiler's first error is shown with its exit code, and its output file is removed."""
    compiler = tmp_path / "c++"
    compiler.write_text(
        '#!/bin/sh\nfor last; do :; done\necho half > "$last"\necho "odd.h:1: error: no such standard" >&2\nexit 3\n'
    )
    compiler.chmod(0o755)
    cache = tmp_path / "cache"
    printed = _printed(_start(cache, CXX=str(compiler)))
    assert printed.startswith("refused: ")
    assert "exit code 3" in printed
    assert "odd.h:1: error: no such standard" in printed
    assert _cached_files(cache) == []


def test_a_process_that_imported_torch_is_refused() -> None:
    """A process that has imported torch is refused, and nothing is compiled."""
    printed = _printed(_start(Path("/nonexistent"), "import torch\n" + LOAD))
    assert printed.startswith("refused: Prediction needs a process that has not imported torch yet")


@pytest.mark.nightly
def test_two_concurrent_processes_build_one_library(tmp_path: Path) -> None:
    """Two concurrent processes succeed and leave one file; a third process needs no compiler."""
    both = [_start(tmp_path), _start(tmp_path)]
    paths = {_printed(process) for process in both}
    assert len(paths) == 1
    path = Path(paths.pop())
    assert _cached_files(tmp_path) == [path.name]
    built = path.stat()
    assert _printed(_start(tmp_path, CXX="/nonexistent")) == str(path)
    assert (path.stat().st_mtime_ns, path.stat().st_ino) == (built.st_mtime_ns, built.st_ino)


def test_a_damaged_cache_is_refused(tmp_path: Path) -> None:
    """A damaged cached library is refused, and the message names the file."""
    name = _printed(_start(tmp_path))
    Path(name).write_bytes(b"no library")
    printed = _printed(_start(tmp_path))
    assert printed.startswith("refused: ")
    assert name in printed
