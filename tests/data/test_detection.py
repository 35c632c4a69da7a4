"""Images with boxes: what COCO's and Pascal VOC's files become, what is refused, what augmentation keeps."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dmjd.data.annotated import AnnotatedSamples
from dmjd.data.decode import BadImage, Wanted
from dmjd.data.detection import DetectionAugmentation, LargeScaleJitter, open_detection
from dmjd.errors import DataError

HEIGHT, WIDTH = 30, 41
SQUARE = [[5, 6, 15, 6, 15, 16, 5, 16]]  # polygon of the box 5, 6, 15, 16


def picture(path: Path, height: int = HEIGHT, width: int = WIDTH) -> None:
    """Black, with a white box from (5, 6) to (15, 16)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.zeros((height, width, 3), np.uint8)
    pixels[6:16, 5:15] = 255
    Image.fromarray(pixels).save(path)


def annotation(image: int, box: list[float], category: int = 3, **more: object) -> dict:
    return {"image_id": image, "bbox": box, "category_id": category, **more}


def write_coco(root: Path, train: list[dict], *, size: tuple[int, int] = (HEIGHT, WIDTH)) -> Path:
    """Two images in either part; all of `train` is annotated in the first part, a box in the second."""
    for part, annotations in (("train2017", train), ("val2017", [annotation(0, [5, 6, 10, 10])])):
        for number in range(2):
            picture(root / part / f"{number}.png")
        content = {
            "images": [
                {"id": number, "file_name": f"{number}.png", "height": size[0], "width": size[1]} for number in range(2)
            ],
            "categories": [{"id": 7, "name": "dog"}, {"id": 3, "name": "cat"}],
            "annotations": [{"id": number, **each} for number, each in enumerate(annotations)],
        }
        (root / "annotations").mkdir(exist_ok=True)
        (root / "annotations" / f"instances_{part}.json").write_text(json.dumps(content))
    return root


def write_voc(root: Path, *objects: tuple[str, tuple[int, int, int, int], int], held_out: str = "cat") -> Path:
    """One image with the objects for training, one with a box held out."""
    (root / "Annotations").mkdir()
    (root / "ImageSets" / "Main").mkdir(parents=True)
    for part, found in (("train", objects), ("val", [(held_out, (6, 7, 15, 16), 0)])):
        picture(root / "JPEGImages" / f"{part}.png")
        (root / "ImageSets" / "Main" / f"{part}.txt").write_text(f"{part} 1\n")
        boxes = "".join(
            f"<object><name>{name}</name><difficult>{difficult}</difficult><bndbox><xmin>{box[0]}</xmin>"
            f"<ymin>{box[1]}</ymin><xmax>{box[2]}</xmax><ymax>{box[3]}</ymax></bndbox></object>"
            for name, box, difficult in found
        )
        size = f"<size><width>{WIDTH}</width><height>{HEIGHT}</height></size>"
        (root / "Annotations" / f"{part}.xml").write_text(f"<annotation>{size}{boxes}</annotation>")
    return root


def found(root: Path, **options: object):
    return open_detection(str(root), Wanted(3), **options)


@pytest.mark.parametrize("kind", ["coco", "voc"])
def test_open__the_held_out_part_may_be_named(kind, tmp_path):
    if kind == "coco":
        write_coco(tmp_path, [annotation(0, [5, 6, 10, 10]), annotation(1, [0, 0, 4, 5])])
        content = json.loads((tmp_path / "annotations" / "instances_train2017.json").read_text())
        (tmp_path / "annotations" / "instances_test2017.json").write_text(json.dumps(content))
        (tmp_path / "train2017").rename(tmp_path / "images")
        expected = {"val": "val2017", "test": "test2017"}
    else:
        write_voc(tmp_path, ("cat", (6, 7, 15, 16), 0), ("cat", (1, 1, 5, 6), 0))
        lists = tmp_path / "ImageSets" / "Main"
        (lists / "test.txt").write_text((lists / "train.txt").read_text())
        expected = {"val": "val", "test": "test"}
    assert [found(tmp_path, part=part)[1].part for part in (None, "val", "test")] == [
        expected["val"],
        *expected.values(),
    ]
    assert [sum(found(tmp_path, part=part)[1].counts) for part in ("val", "test")] == [1, 2]
    with pytest.raises(DataError):
        found(tmp_path, part="dev")


