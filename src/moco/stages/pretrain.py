"""Stage `pretrain`: momentum contrast on the unlabelled images; writes the encoder.

In one process or, started by torchrun, in several that share every batch: still one run, whose files rank 0 writes.
"""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import nn

from moco.data.batches import EpochSampler, Fetcher
from moco.data.cache import DecodedSplit
from moco.data.manifest import Manifest, load_manifest
from moco.data.prepare import open_decoded
from moco.encoders.encoder import last_width
from moco.errors import DivergedError, Interrupted, Say, UserError, present, say
from moco.exchange.encoder_file import save_encoder
from moco.files import scratch_folder, sha256
from moco.layout import ENCODER, MANIFEST, REPORTS
from moco.methods.step import ContrastStep, missing_kernels, pool, pretraining_views
from moco.runs import rollback
from moco.runs.checkpoints import CheckpointFolder
from moco.runs.identity import Making, Start
from moco.runs.outputs import locked_outputs
from moco.runs.resuming import is_branch, saved_state
from moco.runs.run_folder import RunFolder, open_run_folder, run_key
from moco.settings.kinds import flatten
from moco.settings.monitor import MonitorConfig
from moco.settings.schema import Config
from moco.stages.pretrain_settings import check, check_pool, check_shares
from moco.tracking import pictures
from moco.tracking.digests import write_provenance
from moco.tracking.dvc_outputs import write_curve, write_metrics
from moco.tracking.metric_log import metric_history
from moco.tracking.origin import origin
from moco.tracking.run import Run
from moco.training import features
from moco.training.architecture import chosen_architecture, described
from moco.training.distributed import DistributedContext, from_environment
from moco.training.interrupt import watch_signals
from moco.training.loop import Hooks, Length, LoopState, run_effort, run_loop
from moco.training.numerics import choose_device, choose_precision, refuse_broken, set_up
from moco.training.progress import ProgressDisplay
from moco.views.views import Views

COLLAPSED_STD = 0.01  # of unit-length features times sqrt(D); runs that learn have 0.3 to 1
MONITOR_BATCH = 512  # images
SHOWN = 8  # images whose views are drawn


@dataclass
class Monitor:
    """Held-out quality of the query encoder; ends a collapsed run. pool: digests of its images, N x 16 uint8."""

    config: MonitorConfig
    step: ContrastStep
    train: DecodedSplit
    classes: int
    pool: np.ndarray

    def __post_init__(self) -> None:
        seed = self.step.config.seed
        kept, held = features.stratified_holdout(self.train.known_labels, self.config.holdout, seed)
        if not len(held):
            raise UserError(
                "monitor.holdout: no class has two labelled images; none can be held out", "E-TRAIN-HOLDOUT"
            )
        self.kept, self.held = features.apart(kept, held, self.train.digests), held
        self.in_pool = features.count_in_pool(self.train.digests[held], self.pool)

    def described(self) -> str:
        """Return a line that says how many images are held out."""
        fraction = self.config.holdout
        return features.describe_holdout(self.train.known_labels, self.held, fraction, "monitor.holdout", self.in_pool)

    def __call__(self) -> dict[str, float]:
        """Measure the features of the query encoder and return the metrics.

        Raises DivergedError where the features collapsed.
        """
        step, network = self.step, self.step.model.encoder
        head, network.fc = network.fc, nn.Identity()  # features are what enters the head
        try:
            found = features.extract(
                network, self.train.images, step.views.plain, batch_size=MONITOR_BATCH,
                device=step.device, precision=step.precision,
            )  # fmt: skip
        finally:
            network.fc = head
        labels = torch.from_numpy(self.train.known_labels)
        shaped = found[:, -last_width(network) :]  # by contrast
        spread = features.feature_std(shaped)
        if not spread > COLLAPSED_STD:
            raise DivergedError(
                f"the features collapsed (standard deviation {spread:.4f}; runs that learn have 0.3 to 1): lower "
                "pretrain.lr, raise pretrain.queue or pretrain.momentum"
            )
        return {
            "knn_accuracy": features.knn_accuracy(
                found[self.kept], labels[self.kept], found[self.held], labels[self.held],
                neighbours=self.config.neighbours, classes=self.classes,
            ),
            "feature_std": spread,
            "effective_rank": features.effective_rank(shaped),
        }  # fmt: skip


