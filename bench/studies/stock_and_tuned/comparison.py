"""bench/studies/stock_and_tuned/results.md from accepted records: each case by the libraries' own path and by our engines, with the distance to the floor.

    python -m bench.studies.stock_and_tuned.comparison [BASELINES] > bench/studies/stock_and_tuned/results.md

Every number comes from the records or from the closed forms of `hpc_core.bounds`; what no record holds is shown as absent.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

from bench.studies.stock_and_tuned.memory import memory_text
from bench.studies.stock_and_tuned.paired import changed_work, paired_cases
from bench.studies.stock_and_tuned.words import HEAD
from hpc_core.bounds.check import positions_of, value_of
from hpc_core.bounds.cost import decode_floor, train_floor
from hpc_core.case.case import Case
from hpc_core.case.errors import SpecError
from hpc_core.case.limits import GiB
from hpc_core.case.workloads import FinetuneSpec, GenerateSpec
from hpc_core.catalogue import (
    ALL,
    INT4,
    SWEEP,
    TUNED,
)
from hpc_core.record.record import Record, record_from_json

__all__ = ["accepted_records", "floor_s", "losses_apart", "page"]

_OURS = Path("baselines")
_ABSENT = "-"
_CASES: tuple[Case, ...] = (*ALL, *SWEEP, *INT4)

Group = tuple[Case, tuple[Case, ...]]
"""A stock case with its paired cases."""
Cell = Callable[[Record, Record | None], str]
"""Formats a column's value from a record and that of its stock case; None in the stock row."""


def page(machines: Mapping[str, Mapping[str, Record]]) -> str:
    """Return the whole page as Markdown; `machines` holds records by machine and case id."""
    groups = [(stock, others) for stock, others in paired_cases(_CASES) if stock.scale == "full"]
    parts = [HEAD.format(machines=" and ".join(sorted(machines)) or "a GPU (no record yet)")]
    for name, records in sorted(machines.items()):
        parts += [f"## {name}", *_of_machine(groups, records)]
    known = {case_id for records in machines.values() for case_id in records}
    missing = [f"`{case.id}`" for _, others in groups for case in others if case.id not in known]
    if missing:
        parts.append(
            f"Engine cases not measured on any of these machines since their last change: {', '.join(missing)}."
        )
    return "\n\n".join(parts) + "\n"


def _of_machine(groups: Iterable[Group], records: Mapping[str, Record]) -> list[str]:
    """Return the tables of one machine."""
    parts = []
    for kind, title, columns in (
        ("finetune", "### Training, a step", _TRAINING),
        ("generate", "### Decoding, a token", _DECODING),
    ):
        shown = [found for group in groups if group[0].kind == kind and (found := _shown(group, records)) is not None]
        if shown:
            parts += [title, _table(columns, shown, records)]
    rows = tuple(case for case in SWEEP if case.kind == "finetune" and _of_recorded_rows(case))
    pairs = [(stock, case) for stock, others in groups for case in others if {stock.id, case.id} <= records.keys()]
    if text := memory_text((records[stock.id], records[case.id]) for stock, case in pairs):
        parts.append(text)
    if any(case.id in records for case in rows):
        parts += ["### An epoch of the report's own rows", _table(_EPOCH, [(rows[0], rows[1:])], records)]
    return parts


def accepted_records(folder: Path) -> dict[str, Record]:
    """Return the last accepted record of each case below `folder`, by id, if the case has not changed since.

    Raises:
        SpecError: no such folder, or a file in it that holds no record.
    """
    if not folder.is_dir():
        raise SpecError(f"{folder}: no such folder of baselines.")
    current = {case.id: case.digest for case in _CASES}
    found = {}
    for path in sorted(folder.rglob("*.history.jsonl")):
        # By bytes: a note in a record may hold what Python takes for the end of a line.
        lines = path.read_bytes().strip().split(b"\n")
        try:
            record = record_from_json(lines[-1])
        except SpecError as error:
            raise SpecError(f"{path}: its last line holds no record ({error})") from error
        if current.get(record.case.id) == record.case.digest and record.status == "ok":
            found[record.case.id] = record
    return found


