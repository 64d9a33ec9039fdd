"""A CUDA device without memory or kernels, as far as torch's autograd needs one to run fake CUDA tensors.

It is a small C++ library, compiled once per torch version and cached. It must be loaded before torch is imported, so this module
does not import torch: it finds torch's folder on disk.
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

_SOURCE = Path(__file__).with_name("fakecuda.cpp")
_TORCH_LIBRARIES = ("libc10.so", "libtorch_cpu.so")
_COMPILE_LIMIT_S = 300.0
_library: ctypes.CDLL | None = None


def loaded() -> bool:
    """Return whether this process has loaded the device."""
    return _library is not None


def load() -> None:
    """Load the library into this process, and hide real GPUs from it. Compile it first if the cache has none for this torch.

    Raises:
        PredictError: torch is already imported or not installed, or the library cannot be compiled.
    """
    global _library  # a process loads it once and never unloads it
    if _library is not None:
        return
    if "torch" in sys.modules:
        raise PredictError(
            "Prediction needs a process that has not imported torch yet: run it through `hpc-core predict`, "
            "`hpc_core.predicted(...)` or the plugin, which start one."
        )
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # a CUDA build must not meet a real GPU: there is one fake one
    torch = _torch_folder()
    path = compiled()
    for name in _TORCH_LIBRARIES:  # the library needs torch's symbols
        ctypes.CDLL(str(torch / "lib" / name), mode=ctypes.RTLD_GLOBAL)
    try:
        _library = ctypes.CDLL(str(path), mode=ctypes.RTLD_GLOBAL)
    except OSError as error:
        raise PredictError(
            f"The compiled device {path} cannot be loaded ({error}). Delete it; the next prediction compiles it again."
        ) from error


def install_guard() -> None:
    """Replace the device guard that a CUDA build of torch installed. Call it after `import torch`.

    Raises:
        PredictError: `load` was not called before torch was imported.
    """
    if _library is None:
        raise PredictError("The empty CUDA device is not loaded: call shim.load() before torch is imported.")
    _library.hpc_core_install_guard()


def compiled() -> Path:
    """Return the path of the compiled library for this torch. Compile it if necessary.

    Raises:
        MissingCompilerError: no compiler is installed.
        PredictError: torch is not installed, or the compiler fails.
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
            f"The cache folder {folder} cannot be created ({error.strerror}). Set XDG_CACHE_HOME to a folder that can be written."
        ) from error
    return folder


def _compile(torch: Path, path: Path) -> None:
    """Compile to a temporary file first, so that parallel or interrupted processes never leave a partial library."""
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
            f"Prediction compiles a small C++ file once, but the compiler {compiler!r} cannot be run ({error.strerror}). Install one "
            "(Debian: apt-get install g++), or name one in the environment variable CXX."
        ) from error
    except subprocess.TimeoutExpired as error:
        raise PredictError(f"{compiler} did not finish {_SOURCE.name} within {_COMPILE_LIMIT_S:g} s.") from error
    finally:
        half.unlink(missing_ok=True)


def _first_error(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return next((line for line in lines if "error" in line), lines[-1] if lines else "no output").rstrip(".")
