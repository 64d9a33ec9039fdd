"""Ask for predictions, from Python or a command. A worker makes them, so this loads without torch."""

from __future__ import annotations

from hpc_core.case.case import Case
from hpc_core.case.errors import PredictError
from hpc_core.launch.launcher import Launcher
from hpc_core.record.gpus import DEFAULT, gpu_named
from hpc_core.record.job import Job, Predict
from hpc_core.record.record import Record


def predicted(
    case: Case,
    *,
    gpu: str = DEFAULT,
    memory_bytes: int | None = None,
    timeline: bool = False,
    memory_only: bool = False,
) -> Record:
    """Predict what a case takes on a GPU that need not be there: bytes, FLOPs and counts. Takes seconds.

    `gpu` is the name of a GPU model, or an unambiguous part of it ("4090"). `memory_bytes` is that of a card which the table
    lacks; it is predicted by the rules of `gpu`. The record is "invalid" where what would run is not what the case asks for;
    its `reasons` say what. With `timeline` it also holds the memory over the step; with `memory_only` it holds no counts, and
    takes a fraction of the time.

    Raises:
        PredictError: no such GPU model, or the case cannot be predicted; the message says why.
    """
    with predicting_launcher() as launcher:
        record = prediction(
            launcher, case, gpu=gpu, memory_bytes=memory_bytes, timeline=timeline, memory_only=memory_only
        )
    if record.failure is not None:
        raise PredictError(why_not(record))
    return record


def prediction(
    launcher: Launcher,
    case: Case,
    *,
    gpu: str,
    memory_bytes: int | None = None,
    timeline: bool = False,
    memory_only: bool = False,
) -> Record:
    """Predict a case with this launcher; a prediction that fails is a failed record.

    Raises:
        PredictError: no GPU model, or more than one, has this name.
    """
    kind = Predict(gpu=gpu_named(gpu).name, memory_bytes=memory_bytes, timeline=timeline, memory_only=memory_only)
    return launcher.run(Job(case=case, kind=kind))


def predicting_launcher(*, several: bool = False) -> Launcher:
    """Return a launcher for predictions; `several` in a row are worth a forkserver."""
    return Launcher("warm", predicting=True) if several else Launcher("exec")


def why_not(record: Record) -> str:
    """Return why a failed record holds no prediction, in a sentence or two that name the case."""
    assert record.failure is not None
    message, case_id = record.failure.message, record.case.id
    return message if case_id in message else f"{case_id}: {message}"
