"""The text above the tables of bench/studies/stock_and_tuned/results.md."""

from __future__ import annotations

__all__ = ["HEAD"]

HEAD = """# Stock and tuned engines compared

Written by `python -m bench.studies.stock_and_tuned.comparison`. Every number comes from the committed baselines of {machines}, or from a closed form. A test keeps this page
equal to the command's output. The engine rows below a stock row run the same work: model, weights, adapter, data, batch and lengths are equal, and only the engine and its
switches differ. Weights are random. A machine is a model of GPU, so the rows of a group may come from different cards and sessions, though most come from one. `-` means that
the record has no value. Do not compare machines by the wall times of their stock rows: those depend on the host.

**Training.** Wall is the median of the timed steps, each synchronized. The **floor** is the longer of two times at rates measured in the row's own session: FLOPs without
recomputation over the rate of a matrix product, and bytes over the rate of a copy. It contains no dequantization of 4-bit weights and no norms, so no row reaches it. Rates
differ a little between sessions, and so do floors. Joules are the whole board's, idle power included. An **epoch** is 4000 full rows, as in the original report, extrapolated
from the timed steps.

**Decoding.** Wall is the median time between two tokens of a row. Tokens/s counts all rows, without the prefill. The floor reads every weight and the prompt's cache once.
Joules are the whole board's for whole queries, prefill included, per new token. A graph's peak includes its private pool. Logits are compared with the same weights in float32,
and with the stock forward in the same precision. Both have rounding errors: see [Method](../../../docs/explanation/method.md).

**The report's own rows.** LoRA on 4000 rows with the recorded lengths of WikiText-2: padded to 512 tokens each, packed into full blocks, and packed by the tuned engine. All
train once on the same text, and tokens are unpadded. An epoch is extrapolated from the timed steps."""
