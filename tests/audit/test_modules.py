"""A patch of transformers is harmless if each case has its own process, and is found if cases share one."""

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

PATCHES = {
    "class_forward": "LlamaMLP.forward from tests.audit.leaky_factories",
    "function": "modeling_llama.apply_rotary_pos_emb from tests.audit.leaky_factories",
    "whole_class": "modeling_llama.LlamaRMSNorm from tests.audit.leaky_factories",
}


def patching(factory: str) -> Job:
    """A job whose factory patches transformers for its whole process."""
    workload = CallableSpec(factory=f"tests.audit.leaky_factories:{factory}", steps=1)
    return Job(case=Case(id="own/leaky", scale="tiny", workload=workload), device="cpu")


@pytest.fixture(scope="module")
def warm() -> Iterator[Launcher]:
    with Launcher("warm") as launcher:
        yield launcher


@pytest.fixture
def restored(monkeypatch: pytest.MonkeyPatch) -> None:
    """Undo, after the test, what the patches and the fault change in this process."""
    import transformers.models.llama.modeling_llama as llama

    monkeypatch.setattr(llama.LlamaMLP, "forward", llama.LlamaMLP.forward)
    for name in ("apply_rotary_pos_emb", "LlamaRMSNorm"):
        monkeypatch.setattr(llama, name, getattr(llama, name))
    monkeypatch.setattr("hpc_core.faults.catalogue._IN_PLACE", [])


@pytest.mark.parametrize("patch", PATCHES)
def test_a_patch_of_one_case_is_not_in_the_next_one(patch: str, warm: Launcher) -> None:
    """With one warm launcher, a case after a patching one runs transformers' own code and passes."""
    assert warm.run(patching(patch)).status == "ok"

    record = warm.run(Job(case=LORA))

    assert warm.way == "warm"
    assert record.audit["modules_own"].seen == "all"
    assert judge(record, find(BASELINES, "cpu", LORA.id)).verdict is Verdict.PASS


@pytest.mark.parametrize("patch", PATCHES)
def test_a_patch_left_in_a_shared_process_is_found(patch: str, restored: None) -> None:
    """In a shared process, a case after a patching one is INVALID; the reason says what is patched and by whom."""
    launcher = Launcher("inline")
    launcher.run(patching(patch))

    record = launcher.run(Job(case=LORA, device="cpu"))

    assert record.status == "invalid"
    assert PATCHES[patch] in record.audit["modules_own"].seen
    assert any(PATCHES[patch] in reason for reason in record.reasons)


def test_a_fault_left_in_a_shared_process_is_found(restored: None) -> None:
    """Our own faults stay in a shared process too: a fault's code is expected in its own case and foreign in the next."""
    launcher = Launcher("inline")
    faulted = launcher.run(Job(case=LORA, device="cpu", fault="extra-kernel"))

    record = launcher.run(Job(case=LORA, device="cpu"))

    assert (faulted.status, faulted.audit["modules_own"].seen) == ("ok", "all")
    assert "LlamaMLP.forward from hpc_core.faults.fault" in record.audit["modules_own"].seen
    assert any("The fault extra-kernel, injected by an earlier case" in reason for reason in record.reasons)


def test_a_patch_of_one_instance_is_found() -> None:
    """A forward bound to one module is foreign unless it is transformers' own."""
    model: Any = build(LORA, torch.device("cpu")).model
    mlp = model.base_model.model.model.layers[0].mlp
    mlp.forward = types.MethodType(type(mlp).forward, mlp)
    assert module_facts(model).facts["modules_own"].holds

    mlp.forward = lambda x: x

    assert module_facts(model).facts["modules_own"].seen == f"all but LlamaMLP.forward from {__name__}"
