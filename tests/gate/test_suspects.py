"""The suspects of a change: packages that the case uses, and settings that act where it ran."""

from __future__ import annotations

from collections.abc import Mapping

import pytest

from hpc_core.case.case import Case
from hpc_core.case.workloads import CallableSpec
from hpc_core.cli.inputs import known_cases
from hpc_core.explain.before import before_of
from hpc_core.explain.explain import explain
from hpc_core.gate.comparability import Place
from hpc_core.gate.judge import judge
from hpc_core.gate.suspects import suspects
from hpc_core.gate.verdict import Verdict
from hpc_core.record.environment import STACK_PACKAGES
from hpc_core.record.record import Machine, Record
from hpc_core.report.lines import settings_lines
from hpc_core.report.terminal import caption
from tests.gate.judging import baseline
from tests.strategies import CPU, H100, STACK, a_record, around, counted, peak

CASES = known_cases(None)
ALL = dict.fromkeys((*STACK_PACKAGES, "driver", "cuda"), "1.0")


def suspected(case: Case, machine: str, old: Mapping[str, str], new: Mapping[str, str]) -> set[str]:
    """Return the names of the suspects where only the stack differs."""
    return {text.partition(" ")[0] for text in suspects(case, Place(machine, old), Place(machine, new))}


@pytest.mark.parametrize(
    ("case_id", "machine", "used"),
    [
        ("tiny/lora", "cpu", {"torch", "transformers", "accelerate", "peft"}),
        ("tiny/lora-8bit", "cpu", {"torch", "transformers", "accelerate", "peft", "bitsandbytes"}),
        ("tiny/generate-bf16", "cpu", {"torch", "transformers", "accelerate"}),
        ("tiny/generate-nf4", "cpu", {"torch", "transformers", "accelerate", "bitsandbytes"}),
        ("llama-3.2-3b/lora", "predicted", {"torch", "transformers", "accelerate", "peft"}),
        ("llama-3.2-3b/lora", H100.key, {"torch", "transformers", "accelerate", "peft", "driver", "cuda"}),
        (
            "llama-3.2-3b/generate-nf4-graph",
            H100.key,
            {"torch", "transformers", "accelerate", "bitsandbytes", "triton", "driver", "cuda"},
        ),
    ],
)
def test_only_packages_that_a_case_uses_are_suspects(case_id: str, machine: str, used: set[str]) -> None:
    """A package that the case does not use is no suspect, nor is a GPU library on a machine without a GPU."""
    case = CASES[case_id]
    assert suspected(case, machine, {}, ALL) == used
    assert suspected(case, machine, ALL, {}) == used
    assert suspected(case, machine, ALL, ALL) == set()


def test_a_users_own_step_may_use_any_package() -> None:
    """Every package is a suspect of a user's own step, except CUDA libraries on a CPU."""
    case = Case(id="my/step", scale="tiny", workload=CallableSpec(factory="mine:step"))
    assert suspected(case, H100.key, {}, ALL) == set(ALL)
    assert set(ALL) - suspected(case, "cpu", {}, ALL) == {"driver", "cuda", "triton", "liger-kernel"}


def test_every_known_case_has_torch_and_transformers_as_suspects() -> None:
    """torch and transformers are suspects of every built-in case."""
    assert all({"torch", "transformers"} <= suspected(case, "cpu", {}, ALL) for case in CASES.values())


