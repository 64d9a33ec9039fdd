"""One row for each architecture: a tiny model run on the CPU and predicted, and the whole model predicted."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Self

import msgspec

from hpc_core.case.case import Case
from hpc_core.case.errors import SpecError
from hpc_core.case.parts import ModelSpec
from hpc_core.case.shapes import MODELS, shrunk
from hpc_core.catalogue.architectures import answer, lora_step
from hpc_core.launch.launcher import Launcher
from hpc_core.launch.predictions import predicting_launcher, prediction, why_not
from hpc_core.record.gpus import gpu_named
from hpc_core.record.job import Job, Measure
from hpc_core.record.record import Record

__all__ = [
    "GPU",
    "PAGE",
    "ROWS",
    "Bench",
    "Row",
    "Work",
    "config_cases",
    "measured",
    "page",
    "read_rows",
    "table_cases",
    "write_rows",
]

GPU = "H200"
ROWS = Path(__file__).with_name("architectures.json")
PAGE = Path(__file__).parents[3] / "docs" / "reference" / "architectures.md"


class Work(msgspec.Struct, frozen=True, kw_only=True):
    """A step or an answer of one model, in bytes."""

    run: int
    """The tiny model's peak on the CPU: bytes of tensors."""
    predicted: int
    """The same, predicted for the GPU, without the workspaces of its libraries, which no CPU has."""
    whole: int
    """The whole model's peak, predicted for the GPU."""

    @property
    def difference(self) -> int:
        """Predicted minus run."""
        return self.predicted - self.run


class Row(msgspec.Struct, frozen=True, kw_only=True):
    """One architecture."""

    name: str
    model_type: str
    attention: str
    step: Work
    answer: Work


Cases = tuple[Case, Case]
"""Of the tiny and of the whole model."""


class Bench:
    """The processes that run and predict: forkservers, since importing takes longer than most cases."""

    def __init__(self, tell: Callable[[str], None]) -> None:
        self.tell = tell
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> Self:
        """Start them."""
        self._running = self._stack.enter_context(Launcher("warm"))
        self._predicting = self._stack.enter_context(predicting_launcher(several=True))
        return self

    def __exit__(self, *_: object) -> None:
        """End them."""
        self._stack.close()

    def run(self, case: Case) -> Record:
        """Measure a case on the CPU.

        Raises:
            SpecError: it failed, or what ran is not what was asked.
        """
        return _sound(self._running.run(Job(case=case, kind=Measure(profile=False), device="cpu")))

    def predict(self, case: Case) -> Record:
        """Predict a case's memory.

        Raises:
            SpecError: it failed, or what would run is not what was asked.
        """
        return _sound(prediction(self._predicting, case, gpu=GPU, memory_only=True))


def measured(bench: Bench, name: str, model_type: str, step: Cases, query: Cases) -> Row:
    """Run and predict one architecture.

    Raises:
        SpecError: a case failed, or what ran is not what was asked.
    """
    works = []
    for tiny, whole in (step, query):
        run, small, full = bench.run(tiny), bench.predict(tiny), bench.predict(whole)
        peaks = [_bytes(run, "peak_bytes"), _tensors(small), _bytes(full, "peak_bytes")]
        works.append(Work(run=peaks[0], predicted=peaks[1], whole=peaks[2]))
        bench.tell(f"{tiny.id}: run {peaks[0]:,}, predicted {peaks[1]:,}; {whole.id}: {peaks[2] / 2**30:.2f} GiB")
    assert step[0].model is not None
    return Row(name=name, model_type=model_type, attention=step[0].model.attention, step=works[0], answer=works[1])


def _sound(record: Record) -> Record:
    if record.failure is not None:
        raise SpecError(why_not(record))
    if record.reasons:
        raise SpecError(f"{record.case.id} is INVALID: {' '.join(record.reasons)}")
    return record


def _bytes(record: Record, name: str) -> int:
    return int(record.metrics[name].value)


def _tensors(record: Record) -> int:
    """Return a prediction's peak of requested bytes without workspaces: one for each thread that multiplies, two in training."""
    threads = 2 if record.case.kind == "finetune" else 1
    return _bytes(record, "peak_requested_bytes") - threads * gpu_named(GPU).workspace_bytes


