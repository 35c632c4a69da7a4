"""Targets by name: a new one is one file and nothing else."""

import importlib
import importlib.metadata

import pytest
import timm
import torch
from torch import nn

from dmjd.backbones.files import save_backbone
from dmjd.backbones.normalize import Normalize
from dmjd.backbones.vit import create_vit
from dmjd.errors import ConfigError
from dmjd.targets import HOG, ConcatTarget, EmaTeacher, Pixels, Target, TargetRequest, Teacher, create_target
from dmjd.targets.hog import default_cell_size
from dmjd.targets.protocol import register_target


def encoder(**arguments):
    torch.manual_seed(0)
    return create_vit(
        "tiny", **{"image_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 2, **arguments}
    )


def request(in_chans=3, **options):
    normalize = Normalize((0.5,) * in_chans, (0.25,) * in_chans)
    own = encoder(in_chans=in_chans)
    return TargetRequest(encoder=own, in_chans=in_chans, image_hw=(32, 32), normalize=normalize, options=options)


def images(in_chans=3):
    return torch.randint(0, 256, (2, in_chans, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def backbone(tmp_path):
    own = encoder()
    path = tmp_path / "my+own.safetensors"
    save_backbone(path, own.backbone, own.architecture, (0.5, 0.5, 0.5), (0.2, 0.2, 0.2))
    return path


@pytest.mark.parametrize(
    ("name", "kind", "dim", "backdrop"),
    [
        ("hog", HOG, 4 * 9 * 3, "target"),
        ("pixels", Pixels, 192, "image"),
        ("normalized_pixels", Pixels, 192, "image"),
        ("ema", EmaTeacher, 24, "target"),
        ("hog+ema", ConcatTarget, 132, "target"),
        ("FILE", Teacher, 24, "target"),
        ("FOLDER", Teacher, 24, "target"),
    ],
)
def test_create_target__every_kind_answers_what_is_asked_of_a_target(name, kind, dim, backdrop, backbone, tmp_path):
    if name == "FOLDER":
        timm.models.save_for_hf(encoder().backbone, tmp_path / "folder")
    given = {"FILE": str(backbone), "FOLDER": f"timm:local-dir:{tmp_path}/folder"}.get(name, name)
    target = create_target(given, request())
    assert isinstance(target, kind)
    assert isinstance(target, Target)
    assert (target.dim, sum(target.widths), target.backdrop) == (dim, dim, backdrop)
    assert target.caption.endswith(".")
    values = target(images())
    assert values.shape == (2, 16, dim)
    picture = target.picture(values[0], images()[0], values)
    assert picture.dtype == torch.uint8
    assert picture.shape[0] in (1, 3)
    assert picture.shape[1] % 4 == picture.shape[2] % 4 == 0


def test_create_target__options_and_statistics_arrive():
    plain = create_target("hog", request(hog={"variant": "maskfeat", "cell_size": 2}, teacher={"bf16": True}))
    assert (plain.variant, plain.cell_size) == ("maskfeat", 2)
    assert create_target("hog", request(hog={"cell_size": None})).cell_size == 4
    mean = create_target("ema", request(teacher={"layers": [0, 1], "decay": [0.5, 0.9]}))
    assert (mean.maps.layers, mean.decay) == ([0, 1], (0.5, 0.9))
    assert mean.maps.normalize.statistics == ([0.5] * 3, [0.25] * 3)
    assert create_target("pixels", request(1)).normalize.statistics == ([0.5], [0.25])
    assert create_target("normalized_pixels", request()).standardize


def test_create_target__the_mean_begins_as_the_student():
    own = request()
    target = create_target("ema", own)
    tokens = own.encoder.backbone.eval().forward_intermediates(
        own.normalize(images()), indices=[-1], intermediates_only=True, output_fmt="NLC"
    )[0]
    torch.testing.assert_close(target(images()), nn.functional.layer_norm(tokens, (24,)))


def test_create_target__several_are_side_by_side_in_order():
    both = create_target("pixels+hog", request())
    assert both.widths == (192, 108)
    expected = [create_target(name, request())(images()) for name in ("pixels", "hog")]
    assert torch.equal(both(images()), torch.cat(expected, dim=-1))
    values = both(images())
    assert torch.equal(both.picture(values[0], images()[0], values), images()[0])  # the first one is drawn
    assert both.caption == "Pixels are predicted as they are; of 2 targets, only the first is drawn."


def test_create_target__beside_others_too_a_target_without_weights_need_not_be_a_module(monkeypatch):
    class Brightness:
        dim, widths, caption, backdrop = 1, (1,), "A token's brightness.", "target"

        def __call__(self, images):
            return nn.functional.avg_pool2d(images.float().mean(dim=1, keepdim=True), 8).flatten(2).mT

        def picture(self, values, image, truth):
            return values.view(1, 4, 4).byte()

    register_target.names()
    monkeypatch.setattr(register_target, "_entries", dict(register_target._entries))
    register_target("brightness")(lambda request: Brightness())
    both = create_target("brightness+ema", request())
    values = both(images())
    assert torch.equal(values[..., :1], Brightness()(images()))
    assert torch.equal(both.picture(values[0], images()[0], values), values[0, :, 0].view(1, 4, 4).byte())
    assert {name.split(".maps.")[0] for name in both.state_dict()} == {"targets.1"}


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("hogg", "no target of this name; hogg; did you mean hog.*timm:NAME, hf:NAME or a backbone.safetensors"),
        ("XXXX", "no target of this name; XXXX; choose one of .*hog.*timm:NAME, hf:NAME or a backbone.safetensors"),
        ("hog:8", "takes nothing after a colon; :8; leave it out"),
        ("ema:8", "takes nothing after a colon"),
        ("hf:", "no name"),
        ("hog+", "no target of this name"),
    ],
)
def test_create_target__what_is_no_target_is_one_line(name, message):
    with pytest.raises(ConfigError, match=message):
        create_target(name, request())


@pytest.mark.parametrize(
    ("patch_size", "cell"),
    [(16, 8), (24, 8), (32, 8), (8, 4), (4, 4), (6, 6), (12, 6), (10, 5), (14, 7), (7, 7), (18, 9), (2, 2)],
)
def test_default_cell_size(patch_size, cell):
    assert default_cell_size(patch_size) == cell


def test_default_cell_size__cells_divide_patches_and_have_at_least_4_px_where_patches_do():
    for patch_size in range(4, 65):
        cell = default_cell_size(patch_size)
        assert cell >= 4
        assert patch_size % cell == 0


def test_create_target__one_file_of_another_distribution_is_enough(tmp_path, monkeypatch):
    (tmp_path / "brightness.py").write_text(
        """
import torch
from dmjd.targets import register_target

class Brightness(torch.nn.Module):
    dim, widths, caption, backdrop = 1, (1,), "A token's brightness.", "target"

    def __init__(self, grid, scale):
        super().__init__()
        self.grid, self.scale = grid, scale

    def forward(self, images):
        pixels = images.float().mean(dim=1, keepdim=True) / self.scale
        return torch.nn.functional.adaptive_avg_pool2d(pixels, self.grid).flatten(2).transpose(1, 2)

    def picture(self, values, image, truth):
        return (values * self.scale).view(1, *self.grid).clamp(0, 255).byte()

@register_target("brightness")
def build(request):
    return Brightness(request.encoder.grid, float(request.argument or 255))
"""
    )
    info = tmp_path / "brightness-1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: brightness\nVersion: 1\n")
    (info / "entry_points.txt").write_text("[dmjd.targets]\nbrightness = brightness\n")
    monkeypatch.syspath_prepend(tmp_path)
    importlib.invalidate_caches()
    monkeypatch.setattr(register_target, "_loaded", False)
    monkeypatch.setattr(register_target, "_entries", dict(register_target._entries))
    target = create_target("brightness:100", request())
    assert isinstance(target, Target)
    torch.testing.assert_close(target(images())[0, 0, 0], images()[0, :, :8, :8].float().mean() / 100)
    assert create_target("brightness+hog", request()).widths == (1, 108)
