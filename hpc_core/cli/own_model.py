"""A case from a model of one's own: `--model PATH_OR_HUB_ID --method lora`. Reads no configuration; the worker does."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, Literal

import msgspec

from hpc_core.case.case import Case
from hpc_core.case.errors import SpecError
from hpc_core.case.parts import ModelSpec
from hpc_core.catalogue import (
    finetune,
    full,
    generate,
    lora,
    qlora,
)

__all__ = ["Way", "case_of_model", "context_length"]

Way = Literal["full", "lora", "qlora", "generate"]
_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?", re.ASCII)
_NOT_IN_AN_ID = re.compile(r"[^a-z0-9.+_-]+")


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
