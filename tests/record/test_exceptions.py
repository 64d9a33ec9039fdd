"""What an exception says is bounded, valid UTF-8 and always there."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hpc_core.record.exceptions import message_of, traceback_of, with_causes


@given(st.text(st.characters(codec=None), max_size=5000))
def test_any_text_can_be_encoded_and_is_bounded(text: str) -> None:
    """Lone surrogates are escaped, long texts lose their middle, an empty one becomes the type's name."""
    for said in (message_of(ValueError(text)), traceback_of(ValueError(text))):
        assert said
        assert len(said.encode()) < 50_000


def test_a_short_message_is_left_alone() -> None:
    """It is the message, or the type's name where there is none."""
    assert message_of(ValueError("what is wrong: 3 < 4")) == "what is wrong: 3 < 4"
    assert message_of(ValueError()) == "ValueError"


def test_a_long_message_keeps_both_ends() -> None:
    """Between them stands how long it was."""
    said = message_of(ValueError(f"begin {'x' * 10**6} end"))
    assert (said[:6], said[-4:], "1,000,010 characters" in said) == ("begin ", " end", True)


@pytest.mark.parametrize("raised", [RuntimeError, SystemExit, KeyboardInterrupt])
def test_what_printing_raises_replaces_nothing(raised: type[BaseException]) -> None:
    """The message names the type, and what went wrong."""

    class Odd(Exception):  # noqa: N818
        def __str__(self) -> str:
            raise raised

    assert message_of(Odd()) == f"Odd, which cannot be printed: that raised {raised.__name__}"


def test_each_cause_comes_once() -> None:
    """Causes that form a circle end the walk."""
    first, second = ValueError("first"), ValueError("second")
    first.__cause__, second.__cause__ = second, first
    assert list(with_causes(first)) == [first, second]
