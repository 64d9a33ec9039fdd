"""Liger's kernels in the tuned engine: what is refused, the size of chunks, and that transformers is not patched."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers.models.llama.modeling_llama as llama
from hypothesis import given
from hypothesis import strategies as st

from hpc_core.builders.assemble import build
from hpc_core.case.case import Case
from hpc_core.case.errors import BuildError
from hpc_core.catalogue import finetune, lora, qlora, tiny
from hpc_core.engines.engine import engine_of
from hpc_core.engines.tuned.forward import restore
from hpc_core.engines.tuned.liger import _rotating, chunk_rows, memory_constant
from tests.engines.conftest import program_of

_CPU = torch.device("cpu")
_SMALL: dict[str, Any] = {"batch": 2, "length": 32, "steps": 2}


def _case(**switches: Any) -> Case:
    return finetune(
        tiny, lora(dropout=0.0, dtype="bfloat16"), variant="lora-liger", engine="tuned", **_SMALL, **switches
    )


def test_liger_allows_dropout_and_int8() -> None:
    """Liger changes no linear layer, so adapters may have dropout and weights may be int8."""
    finetune(tiny, lora(dropout=0.1), variant="lora-l", engine="tuned", fusion="liger", **_SMALL)
    finetune(tiny, qlora(kind="int8", compute_dtype="float16"), engine="tuned", fusion="liger", **_SMALL)


@pytest.mark.parametrize("switch", [{"fusion": "liger"}, {"loss": "liger"}])
def test_liger_needs_a_gpu(switch: dict[str, str]) -> None:
    """Without a GPU, Liger is refused before its package is imported."""
    case = _case(**switch)
    name, value = next(iter(switch.items()))
    with pytest.raises(BuildError, match=f"{name}='{value}' runs Liger's kernels, which need a CUDA GPU"):
        program_of(case)


@pytest.mark.parametrize("switch", [{"fusion": "liger"}, {"loss": "liger"}])
def test_a_prediction_of_liger_is_refused(switch: dict[str, str]) -> None:
    """A prediction is refused by the option's name, because the kernels' memory is unknown without a GPU."""
    case = _case(**switch)
    assert f"without {next(iter(switch))}" in str(engine_of(case).unpredictable(case))


@pytest.mark.parametrize(("constant", "rows"), [(1, 64), (4, 256), (8, 512)])
def test_chunks_are_ligers_own(constant: int, rows: int) -> None:
    """Chunks have the sizes of Liger's rule for 2048 tokens of Llama-3.2-3B."""
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
    """Chunks have the requested rows, or all there are; a smaller constant gives fewer."""
    constant = memory_constant(rows, vocabulary, features, least)
    assert chunk_rows(rows, vocabulary, features, constant) >= min(rows, least)
    if constant > 1:
        assert chunk_rows(rows, vocabulary, features, constant - 1) < min(rows, least)


class _PlainRotation:
    """Transformers' own function, in the place of Liger's."""

    apply = staticmethod(llama.apply_rotary_pos_emb)


def test_one_attention_takes_another_rotation() -> None:
    """An attention with a replaced rotation gives the same output, and transformers' module and class stay unchanged."""
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
    """A model that calls its rotation otherwise is refused, since Liger's would never run."""
    with pytest.raises(BuildError, match="calls no apply_rotary_pos_emb"):
        _rotating(torch.nn.Linear(2, 2), _PlainRotation, {})
