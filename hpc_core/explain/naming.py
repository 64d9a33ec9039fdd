"""How explanations call modules and operators: by the block of a layer that they are in, in words short enough for one line."""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache

from hpc_core.record.profile import ModuleSeen, Profile

__all__ = ["block", "computes", "label", "operator", "parts"]

_STAR = "*"
_VIEWS = {
    *(
        "view",
        "_unsafe_view",
        "t",
        "transpose",
        "expand",
        "slice",
        "detach",
        "alias",
        "unsqueeze",
        "squeeze",
        "permute",
    ),
    *("reshape", "select", "split", "empty", "empty_like", "as_strided", "unbind"),
}
"""Operators that compute nothing: they follow from others, and are named after them."""
_OUTSIDE = {"optimizer": "the optimizer", "": "no module"}


@lru_cache(maxsize=4096)  # a profile has hundreds of lines and few paths
def block(path: str) -> str:
    """The part of a layer that a module is in: `model.layers.*.mlp` for `model.layers.*.mlp.act_fn`; itself where no layers repeat."""
    names = path.split(".")
    if _STAR not in names:
        return path
    return ".".join(names[: names.index(_STAR) + 2])


def parts(path: str) -> str:
    """What of a path lies below its block, without the name of peft's adapter: `q_proj.lora_A`; empty for the block itself."""
    return path.removeprefix(block(path)).removeprefix(".").removesuffix(".default")


def label(path: str, phase: str, *profiles: Profile | None) -> str:
    """A block in words: "LlamaMLP (layers.*.mlp, 28 layers)"; of no module, the phase: "the optimizer"."""
    if not path:
        return _OUTSIDE.get(phase, f"no module ({phase})")
    seen = _seen(path, [each.modules for each in profiles if each is not None])
    if seen is None or seen.kind == path:
        return path
    short = path.removeprefix("model.")
    return f"{seen.kind} ({short}, {seen.count} layers)" if seen.count > 1 else f"{seen.kind} ({short})"


def _seen(path: str, known: list[Mapping[str, ModuleSeen]]) -> ModuleSeen | None:
    return next((modules[path] for modules in known if path in modules), None)


def computes(name: str) -> bool:
    """Whether an operator, by its short name, does more than to look at a tensor otherwise, or to make room."""
    return name not in _VIEWS


@lru_cache(maxsize=4096)
def operator(name: str) -> str:
    """An operator without its library and overload: "mul" for "aten.mul.Tensor"; what is no operator stays."""
    names = name.split(".")
    return name if " " in name or len(names) < 2 else names[1]
