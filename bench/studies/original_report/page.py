"""Write bench/studies/original_report/results.md: the original report's rows, the bounds that they break, and our own rows.

Every number comes from the given records or from closed forms; nothing is measured or read here.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from bench.studies.original_report.artefacts import artefacts, device_bound_rows
from hpc_core.bounds.check import positions_of, value_of
from hpc_core.bounds.cost import (
    decode_floor,
    peak_rate,
    train_floor,
)
from hpc_core.bounds.footprint import expected_bytes
from hpc_core.bounds.ratio import BUSY_MARGIN, WALL_MARGIN, ratio_impossible
from hpc_core.case.limits import GiB
from hpc_core.case.workloads import FinetuneSpec
from hpc_core.record.gpus import gpu_of
from hpc_core.record.record import Record

__all__ = ["page"]

_TRAINING = (
    ("full", "full fine-tuning, as bf16", "full-bf16"),
    ("full-fp32", "the same, as the report's words say: full precision", "full-fp32"),
    ("lora", "LoRA", "lora"),
    ("lora-gc", "LoRA + gradient checkpointing", "lora-gc"),
    ("qlora", "QLoRA (through `prepare`)", "qlora-prepare"),
    ("qlora-gc", "QLoRA + gradient checkpointing", "qlora-prepare"),
)
_INFERENCE = (
    ("fp16", "FP16", "generate-fp16"),
    ("int4", "INT4, as the report's words say: NF4", "generate-nf4"),
    ("int4-double-quant", "the same, as NF4 with double quantization", "generate-nf4-dq"),
)


def page(report: Mapping[str, Record], ours: Mapping[str, Record]) -> str:
    """Return the whole page as Markdown; `report` is by name, as from `report_records()`, and `ours` by variant."""
    parts = [
        _HEAD,
        _table(
            ("fine-tuning", "s/epoch", "TFLOP/s at least", "peak GiB", "physics", "ours: s/epoch", "ours: peak GiB"),
            (_training(report[name], words, ours[variant]) for name, words, variant in _TRAINING),
        ),
        _table(
            ("inference", "s/query", "tokens/s", "TB/s at least", "peak GiB", "physics", "ours: tokens/s", "peak GiB"),
            (_inference(report[name], words, ours[variant]) for name, words, variant in _INFERENCE),
        ),
        _UNDER_TABLES.format(machine=ours["lora"].circumstances.machine.name),
        "## What physics refuses\n" + "\n".join(_refusals(report)),
        _first(report, ours),
        _second(report, ours),
        _third(report, ours),
        _device_bound(ours),
        _fourth(report),
        _NOT_REPEATED,
    ]
    return "\n\n".join(parts) + "\n"


_HEAD = """# The original report, row by row

