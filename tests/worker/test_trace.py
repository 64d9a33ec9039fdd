"""Profiles of a real tiny model, as table and trace, which can never become a baseline."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from types import SimpleNamespace

import msgspec
import pytest
import torch

from hpc_core.baselines.accept import accept
from hpc_core.builders.data.loader import Fed, HostBatch
from hpc_core.case.case import Case
from hpc_core.case.errors import BaselineError
from hpc_core.case.workloads import CallableSpec
from hpc_core.catalogue import TINY_DATA, catalogue
from hpc_core.cli.profile import nsight_commands
from hpc_core.instruments.trace import _table, named_ranges, shown
from hpc_core.record.job import Job, Trace, TraceTable
from hpc_core.record.record import Record
from hpc_core.worker.main import run_job

pytestmark = pytest.mark.slow


def traced(folder: Path, phase: str | None = None, *, ranges: bool = False) -> Record:
    trace = Trace(folder=str(folder), phase=phase, ranges=ranges)
    return run_job(Job(case=catalogue()["tiny/lora"], launched="inline", kind=trace), lambda _: None)


def table_of(folder: Path) -> TraceTable:
    return msgspec.json.decode((folder / "operators.json").read_bytes(), type=TraceTable)


def test_a_trace_shows_phases_layers_and_operators(tmp_path: Path) -> None:
    """The trace has a range for each phase and layer; the table has operators by their own time, longest first."""
    record = traced(tmp_path)

    table = table_of(tmp_path)
    names = {
        event.get("name", "")
        for event in json.loads(gzip.decompress((tmp_path / "trace.json.gz").read_bytes()))["traceEvents"]
    }
    assert {"hpc-core:forward", "hpc-core:backward", "hpc-core:optimizer"} <= names
    assert sum(name.endswith(("layers.0", "layers.1", "layers.2")) for name in names) == 3
    assert sum(name.endswith("layers.0.mlp") for name in names) == 1
    assert not any(each.name.startswith("hpc-core:") for each in table.operators)
    assert [each.own_s for each in table.operators] == sorted((each.own_s for each in table.operators), reverse=True)
    assert len(table.operators) <= 30
    assert "aten::mm" in {each.name for each in table.operators}
    assert record.status == "invalid"
    with pytest.raises(BaselineError, match="profiled"):
        accept(tmp_path, record, reason="by mistake")


def test_a_profile_of_one_phase_has_no_other(tmp_path: Path) -> None:
    """A profile of the optimizer has its operators and no product of the forward."""
    traced(tmp_path, "optimizer")

    names = {each.name for each in table_of(tmp_path).operators}
    assert any("adam" in name.lower() or "foreach" in name for name in names)
    assert not names & {"aten::mm", "aten::silu"}


def test_a_profile_of_a_fed_case_fetches_no_batch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The profiled batch is taken by index, so that no other batch is made within the profile."""
    phases, fetched = [""], []
    fetch = Fed._fetch

    def fetch_and_note_phase(fed: Fed) -> HostBatch:
        fetched.append(phases[-1])
        return fetch(fed)

    monkeypatch.setattr(Fed, "_fetch", fetch_and_note_phase)
    [case] = [case for case in TINY_DATA if case.id == "tiny/data-w0"]
    job = Job(case=case, launched="inline", kind=Trace(folder=str(tmp_path)))
    record = run_job(job, lambda event: phases.append(getattr(event, "name", phases[-1])))
    assert record.failure is None
    assert "profile" in phases
    assert set(fetched) == {"warm-up"}
    assert "aten::mm" in {each.name for each in table_of(tmp_path).operators}


