from typing import Literal

import numpy as np
import pytest

from dmjd.data.shapes import CLASSES, Scene, scene

COUNT = 600  # 50 scenes a class


@pytest.fixture(scope="module")
def scenes() -> list[Scene]:
    return [scene("train", index, size=32) for index in range(COUNT)]


def same(a: Scene, b: Scene) -> bool:
    return all(np.array_equal(np.asarray(x), np.asarray(y)) for x, y in zip(a, b, strict=True))


def nearest_centroid_accuracy(features: np.ndarray, labels: np.ndarray) -> float:
    """Centroids of the first half, accuracy on the second."""
    half = len(labels) // 2
    centroids = np.stack([features[:half][labels[:half] == c].mean(0) for c in range(len(CLASSES))])
    distances = np.linalg.norm(features[half:, None] - centroids, axis=-1)
    return float((distances.argmin(1) == labels[half:]).mean())


def test_shapes__same_index_gives_the_same_scene() -> None:
    first = scene("train", 7)
    scene("train", 8)
    np.random.default_rng().random()
    assert same(first, scene("train", 7))


def test_shapes__global_random_state_is_neither_read_nor_moved() -> None:
    np.random.seed(1)  # noqa: NPY002
    before = scene("val", 3)
    drawn = np.random.random()  # noqa: NPY002
    np.random.seed(1)  # noqa: NPY002
    assert drawn == np.random.random()  # noqa: NPY002
    assert same(before, scene("val", 3))


def test_shapes__no_two_indices_give_the_same_image(scenes: list[Scene]) -> None:
    assert len({s.image.tobytes() for s in scenes}) == COUNT


def test_shapes__train_and_val_share_no_image(scenes: list[Scene]) -> None:
    train = {s.image.tobytes() for s in scenes}
    assert not any(scene("val", index, size=32).image.tobytes() in train for index in range(100))


def test_shapes__another_seed_gives_another_image() -> None:
    assert not np.array_equal(scene("train", 0, seed=0).image, scene("train", 0, seed=1).image)


@pytest.mark.parametrize("size", [32, 64, 97])
def test_shapes__shapes_and_types_hold_at_every_size(size: int) -> None:
    for index in range(12):
        s = scene("val", index, size=size)
        assert (s.image.shape, s.image.dtype) == ((size, size, 3), np.uint8)
        assert (s.segmentation.shape, s.segmentation.dtype) == ((size, size), np.uint8)
        assert (s.boxes.shape, s.boxes.dtype) == ((len(s.box_labels), 4), np.float32)
        assert s.box_labels.dtype == np.int64
        assert type(s.label) is int


@pytest.mark.parametrize("size", [16, 32, 64])
def test_shapes__a_box_is_tight_around_its_object(size: int) -> None:
    for index in range(200):
        s = scene("train", index, size=size)
        for (x0, y0, x1, y1), c in zip(s.boxes.astype(int), s.box_labels, strict=True):
            ys, xs = np.nonzero(s.segmentation == c + 1)
            assert (x0, y0, x1, y1) == (xs.min(), ys.min(), xs.max() + 1, ys.max() + 1)


def test_shapes__every_object_has_one_box_and_the_main_one_is_first(scenes: list[Scene]) -> None:
    for s in scenes:
        assert sorted(s.box_labels + 1) == sorted(set(s.segmentation.flat) - {0})
        assert s.box_labels[0] == s.label
        assert np.bincount(s.segmentation[s.segmentation > 0]).argmax() == s.label + 1


def test_shapes__some_scenes_hold_one_object_and_some_two(scenes: list[Scene]) -> None:
    share = np.mean([len(s.boxes) == 2 for s in scenes])
    assert 0.1 < share < 0.5


@pytest.mark.parametrize("split", ["train", "val"])
def test_shapes__labels_are_balanced_and_every_class_appears(split: Literal["train", "val"]) -> None:
    labels = [scene(split, index, size=16).label for index in range(10 * len(CLASSES))]
    assert np.bincount(labels).tolist() == [10] * len(CLASSES)
    assert len(set(CLASSES)) == len(CLASSES)


def test_shapes__the_companion_says_nothing_but_that_it_is_of_another_class(scenes: list[Scene]) -> None:
    others = np.array([(s.box_labels[1] - s.label) % len(CLASSES) for s in scenes if len(s.boxes) == 2])
    assert set(others) == set(range(1, len(CLASSES)))


def test_shapes__colour_says_next_to_nothing_about_the_class(scenes: list[Scene]) -> None:
    labels = np.array([s.label for s in scenes])
    colour = np.stack([s.image.mean((0, 1)) for s in scenes])
    assert nearest_centroid_accuracy(colour, labels) < 2 / len(CLASSES)


def test_shapes__every_form_covers_about_the_same_area(scenes: list[Scene]) -> None:
    area = np.array([(s.segmentation == s.label + 1).mean() for s in scenes])
    by_class = np.array([area[[s.label == c for s in scenes]].mean() for c in range(len(CLASSES))])
    assert by_class.max() / by_class.min() < 1.15


def test_shapes__the_object_shows_the_texture_it_is_named_for() -> None:
    """Stripes change along x, bars along y: nine tenths of the scenes tell so by their gradients alone."""
    for texture, sign in (("striped", 1), ("barred", -1)):
        label = CLASSES.index(f"{texture} disc")
        right = 0
        for k in range(40):
            s = scene("train", label + k * len(CLASSES))
            grey = s.image.mean(-1)
            inside = (s.segmentation == label + 1)[1:, 1:]
            along_x, along_y = (
                abs(np.diff(grey, axis=1))[1:][inside].sum(),
                abs(np.diff(grey, axis=0))[:, 1:][inside].sum(),
            )
            right += sign * (along_x - along_y) > 0
        assert right >= 36


@pytest.mark.parametrize(
    ("split", "index", "size", "seed"),
    [("train", -1, 64, 0), ("val", 0, 15, 0), ("val", 0, 64, -1)],
)
def test_shapes__a_wrong_argument_is_a_value_error(split: str, index: int, size: int, seed: int) -> None:
    with pytest.raises(ValueError, match="must be"):
        scene(split, index, size=size, seed=seed)  # type: ignore[arg-type]
