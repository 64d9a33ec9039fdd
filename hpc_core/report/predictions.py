"""Predictions as text: whether a case fits the card, where the peak is, what fills it, and how it was predicted."""

from __future__ import annotations

from collections.abc import Sequence

from hpc_core.record import units
from hpc_core.record.record import Metric, Record

_PHASES = ("forward", "backward", "optimizer", "prefill", "decode")
_AT_PEAK = "at_peak_"
_OWNED = (("weights_bytes", "weights"), ("adapter_weights_bytes", "adapter"), ("optimizer_bytes", "optimizer"))
_COUNTS = (("flops", "FLOPs"), ("kernels", "kernels"), ("operators", "operators"))
_STACK = ("torch", "transformers", "peft", "bitsandbytes")
_ABSENT = "-"


def room_bytes(record: Record, margin_bytes: int) -> int:
    """Return what a step may take on the record's card: its memory without the margin."""
    return record.circumstances.machine.memory_bytes - margin_bytes


def fits(record: Record, margin_bytes: int) -> bool:
    """Return whether the predicted peak leaves the margin free."""
    return record.metrics["peak_bytes"].value <= room_bytes(record, margin_bytes)


def prediction_block(record: Record, margin_bytes: int) -> str:
    """Return one prediction as lines of label and text."""
    metrics, card = record.metrics, record.circumstances.machine
    lines = [
        (_outcome(record, margin_bytes), _verdict(record, margin_bytes)),
        ("peak by phase", _listed(_by_phase(metrics))),
        ("at the peak", _listed(_at_peak(metrics))),
        ("held", _listed([(word, metrics[name]) for name, word in _OWNED if name in metrics])),
        (
            "while loading",
            _shown(metrics, "peak_load_bytes") + " (as built here: real weights are quantized as they come)",
        ),
        *((word, _shown(metrics, name)) for name, word in _COUNTS if name in metrics),
        ("predicted", _how(record)),
    ]
    if record.case.quantization is None:
        lines = [(label, text.partition(" (as built")[0]) for label, text in lines]
    width = max(len(label) for label, _ in lines)
    head = f"{record.case.id} on one {card.name}, predicted"
    shown = [f"  {label:<{width}}  {text}" for label, text in lines if text]
    shown += [f"  note: {note}" for note in _notes(record)]
    shown += [f"  INVALID: {reason}" for reason in record.reasons]
    return "\n".join([head, *shown])


def _outcome(record: Record, margin_bytes: int) -> str:
    """Return the block's first word. What is not the case that was asked for neither fits nor fails to."""
    if record.status == "invalid":
        return "INVALID"
    return "fits" if fits(record, margin_bytes) else "DOES NOT FIT"


def sweep_table(field: str, rows: Sequence[tuple[str, Record]], margin_bytes: int) -> str:
    """Return a table with one row for each value of the field, and why a value could not be predicted."""
    good = [record for _, record in rows if record.failure is None]
    phases = [phase for phase in _PHASES if any(f"peak_{phase}_bytes" in record.metrics for record in good)]
    table = [[field, "peak", *phases, "left", "FLOPs", "kernels"]]
    reasons = []
    for value, record in rows:
        if record.failure is not None:
            table.append([value, *[_ABSENT] * (len(table[0]) - 1)])
            reasons.append(f"{field}={value}: {record.failure.message}")
            continue
        metrics = record.metrics
        left = room_bytes(record, margin_bytes) - int(metrics["peak_bytes"].value)
        table.append(
            [
                value,
                _shown(metrics, "peak_bytes"),
                *(_shown(metrics, f"peak_{phase}_bytes") for phase in phases),
                _bytes(left) if left >= 0 else f"NO: {_bytes(-left)} too much",
                *(_shown(metrics, name).partition(" per ")[0] for name in ("flops", "kernels")),
            ]
        )
        reasons += [f"{field}={value}: note: {note}" for note in _notes(record)]
        reasons += [f"{field}={value}: INVALID: {reason}" for reason in record.reasons]
    widths = [max(len(row[column]) for row in table) for column in range(len(table[0]))]
    lines = ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in table]
    return "\n".join([*lines, *_covered(good), *reasons])


def _notes(record: Record) -> list[str]:
    """Return what a reader of the numbers should know; which card and torch they are for is shown anyway."""
    return [note for note in record.circumstances.notes if not note.startswith("predicted for one")]


def _covered(records: Sequence[Record]) -> list[str]:
    """Return what the counts in a table are totals of."""
    if not records:
        return []
    metrics = records[0].metrics
    covered = [(word, metrics[name].unit.partition(" per ")[2]) for name, word in _COUNTS[:2] if name in metrics]
    shown = [f"{word} per {unit}" for word, unit in covered if unit]
    return [f"({', '.join(shown)})"] if shown else []


def _verdict(record: Record, margin_bytes: int) -> str:
    peak, memory = int(record.metrics["peak_bytes"].value), record.circumstances.machine.memory_bytes
    left = room_bytes(record, margin_bytes) - peak
    kept = f"the margin of {_bytes(margin_bytes)}"
    rest = f"{_bytes(left)} left beyond {kept}" if left >= 0 else f"{_bytes(-left)} too much with {kept}"
    wrong = "not what the case asks for; as it would run, " if record.status == "invalid" else ""
    return f"{wrong}{_bytes(peak)} of {_bytes(memory)}; {rest}"


def _by_phase(metrics: dict[str, Metric]) -> list[tuple[str, Metric]]:
    return [(phase, metrics[f"peak_{phase}_bytes"]) for phase in _PHASES if f"peak_{phase}_bytes" in metrics]


def _at_peak(metrics: dict[str, Metric]) -> list[tuple[str, Metric]]:
    """Return the categories at the peak, largest first."""
    found = [
        (name.removeprefix(_AT_PEAK).removesuffix("_bytes").replace("_", " "), metric)
        for name, metric in metrics.items()
        if name.startswith(_AT_PEAK)
    ]
    return sorted(found, key=lambda each: -each[1].value)


def _listed(parts: Sequence[tuple[str, Metric]]) -> str:
    return ", ".join(f"{word} {units.quantity(metric.value, metric.unit)}" for word, metric in parts)


def _shown(metrics: dict[str, Metric], name: str) -> str:
    metric = metrics.get(name)
    return _ABSENT if metric is None else units.quantity(metric.value, metric.unit)


def _bytes(value: int) -> str:
    return units.quantity(value, "bytes")


def _how(record: Record) -> str:
    around = record.circumstances
    stack = ", ".join(f"{name} {around.stack[name]}" for name in _STACK if name in around.stack)
    return f"without a GPU, by {around.gpu.get('torch', 'torch')}: {stack}"
