"""Held in memory, images are what decoding gives, and so are the reasons of those that do not decode."""

import os
import pickle
import threading
import time
import warnings

import pytest
import torch

from dmjd.data import memory
from dmjd.data.decode import BadImage, Wanted
from dmjd.data.folder import folder_images
from dmjd.data.memory import PackedImages, in_memory
from dmjd.data.source import Source, Subset, View


@pytest.mark.parametrize("in_chans", [1, 3])
@pytest.mark.parametrize("threaded", [0, memory.THREADED])
def test_in_memory__equals_decoding(tmp_path, write, monkeypatch, threaded, in_chans):
    monkeypatch.setattr(memory, "THREADED", threaded)
    write(tmp_path, "x/a.png", "y/b.png", size=(6, 4))
    write(tmp_path, "x/c.png", size=(9, 30))
    (tmp_path / "y" / "bad.png").write_text("no image")
    images = folder_images(tmp_path, Wanted(in_chans))
    for held in (in_memory(images), pickle.loads(pickle.dumps(in_memory(images)))):
        assert isinstance(held, PackedImages)
        assert isinstance(held, Source)
        assert held.in_memory
        assert (len(held), held.classes, held.address) == (4, ("x", "y"), str(tmp_path))
        assert [*held.bad] == [3]
        for index in range(len(images)):
            assert (held.name(index), held.label(index)) == (images.name(index), images.label(index))
            if index in held.bad:
                with pytest.raises(BadImage) as from_file:
                    images.read(index)
                with pytest.raises(BadImage) as from_memory:
                    held.read(index)
                assert str(from_file.value) == str(from_memory.value)
            else:
                assert torch.equal(held.read(index), images.read(index))


def test_packed_images__decoding_in_threads_leaves_the_warnings_of_the_process_as_they_were(tmp_path, write):
    write(tmp_path, *[f"{number}.png" for number in range(600)], size=(6, 4))
    before = [*warnings.filters]
    PackedImages(folder_images(tmp_path, Wanted(3)), threads=4)
    assert warnings.filters == before


def test_in_memory__a_subset_is_held_alone(folder):
    images = folder_images(folder, Wanted(3))
    held = in_memory(Subset(images, [7, 2]))
    assert isinstance(held, PackedImages)
    assert [held.name(0), held.name(1)] == ["007.png", "002.png"]
    assert torch.equal(held.read(1), images.read(2))
    assert held.pixels.numel() == 2 * 3 * 20 * 24


def test_in_memory__what_is_held_is_not_held_again(folder):
    held = in_memory(folder_images(folder, Wanted(3)))
    subset = Subset(held, [1, 2])
    assert in_memory(held) is held
    assert in_memory(subset) is subset


def test_in_memory__large_sets_stay_on_the_disk(tmp_path, write, monkeypatch):
    images = folder_images(write(tmp_path, "a.png", "b.png"), Wanted(3))
    monkeypatch.setattr(memory, "MEMORY_LIMIT", 2 * 6 * 4 * 3 - 1)
    assert in_memory(images) is images


def test_in_memory__sets_whose_largest_images_were_not_among_the_few_stay_on_the_disk(tmp_path, write, monkeypatch):
    names = [f"{number:02}.png" for number in range(40)]
    images = folder_images(write(tmp_path, *names, size=(6, 4)), Wanted(3))
    write(tmp_path, "01.png", size=(60, 40))
    monkeypatch.setattr(memory, "MEMORY_LIMIT", 40 * 6 * 4 * 3)
    assert in_memory(images) is images


def test_in_memory__sets_without_a_readable_image_stay_on_the_disk(tmp_path):
    (tmp_path / "a.png").write_text("no image")
    images = folder_images(tmp_path, Wanted(3))
    assert in_memory(images) is images


@pytest.mark.parametrize(
    ("threaded", "ranks", "most"),
    [(0, 16, 1), (0, 4, 4), (memory.THREADED, 4, 1)],
    ids=["a rank has one core", "a rank has four", "images are small"],
)
def test_in_memory__large_images_are_decoded_on_the_cores_of_a_rank(folder, monkeypatch, threaded, ranks, most):
    decoding, together = set(), []

    class Slow(View):
        def read(self, index, reduce=None):
            decoding.add(threading.get_ident())
            time.sleep(0.01)
            together.append(len(decoding))
            decoding.discard(threading.get_ident())
            return self.source.read(index)

    monkeypatch.setattr(memory, "CHUNK", 1)
    monkeypatch.setattr(memory, "THREADED", threaded)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {*range(16)}, raising=False)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(ranks))
    in_memory(Slow(folder_images(folder, Wanted(3))))
    assert max(together) <= most
    assert (max(together) > 1) == (most > 1)
