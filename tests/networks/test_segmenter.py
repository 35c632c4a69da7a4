"""The segmentation network and its loss."""

import pytest
import torch

from dmjd.backbones.pyramid import Pyramid
from dmjd.backbones.vit import create_vit
from dmjd.networks.segmenter import Segmenter, pixel_loss


@pytest.mark.parametrize("auxiliary", [False, True])
def test_segmenter__logits_have_the_size_of_the_images_and_a_second_set_in_training(auxiliary):
    vit = create_vit("tiny", image_size=32, patch_size=8, embed_dim=16, depth=1, num_heads=2)
    network = Segmenter(Pyramid(vit.backbone), 5, channels=16, auxiliary=auxiliary)
    images = torch.randn(2, 3, 40, 52)
    assert [logits.shape for logits in network(images)] == [(2, 5, 40, 52)] * (1 + auxiliary)
    assert len(network.eval()(images)) == 1


def test_pixel_loss__is_the_mean_over_pixels_with_a_class_and_nought_without_any():
    logits, labels = torch.randn(2, 3, 4, 5, requires_grad=True), torch.randint(3, (2, 4, 5))
    labels[0, :2] = 9
    by_hand = [-logits[b, :, h, w].log_softmax(0)[labels[b, h, w]] for b, h, w in (labels != 9).nonzero().tolist()]
    torch.testing.assert_close(pixel_loss(logits, labels, 9), torch.stack(by_hand).mean())
    nothing = pixel_loss(logits, torch.full_like(labels, 9), 9)
    nothing.backward()
    assert (nothing.item(), logits.grad.abs().max().item()) == (0.0, 0.0)
