"""A frozen network as the target."""

import json
import shutil
from copy import deepcopy

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional as F

import dmjd
from dmjd.backbones.feature_maps import FeatureMaps
from dmjd.backbones.files import save_backbone
from dmjd.backbones.huggingface import HuggingFace
from dmjd.backbones.normalize import STATISTICS, Normalize
from dmjd.backbones.vit import create_vit
from dmjd.cli import main
from dmjd.errors import CheckpointError, ConfigError
from dmjd.losses import regression_loss
from dmjd.targets import HOG, EmaTeacher, Pixels, TargetRequest, Teacher, create_target
from dmjd.targets.teacher import whiten


def vit(image_size=32, patch_size=8, **arguments):
    torch.manual_seed(0)
    return timm.create_model(
        "vit_tiny_patch16_224", img_size=image_size, patch_size=patch_size, embed_dim=24, depth=3, num_heads=2,
        num_classes=0, pretrained_cfg_overlay={"input_size": (arguments.get("in_chans", 3), image_size, image_size)},
        **arguments,
    )  # fmt: skip


def convolutional():
    torch.manual_seed(0)
    overlay = {"input_size": (3, 64, 64)}
    return timm.create_model("resnet10t", num_classes=0, pretrained_cfg_overlay=overlay)


def images(side=32, batch_size=2):
    generator = torch.Generator().manual_seed(1)
    return torch.randint(0, 256, (batch_size, 3, side, side), dtype=torch.uint8, generator=generator)


@pytest.mark.parametrize(
    ("network", "width"),
    [
        (vit, 24),
        (lambda: vit(class_token=True, reg_tokens=2), 24),
        (lambda: vit(class_token=False, global_pool="avg"), 24),
        (convolutional, 512),
    ],
    ids=["vit", "class and register tokens", "no prefix", "convolutional"],
)
@pytest.mark.parametrize("grid", [(8, 8), (3, 5)])
def test_teacher__any_network_gives_whitened_tokens_on_the_students_grid(network, width, grid):
    teacher = Teacher(FeatureMaps(network()), grid)
    with torch.no_grad():
        target = teacher(images())
    assert target.shape == (2, grid[0] * grid[1], teacher.dim) == (2, grid[0] * grid[1], width)
    torch.testing.assert_close(target.mean(-1), torch.zeros(target.shape[:2]), atol=1e-5, rtol=0)
    torch.testing.assert_close(target.var(-1, correction=0), torch.ones(target.shape[:2]), atol=1e-2, rtol=0)


@pytest.mark.parametrize("side", [7, 14])
def test_teacher__grids_of_7_and_14_are_brought_to_8_in_raster_order(side):
    network = vit(image_size=side * 8)
    target = Teacher(FeatureMaps(network), (8, 8))(images(side * 8)[:1])
    pixels = (images(side * 8)[:1] / 255 - 0.5) / 0.5
    (features,) = network.forward_intermediates(pixels, indices=[-1], intermediates_only=True)
    expected = F.interpolate(features, (8, 8), mode="bilinear", antialias=True)
    for row, column in ((0, 0), (0, 7), (3, 5), (7, 0)):
        torch.testing.assert_close(target[0, row * 8 + column], whiten(expected[0, :, row, column]))


def test_teacher__on_its_own_grid_tokens_are_its_own_whitened():
    network = vit()
    target = Teacher(FeatureMaps(network), (4, 4))(images())
    (tokens,) = network.forward_intermediates(
        (images() / 255 - 0.5) / 0.5, indices=[-1], intermediates_only=True, output_fmt="NLC"
    )
    torch.testing.assert_close(target, whiten(tokens))
    assert not torch.allclose(target, target.flip(1), atol=0.1)  # another order of tokens would be noticed


def test_teacher__several_layers_are_whitened_and_averaged():
    network = vit()
    single = [Teacher(FeatureMaps(network, layers=[layer]), (4, 4))(images()) for layer in (0, 2)]
    both = Teacher(FeatureMaps(network, layers=[0, -1]), (4, 4))(images())
    torch.testing.assert_close(both, whiten((single[0] + single[1]) / 2))


def hybrid(num_classes=0):
    torch.manual_seed(0)
    return timm.create_model(
        "convvit_tiny", img_size=32, patch_size=8, embed_dims=(8, 16, 24), depths=(1, 1, 1), num_heads=2,
        num_classes=num_classes, pretrained_cfg_overlay={"input_size": (3, 32, 32)},
    )  # fmt: skip


