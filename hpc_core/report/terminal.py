"""The table and the paragraphs that end a run, as text for a terminal of any width.

Columns that do not fit are left out, the least needed first; so are columns without a value.
"""

from __future__ import annotations

import io
import textwrap
from collections.abc import Iterable, Sequence
from typing import Literal, NamedTuple

from rich.cells import cell_len
from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from hpc_core.gate.verdict import Verdict, expected_line
from hpc_core.record.record import Record
from hpc_core.report.entry import NOTHING, Row, judged_line
from hpc_core.report.lines import accept_new, accepted_line, keep_gains, settings_lines, time_notes

_STYLES = {
    "PASS": "green",
    "OK": "green",
    "IMPROVED": "bold green",
    "NEW": "green",
    "UPDATED": "green",
    "UNCHANGED": "green",
    "REGRESSED": "bold red",
    "INVALID": "bold red",
    "BROKEN": "bold red",
    "REFUSED": "bold red",
}
_UNDECIDED = "yellow"
_WHY = "Why"
_GAP = 2
_PERPLEXITY = "ppl (unquantized)"
_COLUMNS = ("case", "verdict", "wall", "busy", "peak memory", "tokens/s", "share", _PERPLEXITY, "against baseline")
_LEAST_NEEDED = ("share", "tokens/s", _PERPLEXITY, "busy")
"""Left out in this order where the terminal is too narrow."""
_NEEDED = ("wall", "peak memory")
"""Left out last, in this order: where not even a cut name would leave them room."""
_LEFT = ("case", "verdict", "share", _PERPLEXITY, "against baseline")
_NARROWEST_CHANGE = 18
_SHORTEST_NAME = 14


def _cells(row: Row) -> dict[str, str]:
    texts = (
        row.case,
        row.verdict,
        row.wall,
        row.busy,
        row.peak,
        row.tokens_per_s,
        row.share,
        row.perplexity,
        row.change,
    )
    return dict(zip(_COLUMNS, texts, strict=True))


def _chosen(lines: Sequence[dict[str, str]], width: int) -> list[str]:
    """Return the columns that hold a value and fit; the last one may be cut."""
    chosen = [name for name in _COLUMNS if any(line[name] not in (NOTHING, "") for line in lines)]
    for name in _LEAST_NEEDED:
        if _natural(lines, chosen) <= width:
            break
        if name in chosen:
            chosen.remove(name)
    longest = max(cell_len(line["case"]) for line in lines)
    for name in _NEEDED:
        if name in chosen and _room(lines, chosen, width) < min(longest, _SHORTEST_NAME):
            chosen.remove(name)
    return chosen


def _room(lines: Sequence[dict[str, str]], chosen: Sequence[str], width: int) -> int:
    """Return the width that all other columns leave to the names."""
    return width - _natural(lines, chosen) + max(cell_len(line["case"]) for line in lines)


def _natural(lines: Sequence[dict[str, str]], chosen: Sequence[str]) -> int:
    widths = {name: max(cell_len(text) for text in (name, *(line[name] for line in lines))) for name in chosen}
    if "against baseline" in widths:
        widths["against baseline"] = min(widths["against baseline"], _NARROWEST_CHANGE)
    return 1 + sum(widths.values()) + _GAP * (len(chosen) - 1)


def table(rows: Sequence[Row], width: int) -> Table:
    """Return the table of these rows, in their order.

    Where whole ids would cost a column, the shape stands once, above its variants.
    """
    lines = [_cells(row) for row in rows]
    grouped = _under_shapes(lines)
    too_wide = _natural(lines, _chosen(lines, width)) > width
    if too_wide or len(_chosen(grouped, width)) > len(_chosen(lines, width)):
        lines = grouped
    chosen = _chosen(lines, width)
    # Of what is still too wide, the names are cut: a verdict or a number that is cut says nothing.
    room = _room(lines, chosen, width)
    drawn = Table(box=None, padding=(0, _GAP, 0, 0), pad_edge=False, header_style="bold", expand=False)
    for name in chosen:
        side: Literal["left", "right"] = "left" if name in _LEFT else "right"
        ratio = 1 if name == "against baseline" else None
        # rich would shorten every column to make room for the last one, so the last one is limited here.
        rest = _NARROWEST_CHANGE + max(0, width - _natural(lines, chosen) - 1)
        most = {"case": max(room, _SHORTEST_NAME), "against baseline": rest}.get(name)
        drawn.add_column(name, justify=side, no_wrap=True, overflow="ellipsis", ratio=ratio, max_width=most)
    for line in lines:
        style = _STYLES.get(line["verdict"], _UNDECIDED)
        drawn.add_row(*(Text(line[name], style=style if name == "verdict" else "") for name in chosen))
    return drawn


def _under_shapes(lines: Sequence[dict[str, str]]) -> list[dict[str, str]]:
    grouped: list[dict[str, str]] = []
    above = ""
    for line in lines:
        shape, _, variant = line["case"].partition("/")
        if shape != above:
            above = shape
            grouped.append(dict.fromkeys(_COLUMNS, "") | {"case": f"{shape}/"})
        grouped.append(line | {"case": f"  {variant}"})
    return grouped


def caption(record: Record) -> str:
    """Return where the numbers come from: machine, stack, commit."""
    around = record.circumstances
    stack = ", ".join(f"{name} {version}" for name, version in sorted(around.stack.items()))
    commit = (
        ""
        if around.commit is None
        else f" · commit {around.commit[:10]}{' with uncommitted changes' if around.dirty else ''}"
    )
    settings = "".join(f" · {name}={value}" for name, value in sorted((around.settings or {}).items()))
    return f"{around.machine.name} [{around.machine.key}] · {stack or 'stack unknown'} · Python {around.python}{settings}{commit}"


