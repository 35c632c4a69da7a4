"""Settings of `dmjd pretrain`, section by section."""

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, ClassVar, Literal

from dmjd.config.common import LogSettings, OptimSettings, RunSettings, flat, group
from dmjd.config.rules import height_width, names_settings, one_of, ordered, within
from dmjd.errors import ConfigError

MOST_TOKENS = 65_536  # of an image
SHAPE = ("embed_dim", "depth", "num_heads")  # what a size determines
BackboneSize = Literal["tiny", "small", "base", "large"]
LossName = Literal["l2", "l1", "smooth_l1", "cosine"]
HogVariant = Literal["dmjd", "maskfeat", "mmpretrain"]


@dataclass(frozen=True, kw_only=True)
class ModelSettings:
    """The backbone."""

    SECTION: ClassVar[str] = "model."

    backbone: str = "vit"
    """vit, or convvit: ConvMAE's hybrid of convolutions and transformer; timm:NAME for another ViT of timm, or a
    backbone file; the last two determine their own shape."""
    size: BackboneSize = "base"
    """Width and depth: of a ViT as in timm (192 x 12, 384 x 12, 768 x 12, 1024 x 24), of a ConvViT as published."""
    image_size: str = "224"
    """Side of the square crop in pixels, or HEIGHTxWIDTH."""
    patch_size: int = 16
    """Side of a patch in pixels; a ConvViT has patches of 16, 8 or 4."""
    conv_mlp_ratio: float | None = None
    """ConvViT: MLP ratio of the convolution stages. If not given: 8, as in DMJD; ConvMAE has 4."""
    in_chans: int = 3
    """Channels of an image: 3 (RGB), 1 (grey), or any other number that all images have."""
    class_token: bool = False
    """Give the encoder a class token."""
    reg_tokens: int = 0
    """Number of register tokens."""
    mask_token: bool = False
    """Pass hidden tokens through the encoder as mask tokens (SimMIM, MaskFeat); needs decoder.depth 0."""
    embed_dim: int | None = None
    """Width, if not that of the size; a ConvViT's first two stages have a quarter and a half of it."""
    depth: int | None = None
    """Number of transformer blocks, if not that of the size."""
    num_heads: int | None = None
    """Number of attention heads, if not that of the size."""

    def __post_init__(self) -> None:
        one_of(BackboneSize, self, "size")
        within(1, 10_000, self, "in_chans")
        within(1, 1024, self, "patch_size", "num_heads")
        within(1, 16_384, self, "embed_dim")
        within(1, 1000, self, "depth")
        within(1, 64, self, "conv_mlp_ratio")
        within(0, 1024, self, "reg_tokens")
        if self.embed_dim and self.num_heads and self.embed_dim % self.num_heads:
            raise ConfigError(f"model.embed_dim {self.embed_dim} is not a multiple of model.num_heads {self.num_heads}")
        height, width = self.image_hw
        if height % self.patch_size or width % self.patch_size:
            raise ConfigError(
                f"model.image_size {self.image_size} is not a multiple of model.patch_size {self.patch_size}"
            )
        if (tokens := math.prod(self.grid)) > MOST_TOKENS:
            such = f"model.image_size {self.image_size} has {tokens} tokens of model.patch_size {self.patch_size}"
            raise ConfigError(f"{such}; choose at most {MOST_TOKENS}")

    @property
    def has_own_shape(self) -> bool:
        """Whether the backbone comes from timm or a file."""
        return ":" in self.backbone or self.backbone.endswith(".safetensors")

    @property
    def image_hw(self) -> tuple[int, int]:
        """Height and width of the crop in pixels."""
        return height_width("model.image_size", self.image_size)

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of tokens."""
        height, width = self.image_hw
        return height // self.patch_size, width // self.patch_size


@dataclass(frozen=True, kw_only=True)
class MaskingSettings:
    """Disjoint masks."""

    SECTION: ClassVar[str] = "masking."

    num_views: int = 2
    """Masked views of each image."""
    mask_ratio: float = 0.6
    """Corruption rate: share of tokens hidden in one view."""
    predict_ratio: float = 1.0
    """Prediction rate: share of tokens hidden in at least one view."""
    block: int = 2
    """Side of the squares that are hidden together, in tokens; 1 hides token by token."""

    def __post_init__(self) -> None:
        within(1, 100, self, "num_views")
        within(0, 1, self, "mask_ratio", "predict_ratio")  # which ratios are compatible depends on the number of tokens
        within(1, 1024, self, "block")


@dataclass(frozen=True, kw_only=True)
class MaskedSettings:
    """The masked branch, which predicts hidden tokens."""

    SECTION: ClassVar[str] = "masked."

    target: str = "hog"
    """Prediction target: hog, pixels, normalized_pixels, ema (the exponential moving average of the backbone
    itself), or a frozen teacher: timm:NAME, hf:NAME (a name or folder that Hugging Face transformers loads) or a
    backbone.safetensors. Join several with +: their losses are summed."""
    loss: LossName = "l2"
    """Loss on hidden tokens: l2, l1, smooth_l1, cosine."""

    def __post_init__(self) -> None:
        one_of(LossName, self, "loss")


@dataclass(frozen=True, kw_only=True)
class VisibleSettings:
    """The visible branch, which predicts visible tokens."""

    SECTION: ClassVar[str] = "visible."

    weight: float = 1.0
    """Weight theta of its loss; 0 turns the branch off."""
    target: str | None = None
    """Prediction target, as in masked.target. If not given: the same as there."""
    loss: LossName = "smooth_l1"
    """Loss on visible tokens: l2, l1, smooth_l1, cosine."""
    beta: float = 2.0
    """Where smooth_l1, on either branch, turns from quadratic to linear, in units of the target."""
    aligned: bool = True
    """Compare the prediction for a visible token with its own target. The paper's released code compares it with the
    target of another visible token of the view; turn this off for that ablation only."""

    def __post_init__(self) -> None:
        within(0, 1000, self, "weight")
        within(1e-6, 1_000_000, self, "beta")
        one_of(LossName, self, "loss")


@dataclass(frozen=True, kw_only=True)
class HogSettings:
    """Histograms of oriented gradients."""

    SECTION: ClassVar[str] = "hog."

    variant: HogVariant = "dmjd"
    """dmjd: differences of neighbouring pixels, whitened; maskfeat: Sobel gradients, divided by their norm; mmpretrain:
    the same with Gaussian windows."""
    cell_size: int | None = None
    """Side of a cell in pixels. Default: 8 for patches of 16, 24 ..., else half a patch, or the whole of a patch that
    is odd or smaller than 8."""

    def __post_init__(self) -> None:
        within(1, 1024, self, "cell_size")
        one_of(HogVariant, self, "variant")


@dataclass(frozen=True, kw_only=True)
class TeacherSettings:
    """Networks among the targets."""

    SECTION: ClassVar[str] = "teacher."

    layers: tuple[int, ...] | None = None
    """Feature maps whose mean is the target, by timm's indices, negative ones from the end; give the flag once for
    each. If not given: the last one; for a ConvViT, that of its tokens."""
    decay: tuple[float, float] = (0.996, 0.9999)
    """Decay of the exponential moving average (ema), at the start and at the end of the run."""
    bf16: bool = False
    """Run a frozen teacher in bf16 even where the run itself is in float32: faster on CPUs with bf16."""
    cache: Path | None = None
    """Folder that caches a frozen teacher's targets, for later epochs and other runs; needs crop.variants."""

    def __post_init__(self) -> None:
        within(-1000, 1000, self, "layers")
        ordered(0, 1, self, "decay")


