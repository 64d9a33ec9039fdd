"""The two sides of a comparison: whose code, under which interpreter, in which folder. Starts no worker.

The measuring code is that of the running installation on both sides; only the code under test differs. In a repository that
holds hpc_core itself, the code under test is hpc_core, and each side measures with its own.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path

import msgspec

import hpc_core
from hpc_core.case.errors import SpecError
from hpc_core.compare.revisions import Revision
from hpc_core.launch.interpreter import executable

__all__ = ["Side", "side_of"]

_DATA = "HPC_CORE_DATA"
_COMMIT = "HPC_CORE_COMMIT"


class Side(msgspec.Struct, frozen=True, kw_only=True):
    """One side: everything that its workers need to run this side's code."""

    name: str
    """Which one: "base" or "head"."""
    label: str
    """What it is, for the reader: "main~1 (3eb4cd44b)", "the working tree (3eb4cd44b, 2 files changed)"."""
    python: str
    root: Path
    """Top of the tree with the code under test."""
    folder: Path
    """Where workers run: the root, or what corresponds to the folder of the command below it."""
    environment: dict[str, str]
    commit: str | None
    fault: str | None = None


def side_of(
    name: str,
    *,
    label: str,
    place: Path,
    here: Path,
    tree: Path | None = None,
    revision: Revision | None = None,
    python: str | None = None,
    paths: Sequence[str] = (),
    own: Path,
    fault: str | None = None,
) -> Side:
    """A side whose code lies in `tree`, a worktree of the repository at `place`; without one in `place` itself.

    Args:
        name: "base" or "head".
        label: what the reader is told.
        place: top of the user's working tree.
        here: the folder that the command was given in, below `place`.
        tree: the worktree.
        revision: what is checked out there.
        python: another interpreter than this one.
        paths: folders below the root to import from, beside the root and `src`.
        own: an empty folder's path, for the measuring code where another interpreter needs it.
        fault: injected on this side.

    Raises:
        SpecError: the revision has no such folder.
        LaunchError: there is no such interpreter.
    """
    root = tree or place
    folder = root / here.relative_to(place)
    if not folder.is_dir():
        raise SpecError(
            f"{label} has no folder {here.relative_to(place)}, in which the command was given: start at the top."
        )
    first = [root / part for part in (*paths, "src") if part != "src" or (root / "src").is_dir()]
    for part in paths:
        if not (root / part).is_dir():
            raise SpecError(f"--path {part}: {label} has no such folder.")
    chosen = executable(python)
    chosen = chosen if os.path.isabs(chosen) else os.path.abspath(chosen)  # noqa: PTH100, PTH117 - links to a venv's Python must stay
    measuring = [] if chosen == sys.executable else [_only_hpc_core(own)]
    # Measuring code stands first, unless the tree itself is hpc_core: then the tree is.
    holds_us = (root / "hpc_core" / "__init__.py").is_file()
    order = [root, *first, *measuring] if holds_us else [*measuring, root, *first]
    known = [_moved(part, place, root) for part in os.environ.get("PYTHONPATH", "").split(os.pathsep) if part]
    environment = {"PYTHONPATH": os.pathsep.join([*map(os.fspath, order), *known])}
    if data := os.environ.get(_DATA):
        environment[_DATA] = os.path.abspath(data)  # noqa: PTH100 - as the user's folder has it
    if revision is not None:
        environment[_COMMIT] = (
            ""  # What the user's own copy was told to be is no word on a worktree, which has its own commit.
        )
    return Side(
        name=name,
        label=label,
        python=chosen,
        root=root,
        folder=folder,
        environment=environment,
        commit=None if revision is None else revision.commit,
        fault=fault,
    )


def _moved(part: str, place: Path, root: Path) -> str:
    """An entry of PYTHONPATH; one inside the user's tree becomes the same one in the side's tree."""
    try:
        return os.fspath(root / Path(part).resolve().relative_to(place))
    except ValueError:
        return part


def _only_hpc_core(folder: Path) -> Path:
    """A folder that holds a link to the running hpc_core and nothing else: no neighbour of it reaches another interpreter."""
    link = folder / "hpc_core"
    if not link.is_symlink():
        folder.mkdir(parents=True, exist_ok=True)
        link.symlink_to(Path(hpc_core.__file__).resolve().parent)
    return folder
