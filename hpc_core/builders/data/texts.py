"""Texts of a data set: from the package, through `datasets`, or from a local file.

`datasets`, which loads torch if it is installed, is imported only for source="hub". A row's text never contains its line end, so the
hub's wikitext and the same file from disk give equal rows.
"""

from __future__ import annotations

import importlib
import json
import os
from importlib.resources import files
from pathlib import Path
from typing import Any

import msgspec

from hpc_core.case.errors import DataError, MissingDataError, MissingLibraryError
from hpc_core.case.parts import DataSpec

_FIELDS = ("question", "text")
"""Fields of a JSON line that may contain its text. The first one found counts."""

_HUB = {
    "gsm8k": ("openai/gsm8k", "main", "question"),
    "wikitext2": ("Salesforce/wikitext", "wikitext-2-raw-v1", "text"),
}
"""Repository, configuration and field. The split is "test", as for the recorded lengths."""
_LOCAL = {"gsm8k": "gsm8k/test.jsonl", "wikitext2": "wikitext2/wiki.test.raw"}
"""The same split as a file, in the folder of the environment variable HPC_CORE_DATA."""


class Problem(msgspec.Struct, frozen=True):
    """A word problem and its worked answer, which ends in `#### <number>`."""

    question: str
    answer: str


def texts(data: DataSpec) -> list[str]:
    """Return the rows of an embedded, hub or file data set; with `data.rows`, the first ones.

    A blank line of a text file is an empty row, as in wikitext. Blank lines between JSON lines are ignored.

    Raises:
        DataError: the source has no texts, the file is missing, empty or malformed, the hub cannot be reached, or
            there are fewer rows than asked for.
        MissingLibraryError: source="hub" without the package `datasets`.
    """
    if data.source == "embedded":
        rows = _embedded(data.name or "")
    elif data.source == "hub":
        rows = _hub(data.name or "")
    elif data.source == "file":
        rows = _file(Path(data.name or "").expanduser())
    else:
        raise DataError(
            f"source={data.source!r} has token ids but no texts: get them from token_rows, or use source='embedded'."
        )
    if data.rows is None:
        return rows
    if data.rows > len(rows):
        raise DataError(
            f"{data.rows} rows were asked of {data.name!r} ({data.source}), which has {len(rows)}: "
            f"use rows={len(rows)} or fewer, or omit rows to take all."
        )
    return rows[: data.rows]


def problems() -> list[Problem]:
    """Return the word problems in the package, with their worked answers."""
    return [msgspec.json.decode(line, type=Problem) for line in _packaged("problems.jsonl").splitlines()]


def _packaged(name: str) -> str:
    return files("hpc_core.builders.data").joinpath("embedded", name).read_text(encoding="utf-8")


def _embedded(name: str) -> list[str]:
    if name == "problems":
        return [problem.question for problem in problems()]
    return _lines(_packaged("paragraphs.txt"))


def _lines(content: str) -> list[str]:
    """Return one row per line. A blank line is an empty row; the end of the last line does not begin another row."""
    return [line if line.strip() else "" for line in content.removesuffix("\n").split("\n")]


def _hub(name: str) -> list[str]:
    """Return the data set's test split: from the folder HPC_CORE_DATA if it is there, otherwise through `datasets`."""
    local = Path(os.environ.get("HPC_CORE_DATA", "")) / _LOCAL[name]
    if os.environ.get("HPC_CORE_DATA") and local.is_file():
        return _file(local)
    return _through_datasets(*_HUB[name])


def _through_datasets(repository: str, configuration: str, field: str) -> list[str]:
    try:
        datasets = importlib.import_module("datasets")
    except ImportError as error:
        raise MissingLibraryError(
            f"source='hub' reads {repository} through the package datasets, which is not installed: "
            "pip install 'hpc-core[hub]' (or pip install datasets)."
        ) from error
    try:
        table: Any = datasets.load_dataset(repository, configuration, split="test")
    # Every cause (no network, no such repository, a broken cache) has the same remedy.
    except Exception as error:
        raise MissingDataError(
            f"{repository} ({configuration}, test) could not be loaded: {type(error).__name__}: {error}. "
            "Without the hub, put its files into the folder HPC_CORE_DATA, use source='file' with a local "
            "copy, or source='embedded'."
        ) from error
    if field not in table.column_names:
        raise DataError(
            f"{repository} ({configuration}, test) has no field {field!r} but {', '.join(table.column_names)}: "
            "save the texts to a file and give source='file'."
        )
    return [str(row).removesuffix("\n") for row in table[field]]


def _file(path: Path) -> list[str]:
    readers = {".jsonl": _json_lines, ".txt": _text_lines, ".raw": _text_lines}
    reader = readers.get(path.suffix.lower())
    if reader is None:
        raise DataError(
            f"{path} ends in {path.suffix or 'nothing'!r}: name it .jsonl (one JSON object a line) "
            "or .txt or .raw (one row a line)."
        )
    try:
        content = path.read_text(encoding="utf-8-sig")  # some editors write a byte order mark
    except FileNotFoundError as error:
        raise DataError(
            f"No file at {path} (looked for {path.absolute()}): correct name=, or give source='embedded'."
        ) from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 at byte {error.start}: convert it to UTF-8.") from error
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}. Name a readable file in name=.") from error
    if not content.strip():
        raise DataError(f"{path} holds no text ({len(content)} characters, all blank): name a file with rows in it.")
    return reader(content, path)


def _text_lines(content: str, path: Path) -> list[str]:
    return _lines(content)


def _json_lines(content: str, path: Path) -> list[str]:
    numbered = enumerate(content.split("\n"), start=1)
    return [_json_text(line, f"{path} line {number}") for number, line in numbered if line.strip()]


def _json_text(line: str, place: str) -> str:
    try:
        value = json.loads(line)
    except json.JSONDecodeError as error:
        raise DataError(
            f"{place} is not JSON: {error.msg} at column {error.colno}. Each line must be one JSON object."
        ) from error
    if not isinstance(value, dict):
        raise DataError(f"{place} holds a JSON {type(value).__name__}: each line must be one JSON object.")
    field = next((field for field in _FIELDS if field in value), None)
    wanted = " or ".join(repr(field) for field in _FIELDS)
    if field is None:
        raise DataError(f"{place} has no field {wanted} but {', '.join(map(repr, value)) or 'none'}: rename one.")
    if not isinstance(value[field], str):
        raise DataError(f"{place}: {field!r} is {type(value[field]).__name__}, not text: give a string there.")
    return str(value[field])
