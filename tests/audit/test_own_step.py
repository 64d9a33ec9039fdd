"""Steps of the user's own are audited: what their optimizers train must learn, and their memory must not grow."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from hpc_core.case.case import Case
from hpc_core.case.workloads import CallableSpec
from hpc_core.record.job import Job, Measure
from hpc_core.record.record import Record
from hpc_core.worker.perform import perform

Step = Callable[[], Any]
pytestmark = pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad=True")


def measured(step: Step, *, audit: bool = True) -> Record:
    """The record of this step."""
    case = Case(id="mine/step", scale="tiny", workload=CallableSpec(factory="a:b", steps=2))
    job = Job(case=case, kind=Measure(audit=audit), device="cpu", launched="inline")
    return perform(job, lambda _: None, step=step)


class Adapted(torch.nn.Module):
    """A frozen layer with an adapter."""

    def __init__(self) -> None:
        super().__init__()
        self.base = torch.nn.Linear(64, 64)
        self.lora_A, self.lora_B = torch.nn.Linear(64, 4, bias=False), torch.nn.Linear(4, 64, bias=False)
        self.base.requires_grad_(False)
        torch.nn.init.zeros_(self.lora_B.weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Add the adapter's output."""
        out: torch.Tensor = torch.tanh(self.base(x) + self.lora_B(self.lora_A(x)))
        return out


