"""The result of `find`, whatever is in the baseline's place."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Any

import msgspec
import pytest

from hpc_core.baselines.accept import accept
from hpc_core.baselines.baseline import Baseline, Damaged, Missing, OlderSchema
from hpc_core.baselines.lookup import baseline_path, find
from hpc_core.case.errors import BaselineError
from tests.strategies import CPU, H100, a_record, around, wall

CASE = "tiny/lora"


def look(root: Path) -> Any:
    return find(root, H100.key, CASE)


def place(root: Path) -> Path:
    return baseline_path(root, H100.key, CASE)


def sealed(content: dict[str, Any]) -> bytes:
    """The bytes of a file with this content and a valid checksum."""
    content.pop("checksum", None)
    checksum = hashlib.sha256(msgspec.json.encode(content, order="sorted")).hexdigest()[:16]
    text = msgspec.json.encode(content | {"checksum": checksum}, order="sorted")
    return msgspec.json.format(text, indent=2) + b"\n"


def test_missing_names_who_has_one(tmp_path: Path) -> None:
    """A missing baseline says which machines have one."""
    assert look(tmp_path / "nowhere") == Missing(path=str(place(tmp_path / "nowhere")))
    accept(tmp_path, a_record(circumstances=around(CPU)), reason="r")
    (tmp_path / "README").write_text("not a machine")
    assert look(tmp_path) == Missing(path=str(place(tmp_path)), elsewhere=("cpu",))


@pytest.mark.parametrize("key", ["", "..", "../x", "a/b", "/etc", "CPU", "cpu\n", ".hidden"])
def test_keys_that_lead_out_are_refused(tmp_path: Path, key: str) -> None:
    """A machine's key is a plain name."""
    with pytest.raises(BaselineError, match="A machine's key is a plain lower-case name"):
        find(tmp_path, key, CASE)


@pytest.mark.parametrize("case_id", ["", "lora", "../x", "tiny/../../x", "tiny/..", "a/b/c", "tiny/lora\n"])
def test_ids_that_lead_out_are_refused(tmp_path: Path, case_id: str) -> None:
    """A case id is a plain name too."""
    with pytest.raises(BaselineError, match="A case id is <shape>/<variant>"):
        find(tmp_path, "cpu", case_id)


JUNK: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "not JSON"),
    "no JSON": (b"{", "not JSON"),
    "not UTF-8": (b'"\xff\xfe"', "not JSON"),
    "a list": (b"[]\n", "a list, not an object"),
    "null": (b"null", "a NoneType, not an object"),
    "no checksum": (b"{}\n", "its checksum is None"),
    "NaN": (b'{"metrics": NaN}', "not JSON"),
    "deep nesting": (b"[" * 200_000, "not JSON"),
    "a deep tree": (b'{"a":' * 50_000 + b"1" + b"}" * 50_000, "not JSON"),
    "10 MB": (b" " * 10_000_000, "larger than 4 MiB"),
    "a lone surrogate": (b'{"a": "\\ud800"}', "not JSON"),
    "no schema": (sealed({"a": 1}), "its schema is None"),
    "a true schema": (sealed({"schema": True}), "its schema is True"),
    "no fields": (sealed({"schema": 1}), "it is not a baseline"),
}


@pytest.mark.parametrize(("content", "fragment"), JUNK.values(), ids=JUNK)
def test_junk_is_damaged(tmp_path: Path, content: bytes, fragment: str) -> None:
    """Whatever a file holds, `find` says what is wrong and does not raise."""
    place(tmp_path).parent.mkdir(parents=True)
    place(tmp_path).write_bytes(content)
    lookup = look(tmp_path)
    assert isinstance(lookup, Damaged)
    assert fragment in lookup.reason


def test_what_is_not_a_file_is_damaged(tmp_path: Path) -> None:
    """A folder, a pipe or a name that is too long is Damaged at once; a broken link is Missing."""
    place(tmp_path).mkdir(parents=True)
    assert "Is a directory" in look(tmp_path).reason
    place(tmp_path).rmdir()
    os.mkfifo(place(tmp_path))
    assert "not a regular file" in look(tmp_path).reason
    place(tmp_path).unlink()
    place(tmp_path).symlink_to(tmp_path / "gone")
    assert isinstance(look(tmp_path), Missing)
    assert isinstance(find(tmp_path, "cpu", f"tiny/{'x' * 300}"), Damaged | Missing)
    (tmp_path / "cpu").write_text("a file where a folder should be")
    assert isinstance(find(tmp_path, "cpu", CASE), Missing)


def test_accepting_over_a_folder_says_so(tmp_path: Path) -> None:
    """A path that cannot be replaced is an error that names it."""
    place(tmp_path).mkdir(parents=True)
    with pytest.raises(BaselineError, match=r"lora\.json: cannot be written"):
        accept(tmp_path, a_record(), reason="r")


@pytest.mark.parametrize("schema", [0, 2, 99, -1])
def test_another_schema_is_recognized(tmp_path: Path, schema: int) -> None:
    """An intact file of another schema, whatever its fields, is not damaged."""
    place(tmp_path).parent.mkdir(parents=True)
    place(tmp_path).write_bytes(sealed({"schema": schema, "values": [1, 2]}))
    assert look(tmp_path) == OlderSchema(path=str(place(tmp_path)), found=schema, known=1)


@pytest.mark.parametrize(
    ("change", "fragment"),
    [
        ({"case": "tiny/other"}, "its name says tiny/other, its content tiny/lora"),
        ({"digest": "0" * 12}, "states digest 000000000000"),
        ({"metrics": {}}, "it holds no metric"),
        ({"metrics": {"step_s": msgspec.to_builtins(wall())}}, "it holds step_s, never gated"),
        ({"metrics": {"busy_s": {"value": None}}}, "it is not a baseline"),
        ({"colour": 3}, "unknown field"),
        ({"accepted": None}, "it is not a baseline"),
    ],
)
def test_sealed_contradictions_are_damaged(tmp_path: Path, change: dict[str, Any], fragment: str) -> None:
    """A correct checksum over contradictory content does not help."""
    accept(tmp_path, a_record(), reason="r")
    content = msgspec.json.decode(place(tmp_path).read_bytes())
    place(tmp_path).write_bytes(sealed(content | change))
    lookup = look(tmp_path)
    assert isinstance(lookup, Damaged)
    assert fragment in lookup.reason


def test_other_line_ends_are_damaged(tmp_path: Path) -> None:
    """The bytes must be exactly those written, even if the content is intact."""
    accept(tmp_path, a_record(), reason="r")
    place(tmp_path).write_bytes(place(tmp_path).read_bytes().replace(b"\n", b"\r\n"))
    assert "bytes are not those that hpc-core writes" in look(tmp_path).reason
    assert accept(tmp_path, a_record(), reason="anew").action == "updated"
    assert isinstance(look(tmp_path), Baseline)
