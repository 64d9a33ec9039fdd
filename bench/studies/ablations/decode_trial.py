"""Compare stock and engine on a GPU in one process: `python -m bench.studies.ablations.decode_trial [--shape S] [--only GLOB] [--layers N]`.

For developing kernels, not for verdicts: cases in `bench/` are measured in separate processes. Prints one line of JSON per configuration
at once. If a configuration fails, its traceback is printed and the next one runs.
"""

from __future__ import annotations

import argparse
import fnmatch
import gc
import json
import sys
import time
import traceback
from collections.abc import Iterator
from typing import Any

import torch

from hpc_core.builders.assemble import Built, build
from hpc_core.case.parts import ModelSpec, QuantSpec
from hpc_core.case.workloads import GenerateSpec
from hpc_core.catalogue import generate
from hpc_core.engines.decode.program import GraphProgram, graph_program
from hpc_core.engines.generate import GenerateProgram, generate_program
from hpc_core.instruments.clock import quiet, seconds_of
from hpc_core.instruments.kernels import device_activity

_PROMPT, _NEW, _BUSY = 100, 128, 16
_QUERIES = 3
_CHECKED = 32
"""Tokens whose logits are compared with the stock forward's."""
_TOP = 8
_NF4 = QuantSpec(kind="nf4", compute_dtype="bfloat16")
_INT4 = QuantSpec(kind="int4", compute_dtype="bfloat16")
CONFIGURATIONS: dict[str, tuple[QuantSpec | None, dict[str, Any]]] = {
    "bf16/graph": (None, {"engine": "graph"}),
    "bf16/graph-int8-head": (None, {"engine": "graph", "head": "int8"}),
    "bf16/graph-late": (None, {"engine": "graph"}),
    "bf16/graph-torch": (None, {"engine": "graph", "kernels": "torch"}),
    "bf16/graph-b16": (None, {"engine": "graph", "batch": 16}),
    "bf16/stock": (None, {}),
    "bf16/stock-b16": (None, {"batch": 16}),
    "bf16/graph-inductor": (None, {"engine": "graph", "kernels": "inductor"}),
    "nf4/graph": (_NF4, {"engine": "graph"}),
    "nf4/graph-int8-head": (_NF4, {"engine": "graph", "head": "int8"}),
    "nf4/graph-torch": (_NF4, {"engine": "graph", "kernels": "torch"}),
    "nf4/graph-b16": (_NF4, {"engine": "graph", "batch": 16}),
    "nf4/stock": (_NF4, {}),
    "nf4/stock-b16": (_NF4, {"batch": 16}),
    "int4/graph-torch": (_INT4, {"engine": "graph", "kernels": "torch"}),
    "int4/graph-inductor": (_INT4, {"engine": "graph", "kernels": "inductor"}),
    "int4/stock": (_INT4, {}),
}
"""By name: quantization, and the differences from a stock query of one prompt. "late" is without programmatic dependent launch."""


