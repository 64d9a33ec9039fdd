"""The same case gives the same prediction, bit for bit: in two processes, and after other cases in the same one."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import msgspec
import pytest

from hpc_core.case.case import Case
from hpc_core.catalogue import TINY
from hpc_core.record.record import Record
from tests.predict.predicting import predicted

pytestmark = pytest.mark.nightly

_CASES = {case.id: case for case in TINY}
_FEW = [_CASES[f"tiny/{name}"] for name in ("lora-gc", "qlora-prepare", "generate-nf4", "full-bf16")]


def _essence(record: Record) -> bytes:
    """All of it but when it was made and how long that took."""
    assert record.failure is None, record.failure
    seen = msgspec.to_builtins(record)
    for name in ("started_at", "phase_s"):
        del seen["circumstances"][name]
    return msgspec.json.encode(seen, order="deterministic")


def _twice(first: Sequence[Case], second: Sequence[Case]) -> tuple[list[Record], list[Record]]:
    with ThreadPoolExecutor(2) as pool:
        one, other = pool.map(predicted, (first, second))
    return one, other


def test_two_processes_predict_the_same() -> None:
    """Whatever was predicted in a process before: here each case has others before it than there."""
    one, other = _twice(_FEW, _FEW[::-1])
    assert [_essence(record) for record in one] == [_essence(record) for record in other[::-1]]


def test_a_process_predicts_the_same_again() -> None:
    """Nothing of a case is left when the next one begins."""
    first, second = predicted([_FEW[0], _FEW[0]])
    assert _essence(first) == _essence(second)
