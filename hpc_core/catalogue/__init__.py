"""The built-in catalogue: the original report's variants and their tiny and small counterparts, and the words to add more.

Cases are plain values; `bench/` selects them, `--cases FILE` and the ini option `perf_cases` add a user's own.
"""

from __future__ import annotations

from hpc_core.case.case import Case
from hpc_core.case.errors import SpecError
from hpc_core.catalogue.data_path import DATA, TINY_DATA
from hpc_core.catalogue.full_size import DEVICE_BOUND, FULL
from hpc_core.catalogue.int4 import INT4
from hpc_core.catalogue.making import (
    Method,
    finetune,
    full,
    generate,
    llama_3b,
    lora,
    qlora,
    smollm2,
    tiny,
)
from hpc_core.catalogue.shortened import TRIAL, WHOLE
from hpc_core.catalogue.small import SMALL, TINY
from hpc_core.catalogue.tuned import SWEEP, TUNED

__all__ = [
    "ALL",
    "DATA",
    "DEVICE_BOUND",
    "FULL",
    "INT4",
    "SMALL",
    "SWEEP",
    "TINY",
    "TINY_DATA",
    "TRIAL",
    "TUNED",
    "WHOLE",
    "Method",
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

ALL: tuple[Case, ...] = (*TINY, *SMALL, *FULL, *TUNED)


def catalogue(cases: tuple[Case, ...] = ALL) -> dict[str, Case]:
    """The cases by id.

    Raises:
        SpecError: two cases share an id.
    """
    found: dict[str, Case] = {}
    for case in cases:
        if case.id in found:
            raise SpecError(f"Two cases are called {case.id}. Give one of them another variant.")
        found[case.id] = case
    return found
