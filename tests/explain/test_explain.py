"""Examples of explanations of two records, and laws that hold for any two profiles."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hpc_core.baselines.accept import accept
from hpc_core.baselines.baseline import Baseline
from hpc_core.baselines.lookup import find
from hpc_core.baselines.profiles import profile_path, profile_to_keep, stored_profile
from hpc_core.case.errors import BaselineError
from hpc_core.cli import main
from hpc_core.explain.before import before_of
from hpc_core.explain.explain import Cause, explain, stored_cause
from hpc_core.explain.findings import block
from hpc_core.explain.memory import _changes
from hpc_core.gate.judge import judge
from hpc_core.instruments.attribution import DeviceWork, Range, attributed
from hpc_core.record.profile import KernelUse, ModuleSeen, OperatorUse, Piece, Profile
from hpc_core.record.record import Fact, Metric, Record, record_from_json, record_to_json
from tests.explain.profiles import GIB, HEAD, MLP, MODULES, a_profile, profiled_record, weights
from tests.strategies import H100, around, busy, counted, peak, stored_baseline


def cause_of(before: Record, now: Record) -> Cause:
    cause = explain(before_of(before), now)
    assert cause is not None
    return cause


def stored_cause_of(root: Path, now: Record) -> Cause:
    cause = stored_cause(root, now, None)
    assert cause is not None
    return cause


def test_the_first_line_names_category_module_and_operator() -> None:
    """The first line names the grown activations, their module, layers and operator, and that weights are as before."""
    grown = Piece("activations", f"{MLP}.act_fn", "forward", "aten.silu.default", GIB, 28)

    first, second = cause_of(
        profiled_record(a_profile(weights())), profiled_record(a_profile(weights(), grown), 3 * GIB)
    ).lines

    assert first == (
        "peak +1.00 GiB: activations +1.00 GiB in LlamaMLP (layers.*.mlp, 28 layers): act_fn by silu; weights as before"
    )
    assert second == "stack and case as before"


def test_a_fact_that_does_not_hold_is_part_of_the_first_line() -> None:
    """The first line names a fact of the audit that does not hold, and a forward that no longer runs twice."""
    now = msgspec.structs.replace(
        profiled_record(a_profile(modules=MODULES | {MLP: ModuleSeen("LlamaMLP", 28, 28)}), 3 * GIB),
        audit={"checkpointing": Fact(asked="on", seen="off")},
    )

    first, _ = cause_of(profiled_record(a_profile()), now).lines

    assert "checkpointing seen 'off', asked for 'on'" in first
    assert "forwards of LlamaMLP (model.layers.*.mlp) 56 → 28: no longer recomputed" in first


def test_kernels_are_listed_by_module_and_as_new_or_gone() -> None:
    """A kernel that only the new run launches is listed with its module, family and launches."""
    old = KernelUse(MLP, "aten.mm.default", "gemm_a", "gemm", 28, 0.02)
    new = KernelUse(MLP, "aten.add.Tensor", "add_b", "elementwise", 28, 0.005)
    before = profiled_record(a_profile(kernels=(old,)), busy_s=busy(0.25), kernels=counted(280))
    now = profiled_record(a_profile(kernels=(old, new)), busy_s=busy(0.255), kernels=counted(308))

    cause = cause_of(before, now)

    assert "elementwise kernels +5.00 ms (+28 launches) in LlamaMLP (layers.*.mlp, 28 layers)" in cause.lines[0]
    assert "new: add_b, 28 launches, 5.00 ms" in cause.details


def test_a_much_slower_kernel_comes_before_one_more_launch() -> None:
    """A kernel twenty times as slow comes before one more copy; one slower by a few per cent comes after it, as it may be noise."""
    copy = KernelUse(MLP, "aten._to_copy.default", "copy_c", "copy", 1, 1e-5)

    def first_line(product_s: float) -> str:
        def side(seconds: float, launched: int, *more: KernelUse) -> Record:
            product = KernelUse(HEAD, "aten.mm.default", "gemm_a", "gemm", 3, seconds)
            return profiled_record(
                a_profile(kernels=(product, *more)), busy_s=busy(0.02 + seconds), kernels=counted(launched)
            )

        return cause_of(side(3e-3, 280), side(product_s, 290, copy)).lines[0]

    plain, little, nothing = first_line(60e-3), first_line(3.3e-3), first_line(3e-3 + 2e-6)
    assert plain.index("gemm kernels +57.00 ms in ") < plain.index("copy kernels +10.00 µs (+1 launches)")
    assert little.index("copy kernels +10.00 µs (+1 launches)") < little.index("gemm kernels +300.00 µs in ")
    assert "copy kernels" in nothing
    assert "gemm" not in nothing


def test_the_second_line_names_moved_packages() -> None:
    """Packages that circumstances are named in the second line."""
    before = profiled_record(a_profile(weights()))
    circumstances = around(H100, stack=before.circumstances.stack | {"transformers": "99.0"})

    _, second = cause_of(
        before,
        msgspec.structs.replace(profiled_record(a_profile(weights(2 * GIB)), 3 * GIB), circumstances=circumstances),
    ).lines

    assert "moved: transformers" in second
    assert "→ 99.0" in second


def test_without_profiles_categories_explain() -> None:
    """Without a profile the baseline is explained by category, and the details say how to get more."""
    before = profiled_record(None, at_peak_activations_bytes=peak(GIB))
    now = profiled_record(a_profile(weights()), 3 * GIB, at_peak_activations_bytes=peak(2 * GIB))

    cause = cause_of(before, now)

    assert cause.lines[0] == "peak +1.00 GiB: activations +1.00 GiB"
    assert "no profile" in cause.details[-1]


_PIECES = st.builds(
    Piece,
    st.sampled_from(["weights", "activations", "other"]),
    st.sampled_from(["", MLP, f"{MLP}.act_fn", HEAD, "unheard.of"]),
    st.sampled_from(["", "forward"]),
    st.sampled_from(["aten.mm.default", "held float32[2]", ""]),
    st.integers(1, 2**40),
    st.integers(1, 9),
)
_USES = st.builds(
    OperatorUse,
    st.sampled_from(["", MLP, HEAD]),
    st.just("forward"),
    st.sampled_from(["aten.mm.default", "aten.view.default"]),
    st.integers(1, 10**6),
)
_PROFILES = st.builds(
    lambda pieces, uses: a_profile(*pieces, operators=tuple(uses)), st.lists(_PIECES), st.lists(_USES)
)


@given(_PROFILES, _PROFILES)
def test_changes_by_block_add_up(old: Profile, new: Profile) -> None:
    """The changes of all blocks and categories add up to the change of the whole."""
    assert sum(each.size_bytes for each in _changes(old, new)) == new.peak_bytes - old.peak_bytes


@given(_PROFILES, _PROFILES)
def test_any_two_profiles_are_explained_in_two_lines(old: Profile, new: Profile) -> None:
    """There are two lines whenever something differs, and none when nothing does, in both directions."""
    before, now = (profiled_record(each, 2**41 + each.peak_bytes) for each in (old, new))
    for one, other in ((before, now), (now, before)):
        cause = explain(before_of(one), other)
        assert cause is None or (len(cause.lines) == 2 and not any("\n" in line for line in cause.lines))
        assert cause is not None or old.peak_bytes == new.peak_bytes
    assert explain(before_of(before), before) is None


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 1000), st.floats(0, 1)), max_size=30))
def test_every_launch_is_attributed_once(launches: list[tuple[int, int, float]]) -> None:
    """Kernels within an operator's range on its thread belong to it, all others to no module, and none is lost."""
    ranges = [Range(1, start, start + 50, f"m{start}", "aten.mm.default") for start in range(0, 1000, 100)]
    work = [DeviceWork("k", seconds, None if thread == 3 else (thread, at)) for thread, at, seconds in launches]

    attribution = attributed(ranges, work)

    assert sum(use.launches for use in attribution) == len(work)
    inside = sum(thread == 1 and at % 100 <= 50 and at < 1000 for thread, at, _ in launches)
    assert sum(use.launches for use in attribution if use.module) == inside


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


