"""Whose code ran: a patch of the whole process is harmless where each case has its own, and seen where cases share one."""

from __future__ import annotations

import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from hpc_core.audit.model import module_facts
from hpc_core.baselines.lookup import find
from hpc_core.builders.assemble import build
from hpc_core.case.case import Case
from hpc_core.case.workloads import CallableSpec
from hpc_core.catalogue import catalogue
from hpc_core.gate.judge import judge
from hpc_core.gate.verdict import Verdict
from hpc_core.launch.launcher import Launcher
from hpc_core.record.job import Job

pytestmark = pytest.mark.slow
BASELINES = Path(__file__).parents[2] / "baselines"
LORA = catalogue()["tiny/lora"]

LEAKS = {
    "class_forward": "LlamaMLP.forward from tests.audit.leaky_factories",
    "function": "modeling_llama.apply_rotary_pos_emb from tests.audit.leaky_factories",
    "whole_class": "modeling_llama.LlamaRMSNorm from tests.audit.leaky_factories",
}


def leaking(factory: str) -> Job:
    """A case whose factory patches transformers for its whole process."""
    workload = CallableSpec(factory=f"tests.audit.leaky_factories:{factory}", steps=1)
    return Job(case=Case(id="own/leaky", scale="tiny", workload=workload), device="cpu")


@pytest.fixture(scope="module")
def warm() -> Iterator[Launcher]:
    with Launcher("warm") as launcher:
        yield launcher


@pytest.fixture
def restored(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the leaks and the fault of these stories change in this process is put back after the test."""
    import transformers.models.llama.modeling_llama as llama

    monkeypatch.setattr(llama.LlamaMLP, "forward", llama.LlamaMLP.forward)
    for name in ("apply_rotary_pos_emb", "LlamaRMSNorm"):
        monkeypatch.setattr(llama, name, getattr(llama, name))
    monkeypatch.setattr("hpc_core.faults.catalogue._IN_PLACE", [])


@pytest.mark.parametrize("leak", LEAKS)
def test_a_patch_of_one_case_is_not_in_the_next_one(leak: str, warm: Launcher) -> None:
    """One launcher, two cases: the first patches transformers, the second runs transformers' own code and passes."""
    assert warm.run(leaking(leak)).status == "ok"

    record = warm.run(Job(case=LORA))

    assert warm.way == "warm"
    assert record.audit["modules_own"].seen == "all"
    assert judge(record, find(BASELINES, "cpu", LORA.id)).verdict is Verdict.PASS


@pytest.mark.parametrize("leak", LEAKS)
def test_a_patch_that_is_left_in_a_shared_process_is_seen(leak: str, restored: None) -> None:
    """Inline, cases share a process: the second one is INVALID, and the reason says what is patched and by whom."""
    launcher = Launcher("inline")
    launcher.run(leaking(leak))

    record = launcher.run(Job(case=LORA, device="cpu"))

    assert record.status == "invalid"
    assert LEAKS[leak] in record.audit["modules_own"].seen
    assert any(LEAKS[leak] in reason for reason in record.reasons)


def test_an_injected_fault_that_is_left_in_a_shared_process_is_seen(restored: None) -> None:
    """Our own faults stay in place too: with the fault its code is expected, in the next case it is not."""
    launcher = Launcher("inline")
    faulted = launcher.run(Job(case=LORA, device="cpu", fault="extra-kernel"))

    record = launcher.run(Job(case=LORA, device="cpu"))

    assert (faulted.status, faulted.audit["modules_own"].seen) == ("ok", "all")
    assert "LlamaMLP.forward from hpc_core.faults.fault" in record.audit["modules_own"].seen
    assert any("The fault extra-kernel, injected by an earlier case" in reason for reason in record.reasons)


def test_a_patch_of_one_instance_is_seen() -> None:
    """A forward bound to one module is foreign if its code is; one of transformers' own is not."""
    model: Any = build(LORA, torch.device("cpu")).model
    mlp = model.base_model.model.model.layers[0].mlp
    mlp.forward = types.MethodType(type(mlp).forward, mlp)
    assert module_facts(model).facts["modules_own"].holds

    mlp.forward = lambda x: x

    seen = module_facts(model).facts["modules_own"].seen
    assert seen == f"all but LlamaMLP.forward from {__name__}"
