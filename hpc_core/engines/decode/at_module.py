"""Let whoever follows modules see one at work, though its forward is not called."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from torch.nn.modules import module as hooks

__all__ = ["at_module"]


@contextlib.contextmanager
def at_module(module: Any) -> Iterator[None]:
    """torch's global hooks of forwards run as if this module's forward were the block; they are given no input and no output. Its own hooks do not.

    What a profile says of a place then holds for work that is done with a module's weights and not by the module.
    """
    whole: Any = hooks
    for hook in tuple(whole._global_forward_pre_hooks.values()):
        hook(module, ())
    try:
        yield
    finally:
        for key, hook in tuple(whole._global_forward_hooks.items()):
            if key in whole._global_forward_hooks_with_kwargs:
                hook(module, (), {}, None)
            else:
                hook(module, (), None)
