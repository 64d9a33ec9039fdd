"""Measure a fine-tuning case: step time, memory by phase and category, operators, FLOPs, GPU-busy time, losses, audit."""

from __future__ import annotations

import contextlib
import math
import statistics
from collections.abc import Sequence

from hpc_core.audit.attention import Attending, attention_facts, watch_attention
from hpc_core.audit.forwards import LayerForwards, audited_step, checkpointing_state, count_layer_forwards
from hpc_core.audit.loss import loss_facts
from hpc_core.audit.model import context_note
from hpc_core.audit.parts import expert_modules, text_note
from hpc_core.audit.reference import MOST_ROWS, MOST_TOKENS, Given, compare_with_reference
from hpc_core.audit.training import Ran, trainable_facts, training_facts
from hpc_core.bounds.shares import bound_by, share_of_matmul, unexplained
from hpc_core.case.workloads import FinetuneSpec
from hpc_core.engines.finetune import FinetuneProgram
from hpc_core.instruments.attribution import Owning, profile_step
from hpc_core.instruments.clock import quiet, warm_up
from hpc_core.instruments.compilations import Compilations
from hpc_core.instruments.counters import counting
from hpc_core.instruments.energy import step_energy
from hpc_core.instruments.host import further_passes, step_cost
from hpc_core.instruments.host_time import host_times
from hpc_core.instruments.instrument import Instrument
from hpc_core.instruments.kernels import BUSY_STEPS, busy_steps
from hpc_core.instruments.memory import Growth, Watch, measure_memory, process_memory
from hpc_core.instruments.owners import by_module, gradient_tensors, optimizer_tensors, owned_bytes
from hpc_core.instruments.program import Fixed, Mark, weights_restored
from hpc_core.instruments.routing import routing
from hpc_core.instruments.trace import trace_step
from hpc_core.instruments.wall import WallTimer, wall_steps
from hpc_core.instruments.wall_split import split_step
from hpc_core.record.findings import Findings
from hpc_core.record.job import Measure, Trace
from hpc_core.record.metrics import metric
from hpc_core.record.record import Fact
from hpc_core.worker.feed import measure_feed
from hpc_core.worker.place import Place, build_model, model_facts


