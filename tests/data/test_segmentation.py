"""Images with a class for every pixel: what is read, what is refused, what augmentation keeps."""

import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dmjd.data.annotated import AnnotatedSamples
from dmjd.data.decode import BadImage, Wanted
from dmjd.data.segmentation import SegmentationAugmentation, SegmentationSet, open_segmentation, seen_hw
from dmjd.errors import DataError

HEIGHT, WIDTH = 30, 41


def write(root: Path, part: str, name: str, labels: np.ndarray, mode: str = "L") -> None:
    """An image whose grey is 20 times its label, and its annotation."""
    for folder in ("images", "annotations"):
        (root / folder / part).mkdir(parents=True, exist_ok=True)
    grey = np.repeat(labels[..., None] * 20, 3, axis=2).astype(np.uint8)
    Image.fromarray(grey).save(root / "images" / part / f"{name}.png")
    picture = Image.fromarray(labels.astype(np.uint16 if mode == "I;16" else np.uint8))
    if mode == "P":
        picture.putpalette([200, 10, 10] * 256)
    picture.save(root / "annotations" / part / f"{name}.png")


def stripes(*classes: int) -> np.ndarray:
    return np.repeat(np.repeat(np.array(classes), -(-WIDTH // len(classes)))[None, :WIDTH], HEIGHT, axis=0)


@pytest.fixture
def root(tmp_path):
    for part, count in (("train", 3), ("val", 2)):
        for number in range(count):
            write(tmp_path, part, f"{number}", stripes(0, 1, 2))
    return tmp_path


def found(root: Path, **options: object) -> tuple[SegmentationSet, SegmentationSet]:
    return open_segmentation(str(root), Wanted(3), **options)


def augmentation(size: tuple[int, int], **options: object) -> SegmentationAugmentation:
    chosen = {"scale": (0.5, 2.0), "flip": True, "photometric": True, "mean": [0.5] * 3, "ignore_index": 255}
    return SegmentationAugmentation.of(size, **chosen | options)


def test_open__counts_the_classes_of_the_training_part(root):
    train, held_out = found(root)
    assert (len(train), len(held_out), train.classes) == (3, 2, ("0", "1", "2"))
    image, labels = train.read(0)
    assert image.shape == (3, HEIGHT, WIDTH)
    assert (image[0] == labels * 20).all()


def test_open__the_held_out_part_may_be_named(root):
    write(root, "test", "only", stripes(0, 1))
    assert (found(root)[1].part, len(found(root)[1])) == ("val", 2)
    assert (found(root, part="test")[1].part, len(found(root, part="test")[1])) == ("test", 1)
    with pytest.raises(DataError, match="no folder images/dev"):
        found(root, part="dev")


def test_open__names_may_be_given(root):
    assert found(root, classes=("a", "b", "c", "d"))[1].classes == ("a", "b", "c", "d")


def test_open__an_ignored_class_is_refused(root):
    with pytest.raises(DataError, match="label 1 is both a class and ignored"):
        found(root, ignore_index=1)


def test_open__an_ignored_highest_label_is_no_class(root):
    assert found(root, ignore_index=2)[0].classes == ("0", "1")


@pytest.mark.parametrize(
    ("folder", "said"),
    [("annotations", "an image without annotation: 1"), ("images", "an annotation without image: 1")],
)
def test_open__what_has_no_partner_is_named(root, folder, said):
    (root / folder / "train" / "1.png").unlink()
    with pytest.raises(DataError, match=said):
        found(root)


def test_open__annotations_that_cannot_be_read_are_the_reason_given(root):
    for number in range(len(found(root)[0])):
        Image.new("RGB", (9, 9)).save(root / "annotations" / "train" / f"{number}.png")
    with pytest.raises(DataError, match=r"no labels in the annotations; .*; annotation in colours"):
        found(root)


def test_open__masks_of_one_class_and_the_ignored_one_are_refused(root):
    for number in range(len(found(root)[0])):
        write(root, "train", str(number), stripes(0, 7))
    with pytest.raises(DataError, match="the only label beside the ignored 7 is 0"):
        found(root, ignore_index=7)


@pytest.mark.parametrize("ignore_index", [254, 255])
def test_open__masks_of_0_and_255_are_refused_with_the_remedy(root, ignore_index):
    for number in range(len(found(root)[0])):
        write(root, "train", str(number), stripes(0, 255))
    with pytest.raises(DataError, match=r"the only labels are 0 and 255; .*; write 1 instead of 255"):
        found(root, ignore_index=ignore_index)


def test_open__classes_that_no_annotation_has_are_named(root, capsys):
    found(root, classes=("a", "b", "c"))
    assert not capsys.readouterr().err
    found(root, classes=("a", "b", "c", "d"))
    assert "warning: no pixel of d in 3 of 3 annotations that were read" in capsys.readouterr().err
    for number in range(3):
        write(root, "train", str(number), stripes(0, 255))
    found(root, classes=("background", "road"))
    said = capsys.readouterr().err
    assert "no pixel of road" in said
    assert said.endswith("; write 1 instead of 255\n")


def test_open__numbers_between_labels_are_classes_and_that_is_said(root, capsys):
    write(root, "train", "0", stripes(0, 7))
    assert len(found(root)[0].classes) == 8
    assert "labels 0 to 7 are taken for classes, " in capsys.readouterr().err


@pytest.mark.parametrize("data", ["", "nowhere"])
def test_open__a_folder_of_another_layout_is_refused(data, tmp_path):
    with pytest.raises(DataError, match="no folder images/train"):
        found(tmp_path / data if data else Path(data))


@pytest.mark.parametrize("part", ["valid", "validation"])
def test_open__parts_may_be_called_training_and_validation_as_in_ade20k(root, part):
    for folder in ("images", "annotations"):
        (root / folder / "train").rename(root / folder / "training")
        (root / folder / "val").rename(root / folder / part)
    train, held_out = found(root)
    assert (train.root.name, held_out.root.name) == ("training", part)


@pytest.mark.parametrize("mode", ["L", "P", "I;16"])
def test_read__takes_numbers_of_every_kind_of_png(root, mode):
    write(root, "train", "0", stripes(2, 0, 1), mode)
    assert (found(root)[0].read(0).labels == torch.from_numpy(stripes(2, 0, 1))).all()


@pytest.mark.parametrize("bits", [1, 2, 4])
def test_read__takes_numbers_of_fewer_bits_as_they_are(root, bits):
    numbers = stripes(*range(2**bits))
    rows = ["".join(f"{number:0{bits}b}" for number in row) for row in numbers]
    lines = b"".join(b"\0" + int(row.ljust(-(-len(row) // 8) * 8, "0"), 2).to_bytes(-(-len(row) // 8)) for row in rows)
    head = struct.pack(">IIBBBBB", WIDTH, HEIGHT, bits, 0, 0, 0, 0)
    content = b"\x89PNG\r\n\x1a\n"
    for kind, data in ((b"IHDR", head), (b"IDAT", zlib.compress(lines)), (b"IEND", b"")):
        content += struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
    (root / "annotations" / "val" / "0.png").write_bytes(content)
    assert (open_segmentation(str(root), Wanted(3))[1].labels(0).numpy() == numbers).all()


def test_read__with_zero_reduced_the_first_class_is_label_1(root):
    write(root, "train", "0", stripes(0, 1, 2, 255))
    train, _ = found(root, reduce_zero_label=True)
    assert train.classes == ("0", "1")
    assert train.read(0).labels.unique().tolist() == [0, 1, 255]
    assert (train.read(0).labels[torch.from_numpy(stripes(0, 1, 2, 255)) == 0] == 255).all()


def test_read__a_label_out_of_range_says_which(root):
    train, _ = found(root, classes=("a", "b"))
    with pytest.raises(
        BadImage, match=r"label 2, but the last of 2 classes is 1, and 255 is ignored \(--ignore_index\)"
    ):
        train.read(0)


def test_read__an_annotation_of_another_size_in_colour_or_broken_says_so(root):
    annotations = root / "annotations" / "train"
    Image.fromarray(stripes(0, 1)[:-1].astype(np.uint8)).save(annotations / "0.png")
    Image.fromarray(np.zeros((HEIGHT, WIDTH, 3), np.uint8)).save(annotations / "1.png")
    (annotations / "2.png").write_bytes(b"no picture")
    train, _ = found(root, classes=("a", "b", "c"))
    for number, said in enumerate(["image of 30x41 but annotation of 29x41", "in colours", "UnidentifiedImageError"]):
        with pytest.raises(BadImage, match=said):
            train.read(number)


@pytest.mark.parametrize("kind", ["png", "jpg", "tif", "webp"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_read__an_annotation_of_the_stored_size_is_turned_along_with_its_image(root, turn_file, orientation, kind):
    labels = stripes(0, 1, 2)
    labels[: HEIGHT // 2] = 3
    write(root, "train", "0", labels)
    turn_file(root / "images" / "train" / "0.png", orientation, kind)
    if orientation in (2, 3, 4):  # these sizes cannot tell: the annotation is of the image as it is shown
        labels = {2: labels[:, ::-1], 3: labels[::-1, ::-1], 4: labels[::-1]}[orientation]
        Image.fromarray(labels.astype(np.uint8)).save(root / "annotations" / "train" / "0.png")
    image, found_labels = found(root)[0].read(0)
    assert image.shape[1:] == ((WIDTH, HEIGHT) if orientation >= 5 else (HEIGHT, WIDTH))
    agree = ((image[0] / 20).round() == found_labels).float().mean()
    assert agree == 1 if kind in ("png", "tif") else agree > 0.95  # the others are lossy


def test_read__an_annotation_of_the_shown_size_stays_as_it_is(root, turn_file):
    write(root, "train", "0", stripes(0, 1, 2))
    turn_file(root / "images" / "train" / "0.png", 6)
    shown = torch.from_numpy(stripes(0, 1, 2)).rot90(-1)
    Image.fromarray(shown.numpy().astype(np.uint8)).save(root / "annotations" / "train" / "0.png")
    image, labels = found(root)[0].read(0)
    assert torch.equal(labels, shown)
    assert torch.equal(image[0], shown.byte() * 20)


def test_read__an_annotation_on_its_side_without_a_word_of_exif_is_refused(root):
    Image.fromarray(stripes(0, 1).T.astype(np.uint8)).save(root / "annotations" / "train" / "0.png")
    with pytest.raises(BadImage, match="image of 30x41 but annotation of 41x30"):
        found(root)[0].read(0)


# -- training ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("image", "seen"),
    [
        ((480, 640), (64, 85)),
        ((640, 480), (85, 64)),
        ((64, 256), (64, 256)),
        ((64, 512), (32, 256)),
        ((20, 8000), (1, 256)),
        ((8000, 20), (256, 1)),
        ((3, 100_000), (1, 256)),
    ],
)
def test_seen_hw__the_shorter_side_is_given_and_the_longer_one_bounded(image, seen):
    assert tuple(seen_hw(image, 64)) == seen


def test_seen_hw__the_shorter_side_of_every_image_is_the_side_to_the_pixel():
    for side in (64, 224, 512):
        assert {min(seen_hw((height, 2 * height), side)) for height in range(16, 1000)} == {side}


@pytest.mark.parametrize("scale", [(0.1, 0.1), (0.5, 2.0)])
def test_augmentation__of_an_extremely_long_image_is_a_crop_as_any(scale):
    augment = augmentation((24, 32), scale=scale)
    for shape in ((20, 8000), (8000, 20), (1, 30_000)):
        image, labels = augment(torch.zeros(3, *shape, dtype=torch.uint8), torch.zeros(shape, dtype=torch.long))
        assert image.shape == (3, 24, 32)
        assert labels.shape == (24, 32)
        assert (labels == 0).any()


@pytest.mark.parametrize("channels", [1, 2, 3, 12])
def test_augmentation__of_a_deep_image_does_what_it_does_to_bytes_but_for_rounding(channels):
    pixels = torch.randint(256, (channels, 30, 41), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    augment = augmentation((24, 32), mean=[0.25] * channels, scale=(0.5, 0.7))
    results = []
    for image in (pixels, pixels.float()):
        torch.manual_seed(3)
        results.append(augment(image, torch.zeros(30, 41, dtype=torch.long)))
    assert [each.image.dtype for each in results] == [torch.uint8, torch.float32]
    assert torch.equal(results[0].labels, results[1].labels)
    assert (results[0].labels == 255).any()  # padded
    assert (results[0].image.float() - results[1].image).abs().mean() < 2
    assert 0 <= results[1].image.min() <= results[1].image.max() <= 255


def test_augmentation__colours_change_where_there_are_any():
    torch.manual_seed(0)
    for channels, changed in ((1, True), (2, False), (3, True), (4, False)):
        image, labels = torch.full((channels, 24, 32), 100, dtype=torch.uint8), torch.zeros(24, 32, dtype=torch.long)
        augment = augmentation((24, 32), scale=(1.0, 1.0), mean=[0.5] * channels)
        assert bool((augment(image, labels).image != image).any()) == changed


@pytest.mark.parametrize("size", [(24, 32), (64, 96), (17, 23)])
def test_augmentation__labels_move_with_the_image_and_padding_is_ignored(root, size):
    train, _ = found(root)
    samples = AnnotatedSamples(train, augmentation(size, photometric=False), seed=0)
    padded = 0
    for index in range(len(train)):
        for epoch in range(4):
            image, labels, skipped = samples[epoch, index]
            assert image.shape[1:] == labels.shape == size
            assert image.dtype == torch.uint8
            assert not skipped
            inside = labels != 255
            agree = ((image[0] / 20).round() == labels)[inside].float().mean()
            assert agree > 0.75  # not 1: colours of an edge are mixed, classes are not
            assert (image[0][~inside].float() - 127.5).abs().le(1).all()
            padded += int((~inside).sum())
    assert padded


def test_augmentation__a_sample_depends_on_seed_epoch_and_index_alone(root):
    train, _ = found(root)
    augment = augmentation((24, 32))
    before = torch.random.get_rng_state()
    first, again = (AnnotatedSamples(train, augment, seed=1)[2, 0] for _ in range(2))
    assert torch.equal(first[0], again[0])
    assert torch.equal(first[1], again[1])
    assert not torch.equal(first[0], AnnotatedSamples(train, augment, seed=1)[3, 0][0])
    assert not torch.equal(first[0], AnnotatedSamples(train, augment, seed=2)[2, 0][0])
    assert not torch.equal(first[0], AnnotatedSamples(train, augment, seed=1)[2, 1][0])  # of the same pixels
    assert torch.equal(before, torch.random.get_rng_state())
