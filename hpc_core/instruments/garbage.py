"""Python's garbage collector out of the way for a while. Imports nothing of ours."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator

__all__ = ["uncollected"]


@contextlib.contextmanager
def uncollected() -> Iterator[None]:
    """In the block garbage is not collected: nothing is timed that is not the work's, or thousands of objects that stay are not walked again and again."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()