def floor_s(record: Record) -> float | None:
    """Return the least seconds of a step or a decoded token at the rates that the record's own session measured.

    The longer of FLOPs over the product's rate and bytes over the copy's (`bounds.cost`). None if the session measured no rates
    or the case has no closed form.
    """
    case, rates = record.case, record.circumstances.ceilings
    dtype = None if case.model is None else case.model.dtype
    product, copy = rates.get(f"matmul_{dtype}_flop_per_s"), rates.get("copy_bytes_per_s")
    if isinstance(case.workload, FinetuneSpec):
        floor = train_floor(case, positions_of(record, case.workload))
    else:
        floor = decode_floor(case)
    return None if floor is None or not product or not copy else max(floor.flops / product, floor.bytes / copy)


def losses_apart(stock: Record, other: Record) -> tuple[float, int] | None:
    """Return the largest relative difference of losses over the first steps on the same batches, and the number of these steps.

    Both begin with the first batch, and each restarts after its own warm-up, so the shorter warm-up is what they share. None
    without such steps, or if a stock loss is 0.
    """
    workload = stock.case.workload
    assert isinstance(workload, FinetuneSpec)
    common = min(len(each.losses) - workload.steps for each in (stock, other))
    if common < 1 or 0 in stock.losses[:common]:
        return None
    pairs = zip(other.losses[:common], stock.losses[:common], strict=True)
    return max(abs(mine - theirs) / abs(theirs) for mine, theirs in pairs), common


def _shown(group: Group, records: Mapping[str, Record]) -> Group | None:
    """Return the cases to show: those with a record, and the suite's own if the machine measured any of them. None without an engine."""
    stock, others = group
    suite = any(case.id in records for case in TUNED)
    chosen = tuple(case for case in others if case.id in records or (suite and case in TUNED))
    return (stock, chosen) if chosen else None


def _of_recorded_rows(case: Case) -> bool:
    return isinstance(case.workload, FinetuneSpec) and case.workload.data.source == "trace"


def _table(columns: Mapping[str, Cell], groups: Iterable[Group], records: Mapping[str, Record]) -> str:
    lines = [["case", *columns], ["---", *["---:"] * (len(columns) - 1), "---"]]
    for stock, others in groups:
        base = records.get(stock.id)
        lines += [
            [_label(case), *_cells(columns, records.get(case.id), None if case is stock else base)]
            for case in (stock, *others)
        ]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def _cells(columns: Mapping[str, Cell], record: Record | None, stock: Record | None) -> list[str]:
    if record is None:
        return [_ABSENT] * (len(columns) - 1) + ["not measured"]
    return [cell(record, stock) for cell in columns.values()]


def _label(case: Case) -> str:
    changed = changed_work(case)
    engine = getattr(case.workload, "engine", "stock")
    return (
        f"`{case.id}`"
        if engine == "stock" and not changed
        else f"`{case.id}`: {engine}{f', {changed}' if changed else ''}"
    )


def _scaled(name: str, by: float, digits: int) -> Cell:
    def cell(record: Record, stock: Record | None) -> str:
        value = value_of(record, name)
        return _ABSENT if value is None else f"{value / by:,.{digits}f}"

    return cell


def _faster(name: str) -> Cell:
    def cell(record: Record, stock: Record | None) -> str:
        mine, theirs = value_of(record, name), None if stock is None else value_of(stock, name)
        return _ABSENT if not mine or theirs is None else f"{theirs / mine:.2f} x"

    return cell


def _decoded_per_s(record: Record, stock: Record | None) -> str:
    seconds = value_of(record, "decode_token_s")
    assert isinstance(record.case.workload, GenerateSpec)
    return f"{record.case.workload.batch / seconds:,.1f}" if seconds else _ABSENT


def _tokens_a_step(record: Record, stock: Record | None) -> str:
    tokens = value_of(record, "tokens")
    assert isinstance(record.case.workload, FinetuneSpec)
    return _ABSENT if tokens is None else f"{tokens / record.case.workload.steps:,.0f}"


def _floor(record: Record, stock: Record | None) -> str:
    floor = floor_s(record)
    return _ABSENT if floor is None else f"{floor * 1e3:.3g} ms"


