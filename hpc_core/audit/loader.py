"""Facts of the data path: how batches came, against how the case asks for them."""

from __future__ import annotations

import os

from hpc_core.builders.data.loader import Fed
from hpc_core.case.workloads import FeedSpec
from hpc_core.record.findings import Findings
from hpc_core.record.record import Fact


def feed_facts(feed: FeedSpec, fed: Fed, *, on_gpu: bool, copies_apart: bool | None) -> Findings:
    """What the batches since the feed last began showed of it, after at least as many steps as there are workers.

    Args:
        feed: as asked.
        fed: has seen the process that made each batch, whether it lay in page-locked memory, and how many were ahead of each step.
        on_gpu: whether there is a stream to copy on.
        copies_apart: whether every copy to the device was recorded on a stream without kernels; None where none was recorded.
    """
    seen = fed.seen
    facts = {
        "feed_tokenize": Fact(asked=feed.tokenize, seen=fed.source.tokenize),
        "feed_workers": Fact(asked=feed.workers, seen=len(seen.makers - {os.getpid()})),
        "feed_pinned": Fact(asked=feed.pinned, seen=_one(seen.pinned)),
        "feed_ahead": Fact(asked=feed.ahead, seen=_one(seen.ahead)),
    }
    if feed.pinned and not on_gpu:
        facts["feed_pinned"] = Fact(asked=True, seen="off: page-locked memory needs a GPU")
    if feed.ahead and copies_apart is not None:
        asked = "a stream of their own"
        facts["feed_copies"] = Fact(asked=asked, seen=asked if copies_apart else "the stream of the kernels")
    return Findings(facts=facts)


def _one(values: set[bool] | set[int]) -> bool | int | list[int]:
    """The value that was always seen, or all that were."""
    return next(iter(values)) if len(values) == 1 else sorted(values)
