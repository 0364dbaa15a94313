"""The identity of a stage's result: the settings, inputs and code that it is made from.

DVC hashes them after a stage's command has ended. So the stage itself takes their digests when it begins, compares them
when it ends, and refuses to pass off as the new ones' what was made from the old.
"""

from __future__ import annotations

import ast
import functools
import hashlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from moco.environment import PACKAGE, differing_code, other_checkout
from moco.errors import Say, UserError, first_of
from moco.files import sha256
from moco.layout import CLASSIFIER, ENCODER, LABELS, MANIFEST, REQUEST
from moco.settings.kinds import flatten
from moco.settings.schema import Config

ROOM = 100  # characters that named differences may take in a line
CODE = "code"  # in a state: digests of the code that made it
HANDED_IN = ("eval.team_id", "eval.team_name", "eval.email_address")

# Sections and keys of params.yaml, and files and folders, that a stage depends on; `make dvc` writes them into
# dvc.yaml. DVC wants those keys in the file, so presets/default.yaml has them.
SETTINGS: dict[str, tuple[str, ...]] = {
    "data": ("data",),
    "pretrain": ("pretrain",),
    "train": ("train", "pretrain.precision", *HANDED_IN),
    "baseline": (
        "baseline", "train", "pretrain.encoder", "pretrain.stem", "pretrain.width", "pretrain.stages",
        "pretrain.convolutions", "pretrain.precision",
    ),
    "finetune": ("finetune", "train", "pretrain.precision", *HANDED_IN),
    "request": ("request", "pretrain.precision"),
    "train_extra": ("train_extra", "train", "pretrain.precision", *HANDED_IN),
    "eval": ("eval",),
}  # fmt: skip
INPUTS: dict[str, tuple[str, ...]] = {
    "data": (),
    "pretrain": (str(MANIFEST),),
    "train": (str(MANIFEST), str(ENCODER)),
    "baseline": (str(MANIFEST),),
    "finetune": (str(MANIFEST), str(ENCODER), "models/${finetune.classifier}"),
    "request": (str(MANIFEST), str(ENCODER), str(CLASSIFIER), str(LABELS)),
    "train_extra": (str(MANIFEST), str(ENCODER), str(CLASSIFIER), str(REQUEST), str(LABELS)),
    "eval": (str(MANIFEST),),  # and the classifier that is named
}

# These rooms and modules carry values, messages, records and whole files, and decide nothing about a stage's outputs,
CARRIERS = ("moco.settings.", "moco.tracking.", "moco.runs.", "moco.cli.")
CARRYING = {
    f"moco.{name}"
    for name in (
        "csv_files", "environment", "errors", "files", "layout", "out_of_memory", "redaction", "safe_path",
        "training.interrupt", "training.progress", "training.significance", "weights",
    )
}  # fmt: skip
# except these.
DECIDING = {
    f"moco.{name}"
    for name in (
        "runs.checkpoints", "runs.joins", "runs.resuming", "runs.rollback", "tracking.dvc_outputs", "tracking.figures",
    )
}  # fmt: skip
# What these find is in the manifest, by content; later stages refuse any other content.
BEHIND_THE_MANIFEST = {
    f"moco.data.{name}"
    for name in (
        "as_seen", "cache", "class_names", "class_tree", "dataset", "decode", "decode_outcome", "generated",
        "image_kinds", "label_meaning", "listing", "manifest", "overlaps", "prepare", "source_files", "sources",
        "squashfs", "squashfs_reader", "torchvision_sets",
    )
}  # fmt: skip
# Of these, what reads extra labels too.
FINDS_LABELS = {
    f"moco.data.{name}" for name in ("class_names", "class_tree", "image_kinds", "label_meaning", "listing")
}
# Its text is written into submission.py.
COPIED = {"moco.data.as_seen"}


def modules() -> dict[str, Path]:
    """Return the files of this package by the names of their modules."""
    found = {}
    for path in PACKAGE.rglob("*.py"):
        words = path.relative_to(PACKAGE.parent).with_suffix("").parts
        found[".".join(words).removesuffix(".__init__")] = path
    return found


def imports(module: str, known: dict[str, Path]) -> set[str]:
    """Return those of the `known` modules that a module imports, wherever in its text (lazy imports too)."""
    return {name for name in _imported(known[module].read_bytes(), frozenset(known)) if name in known}


@functools.cache
def _imported(text: bytes, known: frozenset[str]) -> frozenset[str]:
    try:
        tree = ast.parse(text)
    except (SyntaxError, ValueError):  # which is told when it is imported
        return frozenset()
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                found.add(inner if inner in known else node.module)
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return frozenset(found)


def closure(module: str, known: dict[str, Path]) -> set[str]:
    """Return a module and all that it imports, directly or not."""
    todo, seen = [module], set()
    while todo:
        current = todo.pop()
        if current not in seen:
            seen.add(current)
            todo.extend(imports(current, known))
    return seen


def _decides(module: str, known: dict[str, Path]) -> bool:
    """Return whether a module may decide what a stage makes. The packages' own files are empty."""
    carries = module in CARRYING or module.startswith(CARRIERS)
    return known[module].name != "__init__.py" and (module in DECIDING or not carries)


def code_modules(stage: str, known: dict[str, Path]) -> set[str]:
    """Return the modules that decide what a stage makes."""
    found = {name for name in closure(f"moco.stages.{stage}", known) if _decides(name, known)}
    if stage != "data":
        copied = COPIED if "moco.exchange.submission" in found else set()
        found -= BEHIND_THE_MANIFEST - copied - (FINDS_LABELS if stage == "train_extra" else set())
    return found


