"""Names of classes and images that another program reads as something else: as a number, or as a formula."""

from __future__ import annotations

import csv
import shutil
from pathlib import Path

import pytest
import torch

from conftest import Moco, assert_one_line_error, write_params
from moco.errors import UserError
from moco.labels.reply import Reply

FORM = Path("models/request/request.csv")


def make_tree(project: Path, classes: list[str], pool: str = "{}.png") -> list[str]:
    """The tiny dataset as a class tree, by which class i has the images of label i. pool: names of the pool's images.
    Returns the names in the order of the labels."""
    for split, count in (("train", 20), ("val", 10)):
        for number in range(count):
            folder = project / "tree" / split / classes[number % len(classes)]
            folder.mkdir(parents=True, exist_ok=True)
            shutil.copy(project / f"dataset/{split}/{number}.png", folder / f"{number}.png")
    (project / "tree/unlabeled").mkdir()
    for number in range(40):
        shutil.copy(project / f"dataset/unlabeled/{number}.png", project / "tree/unlabeled" / pool.format(number))
    return sorted(classes)


def settings(project: Path, **changes: object) -> None:
    found = {"data__source": "classes", "data__path": "tree", "data__classes": None, "train_extra__labels": "reply.csv"}
    write_params(project, **{**found, "pretrain__epochs": 1, **changes})


def run(moco: Moco, *stages: str) -> str:
    said = ""
    for stage in stages:
        done = moco(*stage.split())
        assert done.returncode == 0, f"{stage}: {done.stderr}"
        said += done.stderr
    return said


@pytest.mark.fault("numbers-as-names", 4)
def test_a_spreadsheet_that_made_1_of_01_is_refused(moco: Moco, project: Path) -> None:
    """Every label was once taken for a position, and was off by one."""
    classes = make_tree(project, [f"{number:02}" for number in range(1, 6)])
    settings(project)
    run(moco, "data", "pretrain", "request")
    with FORM.open(newline="") as file:
        rows = list(csv.reader(file))
    for label, good in ((lambda n: n % 5 + 1, False), (lambda n: f"{n % 5 + 1}.0", False), (lambda n: n % 5, False),
                        (lambda n: f"{n % 5 + 1:02}", True)):  # fmt: skip
        answered = [[row[0], str(label(int(row[0].removesuffix(".png")))), *row[2:]] for row in rows[1:]]
        with Path("reply.csv").open("w", newline="") as file:
            csv.writer(file, delimiter=";").writerows([rows[0], *answered])
        if good:
            assert "5 labels added to 20" in run(moco, "train_extra")
            assert Reply(FORM, Path("reply.csv"), classes).answered == 5
        else:
            assert_one_line_error(moco("train_extra"), "reply.csv:2", "01, 02, 03, 04, 05", "[E-LABEL-NUMBERS]")
            with pytest.raises(UserError) as caught:
                Reply(FORM, Path("reply.csv"), classes)
            assert caught.value.code == "E-LABEL-NUMBERS"
    with Path("reports/train_extra/labels.csv").open(newline="") as file:
        extra = [row for row in csv.DictReader(file) if row["source"].startswith("reply.csv")]
    assert [int(row["class"]) for row in extra] == [int(row["image"].removesuffix(".png")) % 5 + 1 for row in extra]


@pytest.mark.fault("numbers-as-names", 3)
def test_classes_called_1_to_5_beside_a_tensor_of_0_to_4(moco: Moco, project: Path) -> None:
    (project / "dataset/classes.txt").write_text("1\n2\n3\n4\n5\n")
    write_params(project, pretrain__epochs=1, train_extra__labels="labels.csv")
    assert "0 is 1, 1 is 2" in run(moco, "data", "pretrain")
    Path("labels.csv").write_text("image,label\n17.png,3.0\n3.png,4.0\n8,\n")
    assert "2 labels added" in run(moco, "train_extra")
    with Path("reports/train_extra/labels.csv").open() as file:
        assert [(row["label"], row["class"]) for row in csv.DictReader(file)][20:] == [("2", "3"), ("3", "4"), ("", "")]
    Path("labels.csv").write_text("image,label\n17.png,2\n3.png,0\n")
    assert_one_line_error(moco("train_extra"), "labels.csv:3", "1, 2, 3, 4, 5", "[E-LABEL-NUMBERS]")
    (project / "extended/train").mkdir(parents=True)
    shutil.copy(project / "dataset/unlabeled/7.png", project / "extended/train/0.png")
    torch.save(torch.tensor([2]), project / "extended/train_label_tensor.pt")
    write_params(project, pretrain__epochs=1, train_extra__labels="extended")
    assert "1 label(s) are positions of classes, counted from 0: 0 is 1, 1 is 2" in run(moco, "train_extra")


@pytest.mark.fault("formulas", 5)
def test_no_csv_file_holds_a_formula_and_names_come_back(moco: Moco, project: Path) -> None:
    classes = make_tree(project, ["=1+1", "+2", "@x", "-a", "'=q"], pool='=HYPERLINK("http:a;={}").png')
    settings(project)
    run(moco, "data", "pretrain", "train", "request", "eval")
    reply = Reply(FORM, Path("reply.csv"), classes)
    assert sorted(line.name for line in reply.lines)[0].startswith("=HYPERLINK")
    for place, line in enumerate(reply.lines):
        number = int(line.name.rpartition("=")[2].removesuffix('").png'))
        reply.answer(place, ["=1+1", "+2", "@x", "-a", "'=q"][number % 5], "")
    assert Reply(FORM, Path("reply.csv"), classes).answered == 5
    assert "5 labels added to 20" in run(moco, "train_extra")
    written = [*project.glob("reports/**/*.csv"), *project.glob("models/**/*.csv"), Path("reply.csv")]
    assert {path.name for path in written} >= {
        "request.csv", "reply.csv", "labels.csv", "predictions.csv", "classes.csv", "epochs.csv", "loss.csv"
    }  # fmt: skip
    for path in written:
        for separator in ",;\t":
            with path.open(newline="") as file:
                cells = [cell for row in csv.reader(file, delimiter=separator) for cell in row]
            if separator == ",":
                assert len(cells) > 2
            for cell in cells:
                assert cell.lstrip('"')[:1] not in ("=", "+", "@") and (cell[:1] != "-" or float(cell) < 0), (
                    path,
                    cell,
                )
