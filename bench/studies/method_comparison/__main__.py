"""peft's method comparison, predicted: its loop on Llama-3.2-3B for each method, beside the memory that peft published.

python -m bench.studies.method_comparison ~/peft > bench/studies/method_comparison/results.md

~/peft is a checkout of github.com/huggingface/peft, whose configurations are read. Each row takes 20 to 60 seconds; no GPU.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import scipy.stats
import typer

from hpc_core.case.errors import SpecError
from hpc_core.cli import run_app
from hpc_core.cli.console import say, tell
from hpc_core.predict.allocator import Allocator
from hpc_core.record import units

EXPERIMENTS = Path("method_comparison") / "MetaMathQA" / "experiments"
ROOT = Path(__file__).parents[3]
PUBLISHED = Path(__file__).with_name("published.json")
ANCHOR = "lora/llama-3.2-3B-rank32"
LENGTH = 650
"""Tokens of the longest rows. With it the anchor's predicted reserved memory is within 1.2 % of the published one."""
_LIMIT_S = 600.0
_WEIGHTS = 6_425_499_648
"""Bytes of Llama-3.2-3B in bfloat16."""

REPEATED = (
    "adaptionprompt/llama-3.2-3B-lr_5e-3",
    "ia3/llama-3.2-3B-lr_0.001",
    "prefixtuning/llama-3.2-3B-lr_0.005_zero_init",
    "prompt_tuning/llama-3.2-3B-lr_0.001",
    "prompt_tuning/llama-3.2-3B-sample_vocab-lr_0.001",
)
"""Rows that differ from another one by what memory does not depend on."""
OTHERWISE = (
    ("lora/llama-3.2-3B-rank32-lorafa", "adapter-on", "without the evaluation under `disable_adapter()`"),
    ("adalora/llama-3.2-3B-rank32", "freeze=ranknum", "with `ranknum` frozen"),
)
"""Rows that are predicted a second time, with an option of the loop."""

app = typer.Typer(help=__doc__, add_completion=False, rich_markup_mode=None)


@dataclass(frozen=True)
class Row:
    """One method: what was predicted, or why not."""

    name: str
    published: int
    predicted: dict[str, Any] | None
    why_not: str = ""


@app.command()
def compare(
    peft: Annotated[Path, typer.Argument(help="A checkout of github.com/huggingface/peft.")],
    only: Annotated[str, typer.Option(help="Rows whose name holds this, and the anchor.")] = "",
) -> None:
    """Predict every published row and print the page."""
    folder = peft / EXPERIMENTS
    if not folder.is_dir():
        raise SpecError(
            f"{peft} has no {EXPERIMENTS}: git clone https://github.com/huggingface/peft, and name that folder."
        )
    published = json.loads(PUBLISHED.read_text())["bytes"]
    names = [name for name in published if name not in REPEATED and (only in name or name == ANCHOR)]
    rows = [_row(folder, name, published[name]["max_memory_reserved"]) for name in names]
    again = [(_row(folder, name, 0, option), words) for name, option, words in OTHERWISE if name in names]
    say(page(rows, again))


def _row(folder: Path, name: str, published: int, *options: str) -> Row:
    command = [sys.executable, "-m", "bench.studies.method_comparison.loop", str(folder / name), str(LENGTH), *options]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_LIMIT_S, check=False)
    except subprocess.TimeoutExpired:
        return Row(name, published, None, f"not done within {_LIMIT_S:g} s")
    if done.returncode != 0:
        lines = [line for line in done.stderr.splitlines() if line.strip()]
        why = lines[-1].partition("Error: ")[2] or lines[-1]
        return Row(name, published, None, why.replace(f"{ROOT}/", ""))
    found = json.loads(done.stdout.splitlines()[-1])
    tell(f"{name}: {units.quantity(found['reserved'], 'bytes')}")
    return Row(name, published, found)


def page(rows: list[Row], again: list[tuple[Row, str]]) -> str:
    """Return the table as Markdown, the row with the least published memory first.

    Predictions are scaled so that the anchor's is the published one: by the peak of allocated bytes, and by the bytes that the model
    of the allocator reserves.
    """
    sound = sorted((row for row in rows if row.predicted is not None), key=lambda row: row.published)
    peak, reserved = (_scaled(sound, name) for name in ("peak", "reserved"))
    lines = [
        f"{len(sound)} rows. By the peak: {_agreement(sound, peak)}. By reserved bytes: {_agreement(sound, reserved)}.",
        "",
        "| method | published | predicted | by the peak | by reserved bytes |",
        "|---|---:|---:|---:|---:|",
    ]
    for row in sound:
        differences = " | ".join(f"{100 * (each[row.name] / row.published - 1):+.2f} %" for each in (peak, reserved))
        name = row.name.replace("/llama-3.2-3B", "")
        lines.append(f"| {name} | {_gib(row.published)} | {_gib(peak[row.name])} | {differences} |")
    lines += ["", *(f"- {row.name}: {row.why_not}" for row in rows if row.predicted is None)]
    found = {row.name: row.predicted for row in sound}
    for row, words in again:
        before = found.get(row.name)
        if row.predicted is not None and before is not None:
            less, fewer = (before[name] - row.predicted[name] for name in ("peak", "trainable"))
            lines.append(f"- {row.name} {words}: {_gib(less)} less, {fewer:,} fewer numbers trained")
    lines += [f"- Evaluation reserves {_gib(evaluated(tokens))} with {tokens} virtual tokens." for tokens in (0, 200)]
    return "\n".join(lines)


def _scaled(rows: list[Row], name: str) -> dict[str, float]:
    """Return the predicted bytes of this name by method, in units that make the anchor's the published ones."""
    found = {row.name: int(row.predicted[name]) for row in rows if row.predicted is not None}
    anchor = next(row for row in rows if row.name == ANCHOR)
    return {method: value * anchor.published / found[ANCHOR] for method, value in found.items()}


def _agreement(rows: list[Row], values: dict[str, float]) -> str:
    order = scipy.stats.spearmanr([row.published for row in rows], [values[row.name] for row in rows]).statistic
    off = [abs(values[row.name] / row.published - 1) for row in rows if row.name != ANCHOR]
    return f"Spearman's correlation {order:.3f}, median difference {100 * statistics.median(off):.2f} %"


def evaluated(virtual_tokens: int) -> int:
    """Return the bytes that an allocator reserves while 50 answers of 300 tokens grow after prompts of 150: its blocks fit no more.

    The cache of each layer is concatenated anew for each token, so every block is a little larger than those that were freed.
    """
    allocator, rows, heads, width, layers = Allocator(), 50, 8, 128, 28
    for _ in range(layers):
        allocator.malloc(_WEIGHTS // layers)
    length = virtual_tokens + 150
    held = [allocator.malloc(0) for _ in range(2 * layers)]
    for tokens in range(length, length + 301):
        size = rows * heads * tokens * width * 2
        for layer, block in enumerate(held):
            held[layer] = allocator.malloc(size)
            allocator.free(block)
            if layer % 2:  # keys and values are repeated for three times as many heads
                repeated = [allocator.malloc(3 * size) for _ in range(2)]
                for each in repeated:
                    allocator.free(each)
    return allocator.peak_reserved


def _gib(value: float) -> str:
    return f"{value / 2**30:.2f} GiB"


if __name__ == "__main__":
    run_app(app, "method_comparison")
