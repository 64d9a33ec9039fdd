"""What prediction cannot model is refused in a sentence that names it."""

from __future__ import annotations

import functools
from typing import Any

import pytest

from hpc_core.catalogue import TINY, finetune, full, generate, tiny
from hpc_core.launch.launcher import Launcher
from hpc_core.record.job import Job, Predict
from hpc_core.record.record import Record
from tests.predict.predicting import GPU, predicted, predicted_jobs, refusal, values

pytestmark = pytest.mark.slow

LORA = next(case for case in TINY if case.id == "tiny/lora")


STOCK = finetune(tiny, full, variant="stock", batch=4, length=256, steps=2)
CHUNKED = STOCK.vary("chunked", engine="tuned", loss="chunked", loss_chunk=128)
SWITCHES: dict[str, dict[str, Any]] = {
    "graph": {"graph": True},
    "compile": {"compile": "layers"},
    "fusion": {"fusion": "blocks"},
    "feed": {"way": "loader"},
}
STATIC = generate(tiny, variant="generate-static", prompts=1, prompt_length=8, new_tokens=4, cache="static")


@functools.cache
def _records() -> dict[str, Record]:
    """Predictions by the name of what they try, all made by one process."""
    cases = {"stock": STOCK, "chunked": CHUNKED, "static cache": STATIC}
    cases |= {name: CHUNKED.vary(name, **on) for name, on in SWITCHES.items()}
    jobs = {name: Job(case=case, kind=Predict(gpu=GPU)) for name, case in cases.items()}
    jobs["unknown GPU"] = Job(case=LORA, kind=Predict(gpu="GTX 480"))
    return dict(zip(jobs, predicted_jobs(list(jobs.values())), strict=True))


def test_a_static_cache_is_refused() -> None:
    """A static cache is refused, because its forward is compiled on a GPU; the message names the alternative."""
    message = refusal(_records()["static cache"])
    assert "torch.compile cannot be predicted" in message
    assert "cache='dynamic'" in message


def test_an_unknown_operator_is_refused() -> None:
    """Another library's operator is refused by name, even with a fake, which does not show its temporary memory."""
    message = refusal(predicted([LORA], first="custom_operator")[0])
    assert message.startswith("The operator odd_models::doubled cannot be predicted")


@pytest.mark.parametrize("first", ["compiled_late", pytest.param("compiled_module", marks=pytest.mark.nightly)])
def test_a_compiled_model_is_refused(first: str) -> None:
    """A compiled model is refused: torch.compile fuses operators and plans memory."""
    message = refusal(predicted([LORA], first=first)[0])
    assert message.startswith("torch.compile cannot be predicted")


def test_an_unknown_gpu_is_refused() -> None:
    """An unknown GPU is refused, and the message lists the known ones."""
    message = refusal(_records()["unknown GPU"])
    assert "'GTX 480'" in message
    assert GPU in message


def test_a_process_with_torch_is_refused() -> None:
    """A process that has imported torch, such as a forkserver's worker, is refused."""
    with Launcher("warm") as launcher:
        message = refusal(launcher.run(Job(case=LORA, kind=Predict(gpu=GPU))))
    assert "has not imported torch yet" in message


def test_a_case_can_be_predicted_through_the_launcher() -> None:
    """A launched interpreter predicts a case, and its record names the predicted GPU."""
    with Launcher("exec") as launcher:
        record = launcher.run(Job(case=LORA, kind=Predict(gpu="h100")))
    assert record.status == "ok", record.failure
    assert record.circumstances.machine.name == GPU
    assert record.circumstances.machine.key == "predicted"


def test_the_chunked_loss_is_predicted() -> None:
    """The chunked loss lowers the predicted peak by most of the logits."""
    logits = 4 * 256 * 1024 * 4
    whole, chunked = (values(_records()[name])["peak_bytes"] for name in ("stock", "chunked"))
    assert chunked < whole - 2 * logits


@pytest.mark.parametrize("switch", SWITCHES)
def test_other_switches_are_refused(switch: str) -> None:
    """A graph, compiled layers, fused blocks and a loader are refused by the names of their switches."""
    assert f"{switch}=" in refusal(_records()[switch])