@dataclass(frozen=True, kw_only=True)
class DecoderSettings:
    """The decoder of the masked branch; its width is also the projector's."""

    SECTION: ClassVar[str] = "decoder."

    embed_dim: int = 512
    """Width."""
    depth: int = 8
    """Number of blocks; 0 is a linear head (with model.mask_token)."""
    num_heads: int = 16
    """Number of attention heads."""
    mlp_ratio: float = 4.0
    """Width of an MLP, as a multiple of the decoder's width."""
    cross: bool = False
    """Let hidden tokens attend to visible ones only, not to each other (CrossMAE): a cheaper decoder."""

    def __post_init__(self) -> None:
        within(1, 16_384, self, "embed_dim")
        within(1, 1024, self, "num_heads")
        within(0, 1000, self, "depth")
        within(0, 64, self, "mlp_ratio")
        if self.embed_dim % self.num_heads or self.embed_dim % 4:
            raise ConfigError(
                f"decoder.embed_dim {self.embed_dim} is not a multiple of 4 and of its {self.num_heads} heads"
            )


@dataclass(frozen=True, kw_only=True)
class CropSettings:
    """The augmentation of an image: a random resized crop and a flip."""

    SECTION: ClassVar[str] = "crop."

    scale: tuple[float, float] = (0.5, 1.0)
    """Smallest and largest share of the image's area in a crop; a box that exceeds the image is clipped to it."""
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    """Smallest and largest aspect ratio, width over height, before clipping."""
    flip: bool = True
    """Mirror half of the crops, at random."""
    variants: int | None = None
    """Number of different crops of an image; epoch e shows crop e mod variants. Default: a new crop every epoch."""
    progressive: tuple[float, ...] = ()
    """Smaller crops earlier in the run: their sides as shares of the full side, such as 0.5, rounded to whole tokens;
    give the flag once for each, in order. These parts of the run and the last one, with full crops, are equally long,
    to within an epoch. Does not work with networks among the targets. Memory is that of full crops; `plan` counts all
    crops as full."""

    def __post_init__(self) -> None:
        within(1, 1_000_000, self, "variants")
        within(0.01, 1, self, "progressive")
        ordered(0.0001, 1, self, "scale")
        ordered(0.01, 100, self, "ratio")


@dataclass(frozen=True, kw_only=True)
class MonitorSettings(LogSettings):
    """What is recorded during a run, and how the features are evaluated."""

    SECTION: ClassVar[str] = "monitor."

    max_images: int = 2000
    """Images per part (training, held out) that an evaluation uses."""
    channels: tuple[int, int, int] | None = None
    """The three channels that the report shows as red, green and blue. Default: the first three."""
    max_share: float = 0.05
    """Most images that evaluations during the run may use, as a share of those that training reads; a short run has
    fewer evaluations. Evaluating an image takes at most as long as training on it."""

    def __post_init__(self) -> None:
        super().__post_init__()
        within(1, 1_000_000, self, "max_images")
        within(0, 1000, self, "max_share")


