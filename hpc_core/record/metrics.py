"""The registry of metrics: what each one means, and everything about it that does not differ from record to record.

To add a metric, add one definition here and one `metric(name, value)` where it is measured. The gate, A/B, explanations and
the documents read the definition. A metric that is not defined here, such as one of an integration's own, is made with
`Metric(...)` and judged by its unit and noise class.
"""

from __future__ import annotations

import difflib
import functools
import re
import statistics
from collections.abc import Mapping, Sequence
from typing import Literal

import msgspec

from hpc_core.case.errors import SpecError
from hpc_core.case.limits import Limits
from hpc_core.record.record import Better, Dependence, Metric, Noise

Resource = Literal["memory", "work", "device", "host", "time"]
Family = Literal["train", "prefill", "decode"]

BYTES_RATIO = 0.0005
"""0.05 %: the tolerance of bytes."""
WALL_RATIO = 0.05
"""5 %: the least change of wall time that a run may fail by. What accepted sessions show usually sets a higher one (`hpc_core.gate.spread`)."""
HOST_RATIO = 0.01
"""1 %: the tolerance of bytecodes and calls."""
BYTECODES_FLOOR, CALLS_FLOOR = 200, 20
"""A few lines of Python, some 10 µs: what a step may gain however little it executes."""
ENERGY_RATIO = 0.1
"""10 %: twice what the age of the counter's readings can move."""
WAITED = "waited for a core"
"""The end of the note on a wall time with calls that do not count."""
_ALL: tuple[Dependence, ...] = ("case", "stack", "machine")


class Definition(msgspec.Struct, frozen=True, kw_only=True):
    """What is the same for a metric in every record."""

    name: str
    """As in a record. A part in angle brackets varies: `peak_<phase>_bytes`."""
    doc: str
    """One sentence for the documents."""
    unit: str
    """"bytes", "s", "1" for counts, "FLOP", "tokens/s", "batches/s", "ratio", "J", "MHz", "nats"; without what a total covers."""
    noise: Noise
    better: Better = "lower"
    depends_on: Dependence = "machine"
    """The last of case, stack and machine that two records must share to be comparable."""
    depends_on_cpu: Dependence | None = None
    """The same where it ran on a CPU, if that differs."""
    of_python: bool = False
    """Whether it depends on Python's minor version too. Another one leaves the metric out and judges the rest of the case."""
    gated: bool | Literal["gpu"] = True
    """Whether it is judged; "gpu": only where it ran on a GPU. Metrics that are not gated are shown and stored."""
    tolerance: float = 0.0
    """Share of the accepted value by which it may be worse without a limit of its own; 0 means equal."""
    floor: float = 0.0
    """The least that the tolerance allows, in the metric's unit."""
    explained: Resource | None = None
    """The part of an explanation that says why it moved."""
    gpu_only: bool = False
    """Whether only a run on a GPU can have it."""
    family: Family | None = None
    """Of GPU-busy time: what it is the time of. Sets the spread that is assumed before sessions are stored."""

    @property
    def limit(self) -> str | None:
        """The field of `Limits` that limits it; None if there is none."""
        return self.name if self.name in Limits.__struct_fields__ else None

    def depends(self, *, on_gpu: bool) -> tuple[Dependence, ...]:
        """Return what two records must share to be comparable: ("case",), ("case", "stack") or all three, and "python"."""
        last = self.depends_on if on_gpu or self.depends_on_cpu is None else self.depends_on_cpu
        return (*_ALL[: _ALL.index(last) + 1], *(("python",) if self.of_python else ()))


def _memory(name: str, doc: str, **other: object) -> Definition:
    """Bytes in use: the allocator's on a GPU, of tensors on a CPU."""
    facts = {"depends_on_cpu": "stack", "explained": "memory"} | other
    return _definition(name, doc, "bytes", "exact", tolerance=BYTES_RATIO, **facts)


