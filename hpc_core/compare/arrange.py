"""From what a user names to two sides that can be measured: revisions or interpreters, checked before anything runs."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from pathlib import Path

import msgspec

from hpc_core.case.case import Case
from hpc_core.case.errors import RepositoryError, SpecError
from hpc_core.compare.checkouts import Checkouts
from hpc_core.compare.describe import check_origin, check_protocol, described
from hpc_core.compare.environments import Side, side_of
from hpc_core.compare.trial import SideName
from hpc_core.record.git import content, head, resolved, top, uncommitted
from hpc_core.worker.describe import Description, KnownCase

KINDS = ("measure", "retime")
"""The kinds of job that a comparison uses."""


class SideOptions(msgspec.Struct, frozen=True, kw_only=True):
    """What the user named."""

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
    """One sentence: whose measuring code runs."""
    notes: tuple[str, ...]
    refused: dict[str, dict[SideName, str]]
    """By case: why a side cannot run it."""
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
    """Check out both sides, ask what they would run, and check that they can be compared.

    Raises:
        SpecError: a side that does not answer, sides that would run the same code, another protocol.
        RepositoryError: an unknown revision.
        LaunchError: no such interpreter.
    """
    build = functools.partial(side_of, place=place, here=here, paths=options.paths, scratch=checkouts.folder)
    base = _side("base", options.base, build, checkouts, place, in_git, python=options.base_python)
    head = _side(
        "head", options.head, build, checkouts, place, in_git, python=options.head_python, fault=options.head_fault
    )
    measured_by, refused = ask(base, head, cases, by_revision=options.base is not None)
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
    """Return a revision in a worktree of its own; without one the tree as it is, uncommitted changes included."""
    commit, tree, label = None, None, "this folder"
    if revision is not None:
        commit = resolved(place, revision)
        tree = checkouts.check_out(name, commit)
        label = commit[:9] if commit.startswith(revision) else f"{revision} ({commit[:9]})"
    elif in_git:
        changed = len(uncommitted(place))
        state = "clean" if not changed else "1 file changed" if changed == 1 else f"{changed} files changed"
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


def ask(
    base: Side, head: Side, cases: Sequence[Case], *, by_revision: bool
) -> tuple[str, dict[str, dict[SideName, str]]]:
    """Return whose code measures, in a sentence; and by case, why a side cannot run it.

    Raises:
        SpecError: as `described`, `check_protocol` and `check_origin`.
    """
    sides: dict[SideName, Side] = {"base": base, "head": head}
    found = {name: described(side, cases) for name, side in sides.items()}
    refused: dict[str, dict[SideName, str]] = {}
    for name, side in sides.items():
        check_protocol(side, found[name], kinds=KINDS, fields=("fault",) if side.fault else ())
        if by_revision:
            check_origin(side, found[name], cases)
        for case, known in zip(cases, found[name].cases, strict=True):
            if known.digest != case.digest:
                refused.setdefault(case.id, {})[name] = _why(known)
    return _measured_by(sides, found), refused


def _why(known: KnownCase) -> str:
    if known.error:
        return f"does not know this case: {known.error}"
    return f"means another case by it (digest {known.digest})."


def _measured_by(sides: dict[SideName, Side], found: dict[SideName, Description]) -> str:
    own = [Path(found[name].home).is_relative_to(side.root.resolve()) for name, side in sides.items()]
    if all(own) and sides["base"].root != sides["head"].root:
        return "Measured by each side's own hpc-core: it is the code under test, and both have one protocol."
    if found["base"].home != found["head"].home:
        raise SpecError(
            f"base would be measured by {found['base'].home}, head by {found['head'].home}: a difference could come from either. "
            "Only in hpc-core's own repository may each side bring its own."
        )
    return "Measured by one hpc-core on both sides."


def _watch(place: Path) -> Callable[[], None]:
    before = content(place)

    def check() -> None:
        if content(place) != before:
            raise SpecError(
                f"The working tree {place} changed while it was measured, so its numbers belong to no single tree. "
                "Run again without editing it, or commit and name the revision as HEAD."
            )

    return check
