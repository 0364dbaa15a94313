"""The command line. Thin: one call per command, and imports only when a command runs."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from moco.errors import Interrupted, UserError

if TYPE_CHECKING:
    from moco.config import Config

app = typer.Typer(
    name="moco",
    help="Self-supervised pretraining (MoCo v2) and classifiers from few labels. Every command reads params.yaml in "
    "the current folder; `dvc repro` runs data, pretrain, train, baseline and eval in their order, where needed.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

Params = Annotated[Path, typer.Option("--params", help="The parameter file.")]
PARAMS = Path("params.yaml")
PRESETS = Path("presets")


def _load(path: Path) -> Config:
    from moco.params import load

    return load(path)


@app.command()
def data(params: Params = PARAMS) -> None:
    """Check the dataset, decode it once into the cache, write models/manifest.json."""
    from moco.stages import data as stage

    config = _load(params)
    stage.run(config.data, config.runtime)


@app.command()
def pretrain(
    params: Params = PARAMS,
    resume: Annotated[
        Path | None,
        typer.Option(help="A checkpoint to start from; its settings may differ in length. Not needed after an "
                     "interruption: an unfinished run continues by itself."),
    ] = None,
) -> None:  # fmt: skip
    """Train the encoder by momentum contrast on the unlabelled images; writes models/encoder.pth."""
    from moco.stages import pretrain as stage

    stage.run(_load(params), resume)


@app.command()
def train(params: Params = PARAMS) -> None:
    """Train a linear classifier on the frozen encoder; writes models/classifier/."""
    from moco.stages import train as stage

    stage.run(_load(params))


@app.command()
def baseline(params: Params = PARAMS) -> None:
    """Measure random weights, and supervised training on the labels alone, for comparison."""
    from moco.stages import baseline as stage

    stage.run(_load(params))


@app.command("eval")
def evaluate(params: Params = PARAMS) -> None:
    """Score models/classifier/ on val, through submission.py and model_sub.pth alone."""
    from moco.stages import eval as stage

    stage.run(_load(params))


@app.command()
def report() -> None:
    """Print the table of results."""
    from rich.console import Console

    from moco.stages import report as stage

    stage.run(Console())


@app.command()
def preset(
    name: Annotated[str | None, typer.Argument(help="Name of a preset; without it they are listed.")] = None,
    params: Params = PARAMS,
    force: Annotated[bool, typer.Option("--force", help="Overwrite changes of your own.")] = False,
) -> None:
    """Switch params.yaml to a preset; `git diff params.yaml` then shows what that changed."""
    from moco import presets

    if name is None:
        typer.echo("\n".join(presets.names(PRESETS)))
        return
    presets.switch(PRESETS, name, params, force)
    typer.echo(f"{params} is now the preset {name}")


@app.command()
def sync(params: Params = PARAMS) -> None:
    """Bring what MLflow missed (a server that was down, a node without network) from the metric logs to it."""
    from moco.tracking.sync import sync_all

    sync_all(Path("runs"), _load(params).tracking, typer.echo)


@app.command()
def ui(
    params: Params = PARAMS,
    port: Annotated[int, typer.Option(min=1, max=65535, help="Port on this machine.")] = 5000,
) -> None:
    """Start the MLflow UI on localhost and print its address."""
    from moco.tracking.ui import serve

    sys.exit(serve(_load(params).tracking, port, typer.echo))


def main() -> None:
    """Entry point: a user's mistake is one line and exit code 1, an interruption 128 plus the signal."""
    try:
        app()
    except UserError as error:
        typer.echo(f"error: {error}", err=True)
        sys.exit(1)
    except Interrupted as error:
        typer.echo(f"{error}; the state is saved, the same command continues", err=True)
        sys.exit(128 + error.signal)


if __name__ == "__main__":
    main()
