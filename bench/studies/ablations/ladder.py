"""Read the rows of an ablation's file in the order of its steps, from stock to tuned.

The files are written by `bench/studies/ablations/train.py` and `bench/studies/ablations/decode.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import msgspec

from hpc_core.case.errors import SpecError

__all__ = ["Ladder", "Step", "ladders_of", "read_ladders"]


class Step(msgspec.Struct, frozen=True, kw_only=True):
    """One row: what was added, and what was measured. None if there is no number."""

    label: str
    wall_ms: float | None = None
    busy_ms: float | None = None
    peak_gib: float | None = None
    tokens_per_s: float | None = None
    error: str = ""
    """The last line of its error; "not run" if the file has no such row."""


class Ladder(msgspec.Struct, frozen=True, kw_only=True):
    """The steps of one piece of work, the stock one first."""

    title: str
    per: str
    """The unit of work that the milliseconds are for: "step" or "token"."""
    steps: tuple[Step, ...]


_Drawable = Annotated[float, msgspec.Meta(ge=0, le=1e9)]
"""A number that an axis can show."""


class _Row(msgspec.Struct, frozen=True):
    wall_ms: _Drawable | None = None
    busy_ms: _Drawable | None = None
    peak_gib: _Drawable | None = None
    tokens_per_s: _Drawable | None = None
    error: str = ""


class _Told(msgspec.Struct, frozen=True):
    title: str
    per: str
    rows: dict[str, str]


class _File(msgspec.Struct, frozen=True):
    source: str
    rows: dict[str, _Row]
    steps: dict[str, _Told] = {}


def read_ladders(path: Path, only: Sequence[str] = ()) -> tuple[str, tuple[Ladder, ...]]:
    """Return the source of the file's numbers, and its ladders, or only those of these groups.

    Raises:
        SpecError: the file does not exist, is not an ablation's, or has none of these groups.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise SpecError(f"{path}: cannot be read ({error}).") from error
    return ladders_of(content, str(path), only)


def ladders_of(content: bytes, where: str, only: Sequence[str] = ()) -> tuple[str, tuple[Ladder, ...]]:
    """Do as `read_ladders`, with the content of the file `where`.

    Raises:
        SpecError: as `read_ladders`.
    """
    try:
        found = msgspec.json.decode(content, type=_File)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise SpecError(f"{where}: not the file of an ablation ({error}).") from error
    unknown = [name for name in only if name not in found.steps]
    if unknown or not found.steps:
        there = ", ".join(found.steps) or "none"
        raise SpecError(
            f"{where}: no steps from stock to tuned of {', '.join(unknown) or 'anything'}; those there: {there}. "
            "bench/studies/ablations/train.py --steps and bench/studies/ablations/decode.py --steps write them."
        )
    chosen = {name: told for name, told in found.steps.items() if not only or name in only}
    ladders = (
        Ladder(
            title=told.title,
            per=told.per,
            steps=tuple(_step(label, found.rows.get(name)) for name, label in told.rows.items()),
        )
        for told in chosen.values()
    )
    return found.source, tuple(ladders)


def _step(label: str, row: _Row | None) -> Step:
    if row is None:
        return Step(label=label, error="not run")
    return Step(
        label=label,
        wall_ms=row.wall_ms,
        busy_ms=row.busy_ms,
        peak_gib=row.peak_gib,
        tokens_per_s=row.tokens_per_s,
        error=(row.error.strip().splitlines() or [""])[-1],
    )
