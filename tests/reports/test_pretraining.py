import base64
import json
import math
import re
import shutil
import subprocess
from html import escape
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from dmjd.errors import CheckpointError, ConfigError
from dmjd.reports.nearest_pictures import NearestPictures, write_nearest
from dmjd.reports.pretraining import RunRecord, key_numbers, write_report
from dmjd.reports.token_pictures import Samples, write_samples

ALWAYS = ["Key numbers", "Curves", "Settings", "How to reproduce", "How to cite", "What next"]
WITH_SAMPLES = ["Held-out images", "Nearest neighbours", "How often each token was predicted"]
NUMBERS = {
    "untrained": {"knn_top1": 0.2714, "linear_top1": 0.3341},
    "trained": {"knn_top1": 0.6127, "linear_top1": 0.7253},
}


class Page(HTMLParser):
    """The tags with their attributes, and the words of headings, paragraphs, tables and commands."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[tuple[str, str]] = []
        self.collecting = False
        self.feed(path.read_text("utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag in {"p", "h1", "h2", "h3", "td", "th", "dd", "dt", "pre"}:
            self.texts.append((tag, ""))
            self.collecting = True

    def handle_endtag(self, tag: str) -> None:
        self.collecting = self.collecting and tag != self.texts[-1][0]

    def handle_data(self, data: str) -> None:
        if self.collecting:
            tag, text = self.texts.pop()
            self.texts.append((tag, text + data))

    def all(self, *tags: str) -> list[str]:
        return [" ".join(text.split()) for tag, text in self.texts if tag in tags]


def metric_lines(steps: int = 60, *, knn: bool = True, broken_from: int | None = None) -> list[dict]:
    lines: list[dict] = []
    for step in range(1, steps + 1):
        loss = math.nan if broken_from is not None and step >= broken_from else 1 + math.exp(-step / 20)
        line = {"step": step, "epoch": step / 10, "images": step * 32, "seconds": step * 1.5, "loss": loss}
        line |= {"loss_masked": loss * 0.6, "loss_visible": loss * 0.4, "lr": 1e-3, "grad_norm": 2 + math.sin(step)}
        lines.append(line | {"images_per_second": 21.0})
        if step % 20 == 0:
            lines.append({"step": step, "epoch": step / 10, "rankme": 20.0 + step} | ({"knn_top1": 0.4} if knn else {}))
    return lines


def write_run(
    run: Path, lines: list[dict], *, summary: dict | None = None, config: str = "model:\n  name: tiny\n"
) -> Path:
    run.mkdir()
    (run / "config.yaml").write_text(config, "utf-8")
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), "utf-8")
    if summary is not None:
        (run / "summary.json").write_text(json.dumps(summary), "utf-8")
    return run


def add_samples(
    run: Path, grid: tuple[int, int], *, channels: int = 3, views: int = 2, patch: int = 16, backdrop: str = "target"
) -> torch.Tensor:
    """Write three images with their masks and pictures of noise; return how often tokens were hidden."""
    generator = torch.Generator().manual_seed(0)
    tokens, height, width = grid[0] * grid[1], grid[0] * patch, grid[1] * patch
    drawn = 1 if backdrop == "target" else channels

    def noise(*shape: int, most: int = 256) -> torch.Tensor:
        return torch.randint(0, most, shape, generator=generator)

    times = noise(40, tokens, most=views + 1)
    masked = torch.stack([torch.arange(tokens).roll(image) % 5 < 3 for image in range(3)])[:, None]
    samples = Samples(
        images=noise(3, channels, height, width).byte(),
        masked=masked.repeat(1, views, 1),
        target=noise(3, drawn, height, width).byte(),
        predicted=noise(3, views, drawn, height, width).byte(),
        errors=torch.rand(3, views, tokens, generator=generator),
        patch_colours=noise(3, 3, *grid).byte(),
        times_hidden=times,
    )
    about = {"grid": f"{grid[0]} {grid[1]}", "target": "mine", "caption": "A caption.", "backdrop": backdrop}
    write_samples(run / "samples.safetensors", samples, about)
    return times


def add_neighbours(run: Path, *, channels: int = 3, name: str = "a.png") -> None:
    """Write two images, each with three neighbours of both kinds, all pictures of noise."""
    generator = torch.Generator().manual_seed(0)

    def noise(*shape: int) -> torch.Tensor:
        return torch.randint(0, 256, (*shape, channels, 96, 64), generator=generator).byte()

    similar = torch.tensor([[0.99, 0.5, -0.25]]).repeat(2, 1)
    pictures = NearestPictures(
        queries=noise(2),
        by_features=noise(2, 3),
        features_similarity=similar,
        by_pixels=noise(2, 3),
        pixels_similarity=similar.clone(),
    )
    names = {"queries": [name, "b.png"], "by_features": [["c", "d", "e"]] * 2, "by_pixels": [["f", "g", name]] * 2}
    write_nearest(run / "neighbours.safetensors", pictures, names | {"compared": 1234})


def complete_run(run: Path, **settings: str) -> Path:
    summary = NUMBERS | {"seconds": 12034.0, "images": 2_560_000, "steps": 20_000, "parameters": 21_665_664}
    summary |= {
        "data": "/data/leaves",
        "num_images": 9469,
        "skipped": 3,
        "command": "dmjd pretrain --data /data/leaves --out r",
    }
    summary |= {"environment": {"torch": "9.9.1", "device": "abacus", "cores": 3}}
    write_run(run, metric_lines(), summary=summary, **settings)
    add_samples(run, (6, 6))
    add_neighbours(run)
    return run


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_report(complete_run(tmp_path_factory.mktemp("report") / "leaves-hog"))


def test_write_report__is_one_file_that_needs_no_other(report: Path) -> None:
    text, page = report.read_text("utf-8"), Page(report)
    assert report == report.parent / "report.html"
    assert not re.search(r"https?://|//cdn|@import|url\((?!#)", text)
    for tag, attributes in page.tags:
        assert tag != "script"
        for name in {"src", "href", "xlink:href", "srcset"} & attributes.keys():
            assert (attributes[name] or "").startswith(("data:", "#")), (tag, name)
    assert len(text.encode()) < 2_000_000


def test_write_report__inner_references_point_to_unique_ids(report: Path) -> None:
    text = report.read_text("utf-8")
    ids = re.findall(r'\sid="([^"]+)"', text)
    assert len(ids) == len(set(ids))
    assert set(re.findall(r'(?:url\(#|href="#)([^")]+)', text)) <= set(ids)


def test_write_report__says_what_was_trained_and_all_four_numbers(report: Path) -> None:
    page = Page(report)
    lead = next(text for text in page.all("p") if text.startswith("A backbone"))
    assert lead == (
        "A backbone of 21.7 M parameters pre-trained without labels on 9,469 images of /data/leaves: "
        "2.6 M images seen in 3 h 21 min; finished."
    )
    assert page.all("td") == ["27.1%", "61.3%", "+34.1 points", "33.4%", "72.5%", "+39.1 points"]
    assert page.all("h2") == [*ALWAYS[:2], *WITH_SAMPLES, *ALWAYS[2:]]
    assert {"9.9.1", "abacus", "3"} <= {*page.all("dd")}
    assert any(text.startswith("@article{") and "2301.00230" in text for text in page.all("pre"))
    assert "dmjd pretrain --data /data/leaves --out r" in page.all("pre")
    assert any(text.startswith("dmjd knn --backbone") and text.endswith("/data/leaves") for text in page.all("pre"))


def test_write_report__every_picture_has_words(report: Path) -> None:
    pictures = [attributes for tag, attributes in Page(report).tags if tag == "img"]
    assert len(pictures) == 3 * (3 + 2 * 3) + 2 * (1 + 3 + 3)
    assert all(attributes.get("alt") for attributes in pictures)
    assert len({attributes["alt"] for attributes in pictures}) == len(pictures)
    drawings = [attributes for tag, attributes in Page(report).tags if tag == "svg"]
    assert all(attributes["role"] == "img" and attributes["aria-label"] for attributes in drawings)


def test_write_report__states_the_measured_rates(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", metric_lines(), summary={})
    times = add_samples(run, (4, 4), views=3)
    words = " ".join(Page(write_report(run)).all("p"))
    assert f"The measured prediction rate is {(times >= 1).double().mean():.1%}" in words
    assert f"The measured corruption rate is {times.double().mean() / 3:.1%}" in words
    assert f"would predict {1 - (1 - times.double().mean() / 3) ** 3:.1%} of the tokens" in words


def test_write_report__one_grey_channel_on_an_oblong_grid(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", metric_lines(knn=False), summary={"trained": {"rankme": 80.04}})
    add_samples(run, (3, 5), channels=1, views=1, patch=8, backdrop="image")
    page = Page(write_report(run))
    assert page.all("td") == ["\u2013", "80.0", "\u2013"]
    assert not any("k-NN" in text for text in page.all("h3", "th"))
    uri = next(attributes["src"] for tag, attributes in page.tags if tag == "img") or ""
    png = run / "first.png"
    png.write_bytes(base64.b64decode(uri.partition(",")[2]))
    with Image.open(png) as image:
        assert (image.size, image.mode) == ((40, 24), "L")


def test_write_report__unfinished_run_says_so_and_how_to_go_on(tmp_path: Path) -> None:
    run = write_run(tmp_path / "my run", metric_lines())
    page = Page(write_report(run))
    assert page.all("h2") == ALWAYS
    assert any(text.endswith("not finished (last logged step 60).") for text in page.all("p"))
    assert page.all("td") == ["\u2013", "40.0%", "\u2013", "\u2013", "80.0", "\u2013"]
    assert any("--resume" in text and f"--out '{run}'" in text for text in page.all("pre"))
    assert "None" not in " ".join(text for _, text in page.texts)


def test_write_report__failed_run_is_shown_without_nan_as_text(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", metric_lines(broken_from=31), summary={"trained": {"knn_top1": math.nan}})
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 61, "epoch": 6.1, "knn_t')
    page = Page(write_report(run))
    assert any("failed, the loss was not finite at step 31" in text for text in page.all("p"))
    assert any("not finite at 30 logged steps" in text for text in page.all("p"))
    words = " ".join([text for _, text in page.texts] + [str(value) for _, tag in page.tags for value in tag.values()])
    assert not re.search(r"\b(nan|none|inf)\b", words.replace("fill: none", "").replace("'none'", ""), re.I)


@pytest.mark.parametrize(
    "lines", [[], metric_lines(1), metric_lines(3, broken_from=1)], ids=["none", "one", "all broken"]
)
def test_write_report__hardly_begun_run_is_shown(tmp_path: Path, lines: list[dict]) -> None:
    run = write_run(tmp_path / "run", lines)
    assert set(ALWAYS) - set(Page(write_report(run)).all("h2")) == (set() if lines else {"Curves"})


def test_write_report__escapes_what_it_shows(tmp_path: Path) -> None:
    evil = "<script>alert(1)</script>"
    run = write_run(
        tmp_path / "a<b>&c", metric_lines(), config=f"data: {evil}\n", summary={"data": evil, "command": evil}
    )
    add_neighbours(run, name=evil)
    path = write_report(run)
    assert "<script" not in path.read_text("utf-8")
    page = Page(path)
    assert f"data: {evil}" in page.all("pre")
    assert page.all("h1") == ["a<b>&c"]


def test_write_report__refuses_what_is_no_run(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"not a run directory; .*; give the directory"):
        write_report(tmp_path)


def test_write_report__leaves_the_page_of_another_verb_alone(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", metric_lines())
    for name in ("result.json", "report.html"):
        (run / name).write_text("{}")
    with pytest.raises(
        ConfigError, match=r"not a pre-training run; .*; its page report\.html stands as the verb wrote it"
    ):
        write_report(run)
    assert (run / "report.html").read_text() == "{}"


@pytest.mark.parametrize("backdrop", ["image", "target"])
def test_write_report__says_what_the_target_is_and_what_is_dimmed(tmp_path: Path, backdrop: str) -> None:
    run = write_run(tmp_path / "run", metric_lines())
    add_samples(run, (4, 4), backdrop=backdrop)
    words = " ".join(Page(write_report(run)).all("p"))
    assert "Target: mine. A caption." in words
    assert ("places that were visible are dimmed" in words) == (backdrop == "target")


def test_write_report__says_what_the_standard_deviation_of_features_means(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", metric_lines(), summary={"trained": {"feature_std": 0.8}})
    page = Page(write_report(run))
    assert "Standard deviation of features" in page.all("th")
    assert any("vary 80.0% as much in direction as features spread evenly" in text for text in page.all("p"))


@pytest.mark.parametrize("content", [b"a: [", b"- a", b"data: caf\xe9"], ids=["cut off", "a list", "not utf-8"])
def test_write_report__names_broken_settings(content: bytes, tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", metric_lines())
    (run / "config.yaml").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"no settings; .*config\.yaml; restore the file"):
        write_report(run)


def test_write_report__names_broken_pictures(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", metric_lines())
    (run / "samples.safetensors").write_bytes(b"broken")
    with pytest.raises(CheckpointError, match=r"broken pictures.*samples\.safetensors"):
        write_report(run)


def test_write_report__names_broken_neighbours(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", metric_lines())
    (run / "neighbours.safetensors").write_bytes(b"broken")
    with pytest.raises(CheckpointError, match=r"broken pictures.*neighbours\.safetensors"):
        write_report(run)


@pytest.mark.parametrize("channels", [1, 3])
def test_write_report__shows_neighbours_with_their_names_and_likeness(tmp_path: Path, channels: int) -> None:
    run = write_run(tmp_path / "run", metric_lines())
    add_neighbours(run, channels=channels)
    page = Page(write_report(run))
    assert any("the nearest of 1,234 training images" in text for text in page.all("p"))
    named = [attributes["title"] for tag, attributes in page.tags if tag == "img"]
    assert named == ["a.png", "c", "d", "e", "f", "g", "a.png", "b.png", "c", "d", "e", "f", "g", "a.png"]
    assert (run / "report.html").read_text().count("<figcaption>-0.250</figcaption>") == 4


def test_write_report__a_run_of_before_without_errors_and_features_is_shown(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", metric_lines())
    add_samples(run, (4, 4))
    path = run / "samples.safetensors"
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    save_file({k: v for k, v in load_file(path).items() if k not in ("errors", "patch_colours")}, path, metadata)
    page = Page(write_report(run))
    assert len([tag for tag, _ in page.tags if tag == "img"]) == 3 * (2 + 2 * 2)
    assert not any(text.startswith(("Error:", "Features:")) for text in page.all("p"))


@pytest.mark.parametrize(
    ("config", "flag"), [("epochs: 40.0", "--epochs 80"), ("epochs: 40.0\nsteps: 5", "--steps 10"), ("{}", "--epochs")]
)
def test_write_report__says_how_to_train_a_finished_run_for_longer(tmp_path: Path, config: str, flag: str) -> None:
    run = write_run(tmp_path / "run", metric_lines(), summary=NUMBERS, config=config)
    (command,) = (text for text in Page(write_report(run)).all("pre") if "--resume" in text)
    assert f"--resume {flag}" in command


def test_write_report__names_pictures_of_another_version(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", metric_lines())
    save_file({"images": torch.zeros(1, 3, 8, 8)}, run / "samples.safetensors", {"grid": "2 2"})
    with pytest.raises(CheckpointError, match="broken pictures"):
        write_report(run)


def test_write_report__sends_a_run_without_labels_to_other_images_for_knn(tmp_path: Path) -> None:
    for labels, expected in ((True, "--data photos"), (False, "--data LABELLED")):
        run = write_run(tmp_path / str(labels), metric_lines(), summary={"data": "photos", "labels": labels})
        (command,) = (text for text in Page(write_report(run)).all("pre") if text.startswith("dmjd knn"))
        assert command.endswith(expected)


def test_write_report__stays_small_for_long_runs_and_many_pictures(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", metric_lines(20_000), summary=NUMBERS)
    add_samples(run, (24, 24), views=4, backdrop="image")
    add_neighbours(run)
    assert write_report(run).stat().st_size < 2_000_000


def test_write_report__same_run_same_bytes(tmp_path: Path) -> None:
    run = complete_run(tmp_path / "run")
    assert write_report(run).read_bytes() == write_report(run).read_bytes()


def test_key_numbers__what_is_below_zero_has_a_minus_sign() -> None:
    facts = {"untrained": {"explained": -1.25}, "trained": {"explained": 0.5}}
    assert [row["untrained"] for row in key_numbers(RunRecord("run", [], facts, {}))] == ["\u2212125.0%"]


def test_key_numbers__a_loss_is_shown_as_a_loss() -> None:
    facts = {"untrained": {"knn_top1": 0.5}, "trained": {"knn_top1": 0.45}}
    assert [row["difference"] for row in key_numbers(RunRecord("run", [], facts, {}))] == ["\u22125.0\u00a0points"]


# -- in a real browser -------------------------------------------------------------------------------------------------

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
browser = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium or Chrome on this machine to open the report with")
PROBE = """<script>addEventListener("load", () => {
  const pictures = [...document.images], drawings = [...document.querySelectorAll("main svg")];
  const out = parent.document.createElement("pre");
  out.id = "probe";
  out.textContent = JSON.stringify({
    wide: document.documentElement.scrollWidth, window: innerWidth, pictures: pictures.length,
    broken: pictures.filter(p => !p.complete || !p.naturalWidth).length,
    squeezed: [...pictures, ...drawings].filter(e => e.getBoundingClientRect().width < 100).length,
    headings: [...document.querySelectorAll("h2")].map(h => h.textContent)});
  parent.document.body.append(out);
})</script></body>"""


def open_page(page: Path, folder: Path, size: tuple[int, int], *options: str) -> str:
    """Load a page in headless Chromium with an empty profile and return what it prints."""
    quiet = "--disable-quic --no-first-run --disable-background-networking --disable-component-update --disable-sync"
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", *quiet.split()]
    place = [f"--user-data-dir={folder}", f"--window-size={size[0]},{size[1]}"]
    command = [str(CHROMIUM), *flags, *place, *options, page.as_uri()]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout


@browser
@pytest.mark.parametrize("size", [(390, 844), (1280, 900)], ids=["phone", "desktop"])
def test_report__in_a_browser_fits_and_shows_every_picture(report: Path, tmp_path: Path, size: tuple[int, int]) -> None:
    text = re.sub(r"<meta http-equiv[^>]+>", "", report.read_text("utf-8"))  # the policy forbids scripts: ours too
    probed = tmp_path / "probed.html"
    inner = escape(text.replace("</body>", PROBE))  # in a frame: a window is never narrower than 500 px
    frame = f'<iframe width="{size[0]}" height="{size[1]}" style="border: 0" srcdoc="{inner}"></iframe>'
    probed.write_text(f"<!doctype html><meta charset=utf-8><body>{frame}</body>", "utf-8")
    dom = open_page(probed, tmp_path / "profile", size, "--dump-dom")
    found = json.loads(re.findall(r'<pre id="probe">(.+?)</pre>', dom)[-1])
    assert found["window"] == size[0]
    assert found["wide"] <= found["window"]
    assert found["headings"] == [*ALWAYS[:2], *WITH_SAMPLES, *ALWAYS[2:]]
    assert (found["pictures"], found["broken"], found["squeezed"]) == (41, 0, 0)


@browser
@pytest.mark.parametrize("theme", ["dark", "light"])
def test_report__in_a_browser_follows_the_theme(report: Path, tmp_path: Path, theme: str) -> None:
    shot = tmp_path / "shot.png"
    setting = f"--blink-settings=preferredColorScheme={['dark', 'light'].index(theme)}"
    open_page(report, tmp_path / "profile", (390, 844), f"--screenshot={shot}", setting)
    with Image.open(shot) as image:
        grey = np.asarray(image.convert("L"), float)
    assert grey.shape == (844, 390)
    background = np.median(grey)
    assert background < 40 if theme == "dark" else background > 230
    assert np.abs(grey - background).max() > 180  # text that stands out
