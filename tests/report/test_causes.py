"""Every form of report shows why a case moved: two lines first, the rest folded, and nothing but text."""

from __future__ import annotations

import html
import json
from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hpc_core.baselines.accept import accept
from hpc_core.baselines.baseline import Baseline
from hpc_core.baselines.lookup import find
from hpc_core.baselines.profiles import stored_profile
from hpc_core.baselines.reading import read_records
from hpc_core.case.errors import SpecError
from hpc_core.explain.explain import stored_cause
from hpc_core.record.profile import KernelUse, ModuleSeen, OperatorUse, Piece, Profile
from hpc_core.record.record import Record, record_to_json
from hpc_core.report.entry import entries_of
from hpc_core.report.markdown import markdown
from hpc_core.report.page import LARGEST_BYTES, VEGA_BYTES, page
from hpc_core.report.terminal import render
from tests.explain.profiles import GIB, HEAD, MLP, a_profile, profiled_record, weights
from tests.report.hostile import check_error, check_markdown, check_page, numbers, texts
from tests.report.many_records import H100, failed, many, with_metric
from tests.strategies import a_case, counted

GROWN = Piece("activations", f"{MLP}.act_fn", "forward", "aten.silu.default", GIB, 28)
BEFORE = profiled_record(a_profile(weights()))
SMALL = Piece("activations", HEAD, "forward", "aten.mm.default", 2**22, 1)
"""Too small for the two lines, so it appears only in the folded rest."""
SECOND = OperatorUse(MLP, "forward", "aten.mm.default", 3)


@pytest.fixture(scope="module")
def baselines(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with one accepted case that has a profile."""
    folder = tmp_path_factory.mktemp("baselines")
    accept(folder, BEFORE, reason="first")
    return folder


def moved(peak_bytes: int, *pieces: Piece) -> Record:
    """The accepted case with another peak, made of these pieces, and with more operators."""
    return profiled_record(a_profile(*pieces, operators=(SECOND,)), peak_bytes, operators=counted(1700))


@pytest.mark.parametrize(("peak_bytes", "change"), [(3 * GIB, "+1.00 GiB"), (GIB, "-1.00 GiB")])
def test_a_case_that_moved_has_its_cause(baselines: Path, peak_bytes: int, change: str) -> None:
    """A case that got worse or better has the cause that explain gives; an unchanged or broken case has none."""
    (entry,) = entries_of([moved(peak_bytes, weights(peak_bytes - GIB) if peak_bytes > GIB else GROWN)], baselines)
    assert entry.cause == stored_cause(baselines, entry.record, entry.judgement)
    assert entry.cause is not None
    assert change in " ".join(entry.cause.lines)
    assert entries_of([BEFORE], baselines)[0].cause is None
    assert entries_of([failed(BEFORE, "no room")], baselines)[0].cause is None
    assert entries_of([moved(3 * GIB, GROWN)])[0].cause is None, "without baselines there is no cause"


def test_markdown_gives_the_cause_before_the_numbers(baselines: Path) -> None:
    """Two lines of cause open the case's fold, above its metrics; the rest is folded below them."""
    (entry,) = entries_of([moved(3 * GIB, weights(), GROWN, SMALL)], baselines)
    assert entry.cause is not None
    text = markdown([entry])
    fold = text.partition("</summary>")[2]
    assert [line[:8] for line in fold.splitlines() if line][:2] == ["**Why:**"] * 2
    assert "activations \\+1.00 GiB in LlamaMLP" in fold.partition("| metric |")[0]
    assert "<details><summary>More of the cause</summary>" in fold.partition("| metric |")[2]
    assert text.count("<details") == text.count("</details>") == 2


def test_the_page_gives_the_cause_on_the_card_and_in_the_details(baselines: Path) -> None:
    """The card shows both lines and folds the rest under the case's name; the details repeat the two lines."""
    (entry,) = entries_of([moved(3 * GIB, weights(), GROWN, SMALL)], baselines)
    assert entry.cause is not None
    text = html.unescape(page([entry]))
    card, _, rest = text.partition("</article>")
    for line in entry.cause.lines:
        assert f"<p>{line}</p>" in card
        assert f'<p class="cause">{line}</p>' in rest
    assert f'<summary>More of the cause<span class="hear"> of {entry.case}</span></summary>' in card
    assert all(f"<li>{detail}</li>" in card for detail in entry.cause.details)


def test_cases_that_moved_alike_share_one_cause(tmp_path: Path) -> None:
    """The terminal prints one headline and one cause, with its case, for all cases that moved records."""
    names = [f"tiny/lora-{number}" for number in range(3)]
    for name in names:
        accept(tmp_path, msgspec.structs.replace(BEFORE, case=a_case(name)), reason="first")
    records = [msgspec.structs.replace(moved(3 * GIB, weights(), GROWN), case=a_case(name)) for name in names]
    text = render([entry.row for entry in entries_of(records, tmp_path)], width=400, color=False)
    assert text.count("REGRESSED 3 cases: peak_bytes +1.00 GiB") == 1
    assert text.count("Why, in tiny/lora-0: peak +1.00 GiB: activations +1.00 GiB in LlamaMLP") == 1
    assert "Why, in tiny/lora-1" not in text


def test_two_hundred_causes_fit_the_page(tmp_path: Path) -> None:
    """A page of 200 cases that all moved keeps every row, forty cards and most causes within its size limit."""
    stored = stored_profile(H100.parent, "predicted", baseline("llama-3.2-3b/qlora"))
    assert stored is not None
    profile = stored.profile
    grown = msgspec.structs.replace(profile, at_peak=(*profile.at_peak, GROWN))
    records = []
    for record in many(200):
        accept(
            tmp_path / "baselines", msgspec.structs.replace(record, profile=profile), reason="first", allow_dirty=True
        )
        records.append(with_metric(msgspec.structs.replace(record, profile=grown), "peak_bytes", 1.33))
    entries = entries_of(records, tmp_path / "baselines")
    text = page(entries)
    assert all(entry.cause is not None for entry in entries)
    assert len(text.encode()) < LARGEST_BYTES + VEGA_BYTES
    assert text.count("<tr data-m=") == 200
    assert text.count('<div class="why">') == 40, "one per card; the other cases have it in their details"
    assert text.count('<p class="cause">') > 2 * 100


def baseline(case_id: str) -> Baseline:
    """The committed prediction of a case."""
    found = find(H100.parent, "predicted", case_id)
    assert isinstance(found, Baseline)
    return found


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


@given(profiles, numbers.filter(lambda value: not isinstance(value, int) or abs(value) < 2**63))
def test_any_profile_gives_a_safe_cause(baselines: Path, profile: Profile, peak_bytes: float) -> None:
    """Names of modules, operators and kernels from a hostile profile stay text in every report."""
    path = baselines / "record.json"
    record = json.loads(record_to_json(profiled_record(a_profile(weights()), 3 * GIB)))
    record["profile"] = msgspec.to_builtins(profile)
    record["metrics"]["peak_bytes"]["value"] = peak_bytes
    path.write_bytes(json.dumps(record).encode("utf-8", errors="surrogatepass"))
    try:
        entries = entries_of(read_records([path]).records, baselines)
    except SpecError as error:
        check_error(str(error))
        return
    check_page(page(entries))
    check_markdown(markdown(entries))
    assert "\x1b" not in render([entry.row for entry in entries], width=80, color=False)
