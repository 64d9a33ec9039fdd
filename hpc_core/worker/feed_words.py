"""What bounds a fed training, said in words from measured rates. Pure."""

from __future__ import annotations

from dataclasses import dataclass

from hpc_core.case.case import FeedSpec

__all__ = ["Rates", "what_bounds"]

_FREE = 0.02
"""Where waiting costs at most 2 % of a resident step, data bounds nothing."""
_WELL_SHARED = 0.5
"""Workers that give at least half of what so many lone makers would are bound by making, else by handing over."""


@dataclass(frozen=True)
class Rates:
    """Measured numbers of a feed; seconds are of a step or of a batch, which is the same."""

    feed: FeedSpec
    fed_s: float
    resident_s: float
    wait_s: float
    """Mean time that the host was busy getting a batch while it trained."""
    idle_s: float | None
    """In which the GPU had nothing to do meanwhile; None without one."""
    make_s: float
    """What one process needs for a batch."""
    supply_per_s: float
    """Batches a second from the same loader when nobody trains."""


def what_bounds(rates: Rates) -> str:
    """One sentence: what bounds the fed training, the rates of both sides, and what waiting cost."""
    feed = rates.feed
    many = feed.workers > 1
    who = f"{feed.workers} worker{'s make' if many else ' makes'}" if feed.workers else "the training process makes"
    alone = "themselves" if many else "itself"
    idle = "" if rates.idle_s is None else f", and the GPU idles {_time(rates.idle_s)} a step for it"
    cost = (
        f"{who} {rates.supply_per_s:.4g} batches/s by {alone}, training takes {1 / rates.resident_s:.4g}; the host waits {_time(rates.wait_s)} for "
        f"a batch{idle}; a step takes {_time(rates.fed_s)}, with resident batches {_time(rates.resident_s)}"
    )
    # Measured: idle kernels on a GPU; on a CPU, which is host and device, the wait itself.
    lost = rates.wait_s if rates.idle_s is None else rates.idle_s
    if lost <= _FREE * rates.resident_s:
        return f"bound by nothing: {cost}"
    making = "tokenization" if feed.tokenize == "fetch" else "reading and collating"
    if rates.supply_per_s * rates.resident_s < 1:
        ideal = max(feed.workers, 1) / rates.make_s
        if feed.workers and rates.supply_per_s < _WELL_SHARED * ideal:
            return f"bound by handing batches over between processes, which by what one takes for a batch could be {ideal:.4g}/s: {cost}"
        return f"bound by {making}: {cost}"
    if not feed.workers:
        return f"bound by {making} in the training process, between its steps: {cost}"
    return f"bound by the way from the workers to the step (handing over, pinning, copying, shared cores): {cost}"


def _time(seconds: float) -> str:
    return f"{seconds * 1e6:.0f} µs" if seconds < 1e-3 else f"{seconds * 1e3:.2f} ms"
