"""Packed texts and numbers are those that were packed."""

import os
import pickle
from multiprocessing.reduction import ForkingPickler

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dmjd.data.packed import PackedNumbers, PackedStrings


@given(texts=st.lists(st.text()))
def test_pack__gives_back_what_went_in(texts):
    packed = PackedStrings.pack(texts)
    assert len(packed) == len(texts)
    assert [*packed] == texts
    assert [*pickle.loads(pickle.dumps(packed))] == texts


def test_pack__texts_stay_readable_after_their_memory_moved_to_a_worker():
    texts = [f"{number:08d}.png" for number in range(100_000)]
    packed = PackedStrings.pack(texts)
    assert packed[3] == texts[3]
    ForkingPickler.dumps(packed)
    assert packed.content.is_shared()
    _ = [bytes(1_400_000) for _ in range(8)]  # whatever was freed is written over
    assert [*packed] == texts


def test_packed_numbers__stay_readable_after_their_memory_moved_to_a_worker():
    packed = PackedNumbers(torch.arange(100_000))
    assert packed[3] == 3
    assert len(ForkingPickler.dumps(packed)) < 1000
    assert packed.content.is_shared()
    _ = [bytes(800_000) for _ in range(8)]  # whatever was freed is written over
    assert [packed[index] for index in range(0, 100_000, 1000)] == [*range(0, 100_000, 1000)]


def test_pack__file_names_need_not_be_unicode():
    name = os.fsdecode(b"caf\xe9.png")
    assert PackedStrings.pack(["a", name])[1] == name


@pytest.mark.parametrize("index", [-1, 2])
def test_pack__a_number_out_of_range_is_an_index_error(index):
    with pytest.raises(IndexError, match="among 2"):
        PackedStrings.pack(["a", "b"])[index]