# -- COCO --------------------------------------------------------------------------------------------------------------


def test_coco__boxes_are_corners_and_classes_are_in_order_of_their_numbers(tmp_path):
    train, held_out = found(write_coco(tmp_path, [annotation(1, [5, 6, 10, 10], 7), annotation(1, [0, 0, 4, 5], 3)]))
    assert (train.classes, train.counts, held_out.counts) == (("cat", "dog"), (1, 1), (1, 0))
    image, objects = train.read(1)
    assert image.shape == (3, HEIGHT, WIDTH)
    assert objects.boxes.tolist() == [[5, 6, 15, 16], [0, 0, 4, 5]]
    assert objects.labels.tolist() == [1, 0]
    assert objects.masks is None


def test_coco__a_byte_order_mark_is_none_of_it_and_categories_of_one_name_are_a_class(tmp_path):
    root = write_coco(tmp_path, [annotation(1, [5, 6, 10, 10], 7), annotation(1, [0, 0, 4, 5], 3)])
    for file in (root / "annotations").iterdir():
        content = json.loads(file.read_text())
        for category in content["categories"]:
            category["name"] = "cat"
        file.write_text(json.dumps(content), "utf-8-sig")
    train, _ = found(root)
    assert (train.classes, train.counts, train.read(1)[1].labels.tolist()) == (("cat",), (2,), [0, 0])


def test_coco__an_image_without_boxes_has_none(tmp_path):
    _, objects = found(write_coco(tmp_path, [annotation(1, [5, 6, 10, 10])]))[0].read(0)
    assert objects.boxes.shape == (0, 4)
    assert objects.labels.shape == objects.ignored.shape == (0,)


def test_coco__crowds_are_ignored_and_not_counted(tmp_path):
    crowd = annotation(0, [0, 0, 9, 9], iscrowd=1)
    train, _ = found(write_coco(tmp_path, [crowd, annotation(0, [5, 6, 10, 10])]))
    assert train.counts == (1, 0)
    assert train.read(0)[1].ignored.tolist() == [True, False]


def test_coco__polygons_and_run_lengths_become_the_same_mask(tmp_path):
    lengths = {"size": [HEIGHT, WIDTH], "counts": [5 * HEIGHT + 6, 10, *[HEIGHT - 10, 10] * 9, 26 * HEIGHT + 14]}
    box = [5, 6, 10, 10]
    kinds = [annotation(0, box, segmentation=each) for each in (SQUARE, lengths)] + [annotation(0, box)]
    _, objects = found(write_coco(tmp_path, kinds))[0].read(0)
    image, _ = found(tmp_path)[0].read(0)
    assert objects.masks.shape == (3, HEIGHT, WIDTH)
    for mask in objects.masks:  # the third object has no outline: its box stands for it
        assert torch.equal(mask, image[0] == 255)


def test_coco__an_outline_of_fewer_than_three_points_is_none(tmp_path):
    box = [5, 6, 10, 10]
    outlines = ([[0, 0, 40, 29]], [[0, 0, 40, 29], *SQUARE], [[]])
    train, _ = found(write_coco(tmp_path, [annotation(0, box, segmentation=each) for each in outlines]))
    image, objects = train.read(0)
    for mask in objects.masks:
        assert torch.equal(mask, image[0] == 255)


@pytest.mark.parametrize(
    "segmentation",
    [
        {"size": [9, 9], "counts": [40, 41]},
        {"size": [HEIGHT, WIDTH], "counts": "no run lengths"},
        {"size": [HEIGHT, WIDTH]},
        ["polygon"],
        7,
    ],
)
def test_coco__an_outline_that_does_not_decode_makes_a_bad_image(tmp_path, segmentation):
    train, _ = found(write_coco(tmp_path, [annotation(0, [5, 6, 10, 10], segmentation=segmentation)]))
    with pytest.raises(BadImage, match="segmentation"):
        train.read(0)


