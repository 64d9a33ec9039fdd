"""A chart of points on two axes as coordinates for the template: marks, labels that do not overlap, ticks, lines. Knows no record."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec

from hpc_core.report.page.scales import Axis

__all__ = ["BROAD", "NARROW", "Frame", "Mark", "placed"]

_LEFT, _RIGHT, _TOP, _BOTTOM = 76, 14, 14, 50
_LETTER, _LINE = 6.1, 13
"""About the width of a letter and the height of a line, in the label's font of 11 units."""
_GAP = 8
_MOST_LABELS = 40


class Frame(msgspec.Struct, frozen=True):
    """The chart's size, and so where its two axes lie."""

    width: int
    height: int

    def across(self, axis: Axis, value: float) -> float:
        """The horizontal coordinate of a value."""
        return round(_LEFT + axis.at(value) * (self.width - _LEFT - _RIGHT), 1)

    def up(self, axis: Axis, value: float) -> float:
        """The vertical coordinate of a value."""
        return round(self.height - _BOTTOM - axis.at(value) * (self.height - _TOP - _BOTTOM), 1)


NARROW, BROAD = Frame(560, 360), Frame(1080, 500)


class Mark(msgspec.Struct, kw_only=True):
    """A point of the chart; `placed` sets where it and its label lie."""

    x_value: float
    y_value: float
    label: str
    title: str
    """What a pointer or a screen reader is told."""
    anchor: str
    kind: str
    """A class of the style sheet: its colour and shape."""
    is_strong: bool = False
    x: float = 0.0
    y: float = 0.0
    label_x: float = 0.0
    label_y: float = 0.0
    label_side: str = ""
    """start or end, as SVG's text-anchor; empty where no room is left."""


def placed(
    marks: Sequence[Mark], x: Axis, y: Axis, lines: Sequence[Sequence[tuple[float, float]]] = (), frame: Frame = NARROW
) -> dict[str, Any]:
    """Coordinates of axes, lines and marks, and of as many labels as have room, strong ones first."""
    for mark in marks:
        mark.x, mark.y = frame.across(x, mark.x_value), frame.up(y, mark.y_value)
    taken = [(mark.x - 5, mark.y - 5, mark.x + 5, mark.y + 5) for mark in marks]
    for mark in sorted(marks, key=lambda each: not each.is_strong)[:_MOST_LABELS]:
        _label(mark, taken, frame)
    return {
        "marks": list(marks),
        "lines": [" ".join(f"{frame.across(x, a)},{frame.up(y, b)}" for a, b in line) for line in lines],
        "left": _LEFT,
        "right": frame.width - _RIGHT,
        "top": _TOP,
        "bottom": frame.height - _BOTTOM,
        "width": frame.width,
        "height": frame.height,
        "x_ticks": [(frame.across(x, tick), _number(tick)) for tick in x.ticks],
        "y_ticks": [(frame.up(y, tick), _number(tick)) for tick in y.ticks],
    }


def _label(mark: Mark, taken: list[tuple[float, float, float, float]], frame: Frame) -> None:
    width = _LETTER * len(mark.label)
    for side, rise in (("start", 4), ("end", 4), ("start", -8), ("start", 16), ("end", -8), ("end", 16)):
        left = mark.x + _GAP if side == "start" else mark.x - _GAP - width
        bottom = mark.y + rise
        box = (left, bottom - _LINE + 3, left + width, bottom + 2)
        inside = box[0] > _LEFT and box[2] < frame.width - 2 and box[1] > 2 and box[3] < frame.height - _BOTTOM
        if inside and not any(_overlap(box, other) for other in taken):
            taken.append(box)
            mark.label_x, mark.label_y = round(mark.x + (_GAP if side == "start" else -_GAP), 1), round(bottom, 1)
            mark.label_side = side
            return


def _overlap(one: tuple[float, float, float, float], other: tuple[float, float, float, float]) -> bool:
    return one[0] < other[2] and other[0] < one[2] and one[1] < other[3] and other[1] < one[3]


def _number(value: float) -> str:
    if value and not 1e-3 <= abs(value) < 1e5:
        return f"{value:.0e}".replace("e+0", "e").replace("e+", "e").replace("e-0", "e-")
    return f"{value:,.4g}" if value < 1e4 else f"{value:,.0f}"
