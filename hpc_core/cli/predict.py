"""`hpc-core predict …`: predict what a case takes on a GPU that is not here: one case, a sweep, or the largest that fits."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated, Any

import typer

from hpc_core.case.case import Case
from hpc_core.case.errors import PredictError, SpecError
from hpc_core.case.workloads import FinetuneSpec, GenerateSpec
from hpc_core.cli.console import say, say_encoded, tell
from hpc_core.cli.fitting import largest_fitting
from hpc_core.cli.inputs import (
    Files,
    Method,
    case_of_model,
    context_length,
    known_case,
    parse_bytes,
    parse_changes,
    parse_sweep,
    with_changes,
)
from hpc_core.gate.exit_code import ExitCode
from hpc_core.launch.launcher import Launcher
from hpc_core.launch.predictions import predicting_launcher, prediction, why_not
from hpc_core.record import units as sizes
from hpc_core.record.files import read_record
from hpc_core.record.gpus import DEFAULT, GPUS, Gpu, gpu_named, with_memory
from hpc_core.record.record import Record, record_to_json
from hpc_core.report.pictures import check_picture, write_memory
from hpc_core.report.predictions import fits, prediction_block, sweep_table

_MOST = 4096
"""The largest value that --fit tries, unless the model's context is shorter."""
_LONGEST = 1 << 20
_FITTED = {"finetune": ("batch", "length"), "generate": ("batch", "prompt_length", "new_tokens")}
"""Fields with which memory grows, by kind of case."""
_LENGTHS = ("length", "prompt_length", "new_tokens")
_MARGIN_IS = "for the CUDA context (about 0.5 GiB) and for fragmentation, which the prediction does not include"


def predict(
    case: Annotated[str | None, typer.Argument(help="A full id, such as llama-3.2-3b/qlora; or use --model.")] = None,
    model: Annotated[
        str | None, typer.Option(help="Instead of a case: a folder with a config.json, such a file, or a hub id.")
    ] = None,
    method: Annotated[Method | None, typer.Option(help="What to do with --model; lora by default.")] = None,
    batch: Annotated[int | None, typer.Option(help="Short for --set batch=N.")] = None,
    length: Annotated[
        int | None, typer.Option(help="Short for --set length=N, or prompt_length=N for generation.")
    ] = None,
    gpu: Annotated[str, typer.Option(help=f"The GPU: {', '.join(GPUS)}, or an unambiguous part of a name.")] = DEFAULT,
    memory: Annotated[
        str | None,
        typer.Option(help="The card's memory, such as 24GiB, for one that is not listed: else by the rules of --gpu."),
    ] = None,
    changes: Annotated[
        list[str] | None, typer.Option("--set", help="Change a field: --set batch=8; repeatable.")
    ] = None,
    sweep: Annotated[str | None, typer.Option(help="Predict one row per value: --sweep batch=1,2,4,8.")] = None,
    fit: Annotated[str | None, typer.Option(help="Find the largest batch or length that fits the card.")] = None,
    margin: Annotated[str, typer.Option(help=f"Memory of the card to keep free, {_MARGIN_IS}.")] = "1GiB",
    plot: Annotated[
        Path | None, typer.Option(help="Write a chart of memory over the step: .svg, .png or .pdf.")
    ] = None,
    over: Annotated[
        Path | None,
        typer.Option(help="With --plot: a record to draw over the prediction, such as one by run --timeline --json."),
    ] = None,
    memory_only: Annotated[
        bool, typer.Option("--memory-only", help="Predict memory alone, in a fraction of the time; --fit always does.")
    ] = False,
    timeline: Annotated[bool, typer.Option("--timeline", help="Store memory over the step in the record.")] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the record as JSON; for a sweep, one per line.")
    ] = False,
    cases: Files = None,
) -> None:
    """Predict memory, FLOPs and kernels of a case on a GPU, without one. Exit code 1: does not fit or invalid, 11: broken."""
    if sweep is not None and fit is not None:
        raise SpecError("--sweep and --fit cannot be combined. Drop one of them.")
    drawn = _drawing(plot, over, alone=sweep is None and fit is None)
    size = None if memory is None else parse_bytes("--memory", memory)
    card, kept = with_memory(gpu_named(gpu), size), parse_bytes("--margin", margin)
    if kept >= card.memory_bytes:
        raise SpecError(f"--margin {margin} leaves nothing of {card.name}'s {_bytes(card.memory_bytes)}.")
    base = _base(case, model, method, cases)
    changed_case = with_changes(base, _short(base, batch, length, parse_changes(changes or [])))
    if sweep is not None:
        _sweep(changed_case, sweep, gpu, card, kept, memory_only=memory_only, as_json=as_json)
    elif fit is not None:
        _fit(changed_case, fit, gpu, card, kept, as_json=as_json)
    else:
        with predicting_launcher() as launcher:
            record = prediction(
                launcher,
                changed_case,
                gpu=gpu,
                memory_bytes=size,
                timeline=timeline or plot is not None,
                memory_only=memory_only,
            )
        if plot is not None:
            write_memory(_sound(record), plot, drawn)
        _one(record, kept, as_json=as_json)


