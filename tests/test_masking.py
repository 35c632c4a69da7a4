"""Disjoint masks keep their counts, cover what they promise and favour no token."""

import hashlib

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

import dmjd
from dmjd.masking import gather_tokens, mask_counts, seeded_masks, token_ids

RATIOS = st.integers(1, 19).map(lambda twentieths: twentieths / 20)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@given(
    grid=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    block=st.integers(1, 3),
    views=st.integers(1, 5),
    mask_ratio=RATIOS,
    predict_ratio=RATIOS | st.just(1.0),
    seed=st.integers(0, 2**31),
)
@settings(max_examples=300, deadline=None)
def test_block_masks__counts_are_exact_on_any_grid(grid, block, views, mask_ratio, predict_ratio, seed):
    arguments = {"block": block, "num_views": views, "mask_ratio": mask_ratio, "predict_ratio": predict_ratio}
    try:
        hidden, predicted = mask_counts(grid, **arguments)
    except ValueError:
        with pytest.raises(ValueError):
            dmjd.block_masks(3, grid, generator=seeded(seed), **arguments)
        assume(False)
    masked = dmjd.block_masks(3, grid, generator=seeded(seed), **arguments)
    assert masked.shape == (3, views, grid[0] * grid[1])
    assert masked.dtype == torch.bool
    assert (masked.sum(dim=2) == hidden).all()
    times = masked.sum(dim=1)
    assert ((times > 0).sum(dim=1) == predicted).all()
    assert ((times == 0) | (times == views * hidden // predicted) | (times == -(-views * hidden // predicted))).all()


@pytest.mark.parametrize(
    ("num_tokens", "mask_ratio", "visible"),
    [(196, 0.75, 49), (196, 0.6, 78), (100, 0.8, 20), (10, 0.7, 3), (64, 0.5, 32), (7, 0.5, 3)],
)
def test_disjoint_masks__a_view_keeps_the_floor_of_its_share(num_tokens, mask_ratio, visible):
    masked = dmjd.disjoint_masks(2, num_tokens, num_views=2, mask_ratio=mask_ratio, generator=seeded())
    assert ((~masked).sum(dim=2) == visible).all()


def test_block_masks__official_recipe_keeps_76_of_196():
    masked = dmjd.block_masks(2, (14, 14), num_views=2, mask_ratio=0.6, generator=seeded())
    assert ((~masked).sum(dim=2) == 76).all()


@pytest.mark.parametrize("predict_ratio", [0.6, 0.75, 0.9, 1.0])
def test_disjoint_masks__union_is_predict_ratio(predict_ratio):
    masked = dmjd.disjoint_masks(8, 200, num_views=2, mask_ratio=0.6, predict_ratio=predict_ratio, generator=seeded())
    assert (masked.any(dim=1).sum(dim=1) == round(200 * predict_ratio)).all()


def test_disjoint_masks__four_views_at_three_quarters_partition_the_image():
    masked = dmjd.disjoint_masks(16, 196, num_views=4, mask_ratio=0.75, generator=seeded())
    assert ((~masked).sum(dim=1) == 1).all()


def test_disjoint_masks__two_views_at_a_half_are_complements():
    masked = dmjd.disjoint_masks(16, 196, num_views=2, mask_ratio=0.5, generator=seeded())
    assert (masked[:, 0] == ~masked[:, 1]).all()


def test_disjoint_masks__one_view_is_uniform_random_masking():
    masked = dmjd.disjoint_masks(20_000, 16, num_views=1, mask_ratio=0.75, predict_ratio=0.75, generator=seeded())
    share = masked[:, 0].double().mean(dim=0)
    together = (masked[:, 0, 0] & masked[:, 0, 1]).double().mean()
    assert (share - 0.75).abs().max() < 0.02
    assert abs(together - 12 / 16 * 11 / 15) < 0.02  # as sampling without replacement has it


@pytest.mark.parametrize("grid", [(8, 8), (7, 5), (4, 9)])
@pytest.mark.parametrize("predict_ratio", [0.6, 0.8, 1.0])
def test_block_masks__every_token_is_equally_likely_in_every_view(grid, predict_ratio):
    arguments = {"num_views": 2, "mask_ratio": 0.5, "predict_ratio": predict_ratio}
    masked = dmjd.block_masks(20_000, grid, generator=seeded(), **arguments)
    hidden, predicted = mask_counts(grid, block=2, **arguments)
    tokens = grid[0] * grid[1]
    assert (masked.double().mean(dim=0) - hidden / tokens).abs().max() < 0.02
    assert (masked.any(dim=1).double().mean(dim=0) - predicted / tokens).abs().max() < 0.02


def test_block_masks__hides_whole_squares_where_they_tile_the_grid():
    masked = dmjd.block_masks(16, (8, 12), num_views=3, mask_ratio=0.4, predict_ratio=0.9, generator=seeded()).view(
        16, 3, 4, 2, 6, 2
    )
    squares = masked.permute(0, 1, 2, 4, 3, 5).flatten(4)
    assert (squares.all(dim=-1) | ~squares.any(dim=-1)).all()


def test_block_masks__splits_few_squares_where_they_do_not_tile_the_grid():
    masked = dmjd.block_masks(64, (7, 7), num_views=2, mask_ratio=0.5, generator=seeded()).view(64, 2, 7, 7)
    whole = masked[:, :, :6, :6].reshape(64, 2, 3, 2, 3, 2).permute(0, 1, 2, 4, 3, 5).flatten(4)
    broken = (whole.any(dim=-1) & ~whole.all(dim=-1)).sum(dim=(2, 3))
    assert broken.max() <= 3  # the ends of an arc, and where the circle was cut open


def test_disjoint_masks__images_are_independent():
    masked = dmjd.disjoint_masks(4000, 8, num_views=1, mask_ratio=0.5, predict_ratio=0.5, generator=seeded())[:, 0]
    both = (masked[:-1, 0] & masked[1:, 0]).double().mean()
    assert abs(both - 0.25) < 0.03


def test_disjoint_masks__a_generator_repeats_itself():
    first, second = (dmjd.disjoint_masks(4, 49, num_views=2, mask_ratio=0.6, generator=seeded(7)) for _ in range(2))
    assert first.equal(second)
    assert not first.equal(dmjd.disjoint_masks(4, 49, num_views=2, mask_ratio=0.6, generator=seeded(8)))


def test_seeded_masks__have_the_bits_that_they_always_had():
    drawn = hashlib.sha256()
    for grid, block, views, mask_ratio, predict_ratio in (
        ((14, 14), 1, 4, 0.75, 1.0),
        ((14, 14), 2, 2, 0.6, 0.9),
        ((7, 5), 2, 3, 0.5, 1.0),
        ((3, 9), 1, 2, 0.6, 0.6),
    ):
        ratios = {"mask_ratio": mask_ratio, "predict_ratio": predict_ratio}
        drawn.update(seeded_masks(torch.arange(20), grid, block=block, num_views=views, **ratios).numpy().tobytes())
    assert drawn.hexdigest() == "12f8fbe1e47a275acc145e8ce14f5e71c8ad6c35dad13ff2e3891e9f64afc519"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_views": 2, "mask_ratio": 0.3, "predict_ratio": 1.0}, "between 0.3 and 0.6"),
        ({"num_views": 1, "mask_ratio": 0.75}, "between 0.75 and 0.75"),
        ({"num_views": 2, "mask_ratio": 0.6, "predict_ratio": 0.5}, "between 0.6 and 1 of"),
        ({"num_views": 2, "mask_ratio": 0.6, "predict_ratio": 1.1}, "between 0.6 and 1 of"),
        ({"num_views": 2, "mask_ratio": float("nan")}, "must be numbers between 0 and 1"),
        ({"num_views": 2, "mask_ratio": 0.99}, "at most 0.9375"),
        ({"num_views": 2, "mask_ratio": 0.999, "num_tokens": 196}, "at most 0.9948"),
        ({"num_views": 2, "mask_ratio": 0.0}, "above 0"),
        ({"num_views": 0, "mask_ratio": 0.5}, "at least 1 view"),
    ],
)
def test_disjoint_masks__an_impossible_request_names_the_range_that_works(arguments, message):
    with pytest.raises(ValueError, match=message):
        dmjd.disjoint_masks(2, **{"num_tokens": 16, **arguments})


def test_token_ids__list_visible_and_hidden_tokens_in_raster_order():
    masked = torch.tensor([[[True, False, False, True], [False, True, True, False]]])
    visible, hidden = token_ids(masked)
    assert visible.tolist() == [[1, 2], [0, 3]]
    assert hidden.tolist() == [[0, 3], [1, 2]]


def test_token_ids__refuse_views_that_hide_different_numbers():
    with pytest.raises(ValueError, match="same number"):
        token_ids(torch.tensor([[[True, False], [True, True]]]))


def test_gather_tokens__picks_the_tokens_of_every_view_image_major():
    tokens = torch.arange(2 * 3 * 1.0).view(2, 3, 1)
    ids = torch.tensor([[0, 2], [1, 2], [0, 1], [2, 0]])
    assert gather_tokens(tokens, ids).squeeze(-1).tolist() == [[0, 2], [1, 2], [3, 4], [5, 3]]
