"""The detection network."""

import pytest
import torch
from torchvision.models.detection.transform import GeneralizedRCNNTransform

from dmjd.engine.distributed import Ranks
from dmjd.errors import ConfigError
from dmjd.evaluation.detection import Finder
from dmjd.evaluation.features import FeatureExtractor
from dmjd.networks.around import heads_of, make_pyramid
from dmjd.networks.detector import create_detector


def network(backbones, *, masks=False, crop_hw=(512, 512), precision="auto"):
    torch.manual_seed(0)
    backbone = FeatureExtractor(str(backbones["vit"]), ranks=Ranks(torch.device("cpu")), precision=precision)
    detector = create_detector(
        make_pyramid(backbone, "vit"),
        2,
        masks=masks,
        crop_hw=crop_hw,
        statistics=backbone.statistics,
        fpn_channels=8,
        head_channels=1024,
    )
    return backbone, detector


def test_detector__what_it_sees_does_not_depend_on_the_image_before(backbones):
    image = torch.randint(256, (3, 128, 256), dtype=torch.uint8)
    found = []
    for first in ((3, 128, 256), (3, 80, 256)):  # the second is padded to a map that suggests another stride
        backbone, model = network(backbones, crop_hw=(128, 256))
        model.eval()
        with torch.inference_mode():
            find = Finder(model, backbone.autocast)
            find(torch.zeros(first, dtype=torch.uint8))
            found.append(find(image))
    assert len(found[0]["boxes"])
    for name, value in found[0].items():
        assert torch.equal(value, found[1][name])


def test_detector__boxes_are_computed_in_float32_whatever_the_precision(backbones):
    backbone, model = network(backbones, masks=True, crop_hw=(64, 64), precision="bf16")
    types = []
    model.rpn.anchor_generator.register_forward_hook(lambda module, given, found: types.append(found[0].dtype))
    for pooler in (model.roi_heads.box_roi_pool, model.roi_heads.mask_roi_pool):
        pooler.register_forward_pre_hook(lambda module, given: types.append(given[1][0].dtype))
    box, mask = torch.tensor([[8.0, 8.0, 40.0, 50.0]]), torch.zeros(1, 64, 64, dtype=torch.bool)
    mask[0, 8:50, 8:40] = True
    with backbone.autocast():
        maps = model.backbone.pyramid(torch.rand(1, 3, 64, 64))
        losses = model([torch.rand(3, 64, 64)], [{"boxes": box, "labels": torch.ones(1).long(), "masks": mask}])
    assert maps[0].dtype == torch.bfloat16  # the backbone does compute in half precision
    assert types == [torch.float32] * 3
    sum(losses.values()).backward()


@pytest.mark.parametrize("shape", [(20, 8000), (8000, 20), (1, 30_000)])
def test_detector__an_extremely_long_image_has_boxes_and_masks_within_it(backbones, shape):
    backbone, model = network(backbones, masks=True, crop_hw=(64, 96))
    sizes = []
    model.backbone.register_forward_pre_hook(lambda module, given: sizes.append(given[0].shape[2:]))
    with torch.inference_mode():
        found = Finder(model.eval(), backbone.autocast)(torch.randint(256, (3, *shape)).byte())
    assert len(found["boxes"])
    assert found["masks"].shape[1:] == shape
    assert (found["boxes"] >= 0).all()
    assert (found["boxes"] <= torch.tensor([shape[1], shape[0]] * 2)).all()
    assert max(sizes[0]) <= 128  # 96, up to the next multiple of 64


def test_make_pyramid__windows_that_a_network_cannot_have_are_refused_even_where_one_is_as_large_as_its_images():
    name = "timm:vit_small_patch16_dinov3"  # its rotary positions are those of the whole image
    backbone = FeatureExtractor(name, ranks=Ranks(torch.device("cpu")), pretrained=False)
    with pytest.raises(ConfigError, match=f"or not in windows; {name}"):
        make_pyramid(backbone, name, window=16)


def test_detector__masks_are_torchvisions_but_true_or_false(backbones):
    _, model = network(backbones, masks=True, crop_hw=(64, 64))
    boxes, small = torch.tensor([[4.0, 8.0, 40.0, 50.0], [0.5, 0.5, 63.0, 20.0]]), torch.rand(2, 1, 28, 28)
    for count in (2, 0):
        found = {"boxes": boxes[:count], "masks": small[:count]}
        transform, sizes = model.eval().transform, ([(64, 64)], [(100, 150)])
        (ours,) = transform.postprocess([dict(found)], *sizes)
        (theirs,) = GeneralizedRCNNTransform.postprocess(transform, [dict(found)], *sizes)
        assert torch.equal(ours["boxes"], theirs["boxes"])
        assert ours["masks"].dtype == torch.bool  # a float for each pixel of each object would fill the memory
        assert torch.equal(ours["masks"], theirs["masks"] >= 0.5)


def test_heads_of__and_the_backbone_are_the_whole_network_and_share_nothing(backbones):
    backbone, model = network(backbones, masks=True)
    parts = [*heads_of(model, backbone.model).parameters()], [*backbone.model.parameters()]
    inside, all_of_it = ({id(each) for each in part} for part in (parts[0] + parts[1], model.parameters()))
    assert inside == all_of_it
    assert len(inside) == len(parts[0]) + len(parts[1])
