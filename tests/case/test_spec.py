"""Cases equal their JSON, refuse contradictions, and have digests that depend only on what runs."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hpc_core.case.case import SCHEMA, Case, case_from_json, case_to_json
from hpc_core.case.errors import SpecError
from hpc_core.case.limits import Limits
from hpc_core.case.parts import AdapterSpec, DataSpec, ModelSpec, QuantSpec
from hpc_core.case.workloads import CallableSpec, FeedSpec, FinetuneSpec, GenerateSpec
from tests.strategies import a_case, cases

NF4 = QuantSpec(kind="nf4", compute_dtype="bfloat16")
TRACE = DataSpec(source="trace", name="gsm8k")
STEP = CallableSpec(factory="mypkg.train:make_step")

DEFAULTS: dict[type[msgspec.Struct], dict[str, Any]] = {
    ModelSpec: {
        "shape": None, "layers": None, "weights": "random", "path": None, "dtype": "bfloat16", "attention": "sdpa",
        "seed": 0,
    },
    QuantSpec: {"double_quant": False, "group_size": 128, "skip_modules": ("lm_head",)},
    AdapterSpec: {
        "method": "lora",
        "rank": 8, "alpha": 16.0, "dropout": 0.05, "targets": ("q_proj", "k_proj", "v_proj", "o_proj"),
        "dtype": "float32",
        "modules_to_save": (),
        "options": {},
    },
    DataSpec: {"source": "random", "name": None, "rows": None, "seed": 0},
    GenerateSpec: {
        "batch": 1, "prompts": 3, "prompt_length": 100, "new_tokens": 64, "cache": "dynamic", "engine": "stock",
        "kernels": "triton", "head": "plain", "cache_step": 256, "eos_every": None, "temperature": None,
        "top_k": None, "compiled": True, "extrapolate_to": None, "data": DataSpec(),
    },
    FinetuneSpec: {
        "batch": 4, "length": 512, "padding": "none", "packing": False, "checkpointing": "off", "prepare": False,
        "optimizer": "adamw-fused", "learning_rate": 1e-5, "precision": "pure", "steps": 10, "epoch_rows": None,
        "engine": "stock", "loss": "stock", "loss_chunk": 512, "fusion": "off", "compile": "off", "graph": False,
        "budget_bytes": None, "optimizer_in_backward": False, "feed": FeedSpec(), "data": DataSpec(),
    },
    FeedSpec: {"way": "resident", "tokenize": "cached", "workers": 0, "pinned": False, "ahead": 0},
    CallableSpec: {"arguments": {}, "steps": 10, "device": "any"},
    Case: {"model": None, "quantization": None, "adapter": None, "seed": 0, "timeout_s": 300.0, "limits": Limits()},
}  # fmt: skip


@pytest.mark.parametrize("kind", DEFAULTS, ids=lambda kind: kind.__name__)
def test_defaults_are_pinned(kind: type[msgspec.Struct]) -> None:
    """A changed default is a new schema: digests omit defaults, so a silent change would keep baselines of other work.

    Add a new field here if its default means "as before". If a default changes on purpose, raise SCHEMA too.
    """
    assert SCHEMA == 1
    defaults = {}
    for field in msgspec.structs.fields(kind):
        default = field.default if field.default_factory is msgspec.NODEFAULT else field.default_factory()
        if default is not msgspec.NODEFAULT:
            defaults[field.name] = default
    assert defaults == DEFAULTS[kind]


def test_digests_are_pinned() -> None:
    """The digest of a known case never changes within a schema."""
    assert a_case().digest == "99f610a50c7b"
    assert Case(id="my/step", scale="tiny", workload=STEP).digest == "5704802b70d0"


@given(cases())
def test_round_trip(case: Case) -> None:
    """A case equals its JSON, byte for byte in canonical form, and keeps its digest."""
    text = case_to_json(case)
    again = case_from_json(text)
    assert again == case
    assert case_to_json(again) == text
    assert again.digest == case.digest


@given(cases(), st.floats(min_value=1, max_value=1000))
def test_the_digest_depends_on_what_runs(case: Case, timeout_s: float) -> None:
    """The digest depends on the seed, and not on id, timeout or limits."""
    values = {name: getattr(case, name) for name in case.__struct_fields__}
    other = Case(**(values | {"id": "my/other", "timeout_s": timeout_s, "limits": Limits(operators=7)}))
    assert other.digest == case.digest
    assert Case(**(values | {"seed": case.seed + 1})).digest != case.digest


@given(cases(), st.integers(1, 10_000))
def test_vary_laws(case: Case, by: int) -> None:
    """A variant differs in its id and one field; varying back restores the case; varying nothing is refused."""
    steps = getattr(case.workload, "steps", None)
    name, old = ("seed", case.seed) if steps is None else ("steps", steps)
    new = case.vary("varied", **{name: old + by})
    assert new.id == f"{case.id.partition('/')[0]}/varied"
    assert new.digest != case.digest
    back = new.vary(case.id.partition("/")[2], **{name: old})
    assert back == case
    with pytest.raises(SpecError, match="a variant must change something"):
        case.vary("same", **{name: old})


def test_an_explicit_default_changes_nothing() -> None:
    """A case that states its defaults equals one that omits them, in digest and JSON too."""
    stated: Any = {"rank": 8, "alpha": 16, "dropout": 0.05, "targets": ["q_proj", "k_proj", "v_proj", "o_proj"]}
    implicit, explicit = a_case(), a_case(adapter=AdapterSpec(**stated), workload=FinetuneSpec(length=512))
    assert implicit == explicit
    assert implicit.digest == explicit.digest
    assert case_to_json(implicit) == case_to_json(explicit)
    zero = a_case(adapter=AdapterSpec(dropout=0.0)), a_case(adapter=AdapterSpec(dropout=-0.0))
    assert zero[0].digest == zero[1].digest


def test_kind_and_gpu() -> None:
    """A case knows its kind and whether it needs a GPU."""
    assert (a_case().kind, a_case().needs_gpu) == ("finetune", False)
    assert a_case(scale="full").needs_gpu
    callable_case = Case(id="my/step", scale="tiny", workload=CallableSpec(factory="a.b:c", device="cuda"))
    assert (callable_case.kind, callable_case.needs_gpu) == ("callable", True)


INT4: dict[str, Any] = {"kind": "int4", "compute_dtype": "bfloat16"}
TUNED: dict[str, Any] = {"engine": "tuned", "loss": "chunked"}
IN_BACKWARD: dict[str, Any] = {**TUNED, "fusion": "blocks", "optimizer_in_backward": True}

REFUSALS: list[tuple[Callable[[], Any], str]] = [
    (lambda: ModelSpec(), "Random weights need a shape"),
    (lambda: ModelSpec(shape="tiny", path="/w"), "Random weights have no path"),
    (lambda: ModelSpec(shape="gpt-9"), "gpt-9"),
    (lambda: ModelSpec(shape="tiny", layers=3), "tiny has 3; use 1 to 2"),
    (lambda: ModelSpec(shape="tiny", layers=0), "use 1 to 2"),
    (lambda: ModelSpec(weights="hub", path="a/b", layers=2), "defines the layers"),
    (lambda: ModelSpec(weights="folder"), "weights='folder' needs path="),
    (lambda: ModelSpec(weights="config"), "weights='config' needs path=, a folder with a config.json"),
    (lambda: ModelSpec(weights="config", path="a/b", shape="tiny"), "defines the shape"),
    (lambda: ModelSpec(weights="hub", path="a/b", shape="tiny"), "defines the shape"),
    (lambda: ModelSpec(weights="hub", path="package://m/f.gguf"), "package:// names a GGUF file"),
    (
        lambda: ModelSpec(shape="tiny", dtype="int4"),  # type: ignore[arg-type]
        "Invalid enum value 'int4': use one of 'float32', 'bfloat16', 'float16'",
    ),
    (lambda: QuantSpec(kind="int8", compute_dtype="float16", double_quant=True), "double_quant applies to nf4"),
    (
        lambda: QuantSpec(kind="int8", compute_dtype="bfloat16"),
        "bitsandbytes always computes int8 matrix products in float16",
    ),
    (lambda: QuantSpec(**INT4, double_quant=True), "double_quant applies to nf4"),
    (lambda: QuantSpec(kind="int4", compute_dtype="float16"), "compute_dtype='bfloat16'"),
    (lambda: QuantSpec(**INT4, group_size=100), "32, 64, 128, 256"),
    (lambda: QuantSpec(**INT4, skip_modules=()), "does not quantize the head"),
    (lambda: QuantSpec(kind="nf4", compute_dtype="bfloat16", group_size=64), "applies to int4 only"),
    (lambda: AdapterSpec(rank=0), "rank must be at least 1, got 0"),
    (lambda: AdapterSpec(rank="8"), r"AdapterSpec\(rank='8'\): Expected `int`, got `str`"),  # type: ignore[arg-type]
    (lambda: AdapterSpec(alpha=0), "alpha must be above 0"),
    (lambda: AdapterSpec(alpha=math.inf), "must be finite"),
    (lambda: AdapterSpec(alpha=math.nan), "must be finite"),
    (lambda: AdapterSpec(dropout=1.0), r"dropout must lie in \[0, 1\)"),
    (lambda: AdapterSpec(targets=()), "at least one target module"),
    (lambda: AdapterSpec(targets=("q_proj", "q_proj")), "Repeated target modules"),
    (lambda: DataSpec(name="gsm8k"), "Random ids have no name"),
    (lambda: DataSpec(source="file"), "source='file' needs name="),
    (lambda: DataSpec(source="trace", name="c4"), "supports 'gsm8k' or 'wikitext2', got 'c4'"),
    (lambda: DataSpec(source="embedded"), "supports 'problems' or 'paragraphs', got None"),
    (lambda: DataSpec(rows=0), "rows must be at least 1, got 0"),
    (lambda: GenerateSpec(batch=0), "batch must be at least 1, got 0"),
    (lambda: GenerateSpec(prompts=0), "prompts must be at least 1, got 0"),
    (lambda: GenerateSpec(new_tokens=1), "new_tokens must be at least 2"),
    (lambda: GenerateSpec(prompt_length=None), "Random prompts need prompt_length"),
    (lambda: GenerateSpec(data=TRACE), "trace prompts bring their own lengths"),
    (lambda: GenerateSpec(compiled=False), "compiled=False belongs to cache='static'"),
    (lambda: GenerateSpec(extrapolate_to=10), "extrapolate_to=10 is below new_tokens=64"),
    (lambda: GenerateSpec(head="int8"), "head belongs to engine='graph'"),
    (lambda: GenerateSpec(kernels="torch", eos_every=4), "kernels, eos_every belongs to engine='graph'"),
    (lambda: GenerateSpec(engine="graph", cache="static"), "remove cache='static'"),
    (lambda: GenerateSpec(engine="graph", batch=33), "supports batches of 1 to 32, got 33"),
    (lambda: GenerateSpec(engine="graph", temperature=0.0), "temperature must be above 0"),
    (lambda: GenerateSpec(engine="graph", top_k=3), "top_k=3 needs a temperature"),
    (lambda: GenerateSpec(engine="graph", cache_step=0), "cache_step must be at least 1"),
    (lambda: FinetuneSpec(batch=0), "batch must be at least 1"),
    (lambda: FinetuneSpec(steps=0), "steps must be at least 1"),
    (lambda: FinetuneSpec(length=1), "length must be at least 2"),
    (lambda: FinetuneSpec(learning_rate=0), "learning_rate must be above 0"),
    (lambda: FinetuneSpec(packing=True, padding="longest", data=TRACE), "packing=True contradicts padding='longest'"),
    (lambda: FinetuneSpec(data=TRACE), "Rows of trace differ in length"),
    (lambda: FinetuneSpec(packing=True), "Random rows are full already"),
    (lambda: FinetuneSpec(checkpointing="as-prepare-leaves-it"), "needs prepare=True"),
    (lambda: FinetuneSpec(loss="chunked", graph=True), "The option loss, graph belongs to engine='tuned'"),
    (lambda: FinetuneSpec(**TUNED, precision="autocast-bf16"), "use precision='pure'"),
    (lambda: FinetuneSpec(**TUNED, loss_chunk=0), "loss_chunk must be at least 1 row, got 0"),
    (lambda: FinetuneSpec(engine="tuned", loss_chunk=64), "loss_chunk belongs to loss='chunked'"),
    (lambda: FinetuneSpec(**TUNED, fusion="blocks", compile="layers"), "remove compile='layers'"),
    (lambda: FinetuneSpec(engine="tuned", fusion="blocks"), "never makes whole logits: use loss='chunked'"),
    (lambda: FinetuneSpec(**TUNED, fusion="blocks", checkpointing="reentrant"), "recomputes by budget_bytes"),
    (lambda: FinetuneSpec(**TUNED, budget_bytes=2**32), "budget_bytes needs fusion='blocks'"),
    (lambda: FinetuneSpec(**TUNED, fusion="blocks", budget_bytes=0), "budget_bytes must be at least 1, got 0"),
    (lambda: FinetuneSpec(**TUNED, optimizer_in_backward=True), "fusion='off'"),
    (lambda: FinetuneSpec(**IN_BACKWARD, optimizer="adamw-8bit"), "adamw-8bit"),
    (lambda: FinetuneSpec(optimizer_in_backward=True), "belongs to engine='tuned'"),
    (lambda: FinetuneSpec(fusion="liger"), "engine='tuned'"),
    (lambda: FinetuneSpec(engine="tuned", fusion="liger", compile="layers"), "compiled already"),
    (lambda: FinetuneSpec(engine="tuned", loss="liger", graph=True), "use loss='chunked'"),
    (lambda: FinetuneSpec(engine="tuned", loss="liger", fusion="blocks"), "use loss='chunked'"),
    (lambda: FinetuneSpec(engine="tuned", fusion="liger", budget_bytes=2**30), "budget_bytes needs fusion='blocks'"),
    (lambda: FinetuneSpec(**TUNED, graph=True, optimizer="adamw-8bit"), "graph=True needs steps of one shape"),
    (lambda: FinetuneSpec(**TUNED, graph=True, padding="longest", data=TRACE), "graph=True needs steps of one shape"),
    (
        lambda: a_case(workload=FinetuneSpec(**TUNED, fusion="blocks")),
        "does not support dropout: use dropout=0, not 0.05",
    ),
    (lambda: CallableSpec(factory="make_step"), "A factory is given as 'package.module:function'"),
    (lambda: CallableSpec(factory="a.b:c\n"), "A factory is given as 'package.module:function'"),
    (lambda: CallableSpec(factory="a:b", steps=0), "steps must be at least 1"),
    (lambda: CallableSpec(factory="a:b", arguments={"x": object()}), "must be JSON values"),
    (lambda: CallableSpec(factory="a:b", arguments={"x": (1,)}), "change on the way through JSON"),
    (lambda: CallableSpec(factory="a:b", arguments={"x": math.nan}), "change on the way through JSON"),
    (lambda: a_case("lora"), "A case id is <shape>/<variant>"),
    (lambda: a_case("tiny/../x"), "A case id is <shape>/<variant>"),
    (lambda: a_case("tiny/.."), "A case id is <shape>/<variant>"),
    (lambda: a_case("tiny/lora\n"), "A case id is <shape>/<variant>"),
    (lambda: a_case(timeout_s=0), "timeout_s must be above 0"),
    (lambda: a_case(timeout_s=math.inf), "must be finite"),
    (lambda: a_case(workload=STEP), "a callable builds its own model: remove model, adapter"),
    (lambda: a_case(model=None), "a finetune case needs a model"),
    (lambda: a_case(workload=GenerateSpec()), "does not generate with an adapter"),
    (lambda: a_case(adapter=None, quantization=NF4), "quantized weights have no gradients"),
    (lambda: a_case(adapter=None, workload=FinetuneSpec(prepare=True)), "nothing would train without an adapter"),
    (lambda: a_case(workload=FinetuneSpec(prepare=True)), "prepare=True is for quantized models"),
    (lambda: a_case("tiny/qlora"), "QLoRA without quantization is LoRA"),
    (lambda: a_case("llama-3.2-3b/lora"), "the id says llama-3.2-3b, the model is tiny"),
    (lambda: a_case().vary("x", colour=3), "has no field 'colour' to vary"),
    (lambda: a_case().vary("x", dtype="float16"), "use one of model_dtype, adapter_dtype"),
]


@pytest.mark.parametrize(("make", "fragment"), REFUSALS, ids=[fragment[:40] for _, fragment in REFUSALS])
def test_refusals(make: Callable[[], Any], fragment: str) -> None:
    """A contradictory spec is refused when it is made, and the error says why."""
    with pytest.raises(SpecError, match=fragment):
        make()


@pytest.mark.parametrize(
    ("text", "fragment"),
    [
        (b"", "Not a case"),
        (b"\xff", "Not a case"),
        (b"[" * 100_000, "Not a case"),
        (
            b'{"id": "tiny/lora", "scale": "tiny", "workload": {"kind": "finetune", "padding": "full"}}',
            r"Invalid enum value 'full' - at `\$\.workload\.padding`: use one of 'none', 'longest', 'max_length'",
        ),
        (case_to_json(a_case())[:-1] + b',"colour":3}', "unknown field `colour`"),
        (
            case_to_json(a_case()).replace(b'"adapter":{}', b'"adapter":{"rank":0}'),
            r"rank must be at least 1.*\$\.adapter",
        ),
        (
            b'{"id":"a/b","scale":"tiny","workload":{"kind":"callable","factory":"a:b","arguments":{"x":'
            + b"[" * 5000
            + b"]" * 5000
            + b"}}}",
            "Not a case",
        ),
    ],
)
def test_refused_json(text: bytes, fragment: str) -> None:
    """Bad JSON raises SpecError and nothing else; a bad field is reported with its path."""
    with pytest.raises(SpecError, match=fragment):
        case_from_json(text)


def test_vary_reaches_every_part() -> None:
    """`vary` changes a field of any part, also by its prefixed name, and can remove a whole part."""
    case = a_case("tiny/qlora", quantization=NF4)
    new = case.vary("other", rank=16, batch=8, model_dtype="float16", data_seed=3, timeout_s=120, quantization=None)
    assert new.adapter == AdapterSpec(rank=16)
    assert new.workload == FinetuneSpec(batch=8, data=DataSpec(seed=3))
    assert new.model == ModelSpec(shape="tiny", dtype="float16")
    assert (new.timeout_s, new.quantization, new.id) == (120, None, "tiny/other")


def test_an_argument_of_a_callable_is_varied_by_its_name() -> None:
    """`vary` changes an argument that the case gives and keeps the others; an argument that it does not give is refused."""
    workload = CallableSpec(factory="pkg.train:make", arguments={"batch": 4, "steps": 2})
    case = Case(id="own/train", scale="tiny", workload=workload)
    wider = case.vary("wide", batch=8).workload
    assert isinstance(wider, CallableSpec)
    assert wider.arguments == {"batch": 8, "steps": 2}
    with pytest.raises(SpecError, match=r"no field .length. to vary\. It has: arguments, batch, device"):
        case.vary("long", length=512)
    with pytest.raises(SpecError, match="use one of workload_steps, arguments_steps"):
        case.vary("more", steps=3)
    more = case.vary("more", arguments_steps=3).workload
    assert isinstance(more, CallableSpec)
    assert (more.steps, more.arguments["steps"]) == (10, 3)
