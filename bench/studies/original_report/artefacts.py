"""Check the original report's three artefacts with records of one session: what was measured, and whether it is possible.

1. Full fine-tuning against LoRA, in equal precision and tokens. 2. QLoRA with and without `prepare`, with and without
checkpointing. 3. INT4 against FP16, launch-bound and device-bound. Pure: measures nothing, reads nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import msgspec

from hpc_core.bounds.check import value_of
from hpc_core.bounds.ratio import checkpointing_impossible, four_bit_impossible, ratio_impossible
from hpc_core.case.limits import GiB
from hpc_core.record.record import Record

__all__ = ["DEVICE_BOUND_SHARE", "NEEDED", "Artefact", "artefacts", "device_bound_rows"]

DEVICE_BOUND_SHARE = 0.9
"""The least busy share of work that is bound by the device."""

_FULL_AND_LORA = ("full-bf16", "lora")
_QLORA = {"qlora": "off", "qlora-gc": "on", "qlora-prepare": "on", "qlora-prepare-nogc": "off"}
"""By variant, the checkpointing that must be observed."""
_LAUNCH_BOUND = ("generate-fp16", "generate-nf4")
_DEVICE_BOUND = ("generate-fp16-b32", "generate-nf4-b32", "generate-nf4-fp16-b32")

NEEDED: tuple[str, ...] = (*_FULL_AND_LORA, *_QLORA, *_LAUNCH_BOUND, *_DEVICE_BOUND)
"""The variants that the three artefacts need."""


class Artefact(msgspec.Struct, frozen=True, kw_only=True):
    """One artefact: its table, why its numbers are impossible, and which variants are missing."""

    title: str
    head: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    refused: tuple[str, ...]
    missing: tuple[str, ...]

    @property
    def text(self) -> str:
        """Return the table in columns, followed by the reasons."""
        lines = [self.head, *self.rows]
        widths = [max(len(line[column]) for line in lines) for column in range(len(self.head))]
        drawn = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) for line in lines]
        return "\n".join(line.rstrip() for line in (*drawn, *(f"REFUSED: {reason}" for reason in self.refused)))


def artefacts(records: Mapping[str, Record]) -> tuple[Artefact, Artefact, Artefact]:
    """Return all three artefacts from records by variant or by `<shape>/<variant>`."""
    by_variant = {name.rpartition("/")[2]: record for name, record in records.items()}
    return _full_against_lora(by_variant), _qlora(by_variant), _four_bit(by_variant)


def _missing(records: Mapping[str, Record], names: Iterable[str]) -> tuple[str, ...]:
    return tuple(name for name in names if name not in records)


def _full_against_lora(records: Mapping[str, Record]) -> Artefact:
    missing = _missing(records, _FULL_AND_LORA)
    there = [records[name] for name in _FULL_AND_LORA if name in records]
    return Artefact(
        title="full fine-tuning against LoRA, equal precision and tokens",
        head=("case", "GPU-busy", "wall", "tokens/s", "peak"),
        rows=tuple(
            (_name(record), _ms(record, "busy_s"), _ms(record, "step_s"), _number(record, "tokens_per_s"), _gib(record))
            for record in there
        ),
        refused=() if missing else ratio_impossible(*there),
        missing=missing,
    )


def _qlora(records: Mapping[str, Record]) -> Artefact:
    missing = _missing(records, _QLORA)
    rows, refused = [], []
    for name, expected in _QLORA.items():
        if name not in records:
            continue
        record, seen = records[name], _checkpointing(records[name])
        rows.append((name, seen, _ms(record, "busy_s"), _ms(record, "step_s"), _gib(record)))
        if seen != expected:
            refused.append(f"{record.case.id}: checkpointing should be {expected}, seen was {seen}.")
    for plain, checkpointed in (("qlora", "qlora-gc"), ("qlora-prepare-nogc", "qlora-prepare")):
        if plain in records and checkpointed in records:
            refused += checkpointing_impossible(records[plain], records[checkpointed])
    return Artefact(
        title="QLoRA: `prepare` and gradient checkpointing",
        head=("case", "checkpointing seen", "GPU-busy", "wall", "peak"),
        rows=tuple(rows),
        refused=tuple(refused),
        missing=missing,
    )


def _four_bit(records: Mapping[str, Record]) -> Artefact:
    refused = []
    for name in _DEVICE_BOUND:
        share = value_of(records[name], "busy_share_prefill") if name in records else None
        if share is not None and share < DEVICE_BOUND_SHARE:
            refused.append(
                f"{records[name].case.id}: the device works {share:.0%} of the time to the first token, below {DEVICE_BOUND_SHARE:.0%}: "
                "the host is still waited for, and nothing follows. Take a larger batch."
            )
    plain = records.get(_DEVICE_BOUND[0])
    for name in _DEVICE_BOUND[1:]:
        if plain is not None and name in records:
            refused += four_bit_impossible(plain, records[name])
    launched = [_launch_bound_row(records[name]) for name in _LAUNCH_BOUND if name in records]
    return Artefact(
        title="INT4 against FP16, launch-bound and device-bound",
        head=("case", "what", "GPU-busy", "wall", "busy share", "bound by"),
        rows=(*launched, *device_bound_rows(records)),
        refused=tuple(refused),
        missing=_missing(records, (*_LAUNCH_BOUND, *_DEVICE_BOUND)),
    )


def device_bound_rows(records: Mapping[str, Record]) -> Sequence[tuple[str, ...]]:
    """Return a row with the prefill of each device-bound variant that has a record."""
    return [
        _row(records[name], "prefill of 32 x 512", "busy_prefill_s", "time_to_first_token_s")
        for name in _DEVICE_BOUND
        if name in records
    ]


def _launch_bound_row(record: Record) -> tuple[str, ...]:
    return _row(record, "a token at batch 1", "busy_decode_token_s", "decode_token_s")


def _row(record: Record, what: str, busy: str, wall: str) -> tuple[str, ...]:
    seconds = value_of(record, busy), value_of(record, wall)
    share = None if seconds[0] is None or not seconds[1] else seconds[0] / seconds[1]
    bound = "unknown" if share is None else "the device" if share >= DEVICE_BOUND_SHARE else "the host's launches"
    return (_name(record), what, _ms(record, busy), _ms(record, wall), "-" if share is None else f"{share:.0%}", bound)


def _name(record: Record) -> str:
    return record.case.id.rpartition("/")[2]


def _checkpointing(record: Record) -> str:
    fact = record.audit.get("checkpointing")
    return "not recorded" if fact is None else str(fact.seen)


def _ms(record: Record, name: str) -> str:
    seconds = value_of(record, name)
    return "-" if seconds is None else f"{seconds * 1e3:.4g} ms"


def _number(record: Record, name: str) -> str:
    value = value_of(record, name)
    return "-" if value is None else f"{value:,.0f}"


def _gib(record: Record) -> str:
    value = value_of(record, "peak_bytes")
    return "-" if value is None else f"{value / GiB:.2f} GiB"
