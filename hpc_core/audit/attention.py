"""Which kernels computed attention. Only operators inside attention modules count: the softmax of a router is not attention."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from hpc_core.audit.parts import attention_modules
from hpc_core.case.case import Case
from hpc_core.instruments.counters import attention_families
from hpc_core.record.findings import Findings, checked
from hpc_core.record.record import Fact

_EVERY = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.CUDNN_ATTENTION, SDPBackend.MATH]


@dataclass
class Attending:
    """What ran inside attention modules."""

    modules: int = 0
    operators: Counter[str] = field(default_factory=Counter)
    unfused: int = 0
    """Calls of torch's scaled dot product attention for which torch has no fused kernel, whatever is switched on."""


class _Inside(TorchDispatchMode):
    """Counts operators while an attention module runs."""

    def __init__(self, attending: Attending) -> None:
        super().__init__()
        self.attending = attending
        self.depth = 0

    def enter(self, *_: object) -> None:
        self.depth += 1

    def leave(self, *_: object) -> None:
        self.depth -= 1

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if self.depth:
            self.attending.operators[str(func)] += 1
        return func(*args, **(kwargs or {}))


@contextlib.contextmanager
def watch_attention(model: torch.nn.Module) -> Iterator[Attending]:
    """Observe every attention module of `model` while the block runs. The hooks run no operators, so counts stay as they are."""
    modules = attention_modules(model)
    attending = Attending(modules=len(modules))
    inside = _Inside(attending)
    original = torch.nn.functional.scaled_dot_product_attention

    def asked(*args: Any, **kwargs: Any) -> torch.Tensor:
        attending.unfused += not _has_fused(*args, **kwargs)
        found: torch.Tensor = original(*args, **kwargs)
        return found

    with contextlib.ExitStack() as stack:
        for module in modules:
            stack.callback(module.register_forward_pre_hook(inside.enter).remove)
            # A recomputed forward may stop early.
            stack.callback(module.register_forward_hook(inside.leave, always_call=True).remove)
        stack.enter_context(mock.patch.object(torch.nn.functional, "scaled_dot_product_attention", asked))
        stack.enter_context(inside)
        yield attending


def _has_fused(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    **others: Any,
) -> bool:
    """Return whether torch itself would choose a fused kernel for this call, if all are switched on."""
    with _disable_current_modes(), sdpa_kernel(_EVERY):
        chosen = torch._fused_sdp_choice(query, key, value, attn_mask, dropout_p, is_causal, **others)
    return chosen != SDPBackend.MATH.value


def attention_facts(case: Case, attending: Attending) -> Findings:
    """Return whether attention was fused (sdpa) or eager as the case asks, and which kernels ran.

    Where torch has no fused kernel, sdpa correctly falls back to its math implementation. A case cannot ask for kernels, so
    `attention_kernel` always holds. A model without attention has neither fact.
    """
    assert case.model is not None
    asked = case.model.attention
    families = attention_families(attending.operators)

    def attention() -> Fact | None:
        if not attending.modules:
            return None
        if not families:
            raise LookupError("no operator of attention was seen")
        unfused_is_right = families["math"] <= attending.unfused
        kinds = {_kind(name, unfused_is_right=unfused_is_right) for name in families}
        return Fact(asked=asked, seen=", ".join(sorted(kinds)))

    def kernel() -> Fact | None:
        return Fact(asked=sorted(families), seen=sorted(families)) if families else None

    return checked({"attention": attention, "attention_kernel": kernel})


def _kind(family: str, *, unfused_is_right: bool) -> str:
    if family == "eager":
        return "eager"
    return "sdpa, unfused (math)" if family == "math" and not unfused_is_right else "sdpa"
