"""What to run: a case, made of model, quantization, adapter and workload.

A case is a frozen value, equal to its JSON. Contradictory parts are refused when it is made, in Python and from JSON.
"""

from __future__ import annotations

import hashlib
import re
from typing import Any, Literal

import msgspec

from hpc_core.case.errors import SpecError
from hpc_core.case.limits import Limits
from hpc_core.case.parts import AdapterSpec, ModelSpec, QuantSpec, Strict, check_types, essence, explained, refuse
from hpc_core.case.shapes import MODELS
from hpc_core.case.workloads import CallableSpec, FinetuneSpec, GenerateSpec, Workload

SCHEMA = 1
"""Version of cases, records and baselines. Digests omit defaults, so changing a default requires a new version."""

Scale = Literal["tiny", "small", "full"]

_ID = re.compile(r"[a-z0-9][a-z0-9.+_-]*/[a-z0-9][a-z0-9.+_-]*")


class Case(Strict, frozen=True, kw_only=True):
    """One benchmark: what to run, its id, its time limit and its limits on metrics."""

    id: str
    """`<shape>/<variant>`, the same in files, JSON, `--case` and on the command line."""
    scale: Scale
    model: ModelSpec | None = None
    quantization: QuantSpec | None = None
    adapter: AdapterSpec | None = None
    workload: Workload
    seed: int = 0
    """Seed of dropout and adapter initialization."""
    timeout_s: float = 300.0
    """Wall-clock seconds that the worker may take, without imports of a fresh process."""
    limits: Limits = Limits()

    def __post_init__(self) -> None:
        """Check that the parts fit together.

        Raises:
            SpecError: a malformed id, QLoRA without quantization, full fine-tuning of quantized weights …
        """
        check_types(self)
        refuse(
            not _ID.fullmatch(self.id),
            f"A case id is <shape>/<variant> in lower case, such as 'tiny/lora', got {self.id!r}.",
        )
        refuse(not self.timeout_s > 0, f"{self.id}: timeout_s must be above 0, got {self.timeout_s}.")
        if isinstance(self.workload, CallableSpec):
            extra = [part for part in ("model", "quantization", "adapter") if getattr(self, part) is not None]
            refuse(bool(extra), f"{self.id}: a callable builds its own model: remove {', '.join(extra)}.")
            return
        refuse(self.model is None, f"{self.id}: a {self.workload.__struct_config__.tag} case needs a model.")
        if isinstance(self.workload, FinetuneSpec):
            self._check_finetune(self.workload)
        elif isinstance(self.workload, GenerateSpec):
            self._check_generate(self.workload)
        self._check_names()

    def _check_finetune(self, workload: FinetuneSpec) -> None:
        quantized = self.quantization is not None
        int4 = self.quantization is not None and self.quantization.kind == "int4"
        refuse(int4, f"{self.id}: int4 weights cannot be fine-tuned: use nf4 or fp4.")
        refuse(
            quantized and self.adapter is None,
            f"{self.id}: quantized weights have no gradients: add an adapter (QLoRA) or remove the quantization.",
        )
        refuse(
            workload.prepare and self.adapter is None,
            f"{self.id}: prepare=True freezes every weight, so nothing would train without an adapter.",
        )
        refuse(
            workload.prepare and not quantized,
            f"{self.id}: prepare=True is for quantized models: add quantization= (QLoRA) or remove it.",
        )
        variant = self.id.partition("/")[2]
        refuse(
            variant.startswith("qlora") and not quantized,
            f"{self.id}: QLoRA without quantization is LoRA: add quantization= or rename the case.",
        )
        refuse(
            workload.engine == "tuned" and self.adapter is not None and not self.adapter.is_plain,
            f"{self.id}: engine='tuned' trains plain LoRA on named modules: use engine='stock' for method={getattr(self.adapter, 'method', '')!r}.",
        )
        if workload.fusion in ("linears", "blocks"):  # Liger does not replace linear layers
            dropout = 0.0 if self.adapter is None else self.adapter.dropout
            refuse(
                dropout > 0,
                f"{self.id}: fusion={workload.fusion!r} does not support dropout: use dropout=0, not {dropout}.",
            )
            int8 = self.quantization is not None and self.quantization.kind == "int8"
            refuse(int8, f"{self.id}: fusion={workload.fusion!r} supports 4-bit and unquantized weights, not int8.")

    def _check_generate(self, workload: GenerateSpec) -> None:
        graph = workload.engine == "graph"
        if self.quantization is not None and self.quantization.kind == "int4":
            self._check_int4(workload)
        refuse(
            self.adapter is not None and not graph,
            f"{self.id}: engine={workload.engine!r} does not generate with an adapter: remove adapter=, or use engine='graph', which merges it.",
        )
        if not graph:
            return
        refuse(
            self.quantization is not None and self.quantization.kind == "int8",
            f"{self.id}: engine='graph' has no kernels for LLM.int8: use nf4, fp4 or engine='stock'.",
        )
        eager = self.model is not None and self.model.attention == "eager"
        refuse(eager, f"{self.id}: engine='graph' has its own attention: remove attention='eager'.")

    def _check_int4(self, workload: GenerateSpec) -> None:
        assert self.model is not None
        refuse(
            self.adapter is not None, f"{self.id}: int4 weights support no adapter: merge it first, or use nf4 or fp4."
        )
        dtype = self.model.dtype
        refuse(
            dtype != "bfloat16",
            f"{self.id}: int4 quantizes bfloat16 weights, but the model's are {dtype}: use dtype='bfloat16'.",
        )
        refuse(
            workload.engine == "graph" and workload.kernels == "triton",
            f"{self.id}: engine='graph' has no Triton kernels for int4: use kernels='inductor' or 'torch'.",
        )

    def _check_names(self) -> None:
        model = self.model
        if model is not None and model.shape is not None:
            prefix = self.id.partition("/")[0]
            wrong = prefix in MODELS and prefix != model.shape
            refuse(wrong, f"{self.id}: the id says {prefix}, the model is {model.shape}.")

    @property
    def digest(self) -> str:
        """Twelve hex digits of SHA-256 over what runs. Id, timeout and limits are not part of it, so changing them keeps baselines."""
        parts = [self.model, self.quantization, self.adapter, self.workload, self.seed, self.scale]
        work = {"schema": SCHEMA, "parts": [essence(part) for part in parts]}
        return hashlib.sha256(msgspec.json.encode(work, order="sorted")).hexdigest()[:12]

    @property
    def needs_gpu(self) -> bool:
        """Whether it runs only on a CUDA GPU: full-scale cases, and callables with device="cuda"."""
        return self.scale == "full" or (isinstance(self.workload, CallableSpec) and self.workload.device == "cuda")

    @property
    def kind(self) -> str:
        """The kind of workload: "generate", "finetune" or "callable"."""
        return str(self.workload.__struct_config__.tag)

    def vary(self, variant: str, **changes: Any) -> Case:
        """Return a new case with the id `<shape>/<variant>` and some fields changed.

        Name a field as its part does (`rank=16`, `batch=8`, `timeout_s=120`). Prefix it with the part if several parts have it
        (`model_dtype`, `adapter_dtype`, `data_seed`). Pass a whole part, or None, to replace it. Arguments of a callable's factory
        are changed by name.

        Raises:
            SpecError: no part has the field, or several have it; the variant changes nothing.
        """
        return varied(self, variant, changes)


