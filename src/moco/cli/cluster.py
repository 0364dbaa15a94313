"""Commands for clusters: jobs and the image."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

slurm_app = typer.Typer(help="Jobs on a cluster.", no_args_is_help=True)
PROFILE = Path("slurm/profiles/generic.conf")


@slurm_app.command()
def submit(
    job: Annotated[str, typer.Argument(help="A job of slurm/, or `pipeline` for all of them in their order.")],
    arguments: Annotated[
        list[str] | None, typer.Argument(help="For the stage, for example a checkpoint; options after `--`.")
    ] = None,
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
    from moco.cluster.sif import push_sif

    push_sif(tag, target, typer.echo)
