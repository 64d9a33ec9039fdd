"""Measure a generation case: seconds a query, time to first token, decode latency, memory, operators, GPU-busy time."""

from __future__ import annotations

import contextlib
import itertools
import statistics
import time

import torch

from hpc_core.audit import attention_facts, generation_facts, trainable_facts, watch_forwards
from hpc_core.audit.forwards import ForwardsSeen
from hpc_core.builders import Built
from hpc_core.case.case import GenerateSpec
from hpc_core.engines.generate import GenerateProgram
from hpc_core.instruments.clock import quiet, seconds_of, synchronize
from hpc_core.instruments.counters import Counts, counting
from hpc_core.instruments.owners import cache_tensors, owned_bytes
from hpc_core.instruments.phases import PhasePeaks
from hpc_core.instruments.program import Mark, unmarked
from hpc_core.record.job import Repeat, Retime, Trace
from hpc_core.record.record import Fact, Record
from hpc_core.worker.attributed import note_query_profile
from hpc_core.worker.decode_engine import (
    engine_facts,
    engine_itself,
    engine_logits,
    is_captured,
    operator_by_operator,
    program_of,
)
from hpc_core.worker.energy import note_token_energy
from hpc_core.worker.equivalence import (
    MOST_ROWS,
    MOST_TOKENS,
    Given,
    measure_equivalence,
)
from hpc_core.worker.finetune import bound_by
from hpc_core.worker.memory import (
    Fixed,
    Watch,
    measure_memory,
    note_unexplained,
)
from hpc_core.worker.metrics import (
    busy,
    counted,
    ratio,
    reported,
    tensor_bytes,
    wall,
)
from hpc_core.worker.observe import watch_cache
from hpc_core.worker.profiled import note_compilations, note_counts
from hpc_core.worker.quality import measure_perplexity, measure_perplexity_unquantized
from hpc_core.worker.session import Session
from hpc_core.worker.share_of_copy import share_of_copy
from hpc_core.worker.trace import trace_program

__all__ = ["BUSY_TOKENS", "COUNTED_TOKENS", "measure_generate"]

BUSY_TOKENS = 16
"""Decoded tokens under the profiler; it keeps every launch of every token."""
COUNTED_TOKENS = 4
_LEAST_ANSWERED = 8
"""Tokens of an answer that are compared with the reference's, however long the prompt is."""


def measure_generate(session: Session, workload: GenerateSpec) -> Record:
    """Build, warm up, time, and take each instrument in turn, the profiler last."""
    built = session.build()
    session.phase("data")
    program = program_of(session, built, workload)
    _warm_up(session, program)
    if isinstance(session.kind, Trace):
        return trace_program(session, Fixed(program, _longest(program)), session.kind)
    if isinstance(session.kind, Repeat | Retime):
        session.audit |= engine_itself(session, program)  # one that fell back here would be timed as if it had not
    if isinstance(session.kind, Repeat):
        return _again(session, program)
    answered: list[list[list[int]]] = []
    peaks = _time_queries(session, program, built, answered)
    if isinstance(session.kind, Retime):
        _busy(session, program)
        return session.record()
    _memory(session, program, built, peaks)
    _audit(session, program, *_count(session, program))
    note_compilations(session)
    _busy(session, program)
    _busy_shares(session)
    share_of_copy(session, program)
    note_token_energy(session, program)
    note_query_profile(session, program, _longest(program))
    measure_perplexity(session, built)
    given = _answered(program, answered[_longest(program)])
    measure_equivalence(session, built.model, given, engine=engine_logits(session, program, _longest(program), given))
    measure_perplexity_unquantized(session, built)
    return session.record()


def _again(session: Session, program: GenerateProgram) -> Record:
    """What a further process measures: busy time and launches, or on a CPU every prompt once by the clock."""
    if session.on_gpu:
        _busy(session, program)
    else:
        with session.timing():
            session.metrics["query_s"] = wall([seconds_of(program.step, session.device) for _ in range(program.period)])
    return session.record()


def _answered(program: GenerateProgram, answers: list[list[int]]) -> Given:
    """The longest prompt with what a timed query answered, so that both paths stand where each token was chosen."""
    prompt = program.inputs[_longest(program)]
    ids, mask = prompt["input_ids"][:MOST_ROWS], prompt["attention_mask"][:MOST_ROWS]
    answers = [row[: min(map(len, answers[:MOST_ROWS]))] for row in answers[:MOST_ROWS]]  # rows end where they end
    chosen = torch.tensor(answers, dtype=ids.dtype, device=ids.device)
    # The last token was handed out and never fed back. A prompt is never cut: its tokens are what the answers hang on.
    chosen = chosen[:, : max(_LEAST_ANSWERED, MOST_TOKENS - ids.shape[1] + 1)]
    fed = chosen[:, :-1]
    return Given(torch.cat([ids, fed], dim=1), torch.cat([mask, torch.ones_like(fed)], dim=1), answers=chosen)


