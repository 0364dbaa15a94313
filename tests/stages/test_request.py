"""Requests: the form, what is not asked for, the way back through train_extra, and everything that may be wrong."""

from __future__ import annotations

import csv
import json
import os
import shutil
import typing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from stage_helpers import run_all

from conftest import Moco, assert_one_line_error, write_params
from moco.data.manifest import load_manifest
from moco.encoders.encoder import build_encoder
from moco.exchange.classifier_files import read_classifier
from moco.settings.request import RequestConfig
from moco.stages.train import linear_views
from moco.training import features

STRATEGIES = typing.get_args(typing.get_type_hints(RequestConfig)["strategy"])


def form(project: Path) -> list[dict[str, str]]:
    with (project / "models/request/request.csv").open() as file:
        return list(csv.DictReader(file))


def answer(project: Path, rows: list[dict[str, str]], name: str = "reply.csv") -> None:
    with (project / name).open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0].keys())
        writer.writeheader()
        writer.writerows(rows)


@pytest.fixture
def trained(moco: Moco, project: Path) -> Path:
    run_all(moco, "data", "pretrain", "train")
    return project


def test_every_strategy_asks_for_different_images_and_for_the_same_again(moco: Moco, trained: Path) -> None:
    asked = set()
    for strategy in STRATEGIES:
        done = moco("request", "--strategy", strategy, "--budget", "7")
        assert done.returncode == 0, done.stderr
        rows = form(trained)
        assert len({row["image"] for row in rows}) == 7 and [row["rank"] for row in rows] == list("1234567"), strategy
        assert all(row["label"] == "" for row in rows)
        assert list(rows[0]) == ["image", "label", "rank", "score", "cluster", "content"]
        first = (trained / "models/request/request.csv").read_bytes()
        shutil.rmtree(trained / "runs/request")  # else the same form is put back, not made again
        assert moco("request", "--strategy", strategy, "--budget", "7").returncode == 0
        assert (trained / "models/request/request.csv").read_bytes() == first, strategy
        found = json.loads((trained / "reports/request/metrics.json").read_text())
        assert found["images"] == 7 and sum(found["expected"].values()) == pytest.approx(7, abs=0.3)
        assert 0 < found["coverage_before"] < found["coverage_after"] <= 1
        (page,) = (trained / "models/request/gallery").iterdir()
        with Image.open(page) as picture:
            assert picture.width > 7 * 64
        asked.add(frozenset(row["image"] for row in rows))
    assert len(asked) >= len(STRATEGIES) - 1, "they are not all the same strategy"


def test_every_strategy_works_in_bf16(moco: Moco, project: Path) -> None:
    """What `auto` takes on most machines; the jitter of small images once met it."""
    write_params(project, pretrain__precision="bf16")
    run_all(moco, "data", "pretrain", "train")
    for strategy in STRATEGIES:
        done = moco("request", "--strategy", strategy, "--budget", "7")
        assert done.returncode == 0, done.stderr
        assert len({row["image"] for row in form(project)}) == 7, strategy


def test_nothing_that_is_labelled_and_no_copy_is_asked_for(moco: Moco, project: Path) -> None:
    dataset = project / "dataset"
    shutil.copy(dataset / "train/6.png", dataset / "unlabeled/8.png")
    shutil.copy(dataset / "val/4.png", dataset / "unlabeled/9.png")
    shutil.copy(dataset / "unlabeled/1.png", dataset / "unlabeled/2.png")
    for original, near in (("unlabeled/1.png", "unlabeled/3.png"), ("val/5.png", "unlabeled/10.png")):
        with Image.open(dataset / original) as picture:
            pixels = np.asarray(picture).astype(int) + np.eye(32, dtype=int)[..., None]
        Image.fromarray(pixels.astype(np.uint8)).save(dataset / near)
    (project / "labels.csv").write_text("image,label\n17,2\n")
    write_params(project, train_extra__labels="labels.csv", request__strategy="coreset")
    run_all(moco, "data", "pretrain")
    assert moco("request", "--budget", "34").returncode == 0
    asked = {row["image"] for row in form(project)}
    assert not asked & {"8.png", "9.png", "10.png", "17.png", "2.png"}
    assert len(asked & {"1.png", "3.png"}) == 1
    assert len(asked) == 34


