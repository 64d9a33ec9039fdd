"""What training and generation may take. `pytest --benchmark` measures each in a process of its own and judges it."""

from __future__ import annotations

import pytest

from hpc_core import GiB, Limits, MiB


def test_train(perf):
    """Against what was accepted: 1 % more memory at most, and no operator more."""
    perf("own_code.train:make_step", batch=8, length=64, limits=Limits(peak_bytes="1%"))


def test_train_long(perf):
    """Against a budget, whatever was accepted: rows of 128 bytes fit 24 MiB."""
    record = perf("own_code.train:make_step", batch=8, length=128, limits=Limits(peak_bytes=24 * MiB))
    assert record.metrics["flops"].value < 2e9


def test_generate(perf):
    """Both: a budget for memory, and one for operators, which are what a small model waits for."""
    perf("own_code.generate:make_step", new_tokens=8, limits=Limits(peak_bytes=2 * MiB, operators=800))


@pytest.mark.perf_gpu
def test_train_on_a_gpu(perf):
    """A budget of GPU time too. The mark leaves it out where there is no GPU."""
    perf(
        "own_code.train:make_step",
        batch=32,
        length=1024,
        width=4096,
        layers=2,
        heads=32,
        device="cuda",
        limits=Limits(peak_bytes=40 * GiB, busy_s=0.5),
    )
