"""Which faults are tried, and the table of it in the README: `make faults` runs every test that carries the mark
`fault` and writes what it saw. A test that tries a fault more than once says so by its fixture `tries`. With `-k`, rows
whose tests were all chosen are written anew."""

from __future__ import annotations

import datetime
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

# Name of the mark: (fault, what is promised).
ROWS = {
    "kill": ("SIGKILL at any moment of data, pretrain, train, finetune, request",
             "the same command ends in the same bits; every logged step stands once; nothing is left over"),
    "kill-log": ("SIGKILL while MLflow is fed", "after `moco sync` MLflow has every step once"),
    "kill-process": ("SIGKILL of one process of several",
                     "the others end with one line; the run continues to the same bits"),
    "signal": ("SIGTERM, SIGINT, SIGUSR2, to one process or to all of several",
               "state saved at a step boundary, exit code 128 + signal, continues to the same bits"),
    "second-sigint": ("a second Ctrl-C", "stops at once; the run continues from its last checkpoint"),
    "full-disk": ("the disk is full at any byte of a checkpoint, log, cache or copy",
                  "one line; checkpoints of before stay sound; with room again the run continues to the same bits"),
    "full-memory": ("memory is refused: by the GPU, or by a limit on the process's",
                    "one line that says what to do; with more the run continues to the same bits"),
    "read-only": ("a folder that cannot be written", "one line, exit code 1, nothing lost"),
    "file-size": ("a limit on the size of files, as a quota gives", "one line; the checkpoint before stays sound"),
    "vanished": ("the run's folder, or the dataset, is removed while the run works", "one line, exit code 1"),
    "slow-rename": ("renames take long, as on a busy network share", "the same bits"),
    "clock": ("the clock jumps, back and ahead", "the same bits; time is measured by a clock that does not jump"),
    "two-jobs": ("a second job of the same run",
                 "refused while the first lives, on this machine or another; goes on where it died"),
    "changed-meanwhile": ("settings, inputs or sources are edited while a stage is at work",
                          "one line names them; dvc.lock stays; with the old ones back the result is taken "
                          "without making it again"),
    "other-code": ("an interrupted run's code is changed", "one line names the file; `--resume` continues on purpose"),
    "foreign-code": ("moco of another clone runs in this project's folder",
                     "refused where code of the stage differs, else recorded; moco doctor tells"),
    "damaged-reports": ("files of reports/ that are damaged, or that may not be read",
                        "named in a line; the other rows are shown"),
    "dvc-gone": ("DVC is killed while its stage is at work",
                 "the stage saves its state and ends; the next `dvc repro` continues it"),
    "damaged-checkpoint": ("a checkpoint is truncated or changed", "named, passed over; the one before it is used"),
    "damaged-cache": ("a decoded cache is truncated or changed", "built anew"),
    "bad-images": ("files that are no images, bombs, wrong sizes, odd modes", "named in one line with the reason"),
    "unlisted": ("links that lead nowhere or to folders, loops, pipes, sockets, folders and files without rights",
                 "named, whatever the source; an error, of the pool beyond what `data.unreadable` leaves out"),
    "damaged-squashfs": ("bytes of a squashfs image of PNG files flipped, images cut off",
                         "one line, or the same dataset; no hang"),
    "bad-labels": ("label tensors of wrong types, shapes, lengths and values", "one line that names the file"),
    "numbers-as-names": ("labels that are numbers where names of classes are numbers, in a spreadsheet's spellings",
                         "the class of that name, or refused with the names; positions where no name is a number"),
    "odd-tables": ("label files as programs write them: separators, encodings, empty rows, floats, JSON, workbooks",
                   "the same labels, guesses told; else one line with the remedy"),
    "long-cells": ("contents of any length in files that a message quotes", "one line of at most 300 characters"),
    "formulas": ("names that a spreadsheet takes for formulas, in every CSV file",
                 "written as text; read back as they were"),
    "two-pages": ("two pages of `moco label` answer the same image; its server is killed",
                  "refused with what the other answered; what was saved is there, the page says that it is gone"),
    "short-pool": ("a budget above what the pool has", "all of it is asked for, and said"),
    "bad-params": ("parameter files of any content", "one line with the place; the nearest name for a typo"),
    "source-changed": ("images changed in place, with settings and DVC's cache of before; a source that goes",
                       "the content that is there decides, or one line; read again only where files changed"),
    "overlap": ("one image in two splits, or in two classes",
                "told with every result; the pool loses what stands in val"),
    "other-data": ("an encoder or a classifier of other classes, another order of them, other images or another size",
                   "refused in one line that says which; told where it may be meant"),
    "learned-from": ("images that a classifier learned from are in val now: splits exchanged, images moved",
                     "refused with their names, by eval and fine-tuning; said where it could not be checked"),
    "small-data": ("a queue, a batch or its splits larger than the pool", "told with the real number, or refused"),
    "data-layout": ("folders of a class tree misspelt, nested, spelt otherwise, beside each other; a single class",
                    "read, or one line that names the folder and the nearest name"),
    "class-names": ("class names in two Unicode forms, with spaces at their ends, unseen characters, case alone",
                    "one class, refused or told"),
    "few-labels": ("fewer labels than chance would need",
                   "every class has its share; told where some get none"),
    "linear-optimum": ("a linear classifier that stopped short, or later for more labels",
                       "it is at the optimum that scikit-learn finds, whatever their number"),
    "worse-than-start": ("fine-tuning that makes the classifier worse",
                         "the start is a candidate; told on the screen, in the metrics and the log"),
    "holdout": ("a fraction of labels that classes are too small for", "the real number and fraction are told"),
    "progress": ("epochs that take hours, steps that take minutes, stages that compute in silence",
                 "states by minutes; the time left from the beginning; a line after each step"),
    "numbers": ("a metric that counts something else than its name, or has two values",
                "docs/metrics.md defines every name that a stage writes; log and report agree"),
    "divergence": ("loss or weights are no numbers, features collapse",
                   "stops before anything is saved, or steps back as often as configured; always told"),
    "code-in-weights": ("files of weights, labels and states that would run code",
                        "refused in one line; the code does not run"),
    "escape": ("names and links that lead out of their folder", "not followed, or refused"),
    "store": ("MLflow's server dead, late, failing or of another version; its disk full",
              "training goes on; `moco sync` brings it"),
    "strangers": ("requests to the label page without token or by another host's name; another user's cache",
                  "refused"),
    "determinism": ("another folder, another clone", "the same bits of `model_sub.pth`"),
    "long-run": ("20,000 steps", "memory, file handles and the log's growth stay flat"),
    "clean": ("moco clean beside results, records and a run at work", "only what can be made again goes, after a yes"),
    "strange-code": ("a stranger's submission.py, a patch in the tracking store",
                     "shown, and run or applied after a yes; links and ways out of the project are refused"),
    "environment": ("variables that notebooks, hooks and other allocations have set",
                    "meant and documented, or without effect; what is left out of a record is told"),
    "module-names": ("files in the project named like Python's modules", "not imported by any process"),
    "odd-names": ("folders and classes named with %, ?, #, $, _, brackets, other scripts, 300 letters",
                  "everything lies in the project; each name is shown as it is"),
    "secrets": ("passwords, tokens and keys in addresses, settings, DVC's config, sources and files that lie about",
                "neither messages nor logs nor MLflow show them; only sources and settings are recorded"),
    "store-schema": ("an MLflow store of an older version", "no command changes it; one line says how to"),
    "store-state": ("an experiment that was deleted, a registry that is dead",
                    "one line at the start, and by `moco doctor`, says what to do; the run goes on"),
    "moved-store": ("a project with its MLflow store is moved, or copied",
                    "artifacts are found and written beside the store; the original is left alone; told"),
    "rows": ("stages reach MLflow late, out of order, cut off, or not at all for a while",
             "after `moco sync` every pipeline's row has the values of an undisturbed run"),
    "deleted-runs": ("runs, rows and versions that somebody deleted in MLflow, also for good",
                     "they stay deleted and are told; `moco sync --again RUN` brings them back"),
    "odd-log": ("a metric log with lines without sense, or of a newer format",
                "one line with its number; the other runs are synced and compared"),
    "unreadable-runs": ("folders of runs that may not be read, or lead nowhere", "counted and named; sync is not well"),
    "crowd": ("ten pipelines at once on one MLflow server, one DVC cache and one decoded cache",
              "all finish; nothing is mixed up"),
    "gate": ("candidates that are lucky, or were measured on other or too few held-out images",
             "the champion stays (equal candidates, however many, displace it by luck in 5 % at most); the reason has "
             "the numbers"),
    "chain": ("stages run again one by one, so that reports, encoder and classifier are of different runs",
              "each row and record has its own run's numbers; what does not belong to the rest says so"),
}  # fmt: skip
incomplete: set[str] = set()  # rows of which not all tests were chosen: they stay as they are
BEGIN, END = "<!-- faults: written by `make faults` -->", "<!-- end of faults -->"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--write-faults", metavar="FILE", help="put the table of faults into this Markdown file")


