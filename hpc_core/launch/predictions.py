"""Ask for predictions, from Python or a command: which launcher makes them, and what a failed one becomes.

Knows nothing of how a prediction is made (`hpc_core.predict` does, in a worker), so it loads without torch.
"""

from __future__ import annotations

from hpc_core.case.case import Case
from hpc_core.case.errors import PredictError
from hpc_core.launch.launcher import Launcher
from hpc_core.record.gpus import DEFAULT, gpu_named
from hpc_core.record.job import FAKE_CUDA, Job, Predict
from hpc_core.record.record import Record

__all__ = ["predicted", "predicting_launcher", "prediction", "why_not"]


def predicted(case: Case, *, gpu: str = DEFAULT, timeline: bool = False) -> Record:
    """What a case would take on a GPU that need not be there: bytes, FLOPs and counts, from a process that takes seconds.

    `gpu` is the name of a kind of GPU, or an unambiguous part of it ("4090"). The record is "invalid" where what would run
    is not what the case asks for; its `reasons` say what. With `timeline` it also holds the memory over the step.

    Raises:
        PredictError: no such kind of GPU, or the case cannot be predicted; the message says why.
    """
    with predicting_launcher() as launcher:
        record = prediction(launcher, case, gpu=gpu, timeline=timeline)
    if record.failure is not None:
        raise PredictError(why_not(record))
    return record


def prediction(launcher: Launcher, case: Case, *, gpu: str, timeline: bool = False) -> Record:
    """One prediction by this launcher; one that fails is a failed record.

    Raises:
        PredictError: no kind of GPU, or several, are called so.
    """
    return launcher.run(Job(case=case, kind=Predict(gpu=gpu_named(gpu).name, timeline=timeline)))


def predicting_launcher(*, several: bool = False) -> Launcher:
    """The launcher for predictions; `several` in a row are worth a parent that has imported what they share."""
    return Launcher("warm", environment={FAKE_CUDA: "1"}) if several else Launcher("exec")


def why_not(record: Record) -> str:
    """Why a failed record holds no prediction, in a sentence or two that name the case."""
    assert record.failure is not None
    message, case_id = record.failure.message, record.case.id
    return message if case_id in message else f"{case_id}: {message}"
