"""Bisecting finds the first bad version, refuses ends that do not differ, and takes versions only in a sensible order."""

from __future__ import annotations

import itertools
import json
import math
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hpc_core.case.case import Case
from hpc_core.case.errors import SpecError
from hpc_core.cli import main
from hpc_core.compare.ab import SideName
from hpc_core.compare.bisect import Answer, Question, search
from hpc_core.compare.differences import Rule
from hpc_core.compare.versions import Versions
from hpc_core.record.record import Metric, Record
from tests.commands import exit_code
from tests.compare.compare_repository import CASES
from tests.compare.test_ab import step
from tests.strategies import a_case, a_record, failed_record, peak

CASE = a_case("tiny/lora")


@given(data=st.data(), count=st.integers(1, 200))
def test_the_first_bad_one_is_found(data: st.DataObject, count: int) -> None:
    """The search takes at most log2 steps; with skipped candidates, the first bad one is among the suspects."""
    first = data.draw(st.integers(0, count - 1))
    skipped = data.draw(st.sets(st.integers(0, count - 1), max_size=5)) - {count - 1}
    tried: list[int] = []

    def classify(index: int) -> Answer:
        tried.append(index)
        return Answer(word="skip" if index in skipped else "bad" if index >= first else "good", text="")

    result = search(count, classify)
    assert len(tried) == len(set(tried))
    assert first in {result.first, *result.suspects}
    assert set(result.suspects) <= skipped
    if not skipped:
        assert (result.first, result.suspects) == (first, ())
        assert len(tried) <= math.ceil(math.log2(count)) + 1


class Sides:
    """A base and an exchangeable head, each of which gives values of one metric, process after process."""

    def __init__(self, base: Metric, head: Metric | Record) -> None:
        self.sides: dict[SideName, Iterator[Metric | Record]] = {"base": itertools.repeat(base)}
        self.take(head)

    def take(self, *heads: Metric | Record) -> None:
        """Replace the head by one whose processes give these in turn."""
        self.sides["head"] = itertools.cycle(heads)

    def run(self, side: SideName, _: Case, _again: bool) -> Record:
        """Run one process."""
        result = next(self.sides[side])
        return result if isinstance(result, Record) else a_record({"metric": result})


def question(sides: Sides) -> Question:
    return Question(CASE, "metric", Rule(), sides.run)


def test_half_of_the_change_divides_good_from_bad() -> None:
    """Of a change from 100 to 200, 140 is still good and 160 is bad; a failed run is skipped."""
    sides = Sides(peak(100), peak(200))
    against_good = question(sides)
    against_good.ends("good", "bad")
    words = []
    for value in (140, 160):
        sides.take(peak(value))
        words.append(against_good.ask().word)
    sides.take(failed_record())
    assert [*words, against_good.ask().word] == ["good", "bad", "skip"]


@pytest.mark.parametrize("factor", [1.5, 1 / 1.5], ids=["slower", "faster"])
def test_time_is_bisected_by_pairs(factor: float) -> None:
    """Half of the change divides good from bad in either direction; noise that hides it is skipped."""
    sides = Sides(step(1.0), step(factor))
    sides.take(step(factor), step(factor * 1.01))
    against_good = question(sides)
    against_good.ends("good", "bad")
    words = []
    for values in ((1.0, 1.01), (factor, factor * 0.99), (0.6, 1.9)):
        sides.take(*map(step, values))
        words.append(against_good.ask().word)
    assert words == ["good", "bad", "skip"]