@dataclass(frozen=True, kw_only=True)
class PretrainRun(RunSettings):
    """Where, how long and on what `dmjd pretrain` computes."""

    out: Path = Path("runs/pretrain")
    preset: str = "auto"
    """Recipe: auto chooses by the images, the machine and --minutes. Published recipes: mae, maskfeat, convmae,
    fastconvmae, dm, dmjd, dmjd-large, dmjd-clip, dmjd-dino, data2vec. For trials on 2 cores: quick, and quick-convmae,
    -fastconvmae, -dmjd, -teacher."""
    minutes: float | None = None
    """Time that --preset auto plans for, unless --epochs or --steps are given. Default: 30."""
    data_statistics: str = "auto"
    """Mean and standard deviation that images are normalised by: imagenet, or a JSON file written by dmjd doctor; auto
    takes ImageNet's for 3 channels of 8 bits, and measures a sample of any other images."""
    data_on_device: Literal["auto", "yes", "no"] = "auto"
    """Keep a small set of equally large images on the network's device, and crop whole batches there; auto does so
    where the set fits into a quarter of a GPU's memory or, on a CPU, for images of at most 128 pixels."""
    epochs: float = 400.0
    """Passes over the images; in an epoch the encoder sees num_views views of each image."""
    batch_size: int = 512

    @property
    def longer(self) -> str:
        """The flags that make such a run longer."""
        return "--steps" if self.steps else "--minutes or --epochs" if self.preset == "auto" else "--epochs"

    def __post_init__(self) -> None:
        super().__post_init__()
        within(0.01, 1_000_000, self, "minutes")
        if self.minutes and self.preset != "auto":
            raise ConfigError(f"minutes are for --preset auto, not {self.preset}; --minutes; give --epochs instead")


@dataclass(frozen=True, kw_only=True)
class PretrainSettings:
    """Settings of `dmjd pretrain`."""

    run: Annotated[PretrainRun, flat("Run")] = field(default_factory=PretrainRun)
    init: Annotated[str | None, group("Model")] = None
    """Weights to start from, of the same width and depth: a run, a file in it, an export, timm:NAME, or a checkpoint of
    MAE, ConvMAE or DMJD. Channels, patches and position embeddings are adapted; stderr says which weights are loaded.
    Default: random weights."""
    model: Annotated[ModelSettings, group("Model")] = field(default_factory=ModelSettings)
    masking: Annotated[MaskingSettings, group("Masking")] = field(default_factory=MaskingSettings)
    masked: Annotated[MaskedSettings, group("Masked branch")] = field(default_factory=MaskedSettings)
    visible: Annotated[VisibleSettings, group("Visible branch")] = field(default_factory=VisibleSettings)
    hog: Annotated[HogSettings, group("HOG targets")] = field(default_factory=HogSettings)
    teacher: Annotated[TeacherSettings, group("Teachers")] = field(default_factory=TeacherSettings)
    decoder: Annotated[DecoderSettings, group("Decoder")] = field(default_factory=DecoderSettings)
    crop: Annotated[CropSettings, group("Crops")] = field(default_factory=CropSettings)
    optim: Annotated[OptimSettings, group("Optimizer")] = field(default_factory=OptimSettings)
    monitor: Annotated[MonitorSettings, group("Monitoring")] = field(default_factory=MonitorSettings)

    def __post_init__(self) -> None:
        names_settings(self, self.run.allow_change)
        if self.teacher.cache and not self.crop.variants:
            raise ConfigError("teacher.cache keeps the targets of crops that come again: set crop.variants, such as 2")
        if self.model.mask_token != (self.decoder.depth == 0):
            raise ConfigError("model.mask_token and decoder.depth 0 (a linear head) belong together: set both or none")

    def check_shown(self) -> None:
        """Check the channels that the report shows; only once those of the images are known, which `auto` looks up.

        Raises:
            ConfigError: If images do not have them.
        """
        if self.monitor.channels and not all(0 <= each < self.model.in_chans for each in self.monitor.channels):
            raise ConfigError(f"monitor.channels {self.monitor.channels}: channels are 0 to {self.model.in_chans - 1}")

    @property
    def crop_sizes(self) -> list[tuple[int, int]]:
        """Height and width of a crop in each part of the run, in pixels, a whole number of tokens."""
        (rows, columns), patch = self.model.grid, self.model.patch_size
        shares = (*self.crop.progressive, 1.0)
        return [(patch * max(round(rows * share), 1), patch * max(round(columns * share), 1)) for share in shares]

    @property
    def lr(self) -> float:
        """Peak learning rate: blr * images per step * (m_pred / m_corr) / 256 (section 4 of the paper)."""
        return self.optim.blr * self.run.batch_size * self.masking.predict_ratio / self.masking.mask_ratio / 256
