"""Liger's kernels in the tuned training engine: what is refused, how large its chunks are, and that nothing of transformers is replaced."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers.models.llama.modeling_llama as llama
from hypothesis import given
from hypothesis import strategies as st

from hpc_core.builders.assemble import build
from hpc_core.case.case import Case
from hpc_core.case.errors import BuildError, SpecError
from hpc_core.case.workloads import FinetuneSpec
from hpc_core.catalogue import finetune, lora, qlora, tiny
from hpc_core.engines.engine import engine_of
from hpc_core.engines.tuned.forward import restore
from hpc_core.engines.tuned.liger import _rotating, chunk_rows, memory_constant
from hpc_core.engines.tuned.program import training_program

_CPU = torch.device("cpu")
_SMALL: dict[str, Any] = {"batch": 2, "length": 32, "steps": 2}


def _case(**switches: Any) -> Case:
    return finetune(
        tiny, lora(dropout=0.0, dtype="bfloat16"), variant="lora-liger", engine="tuned", **_SMALL, **switches
    )


@pytest.mark.parametrize(
    ("switches", "says"),
    [
        ({"fusion": "liger", "compile": "layers"}, "compiled already"),
        ({"loss": "liger", "graph": True}, "use loss='chunked'"),
        ({"loss": "liger", "fusion": "blocks"}, "use loss='chunked'"),
        ({"fusion": "liger", "budget_bytes": 1 << 30}, "budget_bytes needs fusion='blocks'"),
    ],
)
def test_what_liger_cannot_go_with_is_refused(switches: dict[str, Any], says: str) -> None:
    """When the case is made, with what to say instead."""
    with pytest.raises(SpecError, match=says):
        _case(**switches)


def test_liger_belongs_to_the_tuned_engine_and_leaves_linear_layers_alone() -> None:
    """So adapters may have dropout, and weights may be in int8, as in the stock path."""
    with pytest.raises(SpecError, match="engine='tuned'"):
        finetune(tiny, lora(), fusion="liger", **_SMALL)
    finetune(tiny, lora(dropout=0.1), variant="lora-l", engine="tuned", fusion="liger", **_SMALL)
    finetune(tiny, qlora(kind="int8", compute_dtype="float16"), engine="tuned", fusion="liger", **_SMALL)


@pytest.mark.parametrize("switch", [{"fusion": "liger"}, {"loss": "liger"}])
def test_without_a_gpu_liger_says_what_it_needs(switch: dict[str, str]) -> None:
    """Before its package, which needs triton, is even looked for."""
    case = _case(**switch)
    assert isinstance(case.workload, FinetuneSpec)
    name, value = next(iter(switch.items()))
    with pytest.raises(BuildError, match=f"{name}='{value}' runs Liger's kernels, which need a CUDA GPU"):
        training_program(build(case, _CPU), case, case.workload)


@pytest.mark.parametrize("switch", [{"fusion": "liger"}, {"loss": "liger"}])
def test_a_prediction_refuses_liger_by_the_switch(switch: dict[str, str]) -> None:
    """What its kernels take is not known without a GPU."""
    case = _case(**switch)
    assert f"without {next(iter(switch))}" in str(engine_of(case).unpredictable(case))


@pytest.mark.parametrize(("constant", "rows"), [(1, 64), (4, 256), (8, 512)])
def test_chunks_are_ligers_own(constant: int, rows: int) -> None:
    """The sizes that Liger's rule gives for 2048 tokens of Llama-3.2-3B."""
    assert chunk_rows(2048, 128256, 3072, constant) == rows


@given(
    rows=st.integers(1, 20000),
    vocabulary=st.integers(100, 300000),
    features=st.integers(64, 8192),
    least=st.integers(1, 4096),
)
def test_the_constant_is_the_smallest_that_gives_the_rows(
    rows: int, vocabulary: int, features: int, least: int
) -> None:
    """Chunks have the rows asked for, or all there are; a smaller constant gives fewer."""
    constant = memory_constant(rows, vocabulary, features, least)
    assert chunk_rows(rows, vocabulary, features, constant) >= min(rows, least)
    if constant > 1:
        assert chunk_rows(rows, vocabulary, features, constant - 1) < min(rows, least)


class _PlainRotation:
    """What Liger's function computes, by transformers' own."""

    apply = staticmethod(llama.apply_rotary_pos_emb)


def test_an_attention_takes_another_rotation_and_its_module_keeps_its_own() -> None:
    """The same output to the bit, by a rotation that was counted; the file's function and the class's forward are what they were."""
    model: Any = build(finetune(tiny, **_SMALL), _CPU).model
    before = llama.apply_rotary_pos_emb, llama.LlamaAttention.forward
    attention, called = model.model.layers[0].self_attn, dict[str, int]()
    hidden = torch.randn(1, 8, model.config.hidden_size, generator=torch.Generator().manual_seed(2)).bfloat16()
    angles = model.model.rotary_emb(hidden, position_ids=torch.arange(8)[None])
    stock = attention(hidden, position_embeddings=angles, attention_mask=None)[0]
    attention.forward = _rotating(attention, _PlainRotation, called)
    attention._hpc_core_tuned = True
    assert torch.equal(attention(hidden, position_embeddings=angles, attention_mask=None)[0], stock)
    assert called == {"liger_rope": 1}
    assert (llama.apply_rotary_pos_emb, llama.LlamaAttention.forward) == before
    restore(model)
    assert "forward" not in vars(attention)


def test_an_attention_without_that_name_is_refused() -> None:
    """Another model's rotation may be called otherwise: Liger's would never run, and nobody would know."""
    with pytest.raises(BuildError, match="calls no apply_rotary_pos_emb"):
        _rotating(torch.nn.Linear(2, 2), _PlainRotation, {})