def config_cases(config: Path, folder: Path, **changes: str) -> tuple[str, str, Cases, Cases]:
    """Return name, model_type and cases of a model by its config.json. `folder` receives the tiny model's configuration.

    Raises:
        SpecError: the file is no configuration.
    """
    try:
        written = json.loads(config.read_text(encoding="utf-8"))
        kind = str(written["model_type"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise SpecError(f"{config} is not the config.json of a model: {error!r}") from error
    small = folder / "config.json"
    small.write_text(json.dumps(shrunk(written)), encoding="utf-8")

    def of(make: Callable[..., Case], *, tiny: bool) -> Case:
        model = ModelSpec(weights="config", path=str(small if tiny else config), **changes)  # type: ignore[arg-type]
        like = make("llama-2-7b", tiny=tiny)
        return msgspec.structs.replace(like, id=f"own/{like.id.partition('/')[2]}", model=model)

    step, query = ((of(make, tiny=True), of(make, tiny=False)) for make in (lora_step, answer))
    return config.parent.name, kind, step, query


def table_cases(name: str) -> tuple[str, str, Cases, Cases]:
    """Return name, model_type and cases of a row of `hpc_core/case/models.jsonl`."""
    step, query = ((make(name, tiny=True), make(name, tiny=False)) for make in (lora_step, answer))
    return name, str(MODELS[name].config["model_type"]), step, query


def read_rows() -> list[Row]:
    """Return the stored rows."""
    return msgspec.json.decode(ROWS.read_bytes(), type=list[Row]) if ROWS.exists() else []


def write_rows(rows: Iterable[Row]) -> None:
    """Store rows, one a line, in the table's order, and write the page."""
    order = {name: place for place, name in enumerate(MODELS)}
    kept = sorted(rows, key=lambda row: order.get(row.name, len(order)))
    lines = ",\n".join(msgspec.json.encode(row).decode() for row in kept)
    ROWS.write_text(f"[\n{lines}\n]\n", encoding="utf-8")
    PAGE.write_text(page(kept), encoding="utf-8")


def page(rows: Sequence[Row]) -> str:
    """Return the page of the documents."""
    equal = sum(abs(row.step.difference) <= _FEW and abs(row.answer.difference) <= _FEW for row in rows)
    lines = [_HEAD.format(count=len(rows), equal=equal, gpu=GPU)]
    lines += [
        "| model | `model_type` | LoRA step, tiny | difference | answer, tiny | difference | LoRA step | answer |",
        "|---|---|---:|---:|---:|---:|---:|---:|",
    ]
    for row in rows:
        eager = " (eager)" if row.attention == "eager" else ""
        cells = [f"`{row.name}`", f"{row.model_type}{eager}"]
        for work in (row.step, row.answer):
            cells += [f"{work.run:,}", f"{work.difference:+,}" if work.difference else "0"]
        cells += [f"{work.whole / 2**30:.2f} GiB" for work in (row.step, row.answer)]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([*lines, "", _TAIL, ""])


_FEW = 512
"""Bytes: seeds and ids, which are not memory that anybody plans with."""
_HEAD = """# Architectures

<!-- Written by `python -m bench.studies.architectures`. -->

{count} models of transformers' architectures. Each tiny one (`tiny-<model>`: the same parts, at most four narrow layers) ran on the CPU,
a LoRA step and an answer, audited like any case, and was predicted for one {gpu}: peaks in bytes of tensors, and predicted minus run.
{equal} agree within 512 bytes in both. The last two columns are the whole model, predicted: a LoRA step of 1 x 512 tokens, and
512 + 32 tokens of an answer.
"""
_TAIL = """Where they differ, the GPU differs from the CPU:

- 16 bytes for each fused attention, a seed and an offset that cuDNN keeps; 328 bytes of an answer, ids that a prediction holds.
- Layer norms keep their statistics in float32 on a GPU and in bfloat16 on a CPU (GPT-2, GPT-J, NeoX, OPT, Falcon, Bloom, Phi-2,
  StarCoder2, StableLM).
- On a GPU, transformers decodes a mixture's tokens by copies of the chosen experts' weights.
- DeepSeek's values are narrower than its keys. cuDNN has a kernel for that; the CPU has none and stores the scores.
- 1,600 bytes of Falcon's answer are unexplained.

To add a model, add a line to `hpc_core/case/models.jsonl` and run `python -m bench.studies.architectures --only NAME`. For a
configuration of your own: `python -m bench.studies.architectures --config DIR/config.json`."""
