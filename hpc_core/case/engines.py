"""The names of the engines that a case may name: built-in ones and those of installed packages. Loads none of them."""

from __future__ import annotations

import functools
import importlib.metadata

from hpc_core.case.errors import SpecError

ENTRY_POINTS = "hpc_core.engines"
"""The group of entry points in which a package registers an engine, under the name that a case uses."""

BUILT_IN = {
    "generate": {
        "stock": "hpc_core.engines.generate:StockGeneration",
        "graph": "hpc_core.engines.decode.engine:GraphEngine",
    },
    "finetune": {
        "stock": "hpc_core.engines.finetune:StockTraining",
        "tuned": "hpc_core.engines.tuned.engine:TunedEngine",
    },
    "callable": {"callable": "hpc_core.engines.callable:CallableEngine"},
}
"""`module:class` of each engine, by workload and name."""


@functools.cache
def registered() -> dict[str, importlib.metadata.EntryPoint]:
    """Return the engines that installed packages register, by name."""
    return {each.name: each for each in importlib.metadata.entry_points(group=ENTRY_POINTS)}


def check_engine(workload: str, name: str) -> None:
    """Check that hpc-core or an installed package has the engine.

    Raises:
        SpecError: the engine is unknown; the message lists the known ones.
    """
    if name in BUILT_IN[workload] or name in registered():
        return
    known = sorted({*BUILT_IN[workload], *registered()})
    raise SpecError(
        f"There is no engine {name!r} for this workload. There are: {', '.join(known)}. A package adds one with the entry point "
        f"{ENTRY_POINTS!r}."
    )
