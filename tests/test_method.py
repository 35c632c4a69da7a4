"""The method on one page does what the page says."""

import ast
from functools import cache
from pathlib import Path
from typing import get_args

import jaxtyping
import pytest
import torch
from timm.data import resolve_model_data_config
from timm.models.vision_transformer import Block

import dmjd
from dmjd.backbones import Latents
from dmjd.backbones.positions import resample_positions
from dmjd.config import pretrain
from dmjd.config.rules import PRESETS
from dmjd.heads import Decoder
from dmjd.losses import LOSSES, LossName, regression_loss
from dmjd.masking import TokenIds, gather_tokens, token_ids

SOURCE = Path(dmjd.__file__).parent
SMALL = {"backbone": "vit", "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2, "image_size": 32}


def small(preset="dmjd", **overrides):
    torch.manual_seed(0)
    head = {"decoder_embed_dim": 32, "decoder_num_heads": 2} | ({} if preset == "maskfeat" else {"decoder_depth": 1})
    return dmjd.build(preset, "tiny", **(SMALL | head | overrides))


def batch(model, views=2, ratio=0.5, seed=0):
    generator = torch.Generator().manual_seed(seed)
    rows, columns = model.encoder.grid
    side = model.encoder.patch_size
    images = torch.randint(0, 256, (3, 3, rows * side, columns * side), dtype=torch.uint8, generator=generator)
    masked = dmjd.disjoint_masks(3, rows * columns, num_views=views, mask_ratio=ratio, generator=generator)
    return images, masked


def test_dmjd__losses_are_those_of_hidden_and_of_visible_tokens():
    model = small().eval()
    images, masked = batch(model)
    target = model.target(images).repeat_interleave(2, dim=0)
    said = model.predict(images, masked)
    flat = masked.flatten(0, 1)
    torch.testing.assert_close(said.masked_target.flatten(0, 1), target[flat])
    torch.testing.assert_close(said.visible_target.flatten(0, 1), target[~flat])
    losses = model(images, masked)
    torch.testing.assert_close(losses.masked, (said.masked.flatten(0, 1) - target[flat]).square().mean())
    error = (said.visible.flatten(0, 1) - target[~flat]).abs()
    huber = torch.where(error < 2, error.square() / 4, error - 1).mean()
    torch.testing.assert_close(losses.visible, huber)
    torch.testing.assert_close(losses.total, losses.masked + losses.visible)


def test_dmjd__visible_weight_scales_the_visible_branch():
    images, masked = batch(small())
    one, three = small(), small(visible_weight=3.0)
    assert torch.allclose(three(images, masked).total - one(images, masked).total, 2 * one(images, masked).visible)


def test_dmjd__without_a_projector_the_visible_loss_is_zero():
    model = small("dm")
    losses = model(*batch(model))
    assert losses.visible == 0
    assert losses.total == losses.masked


@pytest.mark.parametrize("backbone", ["vit", "convvit"])
@pytest.mark.parametrize("preset", ["mae", "dm", "dmjd", "maskfeat"])
def test_dmjd__every_trainable_weight_gets_a_gradient(preset, backbone):
    if preset in ("mae", "maskfeat") and backbone == "convvit":
        pytest.skip("class and mask tokens belong to the ViT")
    model = small(preset, backbone=backbone)
    model(*batch(model)).total.backward()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None, name
            assert parameter.grad.isfinite().all(), name
        assert parameter.requires_grad != name.endswith("pos_embed"), name


def test_dmjd__targets_get_no_gradient():
    model = small(masked_target="ema")
    model.target.maps.requires_grad_(True)
    model(*batch(model)).total.backward()
    assert all(parameter.grad is None for parameter in model.target.parameters())


def test_dmjd__oblong_images_have_the_rows_and_columns_of_the_decoder():
    model = small(image_size=(32, 64)).eval()
    images, masked = batch(model)
    tokens = token_ids(masked)
    expected = model.decoder(model.encoder(model.normalize(images), tokens), tokens)
    torch.testing.assert_close(model.predict(images, masked).masked, expected)


def test_dmjd__an_image_is_scored_alone():
    model = small().eval()
    images, masked = batch(model)
    said = model.predict(images, masked)
    alone = model.predict(images[1:2], masked[1:2])
    torch.testing.assert_close(said.masked[2:4], alone.masked)
    torch.testing.assert_close(said.visible[2:4], alone.visible)


def test_dmjd__views_of_an_image_are_scored_alone():
    model = small().eval()
    images, masked = batch(model)
    said = model.predict(images, masked)
    second = model.predict(images, masked[:, 1:])
    torch.testing.assert_close(said.masked[1::2], second.masked)


def test_dmjd__masks_may_be_on_the_device_and_images_float():
    model = small().eval()
    images, masked = batch(model)
    assert torch.allclose(model(images, masked).total, model(images.float(), masked).total)


@pytest.mark.parametrize("preset", sorted(path.stem for path in PRESETS.glob("*.yaml")))
@pytest.mark.parametrize("size", ["tiny", "small", "base", "large"])
def test_build__every_preset_at_every_size(preset, size):
    # Teachers of presets come from a hub or from another run.
    taught = {"masked_target": "hog"} if preset in ("dmjd-clip", "dmjd-dino", "quick-teacher") else {}
    shallow = {} if preset == "data2vec" else {"depth": 1}  # which looks at several blocks
    with torch.device("meta"):
        model = dmjd.build(preset, size, image_size=64, patch_size=16, **shallow, **taught)
    widths = {"tiny": 192, "small": 384, "base": 768, "large": 1024}
    assert preset in ("quick", "quick-teacher") or model.encoder.embed_dim == widths[size]


def test_build__a_preset_has_its_own_size_unless_told():
    assert [dmjd.build(name).encoder.grid for name in ("auto", "quick")] == [(8, 8), (8, 8)]
    for image_size in ((32, 64), [32, 64]):
        assert dmjd.build("quick", image_size=image_size).encoder.grid == (4, 8)


def test_dmjd__masks_of_other_tokens_than_the_images_have_are_refused():
    model = dmjd.build("quick", "tiny", image_size=32)
    with pytest.raises(ValueError, match="masks of 25 tokens for images of 4 x 4"):
        model(torch.zeros(1, 3, 32, 32), dmjd.block_masks(1, (5, 5), num_views=2, mask_ratio=0.6, block=1))


def test_dmjd__masks_of_other_images_are_refused(monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # tests alone check shapes by the annotations
    model = small()
    images, masked = batch(model)
    for others in (masked[:1], masked[0], masked.expand(2, -1, -1, -1)):
        with pytest.raises(ValueError, match=r"masks are \(images, views, tokens\), not .* for 3 images"):
            model(images, others)


@pytest.mark.parametrize("hidden", [False, True])
def test_dmjd__masks_that_hide_nothing_or_everything_are_refused(hidden):
    model = small()
    images, masked = batch(model)
    with pytest.raises(ValueError, match="neither all nor none"):
        model(images, torch.full_like(masked, hidden))


@pytest.mark.parametrize("target", ["hog", "pixels"])
def test_dmjd__images_of_other_channels_are_refused(target):
    model = small(masked_target=target)
    images, masked = batch(model)
    with pytest.raises(ValueError, match=r"images of 1 channel\(s\), not 3"):
        model(images[:, :1], masked)


def test_dmjd__images_that_are_no_whole_tokens_are_refused_by_the_hybrid():
    model = small("convmae", backbone="convvit")
    _, masked = batch(model)
    with pytest.raises(ValueError, match="39 x 39 px does not consist of tokens of 8 px"):
        model(torch.zeros(3, 3, 39, 39), masked)


@pytest.mark.parametrize("backbone", ["vit", "convvit"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_dmjd__takes_bytes_at_the_precision_it_was_brought_to(backbone, dtype):
    model = small(backbone=backbone, masked_target="ema").eval()
    images, masked = batch(model)
    expected = model.predict(images, masked).masked
    found = model.to(dtype).predict(images, masked).masked
    assert found.dtype == dtype
    torch.testing.assert_close(found.float(), expected, rtol=0.05, atol=0.05)


@pytest.mark.parametrize("backbone", ["vit", "convvit"])
def test_dmjd__checkpointing_as_timm_asks_for_it_keeps_less_and_changes_no_gradient(backbone):
    model = small(backbone=backbone)
    images, masked = batch(model)
    kept, gradients = [], []
    for enable in (False, True):
        sizes = []

        def keep(tensor, sizes=sizes):
            sizes.append(tensor.numel())
            return tensor

        model.encoder.backbone.set_grad_checkpointing(enable)
        model.zero_grad()
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            total = model(images, masked).total
        total.backward()
        kept.append(sum(sizes))
        gradients.append([each.grad.clone() for each in model.parameters() if each.requires_grad])
    assert kept[1] < 0.8 * kept[0]
    for plain, again in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, again)


def test_build__the_backbone_tells_timm_what_images_it_takes():
    backbone = small(in_chans=4, image_size=(32, 64)).encoder.backbone
    data = resolve_model_data_config(backbone)
    assert data["input_size"] == (4, 32, 64)
    assert (data["mean"], data["std"]) == ((0.5,) * 4, (0.25,) * 4)


def test_build__unknown_names_are_refused_with_the_nearest():
    with pytest.raises(ValueError, match="choose one of"):
        dmjd.build("dmj")
    with pytest.raises(ValueError, match="did you mean 'patch_size'"):
        dmjd.build("dmjd", patch_siz=8)
    with pytest.raises(ValueError, match="not a multiple"):
        dmjd.build("dmjd", "tiny", image_size=100)
    with pytest.raises(ValueError, match="out of reach"):
        dmjd.build("dmjd", "tiny", mask_ratio=0.3)


@pytest.mark.parametrize(
    "overrides",
    [
        {"backbone": "convvit"},
        {"backbone": "convvit", "conv_mlp_ratio": 4.0},
        {"patch_size": 4},
        {"class_token": True},
        {"reg_tokens": 2},
        {"mask_token": True, "decoder_depth": 0},
        {"embed_dim": 64},
        {"depth": 1},
        {"num_heads": 4},
        {"target": "pixels"},
        {"target": "normalized_pixels"},
        {"masked_loss": "smooth_l1"},
        {"visible_loss": "l2"},
        {"visible_loss": "l1"},
        {"visible_loss": "cosine"},
        {"visible_beta": 0.1},
        {"visible_target": "pixels"},
        {"weight": 0.0},
        {"cell_size": 8},
        {"decoder_embed_dim": 48},
        {"decoder_depth": 2},
        {"decoder_num_heads": 4},
        {"decoder_mlp_ratio": 2.0},
        {"decoder_cross": True, "decoder_depth": 2},
    ],
    ids=str,
)
def test_build__every_model_setting_changes_the_loss(overrides):
    model, other = small(), small(**overrides)
    loss = model(*batch(model)).total
    assert loss != other(*batch(other)).total


@pytest.mark.parametrize("grid", [(3, 4), (4, 6)])
def test_decoder__is_maes_on_all_tokens_in_raster_order(grid):
    """As the paper has it: mask tokens in the places of hidden ones, positions added to all, whole blocks."""
    decoder = Decoder(24, 6, (3, 4), embed_dim=16, depth=2, num_heads=2)
    for parameter in decoder.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    tokens = token_ids(dmjd.disjoint_masks(2, grid[0] * grid[1], num_views=2, mask_ratio=0.75))
    latents = Latents(torch.randn(4, 2, 24), torch.randn(*tokens.visible.shape, 24), None)
    places = tokens.visible[..., None].expand(-1, -1, 16)
    x = decoder.mask_token.expand(4, grid[0] * grid[1], -1).scatter(1, places, decoder.embed(latents.visible))
    x = torch.cat([decoder.embed(latents.prefix), x + resample_positions(decoder.pos_embed, (3, 4), grid)], dim=1)
    for block in decoder.blocks:
        x = Block.forward(block, x)
    expected = gather_tokens(decoder.pred(decoder.norm(x))[:, 2:], tokens.hidden)
    torch.testing.assert_close(decoder(latents, tokens, grid), expected)


@pytest.mark.parametrize("cross", [True, False])
def test_decoder__hidden_tokens_know_of_each_other_unless_they_attend_to_latents_alone(cross):
    decoder = Decoder(24, 6, (3, 4), embed_dim=16, depth=2, num_heads=2, cross=cross)
    for parameter in decoder.parameters():
        torch.nn.init.normal_(parameter)
    latents = Latents(torch.randn(2, 1, 24), torch.randn(2, 5, 24), None)
    visible, hidden = torch.arange(5).expand(2, -1), torch.arange(5, 12).expand(2, -1)
    whole = decoder(latents, TokenIds(visible, hidden))
    alone = decoder(latents, TokenIds(visible, hidden[:, 2:4]))
    assert torch.allclose(whole[:, 2:4], alone, atol=1e-5) == cross


def test_regression_loss__is_computed_in_float32():
    predicted = torch.full((1, 4, 8), 1.0, dtype=torch.bfloat16)
    for target in (torch.zeros(1, 4, 8), torch.zeros_like(predicted)):
        loss = regression_loss(predicted, target, "l2")
        assert loss.dtype == torch.float32
        assert loss == 1


def test_dmjd__learns_to_predict_one_batch():
    model = small()
    images, masked = batch(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    first = model(images, masked)
    for _ in range(60):
        optimizer.zero_grad()
        model(images, masked).total.backward()
        optimizer.step()
    last = model(images, masked)
    assert last.masked < 0.7 * first.masked
    assert last.visible < 0.7 * first.visible


def code_lines(path):
    """Lines that are neither blank nor comment nor docstring."""
    source = path.read_text()
    lines = {n for n, line in enumerate(source.splitlines(), 1) if line.strip() and not line.strip().startswith("#")}
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            lines -= set(range(node.lineno, node.end_lineno + 1))
    return len(lines)


def test_method__reads_in_under_300_lines_of_code():
    assert sum(code_lines(SOURCE / f"{name}.py") for name in ("masking", "losses", "heads", "method")) < 300


def test_losses__are_those_that_settings_name():
    assert get_args(LossName) == get_args(pretrain.LossName) == tuple(LOSSES)


METHOD = {"errors", "registry", "random", "masking", "losses", "backbones", "targets", "heads", "method"}
MAY_IMPORT = {  # every room, and what it may import beside itself
    "errors": set(),
    "registry": {"errors"},
    "random": set(),
    "masking": {"errors", "random"},
    "losses": {"errors"},
    "backbones": {"errors", "registry", "masking"},
    "targets": {"errors", "registry", "masking", "backbones"},
    "heads": METHOD - {"method", "heads", "targets"},
    "method": METHOD - {"method"},
    "data": {"errors", "registry", "random"},
    "config": {"errors"},
    "engine": METHOD | {"data"},
    "evaluation": METHOD | {"data", "engine"},
    "networks": METHOD | {"data", "engine", "evaluation"},
    "citation": set(),
    "reports": METHOD | {"data", "engine", "citation"},
    "reference": METHOD,
    "initialization": METHOD | {"reference"},
    "factory": METHOD | {"config", "initialization"},
    "formats": METHOD | {"networks", "citation"},
    "planning": METHOD | {"engine"},
    "automatic": METHOD | {"data", "config", "engine", "factory", "initialization"},
    "tasks": METHOD
    | {"data", "config", "engine", "evaluation", "networks", "reports", "factory", "reference", "formats", "planning"},
    "cli": {"errors", "config", "automatic", "tasks"},
    "__main__": {"cli"},
    "api": {"backbones", "cli", "engine", "errors", "tasks"},
    "__init__": METHOD | {"factory", "reference", "api"},
}


@cache
def nodes_of(path):
    return [*ast.walk(ast.parse(path.read_text()))]


def imports_of(path):
    """Every module that a file imports, wherever in it; `from a import b` counts as both a and a.b."""
    for node in nodes_of(path):
        if isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path} has a relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


def attributes_of(path):
    """Every name of the form a.b in a file: a module may be reached through one that is imported."""
    for node in nodes_of(path):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            yield f"{node.value.id}.{node.attr}"


@pytest.mark.parametrize("path", sorted(SOURCE.rglob("*.py")), ids=lambda path: str(path.relative_to(SOURCE)))
def test_imports__run_one_way(path):
    place = path.relative_to(SOURCE)
    room = place.parts[0].removesuffix(".py")
    for module in imports_of(path):
        package, *rest = module.split(".")
        if package == "dmjd":
            assert rest[0] == room or rest[0] in MAY_IMPORT[room], f"{place} imports {module}"


OF_LABELS = ("labelled", "annotated", "segmentation", "detection", "builtin")


@pytest.mark.parametrize(
    ("package", "allowed"),
    [
        ("timm", ("backbones/", "engine/optim.py", "engine/distributed.py", "data/labelled.py", "formats/", "tasks/")),
        ("torch.distributed", ("engine/distributed.py",)),
        # Its import takes two seconds, which every worker of a pre-training would spend.
        ("torchvision", ("evaluation/", "networks/", "reports/", *(f"data/{name}.py" for name in OF_LABELS))),
    ],
)
def test_imports__of_a_package_stay_in_few_places(package, allowed):
    found = {
        str(path.relative_to(SOURCE))
        for path in SOURCE.rglob("*.py")
        if any(f"{module}.".startswith(f"{package}.") for module in (*imports_of(path), *attributes_of(path)))
    }
    assert found
    assert not {place for place in found if not place.startswith(allowed)}
