"""Measure the wall times of unchanged cases again and again, and compute how often the gate's rule is wrong.

python -m bench.studies.error_rates.wall_rates --measure 20 --out samples.json    # 20 processes of each tiny case
python -m bench.studies.error_rates.wall_rates samples.json [more.json]           # rates of the stored samples
"""

from __future__ import annotations

import argparse
import fnmatch
import json
import random
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import msgspec

from hpc_core.case.case import Case
from hpc_core.case.errors import SpecError
from hpc_core.catalogue import TINY, catalogue
from hpc_core.gate.busy import Evidence
from hpc_core.gate.spread import judge_spread
from hpc_core.gate.verdict import SUITE_ALPHA, Verdict, share
from hpc_core.launch.launcher import Launcher, preloadable
from hpc_core.record.job import Job, Retime
from hpc_core.record.metrics import METRICS, canaries_of, metric
from hpc_core.record.repeats import disturbed

Values = dict[str, dict[str, list[float]]]
"""By case and metric, one value per process; only processes whose times were not disturbed."""

_DRAWS = 1000
_PROCESSES = 3
_OTHERS_RATIO = 0.05
"""pytest-benchmark's `--benchmark-compare-fail=mean:5%`."""
CHANGES = (0.1, 0.25, 0.5, 1.5)
_SHARES = ("busy_share", "busy_share_prefill")
NAMES = tuple(name for name, each in METRICS.items() if each.explained == "time" and each.unit == "s")


class Rates(msgspec.Struct, frozen=True, kw_only=True):
    """How often the rule is wrong, with so many accepted sessions."""

    sessions: int
    metrics: int
    suite: float
    """Share of clean suite runs with a REGRESSED time."""
    each: float
    """Share of clean times that are REGRESSED."""
    others: float
    """The same by pytest-benchmark's rule on the seconds of one process."""
    caught: dict[str, float]
    """Share of times that are REGRESSED, by how much slower they were made: "+25 %"."""


def measured(processes: int, cases: Sequence[Case]) -> Values:
    """Return the wall times of so many processes of each case, in turns."""
    found: Values = {}
    with Launcher("warm") as launcher:
        launcher.preload = preloadable(cases)
        launcher.prepare()
        for _ in range(processes):
            for case in cases:
                metrics = launcher.run(Job(case=case, kind=Retime())).metrics
                judged = set(NAMES) & set(metrics) - disturbed(metrics)
                beside = {canaries_of(name) for name in judged} | set(_SHARES) & set(metrics)
                for each in sorted(judged | beside):
                    found.setdefault(case.id, {}).setdefault(each, []).append(float(metrics[each].value))
    return found


def rates(
    values: Values, sessions: int, draw: random.Random, draws: int = _DRAWS, *, tests: int | None = None
) -> Rates:
    """Return the rates of suite runs that are drawn from these processes, each used once in a run.

    An accepted session holds the median of three processes. A run has one process, and three if that one does not pass.
    The suite has `tests` tests of time; by default, those of the samples.

    Raises:
        SpecError: no case has three processes for each session and for the run.
    """
    needed = _PROCESSES * (sessions + 1)
    enough = {case: names for case, names in values.items() if all(len(each) >= needed for each in names.values())}
    judged = [(case, name) for case, names in enough.items() for name in names if name in NAMES]
    if not judged:
        most = max((len(each) for names in values.values() for each in names.values()), default=0)
        raise SpecError(
            f"{sessions} sessions and a run take {needed} undisturbed processes of a case; the samples have {most}."
        )
    alpha = share(tests or len(judged), SUITE_ALPHA)
    alarms = worse = others = 0
    caught = dict.fromkeys(CHANGES, 0)
    for _ in range(draws):
        alarmed = 0
        for case, name in judged:
            accepted, new = _drawn(enough[case], name, sessions, draw)
            alarmed += _regressed(name, accepted, new, 0.0, alpha)
            others += new[name][0] > (1 + _OTHERS_RATIO) * accepted[name][-1][0]
            for change in CHANGES:
                caught[change] += _regressed(name, accepted, new, change, alpha)
        worse += alarmed
        alarms += alarmed > 0
    total = draws * len(judged)
    return Rates(
        sessions=sessions,
        metrics=len(judged),
        suite=alarms / draws,
        each=worse / total,
        others=others / total,
        caught={f"+{change:.0%}".replace("%", " %"): count / total for change, count in caught.items()},
    )


