"""The graph engine on a CPU, where its step runs eagerly: answers, ends, sampling and refusals."""

from __future__ import annotations

import re
from typing import Any, cast

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st

from hpc_core.builders.adapter import attach_adapter
from hpc_core.builders.assemble import Built, build
from hpc_core.builders.data.rows import PromptBatch
from hpc_core.case.errors import SpecError
from hpc_core.case.parts import AdapterSpec, ModelSpec, QuantSpec
from hpc_core.case.workloads import GenerateSpec
from hpc_core.catalogue import generate, tiny
from hpc_core.engines.decode.cache import capacity_for
from hpc_core.engines.decode.model import decoder_of, int8_rows
from hpc_core.engines.decode.plain_step import attend
from hpc_core.engines.decode.program import GraphProgram, graph_program
from hpc_core.engines.decode.tokens import Chooser, Sampling
from hpc_core.engines.engine import engine_of
from hpc_core.engines.generate import GenerateProgram, generate_program
from tests.engines.conftest import randomize, small_qwen2

CPU = torch.device("cpu")
FLOAT = ModelSpec(shape="tiny", dtype="float32", seed=3)
NF4 = QuantSpec(kind="nf4", compute_dtype="float32")


@pytest.fixture(scope="module")
def plain() -> Built:
    built = build(generate(FLOAT), CPU)
    randomize(built.model)
    return built


@pytest.fixture(scope="module")
def quantized() -> Built:
    built = build(generate(FLOAT, quantization=NF4), CPU)
    randomize(built.model)
    for module in built.model.modules():
        if hasattr(module, "quant_state"):
            cast("Any", module).weight.quant_state.absmax *= 5.0
    return built


@pytest.fixture(scope="module")
def qwen() -> Built:
    """A small Qwen2, whose query, key and value projections have biases."""
    return Built(randomize(randomize(small_qwen2(seed=5).eval())), CPU, 300, None)


def _graph_and_stock(built: Built, **workload: Any) -> tuple[GraphProgram, GenerateProgram]:
    sizes: dict[str, Any] = {"prompts": 2, "prompt_length": 9, "new_tokens": 10} | workload
    return graph_program(built, GenerateSpec(engine="graph", **sizes)), generate_program(built, GenerateSpec(**sizes))


@pytest.mark.parametrize("batch", [1, 4])
@pytest.mark.parametrize("name", ["plain", "quantized", "qwen"])
def test_greedy_answers_are_those_of_generate(request: pytest.FixtureRequest, name: str, batch: int) -> None:
    """Plain, in NF4 and with biases, alone and in a batch, the engine gives the tokens of transformers' `generate`."""
    engine, stock = _graph_and_stock(request.getfixturevalue(name), batch=batch)
    for _ in range(3):  # two prompts, and the first again
        engine.step()
        stock.step()
        assert engine.answer_ids() == stock.answer_ids()
        assert len(set(engine.answer_ids()[0])) > 1


