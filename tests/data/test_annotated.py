"""Names of classes, and batches of images with annotations of any kind."""

import pytest
import torch
from torchvision import tv_tensors

from dmjd.data.annotated import class_names, collate_annotated
from dmjd.data.detection import LargeScaleJitter
from dmjd.data.segmentation import RandomSeenSize
from dmjd.errors import DataError


def test_class_names__come_from_the_file_given_or_else_from_the_one_beside_the_images(tmp_path):
    assert class_names(str(tmp_path), None) is None
    (tmp_path / "classes.txt").write_text("sky\nroad\n\ntree\n")
    assert class_names(str(tmp_path), None) == ("sky", "road", "tree")
    (tmp_path / "other.txt").write_text("a\nb\nc\nd\n")
    assert class_names(str(tmp_path), tmp_path / "other.txt") == ("a", "b", "c", "d")


@pytest.mark.parametrize(("content", "said"), [("a\nb\na\n", "twice"), ("\n", "no class"), (None, "No such file")])
def test_class_names__that_are_no_list_are_refused(tmp_path, content, said):
    if content is not None:
        (tmp_path / "names.txt").write_text(content)
    with pytest.raises(DataError, match=said):
        class_names(str(tmp_path), tmp_path / "names.txt")


def test_class_names__a_file_that_is_named_is_not_looked_for_in_vain_where_the_default_is(tmp_path):
    with pytest.raises(DataError, match="No such file"):
        class_names(str(tmp_path), tmp_path / "classes.txt")


def test_collate__tensors_are_stacked_and_other_annotations_listed():
    image = torch.zeros(3, 4, 4, dtype=torch.uint8)
    batch = collate_annotated([(image, torch.zeros(4, 4), {"a": "broken"}), (image, torch.ones(4, 4), {})])
    assert batch.images.shape == (2, 3, 4, 4)
    assert batch.annotations.shape == (2, 4, 4)
    assert batch.skipped == {"a": "broken"}
    assert collate_annotated([(image, {"boxes": 1}, {}), (image, {"boxes": 2}, {})]).annotations == [
        {"boxes": 1},
        {"boxes": 2},
    ]


def test_collate__a_deep_image_makes_all_of_its_batch_floats_and_changes_no_value():
    plain, deep = torch.full((3, 4, 4), 7, dtype=torch.uint8), torch.full((3, 4, 4), 7.5)
    for order in ((plain, deep), (deep, plain)):
        images = collate_annotated([(image, None, {}) for image in order]).images
        assert images.dtype == torch.float32
        assert [float(image.mean()) for image in images] == [float(image.float().mean()) for image in order]


@pytest.mark.parametrize("resize", [LargeScaleJitter((90, 120), (0.5, 2.0)), RandomSeenSize((45, 180))])
@pytest.mark.parametrize("dtype", [torch.bool, torch.long])
def test_resize__masks_lie_where_their_image_shows_the_object(resize, dtype):
    torch.manual_seed(0)
    seen, ways = torch.zeros(90, 120, dtype=dtype), []
    seen[30:60, 35:75] = True
    for _ in range(40):
        image, mask = resize(tv_tensors.Image(seen[None] * 255.0), tv_tensors.Mask(seen))
        assert mask.dtype == dtype
        lit = torch.stack([mask.float(), image[0] / 255])
        middles = [(lit.sum(axis) * torch.arange(lit.shape[3 - axis])).sum(1) / lit.sum((1, 2)) for axis in (2, 1)]
        ways.append([float(mask - shown) for mask, shown in middles])
    assert torch.tensor(ways).mean(dim=0).abs().max() < 0.1  # rounded, but not always in one direction
