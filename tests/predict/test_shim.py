"""The empty CUDA device: compiled once a torch, found again, never left half made, and refused in one sentence where it cannot be had."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
LOADED = """
from hpc_core.case.errors import PredictError
from hpc_core.predict import shim
try:
    shim.load()
    print(shim.compiled())
except PredictError as error:
    print("refused:", error)
"""


def _start(cache: Path, code: str = LOADED, **environment: str) -> subprocess.Popen[str]:
    given = os.environ | {"XDG_CACHE_HOME": str(cache)} | environment
    return subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, cwd=ROOT, env=given)


def _printed(process: subprocess.Popen[str]) -> str:
    out, _ = process.communicate(timeout=300)
    assert process.returncode == 0
    return out.strip()


def _left(cache: Path) -> list[str]:
    return sorted(path.name for path in cache.rglob("*") if path.is_file())


def test_without_a_compiler_it_says_how_to_get_one(tmp_path: Path) -> None:
    """The compiler that was looked for is named, and so is the variable to name another one by; no file is left."""
    printed = _printed(_start(tmp_path, CXX="/nonexistent"))
    assert printed.startswith("refused: Prediction compiles a small C++ file once, but the compiler '/nonexistent'")
    assert "environment variable CXX" in printed
    assert _left(tmp_path) == []


def test_a_compiler_that_cannot_is_quoted(tmp_path: Path) -> None:
    """Its first error is shown with its exit code, and what it wrote before it failed is gone."""
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
    assert _left(cache) == []


def test_after_torch_it_is_too_late() -> None:
    """The device must be there before torch asks for it: a process with torch is refused, and nothing is compiled."""
    printed = _printed(_start(Path("/nonexistent"), "import torch\n" + LOADED))
    assert printed.startswith("refused: Prediction needs a process that has not imported torch yet")


def test_two_processes_at_once_make_one_library_that_others_find(tmp_path: Path) -> None:
    """Both succeed and leave one whole file; a third process needs no compiler any more."""
    both = [_start(tmp_path), _start(tmp_path)]
    paths = {_printed(process) for process in both}
    assert len(paths) == 1
    path = Path(paths.pop())
    assert _left(tmp_path) == [path.name]
    made = path.stat()
    assert _printed(_start(tmp_path, CXX="/nonexistent")) == str(path)
    assert (path.stat().st_mtime_ns, path.stat().st_ino) == (made.st_mtime_ns, made.st_ino)


def test_a_file_that_is_no_library_is_refused(tmp_path: Path) -> None:
    """A cache that was damaged is named, so that it can be removed."""
    name = _printed(_start(tmp_path))
    Path(name).write_bytes(b"no library")
    printed = _printed(_start(tmp_path))
    assert printed.startswith("refused: ")
    assert name in printed