def _drawn(
    values: Mapping[str, Sequence[float]], name: str, sessions: int, draw: random.Random
) -> tuple[dict[str, list[list[float]]], dict[str, list[float]]]:
    """Return accepted sessions and a new run by figure, from different processes."""
    figures = [each for each in (name, canaries_of(name), *_SHARES) if each in values]
    at = draw.sample(range(len(values[name])), _PROCESSES * (sessions + 1))
    groups = [at[start : start + _PROCESSES] for start in range(0, len(at), _PROCESSES)]
    accepted = {
        each: [[statistics.median(values[each][index] for index in group)] for group in groups[1:]] for each in figures
    }
    return accepted, {each: [values[each][index] for index in groups[0]] for each in figures}


def _regressed(
    name: str, accepted: Mapping[str, list[list[float]]], new: Mapping[str, list[float]], change: float, alpha: float
) -> bool:
    """Return whether the run is REGRESSED once it takes this much longer: by its first process, and then by all three."""
    slower = {
        each: list(values) if each in _SHARES else [value * (1 + change) for value in values]
        for each, values in new.items()
    }
    return all(
        judge_spread(
            name,
            metric(name, slower[name][0]),
            metric(name, accepted[name][-1][0]),
            METRICS[name].tolerance,
            Evidence(
                sessions=accepted, alpha=alpha, processes={each: values[:count] for each, values in slower.items()}
            ),
            stated=False,
        ).verdict
        is Verdict.REGRESSED
        for count in (1, _PROCESSES)
    )


def table(found: Mapping[str, Sequence[Rates]]) -> str:
    """Return the rates as a Markdown table, by the name of their samples."""
    changes = [text for each in next(iter(found.values()))[:1] for text in each.caught]
    lines = [
        f"| samples | accepted sessions | clean suite runs alarmed | clean times alarmed | by `mean:5%` | {' | '.join(changes)} |",
        "|---|---:|---:|---:|---:|" + "---:|" * len(changes),
    ]
    for name, all_rates in found.items():
        for each in all_rates:
            caught = " | ".join(f"{100 * share:.0f} %" for share in each.caught.values())
            lines.append(
                f"| {name} | {each.sessions} | {100 * each.suite:.1f} % | {100 * each.each:.2f} % | {100 * each.others:.0f} % | {caught} |"
            )
    return "\n".join(lines)


def main() -> None:
    """Measure, or print the rates of stored samples."""
    ask = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ask.add_argument("samples", type=Path, nargs="*")
    ask.add_argument("--measure", type=int, metavar="PROCESSES")
    ask.add_argument("--case", action="append", metavar="PATTERN", help="measure these cases in place of the tiny ones")
    ask.add_argument("--tests", type=int, help="tests of time in a run of the whole suite")
    ask.add_argument("--out", type=Path)
    asked = ask.parse_args()
    if (asked.measure is None) != (asked.out is None) or (asked.measure is None and not asked.samples):
        ask.error("give --measure PROCESSES --out FILE, or files of samples")
    if asked.measure is not None:
        cases = [case for case in TINY if "soak" not in case.id]
        if asked.case:
            cases = [
                case for name, case in catalogue().items() if any(fnmatch.fnmatch(name, each) for each in asked.case)
            ]
        asked.out.write_text(json.dumps(measured(asked.measure, cases), indent=1) + "\n", encoding="utf-8")
    found = {
        path.stem: [
            rates(json.loads(path.read_text(encoding="utf-8")), sessions, random.Random(1), tests=asked.tests)
            for sessions in (1, 5)
        ]
        for path in asked.samples
    }
    if found:
        sys.stdout.write(table(found) + "\n")


if __name__ == "__main__":
    main()
