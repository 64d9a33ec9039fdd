"""Find the module that is running: by hooks in the forward, and in the backward by marks on the nodes of autograd's graph.

Follows every module that runs, including those of the code under test, and works on fake tensors. Keeps no tensor alive.
A forward may stop early, as in recomputation.
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
from torch.utils.hooks import RemovableHandle

from hpc_core.record.profile import ModuleSeen

_MARK = "hpc_core_module"
_NUMBER = re.compile(r"(?<![^.])\d+(?![^.])")
_WRAPPERS = ("base_model.model.", "base_layer", "_orig_mod.", "module.")
"""Parts of a path that a wrapper adds."""
_WHOLE = ("", "base_model", "base_model.model", "_orig_mod", "module")
"""Names of a whole model and of its wrappers: their class names them instead."""


def path_of(name: str) -> str:
    """Return a module's path with stars for the numbers of layers, and without peft's and torch.compile's wrappers."""
    path = _NUMBER.sub("*", name)
    for wrapper in _WRAPPERS:
        path = path.removeprefix(wrapper)
    return path.replace(".base_layer", "").replace("._orig_mod", "")


def nowhere() -> str:
    """Return the empty path, if modules are not followed."""
    return ""


class Places:
    """The module that is running now, and the path of each module that has run."""

    def __init__(self) -> None:
        self._names: dict[int, tuple[str, torch.nn.Module]] = {}
        self._stack: list[tuple[int, str, int]] = []
        self._calls: Counter[str] = Counter()
        self._handles: tuple[RemovableHandle, ...] = ()

    def follow(self) -> None:
        """Begin to follow the forward of every module in this process."""
        self._handles = (
            hooks.register_module_forward_pre_hook(self.before_forward),
            hooks.register_module_forward_hook(self.after_forward, always_call=True),
        )

    def unfollow(self) -> None:
        """Remove the hooks."""
        for handle in self._handles:
            handle.remove()

    @contextlib.contextmanager
    def pausing(self) -> Iterator[None]:
        """Run modules without hooks in the block: they cost the host as much as the modules do."""
        self.unfollow()
        try:
            yield
        finally:
            self.follow()

    def here(self) -> str:
        """Return the path of the innermost running module; empty outside all modules."""
        if self._stack:
            return self._stack[-1][1]
        node: Any = torch._C._current_autograd_node()
        return "" if node is None else str(node.metadata.get(_MARK, ""))

    def learn(self, root: torch.nn.Module) -> None:
        """Name a module and its submodules, unless an outer module has named them."""
        for name, module in root.named_modules():
            path = "" if name in _WHOLE else path_of(name)
            self._names.setdefault(id(module), (path or type(module).__name__, module))

    def begin(self) -> None:
        """Count forwards from now on."""
        self._calls.clear()

    def modules(self) -> dict[str, ModuleSeen]:
        """Return class, number and forwards of the modules that ran since `begin`, by path."""
        numbers = Counter(path for path, _ in self._names.values())
        kinds = {path: type(module).__name__ for path, module in self._names.values()}
        return {path: ModuleSeen(kinds[path], numbers[path], calls) for path, calls in sorted(self._calls.items())}

    def known(self) -> list[tuple[str, torch.nn.Module]]:
        """Return the modules that have run, and their parts, with their paths."""
        return list(self._names.values())

    def before_forward(self, module: torch.nn.Module, _: Any) -> None:
        """Record that a module's forward begins."""
        if id(module) not in self._names:
            self.learn(module)
        path = self._names[id(module)][0]
        self._calls[path] += 1
        self._stack.append((id(module), path, torch._C._autograd._get_sequence_nr()))

    def after_forward(self, module: torch.nn.Module, _: Any, output: Any) -> None:
        """Mark the nodes that a module's forward added to autograd's graph, except those of its submodules."""
        # Submodules that never reported their end have ended too.
        while self._stack:
            key, path, began = self._stack.pop()
            if key == id(module):
                _mark_nodes(output, path, began)
                return


def _mark_nodes(output: Any, path: str, began: int) -> None:
    found: list[Any] = [value.grad_fn for value in tree_leaves(output) if isinstance(value, torch.Tensor)]
    known: set[Any] = set()
    while found:
        node = found.pop()
        # Older nodes are not from this forward. Gradient accumulators have no age.
        if node is None or node in known or node._sequence_nr() < began:
            continue
        known.add(node)
        node.metadata.setdefault(_MARK, path)
        found += [below for below, _ in node.next_functions]


@contextlib.contextmanager
def following() -> Iterator[Places]:
    """Follow the forward of every module in this process while the block runs."""
    places = Places()
    places.follow()
    try:
        yield places
    finally:
        places.unfollow()
