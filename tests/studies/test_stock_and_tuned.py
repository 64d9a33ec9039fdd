"""The comparison of stock and tuned engines: pairs of the same work, floors by measured rates, missing numbers, and the committed page."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench.studies.stock_and_tuned.comparison import accepted_records, floor_s, losses_apart, main, page
from bench.studies.stock_and_tuned.memory import memory_text
from bench.studies.stock_and_tuned.paired import are_paired, changed_work, work_of
from hpc_core.case.case import Case
from hpc_core.case.errors import SpecError
from hpc_core.case.limits import GiB, Limits, MiB
from hpc_core.case.workloads import FinetuneSpec
from hpc_core.catalogue import ALL, SWEEP, catalogue
from hpc_core.record.record import Metric, Record, record_to_json
from tests.strategies import a_record, around, busy, cases, peak, wall

ROOT = Path(__file__).parents[2]
_RATES = {"matmul_bfloat16_flop_per_s": 8e14, "copy_bytes_per_s": 3e12}
_BY_NAME = catalogue() | {case.id: case for case in SWEEP}


def _case(name: str) -> Case:
    return _BY_NAME[f"llama-3.2-3b/{name}"]


def _joules(value: float) -> Metric:
    return Metric(value=value, unit="J", noise="wall", better="lower", depends_on=("case",), gated=False)


def _record(name: str, metrics: dict[str, Metric], **parts: Any) -> Record:
    return a_record(metrics, case=_case(name), circumstances=around(ceilings=_RATES), **parts)


def _row(text: str, name: str) -> list[str]:
    [line] = [line for line in text.splitlines() if line.startswith(f"| `llama-3.2-3b/{name}`")]
    return [cell.strip() for cell in line.strip("|").split("|")]


@given(cases())
def test_pairs_are_found_by_their_work(case: Case) -> None:
    """Another id, timeout or limit does not change a case's work; another seed does; no case is its own pair."""
    other = case.vary("renamed", timeout_s=case.timeout_s + 1, limits=Limits(peak_bytes="1%"))
    assert work_of(other) == work_of(case)
    assert work_of(case) is None or work_of(case.vary("seeded", seed=case.seed + 1)) != work_of(case)
    assert not are_paired(case, case)


@pytest.mark.parametrize(
    ("stock", "other", "paired"),
    [
        ("lora-nodrop", "lora-tuned", True),
        ("lora-tuned", "lora-nodrop", False),  # the first is the stock one
        ("lora", "lora-tuned", False),  # dropout, adapters in float32
        ("qlora-nodrop", "qlora-tuned-4.5gib", True),
        ("lora-nodrop", "qlora-tuned", False),
        ("generate-nf4-100", "generate-nf4-graph-int8-head", True),
        ("generate-bf16", "generate-bf16-graph", False),  # other prompts
    ],
)
def test_only_the_engine_may_differ(stock: str, other: str, paired: bool) -> None:
    """Cases with another dropout, adapter dtype, quantization or prompts are not paired, whatever their names."""
    assert are_paired(_case(stock), _case(other)) is paired


def test_the_engines_switches_are_listed() -> None:
    """A tuned case lists its switches by name and a budget in GiB; a stock case has none."""
    assert changed_work(_case("qlora-tuned-4.5gib")) == "loss=chunked, fusion=blocks, graph, budget=4.5 GiB"
    assert changed_work(_case("qlora-nodrop")) == ""


def test_a_floor_is_the_longer_of_products_and_bytes() -> None:
    """LoRA's step is bound by 26.6 TFLOP at 800 TFLOP/s, a decoded token by 6.44 GB at 3 TB/s."""
    step, token = (floor_s(_record(name, {"peak_bytes": peak()})) for name in ("lora-tuned", "generate-bf16-graph"))
    assert step == pytest.approx(0.0336, rel=0.02)
    assert token == pytest.approx(6.437e9 / 3e12, rel=0.001)
    assert floor_s(a_record({"peak_bytes": peak()}, case=_case("lora-tuned"))) is None  # no rates in its session


def test_a_row_compares_a_record_with_its_stock_case() -> None:
    """Each number of a row comes from the two records or the closed form."""
    stock = _record("lora-nodrop", {"step_s": wall(0.150), "peak_bytes": peak(14 * GiB)}, losses=_losses(4, 1.0))
    tuned = _record(
        "lora-tuned",
        {
            "step_s": wall(0.050),
            "busy_s": busy(0.048),
            "peak_bytes": peak(9.5 * GiB),
            "energy_step_j": _joules(31.25),
            "epoch_s": wall(50.0),
            "logits_error": wall(0.041),
        },
        losses=_losses(7, 1.001),
    )
    text = page({"a GPU": {each.case.id: each for each in (stock, tuned)}})
    floor = floor_s(tuned)
    assert floor is not None
    assert _row(text, "lora-tuned")[1:] == [
        "50.0", "3.00 x", "48.0", "9.50", "-", f"{floor * 1e3:.3g} ms", f"{floor / 0.05:.0%}", f"{floor / 0.048:.0%}",
        "31.2", "50.0", "logits 0.041 off float32; losses of 4 steps within 0.001 of stock", tuned.circumstances.started_at[:10],
    ]  # fmt: skip
    assert _row(text, "lora-nodrop")[1:3] == ["150.0", "-"]


def _losses(warm_up: int, factor: float) -> tuple[float, ...]:
    """Losses of a warm-up and of the ten timed steps, which begin with the first batch again."""
    return tuple(factor * (12.0 + step) for step in range(warm_up)) + (5.0,) * 10


