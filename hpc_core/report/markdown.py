"""A report for a pull request in GitHub's Markdown: one line if nothing moved; else what moved and why, with the rest folded."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence

from hpc_core.gate.verdict import MetricVerdict, Verdict
from hpc_core.record import units
from hpc_core.record.plain import plain
from hpc_core.report.entry import Entry, judged_line
from hpc_core.report.lines import settings_lines, time_notes
from hpc_core.report.terminal import caption

LOOSENED = "Loosened since the merge base"
LARGEST_BYTES = 900_000
"""GitHub drops a step's summary above 1 MiB; a comment takes 65,536 characters."""
_MARKS = {
    "REGRESSED": "🔴",
    "INVALID": "🔴",
    "BROKEN": "🔴",
    "IMPROVED": "🟢",
    "PASS": "✅",
}
_UNDECIDED = "⚪"
_BLOCKS = ("|", "- ", "<")
"""How lines begin that need no line break at their end."""
_LONGEST = 300
_LONGEST_CAUSE = 1500
"""Of a line of the cause, which names categories, modules and operators: cut, it says nothing."""
_MOST_CAUSES = 30
_SHOWN_METRICS = 12
_SPECIAL = re.compile(r"([\\`*_{}\[\]()#+!|~<>$&])")
_ENTITIES = {"<": "&lt;", ">": "&gt;", "&": "&amp;"}


def safe(text: str, longest: int = _LONGEST) -> str:
    """Return the text without markup, mention or link, as one line of at most so many characters."""
    line = " ".join(plain(text, longest).split())
    escaped = _SPECIAL.sub(lambda found: _ENTITIES.get(found[0]) or f"\\{found[0]}", line)
    # As entities they read the same, but GitHub notifies nobody and links nothing.
    return escaped.replace("@", "&#64;").replace("://", ":&#47;/").replace("www.", "www&#46;")


def markdown(entries: Sequence[Entry], notes: Sequence[str] = (), loosened: Sequence[str] = ()) -> str:
    """Return the whole report. If no case needs attention, it is one sentence and a fold.

    `loosened` are lines on what the pull request loosens; they come before every case.
    """
    moved = sorted((each for each in entries if each.needs_attention), key=_gravest_first)
    more = f", {_UNDECIDED} {len(loosened)} loosened" if loosened else ""
    lines = [f"### hpc-core: {_headline(entries, moved)}{more}", ""]
    if loosened:
        lines += [f"**{LOOSENED}:**", "", *(f"- {safe(line, _LONGEST_CAUSE)}" for line in loosened), ""]
    if moved:
        lines += [*_table(moved), ""]
        for entry in moved:
            lines += _details(entry)
    still = [entry for entry in entries if not entry.needs_attention]
    if still:
        lines += _fold(
            f"{units.counted(len(still), 'case')} {'unmoved' if moved or _judged(entries) else 'measured'}",
            _table(still),
        )
    lines += [f"<sub>{line}</sub>  " for line in dict.fromkeys(safe(caption(each.record)) for each in entries)]
    notes = (*time_notes(each.row for each in entries), *settings_lines(each.judgement for each in entries), *notes)
    lines += [f"<sub>note: {safe(note)}</sub>  " for note in notes]
    text = "\n".join(lines) + "\n"
    if len(text.encode()) <= LARGEST_BYTES:
        return text
    cut = text.encode()[:LARGEST_BYTES].decode(errors="ignore").rpartition("\n")[0]
    still_open = "\n\n</details>" * (cut.count("<details") - cut.count("</details>"))
    return f"{cut}{still_open}\n\n**Cut here: the whole report is longer than a summary may be. See the CSV or the page.**\n"


def _judged(entries: Sequence[Entry]) -> bool:
    return any(each.judgement is not None for each in entries)


def _gravest_first(entry: Entry) -> tuple[int, str, str]:
    severity = 7 if entry.judgement is None else entry.judgement.verdict.severity
    return -severity, entry.machine, entry.case


def _headline(entries: Sequence[Entry], moved: Sequence[Entry]) -> str:
    if not moved:
        result = "nothing changed ✅" if _judged(entries) else f"nothing judged {_UNDECIDED}"
        return f"{units.counted(len(entries), 'case')}, {result}"
    counts = Counter(entry.row.verdict for entry in moved)
    counted = ", ".join(f"{_MARKS.get(word, _UNDECIDED)} {many} {word}" for word, many in counts.items())
    return f"{counted} of {units.counted(len(entries), 'case')}"


