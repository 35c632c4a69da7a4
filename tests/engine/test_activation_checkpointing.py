"""`--activation_checkpointing` keeps less of the forward pass and changes no gradient."""

import copy

import pytest
import timm
import torch

import dmjd
from dmjd.cli import settings_of
from dmjd.engine.distributed import ParallelModel, Ranks
from dmjd.errors import ConfigError
from dmjd.masking import disjoint_masks

SHAPE = {"image_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 3, "num_heads": 2}
HEADS = {"decoder_embed_dim": 32, "decoder_depth": 3, "decoder_num_heads": 2}


def step(network, *, checkpointing):
    """The loss of a batch, all gradients, and the bytes that were kept for the backward pass, weights left out."""
    network = copy.deepcopy(network)
    model = ParallelModel(network, Ranks(torch.device("cpu")), checkpointing=checkpointing)
    images = torch.randint(0, 256, (4, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    masked = disjoint_masks(4, 16, num_views=2, mask_ratio=0.5, generator=torch.Generator().manual_seed(0))
    weights = {parameter.untyped_storage().data_ptr() for parameter in network.parameters()}
    kept = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    torch.manual_seed(0)  # of drop path
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = model(images, masked).total
    loss.backward()
    gradients = {name: each.grad for name, each in network.named_parameters() if each.grad is not None}
    return loss, gradients, sum(kept.values()), [*network.state_dict()]


@pytest.mark.parametrize("backbone", ["vit", "convvit"])
def test_checkpointing__gives_the_same_gradients_and_keeps_a_third_at_most(backbone):
    torch.manual_seed(0)
    network = dmjd.build("dmjd", "tiny", backbone=backbone, **SHAPE, **HEADS).train()
    for module in network.modules():
        if hasattr(module, "drop_prob"):
            module.drop_prob = 0.2
    loss, gradients, kept, names = step(network, checkpointing=False)
    again, same, fewer, same_names = step(network, checkpointing=True)
    assert loss == again
    assert gradients.keys() == same.keys()
    assert all(torch.equal(same[name], gradient) for name, gradient in gradients.items())
    assert fewer < kept / 3
    assert names == same_names


@pytest.mark.parametrize("verb", ["pretrain", "finetune", "segment", "detect"])
def test_activation_checkpointing__is_a_flag_of_every_verb_that_trains_blocks(verb):
    start = {"preset": "quick"} if verb == "pretrain" else {"backbone": "b"}
    assert settings_of(verb, data="d", activation_checkpointing=True, **start).run.training["checkpointing"]
    assert not settings_of(verb, data="d", **start).run.training["checkpointing"]


@pytest.mark.parametrize(
    ("name", "small"),
    [
        ("eva02_tiny_patch14_224", {"img_size": 28, "embed_dim": 24, "num_heads": 2}),
        ("beit_base_patch16_224", {"img_size": 32, "embed_dim": 16, "num_heads": 2}),
    ],
)
def test_timm__blocks_that_take_more_than_tokens_are_computed_again_too(name, small):
    torch.manual_seed(0)
    network = timm.create_model(name, depth=2, num_classes=3, **small)
    images = torch.randn(2, 3, small["img_size"], small["img_size"])
    plain = torch.autograd.grad(network(images).sum(), network.patch_embed.proj.weight)
    again = ParallelModel(network, Ranks(torch.device("cpu")), checkpointing=True)
    torch.testing.assert_close(torch.autograd.grad(again(images).sum(), network.patch_embed.proj.weight), plain)


def test_linear__which_trains_none_refuses_it():
    with pytest.raises(ConfigError, match="linear trains no blocks; --activation_checkpointing; leave it out"):
        settings_of("linear", data="d", backbone="b", activation_checkpointing=True)


def test_network__without_blocks_is_refused():
    with pytest.raises(ConfigError, match="no block of the network is trained; --activation_checkpointing"):
        ParallelModel(torch.nn.Linear(2, 2), Ranks(torch.device("cpu")), checkpointing=True)
