"""A CUDA device that holds nothing, for torch's autograd: a small C++ library, compiled once a torch and kept in a cache.

Must be loaded before torch is imported, so this module imports none: paths come from where torch lies on disk.
"""

from __future__ import annotations

import ctypes
import hashlib
import importlib.util
import os
import shlex
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

from hpc_core.case.errors import MissingCompilerError, PredictError

__all__ = ["compiled", "install_guard", "load", "loaded"]

_SOURCE = Path(__file__).with_name("fakecuda.cpp")
_TORCH_LIBRARIES = ("libc10.so", "libtorch_cpu.so")
_COMPILE_LIMIT_S = 300.0
_library: ctypes.CDLL | None = None


def loaded() -> bool:
    """Whether this process has the device."""
    return _library is not None


def load() -> None:
    """Load the library into this process, compiling it first where the cache has none for this torch.

    Raises:
        PredictError: torch is imported already or absent, or there is no compiler that can make the library.
    """
    global _library  # a process loads it once, for good
    if _library is not None:
        return
    if "torch" in sys.modules:
        raise PredictError(
            "Prediction needs a process that has not imported torch yet: run it through `hpc-core predict`, "
            "`hpc_core.predicted(...)` or the plugin, which start one."
        )
    torch = _torch_folder()
    path = compiled()
    for name in _TORCH_LIBRARIES:  # the library's symbols are torch's; Python loads torch's own files later by itself
        ctypes.CDLL(str(torch / "lib" / name), mode=ctypes.RTLD_GLOBAL)
    try:
        _library = ctypes.CDLL(str(path), mode=ctypes.RTLD_GLOBAL)
    except OSError as error:
        raise PredictError(
            f"The compiled device {path} cannot be loaded ({error}). Remove it: it is made anew."
        ) from error


def install_guard() -> None:
    """After `import torch`: put the guard of the empty device in place of the one that a CUDA build has brought.

    Raises:
        PredictError: `load` was not called before torch was imported.
    """
    if _library is None:
        raise PredictError("The empty CUDA device is not loaded: call shim.load() before torch is imported.")
    _library.hpc_core_install_guard()


def compiled() -> Path:
    """The compiled library for this torch, made now if need be.

    Raises:
        MissingCompilerError: there is no compiler.
        PredictError: torch is absent, or the compiler fails.
    """
    torch = _torch_folder()
    version = (torch / "version.py").read_bytes()
    name = hashlib.sha256(_SOURCE.read_bytes() + version + str(torch).encode()).hexdigest()[:16]
    path = _cache() / f"fakecuda-{name}.so"
    if not path.is_file():
        _compile(torch, path)
    return path


def _torch_folder() -> Path:
    found = importlib.util.find_spec("torch")
    if found is None or found.origin is None:
        raise PredictError("Prediction needs torch, a CPU build will do: pip install 'hpc-core[run]'.")
    return Path(found.origin).parent


def _cache() -> Path:
    root = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    folder = Path(root) / "hpc-core"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise PredictError(
            f"{folder}, which keeps a compiled file, cannot be made ({error.strerror}): name another folder in XDG_CACHE_HOME."
        ) from error
    return folder


def _compile(torch: Path, path: Path) -> None:
    """Compile to a file of another name first, so that two processes at once, or a broken one, leave no half library."""
    compiler = os.environ.get("CXX") or (sysconfig.get_config_var("CXX") or "c++").split()[0]
    handle, name = tempfile.mkstemp(dir=path.parent, suffix=".so")
    os.close(handle)
    half = Path(name)
    include = torch / "include"
    command = [
        *shlex.split(compiler),
        *("-std=c++20", "-O1", "-shared", "-fPIC", "-fvisibility=hidden"),
        *(f"-I{include}", f"-I{include / 'torch' / 'csrc' / 'api' / 'include'}"),
        *(str(_SOURCE), f"-L{torch / 'lib'}", "-lc10", "-ltorch_cpu", "-o", str(half)),
    ]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_COMPILE_LIMIT_S, check=False)
        if done.returncode != 0:
            raise PredictError(
                f"{compiler} could not compile {_SOURCE.name} for the torch in {torch} (exit code {done.returncode}): "
                f"{_first_error(done.stderr)}. It needs C++20: name another compiler in the environment variable CXX."
            )
        half.replace(path)
    except OSError as error:
        raise MissingCompilerError(
            f"Prediction compiles a small C++ file once, and there is no compiler {compiler!r} ({error.strerror}). Install one "
            "(Debian: apt-get install g++), or name one in the environment variable CXX."
        ) from error
    except subprocess.TimeoutExpired as error:
        raise PredictError(f"{compiler} took longer than {_COMPILE_LIMIT_S:g} s over {_SOURCE.name}.") from error
    finally:
        half.unlink(missing_ok=True)


def _first_error(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return next((line for line in lines if "error" in line), lines[-1] if lines else "it said nothing").rstrip(".")