def code_of(stage: str) -> dict[str, str]:
    """Return the digests of the files that decide what a stage makes, by path below the package's folder."""
    known = modules()
    paths = sorted(known[name] for name in code_modules(stage, known))
    return {path.relative_to(PACKAGE.parent).as_posix(): sha256(path) for path in paths}


def settings_of(stage: str, config: Config) -> dict[str, str]:
    """Return the settings that a stage depends on, by dotted name, as text."""
    wanted = SETTINGS[stage]
    return {
        name: str(value) for name, value in flatten(config, "").items()
        if any(name == each or name.startswith(f"{each}.") for each in wanted)
    }  # fmt: skip


def digest_of(path: Path) -> str:
    """Return the sha256 of a file, or of a folder's names and contents; '' where nothing is there.

    Files that are being written, whose names begin with a dot, do not count.
    """
    if path.is_file():
        return sha256(path)
    if not path.is_dir():
        return ""
    digest = hashlib.sha256()
    for each in sorted(each for each in path.rglob("*") if not each.name.startswith(".") and each.is_file()):
        digest.update(f"{each.relative_to(path).as_posix()}\0{sha256(each)}\n".encode(errors="surrogateescape"))
    return digest.hexdigest()


def refuse_other_code(stage: str, say: Say) -> None:
    """Raise UserError where a stage would run other code than the current folder's src/moco has.

    dvc.lock, commit and patch would name the code of that folder. Where the only code that differs decides nothing
    about the stage's result, a message tells so.
    """
    other = other_checkout()
    if other is None or not (different := differing_code(other)):
        return
    needed = [name for name in different if name in code_of(stage)]
    if needed:
        raise UserError(
            f"moco runs from {PACKAGE}, and {len(needed)} of the files that this stage runs differ from src/moco here "
            f"({first_of(needed, 60)}): the record would be untrue; `make install` here and use its moco, or set "
            "PYTHONPATH=src",
            "E-RUN-OTHER-CODE",
        )
    say(
        f"warning: moco runs from {PACKAGE}; {len(different)} of its files differ from src/moco here "
        f"({first_of(different, 60)}), none that this stage's result depends on"
    )


def code_changes(before: dict[str, str], now: dict[str, str]) -> list[str]:
    """Return the files of code that were changed, added or removed."""
    return [name for name in sorted(before.keys() | now.keys()) if before.get(name) != now.get(name)]


@dataclass(frozen=True)
class Identity:
    """What a result is made from. settings: by dotted name, as text; inputs: digests by path; code: digests by path."""

    stage: str
    settings: dict[str, str]
    inputs: dict[str, str]
    code: dict[str, str]

    @classmethod
    def from_dict(cls, content: Any) -> Identity | None:
        """Return the identity that a file holds; None for anything else."""
        try:
            return cls(*(content[each.name] for each in fields(cls)))
        except (KeyError, TypeError):
            return None


@dataclass(frozen=True)
class Start:
    """What a command finds when it begins, before it imports the stage.

    code: digests of the stage's code; reread: reads the settings once more, None where they are in no file.
    """

    stage: str
    code: dict[str, str]
    reread: Callable[[], Config] | None = None

    @classmethod
    def of(cls, stage: str, reread: Callable[[], Config] | None = None) -> Start:
        """Return the start of a stage that begins now."""
        return cls(stage, code_of(stage), reread)

    def making(self, config: Config, *more: Path) -> Making:
        """Return what the stage makes its result from, with the inputs as they are now.

        more: inputs beside those that dvc.yaml lists.
        """
        inputs = _inputs(self.stage, config, more)
        identity = Identity(self.stage, settings_of(self.stage, config), inputs, self.code)
        return Making(identity, config, self.reread)


@dataclass(frozen=True)
class Making:
    """The identity of a result that is being made, all settings, and how to read them once more."""

    identity: Identity
    config: Config
    reread: Callable[[], Config] | None

    def in_state(self) -> dict[str, Any]:
        """Return what a state that training can be continued from says of the code that made it."""
        return {CODE: self.identity.code}

    def refuse_changes(self, kept: str) -> None:
        """Raise UserError (E-STAGE-CHANGED) where settings, inputs or code are no longer those of the beginning.

        kept: what became of the result."""
        if changed := [*self._settings(), *self._files()]:
            raise UserError(
                f"changed while `moco {self.identity.stage}` was at work: {first_of(changed, ROOM)}; {kept}",
                "E-STAGE-CHANGED",
            )

    def _settings(self) -> list[str]:
        if self.reread is None:
            return []
        stage, before = self.identity.stage, self.identity.settings
        try:
            now = settings_of(stage, self.reread())
        except UserError as error:
            return [str(error)]
        return [f"{name} was {value} and is {now.get(name)}" for name, value in before.items() if now[name] != value]

    def _files(self) -> list[str]:
        inputs = [name for name, digest in self.identity.inputs.items() if digest_of(Path(name)) != digest]
        code = [name for name, digest in self.identity.code.items() if digest_of(PACKAGE.parent / name) != digest]
        return inputs + code


def _inputs(stage: str, config: Config, more: Iterable[Path]) -> dict[str, str]:
    names = [name.replace("${finetune.classifier}", config.finetune.classifier) for name in INPUTS[stage]]
    names += [str(path) for path in more]
    if stage in ("request", "train_extra") and config.train_extra.labels is not None:
        names.append(config.train_extra.labels)
    return {name: digest_of(Path(name)) for name in dict.fromkeys(names)}
