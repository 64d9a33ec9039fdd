"""Versions of a package to search, and a side for each: the same code under an interpreter that has that version."""

from __future__ import annotations

import functools
import os
import site
import subprocess
import sys
import venv
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import msgspec

from hpc_core.case.case import Case
from hpc_core.case.errors import SpecError
from hpc_core.compare.describe import check_comparable, described
from hpc_core.compare.sides import Side, side_of

_INSTALL_S = 1800


class Versions(msgspec.Struct, frozen=True, kw_only=True):
    """Versions of one package in order, the good one first, and the interpreters given for some of them."""

    package: str
    versions: tuple[str, ...]
    pythons: dict[str, str]

    @classmethod
    def parse(cls, package: str, versions: str | None, ends: str | None, pythons: Sequence[str]) -> Versions:
        """Read "5.17,5.20,5.24", or the ends "5.17..5.24" of such a list, and "5.17=PATH" for each interpreter.

        Raises:
            SpecError: fewer than two versions, one that is named twice, ends that are not in the list, or an interpreter for another version.
        """
        listed = [part.strip() for part in (versions or "").split(",") if part.strip()]
        if ends is not None:
            first, dots, last = ends.partition("..")
            if not dots or not first or not last:
                raise SpecError(f"{ends!r} is not a range of versions: write GOOD..BAD, such as 5.17..5.24.")
            listed = listed or [first, last]
            for end in (first, last):
                if end not in listed:
                    raise SpecError(f"{ends}: {end} is not in --versions {','.join(listed)}.")
            listed = listed[listed.index(first) : listed.index(last) + 1]
        if len(set(listed)) != len(listed):
            raise SpecError(f"--versions {','.join(listed)}: one is named twice.")
        if len(listed) < 2:
            raise SpecError(
                "A bisection needs two versions or more, the good one first: --versions 5.17,5.20,5.24, or 5.17..5.24."
            )
        named: dict[str, str] = {}
        for text in pythons:
            version, equals, path = text.partition("=")
            if not equals or not path:
                raise SpecError(f"--python-for {text!r}: write --python-for {version or 'VERSION'}=PATH.")
            if version not in listed:
                raise SpecError(f"--python-for {version}: it is not among the versions {', '.join(listed)}.")
            named[version] = path
        return cls(package=package, versions=tuple(listed), pythons=named)

    @property
    def labels(self) -> tuple[str, ...]:
        """The candidates: every version after the good one."""
        return tuple(f"{self.package} {version}" for version in self.versions[1:])


class VersionSides:
    """Makes a side of each version: the same code under an interpreter that has that version."""

    def __init__(
        self, versions: Versions, case: Case, scratch: Path, *, place: Path, here: Path, tell: Callable[[str], None]
    ) -> None:
        self._versions = versions
        self._case = case
        self._build = functools.partial(side_of, place=place, here=here, scratch=scratch)
        pythons: Mapping[str, str] = versions.pythons
        self._python = functools.partial(python_with, versions.package, pythons=pythons, scratch=scratch, tell=tell)

    @functools.cached_property
    def good(self) -> Side:
        """The first version, as base."""
        return self._side("base", self._versions.versions[0])

    def candidate(self, index: int) -> Side:
        """Return a version after the good one as head; 0 is the next one.

        Raises:
            SpecError: it cannot be installed, or cannot be compared with the good one.
        """
        side = self._side("head", self._versions.versions[index + 1])
        check_comparable(self.good, side, [self._case], by_revision=False)
        return side

    def _side(self, name: str, version: str) -> Side:
        package = self._versions.package
        side = self._build(name, label=f"{package} {version}", python=self._python(version))
        found = described(side, [self._case], versions=[package]).versions[package]
        if _release(found) != _release(version):
            raise SpecError(
                f"{side.python} has {package} {found or 'not at all'}, not {version}. "
                f"Name another one: --python-for {version}=PATH."
            )
        return side


def _release(version: str) -> tuple[str, ...]:
    """Return the parts of a version: 5.17 equals 5.17.0, and the local label of 2.13.0+cpu does not count."""
    parts = version.partition("+")[0].split(".")
    while len(parts) > 1 and parts[-1] == "0":
        parts.pop()
    return tuple(parts)


def python_with(
    package: str, version: str, *, pythons: Mapping[str, str], scratch: Path, tell: Callable[[str], None]
) -> str:
    """Return an interpreter with that version of a package: the given one, or a new virtual environment.

    The environment sees this interpreter's packages after its own, so pip fetches only what differs.

    Raises:
        SpecError: pip cannot install it.
    """
    if version in pythons:
        return pythons[version]
    home = scratch / "environments" / f"{package}-{version}"
    python = home / "bin" / "python"
    if not python.exists():
        tell(f"{package} {version}: making an environment (pip install {package}=={version})")
        venv.create(home, with_pip=False, symlinks=True)
        own = home / "lib" / f"python{sys.version_info.major}.{sys.version_info.minor}" / "site-packages"
        # Python runs the import lines of a .pth file when it starts.
        lines = [f"import site; site.addsitedir({found!r})" for found in site.getsitepackages()]
        (own / "inherited.pth").write_text("\n".join(lines) + "\n", encoding="utf-8")
        _install(python, package, version)
    return os.fspath(python)


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
        last = (ran.stderr.strip().splitlines() or ["it printed nothing"])[-1]
        raise SpecError(
            f"pip cannot install {package} {version}: {last}. Name an interpreter that has it: --python-for {version}=PATH."
        )
