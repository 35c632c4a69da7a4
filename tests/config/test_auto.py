"""The rules of `--preset auto`."""

import pytest

from dmjd.config import auto
from dmjd.config.auto import Facts, Given
from dmjd.config.common import OptimSettings

MASKING = {"num_views": 2, "mask_ratio": 0.6, "predict_ratio": 1.0}


def facts(num_images=3000, side=256, in_chans=3, kind="cpu", minutes=30.0):
    return Facts(num_images, side, in_chans, kind, minutes)


@pytest.mark.parametrize("kind", ["cpu", "gpu"])
@pytest.mark.parametrize("side", [1, 20, 32, 33, 50, 64, 97, 128, 200, 224, 4000])
def test_networks__patches_divide_an_image_no_larger_than_those_of_the_set(kind, side):
    for network in auto.networks(facts(side=side, kind=kind), {}):
        model = network["model"]
        image = int(model["image_size"])
        assert image <= max(side, 32)
        assert image % model["patch_size"] == 0
        assert image // model["patch_size"] <= auto.TOKENS[kind]
        assert model["patch_size"] >= auto.SMALLEST_PATCH


@pytest.mark.parametrize(
    ("own", "size"),
    [
        ({"model.image_size": "64"}, ("64", 8)),
        ({"model.image_size": 100}, ("100", 20)),
        ({"model.image_size": "96x64"}, ("96x64", 16)),
        ({"model.image_size": "10000"}, ("10000", 1000)),
        ({"model.patch_size": "16"}, ("96", 16)),
        ({"model.patch_size": 14}, ("84", 14)),
        ({"model.patch_size": 200}, ("200", 200)),
        ({"model.image_size": "64", "model.patch_size": "4"}, ("64", 4)),
        ({"model.backbone": "convvit"}, ("96", 16)),
        ({"model.backbone": "convvit", "model.image_size": "64"}, ("64", 8)),
        ({"model.backbone": "vit", "model.patch_size": "no number"}, ("96", 12)),
    ],
    ids=str,
)
def test_networks__heed_the_sizes_that_a_user_gives(own, size):
    for network in auto.networks(facts(), own):
        assert (network["model"]["image_size"], network["model"]["patch_size"]) == size


def test_networks__one_that_a_user_names_is_the_only_one():
    (network,) = auto.networks(facts(), {}, Given({"patch_size": 14}, 300))
    assert network["model"] == {"image_size": "84", "patch_size": 14, "in_chans": 3}
    assert network["decoder"] == auto.NETWORKS[2][1]  # of the first that is as wide


@pytest.mark.parametrize(("size", "width"), [("tiny", 128), ("small", 256), ("base", 512), ("large", 512)])
@pytest.mark.parametrize("num_images", [5, 3000])
def test_networks__a_size_that_a_user_gives_has_its_own_shape_and_decoder(size, width, num_images):
    (network,) = auto.networks(facts(num_images=num_images), {"model.size": size})
    assert "embed_dim" not in network["model"]
    assert network["decoder"]["embed_dim"] == width


def test_networks__of_a_handful_of_images_the_smallest_one_alone_comes_into_question():
    assert len(auto.networks(facts(num_images=5), {})) == 1


def test_networks__have_the_channels_of_the_set():
    assert {network["model"]["in_chans"] for network in auto.networks(facts(in_chans=12), {})} == {12}


def test_epochs__fill_the_minutes_and_no_image_is_seen_more_often_than_published_recipes_show_it():
    assert auto.epochs(facts(num_images=3000, minutes=30.0), 0.005, 1) == 120
    assert auto.epochs(facts(num_images=20, minutes=30.0), 0.005, 2) == auto.MOST / 2


@pytest.mark.parametrize("kind", ["cpu", "gpu"])
@pytest.mark.parametrize("count", [0.5, 10.0, 300.0])
def test_schedule__steps_grow_with_the_run_within_bounds_and_rates_with_steps(kind, count):
    chosen = auto.schedule(facts(num_images=50_000, kind=kind), count, MASKING)
    fewest, most = auto.ROWS[kind]
    assert fewest <= 2 * chosen["batch_size"] <= most
    lr = chosen["optim"]["blr"] * chosen["batch_size"] / MASKING["mask_ratio"] / 256
    assert lr <= auto.HIGHEST_RATE * 1.01
    assert lr == pytest.approx(min(5e-4 * (2 * chosen["batch_size"] / 64) ** 0.5, auto.HIGHEST_RATE), rel=0.01)
    assert chosen["optim"]["warmup_epochs"] == pytest.approx(count / 20, rel=0.01)


def test_schedule__a_step_has_no_more_images_than_the_set():
    assert auto.schedule(facts(num_images=5), 1000.0, MASKING)["batch_size"] == 5


def test_schedule__the_longest_run_may_warm_up_for_its_share():
    optim = auto.schedule(facts(num_images=1), 1_000_000.0, MASKING)["optim"]
    assert OptimSettings(**optim).warmup_epochs == 50_000


@pytest.mark.parametrize(("num_images", "parts", "batch_size"), [(13, 2, 12), (13, 4, 12), (3, 8, 8), (50_000, 6, 60)])
def test_schedule__a_step_is_shared_evenly_by_ranks_and_micro_batches(num_images, parts, batch_size):
    chosen = auto.schedule(facts(num_images=num_images), 10.0, MASKING, world_size=2, accumulation=parts // 2)
    assert chosen["batch_size"] == batch_size
    assert chosen["optim"]["accumulation"] == parts // 2


@pytest.mark.parametrize(("world_size", "accumulation"), [(1, 1), (1, 3), (2, 1), (8, 1)])
def test_schedule__a_gpu_gets_no_more_images_at_a_time_than_its_memory_was_tried_with(world_size, accumulation):
    many = facts(num_images=1_000_000, kind="gpu")
    chosen = auto.schedule(many, 100.0, MASKING, world_size=world_size, accumulation=accumulation)
    parts = chosen["optim"]["accumulation"]
    assert parts % accumulation == 0
    images, rest = divmod(chosen["batch_size"], world_size * parts)
    assert rest == 0
    assert auto.TRIED["gpu"] / 2 < images <= auto.TRIED["gpu"]
