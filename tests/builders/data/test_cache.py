"""Batches from the cache, and batches tokenized on demand, equal those of `batching.batches`; a damaged file is never read."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from hpc_core.builders.data import cache
from hpc_core.builders.data.batching import IGNORED_LABEL, Batch, BlockSource, EpochSize, batches, epoch_size
from hpc_core.builders.data.cache import CollatedEpoch, cache_folder, cache_key, cached_epoch, write_collated
from hpc_core.builders.data.fetched import FetchedEpoch
from hpc_core.builders.data.rows import token_rows
from hpc_core.case.errors import DataError, SpecError
from hpc_core.case.parts import DataSpec
from hpc_core.case.workloads import FeedSpec, FinetuneSpec

TRACE = DataSpec(source="trace", name="wikitext2", rows=200)
PACKED = FinetuneSpec(batch=2, length=64, packing=True, data=TRACE)
rows_of_ids = st.lists(st.lists(st.integers(3, 50), max_size=12), min_size=1, max_size=30)
lines_of_text = st.lists(
    st.text(st.characters(codec="ascii", categories=["L", "Zs"]), max_size=9), min_size=1, max_size=30
)
layouts: Any = st.sampled_from([{"packing": True}, {"padding": "longest"}, {"padding": "max_length"}])


def _same(source: BlockSource, expected: list[Batch]) -> None:
    """Ids, lengths and sizes of the source, and its epoch's totals, are those of the batches."""
    assert len(source.sizes) == source.epoch.batches == len(expected)
    for index, batch in enumerate(expected):
        block = source.block(index)
        assert block.ids.dtype == np.int64
        assert block.ids.tolist() == batch.ids
        real = [[label != IGNORED_LABEL for label in row] for row in batch.labels]
        assert block.lengths.tolist() == [sum(row) for row in real]
        assert source.sizes[index] == (len(batch.ids[0]), batch.tokens, batch.padded)
    assert source.epoch.tokens == sum(batch.tokens for batch in expected)
    assert source.masked == (expected[0].mask is not None)


def _spec(layout: dict[str, Any], batch: int, length: int, **data: Any) -> FinetuneSpec:
    return FinetuneSpec(batch=batch, length=length, data=DataSpec(**data), **layout)


def _made(rows: list[list[int]], spec: FinetuneSpec) -> list[Batch]:
    try:
        return list(batches(rows, spec))
    except DataError:
        assume(False)
        raise


@given(rows_of_ids, layouts, st.integers(1, 4), st.integers(2, 8), st.integers(0, 3))
def test_a_file_gives_back_what_was_written(
    rows: list[list[int]], layout: Any, batch: int, length: int, seed: int
) -> None:
    """A stored epoch gives back every batch in order, with its counts."""
    spec = _spec(layout, batch, length, source="trace", name="wikitext2", seed=seed)
    expected = _made(rows, spec)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "x.batches"
        write_collated(path, "key", expected, epoch_size(rows, spec), batch=batch)
        _same(CollatedEpoch(path, "key"), expected)


@given(lines_of_text, layouts, st.integers(1, 4), st.integers(2, 8), st.integers(0, 3))
def test_texts_tokenized_in_the_fetch_give_the_same_batches(
    lines: list[str], layout: Any, batch: int, length: int, seed: int
) -> None:
    """A batch that is tokenized when fetched equals the one from collating all rows, empty rows included."""
    assume("".join(lines).strip())
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "lines.txt"
        path.write_text("".join(f"{line}\n" for line in lines))
        spec = _spec(layout, batch, length, source="file", name=str(path), seed=seed)
        known: dict[str, Any] = {"count": None, "vocab_size": 512, "tokenizer": None}
        rows = token_rows(spec.data, length=None if spec.packing else length, **known)
        expected = _made(rows, spec)
        _same(FetchedEpoch(spec, **known), expected)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The cache folder of this test."""
    monkeypatch.setenv("HPC_CORE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "batches"


def _cached(spec: FinetuneSpec = PACKED) -> tuple[CollatedEpoch, str]:
    return cached_epoch(spec, count=spec.data.rows, vocab_size=1000, tokenizer=None)


def test_an_epoch_is_made_once(folder: Path) -> None:
    """The second call finds the first one's file, the only one in the folder, and gives the same batches."""
    rows = token_rows(TRACE, count=200, length=None, vocab_size=1000, tokenizer=None)
    (first, first_note), (second, second_note) = _cached(), _cached()
    assert first_note.startswith("made and stored as")
    assert second_note.startswith("found as")
    assert [path.suffix for path in folder.iterdir()] == [".batches"]
    for epoch in (first, second):
        _same(epoch, list(batches(rows, PACKED)))


def test_a_damaged_epoch_is_made_again_and_says_so(folder: Path) -> None:
    """A truncated file is replaced, and the sentence gives both sizes."""
    _cached()
    path = next(folder.iterdir())
    whole = path.read_bytes()
    path.write_bytes(whole[:-5])
    _, how = _cached()
    assert how.startswith(f"made again, because {path} is not an intact file")
    assert f"has {len(whole) - 5} bytes, but its header needs {len(whole)}" in how
    assert path.read_bytes() == whole


@given(st.data())
def test_no_flipped_byte_is_read_as_batches(data: st.DataObject) -> None:
    """A changed byte anywhere in the file is an error, or changes nothing that is read."""
    rows = [[3, 4, 5], [6, 7], [8, 9, 10, 11]]
    spec = _spec({"padding": "longest"}, 1, 8, source="trace", name="wikitext2")
    expected = list(batches(rows, spec))
    with tempfile.TemporaryDirectory() as name:
        path = Path(name) / "x.batches"
        write_collated(path, "key", expected, epoch_size(rows, spec), batch=1)
        content = bytearray(path.read_bytes())
        at = data.draw(st.integers(0, len(content) - 1))
        content[at] = data.draw(st.integers(0, 255).filter(lambda value: value != content[at]))
        path.write_bytes(content)
        try:
            stored = CollatedEpoch(path, "key")
        except DataError:
            return
        _same(stored, expected)
        assert stored.epoch == epoch_size(rows, spec)


