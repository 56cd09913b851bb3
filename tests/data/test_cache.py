from __future__ import annotations

import multiprocessing
import pickle

import numpy as np
import pytest
import torch

from paqdetr.data.loader import PixelCache
from paqdetr.errors import ConfigError

SIZES = np.array([[4, 5], [10, 10], [2, 3]])


def image(index: int, value: int = 7) -> torch.Tensor:
    return torch.full((3, *SIZES[index].tolist()), value, dtype=torch.uint8)


def test_what_is_put_in_comes_out() -> None:
    cache = PixelCache(SIZES, 10**6)
    assert cache.get(0) is None and len(cache) == 0
    for index in range(3):
        cache.put(index, image(index, 10 + index))
    for index in range(3):
        found = cache.get(index)
        assert found is not None and torch.equal(found, image(index, 10 + index))
    assert cache.nbytes == 3 * (20 + 100 + 6)


@pytest.mark.parametrize(
    ("budget", "kept"), [(0, []), (59, [2]), (60, [0]), (78, [0, 2]), (377, [0, 1]), (378, [0, 1, 2])]
)
def test_it_keeps_to_its_budget(budget: int, kept: list[int]) -> None:
    cache = PixelCache(SIZES, budget)
    for index in range(3):
        cache.put(index, image(index))
    assert [index for index in range(3) if cache.get(index) is not None] == kept
    assert cache.nbytes <= budget


def test_an_image_of_another_size_than_stated_is_not_kept() -> None:
    cache = PixelCache(SIZES, 10**6)
    cache.put(0, image(1))
    assert cache.get(0) is None


def _put(cache: PixelCache, index: int) -> None:
    cache.put(index, image(index))


def test_forked_processes_share_it() -> None:
    if "fork" not in multiprocessing.get_all_start_methods():
        pytest.skip("this platform does not fork")
    cache = PixelCache(SIZES, 10**6)
    other = multiprocessing.get_context("fork").Process(target=_put, args=(cache, 1))
    other.start()
    other.join()
    found = cache.get(1)
    assert found is not None and torch.equal(found, image(1))


def test_a_pickled_one_is_empty_and_keeps_to_the_budget() -> None:
    """As a spawned process gets it."""
    cache = PixelCache(SIZES, 78)
    cache.put(0, image(0))
    copy = pickle.loads(pickle.dumps(cache))
    assert copy.get(0) is None
    copy.put(0, image(0, 9))
    copy.put(1, image(1))
    assert int(copy.get(0)[0, 0, 0]) == 9 and copy.get(1) is None
    original = cache.get(0)
    assert original is not None and int(original[0, 0, 0]) == 7
    assert len(pickle.dumps(PixelCache(SIZES, 10**6))) < 2000


def test_more_memory_than_there_is() -> None:
    with pytest.raises(ConfigError, match=r"cache_images: .* GiB for decoded images cannot be had"):
        PixelCache(np.array([[10**9, 10**9]]), 2**62)