class Training:
    """A loaded fine-tuning case, and its instruments."""

    def __init__(self, place: Place):
        self.place = place
        self.device = place.device
        self.built, loaded = build_model(place)
        place.phases.enter("data")
        program = place.engine.load(place.case, place.device, self.built)
        assert isinstance(program, FinetuneProgram)
        assert isinstance(place.case.workload, FinetuneSpec)
        self.program, self.workload = program, place.case.workload
        self.widest = Fixed(program, program.widest)
        trainable = sum(parameter.numel() for parameter in self.built.model.parameters() if parameter.requires_grad)
        metrics = {"trainable_parameters": metric("trainable_parameters", trainable)}
        self.loaded = (
            loaded
            | Findings(metrics=metrics)
            | context_note(program.model, program.most_tokens)
            | text_note(program.model)
        )

    def warm_up(self) -> Findings:
        """Run until memory and time are stable; the losses of these steps are the first ones."""
        losses: list[float] = []
        first = self.program.first_steps
        found = warm_up(
            self.program,
            self.device,
            self.place.began,
            first_steps=first,
            after_step=lambda: losses.append(self._loss()),
        )
        return found | Findings(losses=tuple(losses))

    def full(self, kind: Measure) -> Sequence[Instrument]:
        """Return all instruments.

        The order is part of the method. Steps are timed before anything observes them. Exactly gated metrics come next, memory
        first, because later instruments leave memory behind. The audit observes a counted step without adding to its counts. The
        profiler follows, because it loads libraries. Then come explanations, and last what changes the model.
        """
        place, program, device = self.place, self.program, self.device
        audited = [Instrument("audit", "audit", self._audit, captured=False)] if kind.audit else []
        engine = [Instrument("engine", None, program.facts)] if kind.audit else []
        compared = [Instrument("reference", "equivalence", self._reference, changes_state=True)] if kind.audit else []
        explained = (
            [
                Instrument("host's time", "profile", self._sample),
                Instrument("profile", None, self._profile, captured=False),
            ]
            if kind.profile
            else []
        )
        joules = [Instrument("energy", "energy", self._energy)] if kind.profile and place.on_gpu else []
        return (
            Instrument("time", "measure", self._time),
            Instrument("host's work", "host", self._host),
            Instrument("memory", "memory", lambda found: self._memory(found, timeline=kind.timeline), captured=False),
            Instrument("operators", "counters", lambda _: self._count(watched=kind.audit), captured=False),
            *audited,
            Instrument("engine's counters", None, program.counters),
            *engine,
            Instrument("compilations", None, lambda _: Compilations().findings(device)),
            Instrument("busy time", "busy", self._busy),
            *self._feed(audit=kind.audit),
            *joules,
            Instrument("process memory", None, lambda _: process_memory(device)),
            *self._routing(),
            *explained,
            Instrument("learning", None, self._learning),
            *compared,
        )

    def retime(self) -> Sequence[Instrument]:
        """Return instruments for all times of host and device, and for launches. Of a soak, only ten steps are timed."""

        def soaked(_: Findings) -> Findings:
            self.program.go_to(0)
            return wall_steps(self.program, self.device, BUSY_STEPS)

        return (
            self._switches(),
            Instrument("time", "measure", soaked if self.workload.soaks else self._time),
            Instrument("compilations", None, lambda _: Compilations().findings(self.device)),
            Instrument("busy time", "busy", self._busy),
            *self._feed(audit=True),
            self._process_memory(),
        )

    def trace(self, kind: Trace) -> Sequence[Instrument]:
        """Return instruments that trace the step on the widest batch."""

        def traced(_: Findings) -> Findings:
            with self.program.batches.by_index():  # a loader would fetch all other batches before the same one again
                return trace_step(self.widest, self.device, kind, self.place.case.id)

        return (Instrument("trace", "profile", traced), self._process_memory())

    def _routing(self) -> list[Instrument]:
        """Return the instrument of a mixture of experts; its step trains, so the weights are restored."""
        experts = expert_modules(self.program.model)

        def counted(found: Findings) -> Findings:
            with weights_restored(self.program.model), self.program.batches.by_index():
                return routing(self.program.model, experts, self.widest.step, found)

        return [Instrument("routing", "counters", counted, captured=False)] if experts else []

    def _switches(self) -> Instrument:
        """Return the engine's facts for a further process: an engine that fell back must not be timed as if it had not."""
        return Instrument("engine", None, lambda _: self.program.facts())

    def _process_memory(self) -> Instrument:
        return Instrument("process memory", None, lambda _: process_memory(self.device))

    def _feed(self, *, audit: bool) -> list[Instrument]:
        if self.workload.feed.way == "resident":
            return []
        return [Instrument("feed", "feed", lambda _: measure_feed(self.place, self.built, self.program, audit=audit))]

    def _loss(self) -> float:
        assert self.program.loss is not None
        return float(self.program.loss)

    def _time(self, found: Findings) -> Findings:
        program, workload = self.program, self.workload
        program.go_to(0)  # every pass sees the same batches
        every, losses, timer = list[float](), [], WallTimer(self.device)
        growth = Growth(self.device, workload.steps) if workload.soaks else None
        with quiet():
            for done in range(1, workload.steps + 1):
                every.append(timer.time(program.step))
                losses.append(self._loss())
                if growth is not None:
                    growth.after_step(done)
            canary = timer.finish()
        tokens = program.tokens_of(workload.steps)
        batches = workload.epoch_rows // workload.batch if workload.epoch_rows else program.epoch.batches
        # The cost of ragged batches varies, so an epoch is extrapolated from the mean; otherwise from the median.
        typical = statistics.median(every) if program.period == 1 else statistics.fmean(every)
        note = f"extrapolated: {batches} steps like the {workload.steps} measured"
        metrics = {
            **timer.metrics("step_s"),
            **canary,
            "tokens": metric("tokens", tokens),
            "padded_tokens": metric("padded_tokens", program.padded_of(workload.steps)),
            "tokens_per_s": metric("tokens_per_s", tokens / sum(every), note="unpadded tokens"),
            "epoch_s": metric("epoch_s", typical * batches, note=note),
        }
        grown = Findings() if growth is None else growth.findings()
        return grown | Findings(metrics=metrics, losses=tuple(losses))

    def _memory(self, found: Findings, *, timeline: bool) -> Findings:
        program = self.program
        metrics = {"optimizer_bytes": metric("optimizer_bytes", owned_bytes(optimizer_tensors(program.optimizer)))}

        def marking(watch: Watch) -> Mark:
            def mark(phase: str) -> None:
                if phase == "optimizer":  # between backward and step, when every gradient exists
                    gradients = gradient_tensors(program.model)
                    watch.own_now("gradients", gradients)
                    metrics["gradient_bytes"] = metric("gradient_bytes", owned_bytes(gradients))
                watch(phase)

            return mark

        memory = measure_memory(
            self.widest,
            self.device,
            self.built.model,
            program.optimizer,
            bystanders=found.observed.get("bystanders"),
            marking=marking,
            timeline=timeline,
        )
        memory |= Findings(metrics=metrics)
        return memory | unexplained(self.place.case, found | memory)

    def _count(self, *, watched: bool) -> Findings:
        """Count a pass; the audit observes its step on the widest batch, which saves a separate step."""
        program, on_gpu = self.program, self.place.on_gpu
        steps = min(program.period, BUSY_STEPS)
        audited = None
        hooks = count_layer_forwards(program.model) if watched else contextlib.nullcontext(LayerForwards())
        attention = watch_attention(program.model) if watched else contextlib.nullcontext(Attending())
        with counting() as counts, hooks as forwards, attention as attending:
            for index in range(steps):
                program.steps_done = index
                if watched and index == program.widest:
                    audited = audited_step(program, lambda: self.place.phases.audit(self.device))
                else:
                    program.step()
        per = None if steps == 1 else f"{steps} steps"
        again, layers = program.recomputed_attentions, forwards.layers
        planned = None if again is None else checkpointing_state((layers + again) * steps, layers, steps)
        ran = Ran(counts.operators, checkpointing_state(forwards.count, layers, steps), planned)
        return Findings(
            metrics={
                "operators": metric("operators", counts.total, on_gpu=on_gpu, per=per),
                "flops": metric("flops", counts.flops, on_gpu=on_gpu, per=per),
            },
            observed={"ran": ran, "audited_step": audited, "attending": attending},
        )

    def _audit(self, found: Findings) -> Findings:
        """Return the facts; run one more step if the counted ones did not include the widest batch."""
        program, case, ran = self.program, self.place.case, found.observed["ran"]
        step = found.observed["audited_step"] or audited_step(program)
        facts = model_facts(self.place, program.model) | trainable_facts(case, program.model)
        facts |= training_facts(case, self.workload, program, ran, step)
        facts |= loss_facts(program.loss, step.loss)
        return facts | attention_facts(case, found.observed["attending"])

    def _host(self, found: Findings) -> Findings:
        """Count the host's work in a step on the widest batch; a batch that is not resident is made in the step."""
        with self.program.batches.by_index():
            cost = step_cost(self.widest.step, on_gpu=self.place.on_gpu)
            return cost | further_passes(self.widest.step, on_gpu=self.place.on_gpu)

    def _busy(self, found: Findings) -> Findings:
        self.program.go_to(0)
        busy = busy_steps(self.program, self.device)
        if "busy_s" not in busy.metrics:
            return busy
        step_s = found.metrics["step_s"].value
        share = busy.metrics["busy_s"].value / step_s
        shares = {"busy_share": metric("busy_share", share, note=bound_by(share))}
        return busy | Findings(metrics=shares) | share_of_matmul(self.place.case, step_s, self.place.ceilings)

    def _energy(self, found: Findings) -> Findings:
        """Run steps for two seconds, then restore the weights: later instruments must not depend on how many steps that was."""
        with weights_restored(self.program.model):
            return step_energy(
                self.program, self.device, step_s=found.metrics["step_s"], gpu_before=self.place.gpu_before
            )

    def _sample(self, found: Findings) -> Findings:
        """Sample and split the host's time; as many steps as fit, so the weights are restored."""
        with weights_restored(self.program.model), self.program.batches.by_index():
            sampled = host_times(self.widest, self.device)
            return sampled | split_step(self.widest, self.device, found.metrics["step_s"].value)

    def _profile(self, found: Findings) -> Findings:
        return profile_step(
            self.widest,
            self.device,
            "one step on the widest batch",
            model=self.built.model,
            optimizer=self.program.optimizer,
            marking=lambda watch: named_gradients(self.program, watch),
            bystanders=found.observed.get("bystanders"),
        )

    def _learning(self, found: Findings) -> Findings:
        """Return whether losses are finite, and the mean of the same batches in the warm-up and in the last timed pass."""
        losses, steps = found.losses, self.workload.steps
        finite = all(map(math.isfinite, losses))
        facts = {"losses_finite": Fact(asked=True, seen=finite)}
        if not finite:
            return Findings(facts=facts)
        distinct = len(self.program.batches)
        warm = len(losses) - steps
        same = min(distinct, warm)
        begin = warm + (steps // distinct - 1) * distinct  # of the last whole pass
        note = f"mean over the same {same} batches"
        means = {
            "loss_first": statistics.fmean(losses[:same]),
            "loss_last": statistics.fmean(losses[begin : begin + same]),
        }
        return Findings(
            metrics={name: metric(name, mean, note=note) for name, mean in means.items()},
            facts=facts,
        )

    def _reference(self, found: Findings) -> Findings:
        if not found.sound:
            return Findings()  # the record is INVALID already, and the model may not run as a reference at all
        given = self._longest_rows()
        return compare_with_reference(self.place.case, self.built.model, given, restore=self.place.engine.restore)

    def _longest_rows(self) -> Given:
        """Return the longest rows of the widest batch; free optimizer state, gradients and all other batches to make room."""
        batch = self.program.batches[self.program.widest]
        self.program.release()
        rows = list(range(len(batch.ids)))
        if batch.mask is not None:
            rows = batch.mask.sum(dim=1).argsort(descending=True, stable=True).tolist()
        ids, labels, mask = (
            None if part is None else part[rows[:MOST_ROWS], :MOST_TOKENS]
            for part in (batch.ids, batch.labels, batch.mask)
        )
        assert ids is not None
        return Given(ids, mask, labels=labels)


def named_gradients(program: FinetuneProgram, watch: Owning) -> Mark:
    """Return the recorder as a mark that also assigns gradients to their modules, before the optimizer's step."""

    def mark(phase: str) -> None:
        if phase == "optimizer":
            watch.own("gradients", gradient_tensors(program.model))
            for module, tensors in by_module(program.model, program.optimizer):
                watch.name(module, tensors)
        watch(phase)

    return mark