@pytest.mark.parametrize(("batches", "batch"), [(-1, 1), (0, 1), (1, 0), (2**40, 1), (1, 50)])
def test_a_header_with_impossible_counts_is_refused(tmp_path: Path, batches: int, batch: int) -> None:
    """Counts that do not fit the file's numbers are refused, even with a correct checksum."""
    path = tmp_path / "x.batches"
    epoch = EpochSize(rows=1, batches=1, tokens=2, padded=0, skipped=0)
    header = cache._Header(
        format=cache.FORMAT, key="key", batches=batches, batch=batch, masked=False, numbers=4, checksum=0, epoch=epoch
    )
    body = np.array([2, 2, 5, 6], dtype="<i4").tobytes()
    encoded = msgspec.json.encode(msgspec.structs.replace(header, checksum=cache._checksum(header, body)))
    encoded += b" " * (-(len(cache._MAGIC) + 8 + len(encoded)) % 64)
    path.write_bytes(cache._MAGIC + len(encoded).to_bytes(8, "little") + encoded + body)
    with pytest.raises(DataError, match=f"its header has {batches} batches of {batch} rows in 4 numbers"):
        CollatedEpoch(path, "key")


def test_a_foreign_epoch_is_refused(folder: Path) -> None:
    """A file that holds another epoch is refused with both keys."""
    _cached()
    path = next(folder.iterdir())
    with pytest.raises(DataError, match=f"key {path.stem}, not 1 and other"):
        CollatedEpoch(path, "other")


class _Words:
    """A tokenizer that shows its vocabulary by `get_vocab`."""

    def __init__(self, first: int):
        self._first = first

    def get_vocab(self) -> dict[str, int]:
        return {"word": self._first}

    def encode(self, text: str, /) -> list[int]:
        return [self._first] * len(text.split())


def test_everything_that_decides_the_batches_is_in_the_key(tmp_path: Path) -> None:
    """The key depends on data, layout, vocabulary, tokenizer and text, and not on steps, learning rate or workers."""
    lines = tmp_path / "lines.txt"
    lines.write_text("one\ntwo\n")
    file = DataSpec(source="file", name=str(lines))
    arguments: dict[str, Any] = {"count": None, "vocab_size": 1000, "tokenizer": None}

    def key(spec: FinetuneSpec = PACKED, **changed: Any) -> str:
        return cache_key(spec, **(arguments | changed))

    def spec(**changed: Any) -> FinetuneSpec:
        fields: dict[str, Any] = {"batch": 2, "length": 64, "packing": True, "data": TRACE}
        return FinetuneSpec(**fields | changed)

    keys = [
        key(),
        key(spec(batch=3)),
        key(spec(length=32)),
        key(spec(packing=False, padding="longest")),
        key(spec(data=DataSpec(source="trace", name="gsm8k", rows=200))),
        key(spec(data=DataSpec(source="trace", name="wikitext2", rows=200, seed=1))),
        key(vocab_size=999),
        key(count=100),
        key(spec(data=file)),
        key(spec(data=file), tokenizer=_Words(3)),
        key(spec(data=file), tokenizer=_Words(4)),
    ]
    lines.write_text("one\nthree\n")
    keys.append(key(spec(data=file)))
    assert len(set(keys)) == len(keys)
    assert key(spec(steps=99, learning_rate=1.0, feed=FeedSpec(way="loader", workers=3))) == key()


def test_a_tokenizer_that_cannot_be_identified_is_refused() -> None:
    """A tokenizer without a readable vocabulary cannot be part of a key; the error names the alternative."""
    paragraphs = FinetuneSpec(packing=True, data=DataSpec(source="embedded", name="paragraphs"))
    with pytest.raises(DataError, match=r"object has neither backend_tokenizer nor get_vocab.*tokenize='fetch'"):
        cache_key(paragraphs, count=None, vocab_size=1000, tokenizer=object())


def test_the_folder_can_be_set(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The cache is in HPC_CORE_CACHE, else in an absolute XDG_CACHE_HOME, else at home; an unwritable folder is refused."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("HPC_CORE_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    assert cache_folder() == tmp_path / ".cache" / "hpc-core"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_folder() == tmp_path / "xdg" / "hpc-core"
    (tmp_path / "file").write_text("")
    for unwritable in (tmp_path / "file", tmp_path / ("long" * 100)):
        monkeypatch.setenv("HPC_CORE_CACHE", str(unwritable))
        with pytest.raises(DataError, match="Set HPC_CORE_CACHE to a folder that can be written"):
            _cached()


def test_a_feed_that_contradicts_itself_is_refused() -> None:
    """Workers without a loader, tokenizing without texts, and counts out of range are refused."""
    with pytest.raises(SpecError, match="workers, pinned belongs to a feed with way='loader'"):
        FeedSpec(workers=2, pinned=True)
    with pytest.raises(SpecError, match="ahead must be 0 to 64, got -1"):
        FeedSpec(way="loader", ahead=-1)
    with pytest.raises(SpecError, match="tokenize='fetch' needs texts; source='trace' has none"):
        FinetuneSpec(packing=True, data=TRACE, feed=FeedSpec(way="loader", tokenize="fetch"))
    with pytest.raises(DataError, match="needs texts, and source='trace' has none"):
        FetchedEpoch(PACKED, count=None, vocab_size=1000, tokenizer=None)
