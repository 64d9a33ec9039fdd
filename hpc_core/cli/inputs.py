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
from hpc_core.catalogue.predicted import PREDICTED

Files = Annotated[list[Path] | None, typer.Option("--cases", help="A Python file whose CASES count too; repeatable.")]


def suite_cases(files: list[Path] | None) -> dict[str, Case]:
    """What runs where nobody names a case: the suite's and those of these files, by id.

    Raises:
        SpecError: a file that is none, or holds no cases.
    """
    return {case.id: case for case in [*ALL, *_own(files)]}


def known_cases(files: list[Path] | None) -> dict[str, Case]:
    """Whatever can be named: the catalogue's cases and those of these files, by id.

    Raises:
        SpecError: a file that is none, or holds no cases.
    """
    own = _own(files)
    return {case.id: case for case in [*ALL, *TRIAL, *SWEEP, *DATA, *TINY_DATA, *INT4, *PREDICTED, *own]}


def _own(files: list[Path] | None) -> list[Case]:
    return [case for path in files or [] for case in load_case_file(path)]


def known_case(case_id: str, files: list[Path] | None) -> Case:
    """The case of this id.

    Raises:
        SpecError: there is none; the message names those that are near.
    """
    known = known_cases(files)
    if case_id not in known:
        close = ", ".join(near(case_id, known)) or "none; see hpc-core cases"
        raise SpecError(f"no case is called {case_id!r}. Near: {close}.")
    return known[case_id]


Way = Literal["full", "lora", "qlora", "generate"]
_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?", re.ASCII)


def case_of_model(model: str, way: Way) -> Case:
    """The case that trains, or generates with, random weights in the shape of this model's configuration.

    `model` is a local folder with a config.json, such a file, or a hub id. Everything else is as in the specifications'
    defaults: rows of 4 x 512, rank 8, bfloat16.

    Raises:
        SpecError: there is no such file, and it is no hub id either.
    """
    path = Path(model).expanduser()
    if not path.exists() and (not _HUB_ID.fullmatch(model) or model.startswith(".")):
        raise SpecError(f"--model {model}: no such folder or file, and no hub id. Give a folder with a config.json.")
    if path.is_dir() and not (path / "config.json").is_file():
        raise SpecError(f"--model {model}: the folder holds no config.json.")
    spec = ModelSpec(weights="config", path=str(path) if path.exists() else model)
    settings: dict[str, Any] = {"prefix": _prefix(path), "scale": "full"}
    if way == "generate":
        return generate(spec, prompts=1, **settings)
    return finetune(spec, {"full": full, "lora": lora(), "qlora": qlora()}[way], **settings)


def context_length(model: ModelSpec) -> int | None:
    """How many tokens the model is made for, where a configuration on this machine says so."""
    path = Path(model.path or "")
    file = path / "config.json" if path.is_dir() else path
    try:
        said = msgspec.json.decode(file.read_bytes(), type=dict[str, Any])
    except (OSError, msgspec.MsgspecError):
        return None
    length = said.get("max_position_embeddings")
    return length if isinstance(length, int) and length > 1 else None


def _prefix(path: Path) -> str:
    """What the case's id begins with: the model's own name."""
    named = path.resolve() if path.exists() else path
    name = named.parent.name if named.suffix == ".json" else named.name
    return _NOT_IN_AN_ID.sub("-", name.lower()).lstrip(".+_-") or "own"


_UNITS = {"": 1, "b": 1, "kib": 2**10, "mib": 2**20, "gib": 2**30, "kb": 10**3, "mb": 10**6, "gb": 10**9}
_SIZE = re.compile(r"(?P<number>[0-9]{1,15}(\.[0-9]{1,9})?) ?(?P<unit>[a-z]*)", re.IGNORECASE)
_NOT_IN_AN_ID = re.compile(r"[^a-z0-9.+_-]+")
_LONGEST_ID = 60
_DURATION = re.compile(r"(?P<number>[0-9]{1,6}(\.[0-9]{1,3})?) ?(?P<unit>s|m|h|)")
_SECONDS = {"": 1.0, "s": 1.0, "m": 60.0, "h": 3600.0}


def parse_changes(said: Sequence[str]) -> dict[str, Any]:
    """Changes by field, from texts such as "batch=8"; a value is JSON where it can be read as such, else text.

    Raises:
        SpecError: a text without "=", or a field that is named twice.
    """
    changes: dict[str, Any] = {}
    for text in said:
        field, value = _halves("--set", text)
        if field in changes:
            raise SpecError(f"--set {field} is said twice: {changes[field]!r} and {value!r}.")
        changes[field] = _value(value)
    return changes


def parse_sweep(text: str) -> tuple[str, list[Any]]:
    """A field and its values, from a text such as "batch=1,2,4" or 'targets=[["q_proj"],["q_proj","v_proj"]]'.

    Raises:
        SpecError: a text without "=", or without a value.
    """
    field, said = _halves("--sweep", text)
    whole = _value(said)
    values = whole if isinstance(whole, list) else [_value(part.strip()) for part in said.split(",") if part.strip()]
    if not values:
        raise SpecError(f"--sweep {text}: says no value. Say several: --sweep {field}=1,2,4.")
    return field, values


def with_changes(case: Case, changes: dict[str, Any]) -> Case:
    """The case with these changes, under an id that says them; the case itself where nothing changes.

    Raises:
        SpecError: an unknown or ambiguous field, a wrong value, or a contradiction.
    """
    if not changes:
        return case
    variant = case.id.partition("/")[2]
    said = "".join(f"+{name}-{_plain(value)}" for name, value in changes.items())
    found = changed(case, f"{variant}{said}"[:_LONGEST_ID], changes)
    return case if found.digest == case.digest else found


def parse_bytes(option: str, text: str) -> int:
    """Bytes, from "1GiB", "512 MiB" or "0".

    Raises:
        SpecError: a text that is no size.
    """
    match = _SIZE.fullmatch(text.strip())
    if match is None or match["unit"].lower() not in _UNITS:
        raise SpecError(f"{option} {text!r} is no size: say 1GiB, 512MiB or a number of bytes.")
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
    field, equals, value = text.partition("=")
    if not equals or not field.strip():
        raise SpecError(f"{option} {text!r} says no field: say {option} batch=8.")
    return field.strip(), value.strip()


def _value(text: str) -> Any:
    try:
        return msgspec.json.decode(text)
    except msgspec.DecodeError:
        return text


def _plain(value: Any) -> str:
    text = value if isinstance(value, str) else msgspec.json.encode(value).decode()
    return _NOT_IN_AN_ID.sub("-", text.lower()).strip("-")
