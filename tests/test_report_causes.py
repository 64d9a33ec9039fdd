"""Why a case moved, in a report: two lines first, the rest folded, the same in every form, and nothing but text."""

from __future__ import annotations

import json
from pathlib import Path

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hpc_core.errors import SpecError
from hpc_core.profile import KernelUse, ModuleSeen, OperatorUse, Piece, Profile
from hpc_core.record import record_to_json
from hpc_core.report import render
from hpc_core.report.entry import entries_of
from hpc_core.report.markdown import markdown
from hpc_core.report.page import page
from hpc_core.store import accept
from hpc_core.store.reading import read_records
from tests.hostile import KNOWN, OWN_TAGS, check_error, check_markdown, numbers, seen, texts
from tests.profiles import GIB, a_profile, weights
from tests.profiles import seen as a_seen

uses = st.tuples(texts, texts, texts, st.integers(-(2**63), 2**63 - 1))
profiles = st.builds(
    Profile,
    work=texts,
    modules=st.dictionaries(texts, st.builds(ModuleSeen, texts, small := st.integers(-9, 9), small), max_size=2),
    at_peak=st.lists(st.builds(Piece, texts, texts, texts, texts, st.integers(-(2**62), 2**62), small), max_size=3).map(
        tuple
    ),
    operators=st.lists(uses.map(lambda row: OperatorUse(*row)), max_size=3).map(tuple),
    kernels=st.lists(st.builds(KernelUse, texts, texts, texts, texts, small, st.floats(0, 1e300)), max_size=2).map(
        tuple
    ),
)


@pytest.fixture(scope="module")
def baselines(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with one accepted case that has a profile."""
    folder = tmp_path_factory.mktemp("baselines")
    accept(folder, a_seen(a_profile(weights())), reason="first")
    return folder


@settings(max_examples=100)
@given(profiles, numbers.filter(lambda value: not isinstance(value, int) or abs(value) < 2**63))
def test_any_profile_gives_a_safe_cause(baselines: Path, profile: Profile, peak_bytes: float) -> None:
    """Names of modules, operators and kernels are a stranger's texts too: the cause that is made of them stays text."""
    path = baselines / "record.json"
    record = json.loads(record_to_json(a_seen(a_profile(weights()), 3 * GIB)))
    record["profile"] = msgspec.to_builtins(profile)
    record["metrics"]["peak_bytes"]["value"] = peak_bytes
    path.write_bytes(json.dumps(record).encode("utf-8", errors="surrogatepass"))
    try:
        entries = entries_of(read_records([path]).records, baselines)
    except SpecError as error:
        check_error(str(error))
        return
    parsed = seen(page(entries))
    assert (parsed.bad, parsed.scripts) == ([], KNOWN.scripts)
    assert parsed.tags <= OWN_TAGS
    check_markdown(markdown(entries))
    assert "\x1b" not in render([entry.row for entry in entries], width=80, color=False)
