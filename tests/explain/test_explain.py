"""Examples of explanations of two records, and laws that hold for any two profiles."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hpc_core.baselines.accept import accept
from hpc_core.baselines.lookup import find
from hpc_core.cli import main
from hpc_core.explain.before import before_of
from hpc_core.explain.explain import Cause, explain, stored_cause
from hpc_core.explain.findings import block
from hpc_core.explain.memory import _changes
from hpc_core.explain.time import split_line
from hpc_core.gate.judge import judge
from hpc_core.instruments.attribution import DeviceWork, Range, attributed
from hpc_core.record.metrics import metric
from hpc_core.record.profile import FunctionUse, KernelUse, ModuleSeen, OperatorUse, Piece, Profile
from hpc_core.record.record import Fact, Record, record_from_json, record_to_json
from tests.explain.profiles import GIB, HEAD, MLP, MODULES, a_profile, profiled_record, weights
from tests.strategies import H100, around, busy, counted, peak


def cause_of(before: Record, now: Record) -> Cause:
    cause = explain(before_of(before), now)
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


def test_the_split_of_wall_time_is_one_line() -> None:
    """The line has launches, waiting and busy time on a GPU, and Python and operators on a CPU. No split, no line."""
    seconds = {"python_s": 0.0112, "dispatch_s": 0.0059, "launch_s": 0.0026, "waiting_s": 0.0004}
    metrics = {name: metric(name, value, on_gpu=True) for name, value in seconds.items()}

    whole = profiled_record(None, 2 * GIB, busy_s=busy(0.0039), **metrics)
    on_cpu = profiled_record(None, python_s=metrics["python_s"], dispatch_s=metrics["dispatch_s"])

    assert split_line(whole) == "a step's 20.1 ms: Python 11.2, dispatch 5.9, launch 2.6, waiting 0.4; GPU busy 3.9 ms"
    assert split_line(on_cpu) == "a step's 17.1 ms: Python 11.2, operators 5.9"
    assert split_line(profiled_record(None)) is None


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


def host_record(*functions: FunctionUse, **changes: object) -> Record:
    """A record whose bytecodes are those of these functions."""
    total = sum(each.bytecodes for each in functions)
    count = metric("bytecodes", total, on_gpu=True)
    return msgspec.structs.replace(profiled_record(a_profile(functions=functions), bytecodes=count), **changes)


LAYER = FunctionUse(
    "step", "transformers/models/llama/modeling_llama.py", "LlamaDecoderLayer.forward", 312, 980, 28, 112
)
CALL = FunctionUse("step", "torch/nn/modules/module.py", "Module._call_impl", 1782, 5_000, 300, 300)


def test_the_function_that_executes_more_is_named_with_file_and_line() -> None:
    """The first line names the bytecodes and the function that has them; a function whose line alone moved is not named."""
    worse = msgspec.structs.replace(LAYER, bytecodes=6_940, c_calls=116)
    moved = msgspec.structs.replace(CALL, line=1790)

    first, _ = cause_of(host_record(CALL, LAYER), host_record(moved, worse)).lines

    assert first == (
        "bytecodes +5,960: LlamaDecoderLayer.forward (modeling_llama.py:312) +5,960 bytecodes, +4 calls into C"
    )


def test_functions_that_are_new_or_gone_are_named() -> None:
    """A function of only one side is in the details with its whole count."""
    cause = cause_of(host_record(CALL), host_record(LAYER))
    text = " ".join((*cause.lines, *cause.details))
    assert "LlamaDecoderLayer.forward (modeling_llama.py:312) +980 bytecodes, +28 calls, +112 calls into C" in text
    assert "Module._call_impl (module.py:1782) -5,000 bytecodes" in text


def test_another_python_explains_nothing_by_its_bytecodes() -> None:
    """Bytecodes of two minor versions of Python are not compared."""
    now = host_record(LAYER)
    other = msgspec.structs.replace(now, circumstances=msgspec.structs.replace(now.circumstances, python="3.12.1"))
    assert explain(before_of(host_record(CALL)), other) is None
