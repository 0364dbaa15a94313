"""The command line. Thin: one call per command, and imports only when a command runs."""

from __future__ import annotations

from moco import safe_path  # noqa: F401  # before all that imports more

# isort: split

import os
import sys
import traceback
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from moco import environment
from moco.accel.openmp import use_passive_wait_if_cores_are_busy
from moco.cli.cluster import image_app, slurm_app
from moco.cli.options import PARAMS, Params, load
from moco.cli.runs import runs_app
from moco.errors import AloneError, Interrupted, UserError, one_line
from moco.out_of_memory import FullMemory, full_memory, refuse_queue
from moco.training.interrupt import end_with_dvc, raise_on_signals

if TYPE_CHECKING:
    from moco.runs.identity import Start
    from moco.settings.schema import Config

app = typer.Typer(
    name="moco",
    help="Self-supervised pretraining (MoCo v2) and classifiers from few labels. Every command reads params.yaml in "
    "the current folder; `dvc repro` runs those that are not up to date.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.add_typer(runs_app)
app.add_typer(slurm_app, name="slurm")
app.add_typer(image_app, name="image")

PRESETS = Path("presets")
# Commands that torchrun may start, and those that only look; a stage that does not share its work would do it twice.
IN_SEVERAL_PROCESSES = (
    "pretrain", "report", "preset", "config", "sync", "ui", "compare", "origin", "doctor", "slurm", "image",
)  # fmt: skip

Resume = Annotated[
    Path | None,
    typer.Option(help="A checkpoint to start from; its length may differ, and the code since. Not needed after an "
                 "interruption: an unfinished run continues by itself."),
]  # fmt: skip

# What takes less memory.
SMALLER = {
    "pretrain": "lower pretrain.batch_size or pretrain.queue, or raise pretrain.accumulate",
    "profile": "lower pretrain.batch_size or pretrain.queue, or raise pretrain.accumulate",
    "baseline": "lower baseline.batch_size",
    "finetune": "lower finetune.batch_size or finetune.pool",
    "train": "lower train.views",
    "train_extra": "lower train.views",
    "eval": "lower eval.batch_size",
}


@app.callback()
def _every_command(context: typer.Context) -> None:
    if _several() and context.invoked_subcommand not in IN_SEVERAL_PROCESSES:
        from moco.training.distributed import refuse_several

        refuse_several(str(context.invoked_subcommand))


def _several() -> bool:
    return os.environ.get("WORLD_SIZE", "1") != "1"


def _load(params: Path, changes: dict[str, Any] | None = None) -> Config:
    """Load the settings for a command that computes, which imports torch after this call."""
    config = load(params, changes)
    # One thread waits for none; processes of one run have a share of the cores each; a GPU computes by itself.
    needless = config.runtime.threads == 1 or _several() or config.runtime.device.startswith("cuda")
    if not needless and use_passive_wait_if_cores_are_busy():
        typer.echo("note: others use these cores as well; threads wait for each other asleep", err=True)
    return config


def _tells() -> bool:
    """Return whether this process prints what concerns the whole run: of several processes, the first of each node."""
    return not _several() or os.environ.get("LOCAL_RANK", "0") == "0"


def _echo(text: str) -> None:
    if _tells():
        typer.echo(one_line(text), err=True)


def _start(stage: str, params: Path, changes: dict[str, Any] | None = None) -> Start:
    """Return what a stage finds when it begins.

    This happens before the stage is imported, so that no later change of its code goes unseen.
    """
    from moco.runs.identity import Start, refuse_other_code

    refuse_other_code(stage, _echo)
    return Start.of(stage, lambda: load(params, changes))


@app.command()
def data(params: Params = PARAMS) -> None:
    """Check the dataset, decode it once into the cache, write models/manifest.json."""
    start = _start("data", params)
    from moco.stages import data as stage

    stage.run(load(params), start)


@app.command()
def pretrain(
    params: Params = PARAMS,
    resume: Resume = None,
) -> None:
    """Train the encoder by momentum contrast on the unlabelled images; writes models/encoder.pth."""
    start, config = _start("pretrain", params), _load(params)
    if config.pretrain.method == "moco_v2":  # others have no queue
        refuse_queue(config.pretrain.queue, config.pretrain.dim)
    from moco.stages import pretrain as stage

    stage.run(config, resume, start)


@app.command()
def profile(
    params: Params = PARAMS,
    steps: Annotated[int, typer.Option(min=1, help="Steps to measure, after a warm-up.")] = 20,
) -> None:
    """Tell where the time of a pretraining step goes on this machine. Trains nothing and writes nothing."""
    config = _load(params)
    if config.pretrain.method == "moco_v2":  # others have no queue
        refuse_queue(config.pretrain.queue, config.pretrain.dim)
    from moco.stages import profile as stage

    stage.run(config, steps, typer.echo)


@app.command()
def train(params: Params = PARAMS) -> None:
    """Train a linear classifier on the frozen encoder; writes models/classifier/."""
    start, config = _start("train", params), _load(params)
    from moco.stages import train as stage

    stage.run(config, start)


@app.command()
def request(
    params: Params = PARAMS,
    budget: Annotated[int | None, typer.Option(min=1, help="Images, in place of request.budget.")] = None,
    strategy: Annotated[str | None, typer.Option(help="In place of request.strategy.")] = None,
) -> None:
    """Choose images of the pool to have labelled; writes models/request/: a form to fill in, and pictures."""
    changes = {"request.budget": budget, "request.strategy": strategy}
    start, config = _start("request", params, changes), _load(params, changes)
    from moco.stages import request as stage

    stage.run(config, start)


@app.command()
def label(
    params: Params = PARAMS,
    reply: Annotated[Path, typer.Option(help="Where answers go; an unfinished one is continued.")] = Path(
        "labels/reply.csv"
    ),
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port on this machine; 0: any that is free.")] = 0,
) -> None:
    """Answer a request by hand, on a page in the browser: one key an image, every answer saved at once."""
    from moco.labels import server

    server.run(load(params), reply, port, typer.echo)


@app.command("train_extra")
def train_extra(params: Params = PARAMS) -> None:
    """Train a linear classifier with extra labels; writes models/classifier_extra/."""
    start, config = _start("train_extra", params), _load(params)
    from moco.stages import train_extra as stage

    stage.run(config, start)


@app.command()
def baseline(params: Params = PARAMS) -> None:
    """Measure random weights, and supervised training on the labels alone, for comparison."""
    start, config = _start("baseline", params), _load(params)
    from moco.stages import baseline as stage

    stage.run(config, start)


@app.command()
def finetune(params: Params = PARAMS, resume: Resume = None) -> None:
    """Train all weights of the linear classifier further; writes models/finetuned/. Continues after an interruption."""
    start, config = _start("finetune", params), _load(params)
    from moco.stages import finetune as stage

    stage.run(config, resume, start)


@app.command("eval")
def evaluate(
    params: Params = PARAMS,
    classifier: Annotated[
        Path, typer.Option(help="Its folder. Reports of another than the default go to reports/eval-NAME.")
    ] = Path("models/classifier"),
    yes: Annotated[
        bool, typer.Option("--yes", help="Run its submission.py though this project did not write it.")
    ] = False,
) -> None:
    """Score a classifier on val, through its submission.py and model_sub.pth alone."""
    start, config = _start("eval", params), _load(params)
    from moco.exchange.known_submission import ask_before_running
    from moco.stages import eval as stage

    ask_before_running(classifier, yes, typer.confirm if sys.stdin.isatty() else None)
    stage.run(config, classifier, start)


@app.command()
def preset(
    name: Annotated[str | None, typer.Argument(help="Name of a preset; without it they are listed.")] = None,
    params: Params = PARAMS,
    force: Annotated[bool, typer.Option("--force", help="Overwrite changes of your own.")] = False,
) -> None:
    """Switch params.yaml to a preset; `git diff params.yaml` then shows what that changed."""
    from moco.settings import presets

    if name is None:
        typer.echo("\n".join(presets.names(PRESETS)))
        return
    presets.switch(PRESETS, name, params, force)
    typer.echo(f"{params} is now the preset {name}")


@app.command("config")
def config_command(
    name: Annotated[str, typer.Argument(help="A section or a key, such as pretrain.lr; all without it.")] = "",
    params: Params = PARAMS,
) -> None:
    """Print every setting with its value, where that comes from, and what it is; the output is a parameter file."""
    from moco.settings.listing import listed

    for line in listed(load(params), params.read_text(encoding="utf-8"), params, name):
        typer.echo(line)


@app.command("doctor")
def doctor_command(
    params: Params = PARAMS,
    step: Annotated[bool, typer.Option("--step", help="Take two small training steps as well.")] = False,
) -> None:
    """Tell what works on this machine, and what to do about what does not; exit code 1 if something must be done."""
    from moco.doctor import doctor

    sys.exit(doctor.run(params, step, typer.echo))


def main() -> None:
    """Run the command line: a user's mistake is one line and exit code 1, an interruption 128 plus the signal.

    Of the processes of one run, the first of each node tells what all of them met; each tells what it may have met
    alone, as full memory.
    """
    _run_the_experiments_own_code()
    tells = _tells()
    environment.shield(_echo)
    try:
        with raise_on_signals():
            end_with_dvc()
            app()
    except UserError as error:
        if tells or isinstance(error, AloneError):
            code = f" [{error.code}]" if error.code else ""
            typer.echo(f"error: {one_line(str(error))}{code}", err=True)
        _end(1)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] == "moco":
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
    except BaseException as error:
        if full := full_memory(error):
            traceback.clear_frames(error.__traceback__)  # what they hold may be all that there is
            typer.echo(f"error: {_advice(full)}", err=True)
            _end(1)
        if isinstance(error, OSError) and error.filename is not None:  # what nobody foresaw of a file: which, and why
            typer.echo(f"error: {one_line(f'{error.filename}: {error.strerror}')}", err=True)
            _end(1)
        if _several():
            traceback.print_exc()
            _end(1)
        raise


