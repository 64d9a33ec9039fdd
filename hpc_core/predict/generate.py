"""Predict a generation case: memory of prefill and decode, and what prefill and a token launch and compute.

Tokens are alike but for the cache, which grows: the first ones after the longest prompt are watched, and the last ones, by a
prompt that is as much longer. A static cache has its size from the start, and its first tokens are all there is to see.
"""

from __future__ import annotations

import dataclasses
import gc

import torch

from hpc_core.case.case import GenerateSpec
from hpc_core.case.errors import PredictError
from hpc_core.engines.generate import GenerateProgram, generate_program
from hpc_core.instruments.owners import by_module, cache_tensors, weight_tensors
from hpc_core.instruments.program import unmarked
from hpc_core.instruments.timeline import Timeline
from hpc_core.predict.policy import ValuePolicy
from hpc_core.predict.session import Prediction
from hpc_core.predict.watch import Counts, GpuWatch
from hpc_core.record.record import Record
from hpc_core.worker.generate import BUSY_TOKENS, COUNTED_TOKENS
from hpc_core.worker.memory import memory_metrics
from hpc_core.worker.metrics import counted, measured_bytes
from hpc_core.worker.observe import watch_cache

__all__ = ["predict_generate"]

_FIRST_TOKENS = 3
_LAST_TOKENS = 2


class _Generation:
    """One program's queries on the fake GPU."""

    def __init__(self, program: GenerateProgram, watch: GpuWatch, policy: ValuePolicy):
        self.program = program
        self.watch = watch
        self.policy = policy
        self._left = 0
        # `generate` asks the device whether every sequence has ended; here the number of tokens decides.
        program.model._has_unfinished_sequences = self._unfinished

    def _unfinished(self, this_peer_finished: torch.Tensor, *_: object, **__: object) -> bool:
        bool(this_peer_finished)  # a real run waits for this value at every token, and so does its copy to the host
        self._left -= 1
        return self._left >= 0

    def query(self, index: int, new_tokens: int, *, marked: bool, room: int | None = None) -> None:
        """Prompt number `index` and so many tokens; `marked` with the phases' marks, and so the streamer's copies.

        `room` asks for more tokens and ends after `new_tokens`, so that a static cache has its size.
        """
        gc.collect()  # what the query before left in reference cycles
        program = self.program
        prompt = program.prompts[index]
        self.policy.know([program.inputs[index]["attention_mask"]], full=not prompt.padded)
        kept, program.new_tokens, program.steps_done = program.new_tokens, room or new_tokens, index
        program.ended_after = new_tokens
        self._left = new_tokens
        program.step(self.watch if marked else unmarked)
        program.new_tokens, program.ended_after = kept, None


def predict_generate(prediction: Prediction, workload: GenerateSpec) -> Record:
    """A warm query, the counts of a short one, then memory of the longest prompt's first and last tokens."""
    if workload.engine == "graph":
        raise PredictError(
            f"{prediction.case.id}: engine='graph' runs kernels of its own inside a CUDA graph, which cannot be predicted. Predict it "
            "with engine='stock', whose weights and cache a token are the same."
        )
    if workload.cache == "static" and workload.compiled:
        raise PredictError(
            f"{prediction.case.id}: transformers compiles the forward for a static cache on a GPU, and torch.compile cannot "
            "be predicted. Predict it with compiled=False, or with cache='dynamic', whose memory is that of the same tokens."
        )
    with prediction.fake() as (watch, policy):
        built = prediction.build(watch)
        prediction.phase("data")
        generation = _Generation(generate_program(built, workload), watch, policy)
        program = generation.program
        _tokens(prediction, program, workload)
        prediction.phase("warm-up")
        longest = max(range(program.period), key=lambda index: len(program.prompts[index].ids[0]))
        static = workload.cache == "static"  # it is kept from query to query, as large as the largest asked for
        generation.query(longest, 1, marked=False, room=program.new_tokens if static else None)
        prediction.phase("counters")
        _counts(prediction, generation)
        prediction.phase("memory")
        _memory(prediction, generation, longest)
        prediction.look(built)
        return prediction.record(watch)


def _tokens(prediction: Prediction, program: GenerateProgram, workload: GenerateSpec) -> None:
    prompts = program.prompts
    made = workload.batch * program.new_tokens * program.period
    for name, value in (
        ("tokens", made),
        ("prompt_tokens", sum(prompt.tokens for prompt in prompts)),
        ("padded_tokens", sum(prompt.padded for prompt in prompts)),
    ):
        prediction.metrics[name] = counted(value, better="same", case_only=True)