@pytest.mark.parametrize("name", ["{part}/{number}.png", "images/{part}/{number}.png"])
def test_coco__paths_may_start_from_any_folder_of_the_set(tmp_path, name):
    write_coco(tmp_path, [annotation(0, [5, 6, 10, 10])])
    for part in ("train2017", "val2017"):
        file = tmp_path / "annotations" / f"instances_{part}.json"
        content = json.loads(file.read_text())
        for number, image in enumerate(content["images"]):
            image["file_name"] = name.format(part=part, number=number)
            picture(tmp_path / image["file_name"])
        file.write_text(json.dumps(content))
    for part in found(tmp_path):
        assert part.read(0)[0].shape == (3, HEIGHT, WIDTH)


def test_coco__the_part_may_come_first_in_the_name_of_its_file(tmp_path):
    write_coco(tmp_path, [annotation(0, [5, 6, 10, 10])])
    for part in ("train", "val"):
        (tmp_path / f"{part}2017").rename(tmp_path / part)
        (tmp_path / "annotations" / f"instances_{part}2017.json").rename(
            tmp_path / "annotations" / f"{part}_annotations.json"
        )
    assert [part.root.name for part in found(tmp_path)] == ["train", "val"]


def test_coco__an_unknown_size_is_that_of_the_image(tmp_path):
    for size in ((None, None), (0, 0)):
        train, _ = found(write_coco(tmp_path, [annotation(0, [5, 6, 10, 10])], size=size))
        assert train.read(0)[1].boxes.tolist() == [[5, 6, 15, 16]]


def test_coco__the_outline_of_a_crowd_makes_no_masks_of_boxes(tmp_path):
    lengths = {"size": [HEIGHT, WIDTH], "counts": [0, HEIGHT * WIDTH]}
    crowd = annotation(0, [0, 0, 9, 9], iscrowd="1", segmentation=lengths)
    train, _ = found(write_coco(tmp_path, [crowd, annotation(0, [5, 6, 10, 10], iscrowd="0")]))
    assert not train.masks
    assert train.read(0)[1].ignored.tolist() == [True, False]


def test_coco__boxes_are_cut_at_the_edge_and_those_without_area_left_out_with_a_word(tmp_path, capsys):
    boxes = ([-3, -4, 10, 10], [38, 20, 50, 50], [5, 5, 0, 8], [5, 5, 8, -1], [60, 5, 5, 5])
    train, _ = found(write_coco(tmp_path, [annotation(0, box) for box in boxes]))
    assert train.read(0)[1].boxes.tolist() == [[0, 0, 7, 6], [38, 20, 41, 30]]
    assert "warning: 3 boxes without area left out, such as in 0.png" in capsys.readouterr().err


def test_coco__an_image_of_another_size_than_annotated_is_a_bad_one(tmp_path):
    train, _ = found(write_coco(tmp_path, [annotation(0, [5, 6, 10, 10])], size=(60, 82)))
    with pytest.raises(BadImage, match="image of 30x41 pixels, annotated as 60x82"):
        train.read(0)


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda root: (root / "train2017" / "1.png").unlink(), "an annotation for a missing image; .*1.png"),
        (lambda root: (root / "annotations" / "instances_val2017.json").unlink(), r"no annotations/\*val\*.json"),
        (lambda root: (root / "annotations" / "instances_val2017.json").write_text("{"), "not a COCO file"),
        (lambda root: (root / "annotations" / "instances_val2017.json").write_text("[]"), "not a COCO file"),
        (lambda root: write_coco(root, [annotation(9, [5, 6, 10, 10])]), "annotation for image 9, which is not listed"),
        (lambda root: write_coco(root, [annotation(0, [5, 6, 9, 9], 8)]), "unknown class 'category 8'"),
        (lambda root: write_coco(root, []), "no objects"),
    ],
)
def test_coco__what_is_missing_or_broken_is_named(tmp_path, spoil, said):
    spoil(write_coco(tmp_path, [annotation(0, [5, 6, 10, 10])]))
    with pytest.raises(DataError, match=said):
        found(tmp_path)


