"""What each switch of the tuned training engine brings: stock, each switch alone, and all, for LoRA, QLoRA and full fine-tuning.

    python bench/train_ablation.py                               # Llama-3.2-3B on one GPU, 4 x 512; a table and a JSON file
    python bench/train_ablation.py --methods lora --only stock,all
    python bench/train_ablation.py --shape tiny --device cpu     # the same on a CPU, without time on a device

Each row is a process of its own, forked from one that has imported torch and transformers, with a time limit of its own: what one breaks, its
traceback is kept and the others run. Losses of twenty steps stand against the stock row of the same method: same weights, batches and precision.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import statistics
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

_HERE = Path(__file__).resolve().parent.parent
if str(_HERE) not in sys.path:
    sys.path.insert(0, str(_HERE))

from hpc_core.cases import finetune, full, lora, qlora  # noqa: E402
from hpc_core.launch.by_nvml import gpus_by_nvml  # noqa: E402
from hpc_core.spec import Case, FinetuneSpec, ModelSpec  # noqa: E402

_ALL: dict[str, Any] = {"loss": "chunked", "fusion": "blocks", "graph": True}
SWITCHES: dict[str, dict[str, Any]] = {
    "stock": {},
    "all": _ALL,
    "tuned, no switch": {"engine": "tuned"},
    "loss": {"loss": "chunked"},
    "graph": {"graph": True},
    "linears": {"fusion": "linears"},
    "blocks": {"loss": "chunked", "fusion": "blocks"},
    "liger": {"fusion": "liger"},
    "liger+loss": {"fusion": "liger", "loss": "liger"},
    "liger+loss+graph": {"fusion": "liger", "loss": "chunked", "graph": True},
    "compile": {"compile": "layers"},
    "compile+loss+graph": {"compile": "layers", "loss": "chunked", "graph": True},
    "linears+compile+loss+graph": {"fusion": "linears", "compile": "layers", "loss": "chunked", "graph": True},
    "all, chunk 256": {**_ALL, "loss_chunk": 256},
    "all, chunk 1024": {**_ALL, "loss_chunk": 1024},
}
"""Rows by name, the most telling first. No switch: our own forward without a mask, and nothing else. Liger's own loss cannot
be captured, so the row with a graph has ours."""
_BUDGETS = {"lora": 9.4, "qlora": 4.5, "full": None}
_ADAPTER: dict[str, Any] = {"dropout": 0.0, "dtype": "bfloat16"}
_TRAJECTORY, _TIMED, _PROFILED = 20, 20, 5
_SHOWN_KERNELS = 25
_GIB = 1024**3


def cases(shape: str, methods: list[str], length: int, batch: int) -> dict[str, Case]:
    """Cases by "method: row"."""
    model = ModelSpec(shape=shape)
    known = {"lora": lora(**_ADAPTER), "qlora": qlora(**_ADAPTER), "full": full}
    found = {}
    for name in methods:
        rows = dict(SWITCHES)
        budget = _BUDGETS[name]
        if budget is not None and shape == "llama-3.2-3b":
            rows[f"all, {budget} GiB"] = {**_ALL, "budget_bytes": int(budget * _GIB)}
        for row, switches in rows.items():
            if name == "full" and "linears" in switches.values():
                continue  # there is no adapter
            engine = {} if row == "stock" else {"engine": "tuned"}
            variant = "row"
            found[f"{name}: {row}"] = finetune(
                model, known[name], variant=variant, batch=batch, length=length, steps=10, **{**engine, **switches}
            )
    return found


def measure(case: Case, device_name: str) -> dict[str, Any]:
    """One row: seconds, memory, kernels, losses, in this process."""
    import torch

    from hpc_core.build import build
    from hpc_core.engine.train import TunedProgram, training_program
    from hpc_core.measure.clock import quiet, seconds_of

    device = torch.device(device_name)
    assert isinstance(case.workload, FinetuneSpec)
    began = time.perf_counter()
    built = build(case, device)
    program = training_program(built, case, case.workload)
    found: dict[str, Any] = {"build_s": time.perf_counter() - began, "losses": [], "first_steps_s": []}
    first = max(program.first_steps, 1)
    for index in range(_TRAJECTORY):
        seconds = seconds_of(program.step, device)
        found["losses"].append(float(program.loss if program.loss is not None else "nan"))
        if index < first:
            found["first_steps_s"].append(seconds)
    found["first_use_s"] = sum(found["first_steps_s"])
    with quiet():
        samples = [seconds_of(program.step, device) for _ in range(_TIMED)]
        found["wall_ms"] = 1e3 * statistics.median(samples)
        found["wall_ms_queued"] = 1e3 * seconds_of(lambda: _steps(program, _TIMED), device) / _TIMED
    tuned = program if isinstance(program, TunedProgram) else None
    found["fallen"] = tuned.fallen if tuned else {}
    if tuned is not None and tuned.plan is not None:
        found["plan"] = [tuned.plan.attentions, tuned.plan.mlps, tuned.plan.peak_bytes]
    if device.type == "cuda":
        _on_gpu(found, program, tuned, device)
    return found


def _steps(program: Any, count: int) -> None:
    for _ in range(count):
        program.step()


def _on_gpu(found: dict[str, Any], program: Any, tuned: Any, device: Any) -> None:
    import torch

    from hpc_core.errors import MeasureError
    from hpc_core.measure.busy import device_activity

    if tuned is not None and tuned.captured is not None:
        found["peak_gib"] = tuned.captured.peak_bytes() / _GIB
        found["pool_gib"] = [each / _GIB for each in tuned.captured.pool_bytes()]
        found["capture_peak_gib"] = tuned.captured.capture_peak_bytes / _GIB
    else:
        torch.cuda.reset_peak_memory_stats()
        for _ in range(2):
            program.step()
        torch.cuda.synchronize()
        found["peak_gib"] = torch.cuda.max_memory_allocated() / _GIB
    try:
        activity = device_activity(lambda: _steps(program, _PROFILED), device)
    except MeasureError as error:
        found["busy_error"] = str(error)
        found["busy_ms"] = _busy_of_what_was_seen(program, device)
        return
    found["busy_ms"] = 1e3 * activity.busy_s / _PROFILED
    found["kernels"] = activity.kernels / _PROFILED
    found["synchronizations"] = activity.synchronizations
    top = sorted(activity.kernel_s.items(), key=lambda item: -item[1])[:_SHOWN_KERNELS]
    found["top_kernels"] = [
        [name[:90], 1e3 * seconds / _PROFILED, activity.kernel_counts[name] / _PROFILED] for name, seconds in top
    ]


def _busy_of_what_was_seen(program: Any, device: Any) -> float:
    """Busy milliseconds a step by whatever the profiler recorded, where its reading is not sound; the row says so."""
    from hpc_core.measure import busy

    seen, _ = busy._sort(busy._record(lambda: _steps(program, _PROFILED), device))
    return 1e3 * busy.union_s(one for one in seen if "spin_kernel" not in one.name) / _PROFILED


def run_in_child(case: Case, device: str, limit_s: float) -> dict[str, Any]:
    """The row by a forked process; one that breaks or takes too long gives its traceback, or says so."""
    with tempfile.NamedTemporaryFile(suffix=".json", delete=False) as file:
        path = Path(file.name)
    child = os.fork()
    if child == 0:
        code = 1
        with contextlib.suppress(BaseException):
            try:
                path.write_text(json.dumps(measure(case, device)))
                code = 0
            except BaseException:
                path.write_text(json.dumps({"error": traceback.format_exc()}))
        os._exit(code)
    deadline = time.monotonic() + limit_s
    while time.monotonic() < deadline:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            break
        time.sleep(0.05)
    else:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        path.unlink(missing_ok=True)
        return {"error": f"took more than {limit_s:.0f} s"}
    text = path.read_text()
    path.unlink(missing_ok=True)
    return dict(json.loads(text)) if text else {"error": f"the process ended with status {status} and said nothing"}


def _off(found: dict[str, Any], stock: dict[str, Any] | None) -> float | None:
    """The largest relative difference of the losses of twenty steps to the stock row's."""
    if stock is None or "losses" not in stock or "losses" not in found:
        return None
    pairs = zip(found["losses"], stock["losses"], strict=True)
    return float(max(abs(mine - theirs) / abs(theirs) for mine, theirs in pairs))


