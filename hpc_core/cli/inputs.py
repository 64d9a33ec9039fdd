"""What a user writes on the command line, as values: a case by its id or by a model, changes of a case, sizes, durations, ratios."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
import typer

from hpc_core.case.case import Case, changed
from hpc_core.case.errors import SpecError
from hpc_core.case.limits import relative_limit
from hpc_core.case.parts import ModelSpec
from hpc_core.case.select import load_case_file, near
from hpc_core.case.shapes import MODELS
from hpc_core.catalogue import (
    ALL,
    DATA,
    INT4,
    SWEEP,
    TINY_DATA,
    TRIAL,
    finetune,
    full,
    generate,
    lora,
    qlora,
)
from hpc_core.catalogue.architectures import CASES as ARCHITECTURES
from hpc_core.catalogue.predicted import PREDICTED
from hpc_core.catalogue.shorthand import model_of
from hpc_core.record.files import read_regular
from hpc_core.record.plain import plain

Files = Annotated[list[Path] | None, typer.Option("--cases", help="A Python file whose CASES are added; repeatable.")]
Method = Literal["full", "lora", "qlora", "generate"]
_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?", re.ASCII)
_UNITS = {"": 1, "b": 1, "kib": 2**10, "mib": 2**20, "gib": 2**30, "kb": 10**3, "mb": 10**6, "gb": 10**9}
_SIZE = re.compile(r"(?P<number>[0-9]{1,15}(\.[0-9]{1,9})?) ?(?P<unit>[a-z]*)", re.IGNORECASE)
_DURATION = re.compile(r"(?P<number>[0-9]{1,6}(\.[0-9]{1,3})?) ?(?P<unit>s|m|h|)")
_SECONDS = {"": 1.0, "s": 1.0, "m": 60.0, "h": 3600.0}
_NOT_IN_AN_ID = re.compile(r"[^a-z0-9.+_-]+")
_LONGEST_ID = 60


def suite_cases(files: list[Path] | None) -> dict[str, Case]:
    """Return the cases of the suite and of these files, by id.

    Raises:
        SpecError: a file cannot be read, or holds no cases.
    """
    return {case.id: case for case in [*ALL, *_own(files)]}


def known_cases(files: list[Path] | None) -> dict[str, Case]:
    """Return every case that a command can name: the catalogue's and those of these files, by id.

    Raises:
        SpecError: a file cannot be read, or holds no cases.
    """
    own = _own(files)
    return {
        case.id: case for case in [*ALL, *TRIAL, *SWEEP, *DATA, *TINY_DATA, *INT4, *PREDICTED, *ARCHITECTURES, *own]
    }


def _own(files: list[Path] | None) -> list[Case]:
    return [case for path in files or [] for case in load_case_file(path)]


def known_case(case_id: str, files: list[Path] | None) -> Case:
    """Return the case of this id.

    Raises:
        SpecError: there is no such case; the message names similar ones.
    """
    known = known_cases(files)
    if case_id not in known:
        close = ", ".join(near(case_id, known)) or "none; see hpc-core cases"
        raise SpecError(f"no case is called {case_id!r}. Near: {close}.")
    return known[case_id]


def case_of_model(model: str, method: Method) -> Case:
    """Return a case that trains, or generates with, random weights in the shape of this model's configuration.

    `model` is a local folder with a config.json, such a file, a row of `hpc_core/case/models.jsonl`, or a hub id. All else has its default: batches of 4 x 512
    tokens, rank 8, bfloat16.

    Raises:
        SpecError: the model is neither a file with a configuration nor a hub id.
    """
    path = Path(model).expanduser()
    if not path.exists() and model in MODELS:
        return _case_of_row(model, method)
    if not path.exists() and (not _HUB_ID.fullmatch(model) or model.startswith(".")):
        raise SpecError(f"--model {model}: no such folder or file, and not a hub id. Give a folder with a config.json.")
    if path.is_dir() and not (path / "config.json").is_file():
        raise SpecError(f"--model {model}: the folder has no config.json.")
    spec = ModelSpec(weights="config", path=str(path) if path.exists() else model)
    settings: dict[str, Any] = {"prefix": _prefix(path), "scale": "full"}
    if method == "generate":
        return generate(spec, prompts=1, **settings)
    return finetune(spec, {"full": full, "lora": lora(), "qlora": qlora()}[method], **settings)


def _case_of_row(name: str, method: Method) -> Case:
    model = model_of(name)
    if method == "generate":
        return generate(model, prompts=1)
    targets = MODELS[name].targets
    return finetune(model, {"full": full, "lora": lora(targets=targets), "qlora": qlora(targets=targets)}[method])


def context_length(model: ModelSpec) -> int | None:
    """Return the model's context length in tokens; None if its configuration is not on this machine."""
    path = Path(model.path or "")
    file = path / "config.json" if path.is_dir() else path
    try:
        configuration = msgspec.json.decode(read_regular(file), type=dict[str, Any])
    except (OSError, msgspec.MsgspecError):
        return None
    length = configuration.get("max_position_embeddings")
    return length if isinstance(length, int) and length > 1 else None


