"""What the pictures of a report rest on, and that each is drawn: the front that none beats, axes, the roofline, what one field does."""

from __future__ import annotations

import contextlib
import math
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from xml.etree import ElementTree

import msgspec
import psutil
import pytest
from hpc_core.report.page.scales import linear, log
from hpc_core.report.plots import PLOTS, Drawing
from hpc_core.report.plots.points import draw_speed_memory
from hypothesis import given
from hypothesis import strategies as st

from hpc_core.baselines.reading import read_records
from hpc_core.case.errors import LaunchError, SpecError
from hpc_core.record import units as sizes
from hpc_core.report.entry import entries_of
from hpc_core.report.roofline import newest_roofs, points_of
from hpc_core.report.tradeoff import ablations_of, front
from tests.many_records import H100, draw_all, failed, many, measured, written

ENTRIES = entries_of(measured())
ORIGINAL = ("generate-fp16", "generate-nf4", "full-bf16", "lora", "lora-gc", "qlora", "qlora-gc")
points = st.lists(
    st.tuples(st.integers(0, 9), st.integers(0, 9)).map(lambda each: (float(each[0]), float(each[1]))), max_size=12
)


@given(points)
def test_the_front_is_what_none_beats(given_points: list[tuple[float, float]]) -> None:
    """Each point off the front is matched or beaten in both by one on it, and none on it by any other."""
    chosen = [given_points[index] for index in front(given_points)]
    for x, y in given_points:
        assert any(a <= x and b >= y for a, b in chosen)
    for x, y in chosen:
        assert not any((a <= x and b >= y) and (a, b) != (x, y) for a, b in given_points)
    assert chosen == sorted(set(chosen))


@given(st.lists(st.floats(allow_nan=True, allow_infinity=True), max_size=6), st.booleans())
def test_an_axis_holds_every_value(values: list[float], is_log: bool) -> None:
    """Whatever the values, places lie from 0 to 1 in their order, and ticks lie on the axis, few enough to read."""
    axis = log(values) if is_log else linear(values)
    places = [axis.at(value) for value in sorted(value for value in values if math.isfinite(value))]
    assert all(0 <= place <= 1 for place in places)
    assert places == sorted(places)
    assert 1 <= len(axis.ticks) <= 12
    assert all(axis.low * 0.999 <= tick <= axis.high * 1.001 for tick in axis.ticks)


def test_no_case_lies_above_the_data_sheet() -> None:
    """Every measured case keeps under its roof: a point above would be no measurement."""
    sheet = newest_roofs(ENTRIES)[-1]
    assert not sheet.is_measured
    found = points_of(ENTRIES)
    assert {point.work for point in found} == {"step", "prefill", "decode"}
    assert len({point.entry.case for point in found}) == len(ENTRIES)
    for point in found:
        assert point.flop_per_s <= min(sheet.flop_per_s, point.intensity * sheet.bytes_per_s), point.entry.case


def test_an_ablation_names_what_was_changed() -> None:
    """LoRA is the base, since most others are one to three fields away from it; factors are of its own numbers."""
    found = {each.base.case: each for each in ablations_of(ENTRIES)}
    effects = {effect.entry.case.partition("/")[2]: effect for effect in found["llama-3.2-3b/lora"].effects}
    assert effects["lora-gc"].changes == ("checkpointing non-reentrant",)
    assert effects["full-bf16"].changes == ("no adapter",)
    assert effects["lora-bf16"].changes == ("dtype bfloat16",)
    assert effects["qlora"].changes == ("quantization nf4",)
    assert 0.5 < effects["lora-gc"].memory < 0.6
    assert (effects["lora-gc"].time or 0) > 1.3


def test_no_name_runs_into_the_next_panel() -> None:
    """Names of points end before the words left of the panel beside theirs, however long they are."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    renamed = []
    for record in measured():
        shape, _, name = record.case.id.partition("/")
        case = msgspec.structs.replace(record.case, id=f"{shape}/{name}-and-more-words")
        renamed.append(msgspec.structs.replace(record, case=case))
    figure = Figure(layout="constrained")
    FigureCanvasAgg(figure)  # measures texts
    assert draw_speed_memory(figure, entries_of(renamed))
    left, right = figure.axes[:2]
    words = right.get_tightbbox()
    assert words is not None
    names = [note.get_window_extent().x1 for note in left.texts]
    assert len(names) > 5
    # The room is reckoned by letters of one width; two pixels are what letters differ by.
    assert max(names) <= words.x0 + 2


def test_every_picture_is_drawn_with_units_and_captions(tmp_path: Path) -> None:
    """The report's seven variants fill all eight; each names machine and stack, and its values are written beside its bars."""
    chosen = [entry for entry in ENTRIES if entry.case.partition("/")[2] in ORIGINAL]
    drawn = draw_all(chosen, tmp_path / "plots", ["svg"])
    assert [path.name for path in drawn] == [f"{name}.svg" for name in PLOTS]
    for path in drawn:
        text = " ".join(ElementTree.parse(path).getroot().itertext())
        assert "NVIDIA H100 80GB HBM3" in text
        assert "torch" in text
        assert any(unit in text for unit in ("GiB", "ms", "tokens", "TFLOP/s", "times the base's"))
    memory = " ".join(ElementTree.parse(tmp_path / "plots" / "finetune.svg").getroot().itertext())
    for entry in chosen:
        if entry.record.case.kind == "finetune":
            assert sizes.quantity(entry.value("peak_bytes") or 0, "bytes") in memory
    assert "range over processes and sessions" in memory


