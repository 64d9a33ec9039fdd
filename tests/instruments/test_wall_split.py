"""Wall time is split into Python, operators, CUDA calls and waiting: by hand-made records of a GPU, and by real work on a CPU."""

from __future__ import annotations

import time
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from hpc_core.instruments.program import Mark, unmarked
from hpc_core.instruments.wall_split import WINDOW, Window, parts, split, split_step
from tests.tiny_cases import tiny_record

CPU, CUDA = torch._C._autograd.DeviceType.CPU, torch._C._autograd.DeviceType.CUDA


def event(
    name: str,
    start: int,
    end: int,
    correlation: int = 0,
    *,
    thread: int = 1,
    device: object = CPU,
    annotation: bool = False,
) -> Any:
    """A record as torch's profiler gives it, with a start and an end in microseconds."""
    values = {
        "name": name,
        "start_ns": 1000 * start,
        "end_ns": 1000 * end,
        "correlation_id": correlation,
        "start_thread_id": thread,
        "device_type": device,
        "is_user_annotation": annotation,
    }
    return SimpleNamespace(**{key: partial(getattr, SimpleNamespace(it=value), "it") for key, value in values.items()})


def split_us(*events: Any, window: tuple[int, int] = (0, 100)) -> dict[str, float]:
    """The microseconds of each part, of these records and a window."""
    found = parts([event(WINDOW, *window, annotation=True), *events])
    return {name: value / 1000 for name, value in found.items()}


def test_a_tokens_calls_are_parted_by_what_they_do() -> None:
    """Launches are taken out of their operators, also by the driver; a synchronization waits; what is in neither is Python."""
    found = split_us(
        event("aten::linear", 10, 40),
        event("aten::addmm", 12, 38),
        event("cudaLaunchKernel", 20, 26, 7),
        event("ampere_bf16_gemm", 27, 90, 7, device=CUDA),
        event("cuLaunchKernelEx", 45, 50, 8),
        event("cuLaunchKernel", 46, 49, 8),
        event("aten::item", 60, 95),
        event("cudaMemcpyAsync", 62, 66, 9),
        event("Memcpy DtoH (Device -> Pinned)", 66, 68, 9, device=CUDA),
        event("cudaStreamSynchronize", 66, 90, 10),
        event("Optimizer.step#AdamW.step", 0, 100, annotation=True),
    )

    assert found == {"python": 30, "dispatch": 24 + 11 - 4, "launch": 6 + 5 + 4, "waiting": 24}


@pytest.mark.parametrize(
    ("name", "took", "on_device"),
    [
        ("cudaDeviceSynchronize", 5, ""),
        ("cudaEventSynchronize", 5, ""),
        ("cudaMemcpy", 5, "Memcpy DtoH (Device -> Pinned)"),
        ("cudaMemcpyAsync", 5, "Memcpy DtoH (Device -> Pageable)"),
        ("cudaLaunchKernel", 80, "gemm"),
    ],
)
def test_calls_that_wait_for_the_device_are_waiting(name: str, took: int, on_device: str) -> None:
    """Synchronizations wait, and so do copies to pageable memory and a launch that finds the queue full."""
    found = split_us(event(name, 10, 10 + took, 3), event(on_device, 10, 90, 3, device=CUDA))
    assert found == {"python": 100 - took, "waiting": took}


def test_a_thread_that_works_counts_and_not_one_that_waits() -> None:
    """While the backward's thread runs operators, the thread that waits for it does not count; Python outside operators does."""
    found = split_us(
        event("cudaStreamSynchronize", 0, 60),
        event("autograd::engine::evaluate_function: MmBackward0", 20, 50, thread=2),
        event("cudaLaunchKernel", 30, 35, thread=2),
        event("autograd::engine::evaluate_function: CheckpointFunctionBackward", 60, 100, thread=2),
        event("CheckpointFunctionBackward", 60, 100, thread=2),
        event("aten::mm", 70, 80, thread=2),
    )
    assert found == {"waiting": 30, "dispatch": 25 + 10, "launch": 5, "python": 30}


def test_only_the_window_counts() -> None:
    """What began before the window and what follows it is cut off; without a window there is nothing."""
    events = (event("aten::mm", 0, 30), event("cudaLaunchKernel", 50, 70), event("aten::mm", 80, 90))
    assert split_us(*events, window=(20, 60)) == {"dispatch": 10, "python": 20, "launch": 10}
    assert not parts(events)


class Step:
    """A product, and Python that spins for a while."""

    phases: tuple[str, ...] = ("step",)
    period = 1

    def __init__(self, spin_s: float):
        self._left, self._spin_s = torch.ones(256, 256), spin_s

    def step(self, mark: Mark = unmarked) -> None:
        """Multiply and spin."""
        self._left @ self._left
        end = time.perf_counter() + self._spin_s
        while time.perf_counter() < end:
            pass


def test_a_spin_in_python_moves_pythons_share() -> None:
    """A step that spins for 50 ms between products is Python's, and its parts add up to its wall time."""
    metrics = split_step(Step(0.05), torch.device("cpu"), 2.0).metrics
    assert set(metrics) == {"python_s", "dispatch_s"}
    assert sum(each.value for each in metrics.values()) == pytest.approx(2.0)
    plain = split_step(Step(0.0), torch.device("cpu"), 2.0).metrics
    assert metrics["python_s"].value > plain["python_s"].value


@pytest.mark.parametrize("name", ["generate-fp16", "lora"])
def test_a_tiny_cases_parts_add_up_to_its_wall_time(name: str) -> None:
    """On a CPU a token's and a step's wall time is Python and operators, and none of it is judged."""
    metrics = tiny_record(f"tiny/{name}").metrics
    wall = metrics["decode_token_s" if name.startswith("generate") else "step_s"].value
    assert metrics["python_s"].value + metrics["dispatch_s"].value == pytest.approx(wall)
    assert metrics["python_s"].value > 0 < metrics["dispatch_s"].value
    assert not {"launch_s", "waiting_s"} & set(metrics)
    assert not metrics["python_s"].gated


def test_work_under_a_profiler_of_its_own_is_not_split() -> None:
    """A step that profiles itself leaves a note and loses nothing else."""

    def work(window: Window) -> None:
        window.begin()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]):
            torch.ones(2)
        window.end()

    found = split(work, torch.device("cpu"), 1.0)
    assert not found.metrics
    assert "wall time is not split: " in found.notes[0]
