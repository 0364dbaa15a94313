"""The order of batches, and the thread that fetches them."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from moco.data.batches import EpochSampler, Fetcher, gather, step_generator


def order(sampler: EpochSampler, epoch: int, first: int = 0) -> list[list[int]]:
    return [batch.tolist() for batch in sampler.epoch(epoch, first)]


def test_order_is_a_function_of_seed_and_epoch_alone() -> None:
    indices = np.arange(100, 150)
    used = EpochSampler(indices, 8, seed=1)
    order(used, 0)
    assert order(used, 3) == order(EpochSampler(indices, 8, seed=1), 3)
    assert order(used, 3) != order(used, 4)
    assert order(used, 3) != order(EpochSampler(indices, 8, seed=2), 3)


def test_an_epoch_has_every_index_at_most_once_and_only_full_batches() -> None:
    indices = np.arange(1000, 1050)
    sampler = EpochSampler(indices, 8, seed=1)
    assert sampler.batches_per_epoch == 6
    batches = order(sampler, 0)
    assert [len(batch) for batch in batches] == [8] * 6
    seen = [i for batch in batches for i in batch]
    assert len(set(seen)) == 48
    assert set(seen) <= set(indices.tolist())
    assert seen != sorted(seen)


def test_all_indices_turn_up_over_the_epochs() -> None:
    sampler = EpochSampler(np.arange(50), 8, seed=1)
    assert {i for epoch in range(20) for batch in order(sampler, epoch) for i in batch} == set(range(50))


@pytest.mark.parametrize("first", [0, 1, 4, 6])
def test_an_epoch_is_taken_up_at_any_batch(first: int) -> None:
    sampler = EpochSampler(np.arange(50), 8, seed=1)
    assert order(sampler, 5, first) == order(sampler, 5)[first:]


def test_a_batch_larger_than_the_pool_becomes_the_pool() -> None:
    """Fault 4: a small set must train, not crash on its only, partial batch."""
    sampler = EpochSampler(np.array([4, 7, 9]), 512, seed=0)
    assert sampler.batches_per_epoch == 1
    assert [sorted(batch) for batch in order(sampler, 2)] == [[4, 7, 9]]


@pytest.fixture
def images(tmp_path: Path) -> np.ndarray:
    """A read-only memory map of 40 images that differ."""
    path = tmp_path / "images.u8"
    np.random.default_rng(0).integers(0, 256, (40, 4, 4, 3), dtype=np.uint8).tofile(path)
    return np.memmap(path, np.uint8, "r", shape=(40, 4, 4, 3))


def test_numbers_of_a_step_are_a_function_of_seed_and_step() -> None:
    drawn = {
        key: tuple(torch.rand(3, generator=step_generator(*key)).tolist())
        for key in [(0, 0), (0, 1), (1, 0), (5, 0), (1 << 20, 0), (0, 1 << 20)]
    }
    assert len(set(drawn.values())) == len(drawn)
    assert drawn[5, 0] == tuple(torch.rand(3, generator=step_generator(5, 0)).tolist())


def test_gather_returns_rows_in_the_order_asked_for(images: np.ndarray) -> None:
    chosen = np.array([7, 39, 0, 7, 12])
    found = gather(images, chosen)
    np.testing.assert_array_equal(found, np.stack([images[i] for i in chosen]))
    found[:] = 0  # a copy: the map cannot be written
    assert images[7].any()


def fetching() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if "_fill" in thread.name]


def test_fetcher_keeps_order_and_pairs_indices_with_their_images(images: np.ndarray) -> None:
    sampler = EpochSampler(np.arange(40), 6, seed=0)
    fetcher = Fetcher(images, pin=False)
    for expected, (chosen, batch) in zip(order(sampler, 0), fetcher.batches(sampler.epoch(0)), strict=True):
        assert chosen.tolist() == expected
        assert batch.dtype == torch.uint8
        np.testing.assert_array_equal(batch.numpy(), images[chosen])
    assert fetching() == []


def test_fetching_runs_ahead_but_not_further_than_told(images: np.ndarray) -> None:
    taken: list[int] = []

    def indices() -> Iterator[np.ndarray]:
        for i in range(20):
            taken.append(i)
            yield np.array([i])

    batches = Fetcher(images, pin=False, ahead=2).batches(indices())
    next(batches)
    time.sleep(0.3)
    # one is with the consumer, two wait in the queue, one is in the thread's hands
    assert len(taken) == 4
    assert len(fetching()) == 1
    batches.close()


def test_stopping_early_leaves_no_thread(images: np.ndarray) -> None:
    for stop_after in (1, 2, 5):
        for count, _ in enumerate(Fetcher(images, pin=False).batches(iter([np.array([1])] * 50)), 1):
            if count == stop_after:
                break
        assert fetching() == []


def test_stopping_early_leaves_the_rest_unread(images: np.ndarray) -> None:
    taken: list[int] = []

    def indices() -> Iterator[np.ndarray]:
        for i in range(2000):
            taken.append(i)
            yield np.array([0])

    batches = Fetcher(images, pin=False).batches(indices())
    next(batches)
    batches.close()
    assert len(taken) < 10


def test_an_error_of_the_consumer_leaves_no_thread(images: np.ndarray) -> None:
    batches = Fetcher(images, pin=False).batches(iter([np.array([1])] * 50))
    with pytest.raises(ZeroDivisionError):
        for _ in batches:
            raise ZeroDivisionError
    batches.close()
    assert fetching() == []


def test_an_error_in_the_thread_reaches_the_consumer_after_the_batches_before_it(images: np.ndarray) -> None:
    seen = []
    with pytest.raises(IndexError, match="40"):
        for chosen, _ in Fetcher(images, pin=False).batches(iter([np.array([1]), np.array([2]), np.array([40])])):
            seen.append(chosen.tolist())
    assert seen == [[1], [2]]
    assert fetching() == []


def test_an_error_of_the_sampler_reaches_the_consumer(images: np.ndarray) -> None:
    def indices() -> Iterator[np.ndarray]:
        yield np.array([0])
        raise RuntimeError("no more")

    with pytest.raises(RuntimeError, match="no more"):
        list(Fetcher(images, pin=False).batches(indices()))
    assert fetching() == []


def test_waiting_for_data_is_measured(images: np.ndarray) -> None:
    def slow() -> Iterator[np.ndarray]:
        for i in range(3):
            time.sleep(0.1)
            yield np.array([i])

    fetcher = Fetcher(images, pin=False)
    list(fetcher.batches(slow()))
    assert 0.2 < fetcher.waited < 3
    eager = Fetcher(images, pin=False)
    for _ in eager.batches(iter([np.array([i]) for i in range(3)])):
        time.sleep(0.1)
    assert eager.waited < fetcher.waited


def test_processes_take_consecutive_parts_of_the_same_batches() -> None:
    whole = EpochSampler(np.arange(50), 12, seed=1)
    parts = [EpochSampler(np.arange(50), 12, seed=1, rank=rank, processes=3) for rank in range(3)]
    assert {part.batches_per_epoch for part in parts} == {whole.batches_per_epoch}
    for batch, *shared in zip(whole.epoch(2, 1), *(part.epoch(2, 1) for part in parts), strict=True):
        assert np.concatenate(shared).tolist() == batch.tolist()
