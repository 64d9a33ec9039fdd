"""What bench/studies/stock_and_tuned/results.md says above its tables."""

from __future__ import annotations

__all__ = ["HEAD"]

HEAD = """# Stock beside tuned

Written by `python -m bench.studies.stock_and_tuned.comparison`: every number is read from the committed baselines of {machines}, or computed in closed form. A test keeps
this page equal to what the command prints. A row and those below it run the same work: model, weights, adapter, data, batch and lengths are equal, only the
engine and its switches differ. A machine is a model of GPU: a row and its twin may be of two cards and two calls, mostly of one. Random weights. What a record does not hold is shown as `-`. Times of two machines are not to be compared by their stock rows'
walls: those are the host's.

**Training.** Wall is the median of the timed steps, synchronized one by one. **Floor**: the longer of FLOPs without recomputation over the product's rate and bytes over
the copy's rate, both measured in the row's own session; rates differ a little between sessions, and so do floors. It knows no dequantizing of 4-bit weights and no norms, so nothing reaches
it. Joules are the whole board's, idle power included. An **epoch** is 4000 rows, as many as the report had, at that batch: so many steps like the timed ones, of full rows.

**Decoding.** Wall is the median time between two tokens of a row, tokens/s counts all rows, prefill apart. The floor reads every weight and the prompt's cache once. Joules are the whole
board's for whole queries, prefill included, over all new tokens. A graph's peak holds its private pool. Logits stand against the same weights in float32 and against the stock forward in
the same precision; both err, see [Method](../../../docs/explanation/method.md).

**The report's own rows.** LoRA on 4000 rows of the recorded lengths of WikiText-2: padded to 512 tokens each, joined into full blocks, and joined by the tuned engine. All train on
the same text once; tokens are unpadded. An epoch is extrapolated from the timed steps."""