@pytest.mark.parametrize(
    ("kind", "key", "value", "said"),
    [
        ("images", "id", 0, "2 images have the id 0"),
        ("images", "file_name", "0.png", "2 images have the file_name '0.png'"),
        ("annotations", "id", 0, "2 annotations have the id 0"),
        ("categories", "id", 7, "2 categories have the id 7"),
    ],
)
def test_coco__what_comes_twice_is_named_with_the_file(tmp_path, kind, key, value, said):
    write_coco(tmp_path, [annotation(0, [5, 6, 10, 10]), annotation(0, [0, 0, 9, 9])])
    file = tmp_path / "annotations" / "instances_train2017.json"
    content = json.loads(file.read_text())
    content[kind][1][key] = value
    file.write_text(json.dumps(content))
    with pytest.raises(DataError, match=f"{said}; .*instances_train2017.json; give each its own"):
        found(tmp_path)


def test_coco__annotations_need_no_ids(tmp_path):
    plain = [annotation(0, box, id=None) for box in ([5, 6, 10, 10], [0, 0, 9, 9])]
    assert found(write_coco(tmp_path, plain))[0].counts == (2, 0)


def test_coco__the_file_of_instances_is_taken_and_images_may_lie_elsewhere(tmp_path):
    write_coco(tmp_path, [annotation(0, [5, 6, 10, 10])])
    (tmp_path / "annotations" / "captions_train2017.json").write_text("{}")
    (tmp_path / "images").mkdir()
    for part in ("train2017", "val2017"):
        (tmp_path / part).rename(tmp_path / "images" / part)
    assert found(tmp_path)[0].root == tmp_path / "images" / "train2017"


@pytest.mark.parametrize("shape", ["polygon", "lengths", "box"])
@pytest.mark.parametrize("orientation", range(5, 9))
def test_coco__objects_annotated_in_the_stored_size_are_turned_along_with_their_image(
    tmp_path, turn_file, orientation, shape
):
    lengths = {"size": [HEIGHT, WIDTH], "counts": [5 * HEIGHT + 6, 10, *[HEIGHT - 10, 10] * 9, 26 * HEIGHT + 14]}
    outline = {"polygon": {"segmentation": SQUARE}, "lengths": {"segmentation": lengths}, "box": {}}[shape]
    write_coco(tmp_path, [annotation(0, [5, 6, 10, 10], **outline)])
    turn_file(tmp_path / "train2017" / "0.png", orientation)
    image, objects = found(tmp_path)[0].read(0)
    assert image.shape[1:] == (WIDTH, HEIGHT)
    left, top, right, bottom = map(int, objects.boxes[0])
    assert (image[:, top:bottom, left:right] == 255).all()
    assert image.sum() == 3 * 255 * (bottom - top) * (right - left)
    if shape != "box":
        assert torch.equal(objects.masks[0], image[0] == 255)


@pytest.mark.parametrize("size", [(WIDTH, HEIGHT), (0, 0)])
def test_coco__objects_annotated_in_the_shown_size_or_in_none_stay(tmp_path, turn_file, size):
    write_coco(tmp_path, [annotation(0, [14, 5, 10, 10], segmentation=[[14, 5, 24, 5, 24, 15, 14, 15]])], size=size)
    turn_file(tmp_path / "train2017" / "0.png", 6)  # the square goes from (5, 6) to (14, 5)
    image, objects = found(tmp_path)[0].read(0)
    assert objects.boxes.tolist() == [[14, 5, 24, 15]]
    assert torch.equal(objects.masks[0], image[0] == 255)


def test_coco__an_image_on_its_side_without_a_word_of_exif_is_a_bad_one(tmp_path):
    train, _ = found(write_coco(tmp_path, [annotation(0, [5, 6, 10, 10])], size=(WIDTH, HEIGHT)))
    with pytest.raises(BadImage, match="image of 30x41 pixels, annotated as 41x30"):
        train.read(0)


# -- Pascal VOC --------------------------------------------------------------------------------------------------------


def test_voc__pixels_count_from_one_and_difficult_objects_are_ignored(tmp_path):
    train, held_out = found(write_voc(tmp_path, ("cat", (6, 7, 15, 16), 0), ("ant", (1, 1, 41, 30), 1)))
    assert (train.classes, train.counts, held_out.counts) == (("ant", "cat"), (0, 1), (0, 1))
    image, objects = train.read(0)
    assert objects.boxes.tolist() == [[5, 6, 15, 16], [0, 0, 41, 30]]
    assert objects.ignored.tolist() == [False, True]
    left, top, right, bottom = map(int, objects.boxes[0])
    assert (image[:, top:bottom, left:right] == 255).all()
    assert image.sum() == 3 * 255 * 100


