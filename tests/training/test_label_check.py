"""Labels that belong to other images are caught; right ones, few ones and hard ones are not."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from moco.labels.plausibility import check_labels

CLASSES = 10


def images(count: int, seed: int, noise: float = 1.0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(CLASSES, (count,), generator=generator)
    centres = torch.randn(CLASSES, 16, generator=torch.Generator().manual_seed(99))
    return centres[labels] + noise * torch.randn(count, 16, generator=generator), labels


def test_right_labels_pass_and_slipped_ones_do_not() -> None:
    known, labels = images(300, 0)
    new, right = images(200, 1)
    found = check_labels(known, labels, new, right, CLASSES)
    assert found.known > 0.7 and found.runs and not any(run.suspicious for run in found.runs)
    slipped = check_labels(known, labels, new, right.roll(1), CLASSES)
    assert slipped.runs and all(run.suspicious for run in slipped.runs)
    assert all(run.agreement == pytest.approx(run.chance, abs=0.25) for run in slipped.runs)


def test_a_file_that_slips_half_way_is_caught_from_there_on() -> None:
    known, labels = images(300, 0)
    new, right = images(200, 1)
    given = torch.cat([right[:100], right[100:].roll(1)])
    found = check_labels(known, labels, new, given, CLASSES)
    bad = [run for run in found.runs if run.suspicious]
    assert bad and all(run.first >= 100 for run in bad) and bad[-1].last == 199


def test_hard_images_pass() -> None:
    known, labels = images(300, 0)
    new, right = images(300, 1, noise=2.5)
    found = check_labels(known, labels, new, right, CLASSES)
    mean = sum(run.agreement for run in found.runs) / len(found.runs)
    assert found.runs and mean < 0.8 * found.known and not any(run.suspicious for run in found.runs)


@pytest.mark.parametrize("seed", range(20))
def test_weak_features_do_not_raise_a_false_alarm(seed: int) -> None:
    known, labels = images(300, 100 + seed, noise=3.0)
    new, right = images(400, 200 + seed, noise=3.0)
    found = check_labels(known, labels, new, right, CLASSES)
    assert not any(run.suspicious for run in found.runs)


def test_too_few_labels_and_features_that_say_nothing_are_told() -> None:
    known, labels = images(300, 0)
    new, right = images(5, 1)
    few = check_labels(known, labels, new, right.roll(1), CLASSES)
    assert few.runs == [] and few.needed is not None and few.needed > 5
    noise = torch.randn(300, 16, generator=torch.Generator().manual_seed(1))
    nothing = check_labels(noise, labels, torch.randn(100, 16), images(100, 2)[1], CLASSES)
    assert nothing.runs == []


@pytest.mark.parametrize("name", range(CLASSES))
def test_labels_of_one_class_alone_are_right_or_wrong_too(name: int) -> None:
    known, labels = images(300, 0, noise=2.0)
    new, right = images(2000, 1, noise=2.0)
    ones = new[right == name]
    found = check_labels(known, labels, ones, torch.full((len(ones),), name), CLASSES)
    assert found.runs and not any(run.suspicious for run in found.runs)
    others = new[right != name][: len(ones)]
    wrong = check_labels(known, labels, others, torch.full((len(others),), name), CLASSES)
    assert wrong.runs and all(run.suspicious for run in wrong.runs)


@pytest.mark.parametrize("classes", [2, 4, 8])
def test_a_file_that_is_sorted_by_class(classes: int) -> None:
    known, labels = images(300, 0, noise=2.0)
    new, right = images(4000, 1, noise=2.0)
    known, labels = known[labels < classes], labels[labels < classes]
    order = right.argsort(stable=True)
    order = order[right[order] < classes]
    found = check_labels(known, labels, new[order], right[order], classes)
    assert len(found.runs) > 1 and not any(run.suspicious for run in found.runs)
    moved = right[order].roll(len(order) // classes)  # as if one class's folder were another's
    assert any(run.suspicious for run in check_labels(known, labels, new[order], moved, classes).runs)
