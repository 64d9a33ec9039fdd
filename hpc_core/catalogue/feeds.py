"""Cases of the data path: workers, pinned memory, copies ahead, and when texts are tokenized, one change at a time."""

from __future__ import annotations

from typing import Any

from hpc_core.case.case import Case
from hpc_core.case.parts import DataSpec
from hpc_core.catalogue.shorthand import (
    finetune,
    llama_3b,
    lora,
    tiny,
)

_TEXTS = DataSpec(source="embedded", name="paragraphs")
"""Texts, so that the loader can tokenize them. A model with random weights has no tokenizer and uses their bytes."""
_tuned: dict[str, Any] = {"engine": "tuned", "loss": "chunked", "fusion": "blocks"}


def _name(settings: dict[str, Any]) -> str:
    words = ["data", f"w{settings['workers']}"]
    words += ["pinned"] if settings["pinned"] else []
    words += ["ahead"] if settings["ahead"] else []
    return "-".join([*words, *(["fetch"] if settings["tokenize"] == "fetch" else [])])


def _feeds(case: Case, ways: list[tuple[bool, int]], fetched: list[tuple[bool, int]]) -> list[Case]:
    """Return the case with 0, 2 and 4 workers for each (pinned, ahead), from the cache and with tokenization in the loader."""
    rows = [
        {"way": "loader", "workers": workers, "pinned": pinned, "ahead": ahead, "tokenize": tokenize}
        for tokenize, chosen in (("cached", ways), ("fetch", fetched))
        for pinned, ahead in chosen
        for workers in (0, 2, 4)
    ]
    return [case.vary(_name(settings), **settings) for settings in rows]


_full = finetune(
    llama_3b,
    lora(dropout=0.0, dtype="bfloat16"),
    variant="data-resident",
    batch=4,
    length=512,
    packing=True,
    data=_TEXTS,
    steps=16,
    graph=True,
    timeout_s=600,
    **_tuned,
)
DATA: tuple[Case, ...] = (_full, *_feeds(_full, [(False, 0), (True, 0), (True, 2)], [(False, 0), (True, 2)]))
"""Full-size LoRA with a captured step: 15 feeds and resident batches. Not in ALL; `bench/studies/data_path/feeds.py` runs them."""

_small = finetune(
    tiny, lora(), variant="data-resident", batch=2, length=32, packing=True, data=_TEXTS, steps=4, timeout_s=120
)
TINY_DATA: tuple[Case, ...] = (_small, *_feeds(_small, [(False, 0), (False, 2)], [(False, 0), (False, 2)]))
"""The same on a CPU, without pinned memory. Not in the tiny suite: on two cores, step times with loader processes are still
inconclusive after 24 pairs, which would add 90 s to an A/B of the suite."""