def test_voc__a_box_of_zero_width_is_left_out_with_a_word(tmp_path, capsys):
    train, _ = found(write_voc(tmp_path, ("cat", (6, 7, 15, 16), 0), ("cat", (8, 7, 8, 16), 0)))
    assert train.read(0)[1].boxes.tolist() == [[5, 6, 15, 16]]
    assert "warning: 1 boxes without area left out" in capsys.readouterr().err


def test_voc__a_class_unknown_to_the_list_is_named(tmp_path):
    write_voc(tmp_path, ("cat", (6, 7, 15, 16), 0), held_out="cow")
    with pytest.raises(DataError, match=r"an object of unknown class 'cow'; val\.png; the classes are cat"):
        found(tmp_path)
    assert found(tmp_path, classes=("cow", "cat"))[0].counts == (0, 1)


def test_voc__trainval_goes_with_test_and_not_with_a_part_of_itself(tmp_path):
    write_voc(tmp_path, ("cat", (6, 7, 15, 16), 0))
    lists = tmp_path / "ImageSets" / "Main"
    (lists / "train.txt").rename(lists / "trainval.txt")
    with pytest.raises(DataError, match=r"no list of images; .*train\.txt"):
        found(tmp_path)
    (lists / "test.txt").write_text("val\n")
    assert [[*part.names] for part in found(tmp_path)] == [["train.png"], ["val.png"]]


def test_voc__a_list_may_have_a_byte_order_mark_and_names_with_spaces(tmp_path):
    write_voc(tmp_path, ("cat", (6, 7, 15, 16), 0))
    for folder, ending in (("JPEGImages", ".png"), ("Annotations", ".xml")):
        (tmp_path / folder / f"train{ending}").rename(tmp_path / folder / f"a cat{ending}")
    (tmp_path / "ImageSets" / "Main" / "train.txt").write_text("a cat  -1\n", "utf-8-sig")
    assert [*found(tmp_path)[0].names] == ["a cat.png"]


@pytest.mark.parametrize(
    ("file", "content", "said"),
    [
        ("JPEGImages/train.png", None, "an annotation for a missing image; .*train.jpg"),
        ("Annotations/train.xml", None, "not an annotation of Pascal VOC .*train.xml"),
        ("Annotations/train.xml", "<annotation>", "not an annotation of Pascal VOC .*train.xml"),
        ("Annotations/train.xml", "<a><object><name>cat</name></object></a>", "not an annotation of Pascal VOC"),
        ("ImageSets/Main/val.txt", None, "no list of images; .*val.txt"),
        ("ImageSets/Main/val.txt", "\n", "no images; .*val.txt"),
    ],
)
def test_voc__what_is_missing_or_broken_is_named(tmp_path, file, content, said):
    write_voc(tmp_path, ("cat", (6, 7, 15, 16), 0))
    (tmp_path / file).unlink()
    if content:
        (tmp_path / file).write_text(content)
    with pytest.raises(DataError, match=said):
        found(tmp_path)


def test_open__a_folder_of_another_layout_is_refused(tmp_path):
    with pytest.raises(DataError, match="as COCO or Pascal VOC"):
        found(tmp_path)


# -- training ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(24, 32), (64, 96), (17, 23)])
def test_augmentation__boxes_and_masks_stay_around_what_they_were_drawn_around(tmp_path, size):
    train, _ = found(write_coco(tmp_path, [annotation(0, [5, 6, 10, 10], segmentation=SQUARE)]))
    augment = DetectionAugmentation.of(size, scale=(0.5, 2.0), flip=True, mean=[0.0] * 3)
    samples, kept = AnnotatedSamples(train, augment, seed=0), 0
    for epoch in range(12):
        image, target, _ = samples[epoch, 0]
        assert image.shape[1:] == target["masks"].shape[1:] == size
        assert len(target["boxes"]) == len(target["labels"]) == len(target["masks"]) <= 1
        if not len(target["boxes"]):
            continue
        kept += 1
        assert target["labels"].tolist() == [1]  # 0 is torchvision's background
        rows, columns = (image[0] > 127).nonzero().unbind(1)
        seen = torch.stack([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1])
        assert (target["boxes"][0] - seen).abs().max() <= 1.5
        rows, columns = target["masks"][0].nonzero().unbind(1)
        drawn = torch.stack([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1])
        assert (drawn - seen).abs().max() <= 1.5
    assert kept >= 6


