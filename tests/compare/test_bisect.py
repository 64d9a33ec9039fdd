"""Bisecting: the search finds what it must, asks only where ends differ, and takes versions only in an order that makes sense."""

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
from hpc_core.compare.bisect import Answer, Question, Versions, search
from hpc_core.compare.differences import Rule
from hpc_core.compare.trial import SideName
from hpc_core.record.record import Metric, Record
from tests.compare.test_ab import step
from tests.strategies import a_case, a_record, failed_record, peak

CASE = a_case("tiny/lora")


@given(data=st.data(), count=st.integers(1, 200))
def test_the_first_bad_one_is_found(data: st.DataObject, count: int) -> None:
    """In at most log2 steps where every candidate answers; where some do not, the first one is among what is named."""
    first = data.draw(st.integers(0, count - 1))
    silent = data.draw(st.sets(st.integers(0, count - 1), max_size=5)) - {count - 1}
    asked: list[int] = []

    def classify(index: int) -> Answer:
        asked.append(index)
        return Answer(word="skip" if index in silent else "bad" if index >= first else "good", text="")

    found = search(count, classify)
    assert len(asked) == len(set(asked))
    assert first in {found.first, *found.suspects}
    assert set(found.suspects) <= silent
    if not silent:
        assert (found.first, found.suspects) == (first, ())
        assert len(asked) <= math.ceil(math.log2(count)) + 1


class Heads:
    """Runs base and a head that can be exchanged: values of one metric, process after process."""

    def __init__(self, base: Metric, head: Metric | Record) -> None:
        self.sides: dict[SideName, Iterator[Metric | Record]] = {"base": itertools.repeat(base)}
        self.take(head)

    def take(self, *head: Metric | Record) -> None:
        """Another head, whose processes give these in turn."""
        self.sides["head"] = itertools.cycle(head)

    def run(self, side: SideName, _: Case, _again: bool) -> Record:
        """One process."""
        given_ = next(self.sides[side])
        return given_ if isinstance(given_, Record) else a_record({"metric": given_})


def question(heads: Heads) -> Question:
    return Question(CASE, "metric", Rule(), heads.run)


def test_half_of_the_change_divides_good_from_bad() -> None:
    """Small drift before the jump is not the jump: 100 → 200 was the change, 140 is still good and 160 bad."""
    heads = Heads(peak(100), peak(200))
    asked = question(heads)
    asked.ends("good", "bad")
    words = []
    for value in (140, 160):
        heads.take(peak(value))
        words.append(asked.ask().word)
    heads.take(failed_record())
    assert [*words, asked.ask().word] == ["good", "bad", "skip"]


@pytest.mark.parametrize("factor", [1.5, 1 / 1.5], ids=["slower", "faster"])
def test_time_is_bisected_by_pairs(factor: float) -> None:
    """A timed metric is classified by the same half way, in either direction; noise that hides it is a skip."""
    heads = Heads(step(1.0), step(factor))
    heads.take(step(factor), step(factor * 1.01))
    asked = question(heads)
    asked.ends("good", "bad")
    seen = []
    for values in ((1.0, 1.01), (factor, factor * 0.99), (0.6, 1.9)):
        heads.take(*map(step, values))
        seen.append(asked.ask().word)
    assert seen == ["good", "bad", "skip"]


@pytest.mark.parametrize(
    ("base", "head", "said"),
    [
        (peak(100), peak(100), "do not differ: metric of tiny/lora is 100 B at both ends"),
        (step(1.0), step(1.02), r"do not differ beyond noise: metric 1 s → 1.02 s .* limit \+5 %"),
        (peak(100), failed_record(), "head: out_of_memory in build: 80.1 GiB asked for"),
        (peak(100), a_record({"peak_bytes": peak()}), "metric is not measured for tiny/lora. It has: peak_bytes"),
        (peak(100, gated=False), peak(200, gated=False), "is shown and not judged"),
    ],
    ids=["exact", "timed", "an end breaks", "no such metric", "not judged"],
)
def test_ends_that_do_not_differ_are_refused(base: Metric, head: Metric | Record, said: str) -> None:
    """Nothing is searched unless good and bad differ beyond noise, and the refusal has the numbers."""
    with pytest.raises(SpecError, match=said):
        question(Heads(base, head)).ends("v1", "v2")


def test_versions_keep_their_order() -> None:
    """The ends cut the list, and each named interpreter belongs to a version."""
    parsed = Versions.parse("transformers", "5.17,5.20,5.23,5.24", "5.20..5.24", ["5.23=/opt/v23/bin/python"])
    assert (parsed.versions, parsed.pythons) == (("5.20", "5.23", "5.24"), {"5.23": "/opt/v23/bin/python"})
    assert Versions.parse("transformers", None, "5.17..5.24", []).versions == ("5.17", "5.24")


@pytest.mark.parametrize(
    ("versions", "ends", "pythons", "said"),
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
def test_versions_that_make_no_sense_are_refused(
    versions: str | None, ends: str | None, pythons: list[str], said: str
) -> None:
    """Each mistake has a message of its own."""
    with pytest.raises(SpecError, match=said):
        Versions.parse("transformers", versions, ends, pythons)


CASES = """\
from hpc_core import CallableSpec, Case

CASES = [Case(id="own/step", scale="tiny", workload=CallableSpec(factory="step:make", steps=3))]
"""
STEP = """\
import torch, toy


def make():
    return lambda: torch.ones(toy.KIB, 256).sum()
"""


@pytest.mark.nightly
def test_the_version_that_made_it_bigger_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Real workers under an interpreter a version: one whose interpreter has another is skipped, and both numbers are given."""
    named = []
    for version, kib in {"1": 64, "2": 65, "3": 128}.items():
        home = tmp_path / f"toy-{version}"
        (home / f"toy-{version}.dist-info").mkdir(parents=True)
        (home / f"toy-{version}.dist-info" / "METADATA").write_text(
            f"Metadata-Version: 2.4\nName: toy\nVersion: {version}\n"
        )
        (home / "toy.py").write_text(f"KIB = {kib}\n")
        (home / "python").write_text(f'#!/bin/sh\nPYTHONPATH="{home}:$PYTHONPATH" exec {sys.executable} "$@"\n')
        (home / "python").chmod(0o755)
        named += ["--python-for", f"{version}={home / 'python'}"]
    (tmp_path / "perf_cases.py").write_text(CASES)
    (tmp_path / "step.py").write_text(STEP)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    command = ["bisect", "own/step", "peak_bytes", "--package", "toy", "--versions", "1,1.1,2,3", *named]
    command += ["--python-for", f"1.1={tmp_path / 'toy-1' / 'python'}"]
    with pytest.raises(SystemExit) as end:
        main([*command, "--cases", "perf_cases.py", "--launch", "exec", "--json"])
    out, err = capsys.readouterr()
    assert end.value.code == 0, err
    found = json.loads(out)
    assert found["first_bad"] == ["toy 3 (the one before it in the list is 2)"]
    assert (found["before"] // 1024, found["after"] // 1024) == (65, 128)
    assert {step["candidate"]: step["word"] for step in found["steps"]} == {"toy 1.1": "skip", "toy 2": "good"}
    assert not list(tmp_path.glob("hpc-core-ab-*"))