@pytest.mark.parametrize(
    ("base", "head", "message"),
    [
        (peak(100), peak(100), "do not differ: metric of tiny/lora is 100 B at both ends"),
        (step(1.0), step(1.02), r"do not differ beyond noise: metric 1 s → 1.02 s .* limit \+5 %"),
        (peak(100), failed_record(), "head: out_of_memory in build: 80.1 GiB asked for"),
        (peak(100), a_record({"peak_bytes": peak()}), "metric is not measured for tiny/lora. It has: peak_bytes"),
        (peak(100, gated=False), peak(200, gated=False), "is shown and not judged"),
    ],
    ids=["exact", "timed", "an end breaks", "no such metric", "not judged"],
)
def test_ends_that_do_not_differ_are_refused(base: Metric, head: Metric | Record, message: str) -> None:
    """Good and bad must differ beyond noise in a judged metric; the refusal has the numbers."""
    with pytest.raises(SpecError, match=message):
        question(Sides(base, head)).ends("v1", "v2")


def test_versions_keep_their_order() -> None:
    """The ends cut the list, and each given interpreter belongs to a version."""
    parsed = Versions.parse("transformers", "5.17,5.20,5.23,5.24", "5.20..5.24", ["5.23=/opt/v23/bin/python"])
    assert (parsed.versions, parsed.pythons) == (("5.20", "5.23", "5.24"), {"5.23": "/opt/v23/bin/python"})
    assert Versions.parse("transformers", None, "5.17..5.24", []).versions == ("5.17", "5.24")


@pytest.mark.parametrize(
    ("versions", "ends", "pythons", "message"),
    [
        ("5.17", None, [], "two versions or more"),
        (None, None, [], "two versions or more"),
        ("5.17,5.20,5.17", None, [], "named twice"),
        ("5.17,5.20", "5.17..5.24", [], "5.24 is not in --versions"),
        ("5.17,5.20", "5.20..5.17", [], "two versions or more"),
        ("5.17,5.20", "5.17", [], "not a range of versions"),
        ("5.17,5.20", None, ["5.20"], "write --python-for 5.20=PATH"),
        ("5.17,5.20", None, ["5.19=python"], "not among the versions"),
    ],
)
def test_wrong_versions_are_refused(versions: str | None, ends: str | None, pythons: list[str], message: str) -> None:
    """Each mistake in the versions has its own message."""
    with pytest.raises(SpecError, match=message):
        Versions.parse("transformers", versions, ends, pythons)


STEP = """\
import torch, toy


def make():
    return lambda: torch.ones(toy.KIB, 256).sum()
"""


@pytest.mark.nightly
def test_the_version_that_made_it_bigger_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Real workers, one interpreter per version: the jump is found with both values, and an interpreter of another version is skipped."""
    pythons = []
    for version, kib in {"1": 64, "2": 65, "3": 128}.items():
        home = tmp_path / f"toy-{version}"
        (home / f"toy-{version}.dist-info").mkdir(parents=True)
        (home / f"toy-{version}.dist-info" / "METADATA").write_text(
            f"Metadata-Version: 2.4\nName: toy\nVersion: {version}\n"
        )
        (home / "toy.py").write_text(f"KIB = {kib}\n")
        (home / "python").write_text(f'#!/bin/sh\nPYTHONPATH="{home}:$PYTHONPATH" exec {sys.executable} "$@"\n')
        (home / "python").chmod(0o755)
        pythons += ["--python-for", f"{version}={home / 'python'}"]
    (tmp_path / "perf_cases.py").write_text(CASES.replace("work.step", "step"))
    (tmp_path / "step.py").write_text(STEP)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    command = ["bisect", "own/step", "peak_bytes", "--package", "toy", "--versions", "1,1.1,2,3", *pythons]
    command += ["--python-for", f"1.1={tmp_path / 'toy-1' / 'python'}"]
    code = exit_code(main, *command, "--cases", "perf_cases.py", "--launch", "exec", "--json")
    out, err = capsys.readouterr()
    assert code == 0, err
    result = json.loads(out)
    assert result["first_bad"] == ["toy 3 (the one before it in the list is 2)"]
    assert (result["before"] // 1024, result["after"] // 1024) == (65, 128)
    assert {step["candidate"]: step["word"] for step in result["steps"]} == {"toy 1.1": "skip", "toy 2": "good"}
    assert not list(tmp_path.glob("hpc-core-ab-*"))