def _table(entries: Sequence[Entry]) -> list[str]:
    several = len({entry.machine for entry in entries}) > 1
    names = [
        "case",
        *(["machine"] if several else []),
        "verdict",
        "peak memory",
        "GPU-busy",
        "wall",
        "against baseline",
    ]
    rows = [entry.row for entry in entries]
    header = judged_line(rows)
    lines = [] if header is None else [safe(header), ""]
    lines += [f"| {' | '.join(names)} |", f"|{'---|' * len(names)}"]
    for entry, row in zip(entries, rows, strict=True):
        mark = f"{_MARKS.get(row.verdict, _UNDECIDED)} {row.verdict}"
        names = [row.case, *([entry.machine] if several else [])]
        numbers = (row.peak, row.busy, row.wall, row.change)
        lines.append(f"| {' | '.join([*map(safe, names), mark, *map(safe, numbers)])} |")
    return lines


def _details(entry: Entry) -> list[str]:
    """Return the details of a case that moved, as a fold."""
    row, judgement, failure = entry.row, entry.judgement, entry.record.failure
    if failure is not None:
        text = [f"{failure.kind} in {safe(failure.phase)}: {safe(failure.message)}"]
    elif judgement is None or entry.record.status != "ok":
        text = [safe(reason) for reason in entry.record.reasons]
    else:
        text = [safe(judgement.reason), *(f"moved: {safe(package)}" for package in judgement.moved)]
        text += [f"at the peak: {safe(line)}" for line in entry.grown]
        text += _metrics(judgement.metrics)
        next_step = row.commands.in_step(judgement.next_step)
        text += ["", f"Next: {safe(next_step)}"] if next_step else []
    text = [*_why(entry), *text, *_more_of_the_cause(entry)]
    headline = judgement.headline if judgement is not None else row.verdict
    is_worse = judgement is None or judgement.outcome() == "failed"
    title = f"{_MARKS.get(row.verdict, _UNDECIDED)} {safe(row.case)}: {safe(headline)}"
    return _fold(
        title, [line if line.startswith(_BLOCKS) or not line else f"{line}  " for line in text], is_open=is_worse
    )


def _why(entry: Entry) -> list[str]:
    """Return the two lines of the cause: what moved most and where, then what else moved and what differs around it."""
    lines = () if entry.cause is None else entry.cause.lines
    return [f"**Why:** {safe(line, _LONGEST_CAUSE)}" for line in lines] + ([""] if lines else [])


def _more_of_the_cause(entry: Entry) -> list[str]:
    details = () if entry.cause is None else entry.cause.details
    if not details:
        return []
    lines = [f"- {safe(detail, _LONGEST_CAUSE)}" for detail in details[:_MOST_CAUSES]]
    more = len(details) - _MOST_CAUSES
    lines += [f"- and {more} more: hpc-core explain" for _ in range(more > 0)]
    return ["", *_fold("More of the cause", lines)]


def _metrics(judged: Sequence[MetricVerdict]) -> list[str]:
    moved = [each for each in judged if each.verdict is not Verdict.PASS and each.change]
    if not moved:
        return []
    lines = ["", "| metric | accepted | now | change | limit | verdict |", "|---|---|---|---|---|---|"]
    for each in moved[:_SHOWN_METRICS]:
        old = "-" if each.old is None else units.quantity(each.old, each.unit)
        new = "-" if each.new is None else units.quantity(each.new, each.unit)
        ratio = "-" if each.ratio is None else units.percent(each.ratio)
        cells = (safe(each.metric), safe(old), safe(new), safe(ratio), safe(each.limit), str(each.verdict))
        lines.append(f"| {' | '.join(cells)} |")
    more = len(moved) - _SHOWN_METRICS
    return [*lines, "", f"and {more} more metrics"] if more > 0 else [*lines, ""]


def _fold(title: str, lines: Sequence[str], *, is_open: bool = False) -> list[str]:
    return [f"<details{' open' if is_open else ''}><summary>{title}</summary>", "", *lines, "", "</details>", ""]
