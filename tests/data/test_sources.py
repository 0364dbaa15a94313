"""The contract's folder and the folder per class: what is accepted, and what every mistake is called."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from data_helpers import data_config, need, silent
from PIL import Image

from conftest import write_dataset
from moco.data.class_tree import class_tree
from moco.data.dataset import Dataset
from moco.data.generated import pack
from moco.data.sources import contract_folder, open_dataset, read_labels
from moco.errors import UserError


def opened(path: Path, source: str = "folder", **changes: object) -> Dataset:
    with open_dataset(data_config(path, source, **changes), path.parent, silent) as found:
        return found


def put(path: Path, value: int = 0) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((8, 8, 3), value, np.uint8)).save(path)


def test_images_are_ordered_by_number_and_labelled_by_it(dataset: Path) -> None:
    found = opened(dataset)
    assert [len(found.splits[name]) for name in ("unlabeled", "train", "val")] == [40, 20, 10]
    assert [Path(p).name for p in found.splits["unlabeled"].paths or []] == [f"{i}.png" for i in range(40)]
    assert found.splits["train"].labels.tolist() == [i % 5 for i in range(20)]
    assert found.splits["unlabeled"].labels is None
    assert found.splits["val"].image_name(3) == "val/3.png"
    assert found.origin == {"kind": "folder", "name": "dataset"}


def remove(name: str) -> Callable[[Path], None]:
    return lambda root: (root / name).unlink()


def add(name: str) -> Callable[[Path], None]:
    return lambda root: put(root / name)


def empty(name: str) -> Callable[[Path], None]:
    def change(root: Path) -> None:
        shutil.rmtree(root / name)
        (root / name).mkdir()

    return change


MISTAKES: dict[str, tuple[Callable[[Path], None], tuple[str, ...]]] = {
    "gap": (remove("unlabeled/17.png"), ("unlabeled", "gap", "17.png is missing", "0.png to 38.png")),
    "no first image": (remove("val/0.png"), ("val", "gap", "0.png is missing")),
    "stray image": (add("train/cat.png"), ("train", "1 file(s) not named NUMBER.png", "'cat.png'")),
    "leading zero": (add("train/007.png"), ("train", "'007.png'")),
    "other suffix": (lambda root: (root / "val" / "notes.txt").touch(), ("val", "'notes.txt'")),
    "empty split": (empty("unlabeled"), ("unlabeled", "the split is empty")),
    "no split": (lambda root: shutil.rmtree(root / "val"), ("val", "not found", "unlabeled, train and val")),
    "no dataset": (shutil.rmtree, ("dataset folder not found", "data.path")),
    "no labels": (remove("train_label_tensor.pt"), ("train_label_tensor.pt", "not found", "labels of train/")),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_wrong_layout_is_named(dataset: Path, mistake: str) -> None:
    change, words = MISTAKES[mistake]
    change(dataset)
    with pytest.raises(UserError) as caught:
        opened(dataset)
    for word in words:
        assert word in str(caught.value)
    assert "\n" not in str(caught.value)


LABELS: dict[str, tuple[object, str]] = {
    "too short": (torch.zeros(19, dtype=torch.int64), "19 labels for 20 images in train/"),
    "too long": (torch.zeros(21, dtype=torch.int64), "21 labels for 20 images in train/"),
    "int32": (torch.zeros(20, dtype=torch.int32), "expected an int64 tensor with one dimension, found torch.int32"),
    "float": (torch.zeros(20), "found torch.float32 of shape (20,)"),
    "two dimensions": (torch.zeros(20, 1, dtype=torch.int64), "found torch.int64 of shape (20, 1)"),
    "scalar": (torch.tensor(1), "found torch.int64 of shape ()"),
    "list": ([0] * 20, "expected an int64 tensor with one dimension, found list"),
}


@pytest.mark.fault("bad-labels")
@pytest.mark.parametrize("kind", LABELS)
def test_wrong_label_tensor_is_refused(dataset: Path, kind: str) -> None:
    value, words = LABELS[kind]
    path = dataset / "train_label_tensor.pt"
    torch.save(value, path)
    with pytest.raises(UserError) as caught:
        opened(dataset)
    assert str(caught.value).startswith(f"{path}: ")
    assert words in str(caught.value)


class Payload:
    """Runs code when it is unpickled without restriction."""

    def __init__(self, proof: Path) -> None:
        self.proof = proof

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (str(self.proof),)


@pytest.mark.fault("code-in-weights")
def test_code_in_a_label_file_does_not_run(dataset: Path, tmp_path: Path) -> None:
    """Fault 13. The second half shows that the payload does work where unpickling is unrestricted."""
    path, proof = dataset / "val_label_tensor.pt", tmp_path / "proof"
    torch.save(Payload(proof), path)
    with pytest.raises(UserError, match=r"val_label_tensor\.pt: cannot be loaded as a plain tensor"):
        opened(dataset)
    assert not proof.exists()
    torch.load(path, weights_only=False)
    assert proof.exists()


@pytest.mark.fault("bad-labels")
@pytest.mark.parametrize("keep", [0, 40, 0.5, 0.9])
def test_truncated_label_file_is_refused(dataset: Path, keep: float) -> None:
    path = dataset / "train_label_tensor.pt"
    content = path.read_bytes()
    path.write_bytes(content[: int(keep * len(content)) if keep < 1 else int(keep)])
    with pytest.raises(UserError) as caught:
        read_labels(path, 20, "train")
    assert "cannot be loaded as a plain tensor" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_label_file_of_the_old_format_is_read(dataset: Path) -> None:
    """The original's files came from a torch of 2021, which could still write files that are no zip archives."""
    labels = torch.arange(20) % 3
    path = dataset / "train_label_tensor.pt"
    torch.save(labels, path, _use_new_zipfile_serialization=False)
    assert opened(dataset).splits["train"].labels.tolist() == labels.tolist()