class Model(torch.nn.Module):
    """Two adapted layers and a head that is trained whole."""

    def __init__(self, *, reentrant: bool = False) -> None:
        super().__init__()
        self.layers = torch.nn.ModuleList(Adapted() for _ in range(2))
        self.head = torch.nn.Linear(64, 8)
        self._reentrant = reentrant

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Run the layers, recomputed in backward or not."""
        for layer in self.layers:
            x = checkpoint(layer, x, use_reentrant=True) if self._reentrant else layer(x)
        out: torch.Tensor = self.head(x)
        return out


def training(
    *,
    rate: float = 1e-3,
    reentrant: bool = False,
    loss: Callable[[torch.Tensor], torch.Tensor] = lambda loss: loss,
    every: int = 1,
    schedule: int | None = None,
) -> Step:
    """A step of a training, with a fault or without."""
    torch.manual_seed(0)
    model = Model(reentrant=reentrant)
    optimizer = torch.optim.AdamW([part for part in model.parameters() if part.requires_grad], lr=rate)
    rates = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=schedule or 10**6)
    rows, labels = torch.randn(16, 64), torch.randint(8, (16,))
    calls = 0

    def step() -> None:
        nonlocal calls
        calls += 1
        loss(torch.nn.functional.cross_entropy(model(rows), labels)).backward()  # type: ignore[no-untyped-call]
        if calls % every == 0:
            optimizer.step()
            rates.step()
            optimizer.zero_grad()

    return step


def test_the_memory_of_a_training_has_owners() -> None:
    """Model and optimizer are found, and what they own at the peak is theirs; so are the modules."""
    record = measured(training())
    assert (record.status, record.reasons) == ("ok", ())
    assert {name: fact.seen for name, fact in record.audit.items()} == {
        "gradients": "6 of 6 reached", "weights": "moved", "losses": "finite",
    }  # fmt: skip
    peak = {name: metric.value for name, metric in record.metrics.items() if name.startswith("at_peak")}
    adapter, head = 2 * 2 * 4 * 64, 64 * 8 + 8
    assert peak["at_peak_adapter_bytes"] == 4 * adapter
    assert peak["at_peak_weights_bytes"] == 4 * (2 * (64 * 64 + 64) + head)
    assert peak["at_peak_optimizer_bytes"] == 4 * (
        2 * (adapter + head) + 6
    )  # two moments, and a count of steps a tensor
    assert peak["at_peak_other_bytes"] == 4 * 16 * 64 + 8 * 16  # rows and labels
    assert record.profile is not None
    held = {(piece.category, piece.module) for piece in record.profile.at_peak}
    assert {("weights", "layers.*.base"), ("adapter", "layers.*.lora_B"), ("optimizer", "head")} <= held


def test_the_audit_changes_no_number() -> None:
    """Counts and bytes are those of a run without the audit."""

    def exact(record: Record) -> dict[str, float]:
        noisy = ("host_peak_bytes", "waits")  # of the whole process; of a busy machine
        return {
            name: metric.value
            for name, metric in record.metrics.items()
            if metric.noise == "exact" and name not in noisy
        }

    assert exact(measured(training())) == exact(measured(training(), audit=False))


@pytest.mark.parametrize(
    ("step", "reason"),
    [
        (
            lambda: training(reentrant=True),
            "gradients: asked for '6 of 6 reached', saw '2 of 6 reached; layers.0.lora_A.weight has none'.",
        ),
        (lambda: training(rate=0.0), "weights: asked for 'moved', saw 'none of 6 tensors moved, learning rate 0'."),
        (
            lambda: training(loss=lambda loss: loss * float("nan")),
            "losses: asked for 'finite', saw 'nan in backward pass 1'.",
        ),
        (lambda: training(loss=lambda loss: loss - loss.detach()), "losses: asked for 'changing', saw '0 "),
        (lambda: training(loss=lambda loss: loss * 0), "gradients: asked for '6 of 6 reached', saw '0 of 6 reached; "),
    ],
    ids=["checkpointing loses gradients", "rate 0", "NaN", "a loss that says nothing", "gradients of 0"],
)
def test_a_training_that_teaches_nothing_is_invalid(step: Callable[[], Step], reason: str) -> None:
    """A fact says what was seen; no number of the run is gated."""
    record = measured(step())
    assert record.status == "invalid"
    assert any(each.startswith(reason) for each in record.reasons), record.reasons


@pytest.mark.parametrize("changed", [{"every": 3}, {"schedule": 5}], ids=["accumulation", "a schedule that has ended"])
def test_a_sound_training_passes(changed: dict[str, int]) -> None:
    """An optimizer need not step in each call, and a rate may have come down to 0."""
    record = measured(training(**changed))  # type: ignore[arg-type]
    assert (record.status, record.reasons) == ("ok", ())
    assert record.audit["gradients"].seen == "6 of 6 reached"


def keeping(what: str) -> Step:
    """A step that keeps something."""
    w = torch.ones(64, 1024, requires_grad=True)
    kept: Any = deque(maxlen=3) if what == "outputs" else []
    total: list[Any] = [0.0]

    def step() -> None:
        if what in ("tensors", "outputs"):
            kept.append(w.detach() * 2)
        elif what == "output":
            kept[:] = [w.detach() * 2]
        elif what == "number":
            kept.append(w.detach().sum())
        elif what == "graph":
            total[0] = total[0] + (w.exp() * w).sum()
        elif what == "longer":
            kept[:] = [torch.cat([*kept, w.detach()])]

    return step


@pytest.mark.parametrize(
    ("what", "reason"),
    [
        ("tensors", "memory grows 256.00 KiB a step, held float32[64, 1024] made in test_own_step.py:"),
        ("graph", "memory grows 256.00 KiB a step, held float32[64, 1024] made in test_own_step.py:"),
        ("longer", "memory grows 256.00 KiB a step, held float32["),
    ],
)
def test_memory_that_grows_is_named(what: str, reason: str) -> None:
    """What is kept by a list, by autograd's graph, or in a tensor that is replaced by a longer one."""
    record = measured(keeping(what))
    assert record.status == "invalid"
    assert record.reasons[0].startswith(reason)


@pytest.mark.parametrize("what", ["output", "outputs", "number"])
def test_what_is_held_for_a_while_is_no_growth(what: str) -> None:
    """The last output, or the last few, are freed by later steps; a number a step is counted as a kept object."""
    assert measured(keeping(what)).reasons == ()


def test_a_step_without_training_needs_no_gradients() -> None:
    """Inference, a gradient of inputs, and an optimizer's step alone have no facts of a training."""
    model = torch.nn.Linear(64, 64)
    optimizer = torch.optim.SGD(model.parameters())
    for part in model.parameters():
        part.grad = torch.zeros_like(part)
    rows = torch.ones(4, 64)

    def gradient_of_inputs() -> None:
        rows.clone().requires_grad_().sum().backward()  # type: ignore[no-untyped-call]

    for step in (lambda: model(rows), optimizer.step, gradient_of_inputs):
        record = measured(step)
        assert record.reasons == ()
        assert not {"gradients", "weights"} & {*record.audit}