def _tensors(name: str, doc: str) -> Definition:
    """Bytes of tensors that the stack decides, whatever the machine."""
    return _definition(name, doc, "bytes", "exact", depends_on="stack", tolerance=BYTES_RATIO, explained="memory")


def _shown_bytes(name: str, doc: str, **other: object) -> Definition:
    return _definition(name, doc, "bytes", "exact", gated=False, **other)


def _count(name: str, doc: str, **other: object) -> Definition:
    """A count that is equal in every run."""
    return _definition(name, doc, **({"unit": "1", "noise": "exact", "explained": "work"} | other))


def _host_count(name: str, doc: str, floor: int) -> Definition:
    """A count of what Python executes: equal in every run, and nearly equal after a change that costs nothing."""
    facts = {"depends_on_cpu": "stack", "explained": "host", "tolerance": HOST_RATIO, "floor": floor}
    return _count(name, doc, of_python=True, **facts)


def _device_count(name: str, doc: str) -> Definition:
    return _count(name, doc, explained="device", gpu_only=True)


def _busy(name: str, doc: str, family: Family, tolerance: float) -> Definition:
    """Time in which the GPU works.

    An interval that lies on both sides of the tolerance is INCONCLUSIVE, so the tolerance leaves room for what two machine
    starts differ by (`hpc_core.gate.intervals`): a clean run passes although its interval is not narrow.
    """
    return _definition(name, doc, "s", "busy", tolerance=tolerance, explained="device", gpu_only=True, family=family)


def _wall(name: str, doc: str, unit: str = "s", **other: object) -> Definition:
    """A number by the host's clock, derived from it, or not reproducible: shown and stored, not judged."""
    return _definition(name, doc, unit, "wall", gated=False, **other)


def _energy(name: str, doc: str) -> Definition:
    """Joules of the board. They move with the host's waiting and with the clock, so the accepted sessions say how much is noise."""
    return _definition(name, doc, "J", "wall", tolerance=ENERGY_RATIO, explained="device", gpu_only=True)


def _judged_wall(name: str, doc: str) -> Definition:
    """A time by the host's clock that is judged: in units of the host canary where the host sets the pace."""
    return _definition(name, doc, "s", "wall", tolerance=WALL_RATIO, explained="time")


def _share(name: str, doc: str, **other: object) -> Definition:
    return _wall(name, doc, "ratio", better="higher", **other)


def _definition(name: str, doc: str, unit: object, noise: object, **other: object) -> Definition:
    return msgspec.convert({"name": name, "doc": doc, "unit": unit, "noise": noise} | other, Definition)