def test_losses_are_compared_where_batches_are_the_same() -> None:
    """Only the losses of the shorter warm-up are compared, since each timed run begins with the first batch again."""
    stock = _record("lora-nodrop", {}, losses=_losses(3, 1.0))
    assert losses_apart(stock, _record("lora-tuned", {}, losses=_losses(8, 1.01))) == pytest.approx((0.01, 3))
    assert losses_apart(stock, _record("lora-tuned", {})) is None


def test_decoding_counts_all_rows() -> None:
    """2 ms a token are 500 tokens a second at batch 1, and a missing number is a dash."""
    graph = _record("generate-nf4-graph", {"decode_token_s": wall(0.002), "energy_token_j": _joules(0.5)})
    cells = _row(page({"a GPU": {graph.case.id: graph}}), "generate-nf4-graph")
    assert cells[1:7] == ["2.00", "-", "-", "-", "-", "500.0"]
    assert cells[10:12] == ["0.50", "-"]


def test_a_case_without_a_record_reads_not_measured() -> None:
    """Every engine case of the suite has a row on a machine that ran one of them; the others are named below the tables."""
    graph = _record("generate-nf4-graph", {"decode_token_s": wall(0.002)})
    text = page({"a GPU": {graph.case.id: graph}})
    own = [case for case in ALL if case.scale == "full" and getattr(case.workload, "engine", "stock") != "stock"]
    for case in own:
        if case.id != graph.case.id:
            assert _row(text, case.id.partition("/")[2])[-1] == "not measured"
    last = text.splitlines()[-1]
    assert last.startswith("Engine cases not measured on any of these machines")
    assert "`llama-3.2-3b/lora-tuned`" in last
    assert f"`{graph.case.id}`" not in last


def test_each_machine_shows_only_what_it_measured() -> None:
    """A machine that ran only other sizes or batches shows no rows of the suite's, and no other machine's numbers."""
    first, second = (
        _record(name, {"decode_token_s": wall(seconds)})
        for name, seconds in (("generate-nf4-graph", 0.002), ("generate-nf4-graph-b4", 0.003))
    )
    text = page({"NVIDIA B": {second.case.id: second}, "NVIDIA A": {first.case.id: first}})
    first_machine, second_machine = text.split("## NVIDIA B")
    assert "## NVIDIA A" in first_machine
    assert "generate-nf4-graph-b4`" not in first_machine
    assert _row(second_machine, "generate-nf4-graph-b4")[1] == "3.00"
    assert "### Training" not in second_machine
    assert "### An epoch" not in text


def test_one_machines_folder_is_refused() -> None:
    """The folder of one machine is refused: its shapes would be taken for machines."""
    with pytest.raises(SpecError, match="Name the folder above it"):
        main(ROOT / "baselines" / "nvidia-h200-140gib")


def test_a_record_of_another_case_is_not_taken(tmp_path: Path) -> None:
    """A record of a case that has changed since is ignored, whatever its file is called."""
    old = _case("lora-nodrop").vary("lora-nodrop", batch=8)
    assert isinstance(old.workload, FinetuneSpec)
    (tmp_path / "lora-nodrop.history.jsonl").write_bytes(record_to_json(a_record({"peak_bytes": peak()}, case=old)))
    assert accepted_records(tmp_path) == {}


def test_the_page_is_what_the_command_prints() -> None:
    """bench/studies/stock_and_tuned/results.md is the output of `python -m bench.studies.stock_and_tuned.comparison`."""
    folder = ROOT / "baselines"
    assert (ROOT / "bench" / "studies" / "stock_and_tuned" / "results.md").read_text(encoding="utf-8") == main(folder)


@pytest.mark.parametrize("content", [b"", b"\n", b"{bad\n", b"\xff\xfe\n"])
def test_a_file_without_a_record_is_named(tmp_path: Path, content: bytes) -> None:
    """A broken file is an error rather than a missing row."""
    path = tmp_path / "machine" / "lora.history.jsonl"
    path.parent.mkdir()
    path.write_bytes(content)
    with pytest.raises(SpecError, match=r"lora\.history\.jsonl: its last line holds no record"):
        accepted_records(tmp_path)


def test_a_missing_folder_is_refused(tmp_path: Path) -> None:
    """A missing folder is an error rather than a page where nothing was measured."""
    with pytest.raises(SpecError, match="no such folder of baselines"):
        main(tmp_path / "nonsense")


def test_a_line_ends_where_json_lines_end(tmp_path: Path) -> None:
    """A Unicode line separator in a note is part of the record."""
    record = _record("lora-tuned", {"step_s": wall(0.1)})
    circumstances = msgspec.structs.replace(record.circumstances, notes=["before\u2028after"])
    encoded = record_to_json(msgspec.structs.replace(record, circumstances=circumstances))
    (tmp_path / "lora-tuned.history.jsonl").write_bytes(encoded + b"\n")
    assert list(accepted_records(tmp_path)) == ["llama-3.2-3b/lora-tuned"]


@given(stock_bytes=st.integers(1, 10**12), over=st.integers(-(10**9), 10**9))
def test_a_peak_above_the_stock_one_is_named_with_its_size(stock_bytes: int, over: int) -> None:
    """A peak above the stock one by more than the gate allows is named; any other is only counted."""
    tuned_bytes = max(1, stock_bytes + over)
    stock, tuned = (
        _record(name, {"peak_bytes": peak(value)})
        for name, value in (("lora-nodrop", stock_bytes), ("lora-tuned", tuned_bytes))
    )
    text = memory_text([(stock, tuned)])
    above = tuned_bytes - stock_bytes > max(2 * MiB, 0.0005 * stock_bytes)
    assert ("lora-tuned` by" in text) is above
    assert ("0 of 1 engine rows" if above else "1 of 1 engine rows") in text
    assert memory_text([]) == ""