def run(config: Config, resume: Path | None = None, start: Start | None = None) -> None:
    """Train, or continue the run of the same settings and data where one was interrupted.

    resume: a checkpoint of a run whose settings may differ in length. Raises UserError for bad input, DivergedError
    where checkpoint.max_rollbacks are used up; Interrupted after a signal, with the state saved.
    """
    section, processes = config.pretrain, from_environment()
    check(section, processes)
    device = processes.place(choose_device(config.runtime.device))
    if section.batch_norm == "sync" and device.type != "cuda":
        raise UserError(f"pretrain.batch_norm: sync needs CUDA GPUs, not {device.type}; use plain or split")
    precision = choose_precision(section.precision, device)
    set_up(device, config.runtime.threads, config.runtime.deterministic)
    making = (start or Start.of("pretrain")).making(config)
    manifest = load_manifest(MANIFEST)
    splits = open_decoded(config.data, manifest, scratch_folder(config.runtime.scratch), _speaker(processes))
    # Whose state has the form that the features give it; a setting, once.
    key = run_key({**flatten(section, "pretrain"), "pretrain.features": described(section).features}, manifest.digest)
    with processes.process_group(device), contextlib.ExitStack() as stack:
        missing = missing_kernels(section, device, config.runtime.gpu_kernels)
        facts = {"settings or data": key, "precision": str(precision), "BatchNorm (moco doctor)": str(missing is None)}
        processes.require_equal(facts)
        if missing:
            _speaker(processes)(f"note: BatchNorm is PyTorch's, which is slower: {missing}")

        def take() -> RunFolder:
            stack.enter_context(locked_outputs("pretrain", say))
            return stack.enter_context(open_run_folder("pretrain", key, making, lambda path: is_branch(path, resume)))

        folder = present(processes.broadcast(processes.on_rank_zero(take)), "the folder of the run")
        checkpoints = CheckpointFolder(folder.path, config.checkpoint.keep)
        while not folder.restored:
            try:
                _run(config, folder, checkpoints, manifest, splits, device, precision, resume, processes, making)
                break
            except DivergedError as error:
                processes.on_rank_zero(
                    rollback.roll_back, checkpoints, config.checkpoint.max_rollbacks, error, resume, say
                )
                _, signal = processes.agree(0.0, error.signal)
            if signal is not None:  # it came while training diverged, and is not forgotten
                raise Interrupted(signal, saved=True)
            gc.collect()  # the network that is given up, before there is another
        if not folder.restored:
            processes.on_rank_zero(folder.finish, making)
        processes.on_rank_zero(stack.close)  # here, so that all learn of a result that is not put into its place
    _speaker(processes)(f"pretrain: encoder -> {ENCODER}")


