"""Run a whole LoRA epoch of the original report's 4000 rows of WikiText-2 with the tuned engine on a fed, packed data path, and compare it with stock.

    python -m bench.studies.data_path.epoch                                    # Llama-3.2-3B's shape on one GPU; one line per row
    python -m bench.studies.data_path.epoch --only tuned-fed --out epoch.json
    python -m bench.studies.data_path.epoch --shape tiny --device cpu --batch 4 --length 64

Rows have the recorded lengths of WikiText-2's first 4000 rows (272,271 tokens) and random ids: no data set is needed, and time does not depend
on values. A packed epoch is all full blocks of 4 x 512 tokens. Time runs from the request for the first batch to the idle device after the
last step. Compiling, capturing, and returning the loader to the beginning of the epoch come before and are printed separately. Stock rows are
measured over `--stock-steps` steps and extrapolated to their epoch if that is longer; the line says so. Each row runs in its own process.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import json
import multiprocessing
import sys
import time
import traceback
from pathlib import Path
from typing import Any

from bench.studies.refusals import what_is_missing
from hpc_core.case.case import Case
from hpc_core.case.errors import SpecError
from hpc_core.case.parts import DataSpec, ModelSpec
from hpc_core.case.workloads import FinetuneSpec
from hpc_core.catalogue import finetune, lora
from hpc_core.launch.forkserver import gpus_by_nvml

ROWS = ("tuned-fed", "tuned-resident", "stock-packed", "stock-padded")
_EVERY_STEP = 1_000_000
"""More batches than any epoch here has, to select all of them."""
_TUNED: dict[str, Any] = {"engine": "tuned", "loss": "chunked", "fusion": "blocks", "graph": True}


def case_of(name: str, options: argparse.Namespace) -> Case:
    """Return the case of a row: model, adapter, rows and batch are equal; engine, feed and padding differ."""
    what: dict[str, Any] = {"packing": True}
    if name == "stock-padded":
        what = {"padding": "max_length"}
    if name.startswith("tuned"):
        what |= _TUNED
    case = finetune(
        ModelSpec(shape=options.shape),
        lora(dropout=0.0, dtype="bfloat16"),
        variant=f"lora-epoch-{name}",
        batch=options.batch,
        length=options.length,
        steps=_EVERY_STEP if name.startswith("tuned") else options.stock_steps,
        data=DataSpec(source="trace", name="wikitext2", rows=options.rows),
        **what,
    )
    if name != "tuned-fed":
        return case
    pinned = options.device == "cuda"
    return case.vary("lora-epoch-fed", way="loader", workers=options.workers, pinned=pinned, ahead=options.ahead)


def measure(case: Case, device_name: str) -> dict[str, Any]:
    """Measure one row in this process: first use, then an epoch, or as many of its steps as the case has."""
    import torch

    from hpc_core.builders.assemble import build
    from hpc_core.builders.data.loader import Fed
    from hpc_core.engines.tuned.program import training_program
    from hpc_core.instruments.clock import quiet, synchronize

    device = torch.device(device_name)
    if device_name == "cpu":
        torch.set_num_threads(1)
    assert isinstance(case.workload, FinetuneSpec)
    built = build(case, device)
    began = time.perf_counter()
    program = training_program(built, case, case.workload)
    data_s = time.perf_counter() - began
    began = time.perf_counter()
    _train(program, program.first_steps + 2)
    synchronize(device)
    first_use_s = time.perf_counter() - began
    count = len(program.batches)
    if isinstance(program.batches, Fed):
        # The loader is in the middle of a round; finishing it is not part of the epoch's time.
        program.batches.discard(-program.batches.next_index % count)
    if device_name == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    with quiet():
        began = time.perf_counter()
        program.go_to(0)
        losses = _train(program, count)
        synchronize(device)
        seconds = time.perf_counter() - began
    found = {
        "seconds": seconds,
        "steps": count,
        "tokens": program.tokens_of(count),
        "padded": program.padded_of(count),
        "epoch_steps": program.epoch.batches,
        "epoch_tokens": program.epoch.tokens,
        "epoch_padded": program.epoch.padded,
        "skipped": program.epoch.skipped,
        "data_s": data_s,
        "first_use_s": first_use_s,
        "losses": torch.stack(losses).tolist(),
        "fallen": getattr(program, "fallen", {}),
        "peak_gib": torch.cuda.max_memory_allocated(device) / 2**30 if device_name == "cuda" else None,
        "device": torch.cuda.get_device_name(device) if device_name == "cuda" else "cpu",
    }
    captured = getattr(program, "captured", None)
    if captured is not None:
        found["peak_gib"] = captured.peak_bytes() / 2**30
    if isinstance(program.batches, Fed):
        found["fetched"] = len(program.batches.observed.fetched_ns)
        found["waited_s"] = sum(stop - start for start, stop in program.batches.observed.fetched_ns) / 1e9
        found["data"] = program.batches.note
    program.batches.clear()
    return found


def _train(program: Any, count: int) -> list[Any]:
    """Run `count` steps and return the loss of each, still on the device."""
    losses = []
    for _ in range(count):
        program.step()
        losses.append(program.loss.clone())
    return losses


def line(name: str, found: dict[str, Any], options: argparse.Namespace) -> str:
    """Return a row as text."""
    if "error" in found:
        return f"{name}: {found['error'].strip().splitlines()[-1]}"
    # A padded batch without any next token takes as long as others. Training skips it, so add its time.
    steps, whole = found["steps"], found["epoch_steps"] + found["skipped"]
    found["epoch_s"] = found["seconds"] * whole / steps
    found["extrapolated"] = steps < whole
    way = f"extrapolated from {steps} steps to {whole:,}" if steps < whole else f"all {whole:,} steps run"
    places = found["epoch_tokens"] + found["epoch_padded"]
    text = (
        f"{name:15} epoch {found['epoch_s']:8.2f} s, {way} of {options.batch} x {options.length}; {found['epoch_tokens']:,} real tokens, "
        f"{found['epoch_tokens'] / found['epoch_s']:,.0f} a second; padding {found['epoch_padded'] / places:.0%}; "
        f"data ready in {found['data_s']:.2f} s, first use {found['first_use_s']:.1f} s; loss {found['losses'][0]:.4f} -> {found['losses'][-1]:.4f}"
    )
    if found["peak_gib"] is not None:
        text += f"; peak {found['peak_gib']:.2f} GiB"
    if "waited_s" in found:
        text += f"; the host waited {1e3 * found['waited_s']:.1f} ms for data; {found['data']}"
    return text + "".join(f"; {switch} {why}" for switch, why in found["fallen"].items())


def main() -> None:
    """Run the chosen rows, print each when it ends, and compare the tuned epoch with the stock ones."""
    ask = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ask.add_argument("--only", default=",".join(ROWS), help=f"rows, separated by commas: {', '.join(ROWS)}")
    ask.add_argument("--stock-steps", type=int, default=40, help="steps of stock that are measured")
    ask.add_argument("--rows", type=int, default=4000)
    ask.add_argument("--batch", type=int, default=4)
    ask.add_argument("--length", type=int, default=512)
    ask.add_argument("--workers", type=int, default=2)
    ask.add_argument("--ahead", type=int, default=2)
    ask.add_argument("--shape", default="llama-3.2-3b")
    ask.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    ask.add_argument("--limit-s", type=float, default=300.0, help="seconds a row may take")
    ask.add_argument("--out", default="", help="keep the rows as JSON")
    options = ask.parse_args()
    wanted = options.only.split(",")
    if unknown := [name for name in wanted if name not in ROWS]:
        ask.error(f"no row is called {', '.join(unknown)}; there are {', '.join(ROWS)}")
    try:
        cases = {name: case_of(name, options) for name in wanted}
    except SpecError as error:
        ask.error(str(error))
    if said := what_is_missing(options.device, options.out):
        ask.error(said)
    with gpus_by_nvml():
        import torch  # noqa: F401 - imported once, for all children
        import transformers.models.llama.modeling_llama  # noqa: F401

    rows: dict[str, dict[str, Any]] = {}
    for name in wanted:
        rows[name] = _in_child(cases[name], options)
        sys.stdout.write(f"{line(name, rows[name], options)}\n")
        sys.stdout.flush()
        if options.out:
            Path(options.out).write_text(json.dumps({"options": vars(options), "rows": rows}, indent=1))
    sys.stdout.write("".join(f"{text}\n" for text in _comparison(rows)))
    if any("error" in found for found in rows.values()):
        sys.exit(1)


def _in_child(case: Case, options: argparse.Namespace) -> dict[str, Any]:
    # Not a daemon: the loader starts its own processes.
    context = multiprocessing.get_context("fork")
    pool = concurrent.futures.ProcessPoolExecutor(max_workers=1, mp_context=context)
    try:
        return dict(pool.submit(measure, case, options.device).result(timeout=options.limit_s))
    except concurrent.futures.TimeoutError:
        for process in list(pool._processes.values()):
            process.kill()
        return {"error": f"took more than {options.limit_s:.0f} s"}
    except Exception:
        sys.stderr.write(traceback.format_exc())  # the other rows still run; the exit code reports the failure
        return {"error": traceback.format_exc()}
    finally:
        pool.shutdown(wait=True)


def _comparison(rows: dict[str, dict[str, Any]]) -> list[str]:
    """Return lines that compare the rows."""
    fed = rows.get("tuned-fed", {})
    texts = []
    for name, found in rows.items():
        if name != "tuned-fed" and "epoch_s" in fed and "epoch_s" in found:
            texts.append(f"tuned-fed takes {fed['epoch_s'] / found['epoch_s']:.3f} of {name}'s time")
    resident = rows.get("tuned-resident", {})
    if "losses" in fed and "losses" in resident:
        off = max(abs(mine - other) / abs(other) for mine, other in zip(fed["losses"], resident["losses"], strict=True))
        texts.append(f"losses of the whole epoch, fed and resident: at most {off:.2g} apart, relatively")
    return texts


if __name__ == "__main__":
    main()