def test_augmentation__an_image_without_boxes_stays_one_without(tmp_path):
    train, _ = found(write_coco(tmp_path, [annotation(1, [5, 6, 10, 10])]))
    augment = DetectionAugmentation.of((24, 32), scale=(0.5, 2.0), flip=True, mean=[0.5] * 3)
    _, target, _ = AnnotatedSamples(train, augment, seed=0)[0, 0]
    assert target["boxes"].shape == (0, 4)
    assert target["labels"].shape == (0,)


@pytest.mark.parametrize(
    ("image", "judged"),
    [((480, 640), (192, 256)), ((640, 480), (256, 192)), ((100, 400), (64, 256)), ((9, 2000), (1, 256))],
)
def test_jitter__at_scale_one_an_image_has_the_size_it_is_judged_at(image, judged):
    assert LargeScaleJitter((192, 256), (1.0, 1.0))(torch.zeros(3, *image, dtype=torch.uint8)).shape[1:] == judged


def test_jitter__an_elongated_image_keeps_a_pixel():
    assert LargeScaleJitter((64, 64), (0.1, 0.1))(torch.zeros(3, 10, 2000, dtype=torch.uint8)).shape[1:] == (1, 6)


def test_augmentation__after_a_crop_boxes_are_those_of_what_is_left_of_the_masks(tmp_path):
    corner = [[0, 0, 4, 0, 4, 26, 40, 26, 40, 30, 0, 30]]  # an L, most of whose box is empty
    train, _ = found(write_coco(tmp_path, [annotation(0, [0, 0, 40, 30], segmentation=corner)]))
    samples = AnnotatedSamples(
        train, DetectionAugmentation.of((16, 16), scale=(1.5, 3.0), flip=False, mean=[0.0] * 3), seed=0
    )
    kept = 0
    for epoch in range(40):
        _, target, _ = samples[epoch, 0]
        for box, mask in zip(target["boxes"], target["masks"], strict=True):
            rows, columns = mask.nonzero().unbind(1)
            assert box.tolist() == [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
            kept += 1
    assert 5 <= kept < 40


def test_augmentation__of_an_extremely_long_image_is_a_crop_as_any(tmp_path):
    write_coco(tmp_path, [annotation(0, [100, 2, 4000, 10])], size=(20, 8000))
    picture(tmp_path / "train2017" / "0.png", 20, 8000)
    augment = DetectionAugmentation.of((24, 32), scale=(0.1, 2.0), flip=True, mean=[0.5] * 3)
    samples = AnnotatedSamples(found(tmp_path)[0], augment, seed=0)
    for epoch in range(6):
        image, target, _ = samples[epoch, 0]
        assert image.shape == (3, 24, 32)
        assert len(target["boxes"]) == len(target["labels"])


@pytest.mark.parametrize("channels", [2, 3, 12])
def test_augmentation__of_a_deep_image_does_what_it_does_to_bytes_but_for_rounding(tmp_path, channels):
    _, objects = found(write_coco(tmp_path, [annotation(0, [5, 6, 10, 10], segmentation=SQUARE)]))[0].read(0)
    pixels = torch.randint(256, (channels, HEIGHT, WIDTH), generator=torch.Generator().manual_seed(0)).byte()
    augment = DetectionAugmentation.of((24, 32), scale=(0.5, 0.7), flip=True, mean=[0.25] * channels)
    results = []
    for image in (pixels, pixels.float()):
        torch.manual_seed(1)
        results.append(augment(image, objects))
    (bytes_image, target), (deep, deep_target) = results
    assert (bytes_image.dtype, deep.dtype) == (torch.uint8, torch.float32)
    assert (bytes_image.float() - deep).abs().max() <= 1
    assert torch.equal(target["boxes"], deep_target["boxes"])
    assert len(target["boxes"]) == 1
