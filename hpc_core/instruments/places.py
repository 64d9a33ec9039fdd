"""Which module is at work: in the forward by hooks, in the backward by marks that the forward left in autograd's graph.

Works on any module that runs while it is active, those of the code under test included, and on fake tensors. Holds no tensor.
A forward that stops half way, as recomputation does, is left as well as one that ends.
"""

from __future__ import annotations

import contextlib
import re
from collections import Counter
from collections.abc import Iterator
from typing import Any

import torch
from torch.nn.modules import module as hooks
from torch.utils._pytree import tree_leaves

from hpc_core.record.profile import ModuleSeen

_MARK = "hpc_core_module"
_NUMBER = re.compile(r"(?<![^.])\d+(?![^.])")
_WRAPPERS = ("base_model.model.", "base_layer", "_orig_mod.", "module.")
"""Parts of a path that say who wrapped a module, not which one it is."""
_WHOLE = ("", "base_model", "base_model.model", "_orig_mod", "module")
"""Names of a whole model and of its wrappers: they are called by their class."""


def path_of(name: str) -> str:
    """A module's path with the numbers of layers as stars, and without peft's and torch.compile's wrappers."""
    path = _NUMBER.sub("*", name)
    for wrapper in _WRAPPERS:
        path = path.removeprefix(wrapper)
    return path.replace(".base_layer", "").replace("._orig_mod", "")


def nowhere() -> str:
    """The place of whatever runs where nobody follows modules."""
    return ""


class Places:
    """Says where the program is; knows each module that it has seen, by its path."""

    def __init__(self) -> None:
        self._names: dict[int, tuple[str, torch.nn.Module]] = {}
        self._stack: list[tuple[int, str, int]] = []
        self._calls: Counter[str] = Counter()

    def here(self) -> str:
        """The path of the innermost module that is at work; empty outside all."""
        if self._stack:
            return self._stack[-1][1]
        node: Any = torch._C._current_autograd_node()
        return "" if node is None else str(node.metadata.get(_MARK, ""))

    def learn(self, root: torch.nn.Module) -> None:
        """Name a module and all below it, unless a larger one has named them."""
        for name, module in root.named_modules():
            path = "" if name in _WHOLE else path_of(name)
            self._names.setdefault(id(module), (path or type(module).__name__, module))

    def begin(self) -> None:
        """Count forwards from here on."""
        self._calls.clear()

    def seen(self) -> dict[str, ModuleSeen]:
        """Class, number and forwards of the modules that ran since `begin`, by path."""
        numbers = Counter(path for path, _ in self._names.values())
        kinds = {path: type(module).__name__ for path, module in self._names.values()}
        return {path: ModuleSeen(kinds[path], numbers[path], calls) for path, calls in sorted(self._calls.items())}

    def entered(self, module: torch.nn.Module, _: Any) -> None:
        """A module's forward begins."""
        if id(module) not in self._names:
            self.learn(module)
        path = self._names[id(module)][0]
        self._calls[path] += 1
        self._stack.append((id(module), path, torch._C._autograd._get_sequence_nr()))

    def left(self, module: torch.nn.Module, _: Any, output: Any) -> None:
        """It ends, or was broken off: what it added to autograd's graph, and nobody inside claimed, is its own."""
        # A module inside it whose end was not seen has ended too.
        while self._stack:
            key, path, began = self._stack.pop()
            if key == id(module):
                _claim(output, path, began)
                return


def _claim(output: Any, path: str, began: int) -> None:
    found: list[Any] = [value.grad_fn for value in tree_leaves(output) if isinstance(value, torch.Tensor)]
    known: set[Any] = set()
    while found:
        node = found.pop()
        # A node that is older than this forward belongs to what was before it. Gradient accumulators are of no age.
        if node is None or node in known or node._sequence_nr() < began:
            continue
        known.add(node)
        node.metadata.setdefault(_MARK, path)
        found += [below for below, _ in node.next_functions]


@contextlib.contextmanager
def following() -> Iterator[Places]:
    """Follow every module's forward in this process while the block runs."""
    places = Places()
    handles = (
        hooks.register_module_forward_pre_hook(places.entered),
        hooks.register_module_forward_hook(places.left, always_call=True),
    )
    try:
        yield places
    finally:
        for handle in handles:
            handle.remove()
