"""A/A samples: the same work in fresh processes on several machine starts, as values equal to their JSON."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import msgspec

from hpc_core.case.errors import SpecError
from hpc_core.record.record import Better, Noise

__all__ = ["Declared", "Samples", "Start", "merged", "samples_from_json", "samples_to_json"]


class Declared(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The declaration of a metric."""

    unit: str
    noise: Noise
    better: Better


class Start(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One machine start. Its processes alternate between cases, so all cases share the state of the machine."""

    name: str
    """Samples with the same name and GPU belong to one start."""
    at: str
    """ISO 8601, UTC: when its first process began."""
    machine: str
    gpu_uuid: str
    """"cpu" without a GPU."""
    stack: dict[str, str] = {}
    cases: dict[str, dict[str, tuple[float, ...]]]
    """Values by case and metric, one per process."""


class Samples(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Machine starts, and the declarations of their metrics."""

    metrics: dict[str, Declared]
    starts: tuple[Start, ...]

    def __post_init__(self) -> None:
        """Check that the samples can be analysed.

        Raises:
            SpecError: a metric without declaration or value, a time that is not above 0 or of which more is better.
        """
        for start in self.starts:
            for case, metrics in start.cases.items():
                for name, values in metrics.items():
                    if name not in self.metrics:
                        raise SpecError(f"A/A samples of {case}: {name} is not declared among the metrics.")
                    least = min(values, default=None)
                    timed = self.metrics[name].noise != "exact"
                    if least is None or (timed and not least > 0):
                        raise SpecError(f"A/A samples of {case}: {name} holds {least}; a time is above 0.")
                    if timed and self.metrics[name].better != "lower":
                        raise SpecError(f"A/A samples: of {name} less must be better, as of any time.")

    def series(self) -> Iterator[tuple[str, str, list[tuple[float, ...]]]]:
        """Return case, metric and the values of each start that has them, in the order of the starts."""
        keys = dict.fromkeys(
            (case, name) for start in self.starts for case, metrics in start.cases.items() for name in metrics
        )
        for case, name in keys:
            held = [start.cases[case][name] for start in self.starts if name in start.cases.get(case, {})]
            yield case, name, held


def merged(parts: Iterable[Samples]) -> Samples:
    """Return all starts of several files, the earliest first; samples of one start are joined.

    Raises:
        SpecError: a metric is declared in two ways, or the starts are of several kinds of machine.
    """
    metrics: dict[str, Declared] = {}
    starts: dict[tuple[str, str], Start] = {}
    for part in parts:
        for name, declared in part.metrics.items():
            if metrics.setdefault(name, declared) != declared:
                raise SpecError(f"A/A samples declare {name} in two ways: {metrics[name]} and {declared}.")
        for start in part.starts:
            key = start.name, start.gpu_uuid
            starts[key] = _joined(starts[key], start) if key in starts else start
    machines = sorted({start.machine for start in starts.values()})
    if len(machines) > 1:
        raise SpecError(f"A/A samples of several kinds of machine say nothing of any: {', '.join(machines)}.")
    return Samples(metrics=metrics, starts=tuple(sorted(starts.values(), key=lambda start: start.at)))


def _joined(one: Start, other: Start) -> Start:
    """Return one start with the processes of both, in order."""
    cases = {
        case: {
            name: (*one.cases.get(case, {}).get(name, ()), *other.cases.get(case, {}).get(name, ()))
            for name in one.cases.get(case, {}) | other.cases.get(case, {})
        }
        for case in one.cases | other.cases
    }
    return msgspec.structs.replace(one, at=min(one.at, other.at), cases=cases)


def samples_from_json(text: bytes, where: str) -> Samples:
    """Return the samples of the file `where`.

    Raises:
        SpecError: they are none.
    """
    try:
        return msgspec.json.decode(text, type=Samples)
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise SpecError(
            f"{where}: no A/A samples: {error}. They are what python -m bench.studies.error_rates --out writes."
        ) from error


def samples_to_json(samples: Samples) -> bytes:
    """Return JSON, indented by two spaces, with a newline at the end."""
    return msgspec.json.format(msgspec.json.encode(samples, order="sorted"), indent=2) + b"\n"