METRICS: Mapping[str, Definition] = {
    each.name: each
    for each in (
        # Memory
        _memory("peak_bytes", "Highest memory of one step or query, all phases together."),
        _memory(
            "peak_<phase>_bytes",
            "Highest memory in one phase: prefill, decode, forward, backward or optimizer; evaluation or save of a Trainer.",
        ),
        _memory("at_peak_<category>_bytes", "Memory of one category at the highest point of the step."),
        _memory(
            "at_peak_other_bytes",
            "Memory at the highest point of the step that belongs to no category; on a CPU also what libraries hold.",
            gated="gpu",
        ),
        _memory(
            "graph_pool_bytes", "Private memory of a captured CUDA graph, part of every peak.", depends_on_cpu=None
        ),
        _memory(
            "first_token_pool_bytes", "Private memory of captured prefills, part of every peak.", depends_on_cpu=None
        ),
        _tensors("weights_bytes", "Bytes of the model's weights, without an adapter's."),
        _tensors("adapter_weights_bytes", "Bytes of the adapter's weights."),
        _tensors("gradient_bytes", "Bytes of all gradients after a backward pass."),
        _tensors("optimizer_bytes", "Bytes of the optimizer's state."),
        _tensors("kv_cache_bytes", "Bytes of the keys and values at the end of a query."),
        _tensors("unexplained_bytes", "Difference between measured bytes and their closed forms, signs ignored."),
        _shown_bytes("at_peak_rounding_bytes", "Peak minus requested bytes: what the allocator rounds up."),
        _shown_bytes("peak_load_bytes", "Highest GPU memory while the model is built."),
        _shown_bytes("peak_requested_bytes", "Highest memory as requested, without the allocator's rounding."),
        _shown_bytes("reserved_bytes", "Memory that the allocator holds of the GPU, in use or not."),
        _shown_bytes("device_used_bytes", "Memory in use on the card by all processes, contexts included."),
        _shown_bytes("held_growth_bytes", "Growth of held memory over a soak test.", depends_on_cpu="stack"),
        _shown_bytes("host_peak_bytes", "Highest resident memory of the process."),
        _shown_bytes("host_peak_load_bytes", "Highest resident memory of the process while the model is built."),
        _wall("allocator_retries", "Times the allocator freed its cache to find memory.", "1", gpu_only=True),
        _share("used_of_reserved", "Peak allocated over reserved memory; the rest is fragmentation.", gpu_only=True),
        # Work
        _count("tokens", "Unpadded tokens: trained, or generated.", better="same", depends_on="case"),
        _count("prompt_tokens", "Unpadded tokens of all prompts.", better="same", depends_on="case"),
        _count("padded_tokens", "Tokens that are only padding.", better="same", depends_on="case"),
        _count("trainable_parameters", "Parameters that are trained.", better="same", depends_on="stack"),
        _count("operators", "Operators that torch dispatches.", depends_on_cpu="stack"),
        _count("operators_decode", "Operators that torch dispatches for decoded tokens.", depends_on_cpu="stack"),
        _count("flops", "Floating-point operations, two for a multiply-add.", unit="FLOP", depends_on_cpu="stack"),
        _count("flops_prefill", "Floating-point operations of the prefill.", unit="FLOP", depends_on_cpu="stack"),
        _count("graph_breaks", "Places where torch.compile gave up a graph.", gated="gpu"),
        _count(
            "recompilations",
            "Times that torch.compile compiled a function again; of a step of your own gated on a CPU too.",
            gated="gpu",
        ),
        _wall("compilations", "Graphs that torch.compile made in the process.", "1"),
        _wall("expert_tokens", "Tokens that an expert of a mixture gets in all layers of one step or prefill.", "1"),
        _wall("expert_tokens_most", "Tokens of the busiest expert of any layer, in one step or prefill.", "1"),
        # Work of the host
        _host_count("bytecodes", "Python bytecodes that the host executes.", BYTECODES_FLOOR),
        _host_count("bytecodes_decode", "Python bytecodes that the host executes for decoded tokens.", BYTECODES_FLOOR),
        _host_count("python_calls", "Calls of Python functions.", CALLS_FLOOR),
        _host_count("python_calls_decode", "Calls of Python functions for decoded tokens.", CALLS_FLOOR),
        _host_count("c_calls", "Calls from Python into C.", CALLS_FLOOR),
        _host_count("c_calls_decode", "Calls from Python into C for decoded tokens.", CALLS_FLOOR),
        _count(
            "kept_objects",
            "Python objects that a further step or query leaves behind.",
            depends_on_cpu="stack",
            explained="host",
        ),
        _count(
            "waits",
            "Times that the host gives up its core in four steps or queries: to sleep, for a file or for a lock.",
            depends_on_cpu="stack",
            explained="time",
        ),
        # Time on the device
        _busy("busy_s", "Time in which the GPU works, for one step.", "train", 0.02),
        _busy("busy_decode_token_s", "Time in which the GPU works, for one decoded token.", "decode", 0.05),
        _busy("busy_prefill_s", "Time in which the GPU works, for one prefill.", "prefill", 0.03),
        _definition(
            "sm_clock_mhz",
            "Mean clock of the GPU's multiprocessors while busy time is measured.",
            "MHz",
            "busy",
            better="same",
            gated=False,
            gpu_only=True,
        ),
        _device_count("kernels", "Kernels launched."),
        _device_count("kernels_prefill", "Kernels launched for one prefill."),
        _device_count("copies", "Copies of memory, on the device and to and from it."),
        _device_count("memsets", "Fills of memory."),
        _device_count("launches", "Times that the host launches a kernel or a CUDA graph."),
        _device_count("synchronizations", "Times that the host waits for the device."),
        _device_count("device_allocations", "Times that the host asks the driver for memory."),
        _device_count("device_frees", "Times that the host gives memory back to the driver."),
        # Time by the host's clock
        _judged_wall("step_s", "Time of one step."),
        _judged_wall("query_s", "Time of one query, prefill and all its tokens."),
        _judged_wall("time_to_first_token_s", "Time from a query's start to its first token."),
        _judged_wall("decode_token_s", "Time between two tokens."),
        _wall(
            "python_s", "Part of a step or decoded token in which the host runs neither an operator nor a CUDA call."
        ),
        _wall("dispatch_s", "Part of a step or decoded token in operators on the host, without their CUDA calls."),
        _wall("launch_s", "Part of a step or decoded token in CUDA calls that do not wait.", gpu_only=True),
        _wall("waiting_s", "Part of a step or decoded token in CUDA calls that wait for the GPU.", gpu_only=True),
        _wall("host_canary_s", "Time of six small layers of operators that no code under test changes."),
        _wall("<time>_per_canary", "A wall time in units of the host canary that ran beside it.", "1"),
        _wall(
            "<time>_canaries", "The same in units of the canary of records before December 2026; no longer made.", "1"
        ),
        _wall("query_extrapolated_s", "Time of a query with more tokens than were measured."),
        _wall("epoch_s", "Time of an epoch, extrapolated from the measured steps."),
        _wall("tokens_per_s", "Unpadded tokens a second.", "tokens/s", better="higher"),
        _wall("cold_start_s", "Time from the start of the process to the end of its first step."),
        _wall("evaluation_s", "Time of an evaluation between steps."),
        _wall("save_s", "Time to save a checkpoint between steps."),
        _wall("first_use_s", "Time of the first steps, which compile, tune and capture."),
        _wall("first_use_<part>_s", "Time of one part of an engine's first use: tuning or capturing."),
        _wall("feed_step_s", "Time of a step whose batch comes from the data path."),
        _wall("feed_resident_step_s", "Time of a step with every batch on the device already."),
        _wall("feed_wait_s", "Time that a step waits for its batch."),
        _wall("feed_make_s", "Time to make one batch in the training process."),
        _wall("feed_batches_per_s", "Batches a second that the workers make.", "batches/s", better="higher"),
        _wall("feed_idle_s", "Time of a step in which no kernel runs because the host gets a batch.", gpu_only=True),
        _wall("feed_all_idle_s", "Time of a step in which no kernel runs.", gpu_only=True),
        _wall(
            "feed_resident_idle_s",
            "Time of a step in which no kernel runs, with every batch on the device already.",
            gpu_only=True,
        ),
        _share("busy_share", "Share of wall time in which the GPU works.", gpu_only=True),
        _share("busy_share_prefill", "Share of the time to the first token in which the GPU works.", gpu_only=True),
        _share("mfu", "Model FLOPs utilization: FLOP rate over the measured matmul rate.", gpu_only=True),
        _share(
            "mbu", "Model bandwidth utilization: bytes read for a token over the measured copy rate.", gpu_only=True
        ),
        # Energy
        _energy("energy_step_j", "Energy of the GPU for one step."),
        _energy("energy_token_j", "Energy of the GPU for one new token, prefill included."),
        # Quality
        _wall("loss_first", "Mean loss of the first pass over the batches.", "nats"),
        _wall("loss_last", "Mean loss of the last pass over the batches.", "nats"),
        _wall("loss_checked", "Loss of one batch after the last step.", "nats"),
        _wall("loss_reference", "Loss of one batch after the last step, by the reference.", "nats"),
        _wall("logits_error", "Error of the logits relative to float32, dequantized and eager.", "ratio"),
        _wall("logits_error_to_stock", "Error of the logits relative to the stock forward.", "ratio"),
        _share("greedy_agreement", "Share of tokens that the reference would choose too."),
        _share("stock_agreement", "Share of tokens that the stock forward would choose too."),
        _wall("perplexity", "Perplexity of a fixed text.", "1"),
        _wall("perplexity_unquantized", "Perplexity of a fixed text by the same weights, not quantized.", "1"),
    )
}
"""Every metric that hpc-core measures."""

