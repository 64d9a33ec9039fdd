"""The stock engine generates exactly N greedy tokens, equal to a loop written by hand, for any batch and cache."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from hpc_core.builders.assemble import Built, build
from hpc_core.builders.data.rows import PromptBatch
from hpc_core.case.errors import MeasureError
from hpc_core.case.parts import DataSpec, ModelSpec
from hpc_core.case.workloads import GenerateSpec
from hpc_core.catalogue import generate
from hpc_core.engines.generate import ChatTokenizer, GenerateProgram, generate_program
from hpc_core.instruments.owners import watch_cache
from tests.engines.conftest import randomize

CPU = torch.device("cpu")
FLOAT = ModelSpec(shape="tiny", dtype="float32", seed=3)


@pytest.fixture(scope="module")
def built() -> Built:
    """A tiny float32 model with moved matrices, so that greedy answers are not one token repeated."""
    built = build(generate(FLOAT), CPU)
    randomize(built.model)
    return built


def _program(built: Built, **workload: Any) -> GenerateProgram:
    return generate_program(built, GenerateSpec(**{"prompts": 2, "prompt_length": 9, "new_tokens": 8} | workload))


def _argmax_loop(built: Built, ids: list[int], tokens: int) -> list[int]:
    row = list(ids)
    with torch.no_grad():
        for _ in range(tokens):
            row.append(int(built.model(input_ids=torch.tensor([row]), use_cache=False).logits[0, -1].argmax()))
    return row[len(ids) :]


@pytest.mark.parametrize("cache", ["dynamic", "static", "off"])
def test_answers_are_those_of_an_argmax_loop(built: Built, cache: str) -> None:
    """With every kind of cache the tokens, prompt after prompt and again from the first, are those of a loop without one."""
    program = _program(built, cache=cache)
    for prompt in (*program.prompts, program.prompts[0]):
        program.step()
        answer = program.answer_ids()[0]
        assert answer == _argmax_loop(built, prompt.ids[0], 8)
        assert len(set(answer)) > 1


def test_the_requested_cache_is_used(built: Built) -> None:
    """The model is called with a static cache, a dynamic one or none."""
    names = {}
    for cache in ("dynamic", "static", "off"):
        program = _program(built, cache=cache)
        with watch_cache(built.model) as watched:
            program.step()
        names[cache] = type(watched.value).__name__
    assert names == {"dynamic": "DynamicCache", "static": "StaticCache", "off": "NoneType"}


def test_a_batch_padded_on_the_left_equals_its_prompts_alone(built: Built) -> None:
    """Prompts of different lengths in one batch are answered as each one alone."""
    rows = [list(range(3, 9)), list(range(100, 120))]
    padded = [[0] * 14 + rows[0], rows[1]]
    mask = [[0] * 14 + [1] * 6, [1] * 20]
    together = GenerateProgram(
        built, GenerateSpec(batch=2, prompts=1, new_tokens=8), [PromptBatch(padded, mask, 26, 14)]
    )
    together.step()
    assert together.answer_ids() == [_argmax_loop(built, row, 8) for row in rows]


def test_prompts_of_a_batch_really_differ_in_length(built: Built) -> None:
    """Trace prompts make padded batches, whose masks agree with the counted padding."""
    program = _program(built, batch=2, prompts=2, prompt_length=None, data=DataSpec(source="trace", name="gsm8k"))
    for prompt, inputs in zip(program.prompts, program.inputs, strict=True):
        assert int((inputs["attention_mask"] == 0).sum()) == prompt.padded
        assert int(inputs["attention_mask"].sum()) == prompt.tokens
    assert sum(prompt.padded for prompt in program.prompts) > 0


@pytest.mark.parametrize("tokens", [2, 5, 17])
def test_end_tokens_do_not_stop_a_query(tokens: int) -> None:
    """A model that generates its end-of-sequence token goes on to the requested number."""
    model = build(generate(FLOAT), CPU)
    program = _program(model, new_tokens=tokens)
    stop = _argmax_loop(model, program.prompts[0].ids[0], 1)[0]
    model.model.generation_config.eos_token_id = stop  # type: ignore[union-attr]
    program = _program(model, new_tokens=tokens)
    program.step()
    assert program.answer_ids()[0][0] == stop
    assert len(program.answer_ids()[0]) == tokens


def test_another_number_of_tokens_is_an_error(built: Built) -> None:
    """A query with another number of tokens is an error."""
    program = _program(built, new_tokens=6)
    program.model.generation_config.eos_token_id = _argmax_loop(built, program.prompts[0].ids[0], 1)[0]
    try:
        with pytest.raises(MeasureError, match="generate returned 1 new tokens; the query needs exactly 6"):
            program.step()
    finally:
        program.model.generation_config.eos_token_id = None


def test_marks_and_tokens_arrive_in_order(built: Built) -> None:
    """A query marks prefill, then decode at its first token, and reports every token."""
    program = _program(built, batch=2)
    events: list[Any] = []
    program.on_token = events.append
    program.step(events.append)
    program.on_token = None
    assert events == ["prefill", "decode", 1, 2, 3, 4, 5, 6, 7, 8]


def test_an_unwatched_query_has_no_streamer(built: Built) -> None:
    """A query with a mark and one without a streamer give the same answer."""
    program = _program(built)
    program.step()
    plain = program.answer_ids()
    program.steps_done = 0
    program.step(lambda _: None)
    assert program.answer_ids() == plain


def test_a_chat_template_wraps_the_prompt() -> None:
    """A tokenizer's chat template wraps the prompt as the user's message, followed by the model's turn."""

    class Instruct:
        def apply_chat_template(self, messages: list[dict[str, str]], **options: bool) -> list[int]:
            assert options["add_generation_prompt"]
            return [1, *(3 + ord(letter) for letter in messages[0]["content"]), 2]

    assert ChatTokenizer(Instruct()).encode("ab") == [1, 100, 101, 2]
