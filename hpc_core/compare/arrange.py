"""From what a user names to two sides that can be measured: revisions or interpreters, checked before anything runs."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from pathlib import Path

import msgspec

from hpc_core.case.case import Case
from hpc_core.case.errors import SpecError
from hpc_core.compare.checkouts import Checkouts
from hpc_core.compare.probe import Told, check_origin, check_protocol, probe
from hpc_core.compare.revisions import fingerprint, repository, resolve, uncommitted
from hpc_core.compare.side import Side, side_of
from hpc_core.compare.trial import SideName
from hpc_core.record.job import Measure, Retime

__all__ = ["Arranged", "Asked", "arrange", "ask", "in_place", "of_revision", "place_of"]

OWN = "measuring"


class Asked(msgspec.Struct, frozen=True, kw_only=True):
    """What the user named."""

    base: str | None = None
    """A revision; None: this tree as it is."""
    head: str | None = None
    base_python: str | None = None
    head_python: str | None = None
    head_fault: str | None = None
    paths: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """One thing differs, or nothing does.

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
    """The top of the working tree around a folder, and whether it is a repository's.

    Raises:
        SpecError: revisions are needed, and there is no repository.
    """
    try:
        return repository(here), True
    except SpecError:
        if needs_git:
            raise
        return here, False


def arrange(
    asked: Asked, cases: Sequence[Case], checkouts: Checkouts, place: Path, here: Path, in_git: bool
) -> Arranged:
    """Check out, ask and check both sides.

    Raises:
        SpecError: an unknown revision, a side that cannot be asked, sides that would run the same code, another protocol.
        LaunchError: no such interpreter.
    """
    build = functools.partial(side_of, place=place, here=here, paths=asked.paths, own=checkouts.folder / OWN)
    notes: list[str] = []
    if asked.base is None:
        base = in_place("base", build, in_git, python=asked.base_python)
    else:
        base = of_revision("base", asked.base, build, checkouts, place)
    if asked.head is None:
        head = in_place("head", build, in_git, python=asked.head_python, fault=asked.head_fault)
    else:
        head = of_revision("head", asked.head, build, checkouts, place, fault=asked.head_fault)
    notes += _same_code(base, head, place, in_git)
    measured_by, refused = ask(base, head, cases, by_revision=asked.base is not None)
    moving = in_git and (asked.base is None or asked.head is None)
    return Arranged(
        base=base,
        head=head,
        measured_by=measured_by,
        notes=tuple(notes),
        refused=refused,
        check=_watch(place) if moving else lambda: None,
    )


def in_place(
    name: str, build: Callable[..., Side], in_git: bool, *, python: str | None = None, fault: str | None = None
) -> Side:
    """The tree as it is, uncommitted changes included."""
    side = build(name, label="this folder", python=python, fault=fault)
    if in_git:
        changed = len(uncommitted(side.root))
        state = f"{changed} files changed" if changed != 1 else "1 file changed"
        head = resolve(side.root, "HEAD").short
        side = msgspec.structs.replace(side, label=f"the working tree ({head}{f', {state}' if changed else ', clean'})")
    said = f" under {side.python}" if python is not None else ""
    said += f" with the fault {fault}" if fault is not None else ""
    return msgspec.structs.replace(side, label=side.label + said)


def of_revision(
    name: str, said: str, build: Callable[..., Side], checkouts: Checkouts, place: Path, *, fault: str | None = None
) -> Side:
    """A revision in a worktree of its own.

    Raises:
        SpecError: there is no such revision.
    """
    revision = resolve(place, said)
    label = f"{said} ({revision.short})" if not revision.commit.startswith(said) else revision.short
    label += f" with the fault {fault}" if fault is not None else ""
    tree = checkouts.check_out(name, revision.commit)
    return build(name, label=label, tree=tree, revision=revision, fault=fault)


def _same_code(base: Side, head: Side, place: Path, in_git: bool) -> list[str]:
    if base.python != head.python or head.fault is not None:
        return []
    if base.commit is not None and head.commit is None and in_git and not uncommitted(place):
        same = resolve(place, "HEAD").commit == base.commit
    else:
        same = base.commit == head.commit
    return ["base and head are the same code: this is an A/A, and whatever differs is noise."] if same else []


def ask(
    base: Side, head: Side, cases: Sequence[Case], *, by_revision: bool
) -> tuple[str, dict[str, dict[SideName, str]]]:
    """Whose code measures, in a sentence; and by case, why a side cannot run it.

    Raises:
        SpecError: as `probe`, `check_protocol` and `check_origin` do.
    """
    sides: dict[SideName, Side] = {"base": base, "head": head}
    told = {name: probe(side, cases) for name, side in sides.items()}
    refused: dict[str, dict[SideName, str]] = {}
    for name, side in sides.items():
        check_protocol(side, told[name], uses=(Measure.__name__, Retime.__name__, *(("fault",) if side.fault else ())))
        if by_revision:
            check_origin(side, told[name], cases)
        for case, digest in zip(cases, told[name].digests, strict=True):
            if digest != case.digest:
                refused.setdefault(case.id, {})[name] = _why(digest)
    return _measured_by(sides, told), refused


def _why(digest: str) -> str:
    if digest.startswith("! "):
        return f"does not know this case: {digest[2:]}"
    return f"means another case by it (digest {digest})."


def _measured_by(sides: dict[SideName, Side], told: dict[SideName, Told]) -> str:
    own = [Path(told[name].measuring).resolve().is_relative_to(side.root.resolve()) for name, side in sides.items()]
    if all(own) and sides["base"].root != sides["head"].root:
        return "Measured by each side's own hpc-core: it is the code under test, and both speak one protocol."
    same = Path(told["base"].measuring).resolve() == Path(told["head"].measuring).resolve()
    if not same:
        raise SpecError(
            f"base would be measured by {told['base'].measuring}, head by {told['head'].measuring}: a difference could come from either. "
            "Only in hpc-core's own repository may each side bring its own."
        )
    return "Measured by one hpc-core on both sides."


def _watch(place: Path) -> Callable[[], None]:
    before = fingerprint(place)

    def check() -> None:
        if fingerprint(place) != before:
            raise SpecError(
                f"The working tree {place} changed while it was measured, so its numbers are of no one tree. "
                "Let it rest and run again, or commit and name the revision as HEAD."
            )

    return check