def lines(rows: dict[str, dict[str, Any]]) -> Iterator[str]:
    """The table, as Markdown."""
    columns = ("wall_ms", "wall_ms_queued", "busy_ms", "kernels", "peak_gib", "first_use_s", "loss_off")
    yield "| row | " + " | ".join(columns) + " | remarks |"
    yield "|---" * (len(columns) + 2) + "|"
    for name, found in rows.items():
        found["loss_off"] = _off(found, rows.get(f"{name.partition(':')[0]}: stock"))
        cells = [f"{found[each]:.4g}" if found.get(each) is not None else "" for each in columns]
        last = str(found.get("error", "")).strip().splitlines()
        remarks = [last[-1][:160] if last else "", str(found.get("fallen") or "")[:200], str(found.get("plan") or "")]
        remarks.append(str(found.get("busy_error", ""))[:160])
        yield f"| {name} | " + " | ".join(cells) + f" | {' '.join(each for each in remarks if each)} |"


def main() -> None:
    """Run the rows asked for, print the table after each, keep everything in a JSON file."""
    ask = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ask.add_argument("--methods", default="lora,qlora,full")
    ask.add_argument("--only", default="", help="rows by name, separated by commas with no space after them")
    ask.add_argument("--shape", default="llama-3.2-3b")
    ask.add_argument("--device", default="cuda")
    ask.add_argument("--no-cudnn-attention", action="store_true", help="leave attention to flash")
    ask.add_argument("--batch", type=int, default=4)
    ask.add_argument("--length", type=int, default=512)
    ask.add_argument("--limit-s", type=float, default=150.0, help="seconds a row may take")
    ask.add_argument("--total-s", type=float, default=1500.0, help="no row begins after so many seconds")
    ask.add_argument("--out", default="train-ablation.json")
    options = ask.parse_args()
    began = time.monotonic()
    with gpus_by_nvml():
        import torch  # imported once, for all children
        import transformers.models.llama.modeling_llama  # noqa: F401

    torch.backends.cuda.enable_cudnn_sdp(not options.no_cudnn_attention)  # inherited by every child
    chosen = cases(options.shape, options.methods.split(","), options.length, options.batch)
    # Names hold commas of their own ("all, 4.5 GiB"), always with a space.
    wanted = [each for each in options.only.replace(", ", "\0").split(",") if each]
    wanted = [each.replace("\0", ", ") for each in wanted]
    rows: dict[str, dict[str, Any]] = {}
    for name, case in chosen.items():
        if wanted and name.partition(": ")[2] not in wanted:
            continue
        if time.monotonic() - began > options.total_s:
            rows[name] = {"error": "not begun: the time was over"}
            continue
        start = time.monotonic()
        rows[name] = run_in_child(case, options.device, options.limit_s)
        table = list(lines(rows))
        sys.stdout.write(f"{table[-1]} ({time.monotonic() - start:.0f} s)\n")
        sys.stdout.flush()
        Path(options.out).write_text(json.dumps(rows, indent=1))
    sys.stdout.write("\n" + "\n".join(lines(rows)) + "\n")
    for name, found in rows.items():
        if "\n" in str(found.get("error", "")):
            sys.stdout.write(f"\n{name}\n{found['error'][-4000:]}\n")
    Path(options.out).write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
