"""The original report: run its whole protocol, write its two JSON files, and check its numbers against bounds.

python -m bench.studies.original_report run --out runs/original --short      # a tiny model on a CPU; without --short hours on a GPU
python -m bench.studies.original_report export runs/records --out runs/original
python -m bench.studies.original_report page > bench/studies/original_report/results.md
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import msgspec
import typer

from bench.studies.original_report import rows
from bench.studies.original_report.export import FINETUNE_FILE, INFERENCE_FILE, original_files
from bench.studies.original_report.protocol import protocol
from bench.studies.original_report.run import run_protocol
from hpc_core.baselines.pull_request import NAME
from hpc_core.case.errors import SpecError
from hpc_core.case.parts import ModelSpec
from hpc_core.cli import run_app
from hpc_core.cli.console import say, show, tell
from hpc_core.gate.exit_code import ExitCode
from hpc_core.record.files import read_record, write_whole
from hpc_core.record.record import Record
from hpc_core.report.entry import Row

app = typer.Typer(help=__doc__, no_args_is_help=True, add_completion=False, rich_markup_mode=None)


@app.command()
def export(
    records: Annotated[Path, typer.Argument(help="A folder that --perf-records wrote.")],
    out: Annotated[Path, typer.Option(help="Where the two files go.")],
) -> None:
    """Write the original report's two JSON files from records."""
    if not records.is_dir():
        raise SpecError(f"{records}: no such folder. Records are written by pytest --benchmark --perf-records=DIR.")
    own = (INFERENCE_FILE, FINETUNE_FILE, NAME)  # of an earlier export into the same folder, or of the run
    paths = sorted(path for path in records.rglob("*.json") if path.name not in own and not path.name.startswith("."))
    if not paths:
        raise SpecError(f"{records}: holds no record (*.json).")
    _write_original(out, [read_record(path) for path in paths])


def _write_original(out: Path, records: list[Record]) -> None:
    files = original_files(records)
    if not files:
        raise SpecError(
            f"None of {len(records)} records is of generation or fine-tuning, so there is nothing to export."
        )
    for name, content in files.items():
        write_whole(out / name, msgspec.json.format(msgspec.json.encode(content), indent=2) + b"\n")
        say(f"wrote {out / name}: {', '.join(content['methods'])}")


@app.command()
def run(
    out: Annotated[Path, typer.Option(help="Records and the two JSON files go here; run again to go on.")],
    model: Annotated[str | None, typer.Option(help="True weights: a local folder or a hub id.")] = None,
    short: Annotated[
        bool, typer.Option("--short", help="A tiny model and a handful of steps, to try it on a CPU.")
    ] = False,
) -> None:
    """Run the original report's whole protocol: 500 questions x 512 tokens, 2 epochs of 4000 rows. Takes hours; resumable."""
    if model is not None and short:
        raise SpecError("--short runs a tiny random model: drop --model or --short.")
    weights = None
    if model is not None:
        weights = ModelSpec(weights="folder" if Path(model).is_dir() else "hub", path=model)
    records = run_protocol(protocol(weights, short=short), out, device="cpu" if short else "auto")
    show([Row(record=record) for record in records])
    _write_original(out, records)
    broken = [record.case.id for record in records if record.status != "ok"]
    if broken:
        tell(
            f"{len(broken)} of {len(records)} cases gave no numbers: {', '.join(broken)}. Run again to try just those."
        )
        raise typer.Exit(ExitCode.BROKEN)


@app.command()
def page() -> None:
    """Print the page that checks the report's own numbers against bounds."""
    say(rows.main().rstrip())


def main(arguments: list[str] | None = None) -> None:
    """Run one command of this study."""
    run_app(app, "original_report", arguments)


if __name__ == "__main__":
    main()
