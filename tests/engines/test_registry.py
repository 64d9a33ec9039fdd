"""An engine of another package is found by its entry point, and measured and audited like hpc-core's own."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from hpc_core.baselines.accept import accept
from hpc_core.baselines.lookup import find
from hpc_core.case.engines import registered
from hpc_core.case.errors import SpecError
from hpc_core.case.parts import DataSpec
from hpc_core.case.workloads import GenerateSpec
from hpc_core.catalogue import generate, tiny
from hpc_core.engines.engine import engine_of
from hpc_core.gate.judge import judge
from hpc_core.gate.verdict import Verdict
from hpc_core.record.job import Job
from hpc_core.record.record import Record
from hpc_core.worker.perform import perform

_RAGGED = DataSpec(source="trace", name="gsm8k", rows=8)
ENGINE = '''
import torch
from transformers import DynamicCache
from hpc_core.engines.generate import GenerateProgram, GenerationEngine
from hpc_core.instruments.program import unmarked


class GreedyLoop(GenerateProgram):
    """Calls the model itself, token by token."""

    def step(self, mark=unmarked):
        inputs = self.inputs[self.steps_done % self.period]
        mark("prefill")
        ids, mask, made = inputs["input_ids"], inputs["attention_mask"], []
        options = {"past_key_values": DynamicCache(config=self.model.config), "use_cache": True, "logits_to_keep": 1}
        places = (mask.cumsum(-1) - 1).clamp(min=0)  # shorter prompts are padded on the left
        with torch.no_grad():
            for count in range(1, self.new_tokens + 1):
                logits = self.model(input_ids=ids, attention_mask=mask, position_ids=places, **options).logits
                ids = logits[:, -1].argmax(-1, keepdim=True)
                made.append(ids)
                if self.on_token is not None:
                    ids.tolist()  # the token has reached the host
                    self.on_token(count)
                if count == 1:
                    mark("decode")
                mask, places = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1), places[:, -1:] + 1
        self.output = torch.cat([inputs["input_ids"], *made], dim=1)
        self.steps_done += 1


class LoopEngine(GenerationEngine):
    name, program = "loop", GreedyLoop
'''


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A package with the engine, as installed by pip."""
    (tmp_path / "looped.py").write_text(ENGINE)
    metadata = tmp_path / "looped-1.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: looped\nVersion: 1.0\n")
    (metadata / "entry_points.txt").write_text("[hpc_core.engines]\nloop = looped:LoopEngine\n")
    monkeypatch.syspath_prepend(tmp_path)
    registered.cache_clear()
    yield tmp_path
    registered.cache_clear()
    sys.modules.pop("looped", None)


def _measured(engine: str) -> Record:
    case = generate(tiny, batch=2, prompts=2, prompt_length=None, new_tokens=6, engine=engine, data=_RAGGED)
    record = perform(Job(case=case, device="cpu", launched="inline"), lambda _: None)
    assert record.status == "ok", (record.reasons, record.failure)
    return record


@pytest.mark.slow
@pytest.mark.usefixtures("package")
@pytest.mark.filterwarnings("ignore:`past_key_values` is deprecated")  # transformers 5.17 knows no other name
def test_an_engine_of_another_package_is_measured_and_judged_like_any_other(tmp_path: Path) -> None:
    """It gives the answers of transformers' `generate` with fewer operators, has the whole audit, and passes against its baseline."""
    loop, stock = _measured("loop"), _measured("stock")
    accept(tmp_path, loop, reason="first", allow_dirty=True)
    judgement = judge(_measured("loop"), find(tmp_path, "cpu", loop.case.id))
    assert loop.answers == stock.answers
    assert loop.metrics["operators"].value < stock.metrics["operators"].value
    assert loop.metrics["kv_cache_bytes"] == stock.metrics["kv_cache_bytes"]
    assert set(loop.audit) == set(stock.audit)
    assert judgement.verdict is Verdict.PASS


def test_an_unknown_engine_is_refused_with_the_known_ones(package: Path) -> None:
    """The error lists the built-in engines and those of installed packages."""
    assert engine_of(generate(tiny, engine="loop")).name == "loop"
    with pytest.raises(SpecError, match=r"There is no engine 'grpah' for this workload. There are: graph, loop, stock"):
        GenerateSpec(engine="grpah")
