"""Perplexity of true weights on real text: whether quantization, or a careless change, made the model worse at its task."""

from __future__ import annotations

import math
import os
from typing import Any

import torch

from hpc_core.builders.assemble import Built
from hpc_core.builders.causal_lm import causal_lm
from hpc_core.builders.data.rows import token_rows
from hpc_core.case.case import Case
from hpc_core.case.parts import DataSpec
from hpc_core.record.findings import Findings
from hpc_core.record.metrics import metric

_TOKENS = 2048
_WINDOW = 512
_ROWS = 60
"""Rows of WikiText-2 that hold more than so many tokens."""


def perplexity(case: Case, built: Built) -> Findings:
    """Measure `perplexity` over the first 2048 tokens of WikiText-2's test rows, or of the embedded paragraphs without those.

    In windows of 512 tokens without overlap, so somewhat higher than with a sliding window; the mean of the windows' losses,
    exponentiated. Shown, not gated: its last digits depend on the machine.
    """
    return _perplexity("perplexity", case, built, built.model)


def perplexity_unquantized(case: Case, built: Built) -> Findings:
    """Measure `perplexity_unquantized`: the same text through the same weights, built once more without quantization."""
    assert case.model is not None
    model = causal_lm(case.model, built.device).eval()
    return _perplexity("perplexity_unquantized", case, built, model)


def _perplexity(name: str, case: Case, built: Built, model: Any) -> Findings:
    ids, source = _text(case, built)
    losses = []
    with torch.no_grad():
        for start in range(0, len(ids) - 1, _WINDOW):
            window = torch.tensor([ids[start : start + _WINDOW]], device=built.device)
            losses.append(float(model(input_ids=window, labels=window).loss))
    note = f"{len(ids)} tokens of {source}, windows of {_WINDOW}"
    return Findings(metrics={name: metric(name, math.exp(sum(losses) / len(losses)), note=note)})


def _text(case: Case, built: Built) -> tuple[list[int], str]:
    """WikiText-2 where the case reads the hub anyway or a local copy lies there: nothing else may reach for the network."""
    workload: Any = case.workload
    data = DataSpec(source="embedded", name="paragraphs")
    source = "the embedded paragraphs"
    if workload.data.source == "hub" or os.environ.get("HPC_CORE_DATA"):
        data, source = DataSpec(source="hub", name="wikitext2", rows=_ROWS), "WikiText-2"
    rows = token_rows(data, count=None, length=None, vocab_size=built.vocab_size, tokenizer=built.tokenizer)
    return [token for row in rows for token in row][:_TOKENS], source