def _warm_up(session: Session, program: GenerateProgram) -> None:
    # A short query warms every kernel; the longest prompt settles the allocator.
    longest = _longest(program)
    tokens, program.new_tokens = program.new_tokens, min(8, program.new_tokens)
    session.warm_up(Fixed(program, longest))
    program.new_tokens = tokens
    program.steps_done = 0


def _longest(program: GenerateProgram) -> int:
    return max(range(program.period), key=lambda index: len(program.prompts[index].ids[0]))


def _time_queries(
    session: Session, program: GenerateProgram, built: Built, answered: list[list[list[int]]]
) -> dict[str, int] | None:
    """Every prompt once, its answer's ids into `answered`, and the peak bytes by phase on a GPU.

    The streamer's copy of each token to the host is part of it: `generate` waits for the token anyway. Reading the
    allocator's counters between prefill and decode waits for nothing.
    """
    queries, first, decode = [], [], []
    times: list[float] = []
    program.on_token = lambda _: times.append(time.perf_counter())
    program.steps_done = 0
    peaks = PhasePeaks(session.device) if session.on_gpu else None
    mark: Mark = unmarked if peaks is None else peaks
    if peaks is not None:
        peaks.close()
    with session.timing():
        for _ in range(program.period):
            times.clear()
            synchronize(session.device)
            start = time.perf_counter()
            queries.append(seconds_of(lambda: program.step(mark), session.device))
            if peaks is not None:
                peaks.close()
            first.append(times[0] - start)
            decode += [later - earlier for earlier, later in itertools.pairwise(times)]
            answered.append(program.answer_ids())
            session.answers += _texts(answered[-1], built)
    program.on_token = None
    _note_times(session, program, queries, first, decode, made=sum(len(row) for rows in answered for row in rows))
    if program.workload.eos_every is None:
        session.audit["new_tokens"] = Fact(asked=program.new_tokens, seen=len(program.answer_ids()[0]))
    # A captured graph's memory is in use in every phase: nothing else may have it.
    return None if peaks is None else {name: peak + program.hidden_bytes for name, peak in peaks.peaks.items()}


def _note_times(
    session: Session,
    program: GenerateProgram,
    queries: list[float],
    first: list[float],
    decode: list[float],
    *,
    made: int,
) -> None:
    tokens = program.new_tokens
    session.metrics["query_s"] = wall(queries)
    session.metrics["time_to_first_token_s"] = wall(first)
    session.metrics["decode_token_s"] = wall(decode)
    session.metrics["tokens"] = counted(made, better="same", case_only=True)
    session.metrics["prompt_tokens"] = counted(
        sum(prompt.tokens for prompt in program.prompts), better="same", case_only=True
    )
    session.metrics["padded_tokens"] = counted(
        sum(prompt.padded for prompt in program.prompts), better="same", case_only=True
    )
    session.metrics["tokens_per_s"] = reported(
        made / sum(queries), "tokens/s", better="higher", note="new tokens, prefill included"
    )
    further = program.workload.extrapolate_to
    if further is not None:
        seconds = statistics.median(first) + statistics.median(decode) * (further - 1)
        note = f"extrapolated from {tokens} to {further} new tokens; the cache grows, so this is a lower bound"
        session.metrics["query_extrapolated_s"] = reported(seconds, "s", note=note)


def _texts(ids: list[list[int]], built: Built) -> list[str]:
    if built.tokenizer is None:
        return [" ".join(map(str, row)) for row in ids]
    return [str(built.tokenizer.decode(row, skip_special_tokens=True)) for row in ids]