def _run(
    config: Config, run_folder: RunFolder, checkpoints: CheckpointFolder, manifest: Manifest,
    splits: dict[str, DecodedSplit], device: torch.device, precision: torch.dtype, resume: Path | None,
    processes: DistributedContext, making: Making,
) -> None:  # fmt: skip
    section, params = config.pretrain, flatten(config.pretrain, "pretrain")
    architecture = chosen_architecture(section, manifest)
    chosen = pool(len(splits["unlabeled"].images), section)
    sampler = EpochSampler(chosen, section.batch_size, section.seed, processes.rank, processes.size)
    check_shares(section, sampler.batch_size, processes.size)
    check_pool(section, sampler.batch_size, len(chosen), _speaker(processes))
    # Rank 0 sends the state itself: a folder that all nodes see, and see alike at once, is not needed.
    asked = (checkpoints, resume, params, manifest.digest, processes.size, making.identity)
    saved = processes.broadcast(processes.on_rank_zero(saved_state, *asked))
    steps_back = processes.broadcast(processes.on_rank_zero(rollback.taken, run_folder.path, saved)) or 0
    slower = replace(section, lr=rollback.rate(section.lr, steps_back))
    fast, views = (config.runtime.cuda_graphs, config.runtime.gpu_kernels), pretraining_views(section, manifest, device)
    step = ContrastStep(slower, views, device, precision, sampler.batch_size, processes, *fast)
    state = LoopState()
    if saved is not None:
        step.load_state(saved)
        state = LoopState(**saved["loop"])

    def save(state: LoopState) -> None:
        refuse_broken(step.model, state.step)
        if record is not None:
            record.sync()  # a state never stands on the disk without the lines that led to it
        content = {"params": {k: str(v) for k, v in params.items()}, "data": manifest.digest, **making.in_state()}
        content |= {"processes": processes.size} if processes.size > 1 else {}
        content |= {"steps_back": steps_back} if steps_back else {}
        path = checkpoints.save(state.epoch, {**content, "loop": state.as_dict(), **step.state()})
        if record is not None:
            record.checkpoint(path, state.step)

    chain = {**manifest.settings, **params}
    with contextlib.ExitStack() as stack:

        def begin() -> Run:
            record = stack.enter_context(Run(run_folder.path, "pretrain", config.tracking, say))
            record.start(
                {**chain, **flatten(config.monitor, "monitor")},
                origin(config, manifest, device),
                -1 if saved is None else state.step,
            )
            return record

        record = processes.on_rank_zero(begin)
        monitor = Monitor(config.monitor, step, splits["train"], len(manifest.classes), splits["unlabeled"].digests)
        _train(config, splits["unlabeled"].images, sampler, step, state, monitor, save, record, processes)

        def finish(record: Run) -> None:
            report, encoder = run_folder.own(REPORTS / "pretrain"), run_folder.own(ENCODER)
            save_encoder(encoder, step.model.encoder, architecture, manifest, chain)
            effort = {**run_effort(state, sampler.batch_size), "held_out_in_pool": float(monitor.in_pool)}
            record.log({**effort, **({"steps_back": steps_back} if steps_back else {})}, state.step + 1)
            record.artifact(_provenance(report, encoder, manifest, len(monitor.held)))
            record.artifact(write_metrics(record.path, report / "metrics.json", {}))
            record.artifact(write_curve(record.path, report / "loss.csv", "loss"))
            record.artifact(write_curve(record.path, report / "monitor.csv", "knn_accuracy"))
            _draw(record, splits["unlabeled"].images, step.views)

        processes.on_rank_zero(lambda: finish(present(record, "the record of rank 0")))
        processes.on_rank_zero(stack.close)  # here, so that all learn of a log that could not be brought to the disk


def _provenance(report: Path, encoder: Path, manifest: Manifest, held: int) -> Path:
    """Write what the encoder's file is of. held: images that kNN accuracy was measured on."""
    return write_provenance(report, manifest, encoder=sha256(encoder), images={"knn_accuracy": held})


def _draw(record: Run, images: np.ndarray, views: Views) -> None:
    """Draw the curves, and the views that the network learned to tell apart."""

    def draw_views(path: Path) -> None:
        some = np.array(images[:SHOWN])
        pictures.views(some, lambda unit, generator: views.augment(unit.to(views.device), generator)).save(path, "png")

    def draw_curves(path: Path) -> None:
        pictures.draw_curves(metric_history(record.path), ("loss", "knn_accuracy", "lr"))(path)

    record.picture("views", draw_views)
    record.picture("curves", draw_curves)


def _train(
    config: Config, images: np.ndarray, sampler: EpochSampler, step: ContrastStep, state: LoopState,
    monitor: Monitor, save: Callable[[LoopState], None], record: Run | None, processes: DistributedContext,
) -> None:  # fmt: skip
    """Run the loop to its end. record: of rank 0 alone."""
    if record is not None:
        precision = str(step.precision).removeprefix("torch.")
        several = f" in {processes.size} processes" if processes.size > 1 else ""
        say(monitor.described())
        say(f"pretrain: {len(sampler.indices)} images on {step.device}{several}, {precision}; log: {record.path}")
    fetcher = Fetcher(images, pin=step.device.type == "cuda")
    display = ProgressDisplay("pretrain", terminal=None if record is not None else False)
    with watch_signals() as stop, display:
        hooks = Hooks(
            record.log if record is not None else _nothing, config.monitor.log_every, display, stop, monitor,
            config.monitor.every, save, config.checkpoint.every, processes, timed_monitor=True,
        )  # fmt: skip
        try:
            run_loop(step, sampler, fetcher, Length(config.pretrain.epochs, config.pretrain.minutes), state, hooks)
        except DivergedError as error:
            error.signal = stop.signal
            raise


def _nothing(*told: object) -> None:
    """Ignore what processes other than rank 0 report: it only repeats rank 0."""


def _speaker(processes: DistributedContext) -> Say:
    return say if processes.rank == 0 else _nothing