def last_profile(root: Path, key: str, baseline: Baseline) -> Profile | None:
    stored = stored_profile(root, key, baseline)
    return None if stored is None else stored.profile


def keep_profile(root: Path, record: Record, machine: str = "") -> Path:
    path, packed = profile_to_keep(root, record, machine)
    path.write_bytes(packed)
    return path


def test_a_profile_of_other_numbers_explains_nothing(tmp_path: Path) -> None:
    """A damaged profile, or one of a record with another peak, is ignored; accepting a record without a profile removes the old one."""
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


def elsewhere(record: Record) -> Record:
    """The same record on another model of GPU."""
    machine = msgspec.structs.replace(record.circumstances.machine, key="nvidia-h200-140gib", name="NVIDIA H200")
    return msgspec.structs.replace(record, circumstances=msgspec.structs.replace(record.circumstances, machine=machine))


@pytest.mark.parametrize("has_kernels", [True, False])
def test_a_profile_explains_only_a_baseline_with_its_counts(tmp_path: Path, has_kernels: bool) -> None:
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


def faulted(record: Record) -> Record:
    circumstances = msgspec.structs.replace(record.circumstances, fault="extra-clone")
    return msgspec.structs.replace(record, circumstances=circumstances)


def test_the_stored_baseline_gives_the_cause(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A record and the folder of baselines give the cause, in Python and by the command; a passing record has none."""
    before, now = profiled_record(a_profile(weights())), profiled_record(a_profile(weights(2 * GIB)), 3 * GIB)
    accept(tmp_path / "baselines", before, reason="first")
    (tmp_path / "now.json").write_bytes(record_to_json(now))
    lookup = find(tmp_path / "baselines", now.circumstances.machine.key, now.case.id)

    cause = stored_cause(tmp_path / "baselines", now, judge(now, lookup))

    assert cause is not None
    assert "weights +1.00 GiB in Linear (lm_head)" in cause.lines[0]
    assert stored_cause(tmp_path / "baselines", before, judge(before, lookup)) is None
    with pytest.raises(SystemExit) as end:
        main(["explain", str(tmp_path / "now.json"), "--baselines", str(tmp_path / "baselines")])
    assert not end.value.code
    assert cause.lines[0] in capsys.readouterr().out


def test_blocks_are_the_parts_of_a_layer() -> None:
    """Modules in a layer are grouped by the layer's part; every other module is its own block."""
    assert block("model.layers.*.mlp.act_fn") == MLP
    assert (block("model.layers.*"), block("lm_head"), block("")) == ("model.layers.*", "lm_head", "")


def test_a_record_with_a_profile_equals_its_json() -> None:
    """A profile survives the JSON of its record, and an old record without one is still read."""
    record = profiled_record(a_profile(weights(), operators=(OperatorUse(MLP, "forward", "aten.mm.default", 3),)))
    assert record_from_json(record_to_json(record)) == record
    assert record_from_json(record_to_json(profiled_record(None))).profile is None


def test_what_got_worse_comes_before_what_got_better() -> None:
    """Without a judgement, memory that grew a little comes before operators that fell by half."""
    grown = a_profile(weights(2 * GIB), operators=(OperatorUse(MLP, "forward", "aten.mm.default", 1),))
    before = profiled_record(
        a_profile(weights(), operators=(OperatorUse(MLP, "forward", "aten.mm.default", 9),)), 20 * GIB
    )

    first, second = cause_of(before, profiled_record(grown, 21 * GIB, operators=counted(800))).lines

    assert first.startswith("peak +1.00 GiB")
    assert second.startswith("also operators -817, -50.53 %: mm -8 in LlamaMLP")
