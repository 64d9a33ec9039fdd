"""Perplexity of true weights on real text: whether quantization, or a careless change, made the model worse at its trade."""

from __future__ import annotations

import math
import os
from typing import Any

import torch

from hpc_core.builders import Built
from hpc_core.builders.causal_lm import causal_lm
from hpc_core.builders.data.rows import token_rows
from hpc_core.case.case import DataSpec
from hpc_core.record.record import Metric
from hpc_core.worker.metrics import reported
from hpc_core.worker.session import Session

__all__ = ["measure_perplexity", "measure_perplexity_unquantized"]

_TOKENS = 2048
_WINDOW = 512
_ROWS = 60
"""Rows of WikiText-2 that hold more than so many tokens."""


def measure_perplexity(session: Session, built: Built) -> None:
    """`perplexity` over the first 2048 tokens of WikiText-2's test rows, or of the embedded paragraphs where those cannot be had.

    In windows of 512 tokens without overlap, so somewhat higher than with a sliding window; the mean of the windows' losses,
    exponentiated. Shown, not gated: its last digits depend on the machine.
    """
    if built.tokenizer is None:
        return
    session.phase("quality")
    session.metrics["perplexity"] = _perplexity(session, built, built.model)


def measure_perplexity_unquantized(session: Session, built: Built) -> None:
    """`perplexity_unquantized` beside it: the same text through the same weights, built once more without quantization.

    At scale small only, where a second model costs seconds; after everything else, since it is memory that is not the case's.
    """
    case = session.case
    if built.tokenizer is None or case.quantization is None or case.scale != "small" or case.model is None:
        return
    session.note_process_memory()
    session.phase("quality")
    model = causal_lm(case.model, built.device).eval()
    session.metrics["perplexity_unquantized"] = _perplexity(session, built, model)


def _perplexity(session: Session, built: Built, model: Any) -> Metric:
    ids, source = _text(session, built)
    losses = []
    with torch.no_grad():
        for start in range(0, len(ids) - 1, _WINDOW):
            window = torch.tensor([ids[start : start + _WINDOW]], device=built.device)
            losses.append(float(model(input_ids=window, labels=window).loss))
    note = f"{len(ids)} tokens of {source}, windows of {_WINDOW}"
    return reported(math.exp(sum(losses) / len(losses)), "1", note=note)


def _text(session: Session, built: Built) -> tuple[list[int], str]:
    """WikiText-2 where the case reads the hub anyway or a local copy lies there: nothing else may reach for the network."""
    workload: Any = session.case.workload
    data = DataSpec(source="embedded", name="paragraphs")
    source = "the embedded paragraphs"
    if workload.data.source == "hub" or os.environ.get("HPC_CORE_DATA"):
        data, source = DataSpec(source="hub", name="wikitext2", rows=_ROWS), "WikiText-2"
    rows = token_rows(data, count=None, length=None, vocab_size=built.vocab_size, tokenizer=built.tokenizer)
    return [token for row in rows for token in row][:_TOKENS], source
