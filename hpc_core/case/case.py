"""What to run: a case, made of model, quantization, adapter and workload. Frozen values, equal to their JSON.

No torch, no I/O. A case whose parts contradict each other is refused when it is made, in Python as from JSON.
"""

from __future__ import annotations

import hashlib
import re
from typing import Any, Literal

import msgspec

from hpc_core.case.errors import SpecError
from hpc_core.case.feed import FeedSpec
from hpc_core.case.limits import Limits
from hpc_core.case.parts import (
    AdapterSpec,
    DataSpec,
    Dtype,
    ModelSpec,
    QuantSpec,
)
from hpc_core.case.shapes import SHAPES
from hpc_core.case.strict import (
    Strict,
    check_types,
    essence,
    refuse,
)
from hpc_core.case.workloads import (
    CallableSpec,
    FinetuneSpec,
    GenerateSpec,
    Workload,
)

__all__ = [
    "SCHEMA",
    "AdapterSpec",
    "CallableSpec",
    "Case",
    "DataSpec",
    "Dtype",
    "FeedSpec",
    "FinetuneSpec",
    "GenerateSpec",
    "ModelSpec",
    "QuantSpec",
    "Workload",
    "case_from_json",
    "case_to_json",
]

SCHEMA = 1
"""Version of specs, records and baselines. A changed default of any field of a case is a new version: digests omit defaults."""

Scale = Literal["tiny", "small", "full"]

_ID = re.compile(r"[a-z0-9][a-z0-9.+_-]*/[a-z0-9][a-z0-9.+_-]*")


class Case(Strict, frozen=True, kw_only=True):
    """One benchmark: what to run, under which id, within which time and limits."""

    id: str
    """`<shape>/<variant>`; the same in files, JSON, `--case` and on the command line."""
    scale: Scale
    model: ModelSpec | None = None
    quantization: QuantSpec | None = None
    adapter: AdapterSpec | None = None
    workload: Workload
    seed: int = 0
    """Seed of everything drawn while running: dropout, adapter initialization."""
    timeout_s: float = 300.0
    """Wall-clock seconds that the worker may take, imports of a cold worker excluded."""
    limits: Limits = Limits()

    def __post_init__(self) -> None:
        """Check the parts against each other.

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
            refuse(bool(extra), f"{self.id}: a callable builds its own model: drop {', '.join(extra)}.")
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
        refuse(int4, f"{self.id}: int4 weights are for generation; nothing trains on them: take nf4 or fp4.")
        refuse(
            quantized and self.adapter is None,
            f"{self.id}: quantized weights take no gradient: add an adapter (QLoRA) or drop the quantization.",
        )
        refuse(
            workload.prepare and self.adapter is None,
            f"{self.id}: prepare freezes every weight, so without an adapter nothing would train.",
        )
        refuse(
            workload.prepare and not quantized,
            f"{self.id}: prepare=True is for quantized models; give quantization= (QLoRA) or drop it.",
        )
        variant = self.id.partition("/")[2]
        refuse(
            variant.startswith("qlora") and not quantized,
            f"{self.id}: QLoRA without quantization is LoRA: give quantization= or rename it.",
        )
        if workload.fusion in ("linears", "blocks"):  # Liger leaves the linear layers to their libraries
            dropout = 0.0 if self.adapter is None else self.adapter.dropout
            refuse(
                dropout > 0, f"{self.id}: fusion={workload.fusion!r} knows no dropout: say dropout=0, not {dropout}."
            )
            int8 = self.quantization is not None and self.quantization.kind == "int8"
            refuse(int8, f"{self.id}: fusion={workload.fusion!r} knows 4-bit weights and plain ones, not int8.")

    def _check_generate(self, workload: GenerateSpec) -> None:
        graph = workload.engine == "graph"
        if self.quantization is not None and self.quantization.kind == "int4":
            self._check_int4(workload)
        refuse(
            self.adapter is not None and not graph,
            f"{self.id}: generation with an adapter is not built yet for engine='stock': drop adapter=, or say engine='graph', which runs it merged.",
        )
        if not graph:
            return
        refuse(
            self.quantization is not None and self.quantization.kind == "int8",
            f"{self.id}: engine='graph' has no kernels for LLM.int8: take nf4 or fp4, or engine='stock'.",
        )
        eager = self.model is not None and self.model.attention == "eager"
        refuse(eager, f"{self.id}: engine='graph' brings its own attention: drop attention='eager'.")

    def _check_int4(self, workload: GenerateSpec) -> None:
        assert self.model is not None
        refuse(
            self.adapter is not None, f"{self.id}: int4 weights take no adapter: merge it first, or take nf4 or fp4."
        )
        dtype = self.model.dtype
        refuse(
            dtype != "bfloat16",
            f"{self.id}: int4 is made from bfloat16 weights, the model's are {dtype}: say dtype='bfloat16'.",
        )
        refuse(
            workload.engine == "graph" and workload.kernels == "triton",
            f"{self.id}: engine='graph' has no kernels of its own for int4: say kernels='inductor' or 'torch'.",
        )

    def _check_names(self) -> None:
        model = self.model
        if model is not None and model.shape is not None:
            prefix = self.id.partition("/")[0]
            wrong = prefix in SHAPES and prefix != model.shape
            refuse(wrong, f"{self.id}: the id says {prefix}, the model is {model.shape}.")

    @property
    def digest(self) -> str:
        """Twelve hex digits of SHA-256 over what runs: id, timeout and limits left out, so changing those keeps baselines."""
        parts = [self.model, self.quantization, self.adapter, self.workload, self.seed, self.scale]
        work = {"schema": SCHEMA, "parts": [essence(part) for part in parts]}
        return hashlib.sha256(msgspec.json.encode(work, order="sorted")).hexdigest()[:12]

    @property
    def needs_gpu(self) -> bool:
        """Full-scale cases, and callables that say so, run on a CUDA GPU only."""
        return self.scale == "full" or (isinstance(self.workload, CallableSpec) and self.workload.device == "cuda")

    @property
    def kind(self) -> str:
        """Which workload: "generate", "finetune" or "callable"."""
        return str(self.workload.__struct_config__.tag)

    def vary(self, variant: str, **changes: Any) -> Case:
        """A new case under the id `<shape>/<variant>`, with fields changed wherever they live.

        A field is named as in its part (`rank=16`, `batch=8`, `timeout_s=120`); one that several parts have is named
        with the part (`model_dtype`, `adapter_dtype`, `data_seed`). `quantization=None` or a whole part replaces it. An argument that a
        callable's case gives to its factory is varied by its name (`batch=8`).

        Raises:
            SpecError: a field that no part has, or that several have; a variant that changes nothing.
        """
        from hpc_core.case.vary import varied  # a method for its readers, a module of its own for its rules

        return varied(self, variant, changes)


def case_to_json(case: Case) -> bytes:
    """Canonical JSON: sorted keys, defaults left out."""
    return msgspec.json.encode(essence(case), order="sorted")


def case_from_json(text: bytes | str) -> Case:
    """The case that this JSON says.

    Raises:
        SpecError: the JSON is malformed, has unknown keys, or contradicts itself; the message holds the path.
    """
    try:
        return msgspec.json.decode(text, type=Case)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise SpecError(f"Not a case: {error}") from error
