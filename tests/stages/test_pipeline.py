"""The main path on a tiny dataset: every stage as a command, and what it leaves behind."""

from __future__ import annotations

import csv
import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from stage_helpers import outside_score, run_all

from conftest import Moco, assert_one_line_error, write_params
from moco.encoders.small_resnet import SmallResNet


def test_every_stage_runs_and_leaves_what_it_promises(moco: Moco, project: Path) -> None:
    run_all(moco, "data", "pretrain", "train", "baseline", "eval")
    metrics = {
        stage: json.loads((project / "reports" / stage / "metrics.json").read_text())
        for stage in ("pretrain", "train", "baseline", "eval")
    }
    assert metrics["pretrain"]["images_seen"] == 2 * 5 * 8
    assert 0 <= metrics["pretrain"]["knn_accuracy"] <= 1
    assert metrics["eval"]["val_top5_accuracy"] == 1.0, "five classes: the top five are all"
    assert metrics["baseline"]["random_val_accuracy"] >= 0
    with (project / "reports/pretrain/loss.csv").open() as file:
        assert [int(row["step"]) for row in csv.DictReader(file)] == list(range(1, 11))
    with (project / "reports/eval/predictions.csv").open() as file:
        assert len(list(csv.DictReader(file))) == 10
    with (project / "reports/train/epochs.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [int(row["step"]) for row in rows] == [1, 2, 3] and all(row["loss"] and row["lr"] for row in rows)
    best = list((project / "models/classifier").glob("model_best_*_*.pth"))
    assert len(best) == 1
    content = torch.load(best[0], weights_only=True)
    assert {"weights", "optimizer", "epoch", "held_out_accuracy"} <= set(content)
    table = moco("report")
    assert table.returncode == 0
    for words in ("random weights", "labels alone", "pretrained, linear", "moco ui"):
        assert words in table.stdout


def test_a_scorer_that_knows_only_the_contract_gets_the_same_accuracy(moco: Moco, project: Path) -> None:
    run_all(moco, "data", "pretrain", "train", "eval")
    right, total = outside_score(project, batch=4)
    ours = json.loads((project / "reports/eval/metrics.json").read_text())["val_accuracy"]
    assert right == round(ours * total)
    assert json.loads((project / "reports/train/metrics.json").read_text())["val_accuracy"] == pytest.approx(ours)


def test_frozen_weights_go_into_the_classifier_bit_for_bit(moco: Moco, project: Path) -> None:
    run_all(moco, "data", "pretrain", "train")
    encoder = torch.load(project / "models/encoder.pth", weights_only=True)["weights"]
    classifier = torch.load(project / "models/classifier/model_sub.pth", weights_only=True)
    assert set(classifier) - set(encoder) == {"fc.weight", "fc.bias"}
    for name, value in encoder.items():
        assert torch.equal(classifier[name], value), name


@pytest.mark.parametrize("refit", [True, False])
def test_labels_of_val_change_nothing_but_the_report(moco: Moco, project: Path, refit: bool) -> None:
    """Fault 7: the epoch is chosen on train; other val labels must give the same classifier."""
    write_params(project, train__refit=refit)
    run_all(moco, "data", "pretrain", "train")
    before = (project / "models/classifier/model_sub.pth").read_bytes()
    labels = torch.load(project / "dataset/val_label_tensor.pt")
    torch.save((labels + 1) % 5, project / "dataset/val_label_tensor.pt")
    run_all(moco, "data", "train")
    assert (project / "models/classifier/model_sub.pth").read_bytes() == before


def test_same_settings_give_the_same_weights_to_the_bit(moco: Moco, project: Path) -> None:
    run_all(moco, "data", "pretrain", "train")
    names = ("models/encoder.pth", "models/classifier/model_sub.pth")
    first = [(project / name).read_bytes() for name in names]
    shutil.rmtree(project / "runs")
    shutil.rmtree(project / "models")
    run_all(moco, "data", "pretrain", "train")
    assert first == [
        (project / name).read_bytes() for name in ("models/encoder.pth", "models/classifier/model_sub.pth")
    ]


def test_backbone_runs_once_however_many_epochs(moco: Moco, project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fault 12: every image goes through the encoder once a feature set, whatever the number of epochs."""
    run_all(moco, "data", "pretrain")
    passed: list[int] = []
    forward = SmallResNet.forward

    def counted(self: SmallResNet, x: torch.Tensor) -> torch.Tensor:
        passed.append(len(x))
        return forward(self, x)

    monkeypatch.setattr(SmallResNet, "forward", counted)
    for epochs in (3, 60):
        passed.clear()
        write_params(project, train__epochs=epochs, train__views=2)
        run_all(moco, "train")
        with (project / "reports/train/epochs.csv").open() as file:
            assert len(list(csv.DictReader(file))) == epochs
        assert sum(passed) == 2 * 20 + 10, "two feature sets of train, one of val"


@pytest.mark.parametrize("loss", ["asymmetric", "symmetric"])
def test_split_batch_norm_leaves_weights_that_load_anywhere(moco: Moco, project: Path, loss: str) -> None:
    """Fault 2, through the files: torchvision's own network takes the weights strictly."""
    write_params(
        project,
        pretrain__encoder="resnet18", pretrain__batch_norm="split", pretrain__splits=2, pretrain__shuffle=True,
        pretrain__loss=loss, pretrain__epochs=1, pretrain__augmentation="v1", pretrain__schedule="step",
        pretrain__subset=0.5,
    )  # fmt: skip
    run_all(moco, "data", "pretrain", "train")
    done = moco("eval")
    assert done.returncode == 0, done.stderr
    assert outside_score(project, batch=4)[1] == 10


def test_eval_does_not_write_beside_the_classifier(moco: Moco, project: Path) -> None:
    run_all(moco, "data", "pretrain", "train")
    before = sorted(path.name for path in (project / "models/classifier").iterdir())
    run_all(moco, "eval")
    assert sorted(path.name for path in (project / "models/classifier").iterdir()) == before


def test_a_classifier_may_lie_behind_a_link_and_be_called_anything(moco: Moco, project: Path) -> None:
    (project / "elsewhere").mkdir()
    (project / "models").mkdir(exist_ok=True)
    (project / "models/classifier").symlink_to(project / "elsewhere")
    run_all(moco, "data", "pretrain", "train", "eval")
    assert (project / "models/classifier").is_symlink() and (project / "elsewhere/model_sub.pth").exists()
    shutil.copytree(project / "elsewhere", project / "models/classifier (ältere)")
    done = moco("eval", "--classifier", "models/classifier (ältere)")
    assert done.returncode == 0, done.stderr
    logs = (project / "runs/eval").glob("*/metrics.jsonl")
    stages = {json.loads(log.read_text().splitlines()[0])["stage"] for log in logs}
    assert all(re.fullmatch(r"[\w. -]+", stage, re.ASCII) for stage in stages), "MLflow takes no other letters"


def test_eval_needs_two_files_alone_and_tells_of_weights_that_are_no_numbers(moco: Moco, project: Path) -> None:
    run_all(moco, "data", "pretrain", "train")
    folder = shutil.copytree(project / "models/classifier", project / "handed-in")
    (best,) = folder.glob("model_best_*.pth")
    for content in (b"damaged", b""):
        best.write_bytes(content)
        done = moco("eval", "--classifier", "handed-in", "--yes")
        assert done.returncode == 0 and "warning: what the classifier was made with is not known" in done.stderr
    torch.save([1], best)
    assert moco("eval", "--classifier", "handed-in", "--yes").returncode == 0
    state = torch.load(folder / "model_sub.pth", weights_only=True)
    state["fc.bias"][:] = float("nan")
    torch.save(state, folder / "model_sub.pth")
    assert_one_line_error(
        moco("eval", "--classifier", "handed-in", "--yes"), "outputs for 10 of 10 images are no numbers"
    )


@pytest.mark.parametrize(
    ("code", "told"),
    [
        ("def get_model(width): ...", "get_model() failed: TypeError"),
        ("def eval_transform(image): return torch.zeros(2)", "cannot do with val"),
        ("get_model = lambda: Flat()", "outputs have shape (4,)"),
        ("@dataclasses.dataclass\nclass Kept:\n    size: int = 3", None),
    ],
)
def test_what_is_wrong_with_a_submission_is_one_line(moco: Moco, project: Path, code: str, told: str | None) -> None:
    run_all(moco, "data", "pretrain", "train")
    path = project / "models/classifier/submission.py"
    head = "from __future__ import annotations\nimport dataclasses\nimport torch\n"
    flat = "class Flat(torch.nn.Module):\n    load_state_dict = lambda self, state: None\n"
    flat += "    forward = lambda self, x: x.sum((1, 2, 3))\n"
    own = path.read_text().replace("from __future__ import annotations\n", "")
    path.write_text(f"{head}{own}\n{flat}{code}\n")
    done = moco("eval", "--yes")
    if told is None:
        assert done.returncode == 0, done.stderr
    else:
        assert_one_line_error(done, told)


def test_a_folder_that_is_a_file_is_one_line(moco: Moco, project: Path) -> None:
    run_all(moco, "data")
    shutil.rmtree(project / "runs")
    (project / "runs").write_text("")
    done = moco("pretrain")
    assert done.returncode == 1 and "Traceback" not in done.stderr and "runs" in done.stderr.splitlines()[-1]


def test_report_shows_the_stages_that_have_results(moco: Moco, project: Path) -> None:
    run_all(moco, "data", "pretrain", "train")
    table = moco("report")
    assert table.returncode == 0 and "pretrained, linear" in table.stdout and "labels alone" not in table.stdout
    (project / "reports/finetune").mkdir()
    shutil.move(project / "reports/train/metrics.json", project / "reports/finetune")
    assert "fine-tuned" in moco("report").stdout


def test_report_without_results_says_what_to_do(moco: Moco) -> None:
    assert_one_line_error(moco("report"), "dvc repro")


def test_eval_of_a_folder_that_is_not_there_names_the_known_ones(moco: Moco, project: Path) -> None:
    run_all(moco, "data", "pretrain", "train")
    assert_one_line_error(moco("eval", "--classifier", "models/finetund"), "models/finetund", "models/finetuned")
    assert_one_line_error(moco("eval", "--classifier", "models/finetuned"), "submission.py", "moco finetune")
    run_all(moco, "eval")
    done = moco("eval", "--classifier", str(project / "models/classifier"))  # the same folder, by another name
    assert done.returncode == 0 and not (project / "reports/eval-classifier").exists()
