"""Recorded row lengths of real data sets, as the package carries them: token counts, no texts.

Counted by the Llama-3 tokenizer with its BOS token, so an empty row has length 1. Knows no ids and no seeds.
"""

from __future__ import annotations

import json
from functools import cache
from importlib.resources import files

from hpc_core.case.errors import DataError

_KEYS = {"gsm8k": "prompt", "wikitext2": "row"}
"""Which list of the file holds the lengths of prompts or rows. GSM8K's file holds those of the answers too."""


@cache
def recorded_lengths(name: str) -> tuple[int, ...]:
    """Tokens in each row of a data set, BOS counted, in the data set's own order.

    "gsm8k": the first 500 questions of main/test. "wikitext2": the first 4000 rows of wikitext-2-raw-v1 test.

    Raises:
        DataError: no trace of this name is in the package.
    """
    if name not in _KEYS:
        raise DataError(f"No recorded lengths of {name!r}; the package has {' and '.join(map(repr, _KEYS))}.")
    text = files("hpc_core.case").joinpath("traces", f"{name}.json").read_text(encoding="utf-8")
    return tuple(int(length) for length in json.loads(text)[_KEYS[name]])