def _prefix(path: Path) -> str:
    """Return the first part of the case's id: the name of the model."""
    named = path.resolve() if path.exists() else path
    name = named.parent.name if named.suffix == ".json" else named.name
    return _NOT_IN_AN_ID.sub("-", name.lower()).lstrip(".+_-") or "own"


def parse_changes(texts: Sequence[str]) -> dict[str, Any]:
    """Return changes by field, from texts such as "batch=8". A value is JSON if it can be parsed, else text.

    Raises:
        SpecError: a text has no "=", or a field is named twice.
    """
    changes: dict[str, Any] = {}
    for text in texts:
        field, value = _halves("--set", text)
        if field in changes:
            raise SpecError(f"--set {field} is given twice: {changes[field]!r} and {value!r}.")
        changes[field] = _value(value)
    return changes


def parse_sweep(text: str) -> tuple[str, list[Any]]:
    """Return a field and its values, from a text such as "batch=1,2,4" or 'targets=[["q_proj"],["q_proj","v_proj"]]'.

    Raises:
        SpecError: the text has no "=", or no value.
    """
    field, listed = _halves("--sweep", text)
    whole = _value(listed)
    values = whole if isinstance(whole, list) else [_value(part.strip()) for part in listed.split(",") if part.strip()]
    if not values:
        raise SpecError(f"--sweep {text}: no value. Write several: --sweep {field}=1,2,4.")
    return field, values


def with_changes(case: Case, changes: dict[str, Any]) -> Case:
    """Return the case with these changes and an id that names them; the case itself if nothing changes.

    Raises:
        SpecError: a field is unknown or ambiguous, or a value is wrong or contradicts another.
    """
    if not changes:
        return case
    variant = case.id.partition("/")[2]
    suffix = "".join(f"+{name}-{_plain(value)}" for name, value in changes.items())
    found = changed(case, f"{variant}{suffix}"[:_LONGEST_ID], changes)
    return case if found.digest == case.digest else found


def parse_bytes(option: str, text: str) -> int:
    """Return bytes, from "1GiB", "512 MiB" or "0".

    Raises:
        SpecError: the text is not a size.
    """
    match = _SIZE.fullmatch(text.strip())
    if match is None or match["unit"].lower() not in _UNITS:
        raise SpecError(f"{option} {text!r} is not a size: write 1GiB, 512MiB or a number of bytes.")
    return round(float(match["number"]) * _UNITS[match["unit"].lower()])


def parse_duration(option: str, text: str) -> float:
    """Return seconds, from "10m", "90s" or "1.5h".

    Raises:
        SpecError: the text is not a duration above 0.
    """
    match = _DURATION.fullmatch(text.strip())
    seconds = 0.0 if match is None else float(match["number"]) * _SECONDS[match["unit"]]
    if not seconds > 0:
        raise SpecError(f"{option} {text!r} is not a duration: write 10m, 90s or 1.5h.")
    return seconds


def parse_ratio(option: str, text: str) -> float:
    """Return a ratio, from "10%".

    Raises:
        SpecError: the text is not a percentage.
    """
    try:
        return relative_limit(text) or 0.0
    except SpecError as error:
        raise SpecError(f"{option} {text!r} is not a percentage: write {option} 5%.") from error


def _halves(option: str, text: str) -> tuple[str, str]:
    if plain(text) != text:
        raise SpecError(f"{option} {text!r} is not plain text in UTF-8.")
    field, equals, value = text.partition("=")
    if not equals or not field.strip():
        raise SpecError(f"{option} {text!r} names no field: write {option} batch=8.")
    return field.strip(), value.strip()


def _value(text: str) -> Any:
    try:
        return msgspec.json.decode(text)
    except msgspec.DecodeError:
        return text


def _plain(value: Any) -> str:
    text = value if isinstance(value, str) else msgspec.json.encode(value).decode()
    return _NOT_IN_AN_ID.sub("-", text.lower()).strip("-")
