"""How batches reach the device: all there before the first step, or made, pinned and copied while the steps run."""

from __future__ import annotations

from typing import Literal

from hpc_core.case.parts import Strict, check_types, refuse

__all__ = ["FeedSpec"]

_MOST_WORKERS = 64
_MOST_AHEAD = 64


class FeedSpec(Strict, frozen=True, kw_only=True):
    """The data path of a fine-tuning case. Which batches a step sees does not depend on it."""

    way: Literal["resident", "loader"] = "resident"
    """resident: every batch lies on the device before the first step. loader: torch's DataLoader hands them over one by one."""
    tokenize: Literal["cached", "fetch"] = "cached"
    """cached: tokenized, packed or padded once, and read from a file ever after. fetch: texts are tokenized when their batch is asked for."""
    workers: int = 0
    """Processes that make batches; 0 makes them in the training process."""
    pinned: bool = False
    """Batches go through page-locked memory of the host, which a GPU copies from without the host's help."""
    ahead: int = 0
    """So many batches are copied to the device before their step begins, on a stream of their own; 0 copies each when its step begins."""

    def __post_init__(self) -> None:
        """Ranges, and nothing said of a loader where there is none.

        Raises:
            SpecError: otherwise.
        """
        check_types(self)
        refuse(not 0 <= self.workers <= _MOST_WORKERS, f"workers must be 0 to {_MOST_WORKERS}, got {self.workers}.")
        refuse(not 0 <= self.ahead <= _MOST_AHEAD, f"ahead must be 0 to {_MOST_AHEAD}, got {self.ahead}.")
        if self.way == "resident":
            defaults = {"tokenize": "cached", "workers": 0, "pinned": False, "ahead": 0}
            said = [name for name, default in defaults.items() if getattr(self, name) != default]
            refuse(bool(said), f"{', '.join(said)} belongs to a feed with way='loader'; the way is 'resident'.")