def main(arguments: list[str] | None = None) -> int:
    """Run the chosen configurations; return 1 if one failed."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.studies.ablations.decode_trial", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--shape", default="llama-3.2-3b")
    parser.add_argument("--layers", type=int, default=None, help="only so many layers of the shape")
    parser.add_argument(
        "--only", action="append", default=[], metavar="GLOB", help="configurations; may be given again"
    )
    chosen = parser.parse_args(arguments)
    names = [
        name
        for name in CONFIGURATIONS
        if not chosen.only or any(fnmatch.fnmatchcase(name, glob) for glob in chosen.only)
    ]
    if not names:
        parser.error(f"--only matches none of {', '.join(CONFIGURATIONS)}")
    if not torch.cuda.is_available():
        parser.error("this trial needs a CUDA GPU")
    failed = 0
    for precision in ("bf16", "nf4", "int4"):
        here = [name for name in names if name.startswith(f"{precision}/")]
        if here:
            failed += _of_one_model(here, ModelSpec(shape=chosen.shape, layers=chosen.layers))
    return int(failed > 0)


def _of_one_model(names: list[str], model: ModelSpec) -> int:
    failed = 0
    quantization = CONFIGURATIONS[names[0]][0]
    try:
        built = build(generate(model, quantization=quantization), torch.device("cuda", 0))
    except Exception:  # print the traceback and go on; the exit code reports the failure
        _say({"name": names[0].partition("/")[0], "failed": traceback.format_exc()[-1500:]})
        return 1
    for name in names:
        began = time.perf_counter()
        try:
            seen = dict(seen_of(built, _workload(name), late=name.endswith("-late")))
        except Exception:  # as above, for one configuration
            failed += 1
            seen = {"failed": traceback.format_exc()[-2500:]}
        gc.collect()
        torch.cuda.empty_cache()
        _say({"name": name, **seen, "took_s": round(time.perf_counter() - began, 1)})
    return failed


def _workload(name: str) -> GenerateSpec:
    return GenerateSpec(prompts=1, prompt_length=_PROMPT, new_tokens=_NEW, **CONFIGURATIONS[name][1])


def seen_of(built: Built, workload: GenerateSpec, *, late: bool = False) -> Iterator[tuple[str, Any]]:
    """Yield the numbers of one configuration of one prompt, wall time first. "late" is without programmatic dependent launch."""
    new = workload.new_tokens
    program = _program(built, workload, late=late)
    if isinstance(program, GraphProgram):
        yield "first_use_s", {key: round(value, 1) for key, value in program.first_use_s.items()}
        yield "blocks", program.chosen_blocks
        yield "pool_bytes", program.hidden_bytes
    yield "warm_up_s", [round(seconds_of(program.step, program.device), 2) for _ in range(2)]
    on_gpu = program.device.type == "cuda"
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    with quiet():
        queries = [seconds_of(program.step, program.device) for _ in range(_QUERIES)]
    if on_gpu:
        yield "peak_gib", round((torch.cuda.max_memory_allocated() + program.hidden_bytes) / 2**30, 3)
    program.new_tokens = 1
    first = min(seconds_of(program.step, program.device) for _ in range(_QUERIES))
    program.new_tokens = new
    yield "first_token_ms", round(first * 1e3, 2)
    token_s = (min(queries) - first) / (new - 1)
    yield "token_ms", round(token_s * 1e3, 4)
    yield "tokens_per_s", round(workload.batch / token_s, 1)
    if isinstance(program, GraphProgram):
        yield from _compared_with_stock(program, built).items()
    if on_gpu:  # last, because the profiler may fail
        yield from _busy(program).items()


def _program(built: Built, workload: GenerateSpec, *, late: bool) -> GenerateProgram:
    if workload.engine == "stock":
        return generate_program(built, workload)
    if not late:
        return graph_program(built, workload)
    from hpc_core.engines.decode import kernel_step

    begins, kernel_step._early_launches = kernel_step._early_launches, lambda device, batch: "none"
    try:
        return graph_program(built, workload)
    finally:
        kernel_step._early_launches = begins


def _busy(program: GenerateProgram) -> dict[str, Any]:
    """Return the device time of a token and of its kernels, in microseconds per token."""
    activities = []
    for new in (1, 1 + _BUSY):
        program.new_tokens = new
        program.step()
        activities.append(device_activity(program.step, program.device))
    program.new_tokens = program.workload.new_tokens
    less, more = activities
    spent = {kernel: seconds - less.kernel_s.get(kernel, 0.0) for kernel, seconds in more.kernel_s.items()}
    top = sorted(spent, key=lambda kernel: -spent[kernel])[:_TOP]
    return {
        "busy_token_ms": round((more.busy_s - less.busy_s) / _BUSY * 1e3, 4),
        "kernels_a_token": round((more.kernels - less.kernels) / _BUSY, 1),
        "kernels_us": {kernel[:60]: round(spent[kernel] / _BUSY * 1e6, 1) for kernel in top},
    }


def _compared_with_stock(program: GraphProgram, built: Built) -> dict[str, Any]:
    """Compare greedy tokens and logits with those of the stock path in the same precision."""
    program.steps_done = 0
    program.step()
    answers = torch.tensor(program.answer_ids(), device=program.device)
    ids = program.inputs[0]["input_ids"]
    found: dict[str, Any] = {}
    if program.workload.batch == 1:
        like = program.workload
        told = GenerateSpec(prompts=1, prompt_length=like.prompt_length, new_tokens=like.new_tokens)
        stock = generate_program(built, told)
        stock.step()
        same = [a == b for a, b in zip(answers[0].tolist(), stock.answer_ids()[0], strict=True)]
        found["equal_tokens_first"] = same.index(False) if False in same else len(same)
        found["different_answers"] = len(set(answers[0].tolist()))
    # Random tokens: a model with random weights would repeat one.
    rows = min(2, len(answers))
    draw = torch.Generator().manual_seed(1)
    given = torch.randint(3, built.vocab_size, (len(answers), _CHECKED), generator=draw).to(program.device)
    engine = program.logits_after(0, given, rows)
    with torch.no_grad():
        whole: torch.Tensor = built.model(
            input_ids=torch.cat([ids, given[:, :-1]], dim=1)[:rows], use_cache=False
        ).logits
    forward = whole[:, ids.shape[1] - 1 :].float()
    errors = (engine - forward).norm(dim=(0, 2)) / forward.norm(dim=(0, 2))
    found["logits_error_to_stock"] = float(f"{float(errors.max()):.3g}")
    found["same_best_token"] = round(float((forward.argmax(-1) == engine.argmax(-1)).float().mean()), 3)
    return found


def _say(found: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps(found) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
