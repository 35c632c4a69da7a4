"""The built-in data set `shapes`: small synthetic scenes, so that every verb can be tried offline.

A class is a texture in a form (a striped disc, a dotted cross). Colour, contrast, position, size and rotation are drawn
independently of it, and all forms cover the same area, so statistics of colour and brightness say next to nothing about
the class: a network has to learn local structure. A scene is a function of (seed, split, index) alone.
"""

from functools import lru_cache
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

FORMS = ("disc", "triangle", "cross")
TEXTURES = ("striped", "barred", "checked", "dotted")
CLASSES: tuple[str, ...] = tuple(f"{texture} {form}" for form in FORMS for texture in TEXTURES)

_SPLITS = {"train": 0, "val": 1}

Plane = NDArray[np.float32]


class Scene(NamedTuple):
    """One image with its labels.

    Attributes:
        image: RGB, uint8, (H, W, 3).
        label: The class of the main object, an index into `CLASSES`.
        segmentation: uint8, (H, W); 0 is background, c + 1 is class c. No class occurs twice, so an id is one object.
        boxes: float32, (K, 4); x0, y0, x1, y1 in pixels, tight around the object's visible pixels. Main object first.
        box_labels: int64, (K,); indices into `CLASSES`.
    """

    image: NDArray[np.uint8]
    label: int
    segmentation: NDArray[np.uint8]
    boxes: NDArray[np.float32]
    box_labels: NDArray[np.int64]


def scene(split: Literal["train", "val"], index: int, *, size: int = 64, seed: int = 0) -> Scene:
    """Draw scene number `index` of a split.

    Args:
        split: `train` or `val`, which share no scene.
        index: 0 or more; the label is `index % len(CLASSES)`, so that any range of indices is balanced.
        size: Height and width in pixels, 16 or more; the layout scales with it.
        seed: Each seed gives another data set.

    Returns:
        The same scene for the same arguments, in any order of calls.

    Raises:
        ValueError: If the split is unknown, the index or the seed negative, or the size below 16.
    """
    if split not in _SPLITS:
        raise ValueError(f"split must be 'train' or 'val', not {split!r}")
    if index < 0 or seed < 0 or size < 16:
        raise ValueError(f"index and seed must be 0 or more and size 16 or more, not {index}, {seed} and {size}")
    rng = np.random.default_rng([seed, _SPLITS[split], index])
    label = index % len(CLASSES)
    other = (label + int(rng.integers(1, len(CLASSES)))) % len(CLASSES)  # any class but the main object's
    image = _background(size, rng)
    segmentation = np.zeros((size, size), np.uint8)
    if rng.random() < 0.4:  # a small companion, drawn first: it may be partly hidden, the main object never is
        _draw(image, segmentation, other, size * rng.uniform(0.09, 0.12), rng)
    _draw(image, segmentation, label, size * rng.uniform(0.28, 0.34), rng)
    image += rng.standard_normal((size, size, 1), dtype=np.float32) * 0.5
    sliver = segmentation == other + 1
    if np.count_nonzero(sliver) < (size / 16) ** 2:  # too little is visible to count as an object
        segmentation[sliver] = 0
    found = [c for c in (label, other) if (segmentation == c + 1).any()]
    boxes = np.array([_box(segmentation == c + 1) for c in found], np.float32)
    return Scene(image.clip(0, 255).astype(np.uint8), label, segmentation, boxes, np.array(found, np.int64))


@lru_cache(maxsize=4)
def _grid(size: int) -> tuple[Plane, Plane]:
    """Return the pixel centres: x as a row, y as a column."""
    centres = np.arange(size, dtype=np.float32) + np.float32(0.5)
    return centres[None, :], centres[:, None]


def _turned(x: Plane, y: Plane, angle: float) -> tuple[Plane, Plane]:
    """Compute coordinates in a frame rotated by `angle` (radians)."""
    cos, sin = np.float32(np.cos(angle)), np.float32(np.sin(angle))
    return cos * x + sin * y, cos * y - sin * x


