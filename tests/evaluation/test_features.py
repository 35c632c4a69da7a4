"""What features are worth: neighbours, linear classifiers and rank, against other programs and by hand."""

import warnings
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
import torch
from in_two import in_two
from sklearn.neighbors import KNeighborsClassifier

from dmjd.data.source import open_all
from dmjd.engine.distributed import Ranks
from dmjd.evaluation.features import FeatureExtractor
from dmjd.evaluation.knn import knn_top1, knn_votes
from dmjd.evaluation.linear import choose_penalty, linear_top1, logistic_regression
from dmjd.evaluation.rank import feature_std, rankme


@pytest.mark.parametrize(("k", "temperature"), [(1, 0.07), (7, 0.07), (20, 0.5), (500, 0.1)])
def test_knn_votes__agree_with_scikit_learn(k: int, temperature: float) -> None:
    generator = torch.Generator().manual_seed(k)
    bank, queries = (torch.randn(count, 8, generator=generator) for count in (120, 60))
    labels = torch.randint(0, 5, (120,), generator=generator)
    reference = KNeighborsClassifier(
        min(k, 120), metric="cosine", weights=lambda distance: np.exp((1 - distance) / temperature)
    ).fit(bank.double().numpy(), labels.numpy())
    shares = knn_votes(bank, labels, queries, k=k, temperature=temperature, max_similarities=25 * 120)
    expected = torch.from_numpy(reference.predict_proba(queries.double().numpy())).float()
    torch.testing.assert_close(shares, expected, atol=1e-4, rtol=1e-4)


def test_knn_top1__is_the_share_of_right_answers() -> None:
    bank, labels = torch.eye(4), torch.arange(4)
    assert knn_top1(bank, labels, bank, torch.tensor([0, 1, 2, 0]), k=1) == 0.75


def test_linear_top1__separates_what_a_plane_separates() -> None:
    generator = torch.Generator().manual_seed(0)
    points = torch.randn(200, 6, generator=generator)
    labels = (points @ torch.randn(6, generator=generator) > 0).long()
    assert linear_top1(points[:150], labels[:150], points[150:], labels[150:]) > 0.8


@pytest.mark.parametrize("rank", [1, 3, 8])
def test_rankme__of_r_equal_directions_is_r(rank: int) -> None:
    left, right = (torch.linalg.qr(torch.randn(size, size, dtype=torch.float64))[0] for size in (40, 8))
    assert rankme((left[:, :rank] @ right[:rank]).float()) == pytest.approx(rank, abs=1e-3)


def test_rankme__of_unequal_directions_is_less() -> None:
    weak = torch.diag(torch.tensor([1.0, 1.0, 0.1]))
    assert 2 < rankme(weak) < 3


def test_rankme__of_collapsed_features_is_one() -> None:
    assert rankme(torch.ones(10, 4)) == pytest.approx(1, abs=1e-4)
    assert rankme(torch.zeros(10, 4)) == pytest.approx(1, abs=1e-4)


def test_feature_std__is_one_where_features_point_everywhere_and_nought_where_they_point_one_way() -> None:
    everywhere = torch.randn(20_000, 8, generator=torch.Generator().manual_seed(0))
    assert feature_std(everywhere) == pytest.approx(1, abs=0.01)
    assert feature_std(torch.rand(50, 1) * torch.ones(1, 8)) == pytest.approx(0, abs=1e-6)


def test_logistic_regression__is_scikit_learns_and_unseen_classes_get_nothing() -> None:
    from sklearn.linear_model import LogisticRegression

    generator = torch.Generator().manual_seed(0)
    bank, queries = torch.randn(80, 6, generator=generator), torch.randn(20, 6, generator=generator)
    labels = (bank[:, 0] > 0).long() * 3
    shares = logistic_regression(bank, labels, queries, num_classes=5, penalty=2.0)
    mean, deviation = bank.double().mean(0), bank.double().std(0, correction=0)
    reference = LogisticRegression(C=0.5, tol=1e-6).fit(((bank - mean) / deviation).numpy(), labels.numpy())
    expected = torch.from_numpy(reference.predict_proba(((queries - mean) / deviation).numpy())).float()
    torch.testing.assert_close(shares[:, [0, 3]], expected, atol=2e-2, rtol=0)
    assert (shares[:, [1, 2, 4]] == 0).all()


def test_choose_penalty__noisy_labels_get_a_large_one_and_single_images_the_default() -> None:
    generator = torch.Generator().manual_seed(0)
    features, labels = torch.randn(400, 60, generator=generator), torch.arange(400) % 2
    features[:, 0] += labels * 1.5
    assert choose_penalty(features, labels, 0) > 1
    assert choose_penalty(torch.eye(3), torch.arange(3), 0) == 1.0


