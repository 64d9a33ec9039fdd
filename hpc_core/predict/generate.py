"""Predict a generation case: memory of prefill and decode, and operators, launches and FLOPs of prefill and tokens.

Tokens differ only in the length of the cache. So the first tokens after the longest prompt are run, and the last ones, by a
prompt that is longer by the tokens between. A static cache has its final size from the start, so its first tokens are enough.
"""

from __future__ import annotations

import dataclasses
import gc

import torch

from hpc_core.audit.model import context_note
from hpc_core.audit.parts import text_note
from hpc_core.engines.generate import BUSY_TOKENS, COUNTED_TOKENS, GenerateProgram
from hpc_core.instruments.host import host_cost, query_cost
from hpc_core.instruments.instrument import Instrument, observe
from hpc_core.instruments.owners import by_module, cache_tensors, watch_cache, weight_tensors
from hpc_core.instruments.program import unmarked
from hpc_core.instruments.timeline import Timeline
from hpc_core.predict.place import DEVICE, Place, audit, build_model, memory_of
from hpc_core.predict.watch import Counts, GpuWatch
from hpc_core.record.findings import Findings
from hpc_core.record.metrics import metric

_FIRST_TOKENS = 3
_LAST_TOKENS = 2


class _Generation:
    """One program's queries on the fake GPU."""

    def __init__(self, program: GenerateProgram, watch: GpuWatch):
        self.program = program
        self.watch = watch
        self._remaining = 0
        # `generate` reads from the device whether every sequence has ended; here the number of tokens decides.
        program.model._has_unfinished_sequences = self._unfinished

    def _unfinished(self, this_peer_finished: torch.Tensor, *_: object, **__: object) -> bool:
        bool(this_peer_finished)  # a real run copies this value to the host at every token
        self._remaining -= 1
        return self._remaining >= 0

    def begin(self, index: int, new_tokens: int, room: int | None = None) -> None:
        """Prepare the program so that its next step is prompt number `index` and `new_tokens` tokens."""
        program = self.program
        program.new_tokens, program.steps_done = room or new_tokens, index
        program.ended_after = new_tokens
        self._remaining = new_tokens

    def query(self, index: int, new_tokens: int, *, marked: bool, room: int | None = None) -> None:
        """Run prompt number `index` and `new_tokens` tokens; `marked` adds the marks of phases, and so the streamer's copies.

        `room` requests more tokens than the query makes, so that a static cache has its full size.
        """
        gc.collect()  # reference cycles of the query before
        program = self.program
        before = program.new_tokens
        self.begin(index, new_tokens, room)
        program.step(self.watch if marked else unmarked)
        program.new_tokens, program.ended_after = before, None


def predict_generate(place: Place) -> Findings:
    """Run a warm-up query, count a short one, then observe the memory of the longest prompt's first and last tokens."""
    built, loaded = build_model(place)
    place.phases.enter("data")
    program = place.engine.load(place.case, DEVICE, built)
    assert isinstance(program, GenerateProgram)
    generation = _Generation(program, place.watch)
    counts = (
        Instrument("operators", "counters", lambda _: _counts(generation)),
        Instrument("host's work", "host", lambda _: _host(place, generation)),
    )
    return observe(
        (
            Instrument("tokens", None, lambda _: _tokens(program)),
            Instrument("warm query", "warm-up", lambda _: _warm_query(generation)),
            *(() if place.kind.memory_only else counts),
            Instrument("memory", "memory", lambda _: _memory(place, generation)),
            Instrument("audit", "audit", lambda _: audit(place, built)),
        ),
        program,
        place.phases,
        loaded | context_note(program.model, program.most_tokens) | text_note(program.model),
    )


def _tokens(program: GenerateProgram) -> Findings:
    prompts = program.prompts
    values = {
        "tokens": program.workload.batch * program.new_tokens * program.period,
        "prompt_tokens": sum(prompt.tokens for prompt in prompts),
        "padded_tokens": sum(prompt.padded for prompt in prompts),
    }
    return Findings(metrics={name: metric(name, value) for name, value in values.items()})


def _warm_query(generation: _Generation) -> Findings:
    program = generation.program
    static = program.workload.cache == "static"  # queries share it, and it has the size of the longest one
    generation.query(program.longest, 1, marked=False, room=program.new_tokens if static else None)
    return Findings()


