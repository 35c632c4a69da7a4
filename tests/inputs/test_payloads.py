"""Files that carry code, in every container and through every loader: nothing runs, nothing elsewhere is read."""

import functools
import io
import json
import operator
import os
import pickle
import runpy
import shutil
import socket
import subprocess
import tarfile
import zipfile
from argparse import Namespace
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from dmjd.backbones.files import load_around, load_backbone, open_backbone, read_task
from dmjd.cli import main
from dmjd.data.archive import open_archive
from dmjd.data.decode import BadImage, Wanted, decode
from dmjd.data.detection import open_detection
from dmjd.data.hub import open_hub
from dmjd.data.source import open_all
from dmjd.engine import checkpoint
from dmjd.errors import CheckpointError, DataError, UserError
from dmjd.reference import read_weights

TINY = """pretrain --preset quick --model.image_size 32 --model.patch_size 8 --model.embed_dim 16 --model.depth 1
--model.num_heads 2 --decoder.embed_dim 16 --decoder.depth 1 --decoder.num_heads 2 --batch_size 8 --steps 2
--monitor.evals 0 --monitor.max_images 8 --workers 0 --device cpu"""


@pytest.fixture(autouse=True)
def canary(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A file that must not appear, whatever is loaded."""
    path = tmp_path_factory.mktemp("canary") / "sings"
    yield path
    assert not path.exists()


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    """No file makes anyone ask the network."""

    def connect(self: socket.socket, address: object) -> None:
        raise AssertionError(f"asked {address}")

    monkeypatch.setattr(socket.socket, "connect", connect)


# -- pickles -----------------------------------------------------------------------------------------------------------


class Runs:
    """When it is unpickled, a function is called."""

    def __init__(self, function: Callable[..., object], *arguments: object):
        self.call = function, arguments

    def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
        return self.call


def script(path: Path) -> str:
    path.with_name("script.py").write_text(f"open({str(path)!r}, 'w').close()")
    return str(path.with_name("script.py"))


PAYLOADS: dict[str, Callable[[Path], object]] = {
    "os.system": lambda path: Runs(os.system, f"touch {path}"),
    "eval": lambda path: Runs(eval, f"open({str(path)!r}, 'w').close()"),
    "exec": lambda path: Runs(exec, f"open({str(path)!r}, 'w').close()"),
    "subprocess.Popen": lambda path: Runs(subprocess.Popen, ["touch", str(path)]),
    "subprocess.check_output": lambda path: Runs(subprocess.check_output, ["touch", str(path)]),
    "open": lambda path: Runs(open, str(path), "w"),
    "os.mkdir": lambda path: Runs(os.mkdir, str(path)),
    "shutil.copy": lambda path: Runs(shutil.copy, __file__, str(path)),
    "functools.partial": lambda path: Runs(functools.partial(os.mkdir, str(path))),
    "operator.call": lambda path: Runs(operator.call, open, str(path), "w"),
    "pathlib.Path.touch": lambda path: Runs(Path.touch, path),
    "runpy.run_path": lambda path: Runs(runpy.run_path, script(path)),
    "argparse.Namespace": lambda path: Namespace(out=str(path)),  # runs nothing, but is no tensor
}


def legacy(content: object) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer, _use_new_zipfile_serialization=False)
    return buffer.getvalue()


def saved(content: object) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getvalue()


CONTAINERS: dict[str, Callable[[object], bytes]] = {
    "pickle": lambda payload: pickle.dumps({"model": payload}, protocol=2),
    "torch": lambda payload: saved({"model": {"weight": torch.ones(2)}, "args": payload}),
    "torch-legacy": lambda payload: legacy({"model": {"weight": payload}}),
    "numpy": lambda payload: array_of(payload),
}


def array_of(payload: object) -> bytes:
    buffer, values = io.BytesIO(), np.empty((1, 1), dtype=object)
    values[0, 0] = payload
    np.save(buffer, values, allow_pickle=True)
    return buffer.getvalue()


def from_timm_folder(path: Path) -> object:
    """A folder that `timm:local-dir:` opens."""
    folder = path.with_suffix("")
    folder.mkdir()
    (folder / "pytorch_model.bin").write_bytes(path.read_bytes())
    (folder / "config.json").write_text(json.dumps({"architecture": "vit_tiny_patch16_224", "num_classes": 0}))
    return open_backbone(f"timm:local-dir:{folder}")


def from_data(path: Path) -> object:
    return [source.read(0) for source in open_all(str(path))]


LOADERS: dict[str, tuple[str, Callable[[Path], object]]] = {
    "reference": (".pth", read_weights),
    "backbone": (".safetensors", load_backbone),
    "timm": (".bin", from_timm_folder),
    "array": (".npy", from_data),
    "image": (".png", lambda path: decode(path, Wanted(3))),
}


@pytest.mark.parametrize("loader", LOADERS)
@pytest.mark.parametrize("container", CONTAINERS)
@pytest.mark.parametrize("payload", PAYLOADS)
def test_load__no_pickle_runs(tmp_path: Path, canary: Path, payload: str, container: str, loader: str) -> None:
    ending, load = LOADERS[loader]
    path = tmp_path / f"given{ending}"
    path.write_bytes(CONTAINERS[container](PAYLOADS[payload](canary)))
    with pytest.raises((UserError, BadImage)) as raised:
        load(path)
    assert "\n" not in str(raised.value)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning", "ignore::ResourceWarning")
def test_payloads__would_run_if_they_were_unpickled(tmp_path: Path) -> None:
    for number, (name, make) in enumerate(PAYLOADS.items()):
        path = tmp_path / str(number) / "sings"
        path.parent.mkdir()
        found = pickle.loads(CONTAINERS["pickle"](make(path)))["model"]
        if isinstance(found, subprocess.Popen):
            found.wait()
        elif isinstance(found, io.IOBase):
            found.close()
        assert path.exists() == (name != "argparse.Namespace")


# -- metadata of backbones ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *(
            ("architecture", name)
            for name in ("hf-hub:timm/vit", "local-dir:/tmp", "hf_hub:timm/vit", "vit*", "os.system")
        ),
        *(
            ("model_args", {name: value})
            for name, value in {
                "checkpoint_path": "/tmp/payload.pth",
                "pretrained": True,
                "pretrained_cfg": "hf-hub:timm/vit",
                "pretrained_cfg_overlay": {"file": "/tmp/payload.pth"},
                "pretrained_strict": False,
                "pretrained_filter_fn": "os.system",
                "pretrained_model_args": {"a": 1},
                "cache_dir": "/tmp",
                "features_only": True,
                "model_cls": "os.system",
                "img_size": {"a": 1},
                "norm_layer": [{"a": 1}],
            }.items()
        ),
        *(
            ("pretrained_cfg", {name: value})
            for name, value in {
                "file": "/tmp/payload.pth",
                "url": "https://example.com/payload.pth",
                "hf_hub_id": "timm/vit",
                "custom_load": True,
                "state_dict": {"a": 1},
                "source": "hf-hub",
                "mean": {"a": 1},
            }.items()
        ),
        ("model_args", ["checkpoint_path"]),
        ("pretrained_cfg", None),
        ("else", "anything"),
        ("model_args", "{"),
    ],
)
@pytest.mark.parametrize("signed", [True, False])
def test_load_backbone__metadata_reach_no_further_than_the_network(
    tmp_path: Path, backbones: dict[str, Path], key: str, value: Any, signed: bool
) -> None:
    """Whether or not whoever wrote the file has computed its digest."""
    from safetensors import safe_open

    from dmjd.backbones.files import digest

    with safe_open(backbones["vit"], framework="pt") as file:
        metadata = dict(file.metadata())
    plain = isinstance(value, str)
    if isinstance(value, dict):
        value = json.loads(metadata[key]) | value
    weights = load_file(backbones["vit"])
    changed = metadata | {key: value if plain else json.dumps(value)}
    changed.pop("sha256")
    path = tmp_path / "given.safetensors"
    save_file(weights, path, changed | ({"sha256": digest(weights, changed)} if signed else {}))
    for load in (
        load_backbone,
        lambda path: open_backbone(str(path)),
        lambda path: open_backbone(str(path), pretrained=False),
    ):
        with pytest.raises(CheckpointError) as raised:
            load(path)
        assert "\n" not in str(raised.value)


def test_load_backbone__a_model_of_another_package_keeps_the_arguments_that_its_function_names(
    tmp_path: Path, backbones: dict[str, Path]
) -> None:
    from timm.models import VisionTransformer, build_model_with_cfg, register_model

    from dmjd.backbones.files import save_backbone

    def payload_free_vit(pretrained: bool = False, *, wavelength: float = 1.0, **arguments: Any) -> torch.nn.Module:
        model = build_model_with_cfg(VisionTransformer, "payload_free_vit", pretrained, **arguments)
        model.wavelength = wavelength
        return model

    payload_free_vit.__module__ = __name__
    register_model(payload_free_vit)
    arguments = {"img_size": [32, 32], "patch_size": 8, "embed_dim": 16, "depth": 1, "num_heads": 2, "num_classes": 0}
    model = payload_free_vit(**arguments, pretrained_cfg={"input_size": (3, 32, 32)})
    save_backbone(
        tmp_path / "a.safetensors", model, ("payload_free_vit", arguments | {"wavelength": 2.5}), [0.5], [0.5]
    )
    assert load_backbone(tmp_path / "a.safetensors").wavelength == 2.5


def test_task_files__a_pickle_is_one_line(tmp_path: Path, canary: Path) -> None:
    path = tmp_path / "last.safetensors"
    path.write_bytes(CONTAINERS["torch"](PAYLOADS["os.system"](canary)))
    with pytest.raises(CheckpointError, match="no network of dmjd"):
        read_task(path, "segment")
    with pytest.raises(CheckpointError, match="do not agree"):
        load_around(path, torch.nn.Linear(1, 1))


# -- runs --------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("images")
    for number in range(20):
        pixels = np.random.default_rng(number).integers(0, 256, (32, 32, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number:02d}.png")
    return folder


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors", "state.json"])
def test_pretrain__resumed_from_a_checkpoint_of_pickles_it_is_one_line(
    data: Path, tmp_path: Path, canary: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    out = tmp_path / "run"
    arguments = [*TINY.split(), "--data", str(data), "--out", str(out)]
    assert main([*arguments, "--monitor.saves", "2"]) == 0
    (out / "summary.json").unlink()
    for path in (out / "checkpoints").glob("step-*"):
        (path / name).write_bytes(CONTAINERS["torch"](PAYLOADS["os.system"](canary)))
        manifest = {each.name: checkpoint.sha256(each) for each in path.iterdir() if each.name != checkpoint.MANIFEST}
        (path / checkpoint.MANIFEST).write_text(json.dumps(manifest))  # the attacker can compute that as well
    capsys.readouterr()
    assert main(["pretrain", "--data", str(data), "--out", str(out), "--resume"]) == 4
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")


@pytest.mark.parametrize("flag", ["--init", "--model.backbone"])
@pytest.mark.parametrize("ending", ["safetensors", "pth", "pt"])
def test_pretrain__started_from_a_pickle_it_is_one_line(
    data: Path, tmp_path: Path, canary: Path, capsys: pytest.CaptureFixture[str], flag: str, ending: str
) -> None:
    path = tmp_path / f"given.{ending}"
    path.write_bytes(CONTAINERS["torch"](PAYLOADS["eval"](canary)))
    arguments = [*TINY.split(), "--data", str(data), "--out", str(tmp_path / "run"), flag, str(path)]
    if flag == "--model.backbone":
        own = ("--model.embed_dim", "--model.depth", "--model.num_heads", "--model.patch_size")
        arguments = [
            word for place, word in enumerate(arguments) if not {*arguments[max(place - 1, 0) : place + 1]} & {*own}
        ]
    assert main(arguments) in (2, 4)
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")


YAML = [
    "!!python/object/apply:os.system ['touch {}']",
    "steps: !!python/object/apply:os.system ['touch {}']",
    "optim: !!python/object/new:subprocess.Popen [[touch, '{}']]",
    "optim:\n  blr: !!python/object/apply:eval [\"open('{}', 'w')\"]",
    "preset: !!python/name:os.system",
    "preset: !!python/module:antigravity",
]


@pytest.mark.parametrize("text", YAML)
@pytest.mark.parametrize("saved", [False, True])
def test_yaml__no_tag_runs(
    data: Path, tmp_path: Path, canary: Path, capsys: pytest.CaptureFixture[str], text: str, saved: bool
) -> None:
    """Of --config, and of the config.yaml of a run to resume."""
    path = tmp_path / "run" / "config.yaml"
    path.parent.mkdir()
    path.write_text(text.format(canary))
    where = ["--resume"] if saved else ["--config", str(path)]
    out = path.parent if saved else tmp_path / "other"
    assert main([*TINY.split(), "--data", str(data), "--out", str(out), *where]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "not YAML" in line


# -- data --------------------------------------------------------------------------------------------------------------


def test_open_hub__a_loading_script_is_not_run(tmp_path: Path, canary: Path) -> None:
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / "mine.py").write_text(f"open({str(canary)!r}, 'w')\n")
    with pytest.raises(DataError, match="no set could be opened"):
        open_hub(f"hf:{folder}", Wanted(3))


def test_open_hub__a_file_elsewhere_is_not_read(tmp_path: Path, data: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    cells = [{"bytes": None, "path": str(path)} for path in (data / "00.png", Path("/etc/hostname"))]
    cells.append({"bytes": (data / "01.png").read_bytes(), "path": "../../01.png"})  # a name and no more
    pq.write_table(pa.table({"image": cells}), tmp_path / "a.parquet")
    (source,) = open_all(str(tmp_path / "a.parquet"))
    for index in (0, 1):
        with pytest.raises(BadImage, match="outside of the set"):
            source.read(index)
    source.read(2)


@pytest.mark.parametrize("known", [True, False])
def test_teacher__the_code_of_a_folder_is_not_run(
    data: Path, tmp_path: Path, canary: Path, capsys: pytest.CaptureFixture[str], known: bool
) -> None:
    folder = tmp_path / "teacher"
    folder.mkdir()
    auto_map = {"AutoConfig": "code.Config", "AutoModel": "code.Model", "AutoImageProcessor": "code.Processor"}
    kind = {"model_type": "vit" if known else "mine"}
    (folder / "config.json").write_text(json.dumps(kind | {"auto_map": auto_map, "architectures": ["Model"]}))
    (folder / "preprocessor_config.json").write_text(json.dumps({"auto_map": auto_map}))
    (folder / "code.py").write_text(f"open({str(canary)!r}, 'w')\n")
    (folder / "pytorch_model.bin").write_bytes(saved({"a": PAYLOADS["os.system"](canary)}))
    arguments = [*TINY.split(), "--data", str(data), "--out", str(tmp_path / "run")]
    assert main([*arguments, "--masked.target", f"hf:{folder}"]) in (2, 4)
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("error: ")


@pytest.mark.parametrize(
    "url", ["reference://a.png", "simplecache::file:///a.png", "zip://a.png::file:///a.zip", "memory://a.png"]
)
def test_open_list__urls_that_do_more_than_read_a_file_are_refused(tmp_path: Path, url: str) -> None:
    (tmp_path / "list.txt").write_text(f"{url}\n")
    with pytest.raises(DataError, match=r"cannot be read|a URL within a URL"):
        open_all(str(tmp_path / "list.txt"))


CLIMBING = ("../elsewhere.png", "a/../../elsewhere.png", "/tmp/elsewhere.png", "a/./../../b.png")


def test_open_archive__members_are_read_where_they_lie_and_nothing_is_written(tmp_path: Path, data: Path) -> None:
    content = (data / "00.png").read_bytes()
    inner = tmp_path / "in"
    inner.mkdir()
    with zipfile.ZipFile(inner / "a.zip", "w") as archive:
        for name in (*CLIMBING, "good.png"):
            archive.writestr(name, content)
    with tarfile.open(inner / "a.tar", "w") as tar:
        for name in (*CLIMBING, "good.png"):
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
        for name, kind in (
            ("soft.png", tarfile.SYMTYPE),
            ("hard.png", tarfile.LNKTYPE),
            ("pipe.png", tarfile.FIFOTYPE),
        ):
            member = tarfile.TarInfo(name)
            member.type, member.linkname = kind, str(data / "01.png")
            tar.addfile(member)
    before = sorted(tmp_path.rglob("*"))
    for name in ("a.zip", "a.tar"):
        (source,) = open_archive(str(inner / name), Wanted(3)).values()
        names = [source.name(index) for index in range(len(source))]
        assert not [name for name in names if ".." in name or name.startswith("/")]
        assert not {"soft.png", "hard.png", "pipe.png"} & {*names}
        assert all(torch.equal(source.read(index), decode(content, Wanted(3))) for index in range(len(source)))
    assert sorted(tmp_path.rglob("*")) == before
    assert not Path("/tmp/elsewhere.png").exists()


@pytest.mark.parametrize("name", CLIMBING)
def test_open_detection__coco_paths_do_not_climb_out(
    tmp_path: Path, write_coco: Callable[..., Path], data: Path, name: str
) -> None:
    root = write_coco(tmp_path / "coco", {"a": [(0, [1.0, 1.0, 9.0, 9.0], False)]})
    for path in (root / "annotations").iterdir():
        path.write_text(path.read_text().replace('"a.png"', json.dumps(name)))
    with pytest.raises(DataError, match="a file elsewhere"):
        open_detection(str(root), Wanted(3))


def voc(root: Path, xml: str, name: str = "a") -> Path:
    (root / "ImageSets" / "Main").mkdir(parents=True)
    for folder in ("Annotations", "JPEGImages"):
        (root / folder).mkdir()
    Image.new("RGB", (20, 20)).save(root / "JPEGImages" / "a.jpg")
    (root / "Annotations" / "a.xml").write_text(xml)
    for part in ("train", "val"):
        (root / "ImageSets" / "Main" / f"{part}.txt").write_text(f"{name}\n")
    return root


OBJECT = "<object><name>{}</name><bndbox><xmin>1</xmin><ymin>1</ymin><xmax>9</xmax><ymax>9</ymax></bndbox></object>"


def laughs() -> str:
    entities = '<!ENTITY a0 "haha">' + "".join(
        f'<!ENTITY a{level} "{f"&a{level - 1};" * 10}">' for level in range(1, 12)
    )
    return f"<!DOCTYPE annotation [{entities}]><annotation>{OBJECT.format('&a11;')}</annotation>"


@pytest.mark.parametrize(
    "xml",
    [
        laughs(),
        '<!DOCTYPE a [<!ENTITY e SYSTEM "file:///etc/hostname">]><annotation>' + OBJECT.format("&e;") + "</annotation>",
        '<!DOCTYPE a [<!ENTITY % e SYSTEM "http://localhost:1/a.dtd"> %e;]><annotation>'
        + OBJECT.format("&b;")
        + "</annotation>",
    ],
    ids=["laughs", "file", "address"],
)
def test_open_detection__entities_of_xml_neither_explode_nor_read(tmp_path: Path, xml: str) -> None:
    with pytest.raises(DataError, match="not an annotation of Pascal VOC"):
        open_detection(str(voc(tmp_path / "voc", xml)), Wanted(3))


@pytest.mark.parametrize("name", ["../a", "/tmp/a", "b/../../a"])
def test_open_detection__names_of_voc_do_not_climb_out(tmp_path: Path, name: str) -> None:
    root = voc(tmp_path / "voc", f"<annotation>{OBJECT.format('cat')}</annotation>", name)
    with pytest.raises(DataError, match="an image elsewhere"):
        open_detection(str(root), Wanted(3))