def case_to_json(case: Case) -> bytes:
    """Return canonical JSON: sorted keys, no defaults."""
    return msgspec.json.encode(essence(case), order="sorted")


def case_from_json(text: bytes | str) -> Case:
    """Parse a case.

    Raises:
        SpecError: the JSON is malformed, has unknown keys, or contradicts itself; the message contains the path.
    """
    try:
        return msgspec.json.decode(text, type=Case)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise SpecError(f"Not a case: {explained(error, {Case})}") from error


_PARTS = ("model", "quantization", "adapter", "workload")
_INNER = ("data", "feed")
"""Parts that a workload may have."""


def varied(case: Case, variant: str, changes: dict[str, Any]) -> Case:
    """Return the case of `Case.vary`.

    Raises:
        SpecError: an unknown or ambiguous field, or nothing changed.
    """
    new = changed(case, variant, changes)
    if new.digest == case.digest and (new.timeout_s, new.limits) == (case.timeout_s, case.limits):
        raise SpecError(f"{new.id} runs exactly what {case.id} runs: a variant must change something.")
    return new


def changed(case: Case, variant: str, changes: dict[str, Any]) -> Case:
    """Return the changed case, which may equal the original.

    Raises:
        SpecError: an unknown or ambiguous field.
    """
    values = {name: getattr(case, name) for name in case.__struct_fields__}
    nested: dict[str, dict[str, Any]] = {}
    for name, value in changes.items():
        place, field = _place(case, name)
        if place == "":
            values[field] = value
        else:
            nested.setdefault(place, {})[field] = value
    for name in _INNER:
        inner = nested.pop(name, None)
        if inner is not None:
            nested.setdefault("workload", {})[name] = _replaced(getattr(case.workload, name), inner)
    arguments = nested.pop("arguments", None)
    if arguments is not None:
        nested.setdefault("workload", {})["arguments"] = _arguments(case) | arguments
    for part, fields in nested.items():
        values[part] = _replaced(values[part], fields)
    values["id"] = f"{case.id.partition('/')[0]}/{variant}"
    return type(case)(**values)


def _arguments(case: Case) -> dict[str, Any]:
    """Return the arguments of a callable's factory that the case sets."""
    return dict(getattr(case.workload, "arguments", {}))


def _replaced(part: Any, fields: dict[str, Any]) -> Any:
    # Construct it anew, so that the value is checked.
    return type(part)(**{name: getattr(part, name) for name in part.__struct_fields__} | fields)


def _place(case: Case, name: str) -> tuple[str, str]:
    """Return the part and field that a change names. Part "" is the case itself."""
    parts = {part: getattr(case, part).__struct_fields__ for part in _PARTS if getattr(case, part) is not None}
    for name_of_part in _INNER:
        if hasattr(case.workload, name_of_part):
            parts[name_of_part] = getattr(case.workload, name_of_part).__struct_fields__
    if case.kind == "callable":
        parts["arguments"] = tuple(_arguments(case))
    if name in case.__struct_fields__ and name not in ("id", "seed"):
        return "", name
    places = [(part, name) for part, fields in parts.items() if name in fields]
    for part, fields in parts.items():
        if name.startswith(f"{part}_") and name.removeprefix(f"{part}_") in fields:
            places.append((part, name.removeprefix(f"{part}_")))
    if name == "seed":
        places = [("", "seed")]  # the case's own seed; the others are model_seed and data_seed
    if len(places) == 1:
        return places[0]
    if not places:
        known = sorted({field for fields in parts.values() for field in fields})
        raise SpecError(f"{case.id} has no field {name!r} to vary. It has: {', '.join(known)}.")
    owners = ", ".join(f"{part}_{field}" for part, field in places)
    raise SpecError(f"{name!r} is ambiguous for {case.id}: use one of {owners}.")
