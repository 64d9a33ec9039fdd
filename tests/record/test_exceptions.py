"""The text of an exception is never empty, bounded and valid UTF-8."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hpc_core.record.exceptions import message_of, traceback_of, with_causes


@given(st.text(st.characters(codec=None), max_size=5000))
def test_any_text_can_be_encoded_and_is_bounded(text: str) -> None:
    """Lone surrogates are escaped, a long text is shortened, and an empty one becomes the type's name."""
    for text_of_error in (message_of(ValueError(text)), traceback_of(ValueError(text))):
        assert text_of_error
        assert len(text_of_error.encode()) < 50_000


def test_a_short_message_is_unchanged() -> None:
    """A short message is unchanged; without one it is the type's name."""
    assert message_of(ValueError("what is wrong: 3 < 4")) == "what is wrong: 3 < 4"
    assert message_of(ValueError()) == "ValueError"


def test_a_long_message_keeps_both_ends() -> None:
    """A long message keeps its start and end, and says how long it was."""
    message = message_of(ValueError(f"begin {'x' * 10**6} end"))
    assert (message[:6], message[-4:], "1,000,010 characters" in message) == ("begin ", " end", True)


@pytest.mark.parametrize("raised", [RuntimeError, SystemExit, KeyboardInterrupt])
def test_an_exception_that_cannot_be_printed_is_named(raised: type[BaseException]) -> None:
    """If `str` raises, the message names both types."""

    class Odd(Exception):  # noqa: N818
        def __str__(self) -> str:
            raise raised

    assert message_of(Odd()) == f"Odd, which cannot be printed: that raised {raised.__name__}"


def test_each_cause_comes_once() -> None:
    """A cycle of causes ends after each was listed once."""
    first, second = ValueError("first"), ValueError("second")
    first.__cause__, second.__cause__ = second, first
    assert list(with_causes(first)) == [first, second]