def _counts(generation: _Generation) -> Findings:
    """Count the first prompt as a measurement does: prefill with one token, and with four more tokens."""
    counts: dict[int, Counts] = {}
    for new in (1, 1 + COUNTED_TOKENS):
        generation.watch.begin(generation.program.phases)
        generation.query(0, new, marked=False)
        counts[new] = generation.watch.counts()
    prefill, whole = counts[1], counts[1 + COUNTED_TOKENS]
    decoded = min(BUSY_TOKENS, generation.program.new_tokens - 1)
    both, busy = f"prefill and {COUNTED_TOKENS} tokens", f"prefill and {decoded} tokens"
    totals: dict[str, tuple[int, str | None]] = {
        "operators": (whole.operators, both),
        "operators_decode": (whole.operators - prefill.operators, f"{COUNTED_TOKENS} tokens"),
        "flops": (whole.flops, both),
        "flops_prefill": (prefill.flops, None),
        "kernels_prefill": (prefill.kernels, None),
    }
    for name in ("kernels", "copies"):
        first, all_ = getattr(prefill, name), getattr(whole, name)
        totals[name] = (first + (all_ - first) * decoded // COUNTED_TOKENS, busy)
    return Findings(metrics={name: metric(name, total, on_gpu=True, per=per) for name, (total, per) in totals.items()})


def _host(place: Place, generation: _Generation) -> Findings:
    program, costs = generation.program, {}
    before = program.new_tokens
    for new in (1, 1 + COUNTED_TOKENS):
        generation.begin(0, new)
        with place.modules.pausing():
            costs[new] = host_cost(program.step)
    program.new_tokens, program.ended_after = before, None
    return query_cost(costs[1], costs[1 + COUNTED_TOKENS], COUNTED_TOKENS, on_gpu=True)


def _memory(place: Place, generation: _Generation) -> Findings:
    program = generation.program
    watched = _static_cache if program.workload.cache == "static" else _growing_cache
    place.modules.learn(program.model)
    place.modules.begin()
    peaks, timeline = watched(generation, program.longest)
    work = "the first and the last tokens after the longest prompt"
    return memory_of(place, peaks, timeline, program.phases, work)


def _growing_cache(generation: _Generation, longest: int) -> tuple[dict[str, int], Timeline]:
    """Observe the first tokens after the longest prompt, and the last ones."""
    program = generation.program
    first = min(_FIRST_TOKENS, program.new_tokens)
    stretches = {0: first}
    if program.workload.cache == "dynamic" and program.new_tokens > first:
        stretches[program.new_tokens - _LAST_TOKENS] = _LAST_TOKENS
    inputs, found, peaks = program.inputs[longest], [], dict.fromkeys(program.phases, 0)
    for before, tokens in stretches.items():
        program.inputs[longest] = _longer(inputs, before)
        watch = _watched(generation, longest, tokens, room=None)
        for phase, peak in watch.peaks.items():
            if phase == "decode" or before == 0:  # the case has no prefill of a lengthened prompt
                peaks[phase] = max(peaks[phase], peak)
        peak = watch.peaks["decode"] if before else max(watch.peaks.values())
        found.append((peak, _copy(watch.timeline, decoding=before > 0)))
    program.inputs[longest] = inputs
    return peaks, max(found, key=lambda each: each[0])[1]


def _static_cache(generation: _Generation, longest: int) -> tuple[dict[str, int], Timeline]:
    """Observe the first tokens, with a cache for all tokens."""
    asked = generation.program.new_tokens
    watch = _watched(generation, longest, min(_FIRST_TOKENS, asked), room=asked)
    return dict(watch.peaks), _copy(watch.timeline, decoding=False)


def _copy(timeline: Timeline, *, decoding: bool) -> Timeline:
    """Copy a timeline, because the next query changes it. With `decoding`, leave out memory that was released in the prefill, so that
    the peak is among the tokens after it.
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
        program.on_token = lambda _: watch.own_now("kv_cache", cache_tensors(cache.value))
        generation.query(index, tokens, marked=True, room=room)
    cache.value = None  # it would hold its keys and values through the next query
    program.on_token = None
    watch.end_phase()
    return watch


def _longer(inputs: dict[str, torch.Tensor], tokens: int) -> dict[str, torch.Tensor]:
    """Return the prompt with `tokens` tokens of its answer, so that the cache is as long as after them."""
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    more = torch.zeros((ids.shape[0], tokens), dtype=ids.dtype, device=ids.device)
    return {
        "input_ids": torch.cat([ids, more], dim=1),
        "attention_mask": torch.cat([mask, torch.ones_like(more)], dim=1),
    }
