"""Measure what each part of the graph engine contributes to decoding: a graph, our kernels, an int8 head; in bfloat16 and NF4.

    python -m bench.studies.ablations.decode                              # Llama-3.2-3B on one GPU, one prompt of 100 tokens, 128 new ones
    python -m bench.studies.ablations.decode --weights nf4 --steps        # the rows of the picture: stock, then one more change in each

Each row runs in its own process with its own time limit, forked from one that has imported torch and transformers. If a row fails, its
traceback is kept and the others run. Times are per decoded token, without the prefill. An engine row also compares its logits with the stock
forward's on the same tokens.
"""

from __future__ import annotations

import argparse
from typing import Any

from bench.studies.ablations.rows import chosen_cases, options_of, run_rows
from hpc_core.case.case import Case
from hpc_core.case.parts import ModelSpec, QuantSpec
from hpc_core.case.workloads import GenerateSpec
from hpc_core.catalogue import generate
from hpc_core.launch.forkserver import gpus_by_nvml

_WEIGHTS = {"bf16": None, "nf4": QuantSpec(kind="nf4", compute_dtype="bfloat16")}
ROWS: dict[str, dict[str, Any]] = {
    "stock": {},
    "graph, torch": {"engine": "graph", "kernels": "torch"},
    "graph": {"engine": "graph"},
    "graph, int8 head": {"engine": "graph", "head": "int8"},
    "graph, inductor": {"engine": "graph", "kernels": "inductor"},
}
STEPS = {
    "stock": "stock",
    "graph, torch": "+ one CUDA graph a token",
    "graph": "+ own kernels",
    "graph, int8 head": "+ head in int8",
}
"""From stock to tuned: each row adds one change to the row before; the values are labels of the picture."""
_TITLES = {"bf16": "bfloat16", "nf4": "NF4"}
_COLUMNS = ("wall_ms", "tokens_per_s", "busy_ms", "kernels", "peak_gib", "first_use_s", "logits_error_to_stock")
_PROMPT, _NEW = 100, 128


def cases(shape: str, weights: list[str], batch: int) -> dict[str, Case]:
    """Cases by "weights: row"; Inductor compiles plain weights only."""
    model = ModelSpec(shape=shape)
    return {
        f"{name}: {row}": generate(
            model,
            variant="row",
            quantization=_WEIGHTS[name],
            prompts=1,
            prompt_length=_PROMPT,
            new_tokens=_NEW,
            batch=batch,
            **told,
        )
        for name in weights
        for row, told in ROWS.items()
        if not (name == "nf4" and told.get("kernels") == "inductor")
    }


def steps(shape: str, weights: list[str], batch: int) -> dict[str, dict[str, Any]]:
    """For the picture: by kind of weights, its title and the labels of its rows from stock to tuned."""
    return {
        name: {
            "title": f"Decoding {shape}, {_TITLES[name]}, batch {batch}",
            "per": "token",
            "rows": {f"{name}: {row}": label for row, label in STEPS.items()},
        }
        for name in weights
    }


def measure(case: Case, device_name: str) -> dict[str, Any]:
    """Measure one row in this process: seconds of a token, memory, kernels, logits."""
    import torch

    from bench.studies.ablations.decode_trial import seen_of
    from hpc_core.builders.assemble import build
    from hpc_core.case.errors import MeasureError

    assert isinstance(case.workload, GenerateSpec)
    seen: dict[str, Any] = {}
    void = ""
    numbers = seen_of(build(case, torch.device(device_name)), case.workload)
    try:
        for name, value in numbers:  # one by one, to keep what was measured before the profiler fails
            seen[name] = value
    except MeasureError as error:
        void = str(error)
    return row_of(seen, void)


def row_of(seen: dict[str, Any], void: str = "") -> dict[str, Any]:
    """Return the values of `decode_trial` under the names of an ablation's rows; milliseconds and kernels are per token."""
    names = {
        "token_ms": "wall_ms",
        "tokens_per_s": "tokens_per_s",
        "busy_token_ms": "busy_ms",
        "kernels_a_token": "kernels",
        "peak_gib": "peak_gib",
        "first_token_ms": "first_token_ms",
        "logits_error_to_stock": "logits_error_to_stock",
        "same_best_token": "same_best_token",
        "equal_tokens_first": "equal_tokens_first",
        "blocks": "blocks",
        "kernels_us": "top_kernels",
    }
    found = {new: seen[old] for old, new in names.items() if old in seen}
    if "first_use_s" in seen:
        found["first_use_s"] = sum(seen["first_use_s"].values())
    return found | ({"busy_error": void} if void else {})


def main() -> None:
    """Run the chosen rows."""
    ask = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ask.add_argument("--weights", default="bf16,nf4")
    ask.add_argument("--batch", type=int, default=1)
    options = options_of(ask, out="decode-ablation.json", limit_s=120.0).parse_args()
    what = options.shape, options.weights.split(","), options.batch
    chosen = chosen_cases(ask, lambda: cases(*what), what[1], ("bf16", "nf4"), "--weights")
    with gpus_by_nvml():
        import torch  # noqa: F401  (imported once, for all children)
        import transformers.models.llama.modeling_llama  # noqa: F401

    run_rows(chosen, measure, options, columns=_COLUMNS, steps=steps(*what))


if __name__ == "__main__":
    main()
