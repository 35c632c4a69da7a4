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
from PIL import Image
from safetensors.numpy import save_file

from dmjd.errors import CheckpointError
from dmjd.reports.page import (
    Layout,
    compact,
    duration,
    hog_picture,
    key_numbers,
    patchify,
    pixel_picture,
    read_metrics,
    smoothed,
    thinned,
    unpatchify,
    write_report,
)

ALWAYS = ["Key numbers", "Curves", "Settings", "How to reproduce", "What next"]
WITH_SAMPLES = ["PackedImages-out images", "How often each token was predicted"]
NUMBERS = {
    "untrained": {"knn_top1": 0.2714, "linear_top1": 0.3341},
    "trained": {"knn_top1": 0.6127, "linear_top1": 0.7253},
}
MEAN, STD = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])


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


def write_samples(
    run: Path, kind: str, grid: tuple[int, int], *, channels: int = 3, views: int = 2, patch: int = 16
) -> np.ndarray:
    rng = np.random.default_rng(0)
    tokens, width = grid[0] * grid[1], {"hog": 36 * channels}.get(kind, patch * patch * channels)
    masked = np.stack([rng.permuted(np.arange(tokens)[None] % 5 < 3, axis=1).repeat(views, 0) for _ in range(3)])
    target = rng.normal(size=(3, tokens, width)).astype(np.float32)
    times = rng.integers(0, views + 1, (40, tokens)).astype(np.int32)
    tensors = {
        "images": rng.integers(0, 256, (3, channels, grid[0] * patch, grid[1] * patch), np.uint8),
        "masked": masked.astype(np.uint8),
        "target": target,
        "predicted": (target[:, None] * masked[..., None]).astype(np.float32),
        "times_hidden": times,
    }
    metadata = {"grid": f"{grid[0]} {grid[1]}", "patch_size": str(patch), "target": kind, "cell_size": "8"}
    metadata |= {"mean": " ".join(["0.5"] * channels), "std": " ".join(["0.25"] * channels)}
    save_file(
        {name: np.ascontiguousarray(value) for name, value in tensors.items()}, run / "samples.safetensors", metadata
    )
    return times


def complete_run(run: Path, **settings: str) -> Path:
    summary = NUMBERS | {"seconds": 12034.0, "images": 2_560_000, "steps": 20_000, "parameters": 21_665_664}
    summary |= {
        "data": "/data/leaves",
        "num_images": 9469,
        "skipped": 3,
        "command": "dmjd pretrain --data /data/leaves --out r",
    }
    write_run(run, metric_lines(), summary=summary, **settings)
    write_samples(run, "hog", (6, 6))
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
    assert "dmjd pretrain --data /data/leaves --out r" in page.all("pre")
    assert any(text.startswith("dmjd knn --backbone") and text.endswith("/data/leaves") for text in page.all("pre"))


def test_write_report__every_picture_has_words(report: Path) -> None:
    pictures = [attributes for tag, attributes in Page(report).tags if tag == "img"]
    assert len(pictures) == 3 * (2 + 2 * 2)
    assert all(attributes.get("alt") for attributes in pictures)
    assert len({attributes["alt"] for attributes in pictures}) == len(pictures)
    drawings = [attributes for tag, attributes in Page(report).tags if tag == "svg"]
    assert all(attributes["role"] == "img" and attributes["aria-label"] for attributes in drawings)


