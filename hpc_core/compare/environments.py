"""An interpreter that has one package in another version, and everything else as this one has it."""

from __future__ import annotations

import os
import site
import subprocess
import sys
import venv
from collections.abc import Callable, Mapping
from pathlib import Path

from hpc_core.case.errors import SpecError

__all__ = ["python_with"]

_INSTALL_S = 1800


def python_with(
    package: str, version: str, *, pythons: Mapping[str, str], folder: Path, tell: Callable[[str], None]
) -> str:
    """The path of an interpreter with that version: the one that was named for it, else a virtual environment made now.

    The environment sees this interpreter's packages behind its own, so pip fetches only what differs.

    Raises:
        SpecError: pip cannot install it.
    """
    if version in pythons:
        return pythons[version]
    home = folder / f"{package}-{version}"
    python = home / "bin" / "python"
    if not python.exists():
        tell(f"{package} {version}: making an environment (pip install {package}=={version})")
        venv.create(home, with_pip=False, symlinks=True)
        _inherit(home)
        _install(python, package, version)
    return os.fspath(python)


def _inherit(home: Path) -> None:
    """Let the environment see our packages, after its own; a .pth file's import line is run when Python starts."""
    own = home / "lib" / f"python{sys.version_info.major}.{sys.version_info.minor}" / "site-packages"
    lines = [f"import site; site.addsitedir({found!r})" for found in site.getsitepackages()]
    (own / "inherited.pth").write_text("\n".join(lines) + "\n", encoding="utf-8")


def _install(python: Path, package: str, version: str) -> None:
    command = (sys.executable, "-m", "pip", "--python", os.fspath(python), "--disable-pip-version-check")
    try:
        ran = subprocess.run(
            (*command, "install", "--quiet", f"{package}=={version}"),
            capture_output=True,
            text=True,
            timeout=_INSTALL_S,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise SpecError(f"pip install {package}=={version} took longer than {_INSTALL_S} s.") from error
    if ran.returncode:
        last = (ran.stderr.strip().splitlines() or ["it said nothing"])[-1]
        raise SpecError(
            f"pip cannot install {package} {version}: {last}. Name an interpreter that has it: --python-for {version}=PATH."
        )