class _Problem(NamedTuple):
    """Why a row needs attention: what happened, further sentences, and what to do."""

    headline: str
    reasons: tuple[str, ...] = ()
    step: tuple[str, ...] = ()

    def causes_of(self, case: str) -> tuple[str, ...]:
        """Return the lines of the cause, each with the case that it was found in."""
        return tuple(f"{_WHY}, in {case}{line.removeprefix(_WHY)}" for line in self.reasons if line.startswith(_WHY))


def _problem(row: Row) -> _Problem | None:
    failure, judgement = row.record.failure, row.judgement
    if failure is not None:
        step = () if row.command is None else (row.command.run,)
        return _Problem(f"{failure.kind} in {failure.phase}: {failure.message}", step=step)
    if row.refused is not None:
        return _Problem(row.refused.removeprefix(f"{row.case}: "))
    if judgement is None:
        return _Problem(" ".join(row.record.reasons)) if row.record.reasons else None
    if judgement.verdict is Verdict.PASS:
        return _Problem(row.expired[0], row.expired[1:]) if row.expired else None
    excuses = (f"{excuse.metric}: {excuse.text}" for excuse in judgement.excuses)
    settled = judgement.verdict is Verdict.IMPROVED or _is_excused(row)
    steps = () if settled else (row.search, row.commands.in_step(judgement.next_step))
    return _Problem(
        judgement.headline,
        (
            *((judgement.reason,) if judgement.reason != judgement.headline else ()),
            *(f"{_WHY}: {line}" for line in (() if row.cause is None else row.cause.lines)),
            *excuses,
            *judgement.remarks,
            *row.expired,
        ),
        # What improved is accepted by one command for all of it, at the end.
        tuple(filter(None, steps)),
    )


def _is_excused(row: Row) -> bool:
    """Return whether the case is worse than accepted and a waiver or limit excuses it."""
    judgement = row.judgement
    return judgement is not None and bool(judgement.excuses) and judgement.outcome() != "failed"


def _problems(rows: Iterable[Row], width: int) -> list[RenderableType]:
    """Return one paragraph for each problem. Cases whose problems differ only in their names share one."""
    shared: dict[tuple[str, str, str], list[tuple[str, _Problem]]] = {}
    for row in rows:
        found = _problem(row)
        if found is not None:
            word = "REGRESSED, excused" if _is_excused(row) else row.verdict
            # Each case states who is responsible for its waiver, and until when.
            own = (
                row.case if row.expired or (row.judgement and (row.judgement.excuses or row.judgement.remarks)) else ""
            )
            shared.setdefault((word, found.headline.replace(row.case, "…"), own), []).append((row.case, found))
    drawn: list[RenderableType] = []
    for (verdict, headline, _), alike in shared.items():
        case, problem = alike[0]
        several = len(alike) > 1
        who, text = (f"{len(alike)} cases", headline) if several else (case, problem.headline)
        drawn.append(Text.assemble((verdict, _STYLES.get(verdict, _UNDECIDED)), f" {who}: {text}"))
        # Of cases that moved alike, one stands for the cause of all; what else differs between them is in the records.
        for line in problem.causes_of(case) if several else problem.reasons:
            drawn.append(_hanging(line, width))
        for line in problem.step:
            drawn.append(_unbroken(f"    {_for_any_case(line, case) if several else line}"))
    return drawn


def _for_any_case(line: str, case: str) -> str:
    """Return the command for all cases of the same shape."""
    shape = case.partition("/")[0]
    return line.replace(f"'{case}'", case).replace(case, f"'{shape}/*'")


def _hanging(line: str, width: int) -> Text:
    """Return an indented sentence whose further lines are indented more, so that the beginning of each sentence is visible."""
    wrapped = textwrap.wrap(line, width, initial_indent=" " * 4, subsequent_indent=" " * 6, break_on_hyphens=False)
    return _unbroken("\n".join(wrapped))


def _unbroken(line: str) -> Text:
    """Return a line that is not wrapped here, so that it can be copied."""
    return Text(line, no_wrap=True, overflow="ignore")


def summary(rows: Sequence[Row], width: int) -> Group:
    """Return the table, problems, what was written, and where the numbers come from."""
    header = judged_line(rows)
    parts: list[RenderableType] = [*([] if header is None else [Text(header, style="dim")]), table(rows, width)]
    problems = _problems(rows, width)
    written = [_unbroken(accepted_line(row.acceptance)) for row in rows if row.acceptance is not None]
    notes = dict.fromkeys([*time_notes(rows), *(note for row in rows for note in row.record.circumstances.notes)])
    gains = [_unbroken(line) for line in keep_gains(rows)]
    new = [_unbroken(line) for line in accept_new(rows)]
    settings = [_unbroken(line) for line in settings_lines(row.judgement for row in rows)]
    for block in (problems, gains, new, settings, written, [Text(f"note: {note}", style="dim") for note in notes]):
        if block:
            parts += [Text(), *block]
    captions = dict.fromkeys(caption(row.record) for row in rows)
    alarms = expected_line(each for row in rows if row.judgement is not None for each in row.judgement.metrics)
    parts += [Text(), *(Text(line, style="dim") for line in [*([] if alarms is None else [alarms]), *captions])]
    return Group(*parts)


def render(rows: Sequence[Row], *, width: int, color: bool) -> str:
    """Return the summary as text, with escape sequences only if `color`."""
    stream = io.StringIO()
    console = Console(
        file=stream,
        width=width,
        force_terminal=color,
        color_system="standard" if color else None,
        highlight=False,
        markup=False,
        legacy_windows=False,
    )
    console.print(summary(rows, width), crop=False)
    return "\n".join(line.rstrip() for line in stream.getvalue().splitlines())