def _colour(rng: np.random.Generator) -> Plane:
    """Draw a muted colour, grey with a tint: strong ones would dominate an untrained network's features."""
    return (rng.uniform(100, 155) + rng.uniform(-16, 16, 3)).astype(np.float32)


def _background(size: int, rng: np.random.Generator) -> Plane:
    """Draw a soft gradient between two colours, in a random direction."""
    x, y = _grid(size)
    half = np.float32(size / 2)
    along, _ = _turned(x - half, y - half, rng.uniform(0, 2 * np.pi))
    first, second = _colour(rng), _colour(rng)
    return first + (second - first) * (along / np.float32(size) + 0.5).clip(0, 1)[..., None]


def _draw(image: Plane, segmentation: NDArray[np.uint8], label: int, radius: float, rng: np.random.Generator) -> None:
    """Paint one object of class `label` over the scene, in place, and mark its pixels."""
    size = len(image)
    form, texture = divmod(label, len(TEXTURES))
    x, y = _grid(size)
    # Rotated corners may extend a little beyond the image.
    middle = rng.uniform(1.3 * radius, size - 1.3 * radius, 2).astype(np.float32)
    u, v = _turned(x - middle[0], y - middle[1], rng.uniform(-0.3, 0.3))
    distance = _form(FORMS[form], u, v, np.float32(radius))
    # The period depends on the image, not the object; the phase is random, so no pixel's position reveals the texture.
    wave = np.float32(2 * np.pi / (size * rng.uniform(0.1, 0.15)))
    phase = rng.uniform(0, 2 * np.pi, 2).astype(np.float32)
    tone = _texture(TEXTURES[texture], u * wave + phase[0], v * wave + phase[1])
    contrast = np.float32(rng.choice((-1, 1)) * rng.uniform(25, 55))  # light on dark or dark on light
    paint = _colour(rng) + contrast * tone[..., None]
    # The dark rim makes the form visible locally; early versions without one taught the texture but not the form.
    paint += _step(distance + 0.14 * radius) * (_colour(rng) - 80 - paint)
    image += _step(-distance) * (paint - image)
    segmentation[distance <= 0] = label + 1


def _step(distance: Plane) -> Plane:
    """Compute an antialiased edge, (H, W, 1): 0 below, 1 above and smooth within half a pixel of distance 0."""
    t = (distance + 0.5).clip(0, 1)[..., None]
    return t * t * (3 - 2 * t)


def _form(name: str, u: Plane, v: Plane, radius: np.float32) -> Plane:
    """Compute the distance to the outline in pixels, negative inside; all forms have the area of a disc of `radius`."""
    if name == "disc":
        return np.hypot(u, v) - radius
    if name == "triangle":
        v = v - radius * 0.389  # from its centroid to the middle of its box, so that it stays in the image
        return np.maximum(abs(u) * 0.866 - v * 0.5, v) - radius * 0.778
    bar = np.maximum(abs(u) - radius * 1.108, abs(v) - radius * 0.443)
    return np.minimum(bar, np.maximum(abs(v) - radius * 1.108, abs(u) - radius * 0.443))


def _texture(name: str, u: Plane, v: Plane) -> Plane:
    """Compute a tone in -1..1 of period 2 pi in both coordinates; its sign is drawn by the caller."""
    if name == "striped":
        tone = np.sin(u)
    elif name == "barred":
        tone = np.sin(v)
    elif name == "checked":
        tone = 2 * np.sin(u) * np.sin(v)
    else:
        tone = np.cos(u) + np.cos(v) - 0.5
    return (2 * tone).clip(-1, 1)


def _box(inside: NDArray[np.bool_]) -> tuple[int, int, int, int]:
    """Compute the tight box around the True pixels; the far edges lie behind the last pixel."""
    xs, ys = np.flatnonzero(inside.any(0)), np.flatnonzero(inside.any(1))
    return int(xs[0]), int(ys[0]), int(xs[-1]) + 1, int(ys[-1]) + 1
