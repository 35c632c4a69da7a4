"""A vision model of Hugging Face transformers with timm's interface, for use as a teacher."""

from collections.abc import Sequence
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

from jaxtyping import Float
from torch import Tensor, nn

from dmjd.errors import CheckpointError, ConfigError, extra, one_line


class HuggingFace(nn.Module):
    """The vision part of a transformers model: a ViT (with class and register tokens) or a convolutional network.

    Input size, mean and standard deviation come from the model's own image processor.

    Args:
        name: A name on the hub, or a folder.

    Raises:
        CheckpointError: If it cannot be loaded, or is a model of timm.
        ConfigError: If transformers is not installed, or the model's image processor names no input size.
    """

    def __init__(self, name: str):
        super().__init__()
        with extra("hf", f"hf:{name}"):
            from transformers import AutoConfig, AutoImageProcessor, AutoModel
        try:
            if AutoConfig.from_pretrained(name, trust_remote_code=False).model_type == "timm_wrapper":
                source = f"local-dir:{name}" if Path(name).is_dir() else f"hf-hub:{name}"
                raise CheckpointError(f"a model of timm; hf:{name}; give timm:{source}")
            model: Any = AutoModel.from_pretrained(name, trust_remote_code=False)
            processor: Any = AutoImageProcessor.from_pretrained(name, trust_remote_code=False)
        except (OSError, ValueError, RuntimeError, UnpicklingError) as error:
            reason = one_line(error, 200)
            raise CheckpointError(
                f"transformers cannot load it ({reason}); hf:{name}; check name and network"
            ) from None
        # The vision part of CLIP, SigLIP and their like, in float32 even if the weights are stored in half precision.
        self.model = getattr(model, "vision_model", model).float()
        config = getattr(model.config, "vision_config", model.config)
        self.patch_size: int | None = getattr(config, "patch_size", None)
        size = dict(getattr(processor, "crop_size", None) or processor.size)
        height, width = (size.get(side) or size.get("shortest_edge") for side in ("height", "width"))
        if not (height and width):
            raise ConfigError(f"its image processor names no input size ({size}); hf:{name}; choose another teacher")
        channels = getattr(config, "num_channels", 3)
        plain = not getattr(processor, "do_normalize", False)  # its mean and deviation then mean nothing
        self.pretrained_cfg = {
            "input_size": (channels, height, width),
            "mean": (0.0,) * channels if plain else tuple(processor.image_mean),
            "std": (1.0,) * channels if plain else tuple(processor.image_std),
        }

    def forward_intermediates(
        self, images: Float[Tensor, "B C H W"], *, indices: Sequence[int], **how: Any
    ) -> list[Float[Tensor, "B D h w"]]:
        """Compute the maps of layers, numbered as in timm (0 is the first block or stage).

        Only maps are returned, whatever the options `how` of timm's interface say.

        Raises:
            ValueError: If the model's output is neither maps nor tokens of square patches.
        """
        output = self.model(pixel_values=images, output_hidden_states=True)
        states = getattr(output, "reshaped_hidden_states", None) or output.hidden_states
        return [self._as_map(states[1:][index], images.shape[-2:]) for index in indices]  # 0 is the embedding

    def _as_map(self, state: Tensor, image_hw: Sequence[int]) -> Float[Tensor, "B D h w"]:
        if state.ndim == 4:
            return state
        if self.patch_size is None:
            raise ValueError("its tokens have no patch size")
        height, width = (side // self.patch_size for side in image_hw)
        return state[:, -height * width :].transpose(1, 2).unflatten(2, (height, width))  # drops class, registers