Written by `python -m bench.studies.original_report page`: every number is typed in from the report, computed in closed form, or read from the committed
baselines of the H100. A test keeps this page equal to what the command prints."""

_UNDER_TABLES = """The report's columns come from one RTX 5090, ours from one {machine}; only ratios and bytes compare. "At least" counts what the row
needs in closed form (2 FLOP a multiply-add, the causal half of attention, no recomputation; weights and cache read once) over the time it claims. Our
epoch is 1000 steps of 4 x 512 tokens without padding, extrapolated from ten; its wall time is launch-bound where the host is slow."""

_NOT_REPEATED = """## Not made
The full protocol on an RTX 5090: its rows above are judged, not repeated."""

_AWAITED = """**Device-bound, INT4 against FP16 awaits a run on the H100**: {missing} are not among the committed baselines yet. `pytest --benchmark
bench/studies/original_report/original_report.py` runs them, a prefill of 32 x 512 tokens in FP16 and in NF4 with float32 and float16 as compute dtype, and judges all three artefacts from that one session."""


def _table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    lines = [list(head), *map(list, rows)]
    lines.insert(1, ["---"] * len(lines[0]))
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def _training(claim: Record, words: str, mine: Record) -> list[str]:
    return [
        words,
        f"{_value(claim, 'epoch_s'):.2f}",
        f"{_needed_rate(claim) / 1e12:,.0f}",
        f"{_value(claim, 'peak_bytes') / GiB:.2f}",
        _verdict(claim),
        f"{_value(mine, 'epoch_s'):.0f}",
        _gib(mine),
    ]


def _inference(claim: Record, words: str, mine: Record) -> list[str]:
    floor = decode_floor(claim.case)
    assert floor is not None
    rate = value_of(claim, "tokens_per_s") or 0.0
    return [
        words,
        f"{_value(claim, 'query_s'):.2f}",
        f"{rate:.2f}",
        f"{floor.bytes * rate / 1e12:.2f}",
        f"{_value(claim, 'peak_bytes') / GiB:.2f}",
        _verdict(claim),
        f"{_value(mine, 'tokens_per_s'):.1f}",
        _gib(mine),
    ]


def _verdict(claim: Record) -> str:
    return "**impossible**" if claim.status == "invalid" else "not refuted"


def _refusals(report: Mapping[str, Record]) -> Iterable[str]:
    for record in report.values():
        for reason in record.reasons:
            yield f"* `{record.case.id}`: {reason}"
    for one, other in (("full", "lora"), ("full-real-tokens", "lora-real-tokens")):
        for reason in ratio_impossible(report[one], report[other]):
            yield f"* `{report[one].case.id}` beside `{report[other].case.id}`: {reason}"


def _first(report: Mapping[str, Record], ours: Mapping[str, Record]) -> str:
    full, real = report["full"], report["full-real-tokens"]
    sheet = gpu_of(full.circumstances.machine)
    assert sheet is not None
    peak = peak_rate(full.case, sheet)
    assert peak is not None
    pure, single = sum(_state(full).values()) / GiB, sum(_state(report["full-fp32"]).values()) / GiB
    busy = [_value(ours[name], "busy_s") for name in ("full-bf16", "lora")]
    return f"""## 1. Full fine-tuning six times faster than LoRA
{_value(full, "epoch_s")} s for an epoch of rows padded to 512 tokens is {_needed_rate(full) / 1e15:.2f} PFLOP/s, {_needed_rate(full) / peak[1]:.1f} times what the data sheet names ({peak[1] / 1e12:.1f} TFLOP/s). Counted in real tokens
only ({_value(real, "tokens"):,.0f} an epoch) the row alone is possible: {_needed_rate(real) / 1e12:.0f} TFLOP/s. Then the ratio is not: LoRA needs fewer FLOPs and hardly any optimizer traffic, so of the same tokens full
fine-tuning cannot take {_value(full, "epoch_s") / _value(report["lora"], "epoch_s"):.2f} of LoRA's time. We refuse it below {WALL_MARGIN:g} of LoRA's wall time or {BUSY_MARGIN:g} of its GPU-busy time; ours: {busy[0] * 1000:.1f} ms GPU-busy a step against {busy[1] * 1000:.1f} ms, {busy[0] / busy[1]:.2f} of it.