def _drawing(plot: Path | None, over: Path | None, *, alone: bool) -> Record | None:
    """Return the record to draw over the plot, if any. All errors are found before anything is predicted.

    Raises:
        SpecError: several predictions, a record without a plot, or a record that is missing or has no timeline.
        MissingLibraryError: Altair or vl-convert is not installed.
    """
    if plot is None:
        if over is not None:
            raise SpecError("--over draws over a plot: add --plot memory.svg.")
        return None
    if not alone:
        raise SpecError("--plot draws one prediction: drop --sweep and --fit.")
    check_picture(plot)
    record = None if over is None else read_record(over)
    if record is not None and record.timeline is None:
        raise SpecError(f"{over} has no timeline: make one with hpc-core run CASE --timeline --json.")
    return record


def _base(case: str | None, model: str | None, method: Method | None, files: list[Path] | None) -> Case:
    """Return the case to predict, before any change.

    Raises:
        SpecError: neither a case nor a model is given, or both are.
    """
    if (case is None) == (model is None):
        raise SpecError("Give either a case, such as tiny/lora (hpc-core cases lists them), or --model PATH_OR_HUB_ID.")
    if model is not None:
        return case_of_model(model, method or "lora")
    if method is not None:
        raise SpecError(f"--method needs --model; {case} has its own method.")
    assert case is not None
    return known_case(case, files)


def _short(case: Case, batch: int | None, length: int | None, changes: dict[str, Any]) -> dict[str, Any]:
    """Return the changes, with those of --batch and --length.

    Raises:
        SpecError: a field is given twice.
    """
    name = "prompt_length" if case.kind == "generate" else "length"
    short = {field: value for field, value in (("batch", batch), (name, length)) if value is not None}
    if twice := [field for field in short if field in changes]:
        raise SpecError(f"{twice[0]} is given twice: by its own option and by --set.")
    return short | changes


def _one(record: Record, kept: int, *, as_json: bool) -> None:
    if as_json:
        say_encoded(record_to_json(record, indent=2))
        if record.failure is not None:
            raise typer.Exit(ExitCode.BROKEN)
    else:
        _sound(record)
        say(prediction_block(record, kept))
    if record.status == "invalid" or not fits(record, kept):
        raise typer.Exit(ExitCode.FAILED)


def _sound(record: Record) -> Record:
    """Return the record if the prediction succeeded.

    Raises:
        PredictError: it failed; the message says why.
    """
    if record.failure is not None:
        raise PredictError(why_not(record))
    return record