_PATTERNS = tuple(
    (re.compile(re.sub("<[a-z]+>", "(.+)", name)), definition) for name, definition in METRICS.items() if "<" in name
)


@functools.cache
def definition_of(name: str) -> Definition | None:
    """Return the definition of a metric by its name in a record; None if it is not one of hpc-core's.

    A metric of a family gets its own name: `peak_decode_bytes` in place of `peak_<phase>_bytes`.
    """
    if name in METRICS:
        return METRICS[name] if "<" not in name else None
    family = next((definition for pattern, definition in _PATTERNS if pattern.fullmatch(name)), None)
    return None if family is None else msgspec.structs.replace(family, name=name)


def is_disturbed(metric: Metric) -> bool:
    """Return whether so many calls waited for a core that their time is named and not judged."""
    return not metric.gated and WAITED in (metric.note or "")


def canaries_of(name: str) -> str:
    """Return the name of a wall time's value in units of the host canary: `step_per_canary` of `step_s`."""
    return f"{name.removesuffix('_s')}_per_canary"


def metric(
    name: str,
    value: float | None = None,
    *,
    samples: Sequence[float] | None = None,
    on_gpu: bool = False,
    per: str | None = None,
    note: str | None = None,
    gated: bool | None = None,
    better: Better | None = None,
) -> Metric:
    """Return a metric with the unit, noise class, direction and dependences of its definition.

    Args:
        name: a name of the registry, or of one of its families.
        value: the value in the definition's unit; with samples it defaults to their median.
        samples: the single measurements, in the same unit.
        on_gpu: whether it ran on a GPU, or is predicted for one.
        per: what a total covers, such as "10 steps"; the unit of `operators` is then "1 per 10 steps".
        note: a caveat that is printed with the number.
        gated: judge it or not, where one workload differs from the definition: the graph pool of a captured training step
            is only shown, because its peak, which holds the pool, is judged.
        better: the direction, where one workload differs from the definition: how much padding there is belongs to the case
            in the suite, but is the user's choice in a Trainer's own training, where less is better.

    Raises:
        SpecError: the name is not defined, or there is neither a value nor a sample.
    """
    definition = definition_of(name)
    if definition is None:
        near = difflib.get_close_matches(name, METRICS, n=3)
        hint = f" Did you mean {' or '.join(near)}?" if near else ""
        raise SpecError(f"There is no metric {name!r}.{hint} Define it in hpc_core/record/metrics.py.")
    if value is None:
        if not samples:
            raise SpecError(f"The metric {name} needs a value or samples.")
        value = statistics.median(samples)
    declared = definition.gated
    return Metric(
        value=value,
        samples=None if samples is None else tuple(samples),
        unit=definition.unit if per is None else f"{definition.unit} per {per}",
        noise=definition.noise,
        better=definition.better if better is None else better,
        depends_on=definition.depends(on_gpu=on_gpu),
        gated=gated if gated is not None else on_gpu if declared == "gpu" else declared,
        note=note,
    )
