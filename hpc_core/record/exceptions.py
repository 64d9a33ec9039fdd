"""What an exception of the code under test says. It may raise when it is printed, be no text, hold 50 MB, or be its own cause."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterator

_MESSAGE_CHARACTERS = 2000
_TRACEBACK_CHARACTERS = 4000


def message_of(value: object) -> str:
    """Return what `str()` of an exception or its argument says, or the name of its type if that is nothing."""
    return _bounded(value, str, _MESSAGE_CHARACTERS).strip() or type(value).__name__


def traceback_of(error: BaseException) -> str:
    """Return the traceback, with those of its causes."""
    return _bounded(error, lambda _: "".join(traceback.format_exception(error)), _TRACEBACK_CHARACTERS)


def with_causes(error: BaseException) -> Iterator[BaseException]:
    """Yield an exception, its cause, the cause of that, and so on; each once, since causes can form a circle."""
    met: set[int] = set()
    at: BaseException | None = error
    while at is not None and id(at) not in met:
        yield at
        met.add(id(at))
        at = at.__cause__


def _bounded(value: object, printed: Callable[[object], str], limit: int) -> str:
    """Return a text of valid UTF-8: its first quarter and its last part where it is longer than the limit."""
    try:
        text = "".join((printed(value), ""))  # a subclass of str becomes a plain one
    except BaseException as error:  # whatever printing raises, even SystemExit, must not replace what was raised first
        return f"{type(value).__name__}, which cannot be printed: that raised {type(error).__name__}"
    if len(text) > limit:
        first = limit // 4
        text = f"{text[:first]} … [of {len(text):,} characters] … {text[first - limit :]}"
    return text.encode("utf-8", "backslashreplace").decode()