def _memory(session: Session, program: GenerateProgram, built: Built, peaks: dict[str, int] | None) -> None:
    """Categories from a query that is recorded; on a GPU a short one, since the history of a long one takes as long as the query."""
    tokens = program.new_tokens
    if session.on_gpu:
        program.new_tokens = min(BUSY_TOKENS + 1, tokens)
    with watch_cache(program.model) as cache:

        def marking(watch: Watch) -> Mark:
            if program.cache is None:
                program.on_token = lambda _: watch.own_now("kv_cache", cache_tensors(cache.seen))
            return watch

        longest = _longest(program)
        fixed = Fixed(program, longest)
        with operator_by_operator(program):
            measure_memory(session, fixed, built.model, None, marking=marking, peaks=peaks, owned=program.owned)
        cached = len(program.prompts[longest].ids[0]) + program.new_tokens - 1  # the last token is never fed back
        if program.cache is not None:
            cache.seen, cached = program.cache, program.cache.capacity
        if cache.seen is None:
            note_unexplained(session)
        else:
            note = f"after {cached} tokens a row"
            session.metrics["kv_cache_bytes"] = tensor_bytes(owned_bytes(cache_tensors(cache.seen)), note=note)
            note_unexplained(session, cached_tokens=cached)
    program.on_token, program.new_tokens = None, tokens


def _count(session: Session, program: GenerateProgram) -> tuple[Counts, ForwardsSeen]:
    """Operators and FLOPs of prefill and of a few tokens after it; the longer query is watched, by hooks without operators."""
    session.phase("counters")
    seen = {}
    tokens = program.new_tokens
    for new in (1, 1 + COUNTED_TOKENS):
        program.new_tokens, program.steps_done = new, 0
        kind = session.device.type
        watched = (
            watch_forwards(program.model, kind) if session.options.audit else contextlib.nullcontext(ForwardsSeen())
        )
        with watched as forwards, counting() as counts:
            program.step()
        seen[new] = counts
    program.new_tokens = tokens
    prefill, whole = seen[1], seen[1 + COUNTED_TOKENS]
    session.metrics["flops_prefill"] = counted(prefill.flops, machine=session.on_gpu, unit="FLOP")
    if is_captured(program):
        session.metrics["operators"] = counted(prefill.total, machine=True, unit="1 per prefill")
        session.notes.append(
            "engine: a replayed token dispatches no operator, so operators and FLOPs are of the prefill"
        )
        return whole, forwards
    decode = f"1 per {COUNTED_TOKENS} tokens"
    session.metrics["operators"] = counted(
        whole.total, machine=session.on_gpu, unit=f"1 per prefill and {COUNTED_TOKENS} tokens"
    )
    session.metrics["operators_decode"] = counted(whole.total - prefill.total, machine=session.on_gpu, unit=decode)
    session.metrics["flops"] = counted(
        whole.flops, machine=session.on_gpu, unit=f"FLOP per prefill and {COUNTED_TOKENS} tokens"
    )
    return whole, forwards


def _audit(session: Session, program: GenerateProgram, counts: Counts, forwards: ForwardsSeen) -> None:
    if not session.options.audit:
        return
    session.phase("audit")
    case, notes, new_tokens = session.case, session.notes, 1 + COUNTED_TOKENS
    session.audit_model(program.model)
    session.audit |= trainable_facts(case, program.model, notes)
    if program.workload.engine == "graph":
        session.audit |= engine_facts(session, program, counts.operators, new_tokens=new_tokens)
        return
    session.audit |= generation_facts(program.workload, program, forwards, notes, new_tokens=new_tokens)
    session.audit |= attention_facts(case, counts.operators, session.device, notes)


def _busy(session: Session, program: GenerateProgram) -> None:
    session.phase("busy")
    if not session.on_gpu:
        return
    tokens = program.new_tokens
    decoded = min(BUSY_TOKENS, tokens - 1)
    activities = []
    for new in (1, 1 + decoded):
        program.new_tokens = new

        def work() -> None:
            program.steps_done = 0
            program.step()

        with quiet():
            work()  # the first query of another length may still pick kernels
        activities.append(session.busy(work))
    program.new_tokens = tokens
    prefill, whole = activities
    if prefill is None or whole is None:
        return
    session.metrics["busy_prefill_s"] = busy(prefill.busy_s)
    session.metrics["busy_decode_token_s"] = busy((whole.busy_s - prefill.busy_s) / decoded)
    note_counts(session, whole, unit=f"1 per prefill and {decoded} tokens")
    session.metrics["kernels_prefill"] = counted(prefill.kernels, machine=True)


def _busy_shares(session: Session) -> None:
    if "busy_decode_token_s" not in session.metrics:
        return
    pairs = (("busy_prefill_s", "time_to_first_token_s"), ("busy_decode_token_s", "decode_token_s"))
    first, share = (session.metrics[of_busy].value / session.metrics[of_wall].value for of_busy, of_wall in pairs)
    session.metrics["busy_share_prefill"] = ratio(first, note=f"of the time to the first token; {bound_by(first)}")
    session.metrics["busy_share"] = ratio(share, note=f"of a decoded token; {bound_by(share)}")
