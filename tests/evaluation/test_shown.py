"""What the report shows of a network: errors, patches and likes of images."""

import torch

import dmjd
from dmjd.evaluation.shown import look, most_alike, principal_colours, token_errors


def test_token_errors__are_zero_for_the_truth_and_one_for_its_mean() -> None:
    truth = torch.randn(5, 6, 7, generator=torch.Generator().manual_seed(0)) * 3 + 2
    mean = truth.flatten(0, 1).mean(dim=0).expand(5, 1, 6, 7)
    errors = token_errors(torch.cat([truth[:, None], mean], dim=1), truth)
    assert errors.shape == (5, 2, 6)
    assert (errors[:, 0] == 0).all()
    torch.testing.assert_close(errors[:, 1].mean(), torch.tensor(1.0))


def test_principal_colours__show_the_largest_difference_first_whatever_its_sign() -> None:
    generator = torch.Generator().manual_seed(0)
    side = torch.tensor([-1.0, 1.0]).repeat(2, 4, 8).unflatten(2, (4, 4))[:, 0]  # columns of a 4 x 4 grid take turns
    features = torch.randn(2, 16, 4, 4, generator=generator) * 0.1
    features[:, 5] += 4 * side
    colours = principal_colours(features)
    assert colours.shape == (2, 3, 4, 4)
    assert (colours[:, 0][side > 0] > 200).all()
    assert (colours[:, 0][side < 0] < 55).all()
    assert (principal_colours(features.double().float()) == colours).all()


def test_principal_colours__narrow_and_constant_features_are_drawn() -> None:
    assert principal_colours(torch.ones(1, 2, 3, 3)).shape == (1, 3, 3, 3)


def test_look__brightness_alone_makes_no_other_pixels() -> None:
    network = dmjd.build("quick", image_size=32, depth=1)
    dark = torch.randint(0, 200, (3, 32, 32), generator=torch.Generator().manual_seed(0)).float()
    seen = look(network, torch.stack([dark, dark + 50]), [3, 8])
    assert seen.numbers.tolist() == [3, 8]
    torch.testing.assert_close(seen.pixels[0], seen.pixels[1], atol=1e-3, rtol=0)


def test_most_alike__finds_the_same_row_first_and_no_more_rows_than_there_are() -> None:
    bank = torch.randn(4, 8, generator=torch.Generator().manual_seed(0))
    found = most_alike(bank[2:3] * 5, bank, 9)
    assert found.rows.shape == (1, 4)
    assert found.rows[0, 0] == 2
    torch.testing.assert_close(found.similarity[0, 0], torch.tensor(1.0))
    assert (found.similarity.diff() <= 0).all()
