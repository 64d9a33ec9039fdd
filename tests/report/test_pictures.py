"""Every picture of a report is drawn with units and captions, and what it rests on holds: the Pareto front, axes, roofline, ablations."""

from __future__ import annotations

import json
import re
from pathlib import Path
from xml.etree import ElementTree

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hpc_core.baselines.reading import read_records
from hpc_core.case.errors import SpecError
from hpc_core.record import units
from hpc_core.record.metrics import metric
from hpc_core.record.record import MemoryTimeline
from hpc_core.report.charts import PICTURES, finetune, inference_latency
from hpc_core.report.charts_memory import memory_over_step
from hpc_core.report.entry import entries_of
from hpc_core.report.roofline import newest_roofs, points_of
from hpc_core.report.tradeoff import ablations_of, front
from tests.report.many_records import H100, draw_all, failed, many, measured

ENTRIES = entries_of(measured())
ORIGINAL = ("generate-fp16", "generate-nf4", "full-bf16", "lora", "lora-gc", "qlora", "qlora-gc")
points = st.lists(
    st.tuples(st.integers(0, 9), st.integers(0, 9)).map(lambda each: (float(each[0]), float(each[1]))), max_size=12
)


@given(points)
def test_the_front_is_the_points_that_none_beats(all_points: list[tuple[float, float]]) -> None:
    """Some point on the front matches or beats each point, and no point beats one on the front."""
    chosen = [all_points[index] for index in front(all_points)]
    for x, y in all_points:
        assert any(a <= x and b >= y for a, b in chosen)
    for x, y in chosen:
        assert not any((a <= x and b >= y) and (a, b) != (x, y) for a, b in all_points)
    assert chosen == sorted(set(chosen))


def test_no_case_lies_above_the_data_sheet() -> None:
    """No measured case lies above its roof: a point above would be a wrong measurement."""
    sheet = newest_roofs(ENTRIES)[-1]
    assert not sheet.is_measured
    points = points_of(ENTRIES)
    assert {point.work for point in points} == {"step", "prefill", "decode"}
    assert len({point.entry.case for point in points}) == len(ENTRIES)
    for point in points:
        assert point.flop_per_s <= min(sheet.flop_per_s, point.intensity * sheet.bytes_per_s), point.entry.case


def test_an_ablation_names_the_changed_fields() -> None:
    """LoRA is the base, because most other cases differ from it by one to three fields; factors are relative to it."""
    ablations = {each.base.case: each for each in ablations_of(ENTRIES)}
    effects = {effect.entry.case.partition("/")[2]: effect for effect in ablations["llama-3.2-3b/lora"].effects}
    assert effects["lora-gc"].changes == ("checkpointing non-reentrant",)
    assert effects["full-bf16"].changes == ("no adapter",)
    assert effects["lora-bf16"].changes == ("dtype bfloat16",)
    assert effects["qlora"].changes == ("quantization nf4",)
    assert 0.5 < effects["lora-gc"].memory < 0.6
    assert (effects["lora-gc"].time or 0) > 1.3


def test_every_picture_is_drawn_with_units_and_captions(tmp_path: Path) -> None:
    """The original report's seven variants fill all eight pictures, each with machine, stack and units."""
    chosen = [entry for entry in ENTRIES if entry.case.partition("/")[2] in ORIGINAL]
    drawn = draw_all(chosen, tmp_path / "plots", ["svg"])
    assert [path.name for path in drawn] == [f"{name}.svg" for name in PICTURES]
    for path in drawn:
        text = " ".join(ElementTree.parse(path).getroot().itertext())
        assert "NVIDIA H100 80GB HBM3" in text
        assert "torch" in text
        assert any(unit in text for unit in ("GiB", "ms", "tokens", "TFLOP/s", "times the base's"))
    memory = " ".join(ElementTree.parse(tmp_path / "plots" / "finetune.svg").getroot().itertext())
    for entry in chosen:
        if entry.record.case.kind == "finetune":
            assert units.quantity(entry.value("peak_bytes") or 0, "bytes") in memory
    assert "range over processes and sessions" in memory


