"""Find where the host's time went: the lines that take longer, waiting included."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import PurePosixPath

from hpc_core.explain.before import Before
from hpc_core.explain.findings import Finding, leading
from hpc_core.gate.verdict import Judgement, MetricVerdict, Verdict
from hpc_core.record import units as sizes
from hpc_core.record.metrics import METRICS
from hpc_core.record.profile import HostTime
from hpc_core.record.record import Record

_WALL = frozenset(name for name, each in METRICS.items() if each.explained == "time")
_COUNTS = tuple(name for name, each in METRICS.items() if each.explained == "host")
_SHOWN_SHARE = 0.2
_MOST_DETAILS = 6
_LEAST_S = 0.0005
"""Half of what the sampler resolves."""


def time_finding(before: Before, now: Record, judgement: Judgement | None) -> Finding | None:
    """Return where wall time went; None if no wall time was found worse or better."""
    row = _moved(judgement)
    if row is None or row.change is None:
        return None
    places, is_difference = _places(before, now)
    head = f"{row.metric} {sizes.change(row.change, row.unit)}"
    shown = leading(places, lambda place: place[1], share=_SHOWN_SHARE, most=2)
    if is_difference:
        where = "; ".join(f"{sizes.change(seconds, 's')} in {_text(place)}" for place, seconds in shown)
    else:
        where = "; ".join(f"most of it in {_text(place)}" for place, _ in shown[:1])
    line = ": ".join(filter(None, (head, where or _without_places(before, now))))
    details = tuple(
        f"host: {sizes.change(seconds, 's')} in {_text(place)}" for place, seconds in places[:_MOST_DETAILS]
    )
    return Finding(
        resource="time",
        share=abs(row.ratio or 0.0),
        worse=row.change > 0,
        line=line,
        placed=bool(places),
        details=details if is_difference else (),
    )


_PARTS = {"python_s": "Python", "dispatch_s": "dispatch", "launch_s": "launch", "waiting_s": "waiting"}
"""What the host's time is split into, from the outside in, and how it is called."""


def wall_parts(record: Record) -> dict[str, float]:
    """Return the seconds of each part of a decoded token or a step, by its name; on a CPU operators compute, so they are called that."""
    names = _PARTS if "launch_s" in record.metrics else _PARTS | {"dispatch_s": "operators"}
    return {name: float(record.metrics[part].value) for part, name in names.items() if part in record.metrics}


def split_line(record: Record) -> str | None:
    """Return "a token's 20.1 ms: Python 11.2, dispatch 5.9, launch 2.6, waiting 0.4; GPU busy 3.9 ms"; None without a split."""
    parts = wall_parts(record)
    if not parts:
        return None
    work, busy = ("step", "busy_s") if record.case.kind != "generate" else ("token", "busy_decode_token_s")
    whole = sum(parts.values())
    scale, unit = sizes.axis(whole, "s")
    texts = ", ".join(f"{name} {seconds / scale:,.3g}" for name, seconds in parts.items())
    gpu = f"; GPU busy {record.metrics[busy].value / scale:,.3g} {unit}" if busy in record.metrics else ""
    return f"a {work}'s {whole / scale:,.3g} {unit}: {texts}{gpu}"


def _moved(judgement: Judgement | None) -> MetricVerdict | None:
    rows = () if judgement is None else judgement.metrics
    found = [row for row in rows if row.metric in _WALL and row.verdict in (Verdict.REGRESSED, Verdict.IMPROVED)]
    return max(found, key=lambda row: abs(row.ratio or 0.0), default=None)


def _places(before: Before, now: Record) -> tuple[list[tuple[HostTime, float]], bool]:
    """Return lines with their seconds, the most important first; and whether these are differences to before."""
    new = () if now.profile is None else now.profile.host_times
    old = () if before.profile is None else before.profile.host_times
    if not new or not old:
        return [(each, each.seconds) for each in new], False
    was, after = _by_function(old), _by_function(new)
    moved = [(place, seconds - was.get(key, (place, 0.0))[1]) for key, (place, seconds) in after.items()]
    moved += [(place, -seconds) for key, (place, seconds) in was.items() if key not in after]
    return sorted((each for each in moved if abs(each[1]) > _LEAST_S), key=lambda each: -abs(each[1])), True


def _by_function(times: Iterable[HostTime]) -> dict[tuple[str, str], tuple[HostTime, float]]:
    """Return the seconds of each function, with its longest line: lines move when a file is edited."""
    found: dict[tuple[str, str], tuple[HostTime, float]] = {}
    for each in times:
        place, seconds = found.get((each.file, each.function), (each, 0.0))
        found[each.file, each.function] = place, seconds + each.seconds
    return found


def _text(place: HostTime) -> str:
    return f"{place.function} ({PurePosixPath(place.file).name}:{place.line})"


def _without_places(before: Before, now: Record) -> str:
    if any(
        name not in before.metrics or before.metrics[name].value != now.metrics[name].value
        for name in _COUNTS
        if name in now.metrics
    ):
        return ""
    return "the host executes what it did, so it sleeps, waits for a file or a lock, or C code takes longer"
