"""Blocks change nothing about which rows are nearest, or which pairs are alike."""

import numpy as np
import pytest
import torch

from dmjd.errors import ConfigError, DataError
from dmjd.evaluation import neighbours
from dmjd.evaluation.neighbours import groups_of, near_pairs, nearest

CPU = torch.device("cpu")


@pytest.fixture
def small_blocks(monkeypatch):
    """As many blocks as a set of a million has, of a set of a hundred."""
    monkeypatch.setattr(neighbours, "SIMILARITIES", 60)
    monkeypatch.setattr(neighbours, "BLOCK", 7)


def similarities(bank):
    unit = bank / np.linalg.norm(bank, axis=1, keepdims=True)
    return unit @ unit.T


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("k", [1, 9, 200])
def test_nearest__is_that_of_all_pairs(small_blocks, dtype, k):
    bank = np.random.default_rng(0).normal(size=(100, 6)).astype(dtype)
    expected = similarities(bank.astype(np.float64))[:5]
    similar, rows = nearest(bank, torch.from_numpy(bank[:5].astype(np.float32)), k=k, device=CPU)
    order = np.argsort(-expected, axis=1)[:, :k]
    np.testing.assert_array_equal(rows.numpy(), order)
    np.testing.assert_allclose(similar.numpy(), np.take_along_axis(expected, order, axis=1), atol=1e-5)


def test_near_pairs__are_those_of_all_pairs_once(small_blocks):
    bank = np.random.default_rng(1).normal(size=(100, 4)).astype(np.float32)
    expected = np.argwhere(np.triu(similarities(bank.astype(np.float64)) >= 0.9, 1))
    pairs, similar = near_pairs(bank, threshold=0.9, device=CPU)
    assert sorted(map(tuple, pairs.tolist())) == list(map(tuple, expected.tolist()))
    assert len(pairs) > 50
    assert (similar >= 0.9).all()


def test_near_pairs__of_equal_rows_are_found_by_a_threshold_of_one():
    rows = np.random.default_rng(0).normal(size=(50, 384)).astype(np.float32)
    pairs, _ = near_pairs(np.concatenate([rows, rows]), threshold=1.0, device=CPU)
    assert pairs.tolist() == [[row, row + 50] for row in range(50)]


def test_near_pairs__too_many_are_refused(small_blocks, monkeypatch):
    monkeypatch.setattr(neighbours, "MOST_PAIRS", 100)
    with pytest.raises(ConfigError, match=r"more than 100 pairs are this similar; --threshold 0.9; choose a higher"):
        near_pairs(np.ones((50, 3), np.float32), threshold=0.9, device=CPU)


def test_near_pairs__a_row_of_no_numbers_is_named_whatever_the_block(small_blocks):
    bank = np.ones((50, 3), np.float32)
    bank[40, 1] = np.nan
    with pytest.raises(DataError, match="values that are not finite; row 40 of the features"):
        near_pairs(bank, threshold=2.0, device=CPU)


def test_groups__join_what_pairs_join_through_others():
    pairs = torch.tensor([[0, 4], [2, 3], [4, 7], [3, 5]])
    assert groups_of(pairs, 9) == [[0, 4, 7], [2, 3, 5]]
    assert groups_of(torch.empty(0, 2, dtype=torch.long), 9) == []