def test_a_picture_says_what_it_leaves_out() -> None:
    """Of 200 cases the bars show the first thirty, and their titles count the others."""
    entries = entries_of(many(200))
    titles = {name: [panel.title for panel in panels_of(entries)] for name, panels_of in PICTURES.items()}
    for name in ("inference-memory", "inference-latency", "inference-throughput", "finetune", "memory-categories"):
        assert all("(the first 30 of" in title for title in titles[name]), name
    for name, shown in (("ablation", 16), ("speed-memory", 30)):
        counts = re.findall(rf"\(the first {shown} of (\d+) cases\)", " ".join(titles[name]))
        assert counts, name
        assert all(shown < int(count) <= 200 for count in counts)
    assert re.findall(r"\(and \d+ more models\)", titles["speed-memory"][-1])


@given(
    st.lists(st.integers(-(2**62), 2**62), min_size=3, max_size=3),
    st.lists(st.integers(0, 2**40), min_size=3, max_size=3),
)
def test_any_timeline_is_a_chart(events: list[int], sizes: list[int]) -> None:
    """For any events and bytes, the chart's numbers are finite and its areas do not overlap."""
    timeline = MemoryTimeline(
        phases=("forward",),
        events=tuple(events),
        phase=(-1, 0, 0),
        bytes_by_category={"weights": tuple(sizes), "other": (1, 2, 3)},
    )
    chart = memory_over_step(msgspec.structs.replace(measured()[0], timeline=timeline))
    spec = chart.to_dict(validate=False)
    json.dumps(spec, allow_nan=False)
    rows = [row for rows in spec["datasets"].values() for row in rows if "category" in row]
    assert all(row["low"] <= row["high"] for row in rows)


def test_small_memory_is_in_small_units() -> None:
    """A peak of some MiB has an axis in MiB, and that of an H100 one in GiB."""
    tiny = [each for each in read_records([H100.parent / "cpu" / "tiny"]).records if each.case.id == "tiny/lora"]
    for records, unit in ((tiny, "MiB"), (measured()[-1:], "GiB")):
        memory = finetune(entries_of(records))[-1].chart.to_dict(validate=False)
        assert f"{unit} allocated by tensors" in json.dumps(memory)


def test_the_hosts_time_is_stacked_beside_the_gpus() -> None:
    """The parts of a token follow each other, end at its wall time, and busy time is a bar within; cases without a split have none."""
    source = next(each for each in measured() if "decode_token_s" in each.metrics)
    wall = source.metrics["decode_token_s"].value
    shares = {"python_s": 0.5, "dispatch_s": 0.3, "launch_s": 0.15, "waiting_s": 0.05}
    parts = {name: metric(name, share * wall, on_gpu=True) for name, share in shares.items()}
    split = msgspec.structs.replace(source, metrics=source.metrics | parts)

    panels = {each.title: each.chart.to_dict(validate=False) for each in inference_latency(entries_of([split]))}
    rows, totals = panels["Inference: where a token's time goes"]["datasets"].values()
    if "part" not in rows[0]:
        rows, totals = totals, rows

    assert [row["part"] for row in rows] == ["Python", "dispatch", "launch", "waiting"]
    assert [row["low"] for row in rows[1:]] == [row["high"] for row in rows[:-1]]
    assert totals[0]["high"] == pytest.approx(1000 * wall)
    assert totals[0]["busy"] == pytest.approx(1000 * source.metrics["busy_decode_token_s"].value)
    assert len(inference_latency(entries_of([source]))) == 1


def test_hostile_names_stay_text_in_pictures(tmp_path: Path) -> None:
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


def test_records_without_numbers_are_refused(tmp_path: Path) -> None:
    """Records without numbers give one sentence and no folder."""
    with pytest.raises(SpecError, match="None of 1 cases has a number"):
        draw_all(entries_of([failed(measured()[0], "x")]), tmp_path / "plots", ["svg"])
    assert not (tmp_path / "plots").exists()
