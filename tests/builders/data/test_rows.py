"""Token rows and prompt batches."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hpc_core.builders.data.rows import ByteTokenizer, prompt_batches, token_rows
from hpc_core.builders.data.texts import texts
from hpc_core.case.errors import DataError
from hpc_core.case.lengths import recorded_lengths
from hpc_core.case.parts import DataSpec
from hpc_core.case.workloads import GenerateSpec

SHARED = Path(__file__).parents[4] / "shared" / "data"
RANDOM = DataSpec()
TRACE = DataSpec(source="trace", name="wikitext2", rows=300)
PROBLEMS = DataSpec(source="embedded", name="problems")


class WordTokenizer:
    """One id per word, 10 plus its length, and no BOS."""

    def encode(self, text: str, /) -> list[int]:
        """The ids of the words."""
        return [10 + len(word) for word in text.split()]


# Random


@given(seed=st.integers(0, 2**32), count=st.integers(1, 8), more=st.integers(0, 8), length=st.integers(1, 40))
def test_random_rows_are_full_and_fewer_rows_are_a_prefix(seed: int, count: int, more: int, length: int) -> None:
    """Each row has the requested length, and more rows do not change the first ones."""
    data = DataSpec(seed=seed)
    few = token_rows(data, count=count, length=length, vocab_size=500, tokenizer=None)
    many = token_rows(data, count=count + more, length=length, vocab_size=500, tokenizer=None)
    assert [len(row) for row in few] == [length] * count
    assert many[:count] == few
    assert all(3 <= token < 500 for row in many for token in row)


def test_random_rows_differ_from_row_to_row() -> None:
    """No two of a hundred rows are equal."""
    rows = token_rows(RANDOM, count=100, length=16, vocab_size=32000, tokenizer=None)
    assert len({tuple(row) for row in rows}) == 100


def test_random_count_may_come_from_the_data() -> None:
    """The data's rows= is the default count, and a limit for any other."""
    data = DataSpec(rows=3)
    assert len(token_rows(data, count=None, length=4, vocab_size=100, tokenizer=None)) == 3
    assert len(token_rows(data, count=2, length=4, vocab_size=100, tokenizer=None)) == 2
    with pytest.raises(DataError, match=r"5 rows are needed of 'random ids' .*limited by rows= to 3"):
        token_rows(data, count=5, length=4, vocab_size=100, tokenizer=None)


@pytest.mark.parametrize(
    ("count", "length", "message"),
    [
        (None, 4, "no end: give count="),
        (4, None, "Random rows have no length"),
        (0, 4, "count must be at least 1, got 0"),
    ],
)
def test_random_rows_need_count_and_length(count: int | None, length: int | None, message: str) -> None:
    """Random rows need a positive count and a length."""
    with pytest.raises(DataError, match=message):
        token_rows(RANDOM, count=count, length=length, vocab_size=100, tokenizer=None)


def test_more_random_rows_than_the_host_can_hold_are_refused() -> None:
    """Before any is drawn, with both numbers: the kernel would end the process without a word."""
    with pytest.raises(
        DataError, match=r"40 random rows of 10,000,000,000 tokens need about .* of the host's memory, and .* are free"
    ):
        token_rows(RANDOM, count=40, length=10_000_000_000, vocab_size=100, tokenizer=None)


# Traces


def test_trace_rows_have_the_recorded_lengths_and_begin_with_bos() -> None:
    """Rows have the recorded lengths, begin with BOS and contain no other special id."""
    rows = token_rows(TRACE, count=None, length=None, vocab_size=32000, tokenizer=None)
    assert [len(row) for row in rows] == list(recorded_lengths("wikitext2")[:300])
    assert {row[0] for row in rows} == {1}
    assert all(3 <= token < 32000 for row in rows for token in row[1:])


@given(length=st.integers(1, 300), count=st.integers(1, 40))
def test_cutting_a_trace_changes_nothing_but_the_length(length: int, count: int) -> None:
    """A cut row is the beginning of the whole one."""
    whole = token_rows(TRACE, count=count, length=None, vocab_size=32000, tokenizer=None)
    cut = token_rows(TRACE, count=count, length=length, vocab_size=32000, tokenizer=None)
    assert cut == [row[:length] for row in whole]


def test_a_trace_has_an_end() -> None:
    """More rows than were recorded are refused, as rows= and as count=."""
    with pytest.raises(DataError, match=r"600 rows were asked of 'gsm8k' \(trace\), which has 500"):
        token_rows(
            DataSpec(source="trace", name="gsm8k", rows=600), count=None, length=None, vocab_size=99, tokenizer=None
        )
    with pytest.raises(DataError, match=r"301 rows are needed of 'wikitext2' \(trace\), .*limited by rows= to 300"):
        token_rows(TRACE, count=301, length=None, vocab_size=99, tokenizer=None)


# Texts


@given(text=st.text())
def test_bytes_can_be_read_back(text: str) -> None:
    """The byte tokenizer gives BOS and then 3 + byte, from which the text can be read back."""
    first, *rest = ByteTokenizer().encode(text)
    assert first == 1
    assert bytes(token - 3 for token in rest).decode() == text.encode(errors="replace").decode()


