"""Measure a generation case: seconds per query, time to first token, decode latency, memory, operators, GPU-busy time."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import torch

from hpc_core.audit.attention import Attending, attention_facts, watch_attention
from hpc_core.audit.forwards import Forwards, watch_forwards
from hpc_core.audit.generation import generation_facts
from hpc_core.audit.model import context_note
from hpc_core.audit.parts import expert_modules, text_note
from hpc_core.audit.reference import MOST_ROWS, MOST_TOKENS, Given, compare_with_reference
from hpc_core.bounds.shares import bound_by, share_of_copy, unexplained
from hpc_core.case.workloads import GenerateSpec
from hpc_core.engines.generate import BUSY_TOKENS, COUNTED_TOKENS, GenerateProgram
from hpc_core.instruments.attribution import Owning, profile_step
from hpc_core.instruments.clock import quiet, warm_up
from hpc_core.instruments.compilations import Compilations
from hpc_core.instruments.counters import counting
from hpc_core.instruments.energy import token_energy
from hpc_core.instruments.host import further_passes, host_cost, query_cost
from hpc_core.instruments.host_time import host_times
from hpc_core.instruments.instrument import Instrument
from hpc_core.instruments.kernels import busy_of, launches
from hpc_core.instruments.memory import PhasePeaks, Watch, measure_memory, process_memory
from hpc_core.instruments.owners import cache_tensors, owned_bytes, watch_cache
from hpc_core.instruments.program import Fixed, Mark, unmarked
from hpc_core.instruments.routing import routing
from hpc_core.instruments.trace import trace_step
from hpc_core.instruments.wall import WallTimer
from hpc_core.instruments.wall_split import Window, split
from hpc_core.record.findings import Findings
from hpc_core.record.job import Measure, Trace
from hpc_core.record.metrics import metric
from hpc_core.record.record import Fact
from hpc_core.worker.place import Place, build_model, model_facts
from hpc_core.worker.quality import perplexity, perplexity_unquantized

_PROFILED_TOKENS = 4
"""Decoded tokens that are attributed to modules."""
_SPLIT_TOKENS = 8
"""Decoded tokens whose wall time is split."""
_WARM_TOKENS = 8
"""A short query warms up every kernel; the longest prompt warms up the allocator."""
_LEAST_ANSWERED = 8
"""Minimum number of answer tokens that are compared with the reference, however long the prompt is."""


class Generation:
    """A loaded generation case, and its instruments."""

    def __init__(self, place: Place):
        self.place = place
        self.device = place.device
        self.built, self.loaded = build_model(place)
        place.phases.enter("data")
        program = place.engine.load(place.case, place.device, self.built)
        assert isinstance(program, GenerateProgram)
        assert isinstance(place.case.workload, GenerateSpec)
        self.program, self.workload = program, place.case.workload
        self.loaded |= context_note(program.model, program.most_tokens) | text_note(program.model)
        self.longest = Fixed(program, program.longest)

    def warm_up(self) -> Findings:
        """Warm up with short queries of the longest prompt; with whole ones if a longer cache would compile again."""
        program = self.program
        with self._new_tokens(program.new_tokens if program.compiled else min(_WARM_TOKENS, program.new_tokens)):
            found = warm_up(self.longest, self.device, self.place.began)
        self.program.steps_done = 0
        return found

    def full(self, kind: Measure) -> Sequence[Instrument]:
        """Return all instruments.

        The order is part of the method. Queries are timed before anything observes them. Exactly gated metrics come next, memory
        first, because later instruments leave memory behind. The audit follows the counts, to stay out of them, and the profiler
        follows both, because it loads libraries. Then come explanations, and last what changes the model.
        """
        place, program, device = self.place, self.program, self.device
        widths = [len(prompt.ids[0]) for prompt in program.prompts]
        text = self.built.tokenizer is not None
        audited = [Instrument("audit", "audit", self._audit)] if kind.audit else []
        compared = [Instrument("reference", "equivalence", self._reference, changes_state=True)] if kind.audit else []
        explained = (
            [
                Instrument("host's time", "profile", self._sample),
                Instrument("split of time", None, self._split),
                Instrument("profile", None, self._profile),
            ]
            if kind.profile
            else []
        )
        joules = [Instrument("energy", "energy", self._energy)] if kind.profile and place.on_gpu else []
        quality = [Instrument("perplexity", "quality", lambda _: perplexity(place.case, self.built))] if text else []
        # Only at scale small, where a second model takes seconds; last, because its memory is not the case's.
        second = text and place.case.quantization is not None and place.case.scale == "small"
        unquantized = Instrument(
            "perplexity, unquantized", "quality", lambda _: perplexity_unquantized(place.case, self.built)
        )
        return (
            Instrument("engine's counters", None, program.counters),
            Instrument("time", "measure", self._time),
            Instrument("host's work", "host", self._host),
            Instrument("memory", "memory", lambda found: self._memory(found, timeline=kind.timeline), captured=False),
            Instrument("operators", "counters", lambda _: self._count(watched=kind.audit)),
            *audited,
            Instrument("compilations", None, lambda _: Compilations().findings(device)),
            Instrument("busy time", "busy", self._busy),
            Instrument("busy shares", None, _busy_shares),
            Instrument(
                "share of copy rate",
                None,
                lambda found: share_of_copy(place.case, found, place.ceilings, widths, program.new_tokens),
            ),
            *joules,
            Instrument("process memory", None, lambda _: process_memory(device)),
            *self._routing(),
            *explained,
            *quality,
            *compared,
            *([unquantized] if second else []),
        )

    def retime(self) -> Sequence[Instrument]:
        """Return instruments for all times of host and device, and for launches."""
        time_, busy = Instrument("time", "measure", self._time), Instrument("busy time", "busy", self._busy)
        return (*self._first(), time_, busy, self._process_memory())

    def trace(self, kind: Trace) -> Sequence[Instrument]:
        """Return instruments that trace the longest prompt."""
        program, device, case_id = self.longest, self.device, self.place.case.id
        run = Instrument("trace", "profile", lambda _: trace_step(program, device, kind, case_id))
        return (Instrument("engine's counters", None, self.program.counters), run, self._process_memory())

    def _first(self) -> tuple[Instrument, ...]:
        """Return the engine's facts for a further process: an engine that fell back must not be timed as if it had not."""
        return (
            Instrument("engine's counters", None, self.program.counters),
            Instrument("engine", None, lambda _: self.program.facts()),
        )

    def _routing(self) -> list[Instrument]:
        """Return the instrument of a mixture of experts: the prefill of the longest prompt."""
        experts = expert_modules(self.program.model)

        def counted(found: Findings) -> Findings:
            with self._new_tokens(1):
                return routing(self.program.model, experts, self.longest.step, found)

        return [Instrument("routing", "counters", counted)] if experts else []

    def _process_memory(self) -> Instrument:
        return Instrument("process memory", None, lambda _: process_memory(self.device))

    @contextlib.contextmanager
    def _new_tokens(self, count: int) -> Iterator[None]:
        """Let a query make `count` new tokens in the block."""
        program = self.program
        before, program.new_tokens = program.new_tokens, count
        try:
            yield
        finally:
            program.new_tokens = before

    def _time(self, found: Findings) -> Findings:
        """Time every prompt once, and keep its answer's ids and, on a GPU, the peak bytes by phase.

        The time includes the streamer's copy of each token to the host, because `generate` waits for the token anyway. Reading
        the allocator's counters between prefill and decode does not synchronize.
        """
        program, device, timer = self.program, self.device, WallTimer(self.device)
        queries, answers = list[float](), list[list[list[int]]]()
        program.on_token = lambda _: timer.lap()
        program.steps_done = 0
        peaks = PhasePeaks(device) if self.place.on_gpu else None
        mark: Mark = unmarked if peaks is None else peaks
        if peaks is not None:
            peaks.close()

        with quiet():
            for _ in range(program.period):
                queries.append(timer.time(lambda: program.step(mark)))
                if peaks is not None:
                    peaks.close()
                answers.append(program.answer_ids())
            canary = timer.finish()
        program.on_token = None
        made = sum(len(row) for rows in answers for row in rows)
        facts = {}
        if self.workload.eos_every is None:
            facts["new_tokens"] = Fact(asked=program.new_tokens, seen=len(program.answer_ids()[0]))
        # A captured graph's memory counts in every phase: nothing else may use it.
        phases = None if peaks is None else {name: peak + program.hidden_bytes for name, peak in peaks.peaks.items()}
        return (
            self._times(queries, made, timer)
            | Findings(metrics=canary)
            | Findings(
                facts=facts,
                answers=tuple(text for ids in answers for text in self._texts(ids)),
                observed={"answer_ids": answers, "phase_peaks": phases},
            )
        )

    def _times(self, queries: list[float], made: int, timer: WallTimer) -> Findings:
        """Return the times of queries; the laps of a query are its first token, further tokens, and what follows the last."""
        prompts, further = self.program.prompts, self.workload.extrapolate_to
        note = "new tokens, prefill included"
        first = timer.metrics("time_to_first_token_s", slice(1))
        tokens = timer.metrics("decode_token_s", slice(1, -1), whole=False)
        metrics = {
            **timer.metrics("query_s"),
            **first,
            **tokens,
            "tokens": metric("tokens", made),
            "prompt_tokens": metric("prompt_tokens", sum(prompt.tokens for prompt in prompts)),
            "padded_tokens": metric("padded_tokens", sum(prompt.padded for prompt in prompts)),
            "tokens_per_s": metric("tokens_per_s", made / sum(queries), note=note),
        }
        if further is not None:
            seconds = float(first["time_to_first_token_s"].value) + float(tokens["decode_token_s"].value) * (
                further - 1
            )
            grown = f"extrapolated from {self.program.new_tokens} to {further} new tokens; the cache grows, so this is a lower bound"
            metrics["query_extrapolated_s"] = metric("query_extrapolated_s", seconds, note=grown)
        return Findings(metrics=metrics)

    def _texts(self, ids: list[list[int]]) -> list[str]:
        if self.built.tokenizer is None:
            return [" ".join(map(str, row)) for row in ids]
        return [str(self.built.tokenizer.decode(row, skip_special_tokens=True)) for row in ids]

    def _memory(self, found: Findings, *, timeline: bool) -> Findings:
        """Measure memory by category; on a GPU with a short query, because recording takes as long as the query."""
        program = self.program
        count = min(BUSY_TOKENS + 1, program.new_tokens) if self.place.on_gpu else program.new_tokens
        with watch_cache(program.model) as cache, self._new_tokens(count):

            def marking(watch: Watch) -> Mark:
                if program.cache is None:
                    program.on_token = lambda _: watch.own_now("kv_cache", cache_tensors(cache.value))
                return watch

            memory = measure_memory(
                self.longest,
                self.device,
                self.built.model,
                bystanders=found.observed.get("bystanders"),
                marking=marking,
                peaks=found.observed["phase_peaks"],
                owned=program.owned,
                timeline=timeline,
            )
            # The last token is never fed back. A static cache is as long as the longest query so far.
            made = self.workload.new_tokens if self.workload.cache == "static" else count
            cached = len(program.prompts[program.longest].ids[0]) + made - 1
            if program.cache is not None:
                cache.value, cached = program.cache, program.cache.capacity
            program.on_token = None
            if cache.value is None:
                return memory | unexplained(self.place.case, found | memory)
            held = owned_bytes(cache_tensors(cache.value))
            note = f"after {cached} tokens a row"
            memory |= Findings(metrics={"kv_cache_bytes": metric("kv_cache_bytes", held, note=note)})
            return memory | unexplained(self.place.case, found | memory, cached_tokens=cached)

    def _count(self, *, watched: bool) -> Findings:
        """Count operators and FLOPs of prefill and of a few tokens after it; hooks that run no operators observe the longer query."""
        program, on_gpu, kind = self.program, self.place.on_gpu, self.device.type
        counts = {}
        for new in (1, 1 + COUNTED_TOKENS):
            program.steps_done = 0
            hooks = watch_forwards(program.model, kind) if watched else contextlib.nullcontext(Forwards())
            attention = watch_attention(program.model) if watched else contextlib.nullcontext(Attending())
            with self._new_tokens(new), hooks as forwards, counting() as counts[new], attention as attending:
                program.step()
        prefill, whole = counts[1], counts[1 + COUNTED_TOKENS]
        observed = {
            "operators": whole.operators,
            "attending": attending,
            "forwards": forwards,
            "new_tokens": 1 + COUNTED_TOKENS,
        }
        flops_prefill = metric("flops_prefill", prefill.flops, on_gpu=on_gpu)
        if program.captured is not None or program.compiled:
            operators = metric("operators", prefill.total, on_gpu=True, per="prefill")
            note = (
                "engine: a captured or compiled token dispatches no operator, so operators and FLOPs are of the prefill"
            )
            metrics = {"flops_prefill": flops_prefill, "operators": operators}
            return Findings(metrics=metrics, notes=(note,), observed=observed)
        both, decode = f"prefill and {COUNTED_TOKENS} tokens", f"{COUNTED_TOKENS} tokens"
        decoded = whole.total - prefill.total
        metrics = {
            "flops_prefill": flops_prefill,
            "operators": metric("operators", whole.total, on_gpu=on_gpu, per=both),
            "operators_decode": metric("operators_decode", decoded, on_gpu=on_gpu, per=decode),
            "flops": metric("flops", whole.flops, on_gpu=on_gpu, per=both),
        }
        return Findings(metrics=metrics, observed=observed)

    def _host(self, found: Findings) -> Findings:
        """Count the host's work for prefill and some tokens; the difference to a query of one token is that of the tokens."""
        program, on_gpu, costs = self.program, self.place.on_gpu, {}
        answer = program.output
        for new in (1, 1 + COUNTED_TOKENS):
            program.steps_done = 0
            with self._new_tokens(new):
                costs[new] = host_cost(program.step)
        with self._new_tokens(1 + COUNTED_TOKENS):
            kept = further_passes(Fixed(program, 0).step, on_gpu=on_gpu)
        program.output = answer  # the next query's memory includes the answer before it
        return query_cost(costs[1], costs[1 + COUNTED_TOKENS], COUNTED_TOKENS, on_gpu=on_gpu) | kept

    def _audit(self, found: Findings) -> Findings:
        program, case = self.program, self.place.case
        facts = model_facts(self.place, program.model) | program.facts(found)
        facts |= Findings(observed={"forwards": None})  # they would keep the query's cache alive
        if self.place.engine.own_code:
            return facts  # hooks on the model do not see the engine's own code
        forwards = found.observed["forwards"]
        facts |= generation_facts(self.workload, program, forwards, new_tokens=found.observed["new_tokens"])
        return facts | attention_facts(case, found.observed["attending"])

    def _busy(self, found: Findings) -> Findings:
        """Measure the busy time of a prefill, and of a prefill with some tokens; the difference is that of the tokens."""
        if not self.place.on_gpu:
            return Findings()
        program = self.program
        decoded = min(BUSY_TOKENS, program.new_tokens - 1)
        activities, busy = [], Findings()

        def work() -> None:
            program.steps_done = 0
            program.step()

        for new in (1, 1 + decoded):
            with self._new_tokens(new):
                with quiet():
                    work()  # the first query of another length may still select kernels
                activity, findings = busy_of(work, self.device)
            activities.append(activity)
            busy |= findings
        prefill, whole = activities
        if prefill is None or whole is None:
            return busy
        token_s = (whole.busy_s - prefill.busy_s) / decoded
        metrics = {
            "busy_prefill_s": metric("busy_prefill_s", prefill.busy_s, on_gpu=True),
            "busy_decode_token_s": metric("busy_decode_token_s", token_s, on_gpu=True),
            "kernels_prefill": metric("kernels_prefill", prefill.kernels, on_gpu=True),
        }
        return busy | launches(whole, per=f"prefill and {decoded} tokens") | Findings(metrics=metrics)

    def _energy(self, found: Findings) -> Findings:
        timed = found.metrics["query_s"]
        return token_energy(self.program, self.device, query_s=timed, gpu_before=self.place.gpu_before)

    def _sample(self, found: Findings) -> Findings:
        """Sample the host's time in the short query that is profiled too."""
        with self._new_tokens(min(1 + _PROFILED_TOKENS, self.program.new_tokens)):
            return host_times(self.longest, self.device)

    def _split(self, found: Findings) -> Findings:
        """Split the time of a decoded token; the window begins with the first token on the host and ends with the last."""
        program, count = self.program, min(1 + _SPLIT_TOKENS, self.program.new_tokens)
        if count < 2:
            return Findings()

        def work(window: Window) -> None:
            edges = {1: window.begin, count: window.end}
            program.on_token = lambda token: edges.get(token, lambda: None)()
            self.longest.step()

        with self._new_tokens(count):
            split_ = split(work, self.device, found.metrics["decode_token_s"].value)
        program.on_token = None
        return split_

    def _profile(self, found: Findings) -> Findings:
        """Profile a short query of the longest prompt, and assign the cache to its category at each token."""
        program = self.program
        count = min(1 + _PROFILED_TOKENS, program.new_tokens)
        with watch_cache(program.model) as cache, self._new_tokens(count):

            def marking(watch: Owning) -> Mark:
                program.on_token = lambda _: watch.own("kv_cache", cache_tensors(cache.value))
                return watch

            profile = profile_step(
                self.longest,
                self.device,
                f"the longest prompt and {count} tokens",
                model=program.model,
                marking=marking,
                bystanders=found.observed.get("bystanders"),
            )
        program.on_token = None
        return profile

    def _reference(self, found: Findings) -> Findings:
        if not found.sound:
            return Findings()  # the record is INVALID already, and the model may not run as a reference at all
        program, model = self.program, self.built.model
        given = self._answered(found.observed["answer_ids"][program.longest])
        assert given.answers is not None
        rows, count = given.answers.shape
        fed = given.answers.new_zeros(self.workload.batch, count)
        fed[:rows] = given.answers  # other rows do not matter: rows are independent
        # Before the model becomes the reference, because an engine reads the model's weights.
        engine = program.logits_after(program.longest, fed, rows)
        return compare_with_reference(self.place.case, model, given, restore=self.place.engine.restore, engine=engine)

    def _answered(self, answers: list[list[int]]) -> Given:
        """Return the longest prompt with the answer of its timed query, so that both paths compute the logits of each choice."""
        prompt = self.program.inputs[self.program.longest]
        ids, mask = prompt["input_ids"][:MOST_ROWS], prompt["attention_mask"][:MOST_ROWS]
        answers = [
            row[: min(map(len, answers[:MOST_ROWS]))] for row in answers[:MOST_ROWS]
        ]  # rows may differ in length
        chosen = torch.tensor(answers, dtype=ids.dtype, device=ids.device)
        # The last token was never fed back. The prompt is never cut: the answers depend on all of it.
        chosen = chosen[:, : max(_LEAST_ANSWERED, MOST_TOKENS - ids.shape[1] + 1)]
        fed = chosen[:, :-1]
        return Given(torch.cat([ids, fed], dim=1), torch.cat([mask, torch.ones_like(fed)], dim=1), answers=chosen)


def _busy_shares(found: Findings) -> Findings:
    if "busy_decode_token_s" not in found.metrics:
        return Findings()
    pairs = (("busy_prefill_s", "time_to_first_token_s"), ("busy_decode_token_s", "decode_token_s"))
    first, share = (found.metrics[busy].value / found.metrics[wall].value for busy, wall in pairs)
    of_first, of_token = f"of the time to the first token; {bound_by(first)}", f"of a decoded token; {bound_by(share)}"
    return Findings(
        metrics={
            "busy_share_prefill": metric("busy_share_prefill", first, note=of_first),
            "busy_share": metric("busy_share", share, note=of_token),
        }
    )
