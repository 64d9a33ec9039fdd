"""Recorded row lengths of real data sets: token counts without texts.

Counted by the Llama-3 tokenizer with its BOS token, so an empty row has length 1.
"""

from __future__ import annotations

import json
from functools import cache
from importlib.resources import files

from hpc_core.case.errors import DataError

_KEYS = {"gsm8k": "prompt", "wikitext2": "row"}
"""The key of the list of lengths in each file. GSM8K's file also contains the lengths of the answers."""


@cache
def recorded_lengths(name: str) -> tuple[int, ...]:
    """Return the tokens in each row of a data set, BOS included, in the order of the data set.

    "gsm8k": the first 500 questions of main/test. "wikitext2": the first 4000 rows of wikitext-2-raw-v1 test.

    Raises:
        DataError: the package has no trace of this name.
    """
    if name not in _KEYS:
        raise DataError(f"No recorded lengths of {name!r}; the package has {' and '.join(map(repr, _KEYS))}.")
    text = files("hpc_core.case").joinpath("traces", f"{name}.json").read_text(encoding="utf-8")
    return tuple(int(length) for length in json.loads(text)[_KEYS[name]])
