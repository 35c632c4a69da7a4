"""A network of ours in other programs says what it says here."""

import importlib
import json
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import timm
import torch
import yaml
from PIL import Image

import dmjd
from dmjd.backbones.convvit import create_convvit
from dmjd.backbones.files import put_head, save_backbone
from dmjd.backbones.normalize import Normalize
from dmjd.backbones.vit import create_vit
from dmjd.cli import main
from dmjd.config.export import ExportSettings
from dmjd.errors import CheckpointError, ConfigError
from dmjd.tasks.export import describe_runs, export

FIXTURES = Path(__file__).parents[1] / "fixtures"
SHAPE = {"image_size": 32, "patch_size": 8, "embed_dim": 16, "depth": 1, "num_heads": 2}
STATISTICS = ([0.4, 0.5, 0.6], [0.2, 0.25, 0.3])
CLASSES = ["heron", "grebe|`x`", "coot"]
NETWORKS = {"vit": (), "vit-classes": CLASSES, "convvit": (), "convvit-classes": CLASSES}


def write_network(path, kind, classes=()):
    torch.manual_seed(0)
    encoder = (create_vit if kind == "vit" else create_convvit)("tiny", **SHAPE)
    model, architecture = put_head(encoder.backbone, encoder.architecture, len(classes))
    if classes:
        torch.nn.init.normal_(model.get_classifier().weight)
    task = {"name": "finetune", "classes": list(classes)} if classes else None
    save_backbone(path, model, architecture, *STATISTICS, task=task)
    return path


@pytest.fixture(params=NETWORKS)
def network(request, tmp_path):
    kind, classes = request.param.partition("-")[0], NETWORKS[request.param]
    return write_network(tmp_path / "network.safetensors", kind, classes), list(classes)


def pixels(count, side=32):
    return torch.rand(count, 3, side, side, generator=torch.Generator().manual_seed(7))


@torch.no_grad()
def truth(path, images):
    return dmjd.load_backbone(path)(Normalize(*STATISTICS)(images * 255))


def test_export__plain_timm_gives_the_same_features(network, tmp_path, capsys):
    path, classes = network
    export(ExportSettings(path, to="timm", out=tmp_path / "out"))
    said = capsys.readouterr().out
    scope = {}
    exec(said[said.index("import timm") :], scope)  # what the user is told to type
    with torch.no_grad():
        found = scope["model"](Normalize(*STATISTICS)(pixels(2) * 255))
    torch.testing.assert_close(found, truth(path, pixels(2)), rtol=0, atol=1e-5)
    expected = {"input_size": (3, 32, 32), "mean": STATISTICS[0], "std": STATISTICS[1]}
    seen = timm.data.resolve_model_data_config(scope["model"])  # what timm's transforms go by
    assert {key: tuple(seen[key]) for key in expected} == {key: tuple(value) for key, value in expected.items()}
    assert dmjd.load_backbone(tmp_path / "out.safetensors").num_classes == len(classes)