class _OneBuffer:
    """A step that writes every token's logits into one tensor, as our kernels and a captured step do."""

    def __init__(self, step: Any):
        self._step = step
        self._buffer: torch.Tensor | None = None

    def __call__(self, tokens: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self._step(tokens)
        self._buffer = logits.clone() if self._buffer is None else self._buffer.copy_(logits)
        return self._buffer


def test_logits_are_copied_from_a_steps_buffer(plain: Built) -> None:
    """With one buffer for all steps, logits at every place are still those of the model's own forward."""
    engine, _ = _graph_and_stock(plain, batch=2, new_tokens=6)
    engine.step_of = _OneBuffer(engine.step_of)
    draw = torch.Generator().manual_seed(1)
    for index in (0, 1):
        answer = torch.randint(3, 250, (2, 6), generator=draw)
        logits = engine.logits_after(index, answer, 2)
        ids = engine.inputs[index]["input_ids"]
        with torch.no_grad():
            whole = cast("Any", plain.model)(input_ids=torch.cat([ids, answer[:, :-1]], dim=1), use_cache=False).logits
        torch.testing.assert_close(logits, whole[:, ids.shape[1] - 1 :], rtol=1e-4, atol=1e-4)


def test_padded_prompts_are_answered_as_generate_answers_them(plain: Built) -> None:
    """Left-padded prompts are answered as `generate` answers them."""
    ids = [[0] * 14 + list(range(3, 9)), list(range(100, 120)), [0] * 3 + list(range(40, 57))]
    mask = [[0] * 14 + [1] * 6, [1] * 20, [0] * 3 + [1] * 17]
    prompt = [PromptBatch(ids, mask, 43, 17)]
    engine = GraphProgram(plain, GenerateSpec(engine="graph", batch=3, prompts=1, new_tokens=8), prompt)
    stock = GenerateProgram(plain, GenerateSpec(batch=3, prompts=1, new_tokens=8), prompt)
    engine.step()
    stock.step()
    assert engine.answer_ids() == stock.answer_ids()


def test_a_query_marks_its_phases_and_reports_every_token(plain: Built) -> None:
    """A query marks prefill and decode, reports each token once in order, and says why nothing was captured."""
    engine, _ = _graph_and_stock(plain)
    events: list[Any] = []
    engine.on_token = events.append
    engine.step(events.append)
    assert events == ["prefill", "decode", *range(1, 11)]
    assert engine.captured is None
    assert "no CUDA" in str(engine.why_eager)


@pytest.mark.parametrize("every", [1, 5])
def test_a_query_stops_after_its_end_tokens(plain: Built, every: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """An ended row is padded; the query stops at the first check, every few tokens, that finds all rows ended."""
    engine, _ = _graph_and_stock(plain, new_tokens=12)
    engine.step()
    answer = engine.answer_ids()[0]
    at = next(index for index, token in enumerate(answer) if index >= 4 and token not in answer[:index])
    monkeypatch.setattr(cast("Any", plain.model).generation_config, "eos_token_id", answer[at])
    workload = GenerateSpec(engine="graph", prompts=2, prompt_length=9, new_tokens=12, eos_every=every)
    stopping = graph_program(plain, workload)
    stopping.step()
    assert stopping.answer_ids()[0] == answer[: at + 1]
    assert stopping.output is not None
    generated = stopping.output.shape[1] - 9
    assert generated == min(12, -(-(at + 1) // every) * every)
    assert stopping.output[0, 9 + at + 1 :].tolist() == [0] * (generated - at - 1)


def test_sampling_follows_its_seed_and_its_top_k(plain: Built) -> None:
    """A seed always draws the same tokens, another seed draws others, and top_k=1 is greedy."""
    drawn = []
    for seed, top_k in ((1, 50), (1, 50), (2, 50), (3, 1)):
        workload = GenerateSpec(engine="graph", prompts=1, prompt_length=9, new_tokens=10, temperature=1.5, top_k=top_k)
        program = graph_program(plain, workload, seed=seed)
        program.step()
        drawn.append(program.answer_ids())
    greedy, _ = _graph_and_stock(plain)
    greedy.step()
    assert drawn[0] == drawn[1] != drawn[2]
    assert drawn[3] == greedy.answer_ids()


def test_tokens_are_drawn_with_their_probabilities() -> None:
    """Over 4000 rows each token's share is its softmax probability, within four standard errors."""
    rows, logits = 4000, torch.tensor([0.0, 1.0, 2.0])
    chooser = Chooser(rows, 1, CPU, Sampling(temperature=0.7, seed=4), None)
    chooser.begin(0)
    chooser(logits.expand(rows, 3))
    probabilities = (logits / 0.7).softmax(0)
    shares = torch.bincount(chooser.tokens, minlength=3) / rows
    assert (shares - probabilities).abs().max() < 4 * 0.5 / rows**0.5


def test_a_merged_adapter_runs_and_another_is_refused() -> None:
    """A merged LoRA model runs like any other; an unmerged one is refused with the way to merge it."""
    built = build(generate(FLOAT), CPU)
    wrapped: Any = attach_adapter(randomize(built.model), AdapterSpec(dropout=0.0))
    for name, parameter in wrapped.named_parameters():
        if ".lora_B." in name:
            parameter.data.normal_(std=0.3)
    with pytest.raises(SpecError, match=r"knows LlamaForCausalLM and Qwen2ForCausalLM.*merge_and_unload"):
        decoder_of(wrapped.eval())
    merged = Built(wrapped.merge_and_unload().eval(), CPU, built.vocab_size, None)
    engine, stock = _graph_and_stock(merged)
    engine.step()
    stock.step()
    assert engine.answer_ids() == stock.answer_ids()


def test_unsupported_models_are_refused_by_name() -> None:
    """Another architecture and LLM.int8 are refused by name."""
    config = transformers.GPT2Config(n_embd=32, n_layer=1, n_head=2, vocab_size=64)
    with pytest.raises(SpecError, match="this is GPT2LMHeadModel"):
        decoder_of(transformers.GPT2LMHeadModel(config))
    half = build(generate(tiny, quantization=QuantSpec(kind="int8", compute_dtype="float16")), CPU)
    with pytest.raises(SpecError, match="not by Linear8bitLt"):
        decoder_of(half.model)


def test_a_prediction_is_refused() -> None:
    """A prediction is refused, because our own kernels have no model, and engine='stock' is suggested."""
    case = generate(tiny, prompt_length=8, new_tokens=4, engine="graph")
    assert re.search(
        r"engine='graph' runs kernels of its own.*engine='stock'", str(engine_of(case).unpredictable(case))
    )


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ({"adapter": AdapterSpec()}, "does not generate with an adapter.*which merges it"),
        (
            {"engine": "graph", "quantization": QuantSpec(kind="int8", compute_dtype="float16")},
            "no kernels for LLM.int8",
        ),
        ({"engine": "graph", "attention": "eager"}, "has its own attention"),
    ],
)
def test_cases_that_the_engine_cannot_run_are_refused(case: dict[str, Any], message: str) -> None:
    """A case that the engine cannot run is refused before anything is built."""
    with pytest.raises(SpecError, match=message):
        generate(tiny, prompt_length=8).vary("refused", **case)


@given(tokens=st.integers(1, 100_000), step=st.integers(1, 512))
def test_a_cache_has_little_spare_room(tokens: int, step: int) -> None:
    """A cache has room for all tokens, less than a step and less than a 128th to spare, and grows with the tokens."""
    capacity = capacity_for(tokens, step)
    assert 0 <= capacity - tokens < step
    assert 128 * (capacity - tokens) < max(128, tokens)
    assert capacity_for(tokens + 1, step) >= capacity


def test_neighbouring_lengths_share_a_capacity() -> None:
    """Capacities are whole steps, so many lengths share the same shapes."""
    capacities = [capacity_for(tokens, 256) for tokens in range(4096, 8192)]
    assert len(set(capacities)) == 129
    assert {capacity_for(tokens, 16) % 16 for tokens in range(4096, 8192)} == {0}


@given(rows=st.integers(1, 9), columns=st.integers(1, 33), seed=st.integers(0, 99))
@settings(max_examples=30, deadline=None)
def test_int8_rows_err_by_half_a_step_at_most(rows: int, columns: int, seed: int) -> None:
    """Each weight is within half of its row's scale, also where the matrix is converted in pieces."""
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))
    codes, scales = int8_rows(weight, rows=4)
    assert codes.dtype == torch.int8
    assert ((codes.float() * scales[:, None] - weight).abs() <= 0.5001 * scales[:, None]).all()


def test_attention_reads_only_the_filled_part() -> None:
    """Cache beyond the filled part and before a row's prompt has no effect, and grouped heads equal repeated keys."""
    torch.manual_seed(1)
    query, keys, values = torch.randn(2, 6, 8), torch.randn(2, 3, 20, 8), torch.randn(2, 3, 20, 8)
    first, filled = torch.tensor([0, 4]), 13
    output = attend(query, keys, values, first, filled)
    repeated = [part.repeat_interleave(2, dim=1) for part in (keys, values)]
    for row, start in enumerate((0, 4)):
        part_keys, part_values = (part[row : row + 1, :, start:filled] for part in repeated)
        expected = torch.nn.functional.scaled_dot_product_attention(
            query[row : row + 1, :, None], part_keys, part_values
        )
        torch.testing.assert_close(output[row], expected[0, :, 0])
