"""Who is champion: the same held-out images, enough of them, and more than chance."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from conftest import Moco, write_params
from moco.tracking.digests import THESE, held_out_record
from moco.tracking.metric_log import read_events
from moco.tracking.registry import ALPHA, FEWEST, PIECE, TESTED, held_out_tags, judge
from moco.training.significance import pack, unpack

IMAGES = 200


def version(correct: np.ndarray, digest: str = "a") -> dict[str, str]:
    return held_out_tags({"digest": digest, "correct": pack(correct), "judged": THESE})


def right(count: int, of: int) -> np.ndarray:
    return np.arange(of) < count


@pytest.mark.fault("gate")
@pytest.mark.parametrize(
    ("ours", "theirs", "facts"),
    [
        # The example of the issue: a lucky third of 12 images against another 48.
        (version(right(4, 12), "b"), version(right(10, 48)), ("other held-out images", "4", "33.3 % of 12", "of 48")),
        (version(right(48, 48), "b"), version(right(10, 48)), ("other held-out images",)),
        (version(right(12, 12)), version(right(0, 12)), ("12 held-out images are too few", str(FEWEST))),
        (version(right(200, 200)), {"best_held_out_accuracy": "0.1", "data_digest": "x"}, ("not known",)),
        ({"best_held_out_accuracy": "0.99"}, version(right(1, 200)), ("not known",)),
        (version(right(104, 200)), version(right(100, 200)), ("4 images", "0 the champion alone", "p = 0.062")),
        (version(right(100, 200)), version(right(100, 200)), ("p = 1",)),
        (version(right(80, 200)), version(right(100, 200)), ("p = 1", "20 the champion alone")),
    ],
)  # fmt: skip
def test_the_champion_stays(ours: dict[str, str], theirs: dict[str, str], facts: tuple[str, ...]) -> None:
    verdict = judge(ours, theirs)
    assert not verdict.better
    for fact in facts:
        assert fact in verdict.reason


def test_the_first_is_champion_and_says_how_sure_its_accuracy_is() -> None:
    verdict = judge(version(right(108, 200)), None)
    assert verdict.better and "54.0 % of 200 (47.1 to 60.8)" in verdict.reason
    assert not judge({}, None).better


def test_what_is_better_by_more_than_chance_takes_over() -> None:
    """Ten images that it alone has right, and one that the champion alone has: p = 12 / 2048."""
    champion, candidate = right(100, 200), right(110, 200)
    candidate[0] = False
    verdict = judge(version(candidate), version(champion))
    assert verdict.better and verdict.tested
    for fact in ("54.5 % of 200", "50.0 % of 200", "10 images", "1 the champion alone", "p = 0.0059"):
        assert fact in verdict.reason
    assert not judge(version(candidate), version(champion), before=4).better, "the fifth try needs more"


@pytest.mark.fault("gate")
def test_twenty_equal_candidates_displace_the_champion_no_oftener_than_alpha() -> None:
    """Each has every image right with 54 %; the accuracy that the champion shows stays what it is worth."""
    rng = np.random.default_rng(0)
    worlds, moved, shown = 400, 0, []
    for _ in range(worlds):
        champion, before = rng.random(IMAGES) < 0.54, 0
        for _ in range(20):
            candidate = rng.random(IMAGES) < 0.54
            verdict = judge(version(candidate), version(champion), before)
            before += verdict.tested
            if verdict.better:
                champion, before, moved = candidate, 0, moved + 1
        shown.append(champion.mean())
    assert moved / worlds <= ALPHA + 2 * (ALPHA * (1 - ALPHA) / worlds) ** 0.5
    assert abs(np.mean(shown) - 0.54) < 0.01


def test_a_candidate_that_is_better_wins_among_equal_ones() -> None:
    rng = np.random.default_rng(1)
    champion, won = rng.random(1000) < 0.54, 0
    for before in range(10):
        won += judge(version(champion | (rng.random(1000) < 0.15)), version(champion), before).better
    assert won == 10


def test_which_images_are_right_comes_through_the_tags_whatever_their_number() -> None:
    for count in (0, 1, 7, 8, 9, 25_600, 128_000):
        correct = np.random.default_rng(count).random(count) < 0.5
        tags = held_out_tags({"digest": "a", "correct": pack(correct), "judged": THESE})
        assert all(len(value) <= PIECE for value in tags.values())
        assert judge(tags, None).better if count else True
        assert np.array_equal(unpack(pack(correct)), correct)
    for wrong in ("", "8:", "x:AA==", "9:AA==", "1:%%"):
        with pytest.raises(ValueError):
            unpack(wrong)
    assert not judge({**tags, "held_out_correct_1": "?"}, None).better


def test_the_record_of_held_out_images_goes_by_content_and_not_by_order() -> None:
    digests = np.random.default_rng(0).integers(0, 256, (50, 16)).astype(np.uint8)
    labels, correct = np.arange(50) % 5, np.arange(50) % 3 == 0
    classes = list("abcde")
    order = np.random.default_rng(1).permutation(50)
    one = held_out_record(digests, labels, classes, correct, THESE)
    assert one == held_out_record(digests[order], labels[order], classes, correct[order], THESE)
    others = [
        held_out_record(digests, (labels + 1) % 5, classes, correct, THESE),
        held_out_record(digests, labels, classes[::-1], correct, THESE),
        held_out_record(digests[:-1], labels[:-1], classes, correct[:-1], THESE),
    ]
    assert len({one["digest"], *(other["digest"] for other in others)}) == 4


def model_event(project: Path, stage: str) -> dict[str, Any]:
    log = max((project / "runs" / stage).glob("*/metrics.jsonl"), key=lambda path: path.stat().st_mtime)
    (event,) = [event for event in read_events(log) if event["event"] == "model"]
    return event


def test_train_and_finetune_record_the_held_out_images(moco: Moco, project: Path) -> None:
    """Of the same share and seed both hold out the same ones; the counts are those of the accuracies shown."""
    for stage in ("data", "pretrain", "train", "finetune"):
        assert moco(stage).returncode == 0
    events = {stage: model_event(project, stage) for stage in ("train", "finetune")}
    assert events["train"]["held_out"]["digest"] == events["finetune"]["held_out"]["digest"]
    for stage, event in events.items():
        correct = unpack(event["held_out"]["correct"])
        assert len(correct) == 10, "40 % of 20 images in 5 classes of 4, rounded up in each"
        assert correct.mean() == pytest.approx(float(event["tags"]["best_held_out_accuracy"]), abs=1e-4), stage
    assert "without the held-out images" in events["train"]["held_out"]["judged"], "as train.refit is on"
    assert events["finetune"]["held_out"]["judged"] == THESE
    write_params(project, train__seed=1, train__refit=False)
    assert moco("train").returncode == 0
    assert model_event(project, "train")["held_out"]["digest"] != events["train"]["held_out"]["digest"]
    assert model_event(project, "train")["held_out"]["judged"] == THESE


@pytest.mark.slow
@pytest.mark.fault("gate")
@pytest.mark.filterwarnings("default")
def test_the_registry_counts_the_candidates_that_were_tested(tmp_path: Path) -> None:
    """In a real store: each candidate alone would pass at the first threshold, the fourth one no more."""
    from mlflow import MlflowClient

    from moco.tracking.registry import _gate

    client = MlflowClient(tracking_uri=f"sqlite:///{tmp_path}/mlflow.db")
    client.create_registered_model("m")
    champion = right(100, IMAGES)

    def register(correct: np.ndarray) -> Any:
        made = client.create_model_version("m", str(tmp_path), tags=version(correct))
        _gate(client, "m", client.get_model_version("m", made.version))
        return client.get_model_version("m", made.version)

    def champion_is() -> str:
        return str(client.get_model_version_by_alias("m", "champion").version)

    register(champion)
    for _ in range(3):
        weak = champion.copy()
        weak[[0, 150]] = False, True
        assert register(weak).tags[TESTED] == "1"
    assert register(champion).tags.get(TESTED) is None, "the same answers spend nothing"
    better = champion | (np.arange(IMAGES) < 108)
    kept = register(better).tags["champion_gate"]
    assert kept.startswith("kept: ") and "p = 0.0039" in kept and "0.0025 for candidate 4" in kept
    assert champion_is() == "1"
    moved = register(champion | (np.arange(IMAGES) < 112)).tags["champion_gate"]
    assert moved.startswith("moved: ") and champion_is() == "7"
