"""Find a baseline on disk: `<root>/<machine>/<shape>/<variant>.json`.

Reading fails closed: a file that differs by a byte from what `render` writes is `Damaged`. No content of a file raises.
"""

from __future__ import annotations

import hashlib
import re
from pathlib import Path
from typing import Any

import msgspec

from hpc_core.baselines.baseline import (
    Baseline,
    Damaged,
    Lookup,
    Missing,
    OlderSchema,
)
from hpc_core.baselines.transaction import recover
from hpc_core.case.case import SCHEMA, case_to_json
from hpc_core.case.errors import BaselineError
from hpc_core.record.files import read_regular
from hpc_core.record.plain import all_plain, fits, is_suspect, may_not_fit, plain

_LARGEST_BYTES = 4 * 2**20
_LONGEST_REASON = 300
_NAME = r"[a-z0-9][a-z0-9.+_-]*"
_KEY = re.compile(_NAME)
_CASE_ID = re.compile(f"{_NAME}/{_NAME}")


def baseline_path(root: Path, key: str, case_id: str) -> Path:
    """Return the path of the baseline of a case for the machine `key`.

    Raises:
        BaselineError: a key or an id that is not a plain name, and could lead out of `root`.
    """
    if not _KEY.fullmatch(key):
        raise BaselineError(f"A machine's key is a plain lower-case name such as 'cpu', got {key!r}.")
    if not _CASE_ID.fullmatch(case_id):
        raise BaselineError(f"A case id is <shape>/<variant> in lower case, got {case_id!r}.")
    shape, _, variant = case_id.partition("/")
    return root / key / shape / f"{variant}.json"


def history_path(root: Path, key: str, case_id: str) -> Path:
    """Return the path of the history of accepted records.

    Raises:
        BaselineError: as `baseline_path`.
    """
    return baseline_path(root, key, case_id).with_suffix(".history.jsonl")


def find(root: Path, key: str, case_id: str) -> Lookup:
    """Return the baseline of a case for the machine `key`, or what was found in its place. No content of a file raises.

    Raises:
        BaselineError: as `baseline_path`.
    """
    path = baseline_path(root, key, case_id)
    try:
        recover(path.parent)
        raw = read_regular(path, _LARGEST_BYTES)
    except (FileNotFoundError, NotADirectoryError):
        return Missing(path=str(path), elsewhere=_elsewhere(root, key, case_id))
    except OSError as error:
        return Damaged(path=str(path), reason=f"it cannot be read: {error.strerror or error}")
    return parsed(str(path), raw)


def parsed(path: str, raw: bytes) -> Baseline | Damaged | OlderSchema:
    """Return what the bytes of a file are; `path` only names it. No content raises."""
    try:
        return _parse(path, raw)
    except _DamageError as damage:
        return Damaged(path=path, reason=plain(str(damage), _LONGEST_REASON))


class _DamageError(Exception):
    """Carries the reason of a `Damaged`; never leaves this module."""


def _elsewhere(root: Path, key: str, case_id: str) -> tuple[str, ...]:
    try:
        others = sorted(folder.name for folder in root.iterdir() if folder.name != key and _KEY.fullmatch(folder.name))
        return tuple(other for other in others if baseline_path(root, other, case_id).is_file())
    except OSError:
        return ()


def _parse(path: str, raw: bytes) -> Baseline | OlderSchema:
    content = _intact_content(raw)
    schema = content.get("schema")
    if not isinstance(schema, int) or isinstance(schema, bool):
        raise _DamageError(f"its schema is {schema!r}, not a number")
    if schema != SCHEMA:
        return OlderSchema(path=path, found=schema)
    try:
        if may_not_fit(raw) and not fits(content):
            raise _DamageError("a whole number in it does not fit 64 bits")
        if is_suspect(raw):  # the case stays as it is, for its digest; what is shown of it is quoted
            content = {name: each if name == "spec" else all_plain(each) for name, each in content.items()}
        baseline = msgspec.convert(content, Baseline)
        contradiction = _contradiction(baseline)
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        raise _DamageError(f"it is not a baseline: {error}") from error
    if contradiction is not None:
        raise _DamageError(contradiction)
    return baseline


def _intact_content(raw: bytes) -> dict[str, Any]:
    """Return the content of the file without its checksum, if these are exactly the bytes that `render` writes for it."""
    if len(raw) > _LARGEST_BYTES:
        raise _DamageError(f"it is larger than {_LARGEST_BYTES // 2**20} MiB; a baseline takes a few KiB")
    try:
        content = msgspec.json.decode(raw)
        if not isinstance(content, dict):
            raise _DamageError(f"it holds a {type(content).__name__}, not an object")
        stated = content.pop("checksum", None)
        rendered = _rendered(content)
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        raise _DamageError(f"it is not JSON that hpc-core writes ({len(raw):,} bytes): {error}") from error
    if stated != _checksum(content):
        raise _DamageError(
            f"its checksum is {stated!r}, its content has {_checksum(content)!r} (edited by hand, or a merge)"
        )
    if rendered != raw:
        raise _DamageError(
            "its content is intact but its bytes are not those that hpc-core writes (spacing, order or line ends)"
        )
    return content


def _contradiction(baseline: Baseline) -> str | None:
    if baseline.spec.id != baseline.case:
        return f"its name says {baseline.case}, its content {baseline.spec.id}"
    if baseline.spec.digest != baseline.digest:
        return f"it states digest {baseline.digest}, its case has {baseline.spec.digest}"
    if not baseline.metrics:
        return "it holds no metric"
    loose = [name for name, metric in baseline.metrics.items() if not metric.gated]
    return f"it holds {', '.join(loose)}, never gated" if loose else None


def _checksum(content: dict[str, Any]) -> str:
    return hashlib.sha256(msgspec.json.encode(content, order="sorted")).hexdigest()[:16]


def _rendered(content: dict[str, Any]) -> bytes:
    """Return JSON with sorted keys, the checksum among them, two spaces per level, and a newline at the end."""
    text = msgspec.json.encode(content | {"checksum": _checksum(content)}, order="sorted")
    return msgspec.json.format(text, indent=2) + b"\n"


def render(baseline: Baseline) -> bytes:
    """Return the text of a baseline: the only one that is read as sound."""
    spec = msgspec.json.decode(case_to_json(baseline.spec))
    content = msgspec.to_builtins(baseline) | {"spec": spec}
    if baseline.settings is None:
        del content["settings"]  # of a record that does not know them
    return _rendered(content)