@pytest.mark.parametrize("place", ["dataset/classes.txt", "classes.txt"])
def test_class_names_are_read_within_or_beside_the_folder(dataset: Path, tmp_path: Path, place: str) -> None:
    assert opened(dataset).classes is None
    (tmp_path / place).write_text("ant\nbee\n\n cat \ndog\nélan\n", encoding="utf-8")
    assert opened(dataset).classes == ["ant", "bee", "cat", "dog", "élan"]


def test_a_mark_at_the_beginning_is_no_part_of_a_class_name(dataset: Path) -> None:
    (dataset / "classes.txt").write_bytes("\ufeffcat\r\ndog\r\n".encode())
    assert contract_folder(dataset, {}, pytest.fail).classes == ["cat", "dog"]


def test_a_class_name_that_stands_twice_is_refused(dataset: Path) -> None:
    """Else a label by this name would silently be the first one."""
    (dataset / "classes.txt").write_text("crane\nheron\ncrane\n")
    with pytest.raises(UserError, match=r"classes\.txt: the class 'crane' stands there twice"):
        contract_folder(dataset, {}, pytest.fail)


def test_class_names_that_are_not_text_are_refused(dataset: Path) -> None:
    (dataset / "classes.txt").write_bytes("élan".encode("latin-1"))
    with pytest.raises(UserError, match=r"classes\.txt: cannot be read as UTF-8"):
        opened(dataset)


def test_a_visible_folder_is_taken_instead_of_the_image(tmp_path: Path) -> None:
    mounted = write_dataset(tmp_path / "mounted", unlabeled=3, train=2, val=2, classes=2)
    said: list[str] = []
    config = data_config(tmp_path / "absent.sqsh", "squashfs", mounted=str(mounted))
    with open_dataset(config, tmp_path, said.append) as found:
        assert len(found.splits["unlabeled"]) == 3
        assert found.origin == {"kind": "squashfs", "name": "mounted"}
    assert said == [f"dataset: using the folder {mounted}, which is already visible"]


def test_class_names_beside_the_image_count_for_it_and_for_the_visible_folder(tmp_path: Path) -> None:
    need("mksquashfs")
    folder = write_dataset(tmp_path / "made/dataset", unlabeled=3, train=2, val=2, classes=2)
    (tmp_path / "store").mkdir()
    pack(folder, tmp_path / "store/images.sqsh")
    (tmp_path / "store/classes.txt").write_text("ant\nbee\n")
    for mounted in ("", str(folder)):
        assert opened(tmp_path / "store/images.sqsh", "squashfs", mounted=mounted).classes == ["ant", "bee"]


@pytest.mark.parametrize("mounted", ["", "elsewhere"])
def test_without_a_visible_folder_the_image_is_wanted(tmp_path: Path, mounted: str) -> None:
    with pytest.raises(UserError, match=r"absent\.sqsh: dataset image not found; set data\.path"):
        opened(tmp_path / "absent.sqsh", "squashfs", mounted=mounted and str(tmp_path / mounted))


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    root = tmp_path / "tree"
    for name in ("train/zebra/b.png", "train/zebra/deep/a.PNG", "train/ant/1.png", "train/ant/2.jpg", "val/ant/x.png",
                 "unlabeled/some/where/u.png", "unlabeled/v.png"):  # fmt: skip
        put(root / name)
    (root / "train" / "ant" / "notes.txt").write_text("not an image")
    return root


def relative(paths: list[str] | None, root: Path) -> list[str]:
    return [str(Path(p).relative_to(root)) for p in paths or []]


