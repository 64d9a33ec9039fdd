"""Facts of the data path: how batches were made, against how the case asks for them."""

from __future__ import annotations

import os

from hpc_core.builders.data.loader import Fed
from hpc_core.case.workloads import FeedSpec
from hpc_core.record.findings import Findings
from hpc_core.record.record import Fact


def feed_facts(feed: FeedSpec, fed: Fed, *, on_gpu: bool, copies_apart: bool | None) -> Findings:
    """Return facts of the batches since the feed last began; run at least as many steps as there are workers first.

    Args:
        feed: what the case asks for.
        fed: the loader. It records which process made each batch, whether the batch was in page-locked memory, and how many
            batches were ready ahead of each step.
        on_gpu: whether there is a stream to copy on.
        copies_apart: whether every copy to the device ran on a stream without kernels; None if no copy was recorded.
    """
    batches = fed.observed
    facts = {
        "feed_tokenize": Fact(asked=feed.tokenize, seen=fed.source.tokenize),
        "feed_workers": Fact(asked=feed.workers, seen=len(batches.makers - {os.getpid()})),
        "feed_pinned": Fact(asked=feed.pinned, seen=_one(batches.pinned)),
        "feed_ahead": Fact(asked=feed.ahead, seen=_one(batches.ahead)),
    }
    if feed.pinned and not on_gpu:
        facts["feed_pinned"] = Fact(asked=True, seen="off: page-locked memory needs a GPU")
    if feed.ahead and copies_apart is not None:
        asked = "a stream of their own"
        facts["feed_copies"] = Fact(asked=asked, seen=asked if copies_apart else "the stream of the kernels")
    return Findings(facts=facts)


def _one(values: set[bool] | set[int]) -> bool | int | list[int]:
    """Return the only value, or all values sorted."""
    return next(iter(values)) if len(values) == 1 else sorted(values)
