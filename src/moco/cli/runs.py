"""Commands that look at runs, and bring them to MLflow."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from moco.cli.options import PARAMS, Params, load

runs_app = typer.Typer()


@runs_app.command()
def report() -> None:
    """Print the table of results."""
    from rich.console import Console

    from moco.stages import report as stage

    stage.run(Console(markup=False, emoji=False))


@runs_app.command()
def compare(
    param: Annotated[list[str] | None, typer.Option(help="A parameter to show, beside those that differ.")] = None,
    metric: Annotated[list[str] | None, typer.Option(help="A metric to show, in place of the usual ones.")] = None,
    sort: Annotated[str | None, typer.Option(help="The metric by which rows are ordered, the highest first.")] = None,
) -> None:
    """Compare the pipelines that ran here and in sweeps: what differs between them, then what came out."""
    from rich.console import Console

    from moco.tracking import compare as table

    table.show(Path(), Console(markup=False, emoji=False), param or [], metric or [], sort)


@runs_app.command()
def origin(
    version: Annotated[str, typer.Argument(help="A version of the registered model, or an alias.")] = "champion",
    params: Params = PARAMS,
    restore: Annotated[
        bool, typer.Option("--restore", help="Check out its commit here and write its params.yaml.")
    ] = False,
    yes: Annotated[
        bool, typer.Option("--yes", help="With --restore: apply the recorded changes, which are shown without it.")
    ] = False,
) -> None:
    """Tell what a registered classifier was made from, and how to make it again."""
    from moco.tracking import lineage

    def ask(question: str) -> bool:
        return yes or (sys.stdin.isatty() and typer.confirm(question))

    lineage.show(load(params).tracking, version, ask if restore else None, typer.echo)


@runs_app.command()
def sync(
    runs: Annotated[list[Path] | None, typer.Argument(help="Folders of runs; without any: all.")] = None,
    params: Params = PARAMS,
    again: Annotated[bool, typer.Option("--again", help="Bring back runs that were deleted in the store.")] = False,
) -> None:
    """Bring what MLflow missed (a server that was down, a node without network) from the metric logs to it."""
    from moco.tracking.sync import sync_all

    sync_all(Path(), load(params).tracking, typer.echo, runs or [], again)


@runs_app.command()
def clean(
    params: Params = PARAMS,
    yes: Annotated[bool, typer.Option("--yes", help="Delete it; without this it is listed alone.")] = False,
) -> None:
    """List what can be deleted without losing a result or a record: old decoded caches and checkpoints."""
    from moco.runs import clean as command

    command.run(load(params).runtime.scratch, yes, typer.echo)


@runs_app.command()
def ui(
    params: Params = PARAMS,
    port: Annotated[int, typer.Option(min=1, max=65535, help="Port on this machine.")] = 5000,
) -> None:
    """Start the MLflow UI on localhost and print its address."""
    from moco.tracking.ui import serve

    sys.exit(serve(load(params).tracking, port, typer.echo))