def _share(name: str) -> Cell:
    def cell(record: Record, stock: Record | None) -> str:
        floor, seconds = floor_s(record), value_of(record, name)
        return _ABSENT if floor is None or not seconds else f"{floor / seconds:.0%}"

    return cell


def _trains_alike(record: Record, stock: Record | None) -> str:
    error = value_of(record, "logits_error")
    parts = [] if error is None else [f"logits {error:.2g} off float32"]
    apart = None if stock is None else losses_apart(stock, record)
    if apart is not None:
        parts.append(f"losses of {apart[1]} steps within {apart[0]:.2g} of stock")
    return "; ".join(parts) or _ABSENT


def _answers_alike(record: Record, stock: Record | None) -> str:
    parts = [
        f"{words[0]}{value:{form}}{words[1]}"
        for name, form, words in (
            ("logits_error", ".2g", ("logits ", " off float32")),
            ("logits_error_to_stock", ".2g", ("", " off stock")),
            ("greedy_agreement", ".0%", ("", " of tokens are the reference's")),
        )
        if (value := value_of(record, name)) is not None
    ]
    return "; ".join(parts) or _ABSENT


def _day(record: Record, stock: Record | None) -> str:
    return record.circumstances.started_at[:10]


_TRAINING: dict[str, Cell] = {
    "wall, ms": _scaled("step_s", 1e-3, 1),
    "faster": _faster("step_s"),
    "GPU-busy, ms": _scaled("busy_s", 1e-3, 1),
    "peak, GiB": _scaled("peak_bytes", GiB, 2),
    "tokens/s": _scaled("tokens_per_s", 1, 0),
    "floor": _floor,
    "floor / wall": _share("step_s"),
    "floor / busy": _share("busy_s"),
    "J/step": _scaled("energy_step_j", 1, 1),
    "epoch, s": _scaled("epoch_s", 1, 1),
    "equal results": _trains_alike,
    "measured": _day,
}
_DECODING: dict[str, Cell] = {
    "wall, ms": _scaled("decode_token_s", 1e-3, 2),
    "faster": _faster("decode_token_s"),
    "GPU-busy, ms": _scaled("busy_decode_token_s", 1e-3, 2),
    "first token, ms": _scaled("time_to_first_token_s", 1e-3, 1),
    "peak, GiB": _scaled("peak_bytes", GiB, 2),
    "tokens/s": _decoded_per_s,
    "floor": _floor,
    "floor / wall": _share("decode_token_s"),
    "floor / busy": _share("busy_decode_token_s"),
    "J/token": _scaled("energy_token_j", 1, 2),
    "equal results": _answers_alike,
    "measured": _day,
}


_EPOCH: dict[str, Cell] = {
    "wall, ms": _scaled("step_s", 1e-3, 1),
    "tokens a step": _tokens_a_step,
    "tokens/s": _scaled("tokens_per_s", 1, 0),
    "peak, GiB": _scaled("peak_bytes", GiB, 2),
    "J/step": _scaled("energy_step_j", 1, 1),
    "epoch, s": _scaled("epoch_s", 1, 1),
    "measured": _day,
}


def main(folder: Path = _OURS) -> str:
    """Return bench/studies/stock_and_tuned/results.md from the baselines of all GPUs, one folder for each in `folder`.

    Raises:
        SpecError: as `accepted_records`, or `folder` is that of one machine.
    """
    if not folder.is_dir():
        raise SpecError(f"{folder}: no such folder of baselines.")
    machines: dict[str, dict[str, Record]] = {}
    for below in sorted(each for each in folder.iterdir() if each.is_dir() and each.name not in ("cpu", "predicted")):
        for case_id, record in accepted_records(below).items():
            machine = record.circumstances.machine
            if machine.key != below.name:
                raise SpecError(
                    f"{folder}: {below.name} has records of {machine.key}, so this is one machine's folder. Name the folder above it."
                )
            machines.setdefault(f"{machine.name} (`{machine.key}`)", {})[case_id] = record
    return page(machines)


if __name__ == "__main__":
    try:
        sys.stdout.write(main(Path(sys.argv[1]) if len(sys.argv) > 1 else _OURS))
    except SpecError as error:
        sys.exit(f"bench.studies.stock_and_tuned.comparison: {error}")
