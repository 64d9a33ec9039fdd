"""The built-in cases, and short functions to write more.

Cases are plain values. `bench/` selects them; `--cases FILE` and the ini option `perf_cases` add your own.
"""

from __future__ import annotations

from hpc_core.case.case import Case
from hpc_core.case.errors import SpecError
from hpc_core.catalogue.feeds import DATA, TINY_DATA
from hpc_core.catalogue.shorthand import (
    Method,
    adapter,
    finetune,
    full,
    generate,
    llama_3b,
    lora,
    qlora,
    smollm2,
    tiny,
)
from hpc_core.catalogue.stock import DEVICE_BOUND, FULL, SMALL, TINY, TRIAL, WHOLE
from hpc_core.catalogue.tuned import INT4, STATIC, SWEEP, TUNED

__all__ = [
    "ALL",
    "DATA",
    "DEVICE_BOUND",
    "FULL",
    "INT4",
    "ON_REQUEST",
    "SMALL",
    "SWEEP",
    "TINY",
    "TINY_DATA",
    "TRIAL",
    "TUNED",
    "WHOLE",
    "Method",
    "adapter",
    "catalogue",
    "finetune",
    "full",
    "generate",
    "llama_3b",
    "lora",
    "qlora",
    "smollm2",
    "tiny",
]

ALL: tuple[Case, ...] = (*TINY, *SMALL, *FULL, STATIC, *TUNED)
_VARIANTS = (
    "llama-3.2-3b/generate-int8",
    "llama-3.2-3b/generate-nf4-dq",
    "llama-3.2-3b/qlora-prepare-nogc",
)
"""Of quantization, in addition to NF4: 75 to 95 s on a GPU. CI counts and predicts them at every size."""
ON_REQUEST: frozenset[str] = frozenset((*_VARIANTS, *(case.id for case in TUNED)))
"""Ids of the cases that the suite leaves out unless it is asked for them: variants, our own engines, and what they are compared with."""


def catalogue(cases: tuple[Case, ...] = ALL) -> dict[str, Case]:
    """Return the cases by id.

    Raises:
        SpecError: two cases share an id.
    """
    found: dict[str, Case] = {}
    for case in cases:
        if case.id in found:
            raise SpecError(f"Two cases are called {case.id}. Rename one of them.")
        found[case.id] = case
    return found
