"""Measure the perplexity of real weights on real text, to see whether quantization or another change makes the model worse."""

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
"""Rows of WikiText-2 that hold more than `_TOKENS` tokens."""


def perplexity(case: Case, built: Built) -> Findings:
    """Measure `perplexity` over the first 2048 tokens of WikiText-2's test rows, or of the embedded paragraphs without WikiText-2.

    It is exp of the mean loss of windows of 512 tokens without overlap, so it is higher than with a sliding window. It is not
    gated: its last digits depend on the machine.
    """
    return _perplexity("perplexity", case, built, built.model)


def perplexity_unquantized(case: Case, built: Built) -> Findings:
    """Measure `perplexity_unquantized`: the same text and weights, in a second model without quantization."""
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
    """Return the text: WikiText-2 if the case reads the hub anyway or there is a local copy. Other cases must not use the network."""
    workload: Any = case.workload
    data = DataSpec(source="embedded", name="paragraphs")
    source = "the embedded paragraphs"
    if workload.data.source == "hub" or os.environ.get("HPC_CORE_DATA"):
        data, source = DataSpec(source="hub", name="wikitext2", rows=_ROWS), "WikiText-2"
    rows = token_rows(data, count=None, length=None, vocab_size=built.vocab_size, tokenizer=built.tokenizer)
    return [token for row in rows for token in row][:_TOKENS], source