@pytest.mark.parametrize(
    ("setting", "on_cpu", "on_gpu"),
    [
        ("OMP_NUM_THREADS", False, False),  # a tiny model runs on one thread
        ("ATEN_CPU_CAPABILITY", True, True),
        ("PYTORCH_CUDA_ALLOC_CONF", False, True),
        ("PYTORCH_NO_CUDA_MEMORY_CACHING", False, True),
        ("CUBLAS_WORKSPACE_CONFIG", False, True),
        ("NVIDIA_TF32_OVERRIDE", False, True),
        ("TORCH_ALLOW_TF32_CUBLAS_OVERRIDE", False, True),
        ("torch.backends.cuda.matmul.fp32_precision", False, True),
        ("torch.backends.cudnn.benchmark", False, True),
        ("torch.backends.cuda.flash_sdp", True, True),
        ("torch.default_dtype", True, True),
        ("BNB_TRITON_KERNELS", False, False),  # the case has no quantized weights
        ("TORCHINDUCTOR_MAX_AUTOTUNE", False, False),  # nor is anything of it compiled
    ],
)
def test_a_setting_is_a_suspect_where_it_acts(setting: str, on_cpu: bool, on_gpu: bool) -> None:
    """A GPU setting is no suspect on a CPU, nor a library's setting where the case does not use the library."""
    for machine, acts in (("cpu", on_cpu), (H100.key, on_gpu)):
        places = Place(machine, ALL, {}), Place(machine, ALL, {setting: "1"})
        assert suspects(CASES["tiny/lora"], *places) == ((f"{setting} default → 1",) if acts else ())


def test_threads_are_a_suspect_where_there_may_be_several() -> None:
    """Of a model with true weights, and of a step of the user's own."""
    own = Case(id="my/step", scale="tiny", workload=CallableSpec(factory="mine:step"))
    places = Place("cpu", ALL, {}), Place("cpu", ALL, {"OMP_NUM_THREADS": "4"})
    for case in (CASES["smollm2-135m/lora"], own):
        assert suspects(case, *places) == ("OMP_NUM_THREADS default → 4",)


def of_settings(settings: dict[str, str] | None, value: int = 2**30, machine: Machine = H100) -> Record:
    """A record with these settings."""
    return a_record({"peak_bytes": peak(value)}, circumstances=around(machine, settings=settings))


def test_another_setting_is_compared_and_named() -> None:
    """A moved setting is a suspect of a regression, and is reported if the case passes."""
    before = of_settings({})
    worse, equal = of_settings({"CUDA_LAUNCH_BLOCKING": "1"}, 2**31), of_settings({"CUDA_LAUNCH_BLOCKING": "1"})
    judgement = judge(worse, baseline(before))
    assert (judgement.verdict, judgement.moved) == (Verdict.REGRESSED, ("CUDA_LAUNCH_BLOCKING default → 1",))
    assert "Moved since the baseline: CUDA_LAUNCH_BLOCKING default → 1." in judgement.reason
    cause = explain(before_of(before), worse, judgement)
    assert cause is not None
    assert "moved: CUDA_LAUNCH_BLOCKING default → 1" in cause.lines[1]
    passed = judge(equal, baseline(before))
    assert passed.verdict is Verdict.PASS
    assert settings_lines([passed, None]) == (
        "set otherwise than in the baseline of 1 case: CUDA_LAUNCH_BLOCKING default → 1",
    )
    assert "CUDA_LAUNCH_BLOCKING=1" in caption(equal)


def test_a_baseline_without_settings_gives_no_suspects() -> None:
    """A baseline of an older hpc-core records no settings, so none is a suspect."""
    assert judge(of_settings({"OMP_NUM_THREADS": "4"}), baseline(of_settings(None))).moved == ()


def test_a_package_that_the_case_does_not_use_is_no_suspect_anywhere() -> None:
    """A regressed LoRA case on a CPU names neither torchao nor triton, which moved."""
    before = a_record({"operators": counted(100)}, circumstances=around(CPU))
    now = a_record(
        {"operators": counted(200)}, circumstances=around(CPU, stack=STACK | {"torchao": "0.18.0", "triton": "3.7.1"})
    )
    judgement = judge(now, baseline(before))
    cause = explain(before_of(before), now, judgement)
    assert judgement.verdict is Verdict.REGRESSED
    assert cause is not None
    for text in (*judgement.moved, judgement.reason, *cause.lines, *cause.details):
        assert "torchao" not in text
        assert "triton" not in text
    assert "no package that it uses moved" in cause.lines[1]