def test_texts_without_a_tokenizer_become_bytes() -> None:
    """Without a tokenizer the rows are the byte tokenizer's, for which a vocabulary of 259 ids suffices."""
    rows = token_rows(PROBLEMS, count=4, length=None, vocab_size=259, tokenizer=None)
    assert rows == [ByteTokenizer().encode(text) for text in texts(PROBLEMS)[:4]]


def test_bytes_need_259_ids() -> None:
    """A smaller vocabulary is refused before any text is read."""
    with pytest.raises(DataError, match="bytes, which need 259 ids; the model has 258"):
        token_rows(DataSpec(source="file", name="none.txt"), count=4, length=None, vocab_size=258, tokenizer=None)


def test_a_given_tokenizer_is_used_and_rows_are_cut() -> None:
    """Rows are the tokenizer's ids, cut to the length; without BOS an empty text has none."""
    data = DataSpec(source="embedded", name="paragraphs", rows=4)
    rows = token_rows(data, count=None, length=5, vocab_size=100, tokenizer=WordTokenizer())
    assert rows[:3] == [[], [11, 16, 11], []]
    assert rows[3] == [11, 15, 16, 18, 15]  # A river begins wherever water ...


def test_ids_outside_the_vocabulary_are_refused() -> None:
    """A token id beyond the vocabulary is refused with its row."""
    with pytest.raises(DataError, match=r"Row 0 of 'problems' holds token id \d+, the model knows 0 to 11"):
        token_rows(PROBLEMS, count=1, length=None, vocab_size=12, tokenizer=WordTokenizer())


def test_more_texts_than_there_are_is_refused() -> None:
    """A count beyond the texts is refused with their number."""
    with pytest.raises(DataError, match=rf"999 rows are needed .*which has {len(texts(PROBLEMS))}"):
        token_rows(PROBLEMS, count=999, length=None, vocab_size=300, tokenizer=None)


# Prompt batches


def test_random_prompts_need_no_mask() -> None:
    """Random prompts have one length, so there is no padding and no mask."""
    built = prompt_batches(GenerateSpec(batch=2, prompts=3, prompt_length=7), vocab_size=100, tokenizer=None)
    assert [(len(batch.ids), batch.mask, batch.tokens, batch.padded) for batch in built] == [(2, None, 14, 0)] * 3
    assert len({tuple(row) for batch in built for row in batch.ids}) == 6


@given(batch=st.integers(1, 9), prompts=st.integers(1, 9), seed=st.integers(0, 1000))
def test_prompts_are_padded_on_the_left_and_none_is_lost(batch: int, prompts: int, seed: int) -> None:
    """Without their left padding the batches are the rows in order."""
    data = DataSpec(source="trace", name="gsm8k", seed=seed)
    spec = GenerateSpec(batch=batch, prompts=prompts, prompt_length=None, data=data)
    rows = token_rows(data, count=batch * prompts, length=None, vocab_size=1000, tokenizer=None)
    built = prompt_batches(spec, vocab_size=1000, tokenizer=None)
    assert len(built) == prompts
    unpadded = []
    for one in built:
        width = len(one.ids[0])
        masks = one.mask or [[1] * width] * batch
        assert [len(row) for row in one.ids] == [len(mask) for mask in masks] == [width] * batch
        assert one.tokens + one.padded == batch * width
        assert one.tokens == sum(map(sum, masks))
        assert (one.mask is None) == (one.padded == 0)
        for row, mask in zip(one.ids, masks, strict=True):
            assert mask == sorted(mask)
            assert set(row[: width - sum(mask)]) <= {0}
            unpadded.append(row[width - sum(mask) :])
    assert unpadded == rows


def test_too_few_prompts_are_refused() -> None:
    """60 batches of 10 exceed the 500 recorded prompts."""
    spec = GenerateSpec(batch=10, prompts=60, prompt_length=None, data=DataSpec(source="trace", name="gsm8k"))
    with pytest.raises(DataError, match=r"600 rows are needed of 'gsm8k' \(trace\), which has 500"):
        prompt_batches(spec, vocab_size=1000, tokenizer=None)


def test_a_prompt_without_tokens_is_refused() -> None:
    """An empty prompt is refused by its number."""
    data = DataSpec(source="embedded", name="paragraphs")
    spec = GenerateSpec(batch=2, prompts=1, prompt_length=None, data=data)
    with pytest.raises(DataError, match="Prompt 0 of 'paragraphs' has no token"):
        prompt_batches(spec, vocab_size=100, tokenizer=WordTokenizer())


@pytest.mark.skipif(not SHARED.is_dir(), reason="../shared/data with the real GSM8K is not here")
def test_real_questions_become_prompts() -> None:
    """GSM8K's test file gives batches whose bytes are its questions."""
    data = DataSpec(source="file", name=str(SHARED / "gsm8k" / "test.jsonl"))
    spec = GenerateSpec(batch=1, prompts=3, prompt_length=None, data=data)
    built = prompt_batches(spec, vocab_size=512, tokenizer=None)
    decoded = [bytes(token - 3 for token in batch.ids[0][1:]).decode() for batch in built]
    assert decoded == texts(data)[:3]
