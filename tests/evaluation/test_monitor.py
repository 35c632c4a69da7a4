"""What an evaluation on the way looks at is what it says that it looks at."""

from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial

import pytest
import torch
from torch import Tensor

import dmjd
from dmjd.data.decode import Reduce
from dmjd.data.source import Parts, evenly, labels_of
from dmjd.engine.distributed import ParallelModel, Ranks
from dmjd.evaluation.knn import knn_top1
from dmjd.evaluation.linear import linear_top1
from dmjd.evaluation.monitor import Monitor
from dmjd.evaluation.rank import Explained, feature_std, rankme
from dmjd.masking import seeded_masks

TINY = {"patch_size": 8, "embed_dim": 16, "depth": 1, "num_heads": 2, "decoder_embed_dim": 16, "decoder_depth": 1}


@dataclass(frozen=True)
class ReadImages:
    """Images of noise, of two classes or of none, that remember which of them were read."""

    count: int
    classes: tuple[str, ...] = ()
    address: str = "noise"
    in_memory: bool = True
    read_ones: list[int] = field(default_factory=list)

    def __len__(self) -> int:
        return self.count

    def name(self, index: int) -> str:
        return str(index)

    def label(self, index: int) -> int | None:
        return index % 2 if self.classes else None

    def read(self, index: int, reduce: Reduce | None = None) -> Tensor:
        self.read_ones.append(index)
        generator = torch.Generator().manual_seed(1000 * self.count + index)
        return torch.randint(256, (3, 32, 32), dtype=torch.uint8, generator=generator)


@pytest.fixture(scope="module")
def model() -> ParallelModel:
    return ParallelModel(dmjd.build("mae", image_size=32, decoder_num_heads=2, **TINY), Ranks(torch.device("cpu")))


@pytest.mark.parametrize("held_out", [3, 25])
@pytest.mark.parametrize("classes", [(), ("a", "b")])
@pytest.mark.parametrize("held_out_classes", [(), ("a", "b")])
def test_num_images__is_what_measure_reads(
    classes: tuple[str, ...], held_out_classes: tuple[str, ...], held_out: int, model: ParallelModel
) -> None:
    parts = Parts(ReadImages(40, classes), ReadImages(held_out, held_out_classes), "val")
    masks = partial(seeded_masks, grid=(4, 4), block=1, num_views=1, mask_ratio=0.75, predict_ratio=0.75)
    monitor = Monitor(parts, (32, 32), masks, max_images=10, workers=0)
    found = monitor.measure(model, nullcontext)
    assert ("knn_top1" in found) == bool(classes and held_out_classes)
    assert monitor.num_images == len(parts.train.read_ones) + len(parts.held_out.read_ones)


@pytest.mark.parametrize("preset", ["dm", "dmjd"])
def test_measure__has_the_visible_tokens_where_there_is_a_visible_branch(preset: str) -> None:
    model = dmjd.build(preset, "tiny", model_backbone="vit", image_size=32, decoder_num_heads=2, **TINY)
    parts = Parts(ReadImages(8), ReadImages(8), "val")
    masks = partial(seeded_masks, grid=(4, 4), block=1, num_views=2, mask_ratio=0.5, predict_ratio=1.0)
    monitor = Monitor(parts, (32, 32), masks, max_images=8, workers=0)
    found = monitor.measure(ParallelModel(model, Ranks(torch.device("cpu"))), nullcontext)
    assert ("explained_visible" in found) == (preset == "dmjd")


def share(predicted: Tensor, target: Tensor) -> float:
    explained = Explained()
    explained.add(predicted, target)
    return explained.share


@pytest.mark.parametrize("held_out", [8, 25])
def test_measure__each_number_is_that_of_its_part_without_dropout(held_out: int) -> None:
    network = dmjd.build("dmjd", "tiny", model_backbone="vit", image_size=32, decoder_num_heads=2, **TINY)
    network.encoder.backbone.pos_drop.p = 0.5
    parts = Parts(ReadImages(40, ("a", "b")), ReadImages(held_out, ("a", "b")), "val")
    masks = partial(seeded_masks, grid=(4, 4), block=1, num_views=2, mask_ratio=0.5, predict_ratio=1.0)
    monitor = Monitor(parts, (32, 32), masks, max_images=23, workers=0)
    found = monitor.measure(ParallelModel(network, Ranks(torch.device("cpu"))), nullcontext, probe=True)
    assert network.training
    network.eval().requires_grad_(False)
    numbers = [evenly(len(part), 23) for part in parts]
    images = [torch.stack([*map(part.read, each)]) for part, each in zip(parts, numbers, strict=True)]
    train, held = (network.predict(*each) for each in zip(images, map(masks, map(torch.tensor, numbers)), strict=True))
    bank, shown = map(network.features, images)
    known = (bank, labels_of(parts.train, numbers[0]), shown, labels_of(parts.held_out, numbers[1]))
    spread = shown if held_out > 20 else bank
    assert found == pytest.approx(
        {
            "explained_train": share(train.masked, train.masked_target),
            "explained": share(held.masked, held.masked_target),
            "explained_visible": share(held.visible, held.visible_target),
            "rankme": rankme(spread),
            "feature_std": feature_std(spread),
            "knn_top1": knn_top1(*known),
            "linear_top1": linear_top1(*known),
        },
        rel=1e-4,
    )


def test_measure__a_set_of_one_image_has_no_spread(model: ParallelModel) -> None:
    alone = ReadImages(1)
    masks = partial(seeded_masks, grid=(4, 4), block=1, num_views=1, mask_ratio=0.75, predict_ratio=0.75)
    found = Monitor(Parts(alone, alone), (32, 32), masks, max_images=10, workers=0).measure(model, nullcontext)
    assert found.keys() == {"explained", "explained_train"}
