"""Runs one real step of each case on the CPU, to compare it with its prediction: `python -m tests.predict.crosscheck`.

Reads cases as JSON from standard input and writes the bytes, FLOPs and operators of each case's widest step to standard output.
"""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from unittest import mock

import msgspec

from hpc_core.case.case import Case
from hpc_core.case.workloads import CallableSpec, FinetuneSpec

__all__ = ["Real", "run_for_real"]

ROOT = Path(__file__).parents[2]


class Real(msgspec.Struct, kw_only=True):
    """The bytes, FLOPs and operators of a step on the CPU."""

    peak_bytes: int
    """Live bytes of tensor storages, weights included, at the highest point."""
    flops: int = 0
    operators: dict[str, int] = {}
    crashed: int = 0
    """The exit code of the case's process, as `os.waitstatus_to_exitcode` gives it. A crash costs one case only."""


def run_for_real(cases: Sequence[Case], *, count: bool, timeout_s: float = 300.0) -> list[Real]:
    """Run each case in its own process. With `count`, one more step per case counts FLOPs and operators."""
    command = [sys.executable, "-m", "tests.predict.crosscheck", *(["--count"] if count else [])]
    encoded = msgspec.json.encode(list(cases))
    done = subprocess.run(command, input=encoded, capture_output=True, timeout=timeout_s, check=False, cwd=ROOT)
    assert done.returncode == 0, done.stderr.decode()
    return msgspec.json.decode(done.stdout, type=list[Real])


def _keep_weights(*_: object) -> None:
    """Replace an initializer: the weights stay as they are."""


def _run_callable(workload: CallableSpec) -> Real:
    """Run a step of the user's own, and count what its factory keeps alive."""
    import torch

    from hpc_core.engines.callable import load_factory
    from hpc_core.instruments.allocations import StorageWatch
    from hpc_core.instruments.clock import quiet
    from hpc_core.instruments.counters import counting
    from hpc_core.instruments.owners import Bystanders, living_tensors

    torch.set_num_threads(1)
    device = torch.device("cpu")
    with quiet():
        earlier = Bystanders(device)
        program = load_factory(workload, "cpu")
        program.step()
        program.step()
        watch = StorageWatch(program.phases)
        watch.own("other", earlier.without(living_tensors(device)))
        with watch:
            program.step(watch)
        with counting() as counts:
            program.step()
    return Real(peak_bytes=watch.timeline.peak()[1], flops=counts.flops, operators=dict(counts.operators))


def _run(case: Case, *, count: bool) -> Real:
    if isinstance(case.workload, CallableSpec):
        return _run_callable(case.workload)
    import torch

    from hpc_core.builders import causal_lm
    from hpc_core.builders.assemble import build
    from hpc_core.engines.finetune import finetune_program
    from hpc_core.instruments.allocations import StorageWatch
    from hpc_core.instruments.clock import quiet
    from hpc_core.instruments.counters import counting
    from hpc_core.instruments.owners import optimizer_tensors, weight_tensors

    assert isinstance(case.workload, FinetuneSpec)
    torch.set_num_threads(1)  # on a busy machine two threads spend ten times as long waiting for each other
    # torch's initial weights suffice: drawing a table of 128,256 rows again takes ten times as long as the step.
    models = importlib.import_module("transformers").PreTrainedModel
    no_drawing = mock.patch.multiple(models, initialize_weights=_keep_weights)
    with no_drawing, mock.patch.object(causal_lm, "draw_weights", _keep_weights), quiet():
        program = finetune_program(build(case, torch.device("cpu")), case, case.workload)
        program.steps_done = program.widest
        program.step()  # creates the optimizer's state
        watch = StorageWatch(program.phases)
        batches = [
            [batch.ids, batch.labels] + ([] if batch.mask is None else [batch.mask]) for batch in program.batches
        ]
        watch.own("other", [tensor for batch in batches for tensor in batch])
        assert program.loss is not None
        watch.own("other", [program.loss])
        for category, tensors in weight_tensors(program.model).items():
            watch.own(category, tensors)
        if case.quantization is not None and case.quantization.double_quant:
            tables = importlib.import_module("bitsandbytes.functional").name2qmap
            watch.own("other", tables.values())  # one table, by which every layer quantizes its constants
        watch.own("optimizer", optimizer_tensors(program.optimizer))
        program.steps_done = program.widest
        with watch:
            program.step(watch)
        real = Real(peak_bytes=watch.timeline.peak()[1])
        if count:
            program.steps_done = program.widest
            with counting() as counts:
                program.step()
            real.flops, real.operators = counts.flops, dict(counts.operators)
    return real


def _serve(*, count: bool) -> None:
    cases = msgspec.json.decode(sys.stdin.buffer.read(), type=list[Case])
    for name in ("torch", "transformers", "peft", "bitsandbytes"):
        importlib.import_module(name)
    with os.fdopen(os.dup(1), "wb") as out:
        os.dup2(2, 1)  # what libraries print goes to standard error
        out.write(msgspec.json.encode([_in_a_fork(case, count=count) for case in cases]))


def _in_a_fork(case: Case, *, count: bool) -> Real:
    """Run one case in a forked child, which inherits the imports."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reader)
        try:
            with os.fdopen(writer, "wb") as pipe:
                pipe.write(msgspec.json.encode(_run(case, count=count)))
            os._exit(0)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
    os.close(writer)
    with os.fdopen(reader, "rb") as pipe:
        encoded = pipe.read()
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    return msgspec.json.decode(encoded, type=Real) if code == 0 else Real(peak_bytes=0, crashed=code)


if __name__ == "__main__":
    _serve(count="--count" in sys.argv)