@pytest.fixture
def tries(record_property: Callable[[str, object], None]) -> Callable[[int], None]:
    """Says how many times a test has tried its fault, where the mark does not; once otherwise."""
    return lambda count: record_property("tries", count)


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> object:
    outcome = yield
    for mark in item.iter_markers("fault"):
        told = outcome.get_result().user_properties  # type: ignore[attr-defined]
        told += [("fault", mark.args[0]), *(("tries", count) for count in mark.args[1:])]


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--write-faults") and config.args != config.getini("testpaths"):
        raise pytest.UsageError("--write-faults looks at all files; choose rows by -k")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        for mark in item.iter_markers("fault"):
            assert mark.args[0] in ROWS, f"{item.nodeid}: no fault is called {mark.args[0]}"


def pytest_deselected(items: list[pytest.Item]) -> None:
    incomplete.update(mark.args[0] for item in items for mark in item.iter_markers("fault"))


def pytest_terminal_summary(terminalreporter: object, config: pytest.Config) -> None:
    place = config.getoption("--write-faults")
    if not place:
        return
    tried: Counter[str] = Counter()
    failed: Counter[str] = Counter()
    skipped: Counter[str] = Counter()
    for status, reports in terminalreporter.stats.items():  # type: ignore[attr-defined]
        for report in reports:
            found = dict(getattr(report, "user_properties", []))
            if "fault" in found and status == "skipped":
                skipped[found["fault"]] += 1
            if "fault" not in found or status not in ("passed", "failed", "error") or report.when == "teardown":
                continue
            if status != "passed" or report.when == "call":
                tried[found["fault"]] += int(found.get("tries", 1))
                failed[found["fault"]] += status != "passed"
    path = Path(place)
    text = path.read_text(encoding="utf-8")
    rows = {row.fault: row for row in rows_of(text)}
    for name, (fault, promise) in ROWS.items():
        if name not in incomplete:
            result = f"{failed[name]} test(s) failed" if failed[name] else "as promised" if tried[name] else "not tried"
            result += f"; {skipped[name]} skipped" if skipped[name] else ""
            rows[fault] = Row(fault, promise, tried[name], result, str(datetime.date.today()))
    begin, end = text.index(BEGIN), text.index(END)
    table = render([rows[fault] for fault, _ in ROWS.values() if fault in rows])
    path.write_text(f"{text[:begin]}{BEGIN}\n{table}\n{text[end:]}", encoding="utf-8")


@dataclass(frozen=True)
class Row:
    """Of the table: how many times a fault was tried on a day, and what came of it."""

    fault: str
    promise: str
    tried: int
    result: str
    date: str


def render(rows: list[Row]) -> str:
    """The table in Markdown."""
    lines = ["| fault | what is promised | tried | result | on |", "|---|---|---|---|---|"]
    lines += [f"| {row.fault} | {row.promise} | {row.tried} | {row.result} | {row.date} |" for row in rows]
    return "\n".join(lines)


def rows_of(text: str) -> list[Row]:
    """Those of the table in a text."""
    part = text[text.index(BEGIN) : text.index(END)]
    found = re.finditer(r"^\| (.+?) \| (.+?) \| (\d+) \| (.+?) \| (.+?) \|$", part, re.MULTILINE)
    return [Row(m[1], m[2], int(m[3]), m[4], m[5]) for m in found]
