"""`--init`: find weights to start from, and load those that fit a model."""

import sys
from collections.abc import Iterator, Sequence
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from dmjd.backbones import Encoder
from dmjd.backbones.adapt import adapt, grid_of
from dmjd.backbones.files import open_backbone, read_file, task_of
from dmjd.errors import CheckpointError
from dmjd.reference import our_name, read_weights

BACKBONE = "encoder.backbone."
POSITIONS = "decoder.pos_embed"
# Files of a run or of a folder for the hub; the first that exists is used.
NAMES = ("pretrained", "best", "linear", "backbone", "model")


class StartingWeights:
    """Weights under the parameter names of `DMJD`, from a file or run of ours, an export, timm or official checkpoints.

    Args:
        name: Directory of a run, a folder for the hub, `timm:NAME`, a file of ours, or one of MAE, ConvMAE or DMJD.

    Raises:
        CheckpointError: If there are no weights, or they do not load.
    """

    def __init__(self, name: str):
        self.name, self.changes = name, list[str]()
        self.taken: set[str] = set()
        self.grid: tuple[int, int] | None = None
        self.num_heads: int | None = None
        self.weights = self._find(Path(name))

    def _find(self, path: Path) -> dict[str, Tensor]:
        if path.is_dir():
            files = [path / f"{name}.safetensors" for name in NAMES]
            found = next((file for file in files if file.is_file()), None)
            if found is None:
                raise CheckpointError(f"no weights in it; --init {path}; give a finished run, or a file")
            path = found
        if self.name.startswith("timm:"):
            return self._open(self.name)
        if path.is_file() and not is_ours(path):
            official = read_weights(path)
            hybrid = any(name.startswith("patch_embed1.") for name in official)
            return {our_name(name, hybrid=hybrid): value for name, value in official.items()}
        weights = self._open(str(path))
        return read_file(path)[1] if task_of(path).get("name") == "pretrain" else weights

    def _open(self, backbone: str) -> dict[str, Tensor]:
        network, _ = open_backbone(backbone)
        with suppress(AttributeError):  # a network without a grid, whose keys `adapt` refuses
            self.grid = grid_of(network)
        self.num_heads = num_heads_of(network)
        return {f"{BACKBONE}{name}": value for name, value in network.state_dict().items()}

    @property
    def is_hybrid(self) -> bool:
        """Whether the weights are those of a ConvViT."""
        return f"{BACKBONE}patch_embed1.proj.weight" in self.weights

    @property
    def stack(self) -> str:
        """Prefix of the names of the transformer's blocks."""
        return f"{BACKBONE}{'blocks3' if self.is_hybrid else 'blocks'}."

    @property
    def width(self) -> int:
        """Width of the transformer's tokens.

        Raises:
            CheckpointError: If the weights are not those of a transformer.
        """
        norm = self.weights.get(f"{self.stack}0.norm1.weight")
        if norm is None or norm.ndim != 1:
            raise CheckpointError(f"no blocks of a transformer in it; --init {self.name}; give a ViT's or a ConvViT's")
        return len(norm)

    @property
    def shape(self) -> dict[str, Any]:
        """The settings of section `model` that match the backbone of these weights.

        Raises:
            CheckpointError: If the weights are not those of a transformer, or their number of heads is unknown.
        """
        size = {192: "tiny", 384: "small", 768: "base", 1024: "large"}.get(self.width)
        if not (size or self.num_heads):
            raise CheckpointError(
                f"it does not say how many heads its blocks have; --init {self.name}; name a --preset"
            )
        numbers = {name.removeprefix(self.stack).split(".")[0] for name in self.weights if name.startswith(self.stack)}
        found: dict[str, Any] = {"size": size} if size else {"size": "tiny", "embed_dim": self.width}
        # Official checkpoints do not store the number of heads: assume that of a network of this size.
        found |= {"depth": len(numbers), **({"num_heads": self.num_heads} if self.num_heads else {})}
        if not self.is_hybrid:
            return {"backbone": "vit", **found}
        mlp = len(self.weights[f"{BACKBONE}blocks1.0.mlp.fc1.weight"])
        ratio = mlp / len(self.weights[f"{BACKBONE}patch_embed1.proj.weight"])
        return {"backbone": "convvit", **found, "conv_mlp_ratio": ratio}

    def into_backbone(self, encoder: Encoder) -> None:
        """Load the backbone's weights, adapted to its channels, patches and positions.

        Raises:
            CheckpointError: If the weights are of another architecture; the message names the first keys.
        """
        heads = num_heads_of(encoder.backbone)
        if self.num_heads not in (None, heads):  # shapes alone would not tell
            differ = f"another architecture: {self.num_heads} heads a block, not {heads}"
            raise CheckpointError(f"{differ}; --init {self.name}; see --model.num_heads")
        theirs = {
            name.removeprefix(BACKBONE): value for name, value in self.weights.items() if name.startswith(BACKBONE)
        }
        try:
            weights, self.changes = adapt(theirs, encoder.backbone, self.grid)
        except ValueError as error:
            raise CheckpointError(f"{error}; --init {self.name}; see --model.backbone") from None
        encoder.backbone.load_state_dict(weights, strict=False)
        self.taken = {f"{BACKBONE}{name}" for name in weights}

    def into_heads(self, model: nn.Module) -> None:
        """Load all other weights that fit, of encoder, decoder and projector; report on stderr what was loaded.

        The decoder's positions are not loaded: they follow from its grid, and those of another may have the same shape.
        """
        ours = model.state_dict()
        self.weights.pop(POSITIONS, None)
        ours.pop(POSITIONS, None)
        fits = {
            name: value
            for name, value in self.weights.items()
            if not name.startswith(BACKBONE) and name in ours and value.shape == ours[name].shape
        }
        model.load_state_dict(fits, strict=False)
        self.taken |= fits.keys()
        left = [name for name in self.weights if name not in self.taken]
        new = [name for name in ours if name not in self.taken]
        changed = f" ({', '.join(self.changes)})" if self.changes else ""
        say(f"init: took {len(self.taken)} tensors of {self.name}{changed}; left out {some(left)}; new {some(new)}")


def num_heads_of(network: nn.Module) -> int | None:
    """Return the number of heads of the first attention layer of a network; None if it has none."""
    blocks: Iterator[Any] = network.modules()
    return next((module.num_heads for module in blocks if hasattr(module, "num_heads")), None)


def is_ours(path: Path) -> bool:
    """Tell whether a file describes its architecture, as ours do."""
    try:
        with safe_open(path, framework="pt") as file:
            return "architecture" in (file.metadata() or {})
    except SafetensorError:
        return False


def some(names: Sequence[str]) -> str:
    """Format the number of names and the first few."""
    return f"{len(names)}: {', '.join(names[:3])}{' ...' if len(names) > 3 else ''}" if names else "none"


@cache
def say(line: str) -> None:
    """Print a line on stderr only once: a model is built again when the statistics of its images are known."""
    print(line, file=sys.stderr)
