"""What a bisection searches: commits of a repository, or versions of one package. Each gives a side when it is its turn."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Protocol

import msgspec

from hpc_core.case.case import Case
from hpc_core.case.errors import SpecError
from hpc_core.compare.arrange import OWN, ask
from hpc_core.compare.checkouts import Checkouts
from hpc_core.compare.environments import python_with
from hpc_core.compare.probe import probe
from hpc_core.compare.revisions import Revision, changed_files, commits_between, resolve, uncommitted
from hpc_core.compare.side import Side, side_of

__all__ = ["Candidates", "Commits", "Versions", "versions_said"]


class Candidates(Protocol):
    """Candidates after a good end, oldest first; the last one is the bad end."""

    labels: tuple[str, ...]
    notes: tuple[str, ...]

    @property
    def good(self) -> Side:
        """The good end."""

    def side(self, index: int) -> Side:
        """The candidate as head; raises SpecError where it cannot be measured."""

    def described(self, index: int) -> tuple[str, ...]:
        """Lines about it, for the reader of the result."""


class Commits:
    """The commits of GOOD..BAD along first parents.

    Raises:
        SpecError: an unknown revision, the same one twice, the wrong order.
    """

    def __init__(
        self, said: str, case: Case, checkouts: Checkouts, place: Path, here: Path, paths: Sequence[str]
    ) -> None:
        good, dots, bad = said.partition("..")
        if not dots or not good or bad.startswith("."):
            raise SpecError(f"{said!r} is no range of revisions: say GOOD..BAD, such as v1.0..main.")
        self._case = case
        self._place = place
        self._checkouts = checkouts
        self._build = functools.partial(side_of, place=place, here=here, paths=paths, own=checkouts.folder / OWN)
        self._good = resolve(place, good)
        self._revisions = commits_between(place, self._good, resolve(place, bad or "HEAD"))
        self.labels = tuple(f"{revision.short} {revision.subject}" for revision in self._revisions)
        changed = len(uncommitted(place))
        self.notes: tuple[str, ...] = (
            (f"{changed} uncommitted changes in {place} are not part of any revision.",) if changed else ()
        )

    @functools.cached_property
    def good(self) -> Side:
        """The good end, in a worktree that stays."""
        return self._side("base", self._good)

    def _side(self, name: str, revision: Revision) -> Side:
        tree = self._checkouts.check_out(name, revision.commit)
        return self._build(name, label=revision.short, tree=tree, revision=revision)

    def side(self, index: int) -> Side:
        """The commit, in the worktree that all candidates share."""
        side = self._side("head", self._revisions[index])
        _, refused = ask(self.good, side, [self._case], by_revision=True)
        for name, why in refused.get(self._case.id, {}).items():
            raise SpecError(f"{name} {why}")
        return side

    def described(self, index: int) -> tuple[str, ...]:
        """Commit, subject, date and size."""
        found = self._revisions[index]
        changed = changed_files(self._place, found)
        files = "1 file changed" if changed == 1 else f"{changed} files changed"
        return f"{found.commit} {found.subject}", f"authored {found.author_date}, {files}"


class Versions:
    """Versions of one package, each under an interpreter that has it: one that was named, or one made for it.

    Raises:
        SpecError: fewer than two versions, or one that is named twice.
    """

    def __init__(
        self,
        package: str,
        versions: Sequence[str],
        pythons: Mapping[str, str],
        case: Case,
        checkouts: Checkouts,
        *,
        place: Path,
        here: Path,
        tell: Callable[[str], None],
    ) -> None:
        self._package = package
        self._versions = tuple(versions)
        self._case = case
        self._build = functools.partial(side_of, place=place, here=here, own=checkouts.folder / OWN)
        self._python = functools.partial(
            python_with, package, pythons=pythons, folder=checkouts.folder / "environments", tell=tell
        )
        self.labels = tuple(f"{package} {version}" for version in self._versions[1:])
        self.notes: tuple[str, ...] = ()

    @functools.cached_property
    def good(self) -> Side:
        """The first version."""
        return self._side("base", self._versions[0])

    def _side(self, name: str, version: str) -> Side:
        side: Side = self._build(name, label=f"{self._package} {version}", python=self._python(version))
        found = probe(side, [self._case], versions=[self._package]).versions[self._package]
        if not _same_version(found, version):
            raise SpecError(
                f"{side.python} has {self._package} {found or 'not at all'}, not {version}. "
                f"Name another one: --python-for {version}=PATH."
            )
        return side

    def side(self, index: int) -> Side:
        """A later version."""
        side = self._side("head", self._versions[index + 1])
        ask(self.good, side, [self._case], by_revision=False)
        return side

    def described(self, index: int) -> tuple[str, ...]:
        """Package, version and the one before."""
        return (f"{self.labels[index]} (the one before it in the list is {self._versions[index]})",)


def _same_version(found: str, asked: str) -> bool:
    """5.17 is 5.17.0; a local label as in 2.13.0+cpu does not count."""
    return _plain(found) == _plain(asked)


def _plain(version: str) -> tuple[str, ...]:
    parts = version.partition("+")[0].split(".")
    while len(parts) > 1 and parts[-1] == "0":
        parts.pop()
    return tuple(parts)


class VersionsSaid(msgspec.Struct, frozen=True, kw_only=True):
    """Versions in order, and the interpreters that were named for some of them."""

    versions: tuple[str, ...]
    pythons: dict[str, str]


def versions_said(said: str | None, ends: str | None, pythons: Sequence[str]) -> VersionsSaid:
    """From "5.17,5.20,5.24", or the ends "5.17..5.24" of such a list, and "5.17=PATH" for each interpreter.

    Raises:
        SpecError: fewer than two versions, one that is named twice, ends that are not in the list, or an unknown interpreter's version.
    """
    listed = [part.strip() for part in (said or "").split(",") if part.strip()]
    if ends is not None:
        first, dots, last = ends.partition("..")
        if not dots or not first or not last:
            raise SpecError(f"{ends!r} is no range of versions: say GOOD..BAD, such as 5.17..5.24.")
        listed = listed or [first, last]
        for end in (first, last):
            if end not in listed:
                raise SpecError(f"{ends}: {end} is not in --versions {','.join(listed)}.")
        listed = listed[listed.index(first) : listed.index(last) + 1]
    if len(set(listed)) != len(listed):
        raise SpecError(f"--versions {','.join(listed)}: one is named twice.")
    if len(listed) < 2:
        raise SpecError(
            "--package needs two versions or more, the good one first: --versions 5.17,5.20,5.24, or 5.17..5.24."
        )
    named: dict[str, str] = {}
    for text in pythons:
        version, equals, path = text.partition("=")
        if not equals or not path:
            raise SpecError(f"--python-for {text!r}: say --python-for {version or 'VERSION'}=PATH.")
        if version not in listed:
            raise SpecError(f"--python-for {version}: it is not among the versions {', '.join(listed)}.")
        named[version] = path
    return VersionsSaid(versions=tuple(listed), pythons=named)
