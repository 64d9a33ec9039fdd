"""Training batches: padded, packed and counted."""

from __future__ import annotations

from itertools import pairwise
from typing import Literal

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from hpc_core.builders.data.batching import Batch, EpochSize, batches, epoch_size
from hpc_core.builders.data.rows import token_rows
from hpc_core.case.errors import DataError
from hpc_core.case.parts import DataSpec
from hpc_core.case.workloads import FinetuneSpec

Padding = Literal["longest", "max_length"]
WIKITEXT = DataSpec(source="trace", name="wikitext2")

ragged_rows = st.lists(st.lists(st.integers(3, 50), max_size=12), min_size=1, max_size=40)
paddings = st.sampled_from(["longest", "max_length"])


def padded_spec(padding: Padding, batch: int = 4, length: int = 512, seed: int = 0) -> FinetuneSpec:
    data = DataSpec(source="trace", name="wikitext2", seed=seed)
    return FinetuneSpec(batch=batch, length=length, padding=padding, data=data)


def packed_spec(batch: int = 4, length: int = 512, seed: int = 0) -> FinetuneSpec:
    return FinetuneSpec(
        batch=batch, length=length, packing=True, data=DataSpec(source="trace", name="wikitext2", seed=seed)
    )


def without_padding(batch: Batch) -> list[list[int]]:
    """The real tokens of each row, by its mask."""
    assert batch.mask is not None
    return [row[: sum(mask)] for row, mask in zip(batch.ids, batch.mask, strict=True)]


def total(rows: int, built: list[Batch], skipped: int) -> EpochSize:
    """The size of an epoch, added up from its batches."""
    return EpochSize(
        rows=rows,
        batches=len(built),
        tokens=sum(batch.tokens for batch in built),
        padded=sum(batch.padded for batch in built),
        skipped=skipped,
    )


# Numbers of the original report


@pytest.fixture(scope="module")
def wikitext() -> list[list[int]]:
    """The 4000 rows of the original report, uncut, as random ids of the recorded lengths."""
    return token_rows(WIKITEXT, count=None, length=None, vocab_size=32000, tokenizer=None)


def test_max_length_makes_two_million_tokens_of_wikitext(wikitext: list[list[int]]) -> None:
    """Padded to 512, 272,271 real tokens become 1000 batches of 2,048 places, 86.7 % of them padding.

    Batches of four empty rows, which hold one BOS token each, are skipped; with them the sums are the report's.
    """
    size = epoch_size(wikitext, padded_spec("max_length"))
    assert size.rows == 4000
    assert size.batches + size.skipped == 1000
    assert 0 < size.skipped < 30
    assert size.tokens + 4 * size.skipped == 272_271
    assert size.tokens + size.padded + 2048 * size.skipped == 2_048_000
    assert size.padded / (size.tokens + size.padded) == pytest.approx(0.867, abs=0.003)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_longest_makes_685_thousand_tokens_of_wikitext(wikitext: list[list[int]], seed: int) -> None:
    """Padded to the longest row of each batch of four, the same tokens fill about 685,000 places, 60 % of them padding."""
    size = epoch_size(wikitext, padded_spec("longest", seed=seed))
    assert size.tokens + 4 * size.skipped == 272_271
    assert size.tokens + size.padded == pytest.approx(685_000, rel=0.02)
    assert size.padded / (size.tokens + size.padded) == pytest.approx(0.60, abs=0.01)