@pytest.mark.parametrize(
    ("phase", "ranges", "message"),
    [("prefill", False, "Its phases are: forward, backward, optimizer"), (None, True, "need a GPU")],
)
def test_what_cannot_be_profiled_is_refused(tmp_path: Path, phase: str | None, ranges: bool, message: str) -> None:
    """An unknown phase, and NVTX ranges without a GPU, are refused and no file is written."""
    record = traced(tmp_path / "out", phase, ranges=ranges)
    assert record.failure is not None
    assert record.failure.kind == "refused"
    assert message in record.failure.message
    assert not (tmp_path / "out").exists()


def test_only_layers_and_their_parts_have_ranges() -> None:
    """Deeper modules have no ranges, which would outnumber the operators."""
    assert all(map(shown, ("model.layers.0", "model.layers.11.mlp", "lm_head")))
    assert not any(map(shown, ("", "model.layers.0.mlp.act_fn", "model.layers.0.self_attn.q_proj")))


def test_the_command_lines_can_be_pasted(tmp_path: Path) -> None:
    """Command lines quote a folder with a space, and ncu profiles the given phase."""
    commands = nsight_commands("tiny/lora", tmp_path / "a b", "backward")
    assert f"'{tmp_path / 'a b' / 'nsys'}' hpc-core profile tiny/lora --ranges" in commands["nsys"]
    assert "--nvtx-include hpc-core:backward/" in commands["ncu"]


def test_a_failed_profile_leaves_the_record_ok() -> None:
    """If profiling by module fails, the record is ok without a profile, and a note says why."""
    case = Case(
        id="own/not-followed", scale="tiny", workload=CallableSpec(factory="tests.predict.own_steps:refuses_hooks")
    )

    record = run_job(Job(case=case, launched="inline"), lambda _: None)

    assert (record.status, record.profile) == ("ok", None)
    assert "no profile: RuntimeError: no hooks here" in record.circumstances.notes


def test_a_step_of_ones_own_has_a_profile(tmp_path: Path) -> None:
    """A user's training step is profiled by its own modules, although nothing names its model."""
    workload = CallableSpec(factory="tests.predict.own_steps:train", arguments={"device": "cpu"})

    profile = run_job(
        Job(case=Case(id="own/train", scale="tiny", workload=workload), launched="inline"), lambda _: None
    ).profile

    assert profile is not None
    assert profile.modules["blocks.*"].count == 2
    assert {"head", "embed", "blocks.*.*"} <= {use.module for use in profile.operators}
    assert profile.phases == ("step",)  # its author marks none


def test_nvtx_ranges_keep_the_backward_in_their_thread() -> None:
    """A range belongs to a thread, so autograd uses no other thread while NVTX ranges are open."""
    for nvtx in (True, False):
        with named_ranges(nvtx=nvtx):
            assert torch._C._is_multithreading_enabled() is not nvtx
        assert torch._C._is_multithreading_enabled()


def test_the_device_time_of_a_table_is_that_of_kernels() -> None:
    """Named ranges and waits are no part of the table's total device time."""
    cpu, cuda = torch._C._autograd.DeviceType.CPU, torch._C._autograd.DeviceType.CUDA

    def row(key: str, device: object, us: float, *, named: bool = False) -> SimpleNamespace:
        times = {
            "self_device_time_total": us,
            "device_time_total": us,
            "self_cpu_time_total": 9.0,
            "cpu_time_total": 9.0,
        }
        return SimpleNamespace(key=key, device_type=device, count=2, is_user_annotation=named, **times)

    rows = [
        row("aten::mm", cpu, 3000.0),
        row("gemm_kernel", cuda, 3000.0),
        row("Memcpy DtoH", cuda, 1000.0),
        row("Optimizer.step#AdamW.step", cuda, 4000.0, named=True),
        row("hpc-core:forward", cuda, 4000.0, named=True),
        row("Context Sync", cuda, 500.0),
    ]
    table = _table(rows, by_device=True, phase=None)
    assert table.total_s == pytest.approx(4e-3)
    assert [each.name for each in table.operators] == ["aten::mm"]
    assert table.operators[0].own_s == pytest.approx(3e-3)