def test_choose_penalty__few_clean_labels_do_not_get_one_that_drowns_them() -> None:
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(31) % 3
    features = torch.randn(31, 40, generator=generator) + 4 * torch.eye(40)[labels]
    penalty = choose_penalty(features, labels, 0)
    queries = torch.randn(300, 40, generator=generator) + 4 * torch.eye(40)[torch.arange(300) % 3]
    shares = logistic_regression(features, labels, queries, num_classes=3, penalty=penalty)
    assert penalty <= 10
    assert (shares.argmax(dim=1) == torch.arange(300) % 3).float().mean() > 0.8


def test_choose_penalty__one_image_that_is_surely_taken_for_the_other_class_counts_as_one() -> None:
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(400) % 2
    features = torch.randn(400, 16, generator=generator) + labels[:, None]
    features[0] = 16.0  # of the first class, but far on the side of the second: its share rounds to 0
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert choose_penalty(features, labels, 0) < 1000


@dataclass(frozen=True)
class NotingRanks(Ranks):
    """One rank that notes what the first does before the others, and what each would send to all."""

    noted: list[str] = field(default_factory=list)

    def main_first(self, work):
        self.noted.append("first")
        return super().main_first(work)

    def gather(self, item):
        self.noted.append("to all")
        return super().gather(item)


@pytest.mark.parametrize(("dtype", "times"), [("uint8", 1), ("uint16", 2)])
def test_open__the_first_rank_finds_a_set_before_the_others(
    dtype: str, times: int, backbones: dict[str, Path], tmp_path: Path
) -> None:
    np.save(tmp_path / "images.npy", np.full((3, 9, 8, 3), 200, dtype))
    extractor = FeatureExtractor(str(backbones["vit"]), ranks=NotingRanks(torch.device("cpu")))
    found = []

    def find(wanted):
        found.append(len(extractor.ranks.noted))
        return open_all(str(tmp_path / "images.npy"), wanted)

    extractor.open(find)
    assert found == [*range(1, times + 1)]


def test_open__a_given_range_is_that_of_the_images_even_if_it_is_that_of_bytes(
    backbones: dict[str, Path], tmp_path: Path
) -> None:
    dark = np.random.default_rng(0).uniform(0, 100, (3, 9, 8, 3)).astype(np.float32)
    np.save(tmp_path / "images.npy", dark)
    for given in ((0.0, 255.0), (0.0, 510.0)):
        extractor = FeatureExtractor(str(backbones["vit"]), ranks=Ranks(torch.device("cpu")), value_range=given)
        (images,) = extractor.open(lambda wanted: open_all(str(tmp_path / "images.npy"), wanted))
        np.testing.assert_allclose(images.read(0).permute(1, 2, 0), dark[0] * (255 / given[1]), rtol=1e-5)
        assert extractor.value_range == given


def test_stream__what_is_seen_goes_to_the_first_rank_alone(backbones: dict[str, Path], tmp_path: Path) -> None:
    np.save(tmp_path / "images.npy", np.zeros((5, 9, 8, 3), np.uint8))
    extractor = FeatureExtractor(str(backbones["vit"]), ranks=NotingRanks(torch.device("cpu")), workers=0)
    (images,) = extractor.open(lambda wanted: open_all(str(tmp_path / "images.npy"), wanted))
    seen = list(extractor.stream(extractor.pooled, images, batch_size=2))
    assert [(each.numbers, each.end) for each in seen] == [([0, 1], 2), ([2, 3], 4), ([4], 5)]
    assert "to all" not in extractor.ranks.noted


def test_features__of_two_ranks_are_those_of_one_in_the_order_of_the_images(
    backbones: dict[str, Path], tmp_path: Path
) -> None:
    np.save(tmp_path / "images.npy", np.random.default_rng(0).integers(0, 256, (7, 9, 8, 3), dtype=np.uint8))

    def features(ranks: Ranks) -> tuple[torch.Tensor, list[int]]:
        extractor = FeatureExtractor(str(backbones["vit"]), ranks=ranks, workers=0)
        (images,) = open_all(str(tmp_path / "images.npy"), extractor.wanted)
        return extractor.features(images, batch_size=2)

    (alone, numbers), (together, others) = features(Ranks(torch.device("cpu"))), in_two(features)
    assert numbers == others == [*range(7)]
    torch.testing.assert_close(alone, together)


def test_feature_extractor__what_it_does_not_know_is_refused(backbones: dict[str, Path]) -> None:
    with pytest.raises(TypeError, match="data_pages"):
        FeatureExtractor(str(backbones["vit"]), ranks=Ranks(torch.device("cpu")), data_pages="bands")