def test_other_processes_draw_the_same_pictures(tmp_path: Path) -> None:
    """Byte for byte what this process draws, by the same paths; of two machines each has its own."""
    tiny = read_records([H100.parent / "cpu" / "tiny"]).records[:2]
    entries = entries_of([*measured()[:4], *tiny])
    with (
        Drawing(entries, tmp_path, ["svg", "png"]) as alone,
        Drawing(entries, tmp_path, ["svg", "png"], processes=3) as shared,
    ):
        theirs = shared.contents()
        assert theirs == alone.contents()
    assert {path.suffix for path in theirs} == {".svg", ".png"}
    assert {path.name.rpartition("-finetune")[0] for path in theirs if "finetune" in path.name} == {
        entry.machine for entry in entries if entry.record.case.kind == "finetune"
    }
    assert not any(path.exists() for path in theirs)


def test_a_drawing_process_that_is_gone_is_told_in_a_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As the kernel does when memory ends: one error with the number of cases and what to do, and no picture."""

    def ended(*_: object) -> bool:
        os.kill(os.getpid(), signal.SIGKILL)
        return False

    monkeypatch.setitem(PLOTS, "ablation", ended)
    with (
        Drawing(ENTRIES[:2], tmp_path, ["svg"], processes=2) as drawing,
        pytest.raises(LaunchError, match=r"pictures of 2 cases was ended from outside.*--case"),
    ):
        drawing.contents()
    assert not list(tmp_path.iterdir())


def test_a_report_that_is_killed_leaves_no_process_that_draws(tmp_path: Path) -> None:
    """Killed while others draw for it, it takes them along: nothing holds its terminal or its memory afterwards."""
    folder = written(tmp_path / "records", many(60))
    command = [sys.executable, "-m", "hpc_core.cli", "report", str(folder), "--plots", str(tmp_path / "plots")]
    report = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    ends = time.monotonic() + 60
    while not (drawing := [child.pid for child in psutil.Process(report.pid).children(recursive=True)]):
        assert report.poll() is None, report.communicate()[0]
        assert time.monotonic() < ends
        time.sleep(0.005)
    report.terminate()
    try:
        assert report.wait(30) == -signal.SIGTERM
        report.communicate(timeout=30)  # ends only if nobody else holds the pipe
        while left := [
            pid for pid in drawing if _state(pid) not in "ZX"
        ]:  # a process lets go of its files before it is gone
            assert time.monotonic() < ends, left
            time.sleep(0.01)
    finally:
        for pid in drawing:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
    assert not (tmp_path / "plots").exists()


def _state(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return "Z"


def test_a_picture_of_many_cases_says_what_it_leaves_out(tmp_path: Path) -> None:
    """Of 200 cases bars and panels show the first ones, their titles count the others, and no title is twice in a picture."""
    records = many(200)
    drawn = draw_all(entries_of(records), tmp_path, ["svg"])
    texts = {path.stem: list(filter(None, ElementTree.parse(path).getroot().itertext())) for path in drawn}
    told = {name: " ".join(text.split()) for name, found in texts.items() for text in [" ".join(found)]}
    for name in ("inference-memory", "inference-latency", "inference-throughput", "finetune", "memory-categories"):
        assert "(the first 30 of" in told[name], name
    tuned = sum(record.case.kind == "finetune" for record in records)
    assert told["finetune"].count(f"(the first 30 of {tuned} cases)") == 1
    for name, shown in (("ablation", 16), ("speed-memory", 30)):
        counts = [int(count) for count in re.findall(rf"\(the first {shown} of (\d+) cases\)", told[name])]
        assert counts, name
        assert all(shown < count <= 200 for count in counts)
    panels = len(re.findall(r"\(and \d+ more models\)", told["speed-memory"]))
    assert panels == 1


def test_small_memory_is_in_small_units(tmp_path: Path) -> None:
    """A peak of some MiB stands on an axis in MiB, that of an H100 on one in GiB."""
    tiny = [each for each in read_records([H100.parent / "cpu" / "tiny"]).records if each.case.id == "tiny/lora"]
    for records, unit in ((tiny, "MiB"), (measured()[-1:], "GiB")):
        draw_all(entries_of(records), tmp_path, ["svg"])
        words = list(ElementTree.parse(tmp_path / "finetune.svg").getroot().itertext())
        assert f"{unit} allocated by tensors" in words


def test_pictures_of_hostile_names_are_pictures(tmp_path: Path) -> None:
    """Markup and mathematics in a name stay text, and nothing is written outside the folder."""
    record = next(record for record in measured() if record.case.id == "llama-3.2-3b/lora")
    machine = msgspec.structs.replace(record.circumstances.machine, name="<script>$\\frac{1}{0}$ ../../x")
    hostile = msgspec.structs.replace(
        record, circumstances=msgspec.structs.replace(record.circumstances, machine=machine)
    )
    for path in draw_all(entries_of([hostile]), tmp_path / "plots", ["svg"]):
        root = ElementTree.parse(path).getroot()
        assert not [each for each in root.iter() if each.tag.endswith("script")]
        assert "<script>$\\frac{1}{0}$" in " ".join(root.itertext())
    assert [path.name for path in tmp_path.iterdir()] == ["plots"]


def test_nothing_to_draw_is_said(tmp_path: Path) -> None:
    """A record without numbers gives no picture, one sentence, and no folder."""
    with pytest.raises(SpecError, match="None of 1 cases has a number"):
        draw_all(entries_of([failed(measured()[0], "x")]), tmp_path / "plots", ["svg"])
    assert not (tmp_path / "plots").exists()