Nor was it "full precision": weights, gradients and AdamW's state take {single:.1f} GiB in float32 and {pure:.1f} GiB in bfloat16, before any activation; {_gib(full)} GiB were reported.
Ours peak at {_gib(ours["full-fp32"])} GiB and {_gib(ours["full-bf16"])} GiB."""


def _second(report: Mapping[str, Record], ours: Mapping[str, Record]) -> str:
    words = {
        "qlora": "without `prepare`, no checkpointing",
        "qlora-gc": "without `prepare`, checkpointing",
        "qlora-prepare": "`prepare` as it comes",
        "qlora-prepare-nogc": "`prepare(use_gradient_checkpointing=False)`",
    }
    rows = (
        [
            text,
            _checkpointing(ours[name]),
            _gib(ours[name]),
            f"{_value(ours[name], 'busy_s') * 1e3:.0f}",
        ]
        for name, text in words.items()
    )
    return (
        '## 2. "Gradient checkpointing adds nothing to QLoRA"\n'
        "`prepare_model_for_kbit_training` switches checkpointing on unless told not to, so both of the report's rows ran with it: equal peaks, times "
        f"{_value(report['qlora-gc'], 'epoch_s') / _value(report['qlora'], 'epoch_s') - 1:.1%} apart. Ours, with\n"
        "what was seen by counting how often each layer ran:\n\n"
        + _table(("QLoRA on the H100", "checkpointing seen", "peak GiB", "GPU-busy ms a step"), rows)
    )


def _third(report: Mapping[str, Record], ours: Mapping[str, Record]) -> str:
    rows = (
        [
            words,
            f"{_value(ours[name], 'tokens_per_s'):.1f}",
            f"{_value(ours[name], 'busy_decode_token_s') * 1e3:.2f}",
            f"{_value(ours[name], 'busy_share'):.0%}",
        ]
        for _, words, name in _INFERENCE
    )
    half, plain, double = (expected_bytes(report[name].case)["weights_bytes"] / GiB for name, _, _ in _INFERENCE)
    return (
        '## 3. "INT4 is slower than FP16"\n'
        "At batch 1 eager `generate` waits for the host's launches. On the H100 the device works in a small share of a token's time, so tokens a second compare hosts and\n"
        "launch counts, not INT4 with FP16. (NF4's compute dtype is left at float32 here, as in the report.)\n\n"
        + _table(("on the H100", "tokens/s", "GPU-busy ms a decoded token", "share of wall time"), rows)
        + f"\n\nBytes say one thing more. NF4 weights of this model take {plain:.2f} GiB, which is more than the {_gib(report['int4'])} GiB reported as the peak; with double quantization they\n"
        f"take {double:.2f} GiB, and the peak is {_value(report['int4'], 'peak_bytes') / GiB - double:.2f} GiB above them, as FP16's is {_value(report['fp16'], 'peak_bytes') / GiB - half:.2f} GiB above its own. So that row was quantized twice, which the report does not say."
    )


def _device_bound(ours: Mapping[str, Record]) -> str:
    """Compare INT4 with FP16 in device-bound work, or name the baselines that are missing."""
    found = artefacts(ours)[2]
    awaited = [f"`{name}`" for name in found.missing]
    parts = []
    if rows := device_bound_rows(ours):
        parts += [
            "Where the device is what one waits for, in a prefill of many tokens at once:",
            _table(found.head, rows),
            *(f"* Refused: {reason}" for reason in found.refused),
            *_why_slow(ours),
        ]
    if awaited:
        parts.append(_AWAITED.format(missing=", ".join(awaited)))
    return "\n\n".join(parts)


def _why_slow(ours: Mapping[str, Record]) -> list[str]:
    """Return how much of NF4's slowdown its compute dtype causes, if all three cases have records."""
    names = ("generate-fp16-b32", "generate-nf4-b32", "generate-nf4-fp16-b32")
    if not set(names) <= set(ours):
        return []
    fp16, default, half = (_value(ours[name], "busy_prefill_s") for name in names)
    return [
        f"So what makes INT4 slow on a busy device is its compute dtype: left at float32, bitsandbytes' default, a prefill takes {default / fp16:.1f} times FP16's, "
        f"with float16 {half / fp16:.2f} times."
    ]


def _fourth(report: Mapping[str, Record]) -> str:
    full = report["full"]
    real, padded = _value(full, "tokens"), _value(full, "padded_tokens")
    return f"""## 4. Most of the fine-tuning was padding
The 4000 rows hold {real:,.0f} real tokens. Padded to 512 they are {real + padded:,.0f}, {padded / (real + padded):.1%} of it padding. The report does not say whether it padded so or to each batch's longest row, so none of its
epochs can be turned into tokens a second. Our throughput counts unpadded tokens, and padding is a number of its own."""


def _checkpointing(record: Record) -> str:
    fact = record.audit.get("checkpointing")
    return "not recorded" if fact is None else str(fact.seen)


def _state(record: Record) -> dict[str, int]:
    held = expected_bytes(record.case)
    return {name: held[name] for name in ("weights_bytes", "gradient_bytes", "optimizer_bytes")}


def _needed_rate(record: Record) -> float:
    """Return the least FLOP/s that a training record's numbers require."""
    workload = record.case.workload
    assert isinstance(workload, FinetuneSpec)
    floor = train_floor(record.case, positions_of(record, workload))
    assert floor is not None
    return floor.flops / _value(record, "step_s")


def _value(record: Record, name: str) -> float:
    return float(record.metrics[name].value)


def _gib(record: Record) -> str:
    return f"{_value(record, 'peak_bytes') / GiB:.2f}"
