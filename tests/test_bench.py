"""The benchmarks of a step work, with networks of nothing: sides agree, and worse figures are named."""

import json
import sys
from pathlib import Path

import pytest
import torch

import dmjd
from dmjd.targets.hog import hog

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))

import counts
import race
import timing
from plain.hybrid import PlainHybrid, plain_hog
from plain.mae import TransformersMAE


def toy(name: str) -> race.Case:
    """A toy of a model, with a batch of two."""
    return race.Case.of(name, "toy", 2, threads=1)


def test_plain_hog__equals_ours() -> None:
    images = torch.randint(0, 256, (2, 3, 32, 48), dtype=torch.uint8)
    torch.testing.assert_close(plain_hog(images), hog(images))


def test_mae_of_transformers__has_our_loss_on_our_weights() -> None:
    case = toy("mae")
    for parameter in case.model.parameters():  # zeros and ones would hide a mistake
        if parameter.requires_grad:
            parameter.data += 0.05 * torch.randn_like(parameter)
    other = TransformersMAE(case.model)
    other.copy_weights(case.model)
    ours, theirs = case.model(case.images, case.tokens).total, other(case.images, case.tokens).total
    assert theirs.item() == pytest.approx(ours.item(), rel=1e-4)


def test_race__stores_all_pairs_and_replaces_a_row(tmp_path: Path) -> None:
    for pairs in (1, 3):
        race.hybrid(size="toy", batch_size=2, how=race.How(pairs=pairs, out=tmp_path))
    (row,) = json.loads((tmp_path / "hybrid.json").read_text()).values()
    assert len(row["pairs"]) == 3
    median, low, high = row["wall"]["ratio"]
    assert low <= median <= high
    assert (tmp_path / "hybrid.md").read_text().count("\n") == 3


def test_race__refuses_sides_that_compute_different_losses() -> None:
    case = toy("hybrid")
    plain = PlainHybrid(dmjd.build("dmjd", "tiny", **race.TOY))  # other weights
    with pytest.raises(SystemExit, match="disagree"):
        timing.agree(case.model(case.images, case.tokens), plain(case.images, case.tokens), "fp32")


def test_views__one_by_one_have_the_losses_of_all_at_once(tmp_path: Path) -> None:
    race.views(model="vit-4", size="toy", batch_size=2, how=race.How(pairs=1, out=tmp_path))
    assert "vit-4, toy" in (tmp_path / "views.md").read_text()


@pytest.mark.slow
def test_runs__are_seen_from_outside(tmp_path: Path) -> None:
    how = race.How(pairs=1, out=tmp_path)
    race.start(num_images=[200], how=how)
    race.overhead(batch_size=4, steps=2, num_images=100, how=how)
    (started,), (ran,) = (
        json.loads((tmp_path / f"{name}.json").read_text()).values() for name in ("start", "overhead")
    )
    assert started["memory"] > 1e8
    assert started["times"][0][1] > 1  # to import torch alone takes longer
    assert ran["sides"] == ["steps alone", "dmjd pretrain"]


def test_counts__name_what_got_worse(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "counts.json"
    counts.write(only=["hybrid-toy"], file=file)
    counts.check(file=file)
    stored = json.loads(file.read_text())
    assert stored["plain"]["hybrid-toy"]["saved_bytes"] > stored["figures"]["hybrid-toy"]["saved_bytes"]
    now = stored["figures"]["hybrid-toy"]["saved_bytes"]
    stored["figures"]["hybrid-toy"]["saved_bytes"] = now - 1000
    file.write_text(json.dumps(stored))
    capsys.readouterr()
    with pytest.raises(SystemExit):
        counts.check(only=["hybrid-toy"], file=file)
    assert f"hybrid-toy, saved_bytes: {now - 1000:,} -> {now:,}" in capsys.readouterr().out