def test_export__timm_and_transformers_open_the_folder_offline(network, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    path, classes = network
    export(ExportSettings(path, to="hf", out=tmp_path / "hub"))
    assert {each.name for each in (tmp_path / "hub").iterdir()} == {"config.json", "model.safetensors", "README.md"}
    from transformers import AutoImageProcessor, AutoModel, AutoModelForImageClassification

    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8))
    images = AutoImageProcessor.from_pretrained(tmp_path / "hub")(picture)["pixel_values"]
    expected = truth(path, torch.from_numpy(np.asarray(picture).copy()).permute(2, 0, 1)[None] / 255)
    with torch.no_grad():
        by_timm = timm.create_model(f"local-dir:{tmp_path / 'hub'}", pretrained=True).eval()(images)
        kind = AutoModelForImageClassification if classes else AutoModel
        model = kind.from_pretrained(tmp_path / "hub").eval()
        by_transformers = model(images)["logits" if classes else "pooler_output"]
    torch.testing.assert_close(by_timm, expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(by_transformers, expected, rtol=0, atol=1e-5)
    if classes:
        assert list(model.config.id2label.values()) == classes


@pytest.mark.long
@pytest.mark.parametrize("network", ["vit-classes", "convvit"], indirect=True)
def test_export__onnx_takes_any_number_of_images_of_0_to_1(network, tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    path, classes = network
    export(ExportSettings(path, to="onnx", out=tmp_path / "network.onnx"))
    session = onnxruntime.InferenceSession(tmp_path / "network.onnx")
    assert session.get_inputs()[0].shape[0] == session.get_outputs()[0].shape[0] == "batch"
    for count in (1, 5):
        (found,) = session.run(None, {"images": pixels(count).numpy()})
        torch.testing.assert_close(torch.from_numpy(found), truth(path, pixels(count)), rtol=0, atol=1e-4)
    said = session.get_modelmeta().custom_metadata_map
    assert json.loads(said["classes"]) == classes
    assert (json.loads(said["mean"]), json.loads(said["std"])) == STATISTICS


@pytest.mark.parametrize("network", ["vit", "convvit-classes"], indirect=True)
def test_export__a_program_of_torch_takes_any_number_of_images_of_0_to_1(network, tmp_path):
    path, classes = network
    export(ExportSettings(path, to="torch", out=tmp_path / "network.pt2"))
    kept = {"metadata.json": ""}
    program = torch.export.load(tmp_path / "network.pt2", extra_files=kept).module()
    for count in (1, 5):
        torch.testing.assert_close(program(pixels(count)), truth(path, pixels(count)), rtol=0, atol=1e-5)
    assert json.loads(kept["metadata.json"])["classes"] == classes


@pytest.mark.long
def test_export__a_segmenter_keeps_its_head_in_a_program(tmp_path):
    path = FIXTURES / "segment.safetensors"
    export(ExportSettings(path, to="torch", out=tmp_path / "segmenter"))
    kept = {"metadata.json": ""}
    program = torch.export.load(tmp_path / "segmenter.pt2", extra_files=kept).module()
    said = json.loads(kept["metadata.json"])
    with torch.no_grad():
        logits = program(torch.rand(3, *said["input_size"]))
    assert logits.shape == (3, len(said["classes"]), *said["input_size"][1:])


def test_export__of_a_segmenter_timm_gets_the_backbone_and_that_is_said(tmp_path, capsys):
    export(ExportSettings(FIXTURES / "segment.safetensors", to="timm", out=tmp_path / "backbone"))
    assert "the backbone alone, for the format has no segmenters" in capsys.readouterr().out
    ours = dmjd.load_backbone(FIXTURES / "segment.safetensors").state_dict()
    theirs = dmjd.load_backbone(tmp_path / "backbone.safetensors").state_dict()
    assert all(torch.equal(value, theirs[name]) for name, value in ours.items())


@pytest.mark.parametrize("to", ["onnx", "torch"])
def test_export__a_detector_has_no_graph_and_nothing_is_left_behind(to, tmp_path):
    with pytest.raises(ConfigError, match=r"a detector .* has no static graph; .*; export its backbone"):
        export(ExportSettings(FIXTURES / "detect.safetensors", to=to, out=tmp_path / "detector"))
    assert not list(tmp_path.iterdir())


def test_export__a_file_that_does_not_compute_the_same_gets_no_name(tmp_path, monkeypatch):
    path = write_network(tmp_path / "network.safetensors", "vit")

    def create_another(name, **arguments):
        model = timm.create_model(name, **arguments)
        torch.nn.init.normal_(model.patch_embed.proj.bias)
        return model

    monkeypatch.setattr("dmjd.formats.timm_file.timm", SimpleNamespace(create_model=create_another))
    with pytest.raises(AssertionError, match="not close"):
        export(ExportSettings(path, to="timm", out=tmp_path / "out"))
    assert [each.name for each in tmp_path.iterdir()] == ["network.safetensors"]


def test_export__without_the_extra_one_line_names_it(tmp_path, monkeypatch):
    path = write_network(tmp_path / "network.safetensors", "vit")
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(ConfigError, match=r"onnxruntime is not installed; --to onnx; pip install 'dmjd\[onnx\]'"):
        export(ExportSettings(path, to="onnx", out=tmp_path / "out"))


def test_export__a_run_is_its_best_network_and_its_card_says_what_was_done(tmp_path, colours):
    line = ["--data", str(colours), "--steps", "2", "--batch_size", "8", "--device", "cpu", "--workers", "0"]
    model = ["--model.depth", "1", "--model.image_size", "32", "--optim.blr", "0.002"]
    assert main(["pretrain", "--preset", "quick", *line, *model, "--out", str(tmp_path / "run")]) == 0
    assert (
        main(["export", str(tmp_path / "run"), "--to", "hf", "--out", str(tmp_path / "hub"), "--license", "mit"]) == 0
    )
    card = (tmp_path / "hub" / "README.md").read_text()
    about = yaml.safe_load(card.split("---\n")[1])
    assert (about["license"], about["library_name"]) == ("mit", "timm")
    rows = dict(re.findall(r"^\| (.+?) \| (.+) \|$", card, flags=re.MULTILINE))
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert rows["data"] == "`colours`"
    assert rows["effective epochs"] == f"`{2 * 8 * 2 / 24:.4g}`"
    assert rows["recipe"] == "`quick`"
    assert rows["images"] == f"`{summary['num_images']}`"
    assert rows["settings that differ from the recipe"] == "`model.image_size 32, model.depth 1, optim.blr 0.002`"
    assert rows["k-NN, top-1"].startswith(f"`{summary['trained']['knn_top1']:.4g}")
    assert "2301.00230" in card
    # What is trained of the folder says what it is made of, and opens again; a slash behind the data changes nothing.
    assert (
        main(["finetune", "--backbone", f"timm:local-dir:{tmp_path / 'hub'}", *line, "--out", str(tmp_path / "tuned")])
        == 0
    )
    assert dmjd.load_backbone(tmp_path / "tuned" / "best.safetensors").num_classes == 3
    assert main(["export", str(tmp_path / "tuned"), "--to", "hf", "--out", str(tmp_path / "classes")]) == 0


def test_card__of_a_run_on_weights_of_timm_knows_nothing_of_the_folder_it_is_written_in(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "config.yaml").write_text("name: something else")
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.yaml").write_text(
        "{backbone: 'timm:vit_tiny_patch16_224', data: photos/, preset: base, epochs: 3, batch_size: 8, recipe: {}}"
    )
    (described,) = describe_runs(run)
    assert described["facts"]["data"] == "photos"


def test_card__of_a_run_whose_backbone_lies_in_its_own_folder_describes_it_once(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_network(tmp_path / "backbone.safetensors", "vit")
    (tmp_path / "config.yaml").write_text(
        f"{{backbone: {tmp_path}/backbone.safetensors, data: photos/, preset: base, epochs: 3, batch_size: 8, "
        "augment: {}}"
    )
    (described,) = describe_runs(Path())
    assert described["title"] == "Fine-tuning"


@pytest.mark.parametrize(
    "content", [b"", b"{", b"- item", b"lr: 1", b"{data: {root: photos}, epochs: 3, batch_size: 8}", b"na\xefve: 1"]
)
def test_card__of_a_file_beside_the_settings_of_another_program_knows_of_no_run(tmp_path, content):
    (tmp_path / "config.yaml").write_bytes(content)
    assert describe_runs(tmp_path) == []


@pytest.mark.parametrize("name", ["test_resnet", "test_convnext"])
def test_export__a_network_of_convolutions_goes_to_the_hub_too(name, tmp_path):
    model, architecture = put_head(timm.create_model(name), (name, {}), 3)
    path = tmp_path / "network.safetensors"
    save_backbone(path, model, architecture, *STATISTICS, task={"name": "finetune", "classes": CLASSES})
    export(ExportSettings(path, to="hf", out=tmp_path / "hub"))
    assert json.loads((tmp_path / "hub" / "config.json").read_text())["num_classes"] == 3


def test_export__timms_transforms_are_those_of_evaluations_whatever_the_network_had(tmp_path, capsys):
    name = "vit_base_patch16_clip_384.laion2b_ft_in12k_in1k"
    assert timm.get_pretrained_cfg(name).crop_mode == "squash"
    shape = {"img_size": 32, "patch_size": 8, "embed_dim": 16, "depth": 1, "num_heads": 2}
    model, architecture = put_head(timm.create_model(name, **shape), (name, shape), 3)
    save_backbone(tmp_path / "network.safetensors", model, architecture, *STATISTICS)
    export(ExportSettings(tmp_path / "network.safetensors", to="timm", out=tmp_path / "out"))
    scope, said = {}, capsys.readouterr().out
    exec(said[said.index("import timm") :], scope)
    for loaded in (scope["model"], dmjd.load_backbone(tmp_path / "network.safetensors")):
        seen = timm.data.resolve_model_data_config(loaded)
        assert (seen["interpolation"], seen["crop_mode"], seen["crop_pct"]) == ("bicubic", "center", 1)


def test_export__the_code_to_load_a_network_imports_the_module_that_tells_timm_of_it(tmp_path, monkeypatch, capsys):
    (tmp_path / "own_networks.py").write_text(
        "from timm.models import build_model_with_cfg, generate_default_cfgs, register_model\n"
        "from timm.models.vision_transformer import VisionTransformer\n"
        "default_cfgs = generate_default_cfgs({'own_vit': {'input_size': (3, 32, 32)}})\n"
        "@register_model\ndef own_vit(pretrained=False, **arguments):\n"
        "    return build_model_with_cfg(VisionTransformer, 'own_vit', pretrained, **arguments)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    importlib.import_module("own_networks")
    shape = {"img_size": 32, "patch_size": 8, "embed_dim": 16, "depth": 1, "num_heads": 2, "num_classes": 0}
    save_backbone(
        tmp_path / "network.safetensors", timm.create_model("own_vit", **shape), ("own_vit", shape), *STATISTICS
    )
    for to, out in (("timm", "out"), ("hf", "hub")):
        export(ExportSettings(tmp_path / "network.safetensors", to=to, out=tmp_path / out))
        assert "import timm\nimport own_networks  # tells timm of the model\n" in capsys.readouterr().out
    assert "`own_networks` must be installed" in (tmp_path / "hub" / "README.md").read_text()


@pytest.mark.parametrize("out", [".", "link"])
def test_export__an_empty_folder_or_a_link_to_one_is_filled(out, tmp_path, monkeypatch):
    path = write_network(tmp_path / "network.safetensors", "vit")
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    (tmp_path / "link").symlink_to(tmp_path / "empty")
    export(ExportSettings(path, to="hf", out=Path(out) if out == "." else tmp_path / out))
    assert {each.name for each in Path().iterdir()} == {"config.json", "model.safetensors", "README.md"}
    assert (tmp_path / "link").is_symlink()


def test_export__a_folder_that_holds_something_stays_as_it_is(tmp_path):
    path = write_network(tmp_path / "network.safetensors", "vit")
    with pytest.raises(ConfigError, match="it exists already"):
        export(ExportSettings(path, to="hf", out=tmp_path))


def test_export__leaves_the_files_of_a_run_and_what_it_exports_alone(tmp_path):
    (tmp_path / "run").mkdir()
    for folder in (tmp_path, tmp_path / "run"):
        for name in ("backbone", "pretrained"):
            write_network(folder / f"{name}.safetensors", "vit")
    (tmp_path / "run" / "config.yaml").touch()
    before = {path: path.read_bytes() for path in tmp_path.rglob("*.safetensors")}
    for run, out in (("run", "run/pretrained"), ("run", "run/backbone"), ("backbone.safetensors", "backbone")):
        with pytest.raises(ConfigError, match=r"a file of a run; .*; choose another --out"):
            export(ExportSettings(tmp_path / run, to="timm", out=tmp_path / out))
    assert {path: path.read_bytes() for path in tmp_path.rglob("*.safetensors")} == before


def test_export__a_run_without_a_network_is_one_line(tmp_path):
    with pytest.raises(CheckpointError, match=r"no network in it; .*; give a finished run, or a file"):
        export(ExportSettings(tmp_path, to="timm", out=tmp_path / "out"))