def test_a_class_tree_is_labelled_by_its_folders(tree: Path) -> None:
    found = opened(tree, "classes")
    assert found.classes == ["ant", "zebra"]
    train = found.splits["train"]
    assert relative(train.paths, tree / "train") == ["ant/1.png", "ant/2.jpg", "zebra/b.png", "zebra/deep/a.PNG"]
    assert train.labels.tolist() == [0, 0, 1, 1]
    assert train.image_name(3) == "train/zebra/deep/a.PNG"
    assert found.splits["unlabeled"].image_name(0) == "unlabeled/some/where/u.png"
    assert found.splits["val"].labels.tolist() == [0]
    assert relative(found.splits["unlabeled"].paths, tree / "unlabeled") == ["some/where/u.png", "v.png"]


def test_files_that_are_no_images_are_left_out_and_told(tree: Path) -> None:
    said: list[str] = []
    class_tree(tree, said.append)
    assert len(said) == 1 and "1 file(s)" in said[0] and "train/ant/notes.txt" in said[0]


@pytest.mark.parametrize("suffix", ["gif", "jfif"])
def test_less_usual_names_of_images_are_known(tree: Path, suffix: str) -> None:
    Image.new("L", (8, 8)).save(tree / f"train/ant/3.{suffix}", "GIF" if suffix == "gif" else "JPEG")
    assert len(opened(tree, "classes").splits["train"]) == 5


def test_names_that_no_label_file_can_hold_are_refused(tree: Path) -> None:
    for name in (b"caf\xe9.png", b"\xff.png"):
        put(tree / "train/ant" / os.fsdecode(name))
    with pytest.raises(UserError, match=r"train/ant: 2 name\(s\) that are not UTF-8: .*ant/caf\\udce9\.png"):
        opened(tree, "classes")


def test_hidden_files_are_not_there_and_what_is_left_out_is_told(tree: Path) -> None:
    """As notebooks and other systems leave them: they are neither classes nor images."""
    for name in ("train/.ipynb_checkpoints/1.png", "val/.cache/1.png", "train/ant/._1.png", "unlabeled/.thumbs/1.png",
                 "train/loose.png"):  # fmt: skip
        put(tree / name)
    said: list[str] = []
    found = class_tree(tree, said.append)
    assert found.classes == ["ant", "zebra"] and len(found.splits["train"]) == 4 and len(found.splits["unlabeled"]) == 2
    told = "\n".join(said)
    assert "1 file(s)" in told and "in no class and are left out: loose.png" in told and len(said) == 2


def test_without_unlabeled_the_train_images_are_the_pool(tree: Path) -> None:
    shutil.rmtree(tree / "unlabeled")
    found = class_tree(tree, silent)
    assert found.splits["unlabeled"].paths == found.splits["train"].paths
    assert found.splits["unlabeled"].labels is None


TREE_MISTAKES: dict[str, tuple[Callable[[Path], None], str]] = {
    "class in val alone": (add("val/yak/1.png"), r"val/yak: class has no folder in train/"),
    "no train": (lambda root: shutil.rmtree(root / "train"), r"train: not found; a class tree has"),
    "no val": (lambda root: shutil.rmtree(root / "val"), r"val: not found; a class tree has"),
    "nothing in val": (remove("val/ant/x.png"), r"val: the split is empty"),
    "no folder": (shutil.rmtree, r"tree: dataset folder not found"),
    "class without images": (lambda root: (root / "train/yak").mkdir(), r"train/yak: a class without images"),
    "pool without images": (empty("unlabeled"), r"unlabeled: no images in it"),
}


@pytest.mark.parametrize("mistake", TREE_MISTAKES)
def test_wrong_class_tree_is_named(tree: Path, mistake: str) -> None:
    change, words = TREE_MISTAKES[mistake]
    change(tree)
    with pytest.raises(UserError, match=words):
        opened(tree, "classes")


def test_an_origin_is_passed_on(dataset: Path) -> None:
    assert contract_folder(dataset, {"kind": "x"}, pytest.fail).origin == {"kind": "x"}


@pytest.mark.fault("data-layout")
def test_folders_beside_the_splits_are_named(dataset: Path) -> None:
    (dataset / "extra").mkdir()
    (dataset / ".cache").mkdir()  # what systems leave is not there
    said: list[str] = []
    contract_folder(dataset, {}, said.append)
    assert len(said) == 1 and said[0].startswith("warning: 1 folder(s)") and said[0].endswith(": extra")


@pytest.mark.fault("data-layout")
def test_a_split_under_another_name_is_asked_about(dataset: Path) -> None:
    (dataset / "unlabeled").rename(dataset / "Unlabelled")
    with pytest.raises(UserError, match="did you mean 'Unlabelled'") as caught:
        contract_folder(dataset, {}, pytest.fail)
    assert caught.value.code == "E-DATA-LAYOUT"
