"""Recorded lengths that come with the package."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from hpc_core.case.errors import DataError
from hpc_core.case.lengths import recorded_lengths

SHARED = Path(__file__).parents[4] / "shared" / "data"


def test_gsm8k_holds_the_first_500_prompts() -> None:
    """The original report's 500 questions have 29,639 tokens, 23 to 137 each."""
    lengths = recorded_lengths("gsm8k")
    assert (len(lengths), sum(lengths), min(lengths), max(lengths)) == (500, 29_639, 23, 137)


def test_wikitext_holds_the_first_4000_rows() -> None:
    """The original report's 4000 rows have 272,314 tokens; 1355 rows are empty, which counts as one token."""
    lengths = recorded_lengths("wikitext2")
    assert (len(lengths), sum(lengths), max(lengths)) == (4000, 272_314, 555)
    assert lengths.count(1) == 1355


def test_an_unknown_trace_is_refused() -> None:
    """The error names the known traces."""
    with pytest.raises(DataError, match="'c4'; the package has 'gsm8k' and 'wikitext2'"):
        recorded_lengths("c4")


@pytest.mark.skipif(not SHARED.is_dir(), reason="../shared/data with the original traces is not here")
def test_package_copies_equal_the_originals() -> None:
    """The package's lengths are those counted with the Llama-3 tokenizer."""
    gsm8k = json.loads((SHARED / "traces" / "gsm8k-test-500.json").read_text())
    wikitext = json.loads((SHARED / "traces" / "wikitext2-test-4000.json").read_text())
    assert list(recorded_lengths("gsm8k")) == gsm8k["prompt"]
    assert list(recorded_lengths("wikitext2")) == wikitext["row"]
