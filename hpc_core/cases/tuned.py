"""The engines of our own beside the stock path."""

from __future__ import annotations

from typing import Any

from hpc_core.cases.full_size import FULL
from hpc_core.spec import Case

__all__ = ["TUNED"]

_TUNED: dict[str, Any] = {"engine": "tuned", "loss": "chunked", "fusion": "blocks", "graph": True}


def _tuned(*stock: Case) -> list[Case]:
    """Each by the tuned engine, beside itself without dropout and with adapters in bfloat16, as the engine has them."""
    cases = [stock[0].vary("full-bf16-tuned", **_TUNED)]
    for case in stock[1:]:
        name = case.id.rpartition("/")[2]
        plain = case.vary(f"{name}-nodrop", dropout=0.0, adapter_dtype="bfloat16")
        cases += [plain, plain.vary(f"{name}-tuned", **_TUNED)]
    return [*cases, cases[-1].vary("qlora-tuned-4.5gib", budget_bytes=9 * 2**29)]


TUNED: tuple[Case, ...] = tuple(_tuned(*(case for case in FULL if case.id.endswith(("/full-bf16", "/lora", "/qlora")))))
"""The tuned training engine beside its stock twins: same dropout (none), adapters, batch and data. In ALL, not in FULL."""
