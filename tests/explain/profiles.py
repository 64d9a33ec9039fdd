"""Records with small profiles, for tests of explanations and of the reports that show them."""

from __future__ import annotations

import msgspec

from hpc_core.record.profile import ModuleSeen, OperatorUse, Piece, Profile
from hpc_core.record.record import Metric, Record
from tests.strategies import a_record, counted, peak

GIB = 2**30
MLP, HEAD = "model.layers.*.mlp", "lm_head"
MODULES = {
    MLP: ModuleSeen("LlamaMLP", 28, 56),
    f"{MLP}.act_fn": ModuleSeen("SiLU", 28, 56),
    HEAD: ModuleSeen("Linear", 1, 1),
}


def a_profile(*pieces: Piece, operators: tuple[OperatorUse, ...] = (), **changes: object) -> Profile:
    """A step of a model with an MLP in each of 28 layers and a head, with these pieces at its peak."""
    plain = Profile(work="one step", phases=("forward",), modules=MODULES, at_peak=pieces, operators=operators)
    return msgspec.structs.replace(plain, **changes)


def profiled_record(profile: Profile | None, peak_bytes: int = 2 * GIB, **metrics: Metric) -> Record:
    """A sound record on an H100 with this profile."""
    return a_record({"peak_bytes": peak(peak_bytes), "operators": counted()} | metrics, profile=profile)


def weights(size: int = GIB) -> Piece:
    """The head's weights."""
    return Piece("weights", HEAD, "", "held bfloat16[8, 8]", size, 1)
