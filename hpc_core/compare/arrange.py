"""From the user's options to two sides that can be measured: revisions or interpreters, checked before anything runs."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from pathlib import Path

import msgspec

from hpc_core.case.case import Case
from hpc_core.case.errors import RepositoryError, SpecError
from hpc_core.compare.ab import SideName
from hpc_core.compare.checkouts import Checkouts
from hpc_core.compare.describe import check_comparable
from hpc_core.compare.sides import Side, side_of
from hpc_core.record.git import content, head, resolved, top, uncommitted
from hpc_core.record.units import counted


class SideOptions(msgspec.Struct, frozen=True, kw_only=True):
    """The revisions, interpreters and fault that the user named."""

    base: str | None = None
    """A revision; None: this tree as it is."""
    head: str | None = None
    base_python: str | None = None
    head_python: str | None = None
    head_fault: str | None = None
    paths: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """Check that one thing differs.

        Raises:
            SpecError: nothing to compare, or revisions and interpreters at once.
        """
        pythons = self.base_python is not None or self.head_python is not None
        if self.base is None and not pythons and self.head_fault is None:
            raise SpecError(
                "Nothing to compare: name a revision (hpc-core ab main), or another interpreter (--base-python PATH)."
            )
        if self.base is not None and pythons:
            raise SpecError(
                "Two revisions and two interpreters at once: no difference could be blamed on either. "
                "Drop BASE, or drop --base-python and --head-python."
            )


class Arranged(msgspec.Struct, frozen=True, kw_only=True):
    """Two sides, ready to be measured."""

    base: Side
    head: Side
    measured_by: str
    """One sentence that says whose measuring code runs."""
    notes: tuple[str, ...]
    refused: dict[str, dict[SideName, str]]
    """Why a side cannot run a case, by case."""
    check: Callable[[], None]
    """Raises SpecError if a tree in use has changed since."""


def place_of(here: Path, *, needs_git: bool) -> tuple[Path, bool]:
    """Return the top of the working tree around a folder, and whether it is a repository's.

    Raises:
        SpecError: revisions are needed, and there is no repository, or no git.
    """
    try:
        return top(here).resolve(), True
    except RepositoryError as error:
        if needs_git:
            raise SpecError(
                f"{here} has no revisions to compare: {str(error).rstrip('.')}. "
                "Go to the repository of the code under test, or compare two interpreters: --base-python PATH."
            ) from error
        return here, False


def arrange(
    options: SideOptions, cases: Sequence[Case], checkouts: Checkouts, place: Path, here: Path, in_git: bool
) -> Arranged:
    """Check out both sides, ask their workers what they would run, and check that they can be compared.

    Raises:
        SpecError: a side that does not answer, sides that would run the same code, or another protocol.
        RepositoryError: an unknown revision.
        LaunchError: no such interpreter.
    """
    build = functools.partial(side_of, place=place, here=here, paths=options.paths, scratch=checkouts.folder)
    base = _side("base", options.base, build, checkouts, place, in_git, python=options.base_python)
    head = _side(
        "head", options.head, build, checkouts, place, in_git, python=options.head_python, fault=options.head_fault
    )
    measured_by, refused = check_comparable(base, head, cases, by_revision=options.base is not None)
    moving = in_git and (options.base is None or options.head is None)
    return Arranged(
        base=base,
        head=head,
        measured_by=measured_by,
        notes=_same_code(base, head, place, in_git),
        refused=refused,
        check=_watch(place) if moving else lambda: None,
    )


def _side(
    name: str,
    revision: str | None,
    build: Callable[..., Side],
    checkouts: Checkouts,
    place: Path,
    in_git: bool,
    *,
    python: str | None = None,
    fault: str | None = None,
) -> Side:
    """Return a revision in a worktree of its own; without a revision, the tree as it is with its uncommitted changes."""
    commit, tree, label = None, None, "this folder"
    if revision is not None:
        commit = resolved(place, revision)
        tree = checkouts.check_out(name, commit)
        label = commit[:9] if commit.startswith(revision) else f"{revision} ({commit[:9]})"
    elif in_git:
        changed = len(uncommitted(place))
        state = f"{counted(changed, 'file')} changed" if changed else "clean"
        label = f"the working tree ({(head(place) or 'no commit')[:9]}, {state})"
    label += f" under {python}" if python is not None else ""
    label += f" with the fault {fault}" if fault is not None else ""
    return build(name, label=label, tree=tree, commit=commit, python=python, fault=fault)


def _same_code(base: Side, other: Side, place: Path, in_git: bool) -> tuple[str, ...]:
    if base.python != other.python or other.fault is not None:
        return ()
    if base.commit is not None and other.commit is None and in_git and not uncommitted(place):
        same = head(place) == base.commit
    else:
        same = base.commit == other.commit
    return ("base and head are the same code: this is an A/A, and whatever differs is noise.",) if same else ()


def _watch(place: Path) -> Callable[[], None]:
    before = content(place)

    def check() -> None:
        if content(place) != before:
            raise SpecError(
                f"The working tree {place} changed while it was measured, so its numbers belong to no single tree. "
                "Run again without editing it, or commit and name the revision as HEAD."
            )

    return check
