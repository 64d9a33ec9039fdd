"""Any method of peft by its configuration: attached, audited by what peft built, and predicted."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from hpc_core.builders.assemble import build
from hpc_core.case.case import Case
from hpc_core.case.errors import BuildError, SpecError
from hpc_core.catalogue import adapter, finetune, tiny
from tests.predict.predicting import predicted
from tests.tiny_cases import measured

METHODS: dict[str, dict[str, Any]] = {
    "rslora": {},
    "dora": {"targets": "all-linear", "rank": 4},
    "pissa": {"targets": "all-linear"},
    "lora": {"modules_to_save": ("norm",), "targets": ("q_proj",)},
    "vera": {"r": 8},
    "ia3": {},
    "loha": {"r": 4},
    "oft": {"oft_block_size": 8, "targets": ("q_proj", "v_proj")},
    "prompt": {"num_virtual_tokens": 4},
    "prefix": {"num_virtual_tokens": 4},
}


def case_of(method: str, **settings: Any) -> Case:
    return finetune(tiny, adapter(method, **settings), variant=f"method-{method}", batch=2, length=64, steps=2)


@pytest.mark.filterwarnings("ignore:`past_key_values` is deprecated:FutureWarning")  # peft's prefix tuning
@pytest.mark.parametrize("method", METHODS)
def test_a_method_runs_and_its_audit_holds(method: str) -> None:
    """Every fact is about what peft built; the adapter's bytes are found apart from the weights'."""
    record, _ = measured(case_of(method, **METHODS[method]))
    assert record.status == "ok", record.reasons
    assert record.metrics["adapter_weights_bytes"].value > 0


@pytest.mark.nightly
def test_methods_are_predicted() -> None:
    """Their adapters have as many bytes as in a run."""
    cases = [case_of(method, **METHODS[method]) for method in ("dora", "ia3", "prompt")]
    for case, prediction in zip(cases, predicted(cases), strict=True):
        assert prediction.status == "ok", prediction.reasons
        ran = measured(case)[0].metrics["adapter_weights_bytes"]
        assert prediction.metrics["adapter_weights_bytes"].value == ran.value, case.id


def test_a_module_that_is_left_out_is_named() -> None:
    """An adapter on all linear layers but one is not what the case asks for."""
    record, _ = measured(case_of("dora", targets="all-linear", exclude_modules=["o_proj"]))
    assert any("18; not adapted: " in reason and "o_proj" in reason for reason in record.reasons)


def test_an_unknown_method_names_those_of_peft() -> None:
    """The line has the method, and the ones that are installed."""
    with pytest.raises(BuildError, match=r"peft \S+ has no method 'lara'. It has: .*\bdora\b.*\bvera\b"):
        build(case_of("lara"), torch.device("cpu"))


def test_an_unknown_setting_names_those_of_the_method() -> None:
    """A setting that peft's configuration lacks is refused before anything is built."""
    with pytest.raises(BuildError, match=r"VeraConfig has no setting rang\. It has: .*\br\b"):
        build(case_of("vera", rang=4), torch.device("cpu"))


def test_ranks_of_lora_are_not_those_of_other_methods() -> None:
    """rank, alpha and dropout belong to LoRA."""
    with pytest.raises(
        SpecError, match=r"rank belongs to lora, .*: give the settings of vera in options=, by peft's names"
    ):
        case_of("vera", rank=4)