def _run_the_experiments_own_code() -> None:
    """Continue with the code of the experiment, in the folder of an experiment that DVC runs from its queue.

    The installed moco is the project's as it is now. It may have been edited since the experiment was queued.
    """
    from moco.files import home

    if home() == Path() or "MOCO_EXPERIMENT_CODE" in os.environ:
        return
    own = environment.other_checkout()
    if own is not None and environment.differing_code(own):
        path = os.pathsep.join([str(own.parent), *filter(None, [os.environ.get("PYTHONPATH")])])
        variables = {**os.environ, "PYTHONPATH": path, "MOCO_EXPERIMENT_CODE": str(own)}
        os.execve(sys.executable, environment.python_module("moco.cli", *sys.argv[1:]), variables)


def _advice(full: FullMemory) -> str:
    command = sys.argv[1] if len(sys.argv) > 1 else ""
    less = [SMALLER[command]] if command in SMALLER else []
    if full.gpu and command in ("pretrain", "profile"):
        less.append("set runtime.cuda_graphs: false")
    return f"{full.what}: {', or '.join([*less, 'run where there is more, or where others use less of it'])}"


def _end(code: str | int | None) -> NoReturn:
    if _several() and isinstance(code, int):
        from moco.training.distributed import end_process

        end_process(code)
    sys.exit(code)


if __name__ == "__main__":
    main()
