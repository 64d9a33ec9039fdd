"""Measure what the data path costs: 0, 2 and 4 workers, pinned or not, copied ahead or not, tokenized once or in the loader.

    pytest --benchmark bench/studies/data_path/feeds.py          # every case in processes of its own, judged and recorded; a table at the end
    python -m bench.studies.data_path.feeds                      # every feed on one model and one captured step, minutes on a GPU; --out FILE keeps it
    python -m bench.studies.data_path.feeds --shape tiny --device cpu

Not part of the default suite. Each row compares fed steps with the same steps with every batch on the device. It also has the time in which
no kernel ran while the host was getting a batch (by the profiler), the loader's rate without training, and what limits the training.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import pytest

from bench.studies.refusals import what_is_missing
from hpc_core import Case, perf_cases
from hpc_core.case.workloads import FeedSpec, FinetuneSpec
from hpc_core.catalogue import DATA, TINY_DATA
from hpc_core.plugin.fixture import Perf, PerfSession
from hpc_core.record.record import Record

CASES: tuple[Case, ...] = (*DATA, *TINY_DATA)
_COLUMNS = f"{'feed':32} {'step':>9} {'resident':>9} {'wait':>9} {'GPU idle':>9} {'idle, resident':>14} {'alone':>12}"


@perf_cases(CASES)
def test_case(case: Case, perf: Perf) -> None:
    """The case runs as asked, losses of fed and resident steps are bitwise equal, and no gated metric is worse than its baseline."""
    perf(case)


def test_comparison(perf_session: PerfSession) -> None:
    """One table shows what this session measured of each feed."""
    records = [record for record in perf_session.records.values() if "feed_step_s" in record.metrics]
    if not records:
        pytest.skip("no sound record of a fed case in this session")
    lines = [line(record.case.id, of_record(record)) for record in records]
    perf_session.show("The data path", "\n".join([_COLUMNS, *lines]))


def of_record(record: Record) -> dict[str, Any]:
    """Return the numbers of a row."""

    def value(name: str) -> float | None:
        metric = record.metrics.get(name)
        return None if metric is None else float(metric.value)

    names = ("step_s", "resident_step_s", "wait_s", "idle_s", "resident_idle_s", "batches_per_s")
    begin = f"feed of {record.case.id}: "
    said = [note.removeprefix(begin) for note in record.circumstances.notes if note.startswith(f"{begin}bound")]
    return {name: value(f"feed_{name}") for name in names} | {"bound": said[-1] if said else ""}


def line(name: str, row: dict[str, Any]) -> str:
    """Return a row as text, in milliseconds, and microseconds for waits."""

    def time(key: str, unit: float, form: str) -> str:
        return "" if row.get(key) is None else f"{row[key] * unit:{form}}"

    cells = (
        f"{time('step_s', 1e3, '.2f')} ms",
        f"{time('resident_step_s', 1e3, '.2f')} ms",
        f"{time('wait_s', 1e6, '.0f')} µs",
        f"{time('idle_s', 1e6, '.0f')} µs" if row.get("idle_s") is not None else "no GPU",
    )
    idle = f"{time('resident_idle_s', 1e6, '.0f')} µs" if row.get("resident_idle_s") is not None else ""
    rate = f"{row['batches_per_s']:.4g}/s"
    bound = str(row["bound"]).partition(":")[0]
    return f"{name:32} " + " ".join(f"{cell:>9}" for cell in cells) + f" {idle:>14} {rate:>12}  {bound}"


def main() -> None:
    """Build and capture once, and measure every feed with it."""
    ask = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ask.add_argument("--shape", choices=("llama-3.2-3b", "tiny"), default="llama-3.2-3b")
    ask.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    ask.add_argument("--only", default="", help="words that a feed's name must hold, such as w4 or fetch")
    ask.add_argument("--out", default="", help="keep the rows as JSON")
    options = ask.parse_args()
    first, *others = DATA if options.shape == "llama-3.2-3b" else TINY_DATA
    chosen = [case for case in others if options.only in case.id]
    if not chosen:
        there = ", ".join(case.id.rpartition("/")[2] for case in others)
        ask.error(f"no feed's name holds {options.only!r}; there are {there}")
    if said := what_is_missing(options.device, options.out):
        ask.error(said)
    rows: dict[str, dict[str, Any]] = {}
    sys.stdout.write(f"{_COLUMNS}\n")
    for name, row in _measured(first, chosen, options.device):
        rows[name] = row
        sys.stdout.write(f"{line(name, row)}\n" + "".join(f"    {odd}\n" for odd in row["odd"]))
        sys.stdout.flush()
        if options.out:
            Path(options.out).write_text(json.dumps(rows, indent=1))
    for name, row in rows.items():
        sys.stdout.write(f"{name}: {row['bound']}\n")


def _measured(first: Case, others: list[Case], device_name: str) -> Any:
    import torch

    from hpc_core.builders.assemble import build
    from hpc_core.engines.finetune import fed_batches, resident_batches
    from hpc_core.engines.tuned.program import training_program

    device = torch.device(device_name)
    if device_name == "cpu":
        torch.set_num_threads(1)
    built = build(first, device)
    assert isinstance(first.workload, FinetuneSpec)
    program = training_program(built, first, first.workload)
    for _ in range(program.first_steps + 2):
        program.step()
    resident, _ = resident_batches(built, first.workload)
    for case in others:
        workload = case.workload
        assert isinstance(workload, FinetuneSpec)
        fed, _ = fed_batches(built, workload)
        program.batches = fed
        try:
            yield case.id.rpartition("/")[2], _row(program, fed, resident, workload.feed, device)
        finally:
            fed.clear()


def _row(program: Any, fed: Any, resident: Any, feed: FeedSpec, device: Any) -> dict[str, Any]:
    from hpc_core.audit.loader import feed_facts
    from hpc_core.worker.feed import feed_cost, same_losses

    cost = feed_cost(program, fed, resident, device)
    apart = None if cost.idle is None else cost.idle.copies_apart
    facts = dict(feed_facts(feed, fed, on_gpu=device.type == "cuda", copies_apart=apart).facts)
    facts["feed_losses"] = same_losses(program, fed, resident, 0)
    return {
        "step_s": cost.rates.fed_s,
        "resident_step_s": cost.rates.resident_s,
        "wait_s": cost.rates.wait_s,
        "idle_s": cost.rates.idle_s,
        "all_idle_s": None if cost.idle is None else cost.idle.idle_s / cost.steps,
        "resident_idle_s": None if cost.resident_idle is None else cost.resident_idle.idle_s / cost.steps,
        "batches_per_s": cost.rates.supply_per_s,
        "make_s": cost.rates.make_s,
        "bound": cost.bound,
        "facts": {name: [fact.asked, fact.seen] for name, fact in facts.items()},
        "odd": [f"{name}: asked {fact.asked!r}, saw {fact.seen!r}" for name, fact in facts.items() if not fact.holds],
    }


if __name__ == "__main__":
    main()
