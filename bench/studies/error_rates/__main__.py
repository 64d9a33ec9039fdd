"""`python -m bench.studies.error_rates`: measure unchanged code repeatedly, and compute the gate's error rates."""

from __future__ import annotations

import typer

from bench.studies.error_rates.run import aa
from hpc_core.cli import run_app


def main(arguments: list[str] | None = None) -> None:
    """Run the study."""
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)
    app.command()(aa)
    run_app(app, "error_rates", arguments)


if __name__ == "__main__":
    main()
