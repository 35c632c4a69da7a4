"""MAE as transformers and lightly compute it, in the shape of our model and with our step's signature."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dmjd.backbones.blocks import NORM_EPS
from dmjd.masking import TokenIds
from dmjd.method import DMJD, Losses


class TransformersMAE(nn.Module):
    """`ViTMAEForPreTraining` with torch's fused attention, which is its default.

    Args:
        ours: Whose sizes it has; its weights are its own until `copy_weights`.
    """

    def __init__(self, ours: DMJD):
        super().__init__()
        from transformers import ViTMAEConfig, ViTMAEForPreTraining

        encoder: Any = ours.encoder
        vit, decoder = encoder.backbone, ours.decoder
        config = ViTMAEConfig(
            hidden_size=vit.embed_dim,
            num_hidden_layers=len(vit.blocks),
            num_attention_heads=vit.blocks[0].attn.num_heads,
            intermediate_size=vit.blocks[0].mlp.fc1.out_features,
            image_size=encoder.grid[0] * encoder.patch_size,
            patch_size=encoder.patch_size,
            decoder_hidden_size=decoder.embed.out_features,
            decoder_num_hidden_layers=len(decoder.blocks),
            decoder_num_attention_heads=decoder.blocks[0].attn.num_heads,
            decoder_intermediate_size=decoder.blocks[0].mlp.fc1.out_features,
            layer_norm_eps=NORM_EPS,
            norm_pix_loss=True,
            attn_implementation="sdpa",
        )
        self.normalize = ours.normalize
        self.mae = ViTMAEForPreTraining(config)

    def forward(self, images: Tensor, tokens: TokenIds) -> Losses:
        """Compute the loss of a batch of one view; its masks are given as the noise that it would draw."""
        noise = torch.cat(tokens, dim=1).argsort(dim=1).float()
        loss = self.mae(self.normalize(images), noise=noise).loss
        return Losses(loss, loss, torch.zeros_like(loss))

    @torch.no_grad()
    def copy_weights(self, ours: DMJD) -> None:
        """Take our weights, by the names of transformers 5."""
        vit: Any = ours.encoder.backbone
        theirs, decoder = self.mae.vit, self.mae.decoder
        theirs.embeddings.cls_token.copy_(vit.cls_token)
        theirs.embeddings.position_embeddings.copy_(vit.pos_embed)
        decoder.decoder_pos_embed.copy_(F.pad(ours.decoder.pos_embed, (0, 0, 1, 0)))
        decoder.mask_token.copy_(ours.decoder.mask_token)
        layers = [
            (vit.patch_embed.proj, theirs.embeddings.patch_embeddings.projection),
            (vit.norm, theirs.layernorm),
            (ours.decoder.embed, decoder.decoder_embed),
            (ours.decoder.norm, decoder.decoder_norm),
            (ours.decoder.pred, decoder.decoder_pred),
        ]
        blocks = [*zip(vit.blocks, theirs.layers, strict=True)]
        blocks += zip(ours.decoder.blocks, decoder.decoder_layers, strict=True)
        for block, other in blocks:
            layers += [
                (block.norm1, other.layernorm_before),
                (block.norm2, other.layernorm_after),
                (block.attn.proj, other.attention.o_proj),
                (block.mlp.fc1, other.mlp.fc1),
                (block.mlp.fc2, other.mlp.fc2),
            ]
            for name in ("weight", "bias"):
                parts = getattr(block.attn.qkv, name).chunk(3)
                for part, layer in zip(parts, ("q_proj", "k_proj", "v_proj"), strict=True):
                    getattr(getattr(other.attention, layer), name).copy_(part)
        for layer, other in layers:
            other.load_state_dict(layer.state_dict())


class LightlyMAE(nn.Module):
    """The MAE of lightly's guide: its encoder around our ViT, its decoder of timm's blocks with our weights.

    Args:
        ours: Whose sizes and weights it has.
    """

    def __init__(self, ours: DMJD):
        super().__init__()
        from lightly.models import utils
        from lightly.models.modules import MAEDecoderTIMM, MaskedVisionTransformerTIMM

        encoder: Any = ours.encoder
        self.utils, self.normalize, self.patch_size = utils, ours.normalize, encoder.patch_size
        self.encoder = MaskedVisionTransformerTIMM(
            encoder.backbone, weight_initialization="skip", pos_embed_initialization="skip"
        )
        own = ours.decoder
        self.decoder = MAEDecoderTIMM(
            num_patches=encoder.grid[0] * encoder.grid[1],
            patch_size=encoder.patch_size,
            embed_dim=encoder.embed_dim,
            decoder_embed_dim=own.embed.out_features,
            decoder_depth=len(own.blocks),
            decoder_num_heads=own.blocks[0].attn.num_heads,
            mlp_ratio=own.blocks[0].mlp.fc1.out_features / own.embed.out_features,
        )
        weights = {f"decoder_{name}": value for name, value in own.state_dict().items() if name != "mask_token"}
        weights["decoder_pos_embed"] = F.pad(own.pos_embed, (0, 0, 1, 0))
        self.decoder.load_state_dict(weights | {"mask_token": own.mask_token})

    def forward(self, images: Tensor, tokens: TokenIds) -> Losses:
        """Compute the loss of a batch of one view."""
        utils, pixels = self.utils, self.normalize(images)
        idx_keep, idx_mask = F.pad(tokens.visible + 1, (1, 0)), tokens.hidden + 1  # 0 is the class token
        decoded = self.decoder.embed(self.encoder.encode(images=pixels, idx_keep=idx_keep))
        full = utils.repeat_token(self.decoder.mask_token, (len(pixels), self.encoder.sequence_length))
        full = utils.set_at_index(full, idx_keep, decoded.type_as(full))
        predicted = self.decoder.predict(utils.get_at_index(self.decoder.decode(full), idx_mask))
        target = utils.get_at_index(utils.patchify(pixels, self.patch_size), tokens.hidden)
        loss = F.mse_loss(predicted.float(), utils.normalize_mean_var(target))
        return Losses(loss, loss, torch.zeros_like(loss))