def test_write_report__states_the_measured_rates(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", metric_lines(), summary={})
    times = write_samples(run, "pixels", (4, 4), views=3)
    words = " ".join(Page(write_report(run)).all("p"))
    assert f"The measured prediction rate is {np.mean(times >= 1):.1%}" in words
    assert f"The measured corruption rate is {times.mean() / 3:.1%}" in words
    assert f"would predict {1 - (1 - times.mean() / 3) ** 3:.1%} of the tokens" in words


def test_write_report__one_grey_channel_on_an_oblong_grid(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", metric_lines(knn=False), summary={"trained": {"rankme": 80.04}})
    write_samples(run, "normalized_pixels", (3, 5), channels=1, views=1, patch=8)
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
    path = write_report(run)
    assert "<script" not in path.read_text("utf-8")
    page = Page(path)
    assert f"data: {evil}" in page.all("pre")
    assert page.all("h1") == ["a<b>&c"]


def test_write_report__refuses_what_is_no_run(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="not a run directory"):
        write_report(tmp_path)


def test_write_report__names_broken_pictures(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", metric_lines())
    (run / "samples.safetensors").write_bytes(b"broken")
    with pytest.raises(CheckpointError, match=r"broken pictures.*samples\.safetensors"):
        write_report(run)


def test_write_report__sends_a_run_without_labels_to_other_images_for_knn(tmp_path: Path) -> None:
    for labels, expected in ((True, "--data photos"), (False, "--data LABELLED")):
        run = write_run(tmp_path / str(labels), metric_lines(), summary={"data": "photos", "labels": labels})
        (command,) = (text for text in Page(write_report(run)).all("pre") if text.startswith("dmjd knn"))
        assert command.endswith(expected)


def test_write_report__stays_small_for_long_runs_and_many_pictures(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", metric_lines(20_000), summary=NUMBERS)
    write_samples(run, "pixels", (24, 24), views=4)
    assert write_report(run).stat().st_size < 2_000_000


def test_write_report__same_run_same_bytes(tmp_path: Path) -> None:
    run = complete_run(tmp_path / "run")
    assert write_report(run).read_bytes() == write_report(run).read_bytes()


def test_read_metrics__later_line_of_a_resumed_step_counts(tmp_path: Path) -> None:
    lines = [{"step": 2, "loss": 5.0}, {"step": 1, "loss": 9.0}, {"step": 2, "rankme": 3.0}, {"step": 2, "loss": 4.0}]
    (tmp_path / "m.jsonl").write_text("\n".join(map(json.dumps, lines)) + '\n{"step": 3')
    assert read_metrics(tmp_path / "m.jsonl") == [lines[1], lines[2], lines[3]]


def test_key_numbers__a_loss_is_shown_as_a_loss() -> None:
    facts = {"untrained": {"knn_top1": 0.5}, "trained": {"knn_top1": 0.45}}
    assert [row["difference"] for row in key_numbers(facts, [])] == ["\u22125.0\u00a0points"]


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(42.0, "42 s"), (600.0, "10 min"), (3600.0, "1 h 0 min"), (12034.0, "3 h 21 min"), (72e4, "200 h")],
)
def test_duration__reads_naturally(seconds: float, text: str) -> None:
    assert duration(seconds).replace("\u00a0", " ") == text


@pytest.mark.parametrize(("value", "text"), [(0.3, "0.3"), (12.0, "12"), (9469.0, "9,469"), (21_665_664.0, "21.7 M")])
def test_compact__reads_naturally(value: float, text: str) -> None:
    assert compact(value).replace("\u00a0", " ") == text


def test_thinned__keeps_the_spike_and_the_ends() -> None:
    values = np.zeros(10_000)
    values[4321] = 1
    kept = thinned(values)
    assert {0, 4321, 9999} <= set(kept.tolist())
    assert len(kept) <= 502


def test_smoothed__a_constant_stays_itself() -> None:
    np.testing.assert_allclose(smoothed(np.full(50, 3.0), 7), 3.0)


def test_unpatchify__undoes_patchify() -> None:
    image = np.random.default_rng(0).normal(size=(3, 24, 40))
    np.testing.assert_array_equal(unpatchify(patchify(image, 8), (3, 5), 8), image)


@pytest.mark.parametrize("kind", ["pixels", "normalized_pixels"])
def test_pixel_picture__perfect_prediction_is_the_image(kind: str) -> None:
    image = np.random.default_rng(0).integers(0, 256, (3, 32, 48), np.uint8)
    image[:, :16, :16] = 77  # a flat patch has no contrast to divide by
    tokens = patchify((image / 255 - MEAN[:, None, None]) / STD[:, None, None], 16)
    if kind == "normalized_pixels":
        tokens = (tokens - tokens.mean(-1, keepdims=True)) / np.sqrt(tokens.var(-1, ddof=1, keepdims=True) + 1e-6)
    layout = Layout(target=kind, grid=(2, 3), patch_size=16, mean=tuple(MEAN), std=tuple(STD))
    picture = pixel_picture(tokens.astype(np.float32), image, layout)
    assert np.abs(picture.astype(int) - image).max() <= 1


@pytest.mark.parametrize("bin_index", range(9))
def test_hog_picture__stroke_is_perpendicular_to_the_gradient(bin_index: int) -> None:
    cells = np.zeros((1, 2, 2, 2, 9, 3), np.float32)  # token row and column, cell row and column, bin, channel
    cells[0, 1, 0, 1, bin_index] = 3.0
    layout = Layout(target="hog", grid=(1, 2), patch_size=16)
    picture = hog_picture(cells.reshape(2, -1), layout)[0].astype(float)
    size = picture.shape[0] // 2
    star = picture[:size, 3 * size :]
    assert picture.shape == (2 * size, 4 * size)
    assert picture.sum() == star.sum() > 0
    row, column = np.mgrid[:size, :size] - size // 2
    moments = np.array([[(star * column * column).sum(), (star * column * row).sum()], [0, (star * row * row).sum()]])
    along = np.linalg.eigh(moments, UPLO="U")[1][:, 1]
    gradient = np.deg2rad(20 * bin_index + 10)
    assert abs(along @ [np.cos(gradient), np.sin(gradient)]) < 0.1


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
    assert (found["pictures"], found["broken"], found["squeezed"]) == (18, 0, 0)


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
