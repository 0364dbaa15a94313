"""The command line. Thin: one call per command, and imports only when a command runs."""

from __future__ import annotations

import os
import sys
import traceback
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NoReturn

import typer

from moco.errors import Interrupted, ProcessLostError, UserError
from moco.training.interrupt import raise_on_signals

if TYPE_CHECKING:
    from moco.config import Config

app = typer.Typer(
    name="moco",
    help="Self-supervised pretraining (MoCo v2) and classifiers from few labels. Every command reads params.yaml in "
    "the current folder; `dvc repro` runs those that are not up to date.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

Params = Annotated[Path, typer.Option("--params", help="The parameter file.")]
PARAMS = Path("params.yaml")
PRESETS = Path("presets")
# Commands that torchrun may start, and those that only look; a stage that does not share its work would do it twice.
IN_SEVERAL_PROCESSES = ("pretrain", "report", "preset", "sync", "ui", "doctor", "slurm", "image")


def _load(path: Path) -> Config:
    from moco.params import load

    return load(path)


@app.callback()
def _every_command(context: typer.Context) -> None:
    if _several() and context.invoked_subcommand not in IN_SEVERAL_PROCESSES:
        from moco.training.distributed import refuse_several

        refuse_several(str(context.invoked_subcommand))


def _several() -> bool:
    return os.environ.get("WORLD_SIZE", "1") != "1"


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


@app.command("train_extra")
def train_extra(params: Params = PARAMS) -> None:
    """Train a linear classifier with extra labels from a CSV file; writes models/classifier_extra/."""
    from moco.stages import train_extra as stage

    stage.run(_load(params))


@app.command()
def baseline(params: Params = PARAMS) -> None:
    """Measure random weights, and supervised training on the labels alone, for comparison."""
    from moco.stages import baseline as stage

    stage.run(_load(params))


@app.command()
def finetune(params: Params = PARAMS) -> None:
    """Train all weights of the linear classifier further; writes models/finetuned/. Continues after an interruption."""
    from moco.stages import finetune as stage

    stage.run(_load(params))


@app.command("eval")
def evaluate(
    params: Params = PARAMS,
    classifier: Annotated[
        Path, typer.Option(help="Its folder. Reports of another than the default go to reports/eval-NAME.")
    ] = Path("models/classifier"),
) -> None:
    """Score a classifier on val, through its submission.py and model_sub.pth alone."""
    from moco.stages import eval as stage

    stage.run(_load(params), classifier)


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

    sync_all(Path(), _load(params).tracking, typer.echo)


@app.command()
def ui(
    params: Params = PARAMS,
    port: Annotated[int, typer.Option(min=1, max=65535, help="Port on this machine.")] = 5000,
) -> None:
    """Start the MLflow UI on localhost and print its address."""
    from moco.tracking.ui import serve

    sys.exit(serve(_load(params).tracking, port, typer.echo))


@app.command("doctor")
def doctor_command(
    params: Params = PARAMS,
    step: Annotated[bool, typer.Option("--step", help="Take two small training steps as well.")] = False,
) -> None:
    """Tell what works on this machine, and what to do about what does not; exit code 1 if something must be done."""
    from moco.cluster import doctor

    sys.exit(doctor.run(params, step, typer.echo))


slurm_app = typer.Typer(help="Jobs on a cluster.", no_args_is_help=True)
app.add_typer(slurm_app, name="slurm")
PROFILE = Path("slurm/profiles/generic.conf")


@slurm_app.command(context_settings={"ignore_unknown_options": True})
def submit(
    job: Annotated[str, typer.Argument(help="A job of slurm/, or `pipeline` for all of them in their order.")],
    arguments: Annotated[list[str] | None, typer.Argument(help="For the stage, for example a checkpoint.")] = None,
    profile: Annotated[Path, typer.Option(help="Site profile.", envvar="MOCO_PROFILE")] = PROFILE,
    option: Annotated[list[str] | None, typer.Option(help="For sbatch, for example --option=--time=1:00:00.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the scripts and submit nothing.")] = False,
    sweep: Annotated[
        list[str] | None,
        typer.Option(help="KEY=VALUE,VALUE: a task of a job array for each value of a key of params.yaml; of several "
                     "keys, for each combination."),
    ] = None,
    name: Annotated[str | None, typer.Option(help="Of the sweep; its tasks are the experiments NAME-1, …")] = None,
) -> None:  # fmt: skip
    """Submit a job, or the pipeline as jobs that wait for each other."""
    from moco.cluster.profile import read_profile
    from moco.cluster.slurm import check_job
    from moco.cluster.slurm import submit as send
    from moco.cluster.sweep import plan

    check_job(job)
    send(job, read_profile(profile), profile, typer.echo, options=option or (), arguments=arguments or (),
         dry_run=dry_run, sweep=plan(job, sweep or (), name))  # fmt: skip


image_app = typer.Typer(help="The container image (needs a Docker engine).", no_args_is_help=True)
app.add_typer(image_app, name="image")
Tag = Annotated[str, typer.Option(help="Name of the image.")]
Gpus = Annotated[bool, typer.Option("--gpus", help="Give it all GPUs.")]
DatasetFolder = Annotated[Path | None, typer.Option(help="A dataset's folder, to appear as /dataset.")]


@image_app.command("build")
def image_build(
    tag: Tag = "moco-pipeline",
    base: Annotated[str | None, typer.Option(help="Another base image.")] = None,
    torch_index: Annotated[str | None, typer.Option(help="Wheel index for torch; '' for the default.")] = None,
    network: Annotated[str | None, typer.Option(help="Network of the build's steps, for example host.")] = None,
) -> None:
    """Build the Dockerfile of this checkout."""
    from moco.cluster import image

    image.build(image.Build(tag, base, torch_index, network), typer.echo)


@image_app.command("run", context_settings={"ignore_unknown_options": True})
def image_run(
    command: Annotated[list[str], typer.Argument(help="For example: dvc repro")],
    tag: Tag = "moco-pipeline", gpus: Gpus = False, dataset: DatasetFolder = None,
) -> None:  # fmt: skip
    """Run a command in the image on this checkout; what it writes belongs to you."""
    from moco.cluster import image

    sys.exit(image.run(tag, command, gpus=gpus, dataset=dataset))


@image_app.command("shell")
def image_shell(tag: Tag = "moco-pipeline", gpus: Gpus = False, dataset: DatasetFolder = None) -> None:
    """Open a shell in the image on this checkout."""
    from moco.cluster import image

    sys.exit(image.shell(tag, gpus=gpus, dataset=dataset))


@image_app.command("push-sif")
def image_push_sif(
    target: Annotated[str, typer.Argument(help="PATH.sif here, or HOST:PATH.sif (scp and ssh).")],
    tag: Tag = "moco-pipeline",
) -> None:
    """Turn the image into a SIF for Apptainer, here or on a cluster."""
    from moco.cluster import image

    image.push_sif(tag, target, typer.echo)


def main() -> None:
    """Entry point: a user's mistake is one line and exit code 1, an interruption 128 plus the signal.

    Of the processes of one run, the first of each node tells what all of them met.
    """
    tells = not _several() or os.environ.get("LOCAL_RANK", "0") == "0"
    try:
        with raise_on_signals():
            app()
    except UserError as error:
        if tells or isinstance(error, ProcessLostError):
            typer.echo(f"error: {error}", err=True)
        _end(1)
    except ModuleNotFoundError as error:
        if error.name not in ("torch", "torchvision"):
            raise
        typer.echo(
            f"error: {error.name} is not installed here; run this in the image, or after `make install`", err=True
        )
        _end(1)
    except Interrupted as error:
        if tells:
            typer.echo(str(error), err=True)
        _end(128 + error.signal)
    except SystemExit as end:
        _end(end.code)
    except BaseException:
        if _several():
            traceback.print_exc()
            _end(1)
        raise


def _end(code: str | int | None) -> NoReturn:
    if _several() and isinstance(code, int):
        from moco.training.distributed import end_process

        end_process(code)
    sys.exit(code)


if __name__ == "__main__":
    main()
