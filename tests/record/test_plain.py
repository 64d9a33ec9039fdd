"""Control characters in other people's texts reach neither the terminal nor a stored file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hpc_core.baselines.accept import accept
from hpc_core.baselines.baseline import Baseline
from hpc_core.baselines.lookup import baseline_path, find, render
from hpc_core.cli import main
from hpc_core.record.plain import all_plain, is_suspect
from hpc_core.record.record import Record, record_to_json
from tests.commands import exit_code
from tests.strategies import H100, a_case, a_record, around, counted, peak

ESCAPE = "\x1b]0;owned\x07\x1b[31mred\u202e\x9b2J\r"


def hostile(value: int = 1) -> Record:
    """A record with escape sequences in every free text."""
    case = a_case()
    return a_record(
        {
            "peak_bytes": peak(2**30 * value, note=ESCAPE),
            f"operators{ESCAPE}": counted(1600 + value, unit=f"1 per {ESCAPE}"),
        },
        case=case,
        makers_at_peak={f"activations {ESCAPE}": 2**30 * value},
        circumstances=around(
            msgspec.structs.replace(H100, name=f"H100{ESCAPE}"),
            stack={"torch": f"2.{value}{ESCAPE}", ESCAPE: ESCAPE},
            commit=f"{value}{ESCAPE}",
            notes=(ESCAPE,),
        ),
    )


def written(path: Path, record: Record) -> Path:
    path.write_bytes(record_to_json(record))
    return path


def test_commands_print_no_escape_of_a_foreign_record(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """No command prints or stores an escape sequence of a record."""
    root = tmp_path / "baselines"
    one, other = written(tmp_path / "one.json", hostile(1)), written(tmp_path / "other.json", hostile(3))
    commands: list[list[Any]] = [
        ["baseline", "accept", one, "--reason", f"why{ESCAPE}", "--baselines", root],
        ["baseline", "accept", other, "--reason", "why", "--baselines", root],
        ["baseline", "diff", one, "--baselines", root],
        ["baseline", "diff", one, other],
        ["baseline", "list", "--baselines", root],
        ["baseline", "show", "tiny/lora", "--baselines", root],
        ["explain", one, "--baselines", root],
        ["explain", one, "--against", other],
        ["history", "tiny/lora", "--baselines", root, "--no-git"],
        ["report", one, "--baselines", root],
    ]
    for command in commands:
        assert exit_code(main, *command) in (0, 1)
        out, err = capsys.readouterr()
        assert not {"\x1b", "\x07", "\u202e", "\x9b", "\r"} & {*out, *err}, command
    for path in root.rglob("*.json*"):
        assert not is_suspect(path.read_bytes()) or b"\\u001b" not in path.read_bytes(), path


def test_a_foreign_baseline_is_read_without_escapes(tmp_path: Path) -> None:
    """A baseline with a valid checksum is read without its escape sequences."""
    accept(tmp_path, a_record(), reason="why")
    path = baseline_path(tmp_path, H100.key, "tiny/lora")
    baseline = find(tmp_path, H100.key, "tiny/lora")
    assert isinstance(baseline, Baseline)
    accepted = msgspec.structs.replace(baseline.accepted, reason=f"why{ESCAPE}")
    path.write_bytes(render(msgspec.structs.replace(baseline, accepted=accepted, stack={"torch": ESCAPE})))
    assert b"\\u001b" in path.read_bytes()
    baseline = find(tmp_path, H100.key, "tiny/lora")
    assert isinstance(baseline, Baseline)
    assert "\x1b" not in baseline.accepted.reason + baseline.stack["torch"]
    assert baseline.accepted.reason.startswith("why\ufffd]0;owned\ufffd")


def test_an_error_repeats_no_escape(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Error messages contain field names and file names without escape sequences."""
    path = tmp_path / f"bad{ESCAPE}.json"
    path.write_text(json.dumps({"schema": 1, ESCAPE: 1}))
    assert exit_code(main, "explain", path) == 2
    err = capsys.readouterr().err
    assert "\x1b" not in err
    assert err.count("\n") == 1


@given(st.text(st.sampled_from('a"\\\n\r\x1b\u202e\ud800\udfff\u2026é'), max_size=12), st.booleans())
def test_no_such_character_is_overlooked(text: str, ascii_only: bool) -> None:
    """`is_suspect` finds every control character in JSON bytes, however it is escaped."""
    if not ascii_only:
        text = text.encode("utf-8", "replace").decode()
    raw = json.dumps(text, ensure_ascii=ascii_only).encode()
    if all_plain(text) != text:
        assert is_suspect(raw)