@pytest.mark.parametrize("num_classes", [0, 5])
def test_teacher__of_a_hybrid_the_map_of_its_tokens_is_the_default(num_classes):
    network = hybrid(num_classes)
    teacher = Teacher(FeatureMaps(network), (4, 4))
    tokens = network.forward_features(teacher.maps.normalize(images()))
    torch.testing.assert_close(teacher(images()), whiten(tokens.flatten(2).transpose(1, 2)))
    (subsampled,) = FeatureMaps(network, layers=[-1])(images())
    torch.testing.assert_close(subsampled, tokens[..., ::2, ::2])


def test_ema_teacher__of_a_hybrid_the_map_of_its_tokens_is_the_default():
    model = dmjd.build("dmjd", "tiny", image_size=32, patch_size=8, embed_dim=16, depth=1, num_heads=2, target="ema")
    tokens = model.encoder.backbone.eval().forward_features(model.normalize(images()))
    torch.testing.assert_close(model.target(images()), whiten(tokens.flatten(2).transpose(1, 2)))


def test_teacher__of_a_network_of_stages_with_patches_the_last_map_is_the_default():
    network = timm.create_model(
        "swinv2_cr_tiny_224", img_size=64, window_size=2, embed_dim=8, depths=(1, 1, 1, 1), num_heads=(1, 1, 2, 2),
        num_classes=0, pretrained_cfg_overlay={"input_size": (3, 64, 64)},
    )  # fmt: skip
    (features,) = FeatureMaps(network)(images(64))
    assert features.shape == (2, 64, 2, 2)


def test_teacher__images_of_another_size_are_resized_to_its_own():
    assert Teacher(FeatureMaps(vit()), (4, 4))(images(48)).shape == (2, 16, 24)
    flat = torch.full((1, 3, 48, 48), 77, dtype=torch.uint8)
    teacher = Teacher(FeatureMaps(vit()), (4, 4))
    torch.testing.assert_close(teacher(flat), teacher(flat[..., :32, :32]), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("network", "layers", "in_chans"),
    [(lambda: vit(in_chans=1), [-1], 3), (vit, [7], 3), (convolutional, [1, 3], 3), (vit, [-1], 1)],
    ids=["channels", "no such layer", "unequal widths", "grey"],
)
def test_teacher__what_cannot_be_is_a_value_error(network, layers, in_chans):
    with pytest.raises(ValueError, match="teacher"):
        FeatureMaps(network(), layers=layers, in_chans=in_chans)


def request(**options):
    """Ask for a target of a student with 4 x 4 tokens; `options` are those of teachers."""
    student = create_vit("tiny", image_size=32, patch_size=8, embed_dim=16, depth=1, num_heads=2)
    return TargetRequest(
        encoder=student,
        in_chans=3,
        image_hw=(32, 32),
        normalize=Normalize(*STATISTICS[3]),
        options={"teacher": options},
    )


def small(**overrides):
    torch.manual_seed(0)
    return dmjd.build(
        "dm", "tiny", image_size=32, patch_size=8, embed_dim=16, depth=1, num_heads=2,
        decoder_embed_dim=16, decoder_depth=1, decoder_num_heads=2, **overrides,
    )  # fmt: skip


@pytest.fixture(scope="module")
def teacher_file(tmp_path_factory):
    torch.manual_seed(3)
    encoder = create_vit("tiny", image_size=32, patch_size=8, embed_dim=24, depth=2, num_heads=2)
    path = tmp_path_factory.mktemp("teacher") / "backbone.safetensors"
    save_backbone(path, encoder.backbone, encoder.architecture, (0.5, 0.5, 0.5), (0.2, 0.2, 0.2))
    return path


