"""What an evaluation on the way looks at is what it says that it looks at."""

from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial

import pytest
import torch
from torch import Tensor

import dmjd
from dmjd.data.decode import Reduce
from dmjd.data.source import Parts
from dmjd.engine.distributed import ParallelModel, Ranks
from dmjd.evaluation.monitor import Monitor
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
        return torch.randint(256, (3, 32, 32), dtype=torch.uint8)


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


def test_measure__a_set_of_one_image_has_no_spread(model: ParallelModel) -> None:
    alone = ReadImages(1)
    masks = partial(seeded_masks, grid=(4, 4), block=1, num_views=1, mask_ratio=0.75, predict_ratio=0.75)
    found = Monitor(Parts(alone, alone), (32, 32), masks, max_images=10, workers=0).measure(model, nullcontext)
    assert found.keys() == {"explained", "explained_train"}
