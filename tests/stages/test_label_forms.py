"""Extra labels in every form: each gives the same classifier, and what is wrong with one is a line."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from stage_helpers import run_all

from conftest import Moco, assert_one_line_error, write_params
from moco.data.cache import DecodedSplit
from moco.data.decode import digests_of
from moco.data.label_meaning import ClassNames
from moco.errors import UserError
from moco.labels.extra_file import CONTENT, EXTRA_LABELS, content, packed, read_extra
from moco.weights import save_weights

EXTRA = {17: 2, 3: 3, 39: 4, 8: 3, 21: 1}  # the right labels: the number modulo 5


@pytest.fixture
def by_csv(moco: Moco, project: Path) -> bytes:
    """The classifier that a CSV file of EXTRA gives."""
    (project / "labels.csv").write_text("image,label\n" + "".join(f"{i}.png,{c}\n" for i, c in EXTRA.items()))
    write_params(project, train_extra__labels="labels.csv")
    run_all(moco, "data", "pretrain", "train_extra")
    return result(project)


def result(project: Path) -> bytes:
    return (project / "models/classifier_extra/model_sub.pth").read_bytes()


def table(project: Path) -> list[dict[str, str]]:
    with (project / "reports/train_extra/labels.csv").open() as file:
        return list(csv.DictReader(file))


def weights(data: bytes, folder: Path) -> torch.Tensor:
    (folder / "read.pth").write_bytes(data)
    found: torch.Tensor = torch.load(folder / "read.pth", weights_only=True)["fc.weight"]
    return found


def test_json_lines(moco: Moco, project: Path, by_csv: bytes) -> None:
    lines = [json.dumps({"image": f"{i}.png", "label": c, "by": "me"}) for i, c in EXTRA.items()]
    (project / "labels.jsonl").write_text("\n".join(lines) + "\n\n")
    write_params(project, train_extra__labels="labels.jsonl")
    run_all(moco, "train_extra")
    assert torch.equal(weights(result(project), project), weights(by_csv, project))
    for line, words in (('{"image": "1.png"}', "image and label"), ("{", "not JSON"), ("[1]", "an object"),
                        ('{"image": "1.png", "label": 1.5}', "label is 1.5")):  # fmt: skip
        (project / "labels.jsonl").write_text(lines[0] + "\n" + line + "\n")
        assert_one_line_error(moco("train_extra"), "labels.jsonl:2", words)


def test_a_folder_of_label_files_is_all_of_them(moco: Moco, project: Path, by_csv: bytes) -> None:
    rounds = project / "rounds"
    rounds.mkdir()
    rows = [f"{i}.png,{c}" for i, c in EXTRA.items()]
    (rounds / "1.csv").write_text("\n".join(["image,label", *rows[:2]]))
    (rounds / "2.csv").write_text("\n".join(["label,image", *(",".join(reversed(row.split(","))) for row in rows[2:])]))
    (rounds / "README.md").write_text("not a table")
    write_params(project, train_extra__labels="rounds")
    run_all(moco, "train_extra")
    assert torch.equal(weights(result(project), project), weights(by_csv, project))
    assert [row["source"] for row in table(project)[20:]] == [f"rounds/1.csv:{n}" for n in (2, 3)] + [
        f"rounds/2.csv:{n}" for n in (2, 3, 4)
    ]


def test_a_folder_per_class(moco: Moco, project: Path, by_csv: bytes) -> None:
    for number, label in EXTRA.items():
        folder = project / "sorted" / str(label)
        folder.mkdir(parents=True, exist_ok=True)
        shutil.copy(project / f"dataset/unlabeled/{number}.png", folder / f"photo {number}.png")
    (project / "sorted/1/notes.txt").touch()
    write_params(project, train_extra__labels="sorted")
    done = moco("train_extra")
    assert done.returncode == 0 and "1 file(s) in sorted/1 are no images by their names" in done.stderr, done.stderr
    assert torch.equal(weights(result(project), project), weights(by_csv, project))
    Image.fromarray(np.full((32, 32, 3), 7, np.uint8)).save(project / "sorted/0.png")  # beside the classes: ignored
    (project / "sorted/seven").mkdir()
    shutil.copy(project / "dataset/unlabeled/1.png", project / "sorted/seven")
    assert_one_line_error(moco("train_extra"), "sorted/seven/1.png", "'seven' is no class")
    shutil.rmtree(project / "sorted/seven")
    (project / "sorted/1/broken.png").write_bytes(b"no picture")
    assert_one_line_error(moco("train_extra"), "sorted/1/broken.png", "not an image")


def test_the_originals_form(moco: Moco, project: Path, by_csv: bytes) -> None:
    """More images at the end of train/, their labels at the end of the tensor; known by what they show, so that another
    order of the first ones does no harm, and a label that has slipped is refused."""
    extended = project / "extended/train"
    shutil.copytree(project / "dataset/train", extended)
    labels = torch.load(project / "dataset/train_label_tensor.pt").tolist()
    for place, (number, label) in enumerate(EXTRA.items(), len(labels)):
        shutil.copy(project / f"dataset/unlabeled/{number}.png", extended / f"{place}.png")
        labels.append(label)
    tensor = project / "extended/train_label_tensor.pt"
    torch.save(torch.tensor(labels), tensor)
    write_params(project, train_extra__labels="extended")
    run_all(moco, "train_extra")
    assert torch.equal(weights(result(project), project), weights(by_csv, project))
    torch.save(torch.tensor(labels[1:] + labels[:1]), tensor)
    assert_one_line_error(moco("train_extra"), "train/0.png", "has the label 1 here and 0 in train")


def test_numbers_of_a_tensor_are_not_taken_for_names(moco: Moco, project: Path, by_csv: bytes) -> None:
    """As where classes are called 1 to 5: the tensor's 1 is the class called 2."""
    (project / "dataset/classes.txt").write_text("1\n2\n3\n4\n5\n")
    write_params(project, train_extra__labels="dataset")
    done = moco("data")
    assert done.returncode == 0, done.stderr
    assert "20 line(s) say again what train says" in moco("train_extra").stderr
    assert ClassNames(["1", "2"]).find("here", "1") == (0, False)


