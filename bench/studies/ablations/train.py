"""Measure what each switch of the tuned training engine contributes, for LoRA, QLoRA and full fine-tuning: alone, step by step, and all together.

    python -m bench.studies.ablations.train                               # Llama-3.2-3B on one GPU, 4 x 512; a table and a JSON file
    python -m bench.studies.ablations.train --methods qlora --steps       # the rows of the picture: stock, one more change in each, all
    python -m bench.studies.ablations.train --methods lora --only stock,all
    python -m bench.studies.ablations.train --shape tiny --device cpu     # the same on a CPU, without device times

Each row runs in its own process with its own time limit, forked from one that has imported torch and transformers. If a row fails, its
traceback is kept and the others run. Losses of twenty steps are compared with the stock row of the same method: same weights, batches and
precision.
"""

from __future__ import annotations

import argparse
import statistics
import time
from typing import Any

from bench.studies.ablations.rows import (
    Rows,
    chosen_cases,
    options_of,
    run_rows,
)
from hpc_core.case.case import Case
from hpc_core.case.parts import ModelSpec
from hpc_core.case.workloads import FinetuneSpec
from hpc_core.catalogue import (
    finetune,
    full,
    lora,
    qlora,
)
from hpc_core.launch.forkserver import gpus_by_nvml

_ALL: dict[str, Any] = {"loss": "chunked", "fusion": "blocks", "graph": True}
SWITCHES: dict[str, dict[str, Any]] = {
    "stock": {},
    "all": _ALL,
    "tuned, no switch": {"engine": "tuned"},
    "loss": {"loss": "chunked"},
    "loss+linears": {"loss": "chunked", "fusion": "linears"},
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
"""Rows by name, the most informative first. "No switch" is our own forward without a mask. Liger's own loss cannot be captured,
so the row with a graph has ours."""
_IN_BACKWARD = "all, update in the backward"
_BUDGETS = {"lora": 9.5, "qlora": 4.5, "full": None}
STEPS = {
    "stock": "stock",
    "tuned, no switch": "+ own loop, no mask",
    "loss": "+ chunked loss",
    "loss+linears": "+ linears fused with adapters",
    "blocks": "+ fused blocks",
    "all": "+ one CUDA graph a step",
}
"""From stock to tuned: each row adds one change to the row before; the values are labels of the picture. Fused blocks include fused linears."""
_TITLES = {"lora": "LoRA", "qlora": "QLoRA", "full": "full fine-tuning"}
_COLUMNS = ("wall_ms", "wall_ms_queued", "busy_ms", "kernels", "peak_gib", "first_use_s", "loss_off")
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
        if _has_budget(name, shape):
            rows[_budget_row(name)] = {**_ALL, "budget_bytes": int((_BUDGETS[name] or 0) * _GIB)}
        if name == "full":
            rows[_IN_BACKWARD] = {**_ALL, "optimizer_in_backward": True}
        for row, switches in rows.items():
            if name == "full" and "linears" in switches.values():
                continue  # there is no adapter
            engine = {} if row == "stock" else {"engine": "tuned"}
            variant = "row"
            found[f"{name}: {row}"] = finetune(
                model, known[name], variant=variant, batch=batch, length=length, steps=10, **{**engine, **switches}
            )
    return found


def steps(shape: str, methods: list[str], length: int, batch: int) -> dict[str, dict[str, Any]]:
    """For the picture: by method, its title and the labels of its rows from stock to tuned, the budget last."""
    found: dict[str, dict[str, Any]] = {}
    for name in methods:
        labels = {f"{name}: {row}": label for row, label in STEPS.items() if not (name == "full" and "linears" in row)}
        if _has_budget(name, shape):
            labels[f"{name}: {_budget_row(name)}"] = f"+ a budget of {_BUDGETS[name]} GiB"
        if name == "full":
            labels[f"{name}: {_IN_BACKWARD}"] = "+ AdamW in the backward"
        title = f"{_TITLES[name]} of {shape}, {batch} x {length} tokens a step"
        found[name] = {"title": title, "per": "step", "rows": labels}
    return found


def _has_budget(method: str, shape: str) -> bool:
    return _BUDGETS[method] is not None and shape == "llama-3.2-3b"


def _budget_row(method: str) -> str:
    return f"all, {_BUDGETS[method]} GiB"


def measure(case: Case, device_name: str) -> dict[str, Any]:
    """Measure one row in this process: seconds, memory, kernels, losses."""
    import torch

    from hpc_core.builders.assemble import build
    from hpc_core.engines.tuned.program import TunedProgram, training_program
    from hpc_core.instruments.clock import quiet, seconds_of

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

    from hpc_core.case.errors import MeasureError
    from hpc_core.instruments.kernels import device_activity

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
        found["busy_ms"] = _incomplete_busy_ms(program, device)
        return
    found["busy_ms"] = 1e3 * activity.busy_s / _PROFILED
    found["kernels"] = activity.kernels / _PROFILED
    found["synchronizations"] = activity.synchronizations
    top = sorted(activity.kernel_s.items(), key=lambda item: -item[1])[:_SHOWN_KERNELS]
    found["top_kernels"] = [
        [name[:90], 1e3 * seconds / _PROFILED, activity.kernel_counts[name] / _PROFILED] for name, seconds in top
    ]


def _incomplete_busy_ms(program: Any, device: Any) -> float:
    """Return the busy milliseconds per step from an incomplete reading of the profiler."""
    from hpc_core.instruments import kernels

    intervals, _ = kernels.sorted_events(kernels.recorded(lambda: _steps(program, _PROFILED), device))
    return 1e3 * kernels.union_s(one for one in intervals if "spin_kernel" not in one.name) / _PROFILED


def _off(found: dict[str, Any], stock: dict[str, Any] | None) -> float | None:
    """Return the largest relative difference of the losses of twenty steps from the stock row's."""
    if stock is None or "losses" not in stock or "losses" not in found:
        return None
    pairs = zip(found["losses"], stock["losses"], strict=True)
    return float(max(abs(mine - theirs) / abs(theirs) for mine, theirs in pairs))


def losses_against_stock(rows: Rows) -> None:
    """Store the distance of each row's losses from those of its method's stock row in `loss_off`."""
    for name, found in rows.items():
        found["loss_off"] = _off(found, rows.get(f"{name.partition(':')[0]}: stock"))


def main() -> None:
    """Run the chosen rows."""
    ask = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ask.add_argument("--methods", default="lora,qlora,full")
    ask.add_argument("--no-cudnn-attention", action="store_true", help="leave attention to flash")
    ask.add_argument("--batch", type=int, default=4)
    ask.add_argument("--length", type=int, default=512)
    options = options_of(ask, out="train-ablation.json", limit_s=150.0).parse_args()
    what = options.shape, options.methods.split(","), options.length, options.batch
    chosen = chosen_cases(ask, lambda: cases(*what), what[1], tuple(_BUDGETS), "--methods")
    with gpus_by_nvml():
        import torch  # imported once, for all children
        import transformers.models.llama.modeling_llama  # noqa: F401

    torch.backends.cuda.enable_cudnn_sdp(not options.no_cudnn_attention)  # inherited by every child
    run_rows(chosen, measure, options, columns=_COLUMNS, steps=steps(*what), finish=losses_against_stock)


if __name__ == "__main__":
    main()