def test_margins_are_those_of_the_classifier_and_the_pool_is_read_once(
    moco: Moco, trained: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[int] = []
    extract = features.extract

    def counted(network: torch.nn.Module, images: np.ndarray, *arguments: Any, **more: Any) -> torch.Tensor:
        read.append(len(images))
        return extract(network, images, *arguments, **more)

    monkeypatch.setattr(features, "extract", counted)
    assert moco("request", "--strategy", "margin", "--budget", "3").returncode == 0
    manifest = load_manifest(trained / "models/manifest.json")
    pool, labelled = (manifest.splits[name].count for name in ("unlabeled", "train"))
    assert read == [pool, labelled, 3], "the pool, what has labels, and what is asked for"
    classifier = read_classifier(trained / "models/classifier")
    network = build_encoder(classifier.architecture, len(classifier.classes))
    network.load_state_dict(classifier.weights)
    plain = linear_views(manifest, torch.device("cpu")).plain
    for row in form(trained):
        with Image.open(trained / "dataset/unlabeled" / row["image"]) as picture:
            outputs = extract(network, np.asarray(picture)[None], plain, batch_size=1, device=torch.device("cpu"))
        first, second = torch.softmax(outputs[0], 0).topk(2).values.tolist()
        assert float(row["score"]) == pytest.approx(second - first, abs=1e-4)


def test_an_answered_form_trains_the_classifier(moco: Moco, trained: Path) -> None:
    run_all(moco, "request")
    rows = form(trained)
    for row in rows[:-1]:
        row["label"] = str(int(row["image"].removesuffix(".png")) % 5)
    answer(trained, rows)
    write_params(trained, train_extra__labels="reply.csv")
    done = moco("train_extra")
    assert done.returncode == 0 and "4 labels added to 20" in done.stderr, done.stderr
    assert "1 line(s) have no label yet, first reply.csv:6" in done.stderr
    run_all(moco, "request")
    assert not {row["image"] for row in form(trained)} & {row["image"] for row in rows[:-1]}, "the next round"


def test_a_reply_that_does_not_belong_here(moco: Moco, trained: Path) -> None:
    run_all(moco, "request")
    rows = form(trained)
    for row in rows:
        row["label"] = "1"
    write_params(trained, train_extra__labels="reply.csv")
    answer(trained, [{**rows[0], "content": rows[1]["content"]}, *rows[1:]])
    assert_one_line_error(moco("train_extra"), "reply.csv:2", "another image than was asked for", "changed")
    answer(trained, [{**row, "content": f"{number:032x}"} for number, row in enumerate(rows)])
    assert_one_line_error(moco("train_extra"), "reply.csv", "a request on another dataset", "none of its 5 images")
    answer(trained, [{**rows[0], "image": "999.png"}, *rows[1:]])
    assert_one_line_error(moco("train_extra"), "reply.csv:2", "'999.png' is not in the unlabelled pool")
    answer(trained, [*rows, {**rows[0], "label": "2"}])
    assert_one_line_error(moco("train_extra"), "reply.csv:7", "label 2 here and 1 in reply.csv:2")


def test_the_generator_answers_for_its_own_images_alone(moco: Moco, trained: Path) -> None:
    write_params(trained, request__answers="generator")
    done = moco("request")
    assert done.returncode == 0 and "request.answers: these images are not drawn" in done.stderr
    assert all(row["label"] == "" for row in form(trained))
    generated = {"seed": 0, "size": 32, "unlabeled": 60, "train_per_class": 2, "val_per_class": 1, "pack": False}
    write_params(trained, request__answers="generator", data__source="generated", data__path="build",
                 data__classes=None, data__generated=generated)  # fmt: skip
    run_all(moco, "data", "pretrain", "request")
    classes = json.loads((trained / "models/manifest.json").read_text())["classes"]
    for row in form(trained):
        assert row["label"] == classes[int(row["image"].removesuffix(".png")) % 12]


def test_strategies_that_need_a_classifier_want_one_of_this_encoder(moco: Moco, project: Path) -> None:
    run_all(moco, "data", "pretrain")
    assert_one_line_error(moco("request", "--strategy", "margin"), "models/classifier", "moco train")
    run_all(moco, "train")
    path = project / "models/classifier/model_sub.pth"
    state = torch.load(path, weights_only=True)
    state["conv1.weight"] += 1
    torch.save(state, path)
    assert_one_line_error(moco("request", "--strategy", "margin"), "made on another encoder")
    assert moco("request").returncode == 0, "others do without"
    assert_one_line_error(moco("request", "--strategy", "maxherdin"), "request.strategy", "did you mean 'maxherding'")


def test_features_that_are_no_numbers_are_told(moco: Moco, project: Path) -> None:
    run_all(moco, "data", "pretrain")
    path = project / "models/encoder.pth"
    state = torch.load(path, weights_only=True)
    state["weights"]["conv1.weight"][0] = torch.nan
    torch.save(state, path)
    assert_one_line_error(moco("request"), "models/encoder.pth", "moco pretrain")


def test_a_classifier_for_other_classes_is_not_asked(moco: Moco, trained: Path) -> None:
    labels = torch.load(trained / "dataset/train_label_tensor.pt")
    labels[0] = 5
    torch.save(labels, trained / "dataset/train_label_tensor.pt")
    write_params(trained, data__classes=6)
    run_all(moco, "data", "request")
    assert "expected" not in json.loads((trained / "reports/request/metrics.json").read_text())
    assert_one_line_error(moco("request", "--strategy", "margin"), "models/classifier", "other classes", "moco train")


def test_a_budget_of_nothing_asks_for_nothing(moco: Moco, trained: Path) -> None:
    write_params(trained, request__budget=0, train_extra__labels="models/request/request.csv")
    run_all(moco, "request")
    assert form(trained) == [] and not list((trained / "models/request/gallery").iterdir())
    hands_on(moco, trained)


def hands_on(moco: Moco, project: Path) -> None:
    done = moco("train_extra")
    assert done.returncode == 0 and "nobody has answered models/request/request.csv" in done.stderr, done.stderr
    files = [project / f"models/{name}/model_sub.pth" for name in ("classifier", "classifier_extra")]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_a_form_that_nobody_has_answered_trains_nothing(moco: Moco, trained: Path) -> None:
    write_params(trained, train_extra__labels="models/request/request.csv")
    run_all(moco, "request")
    assert len(form(trained)) == 5
    hands_on(moco, trained)


def test_where_all_is_labelled_nothing_is_asked_for(moco: Moco, project: Path) -> None:
    shutil.rmtree(project / "dataset/unlabeled")
    shutil.copytree(project / "dataset/train", project / "dataset/unlabeled")
    run_all(moco, "data", "pretrain")
    done = moco("request")
    assert done.returncode == 0 and "every image of the pool has a label" in done.stderr, done.stderr
    assert form(project) == []


def test_the_reply_may_be_named_before_it_is_there(moco: Moco, trained: Path) -> None:
    write_params(trained, train_extra__labels="labels/reply.csv")
    done = moco("request")
    assert done.returncode == 0 and "labels/reply.csv (train_extra.labels): not there yet" in done.stderr
    answer(trained, form(trained), "empty.csv")
    write_params(trained, train_extra__labels="empty.csv")
    run_all(moco, "request")
    assert len(form(trained)) == 5, "as long as it has no answers, nothing is left out"


def test_answers_in_the_form_itself_outlive_the_next_request(moco: Moco, trained: Path) -> None:
    run_all(moco, "request")
    run_all(moco, "request")
    assert not (trained / "labels").exists(), "nobody had filled it in"
    rows = form(trained)
    answer(trained, [{**row, "label": "1"} for row in rows], "models/request/request.csv")
    done = moco("request", "--budget", "3")
    assert done.returncode == 0 and "are kept in labels/reply-" in done.stderr, done.stderr
    (kept,) = (trained / "labels").iterdir()
    with kept.open() as file:
        assert [row["label"] for row in csv.DictReader(file)] == ["1"] * 5
    assert len(form(trained)) == 3 and all(row["label"] == "" for row in form(trained))
    kept.unlink()
    filled = (trained / "models/request/request.csv").read_bytes() + "M\u00f6we".encode("cp1252")  # as a table saves it
    (trained / "models/request/request.csv").write_bytes(filled)
    run_all(moco, "request")
    (kept,) = (trained / "labels").iterdir()
    assert kept.read_bytes() == filled


def test_in_a_class_tree_images_keep_their_names(moco: Moco, project: Path) -> None:
    tree, flat = project / "tree", project / "dataset"
    for split, count in (("train", 20), ("val", 10)):
        for i in range(count):
            folder = tree / split / "abcde"[i % 5]
            folder.mkdir(parents=True, exist_ok=True)
            shutil.copy(flat / split / f"{i}.png", folder / f"{i:02}.png")
    (tree / "unlabeled/deep, down").mkdir(parents=True)
    for i in range(40):
        shutil.copy(flat / f"unlabeled/{i}.png", tree / f"unlabeled/deep, down/ image-{i:02}.png")
    write_params(project, data__source="classes", data__path="tree", train_extra__labels="reply.csv")
    answer(project, [{"image": "deep, down/ image-01.png", "label": "b"}])
    run_all(moco, "data", "pretrain", "request")
    rows = form(project)
    assert all(row["image"].startswith("deep, down/ image-") for row in rows)
    answer(project, [{**row, "label": "abcde"[int(row["image"][-6:-4]) % 5]} for row in rows])
    assert "5 labels added" in moco("train_extra").stderr
    for name in ("../train/a/00.png", "a" * 300):
        answer(project, [{"image": name, "label": "b"}])
        assert_one_line_error(moco("train_extra"), "reply.csv:2", "is not in the unlabelled pool")
    (tree / "unlabeled/deep, down/ image-00.png").rename(tree / "unlabeled/zero.png")
    write_params(project, data__source="classes", data__path="tree")
    assert_one_line_error(moco("request", "--budget", "20"), "unlabeled", "moco data", "E-DATA-CHANGED")
    (tree / "unlabeled/zero.png").rename(tree / "unlabeled" / os.fsdecode(b"caf\xe9.png"))
    assert_one_line_error(moco("data"), "1 name(s) that are not UTF-8", "caf\\udce9.png")
