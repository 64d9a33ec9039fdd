"""What prediction cannot model is refused in a sentence that names it."""

from __future__ import annotations

from typing import Any

import pytest

from hpc_core.catalogue import TINY, finetune, full, generate, tiny
from hpc_core.launch.launcher import Launcher
from hpc_core.record.job import Job, Predict
from tests.predict.predicting import GPU, predicted, refusal, values

pytestmark = pytest.mark.slow

LORA = next(case for case in TINY if case.id == "tiny/lora")


def test_a_static_cache_is_refused() -> None:
    """A static cache is refused, because its forward is compiled on a GPU; the message names the alternative."""
    case = generate(tiny, variant="generate-static", prompts=1, prompt_length=8, new_tokens=4, cache="static")
    message = refusal(predicted([case])[0])
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
    message = refusal(predicted([LORA], gpu="GTX 480")[0])
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


def test_the_chunked_loss_is_predicted_and_other_switches_are_refused() -> None:
    """The chunked loss lowers the predicted peak by most of the logits; a graph, compiled layers, fused blocks and a loader are refused by name."""
    stock = finetune(tiny, full, variant="stock", batch=4, length=256, steps=2)
    chunked = stock.vary("chunked", engine="tuned", loss="chunked", loss_chunk=128)
    switches: dict[str, dict[str, Any]] = {
        "graph": {"graph": True},
        "compile": {"compile": "layers"},
        "fusion": {"fusion": "blocks"},
        "feed": {"way": "loader"},
    }
    whole, chunks, *refused = predicted([stock, chunked, *(chunked.vary(name, **on) for name, on in switches.items())])
    logits = 4 * 256 * 1024 * 4
    assert chunks.status == "ok", chunks.reasons
    assert int(values(chunks)["peak_bytes"]) < int(values(whole)["peak_bytes"]) - 2 * logits
    for name, record in zip(switches, refused, strict=True):
        assert f"{name}=" in refusal(record)