def test_packing_makes_132_batches_of_wikitext(wikitext: list[list[int]]) -> None:
    """Uncut, the rows hold 272,314 tokens, which packed into blocks of 512 fill 132 batches of four."""
    assert sum(map(len, wikitext)) == 272_314
    expected = EpochSize(rows=4000, batches=272_314 // 2048, tokens=132 * 2048, padded=0, skipped=0)
    assert epoch_size(wikitext, packed_spec()) == expected


# Laws of padded batches


@given(rows=ragged_rows, padding=paddings, batch=st.integers(1, 5), length=st.integers(2, 10), seed=st.integers(0, 99))
def test_padding_loses_no_token(rows: list[list[int]], padding: Padding, batch: int, length: int, seed: int) -> None:
    """Every row keeps its ids in order and is used once; only batches of one-token rows and the last, incomplete batch are dropped."""
    spec = padded_spec(padding, batch, length, seed)
    cut = sorted(row[:length] for row in rows if row)
    assume(len(cut) >= batch and max(map(len, cut)) >= 2)
    try:
        built = list(batches(rows, spec))
    except DataError:  # the only rows with two tokens were the spare ones of the last, incomplete batch
        assert len(cut) % batch
        return
    for one in built:
        width = len(one.ids[0])
        assert one.mask is not None
        assert [len(row) for row in one.ids + one.mask + one.labels] == [width] * (3 * batch)
        assert width == (length if padding == "max_length" else max(sum(mask) for mask in one.mask))
        assert one.tokens + one.padded == batch * width
        assert one.tokens == sum(map(sum, one.mask))
        assert max(sum(mask) for mask in one.mask) >= 2
        for row, mask, labels in zip(one.ids, one.mask, one.labels, strict=True):
            assert mask == sorted(mask, reverse=True)
            assert row[sum(mask) :] == [0] * (width - sum(mask))
            assert labels == row[: sum(mask)] + [-100] * (width - sum(mask))
    used = [row for one in built for row in without_padding(one)]
    unused = list(cut)
    for row in used:
        unused.remove(row)  # each row of a batch is one of the rows handed in, and none is used twice
    size = epoch_size(rows, spec)
    assert size == total(len(rows), built, size.skipped)
    assert len(unused) == size.skipped * batch + len(cut) % batch


@given(rows=ragged_rows, padding=paddings, seed=st.integers(0, 99))
def test_same_seed_gives_the_same_batches(rows: list[list[int]], padding: Padding, seed: int) -> None:
    """Batches depend only on rows, spec and seed, and the given rows are not changed."""
    assume(any(len(row) >= 2 for row in rows))
    before = [list(row) for row in rows]
    spec = padded_spec(padding, 1, 8, seed)
    assert list(batches(rows, spec)) == list(batches(rows, spec))
    assert rows == before


def test_rows_are_shuffled_by_the_seed_of_the_data() -> None:
    """Each seed gives its own order, and none keeps the order of the data."""
    rows = [[3 + number] * 2 for number in range(30)]
    orders = [
        [row for batch in batches(rows, padded_spec("longest", 1, 2, seed)) for row in batch.ids] for seed in (1, 2)
    ]
    assert orders[0] != orders[1]
    assert rows not in orders
    assert sorted(orders[0]) == sorted(orders[1]) == rows


def test_batches_that_predict_nothing_are_skipped_and_counted() -> None:
    """A batch of one-token rows, whose loss would be NaN, is skipped and counted; beside a longer row they stay."""
    spec = padded_spec("longest", 1, 8)
    assert len(list(batches([[1], [1, 5], [1]], spec))) == 1
    assert epoch_size([[1], [1, 5], [1]], spec) == EpochSize(rows=3, batches=1, tokens=2, padded=0, skipped=2)
    (both,) = batches([[1], [1, 5]], padded_spec("longest", 2, 8))
    assert sorted(both.ids) == [[1, 0], [1, 5]]
    assert sorted(both.labels) == [[1, -100], [1, 5]]


def test_only_rows_of_one_token_are_refused() -> None:
    """Data in which no batch has a label is refused."""
    with pytest.raises(DataError, match="No row of 2 batches has 2 tokens"):
        batches([[1]] * 4, padded_spec("longest", 2, 8))


def test_too_few_rows_say_how_many_are_needed() -> None:
    """Too few rows for a batch are refused at once, and the error says how many are missing."""
    with pytest.raises(DataError, match=r"needs 4 rows, the data has 2 and 1 without any token: give 2 more rows"):
        batches([[5, 6], [], [7, 8]], padded_spec("longest"))


# Unpadded


def test_random_rows_stay_in_order_without_a_mask() -> None:
    """Random rows are neither shuffled nor masked, and an incomplete last batch is dropped."""
    spec = FinetuneSpec(batch=2, length=3)
    rows = token_rows(spec.data, count=5, length=3, vocab_size=100, tokenizer=None)
    built = list(batches(rows, spec))
    assert [row for batch in built for row in batch.ids] == rows[:4]
    assert all(batch.mask is None and batch.labels == batch.ids for batch in built)
    assert epoch_size(rows, spec) == EpochSize(rows=5, batches=2, tokens=12, padded=0, skipped=0)


@pytest.mark.parametrize("wrong", [[], [5, 6], [5, 6, 7, 8]])
def test_an_unpadded_row_of_another_length_is_refused(wrong: list[int]) -> None:
    """Without padding a row of another length is refused by its number."""
    with pytest.raises(DataError, match=rf"Row 1 has {len(wrong)} tokens, .* need exactly 3"):
        batches([[5, 6, 7], wrong], FinetuneSpec(batch=1, length=3))


# Laws of packing


@given(rows=ragged_rows, batch=st.integers(1, 3), length=st.integers(2, 10), seed=st.integers(0, 99))
def test_packing_loses_only_the_tail(rows: list[list[int]], batch: int, length: int, seed: int) -> None:
    """Blocks are full; joined they are whole rows in some order, without a tail of less than one batch."""
    tagged = [[1000 * (number + 1) + place for place in range(len(row))] for number, row in enumerate(rows)]
    tokens = sum(map(len, tagged))
    assume(tokens >= batch * length)
    spec = packed_spec(batch, length, seed)
    built = list(batches(tagged, spec))
    assert all(len(block) == length for one in built for block in one.ids)
    assert all(len(one.ids) == batch and one.mask is None and one.labels == one.ids for one in built)
    stream = [token for one in built for block in one.ids for token in block]
    assert 0 <= tokens - len(stream) < batch * length
    for earlier, later in pairwise(stream):
        inside = earlier // 1000 == later // 1000
        ended = earlier % 1000 == len(tagged[earlier // 1000 - 1]) - 1
        assert (later == earlier + 1 and not ended) if inside else (ended and later % 1000 == 0)
    assert len(set(stream)) == len(stream)
    assert epoch_size(tagged, spec) == total(len(rows), built, 0)


def test_packing_shuffles_rows_by_the_seed() -> None:
    """Each seed joins the rows in its own order."""
    rows = [[number] for number in range(3, 43)]
    first, second = ([batch.ids for batch in batches(rows, packed_spec(2, 20, seed))] for seed in (1, 2))
    assert first != second


def test_too_few_tokens_to_pack_say_how_many_are_needed() -> None:
    """Too few tokens for one packed batch are refused with both numbers."""
    with pytest.raises(DataError, match=r"2 blocks of 8 = 16 tokens, the 3 rows hold 12"):
        batches([[5] * 4] * 3, packed_spec(2, 8))