def _counts(prediction: Prediction, generation: _Generation) -> None:
    """Of the first prompt, as `perform.generate` counts: prefill with one token, and with four tokens after it."""
    seen: dict[int, Counts] = {}
    for new in (1, 1 + COUNTED_TOKENS):
        generation.watch.begin(generation.program.phases)
        generation.query(0, new, marked=False)
        seen[new] = generation.watch.counts()
    prefill, whole = seen[1], seen[1 + COUNTED_TOKENS]
    decoded = min(BUSY_TOKENS, generation.program.new_tokens - 1)
    metrics = prediction.metrics
    unit = f"per prefill and {COUNTED_TOKENS} tokens"
    metrics["operators"] = counted(whole.operators, machine=True, unit=f"1 {unit}")
    metrics["operators_decode"] = counted(
        whole.operators - prefill.operators, machine=True, unit=f"1 per {COUNTED_TOKENS} tokens"
    )
    metrics["flops"] = counted(whole.flops, machine=True, unit=f"FLOP {unit}")
    metrics["flops_prefill"] = counted(prefill.flops, machine=True, unit="FLOP")
    metrics["kernels_prefill"] = counted(prefill.kernels, machine=True)
    for name in ("kernels", "copies"):
        first, all_ = getattr(prefill, name), getattr(whole, name)
        total = first + (all_ - first) * decoded // COUNTED_TOKENS
        metrics[name] = counted(total, machine=True, unit=f"1 per prefill and {decoded} tokens")


def _memory(prediction: Prediction, generation: _Generation, longest: int) -> None:
    program = generation.program
    look = _static_cache if program.workload.cache == "static" else _growing_cache
    prediction.places.learn(program.model)
    prediction.places.begin()
    peaks, timeline = look(generation, longest)
    metrics = memory_metrics(peaks, timeline, on_gpu=True)
    note = "tensors and scratch as asked for, without the allocator's rounding"
    metrics["peak_requested_bytes"] = measured_bytes(timeline.peak()[1], machine=True, gated=False, note=note)
    prediction.keep(
        timeline, program.phases, generation.watch, "the first and the last tokens after the longest prompt"
    )
    prediction.metrics |= metrics


def _growing_cache(generation: _Generation, longest: int) -> tuple[dict[str, int], Timeline]:
    """The first tokens after the longest prompt, those that a measured run records, and the last ones: three places of one cache."""
    program = generation.program
    first = min(_FIRST_TOKENS, program.new_tokens)
    stretches = {0: first}
    if program.workload.cache == "dynamic":
        for end in (min(BUSY_TOKENS + 1, program.new_tokens), program.new_tokens):
            if end > first:
                stretches[end - _LAST_TOKENS] = _LAST_TOKENS
    inputs, found, peaks = program.inputs[longest], [], dict.fromkeys(program.phases, 0)
    for before, tokens in stretches.items():
        program.inputs[longest] = _longer(inputs, before)
        watch = _watched(generation, longest, tokens, room=None)
        recorded = before + tokens <= BUSY_TOKENS + 1
        for phase, peak in watch.peaks.items():
            if phase == "decode" or before == 0:  # the prefill of a prompt that was made longer is none of the case's
                peaks[phase] = max(peaks[phase], peak)
        if recorded:
            peak = watch.peaks["decode"] if before else max(watch.peaks.values())
            found.append((peak, _kept(watch.timeline, decoding=before > 0)))
    program.inputs[longest] = inputs
    return peaks, max(found, key=lambda each: each[0])[1]


def _static_cache(generation: _Generation, longest: int) -> tuple[dict[str, int], Timeline]:
    """The first tokens, with a cache for all of them, and once more with one for those that a measured run records."""
    asked = generation.program.new_tokens
    peaks = dict(_watched(generation, longest, min(_FIRST_TOKENS, asked), room=asked).peaks)
    recorded = min(BUSY_TOKENS + 1, asked)
    watch = _watched(generation, longest, min(_FIRST_TOKENS, recorded), room=recorded)
    return peaks, _kept(watch.timeline, decoding=False)


def _kept(timeline: Timeline, *, decoding: bool) -> Timeline:
    """A copy, since the next query begins with what lives now. `decoding`: without what came and went in the prefill, so that the
    highest point lies in the tokens after it.
    """
    pieces = [piece for piece in timeline.allocations if not decoding or piece.died_in != 0]
    return Timeline([dataclasses.replace(piece) for piece in pieces])


def _watched(generation: _Generation, index: int, tokens: int, *, room: int | None) -> GpuWatch:
    program, watch = generation.program, generation.watch
    gc.collect()
    watch.begin(program.phases)
    for category, tensors in weight_tensors(program.model).items():
        watch.own_now(category, tensors)
    for module, tensors in by_module(program.model, None):
        watch.name(module, tensors)
    with watch_cache(program.model) as cache:
        program.on_token = lambda _: watch.own_now("kv_cache", cache_tensors(cache.seen))
        generation.query(index, tokens, marked=True, room=room)
    cache.seen = None  # it would hold its keys and values through the next query
    program.on_token = None
    watch.end_phase()
    return watch


def _longer(inputs: dict[str, torch.Tensor], tokens: int) -> dict[str, torch.Tensor]:
    """A prompt that already holds so many of its answer's tokens: the cache is then as long as it will be after them."""
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    more = torch.zeros((ids.shape[0], tokens), dtype=ids.dtype, device=ids.device)
    return {
        "input_ids": torch.cat([ids, more], dim=1),
        "attention_mask": torch.cat([mask, torch.ones_like(more)], dim=1),
    }