def test_extra_labels_of_a_pool_that_has_changed_are_refused(tmp_path: Path) -> None:
    def split(*numbers: int) -> DecodedSplit:
        images = np.stack([np.full((4, 4, 3), number, np.uint8) for number in numbers])
        digests = np.frombuffer(digests_of(images), np.uint8).reshape(len(images), -1)
        return DecodedSplit(images, np.array(numbers), digests)

    extra, pool = split(1, 2, 9), split(0, 1, 2, 3)
    settings = {CONTENT: content(extra.digests, np.array([1, 2, 9]))}

    save_weights(tmp_path / EXTRA_LABELS, packed(extra, pool))
    kept = read_extra(tmp_path, pool, settings)
    assert kept is not None and np.array_equal(kept.images, extra.images)
    for changed in (split(0, 3), split(0, 1, 3), split(0, 1, 3, 9)):
        with pytest.raises(UserError, match="not of this data"):
            read_extra(tmp_path, changed, settings)


def test_images_that_are_not_in_the_pool_bring_their_pixels(moco: Moco, project: Path, by_csv: bytes) -> None:
    (project / "new/4").mkdir(parents=True)
    Image.fromarray(np.full((32, 32, 3), 200, np.uint8)).save(project / "new/4/bright.png")
    write_params(project, train_extra__labels="new")
    done = moco("train_extra")
    assert done.returncode == 0 and "1 labels added to 20" in done.stderr, done.stderr
    assert [row["status"] for row in table(project)[20:]] == ["used"]


def test_every_label_says_where_it_is_from(moco: Moco, project: Path, by_csv: bytes) -> None:
    (project / "labels.csv").write_text("image,label\n17,2\n3,\n17.png,2\n")
    done = moco("train_extra")
    assert "1 line(s) have no label yet, first labels.csv:3" in done.stderr, done.stderr
    rows = table(project)
    assert [(row["image"], row["source"], row["status"]) for row in rows[19:]] == [
        ("train/19", "train", "used"), ("17", "labels.csv:2", "used"), ("3", "labels.csv:3", "no label yet"),
        ("17.png", "labels.csv:4", "repeated"),
    ]  # fmt: skip
    assert len({row["content"] for row in rows}) == 22 and rows[20]["label"] == "2"


def test_without_labels_the_stage_hands_on_what_train_made(moco: Moco, project: Path) -> None:
    write_params(project)
    run_all(moco, "data", "pretrain", "train", "eval", "train_extra")
    assert result(project) == (project / "models/classifier/model_sub.pth").read_bytes()
    assert json.loads((project / "reports/train_extra/metrics.json").read_text())["extra_labels"] == 0
    done = moco("eval", "--classifier", "models/classifier_extra")
    assert done.returncode == 0 and "warning" not in done.stderr, done.stderr
    assert "extra labels" not in moco("report").stdout
