"""Profiles stored next to baselines: which are written, which are ignored, and which come from another machine."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from hpc_core.baselines.accept import accept
from hpc_core.baselines.baseline import Baseline
from hpc_core.baselines.profiles import profile_path, profile_to_keep, stored_profile
from hpc_core.case.errors import BaselineError
from hpc_core.explain.explain import Cause, stored_cause
from hpc_core.record.profile import KernelUse, Profile
from hpc_core.record.record import Metric, Record
from tests.explain.profiles import GIB, MLP, a_profile, profiled_record, weights
from tests.strategies import busy, counted, peak, stored_baseline


def last_profile(root: Path, key: str, baseline: Baseline) -> Profile | None:
    stored = stored_profile(root, key, baseline)
    return None if stored is None else stored.profile


def keep_profile(root: Path, record: Record, machine: str = "") -> Path:
    path, packed = profile_to_keep(root, record, machine)
    path.write_bytes(packed)
    return path


def stored_cause_of(root: Path, now: Record) -> Cause:
    cause = stored_cause(root, now, None)
    assert cause is not None
    return cause


def elsewhere(record: Record) -> Record:
    """The same record on another model of GPU."""
    machine = msgspec.structs.replace(record.circumstances.machine, key="nvidia-h200-140gib", name="NVIDIA H200")
    return msgspec.structs.replace(record, circumstances=msgspec.structs.replace(record.circumstances, machine=machine))


def faulted(record: Record) -> Record:
    circumstances = msgspec.structs.replace(record.circumstances, fault="extra-clone")
    return msgspec.structs.replace(record, circumstances=circumstances)


def test_a_profile_has_a_file_of_its_own(tmp_path: Path) -> None:
    """Accepting writes the profile to its own file, with the same bytes each time, and not into the history."""
    record = profiled_record(a_profile(weights()))
    key = record.circumstances.machine.key
    accept(tmp_path, record, reason="first")
    path = profile_path(tmp_path, key, record.case.id)
    first_bytes = path.read_bytes()
    accept(tmp_path, record, reason="again")

    assert path.read_bytes() == first_bytes
    assert b"held bfloat16" not in path.with_name("lora.history.jsonl").read_bytes()
    assert last_profile(tmp_path, key, stored_baseline(tmp_path, record)) == record.profile


def test_a_profile_of_other_numbers_is_ignored(tmp_path: Path) -> None:
    """A damaged profile, or one of another peak, is ignored; accepting a record without a profile removes the old one."""
    record = profiled_record(a_profile(weights()))
    key = record.circumstances.machine.key
    accept(tmp_path, record, reason="first")
    path, baseline = profile_path(tmp_path, key, record.case.id), stored_baseline(tmp_path, record)

    other = baseline.metrics | {"peak_bytes": peak(3 * GIB)}
    assert last_profile(tmp_path, key, msgspec.structs.replace(baseline, metrics=other)) is None
    path.write_bytes(path.read_bytes()[:-9])
    assert last_profile(tmp_path, key, baseline) is None
    accept(tmp_path, profiled_record(None), reason="of an older hpc-core")
    assert not path.exists()


def test_a_profile_can_be_added_to_an_unchanged_baseline(tmp_path: Path) -> None:
    """A record with the same bytes and counts can add its profile and changes no other file; any other record is refused."""
    accept(tmp_path, profiled_record(None), reason="of an older hpc-core")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*.*") if path.is_file()}
    record = profiled_record(a_profile(weights()))

    for refused in (profiled_record(a_profile(weights()), 3 * GIB), profiled_record(None), faulted(record)):
        with pytest.raises(BaselineError):
            keep_profile(tmp_path, refused)
    path = keep_profile(tmp_path, record)

    assert {each: each.read_bytes() for each in before} == before
    assert {each for each in tmp_path.rglob("*.*") if each.is_file()} == {*before, path}
    assert last_profile(tmp_path, record.circumstances.machine.key, stored_baseline(tmp_path, record)) == record.profile


def test_another_machines_profile_explains_memory_and_operators_but_no_kernels(tmp_path: Path) -> None:
    """Another GPU's profile is stored without its kernels, whose times differ, and the explanation names that GPU."""
    use = KernelUse(MLP, "aten.mm.default", "gemm", "gemm", 28, 0.25)
    took = busy(0.25)
    accept(tmp_path, profiled_record(None, kernels=counted(280), busy_s=took), reason="of an older hpc-core")
    here = profiled_record(None).circumstances.machine.key
    there = elsewhere(profiled_record(a_profile(weights(), kernels=(use,)), kernels=counted(281), busy_s=took))
    with pytest.raises(BaselineError, match="no sound baseline"):
        keep_profile(tmp_path, there)
    with pytest.raises(BaselineError, match=f"nvidia-h300. Machines here: {here}"):
        keep_profile(tmp_path, there, "nvidia-h300")
    with pytest.raises(BaselineError, match="peak_bytes of the record differ from the baseline's"):
        keep_profile(
            tmp_path, elsewhere(profiled_record(a_profile(weights()), 3 * GIB, kernels=counted(280), busy_s=took)), here
        )

    keep_profile(tmp_path, there, here)
    keep_profile(tmp_path, there, here)  # another machine's profile may be replaced

    baseline = stored_baseline(tmp_path, profiled_record(None))
    assert last_profile(tmp_path, here, baseline) == a_profile(weights())
    now = profiled_record(a_profile(weights(2 * GIB), kernels=(use,)), 3 * GIB, kernels=counted(280), busy_s=took)
    cause = stored_cause_of(tmp_path, now)
    assert "weights +1.00 GiB in Linear (lm_head)" in cause.lines[0]
    assert cause.details[-1].startswith("the baseline's profile is of NVIDIA H200,")
    without = stored_cause_of(tmp_path, msgspec.structs.replace(now, profile=None))
    assert not any("profile is of" in text for text in without.details), "nothing is compared by module"
    keep_profile(
        tmp_path, profiled_record(a_profile(weights(), kernels=(use,)), kernels=counted(280), busy_s=took), here
    )
    with pytest.raises(BaselineError, match="has its own profile, which holds more than one of NVIDIA H200"):
        keep_profile(tmp_path, there, here)
    own = last_profile(tmp_path, here, baseline)
    assert own is not None
    assert own.kernels == (use,), "a machine's own profile keeps its kernels"
    own_cause = stored_cause_of(tmp_path, now)
    assert not any("profile is of" in text for text in own_cause.details)


@pytest.mark.parametrize("has_kernels", [True, False])
def test_a_profile_of_other_counts_is_ignored(tmp_path: Path, has_kernels: bool) -> None:
    """A profile is ignored if one count is missing, added or different; kernels matter only if it has kernels."""
    uses = (KernelUse(MLP, "aten.mm.default", "gemm", "gemm", 28, 0.25),) if has_kernels else ()
    record = profiled_record(a_profile(weights(), kernels=uses), kernels=counted(280))
    accept(tmp_path, record, reason="first")
    key, baseline = record.circumstances.machine.key, stored_baseline(tmp_path, record)

    def stored_with(**metrics: Metric) -> Profile | None:
        return last_profile(tmp_path, key, msgspec.structs.replace(baseline, metrics=baseline.metrics | metrics))

    assert stored_with() == record.profile
    assert stored_with(operators=counted(9)) is None
    assert stored_with(copies=counted(3)) is None, "a count that the profile's record did not have"
    fewer = {name: metric for name, metric in baseline.metrics.items() if name != "operators"}
    assert last_profile(tmp_path, key, msgspec.structs.replace(baseline, metrics=fewer)) is None
    assert (stored_with(kernels=counted(281)) is None) == has_kernels