def test_dmjd__views_of_an_image_share_their_teachers_targets(teacher_file):
    model = small(masked_target=str(teacher_file), visible_weight=1.0)
    first, second = (
        dmjd.block_masks(2, (4, 4), num_views=2, mask_ratio=0.5, generator=torch.Generator().manual_seed(seed))
        for seed in (0, 1)
    )
    for masked in (first, second):
        predictions = model.predict(images(), masked)
        full = model.target(images())
        hidden = masked.flatten(0, 1)
        for row in range(4):
            torch.testing.assert_close(predictions.masked_target[row], full[row // 2][hidden[row]])
            torch.testing.assert_close(predictions.visible_target[row], full[row // 2][~hidden[row]])


def test_dmjd__each_branch_has_its_own_target_and_loss(teacher_file):
    model = small(
        masked_target="normalized_pixels", visible_target=str(teacher_file), visible_weight=0.5, visible_loss="cosine"
    )
    assert isinstance(model.target, Pixels)
    assert isinstance(model.visible_target, Teacher)
    masked = dmjd.block_masks(2, (4, 4), num_views=2, mask_ratio=0.5)
    predictions, losses = model.predict(images(), masked), model(images(), masked)
    assert (predictions.masked.shape[-1], predictions.visible.shape[-1]) == (8 * 8 * 3, 24)
    cosine = (1 - F.cosine_similarity(predictions.visible, predictions.visible_target, dim=-1)).mean()
    torch.testing.assert_close(losses.visible, cosine)
    torch.testing.assert_close(losses.total, losses.masked + 0.5 * cosine)


def test_dmjd__without_a_visible_branch_its_target_is_not_made():
    model = small(visible_weight=0.0, visible_target="pixels")
    assert isinstance(model.target, HOG)
    assert model.visible_target is None


def test_dmjd__a_teacher_is_neither_trained_nor_saved_but_moves_along(teacher_file):
    plain, taught = small(masked_target="hog"), small(masked_target=str(teacher_file))
    assert not [name for name in taught.state_dict() if "target" in name]
    trained = [{name for name, weight in model.named_parameters() if weight.requires_grad} for model in (taught, plain)]
    assert trained[0] == trained[1]
    taught.double()
    assert next(taught.target.maps.network.parameters()).dtype == torch.float64
    taught.train()
    assert not taught.target.maps.network.training


@pytest.mark.parametrize("assign", [False, True])
def test_teacher__a_checkpoint_neither_holds_nor_misses_it_nor_changes_it(assign):
    model = nn.ModuleDict({"first": Teacher(FeatureMaps(vit()), (4, 4)), "head": nn.Linear(2, 2)})
    before, saved = model["first"](images()), model.state_dict()
    assert set(saved) == {"head.weight", "head.bias"}
    saved["head.bias"] = torch.ones(2)
    assert deepcopy(model).load_state_dict(saved, assign=assign) == ([], [])
    assert model.load_state_dict(saved, assign=assign) == ([], [])
    assert set(saved) == {"head.weight", "head.bias"}
    assert model["head"].bias.tolist() == [1, 1]
    assert torch.equal(model["first"](images()), before)
    assert not any(weight.requires_grad for weight in model["first"].parameters())


def test_ema_teacher__a_checkpoint_without_it_is_refused_beside_a_teacher_too():
    model = nn.ModuleDict(
        {"mean": EmaTeacher(FeatureMaps(vit()), (4, 4)), "teacher": Teacher(FeatureMaps(vit()), (4, 4))}
    )
    saved = model.state_dict()
    assert set(saved) == {f"mean.maps.network.{name}" for name in vit().state_dict()}
    del saved["mean.maps.network.norm.bias"]
    with pytest.raises(RuntimeError, match="Missing key"):
        model.load_state_dict(saved)
    assert model.load_state_dict(saved, strict=False).missing_keys == ["mean.maps.network.norm.bias"]


def test_teacher__its_fingerprint_is_what_its_targets_depend_on():
    half = {"input_size": (3, 32, 32), "mean": (0.5,) * 3, "std": (0.5,) * 3}
    others = [
        Teacher(FeatureMaps(vit(), layers=[0, 1]), (4, 4)),
        Teacher(FeatureMaps(vit()), (2, 2)),
        Teacher(FeatureMaps(vit(), bf16=True), (4, 4)),
        Teacher(FeatureMaps(vit(), takes=half | {"mean": (0.4,) * 3}), (4, 4)),
        Teacher(FeatureMaps(vit()).half(), (4, 4)),
        Teacher(FeatureMaps(vit(dynamic_img_size=True), takes=half | {"input_size": (3, 64, 64)}), (4, 4)),
    ]
    own = Teacher(FeatureMaps(vit()), (4, 4)).fingerprint()
    assert own == Teacher(FeatureMaps(vit()), (4, 4)).fingerprint()
    assert len({own, *(teacher.fingerprint() for teacher in others)}) == 7


def test_teacher__what_resizing_makes_brighter_than_white_is_white():
    bars = 255 * ((torch.arange(16) // 4) % 2).expand(1, 3, 16, 16).byte()
    shown = F.interpolate(bars.float(), (32, 32), mode="bicubic", antialias=True)
    assert shown.max() > 260
    found, expected = (Teacher(FeatureMaps(vit()), (4, 4))(each) for each in (bars, shown.clamp(0, 255)))
    torch.testing.assert_close(found, expected)


def test_teacher__a_cache_is_asked_first():
    teacher = Teacher(FeatureMaps(vit()), (4, 4))
    plain = teacher(images())
    teacher.cache = lambda images, compute: compute(images.flip(0)) + 1
    assert torch.equal(teacher(images()), plain.flip(0) + 1)


def test_teacher__in_float64_it_stays_in_float64():
    exact, plain = Teacher(FeatureMaps(vit()), (4, 4)).double()(images()), Teacher(FeatureMaps(vit()), (4, 4))(images())
    assert (exact.dtype, plain.dtype) == (torch.float64, torch.float32)
    torch.testing.assert_close(exact.float(), plain, atol=1e-4, rtol=1e-4)


def test_pretrain__with_a_teacher_on_one_branch_it_learns_resumes_and_reports(teacher_file, tmp_path):
    for number in range(24):
        path = tmp_path / "photos" / f"{number}.png"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(np.random.default_rng(number).integers(0, 256, (40, 40, 3), dtype=np.uint8)).save(path)
    flags = """--model.image_size 32 --model.patch_size 8 --model.embed_dim 16 --model.depth 1 --model.num_heads 2
    --decoder.embed_dim 16 --decoder.depth 1 --decoder.num_heads 2 --batch_size 8 --workers 0 --device cpu
    --optim.warmup_epochs 0 --monitor.log_every 1 --visible.loss cosine --optim.blr 0.1 --steps 8"""
    out = tmp_path / "run"
    words = ["pretrain", "--preset", "quick", *flags.split(), "--data", str(tmp_path / "photos"), "--out", str(out)]
    assert main([*words, "--masked.target", str(teacher_file), "--visible.target", "hog"]) == 0
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines if "loss" in line]
    assert losses[-1] < losses[0]
    saved = load_file(next(out.glob("checkpoints/*/model.safetensors")))
    assert not any(name.startswith("target") for name in saved)
    assert "principal components" in (out / "report.html").read_text()
    assert main(["pretrain", "--data", str(tmp_path / "photos"), "--out", str(out), "--resume"]) == 0


def test_ema_teacher__running_statistics_move_as_weights_do_and_counters_are_the_students():
    student = timm.create_model("resnet10t", num_classes=0)
    takes = {"input_size": (3, 32, 32), "mean": (0.5,) * 3, "std": (0.5,) * 3}
    teacher = EmaTeacher(FeatureMaps(deepcopy(student), takes=takes), (1, 1), decay=(0.75, 0.75))
    student.bn1.running_mean += 1
    student.bn1.num_batches_tracked += 5
    teacher.update(student, 0.5)
    mean = teacher.maps.network.bn1
    torch.testing.assert_close(mean.running_mean, torch.full_like(mean.running_mean, 0.25))
    assert mean.num_batches_tracked == 5


def test_ema_teacher__after_n_steps_it_is_the_closed_form():
    torch.manual_seed(0)
    student = vit()
    teacher = EmaTeacher(FeatureMaps(deepcopy(student)), (4, 4), decay=(0.5, 0.9))
    name, weight = next(iter(student.named_parameters()))
    mean = weight.detach().clone()
    for step in range(1, 5):
        with torch.no_grad():
            weight += torch.randn_like(weight)
        decay = 0.5 + 0.4 * step / 4
        mean = decay * mean + (1 - decay) * weight.detach()
        teacher.update(student, step / 4)
    torch.testing.assert_close(teacher.maps.network.state_dict()[name], mean)


def test_dmjd__its_own_mean_is_saved_and_not_trained():
    model = small(masked_target="ema", visible_weight=1.0)
    assert isinstance(model.target, EmaTeacher)
    assert model.visible_target is None
    assert any(name.startswith("target.maps.network") for name in model.state_dict())
    assert not any(name.startswith("target") for name, p in model.named_parameters() if p.requires_grad)
    model.train()
    assert not model.target.maps.network.training
    before = model.target(images())
    with torch.no_grad():
        weight = model.encoder.backbone.blocks[0].mlp.fc1.weight
        weight += torch.randn_like(weight)
    torch.testing.assert_close(model.target(images()), before)
    mean = model.target.maps.network.blocks[0].mlp.fc1.weight
    expected = mean.lerp(weight, 1 - (0.996 + 0.9999) / 2)  # in the middle of a run
    model.update_targets(0.5)
    torch.testing.assert_close(mean, expected)


def test_dmjd__one_mean_serves_both_branches():
    assert small(masked_target="ema", visible_weight=1.0, visible_target="ema").visible_target is None


def test_pretrain__with_its_own_mean_a_stopped_run_resumes_to_the_last_bit(tmp_path):
    for number in range(24):
        path = tmp_path / "photos" / f"{number}.png"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(np.random.default_rng(number).integers(0, 256, (40, 40, 3), dtype=np.uint8)).save(path)
    flags = """--model.image_size 32 --model.patch_size 8 --model.embed_dim 16 --model.depth 2 --model.num_heads 2
    --decoder.embed_dim 16 --decoder.depth 1 --decoder.num_heads 2 --batch_size 8 --workers 0 --device cpu --steps 6
    --optim.warmup_epochs 0 --monitor.log_every 1 --monitor.saves 3 --masked.target ema --teacher.decay 0.5 0.9
    --teacher.layers 0 --teacher.layers 1"""
    words = ["pretrain", "--preset", "quick", *flags.split(), "--data", str(tmp_path / "photos"), "--out"]
    runs = [tmp_path / "unbroken", tmp_path / "stopped"]
    assert all(main([*words, str(out)]) == 0 for out in runs)
    # As if killed after step 4: what came later is gone.
    shutil.rmtree(runs[1] / "checkpoints" / "step-00000006")
    (runs[1] / "summary.json").unlink()
    assert main(["pretrain", "--data", str(tmp_path / "photos"), "--out", str(runs[1]), "--resume"]) == 0
    losses = [
        [line["loss"] for line in map(json.loads, (out / "metrics.jsonl").read_text().splitlines()) if "loss" in line]
        for out in runs
    ]
    assert losses[0] == losses[1]
    assert len(losses[0]) == 6


def test_teacher__in_bf16_its_targets_are_nearly_the_same_whatever_is_around(teacher_file):
    plain, fast = (create_target(str(teacher_file), request(bf16=bf16)) for bf16 in (False, True))
    exact, rough = plain(images()), fast(images())
    assert 0 < (exact - rough).abs().mean() < 0.02
    assert rough.dtype == torch.float32


def test_dmjd__several_targets_are_predicted_side_by_side_and_their_losses_summed(teacher_file):
    model = small(masked_target=f"hog+{teacher_file}", visible_target="pixels+ema", visible_weight=0.5)
    masked = dmjd.block_masks(2, (4, 4), num_views=2, mask_ratio=0.5)
    predictions, losses = model.predict(images(), masked), model(images(), masked)
    hog, teacher = predictions.masked_target.split([4 * 9 * 3, 24], dim=-1)
    torch.testing.assert_close(model.target(images())[..., : 4 * 9 * 3], HOG(8, cell_size=4)(images()))
    each = [
        regression_loss(predicted, true, "l2")
        for predicted, true in zip(predictions.masked.split([4 * 9 * 3, 24], dim=-1), (hog, teacher), strict=True)
    ]
    torch.testing.assert_close(losses.masked, each[0] + each[1])
    assert losses.masked > regression_loss(predictions.masked, predictions.masked_target, "l2")
    assert predictions.visible.shape[-1] == 8 * 8 * 3 + 16
    torch.testing.assert_close(losses.total, losses.masked + 0.5 * losses.visible)
    before = model.visible_target(images())[..., -16:]
    with torch.no_grad():
        weight = model.encoder.backbone.blocks[0].mlp.fc1.weight
        weight += torch.randn_like(weight)
    model.update_targets(0.0)
    assert (model.visible_target(images())[..., -16:] - before).abs().max() > 1e-4  # a mean among several follows


def write_huggingface(folder, kind):
    import transformers as hf

    torch.manual_seed(0)
    shape = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
    tokens = {**shape, "image_size": 32, "patch_size": 8}
    text = hf.CLIPTextConfig(**shape, vocab_size=10, max_position_embeddings=8)
    model = {
        "vit": lambda: hf.ViTModel(hf.ViTConfig(**tokens)),
        "registers": lambda: hf.Dinov2WithRegistersModel(
            hf.Dinov2WithRegistersConfig(**tokens, num_register_tokens=3, mlp_ratio=2)
        ),
        "clip": lambda: hf.CLIPModel(
            hf.CLIPConfig(text_config=text.to_dict(), vision_config=hf.CLIPVisionConfig(**tokens).to_dict())
        ),
        "convolutional": lambda: hf.ResNetModel(
            hf.ResNetConfig(embedding_size=8, hidden_sizes=[8, 24], depths=[1, 1], layer_type="basic")
        ),
    }[kind]()
    model.save_pretrained(folder)
    hf.ViTImageProcessor(size={"height": 32, "width": 32}, image_mean=[0.4] * 3, image_std=[0.3] * 3).save_pretrained(
        folder
    )
    return model


@pytest.mark.filterwarnings("ignore")  # of transformers' own
@pytest.mark.parametrize("kind", ["vit", "registers", "clip", "convolutional"])
def test_huggingface__vision_models_of_a_folder_are_teachers(kind, tmp_path):
    model = write_huggingface(tmp_path, kind)
    teacher = create_target(f"hf:{tmp_path}", request())
    pixels = (images() / 255 - 0.4) / 0.3
    with torch.no_grad():
        target = teacher(images())
        own = getattr(model, "vision_model", model).eval()(pixel_values=pixels, output_hidden_states=True)
    assert target.shape == (2, 16, 24)
    last = own.hidden_states[-1]
    if kind != "convolutional":
        torch.testing.assert_close(target, whiten(last[:, -16:]))  # class and register tokens are no target


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("kind", "stored"), [("vit", torch.bfloat16), ("convolutional", torch.float16)])
def test_huggingface__weights_in_half_precision_compute_in_float32(kind, stored, tmp_path):
    model = write_huggingface(tmp_path, kind).to(stored)
    model.save_pretrained(tmp_path)
    with torch.no_grad():
        states = model.float().eval()(pixel_values=(images() / 255 - 0.4) / 0.3, output_hidden_states=True)
        (features,) = HuggingFace(str(tmp_path)).forward_intermediates((images() / 255 - 0.4) / 0.3, indices=[-1])
    last = states.hidden_states[-1]
    torch.testing.assert_close(
        features, last if last.ndim == 4 else last[:, -16:].mT.unflatten(2, (4, 4)), rtol=1e-5, atol=1e-5
    )


@pytest.mark.filterwarnings("ignore")
def test_huggingface__what_does_not_load_is_one_line(tmp_path):
    with pytest.raises(CheckpointError, match=r"transformers cannot load it .*; hf:.*; check name"):
        HuggingFace(str(tmp_path / "nothing"))
    import transformers as hf

    hf.ViTImageProcessor(size={"longest_edge": 32}).save_pretrained(tmp_path)
    hf.ViTModel(
        hf.ViTConfig(hidden_size=24, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24)
    ).save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="names no input size"):
        HuggingFace(str(tmp_path))


@pytest.mark.filterwarnings("ignore")
def test_huggingface__a_model_of_timm_is_told_its_name_as_a_teacher(tmp_path):
    timm.models.save_for_hf(vit(), tmp_path)
    with pytest.raises(CheckpointError, match=f"a model of timm; hf:{tmp_path}; give timm:local-dir:{tmp_path}$"):
        HuggingFace(str(tmp_path))


@pytest.mark.filterwarnings("ignore")
def test_huggingface__images_that_its_processor_leaves_at_0_to_1_stay_there(tmp_path):
    write_huggingface(tmp_path, "vit")
    import transformers as hf

    processor = hf.ViTImageProcessor(size={"height": 32, "width": 32}, do_normalize=False)
    processor.save_pretrained(tmp_path)
    maps = FeatureMaps(HuggingFace(str(tmp_path)))
    torch.testing.assert_close(maps.normalize(images()), processor(images(), return_tensors="pt")["pixel_values"])


def test_teacher__a_folder_of_timm_is_named_as_timm_names_it(tmp_path):
    timm.models.save_for_hf(vit(), tmp_path)
    assert create_target(f"timm:local-dir:{tmp_path}", request())(images()).shape == (2, 16, 24)