def _sweep(case: Case, text: str, gpu: str, card: Gpu, kept: int, *, memory_only: bool, as_json: bool) -> None:
    field, values = parse_sweep(text)
    varied = [
        (str(value), with_changes(case, {field: value})) for value in values
    ]  # all errors come before the first prediction
    rows = []
    with predicting_launcher(several=len(varied) > 1) as launcher:
        for value, each in varied:
            rows.append((value, _reported(f"{field}={value}", launcher, each, gpu, card, memory_only=memory_only)))
    if as_json:
        for _, record in rows:
            say_encoded(record_to_json(record))
    else:
        say(f"{case.id} on one {card.name}, predicted; left: beyond the margin of {_bytes(kept)}")
        say(sweep_table(field, rows, kept))
    if any(record.failure is not None for _, record in rows):
        raise typer.Exit(ExitCode.BROKEN)
    if any(record.status == "invalid" for _, record in rows):
        raise typer.Exit(ExitCode.FAILED)


def _fit(case: Case, name: str, gpu: str, card: Gpu, kept: int, *, as_json: bool) -> None:
    field = _field_to_fit(case, name)
    room = card.memory_bytes - kept
    records: dict[int, Record] = {}
    began = time.monotonic()
    with predicting_launcher(several=True) as launcher:

        def peak_of(value: int) -> int:
            each = with_changes(case, {field: value})
            record = _sound(_reported(f"{field}={value}", launcher, each, gpu, card, memory_only=True))
            records[value] = record
            return int(record.metrics["peak_bytes"].value)

        start = getattr(case.workload, field)
        most = _most(case, field)
        least = 1 if field in ("batch", "prompt_length") else 2
        search = largest_fitting(peak_of, room, start=start, least=least, most=most, name=field)
    best = search.fitting
    if best is None:
        worst = min(search.peaks)
        raise PredictError(
            f"{case.id} does not fit one {card.name} with any {field}: {field}={worst} takes {_bytes(search.peaks[worst])}, "
            f"and {_bytes(room)} are left by the margin of {_bytes(kept)}."
        )
    if as_json:
        say_encoded(record_to_json(records[best], indent=2))
        return
    beyond = search.beyond
    end = (
        f"{field}={beyond} would take {_bytes(search.peaks[beyond])}"
        if beyond is not None
        else f"no more than {most} was tried"
    )
    say(f"largest {field} that fits: {best} ({end}; {len(search.peaks)} predictions, {time.monotonic() - began:.0f} s)")
    say(f"kept free: {_bytes(kept)} of {_bytes(room + kept)} {_MARGIN_IS} (--margin)")
    say(prediction_block(records[best], kept))


def _field_to_fit(case: Case, name: str) -> str:
    """Return the workload's field of this name; "length" is the prompt's length for generation.

    Raises:
        SpecError: memory need not grow with this field, or the data bounds it.
    """
    known = _FITTED.get(case.kind, ())
    field = "prompt_length" if name == "length" and "prompt_length" in known else name
    if field not in known:
        names = ", ".join(known) or "none: it is a callable"
        raise SpecError(f"--fit {name}: memory need not grow with it. Fields of {case.id} that can be fitted: {names}.")
    workload = case.workload
    assert isinstance(workload, FinetuneSpec | GenerateSpec)
    bounded = isinstance(workload, FinetuneSpec) and workload.padding == "longest" and field == "length"
    if getattr(workload, field) is None or bounded:
        raise SpecError(
            f"--fit {name}: the rows of {workload.data.name} have their own lengths. Fit the batch, or use random rows: "
            f"a case with data=DataSpec()."
        )
    return field


def _most(case: Case, field: str) -> int:
    """Return the largest value to try: for a length, the model's context if it is known."""
    if field not in _LENGTHS:
        return _MOST
    assert case.model is not None
    shape = case.model.sizes
    return (context_length(case.model) or _LONGEST) if shape is None else shape.max_position_embeddings


def _reported(what: str, launcher: Launcher, case: Case, gpu: str, card: Gpu, *, memory_only: bool) -> Record:
    """Make one prediction of several, and report it on stderr, since each takes seconds."""
    began = time.monotonic()
    record = prediction(launcher, case, gpu=gpu, memory_bytes=card.memory_bytes, memory_only=memory_only)
    peak = record.metrics.get("peak_bytes")
    tell(f"{what}: {'failed' if peak is None else _bytes(int(peak.value))} ({time.monotonic() - began:.0f} s)")
    return record


def _bytes(value: int) -> str:
    return sizes.quantity(value, "bytes")
