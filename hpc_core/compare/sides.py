"""One side of a comparison: whose code, under which interpreter, in which folder.

The measuring code is that of the running installation on both sides; only the code under test differs. In a repository that
holds hpc_core itself, the code under test is hpc_core, and each side measures with its own.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path

import msgspec

from hpc_core.case.errors import SpecError
from hpc_core.launch.interpreter import executable
from hpc_core.record.version import PACKAGE_FOLDER

_DATA = "HPC_CORE_DATA"
_COMMIT = "HPC_CORE_COMMIT"


class Side(msgspec.Struct, frozen=True, kw_only=True):
    """Everything that the workers of one side need to run its code."""

    name: str
    """ "base" or "head"."""
    label: str
    """Shown to the reader: "main~1 (3eb4cd44b)", "the working tree (3eb4cd44b, 2 files changed)"."""
    python: str
    root: Path
    """The top of the tree with the code under test."""
    folder: Path
    """The folder in which workers run: the root, or the same folder below it in which the command was given."""
    environment: dict[str, str]
    commit: str | None
    fault: str | None = None


def side_of(
    name: str,
    *,
    label: str,
    place: Path,
    here: Path,
    scratch: Path,
    tree: Path | None = None,
    commit: str | None = None,
    python: str | None = None,
    paths: Sequence[str] = (),
    fault: str | None = None,
) -> Side:
    """Return a side whose code lies in `tree`, a worktree of the repository at `place`; without one in `place` itself.

    Args:
        name: "base" or "head".
        label: shown to the reader.
        place: top of the user's working tree.
        here: the folder that the command was given in, below `place`.
        scratch: a temporary folder, for a link to the measuring code where another interpreter needs it.
        tree: the worktree.
        commit: what is checked out there.
        python: another interpreter than this one.
        paths: folders below the root to import from, besides the root and `src`.
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
    for part in paths:
        if not (root / part).is_dir():
            raise SpecError(f"--path {part}: {label} has no such folder.")
    first = [root / part for part in (*paths, "src") if part != "src" or (root / "src").is_dir()]
    chosen = executable(python)
    chosen = chosen if os.path.isabs(chosen) else os.path.abspath(chosen)  # noqa: PTH100, PTH117 - links to a venv's Python must stay
    measuring = [] if chosen == sys.executable else [_link_to_hpc_core(scratch / "measuring")]
    # Measuring code comes first, unless the tree itself is hpc_core: then the tree does.
    has_hpc_core = (root / "hpc_core" / "__init__.py").is_file()
    order = [root, *first, *measuring] if has_hpc_core else [*measuring, root, *first]
    inherited = [_in_tree(part, place, root) for part in os.environ.get("PYTHONPATH", "").split(os.pathsep) if part]
    environment = {"PYTHONPATH": os.pathsep.join([*map(os.fspath, order), *inherited])}
    if data := os.environ.get(_DATA):
        environment[_DATA] = os.path.abspath(data)  # noqa: PTH100 - as the user's folder has it
    if commit is not None:
        environment[_COMMIT] = ""  # whatever names the user's copy does not name a worktree, which has its own commit
    return Side(
        name=name,
        label=label,
        python=chosen,
        root=root,
        folder=folder,
        environment=environment,
        commit=commit,
        fault=fault,
    )


def _in_tree(part: str, place: Path, root: Path) -> str:
    """Return an entry of PYTHONPATH; a folder in the user's tree becomes the same folder of the side's tree."""
    try:
        return os.fspath(root / Path(part).resolve().relative_to(place))
    except ValueError:
        return part


def _link_to_hpc_core(folder: Path) -> Path:
    """Make a folder with a link to the running hpc_core alone, so that no neighbouring package reaches another interpreter."""
    link = folder / "hpc_core"
    if not link.is_symlink():
        folder.mkdir(parents=True, exist_ok=True)
        link.symlink_to(PACKAGE_FOLDER)
    return folder
