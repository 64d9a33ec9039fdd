"""Asks every question in a child of its own, several at a time, and takes whatever comes of it: an answer, a crash, silence."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import msgspec

from hpc_core.cli.doctor_checks.probe import MARKER
from hpc_core.launch.interpreter import worker_environment

__all__ = ["Told", "ask"]

_AT_A_TIME = 4
_LONGEST = 300
"""Characters of an error that are kept."""


class Told(msgspec.Struct, frozen=True, kw_only=True):
    """What a child said; `error` is set where it could not answer."""

    answer: dict[str, Any] = {}
    missing: str = ""
    """The module that is not installed."""
    error: str = ""


def ask(names: Iterable[str], *, limit_s: float) -> dict[str, Told]:
    """The answers by question; a child that takes longer than `limit_s` is ended, with all that it started."""
    asked = list(names)
    with ThreadPoolExecutor(_AT_A_TIME) as pool:
        return dict(zip(asked, pool.map(lambda name: _one(name, limit_s), asked), strict=True))


def _one(name: str, limit_s: float) -> Told:
    child = subprocess.Popen(
        [sys.executable, "-m", "hpc_core.cli.doctor_checks.probe", name],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=os.environ | worker_environment(None),
        start_new_session=True,
        text=True,
        errors="replace",
    )
    try:
        out, trouble = child.communicate(timeout=limit_s)
    except subprocess.TimeoutExpired:
        _end(child)
        return Told(error=f"importing it took longer than {limit_s:.0f} s, and was ended")
    finally:
        _end(child)
    return _heard(out, trouble, child.returncode)


def _end(child: subprocess.Popen[str]) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(child.pid, signal.SIGKILL)
    child.wait()


def _heard(out: str, trouble: str, code: int) -> Told:
    lines = [line.removeprefix(MARKER) for line in out.splitlines() if line.startswith(MARKER)]
    try:
        said = json.loads(lines[-1])
        return Told(
            answer=said.get("answer", {}), missing=said.get("missing", ""), error=_short(str(said.get("error", "")))
        )
    except (IndexError, ValueError, AttributeError):
        died = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
        last = (trouble.strip().splitlines() or ["it said nothing"])[-1]
        return Told(error=_short(f"importing it ended the process with {died}: {last}"))


def _short(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}…"
