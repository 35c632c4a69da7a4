"""Every setting of every verb: its type, its default, its help text and the rules between settings.

Nothing here imports torch, so that `--help` is instant. A setting travels YAML -> dataclass -> task -> argument.
"""

import math
from dataclasses import dataclass, field, fields, is_dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal, get_args

import yaml

from dmjd.errors import ConfigError

PRESETS = Path(__file__).parents[1] / "presets"

BackboneName = Literal["vit", "convvit"]
BackboneSize = Literal["tiny", "small", "base", "large"]
TARGETS = ("hog", "pixels", "normalized_pixels", "ema")
LossName = Literal["l2", "l1", "smooth_l1", "cosine"]
HogVariant = Literal["dmjd", "maskfeat", "mmpretrain"]


def at_least(lowest: int | float, settings: Any, *names: str) -> None:
    """Refuse numbers below `lowest` and those that are not finite; None passes.

    Raises:
        ConfigError: If there is one.
    """
    section = "" if isinstance(settings, Run) else f"{type(settings).__name__.lower()}."
    for name in names:
        value = getattr(settings, name)
        if value is not None and not lowest <= value < math.inf:
            raise ConfigError(f"{section}{name} {value} is out of range; choose {lowest} or more")


def within(lowest: float, highest: float, settings: Any, *names: str) -> None:
    """Refuse numbers outside `lowest` .. `highest`.

    Raises:
        ConfigError: If there is one.
    """
    for name in names:
        if not lowest <= getattr(settings, name) <= highest:
            raise ConfigError(f"{name} {getattr(settings, name)} is out of range; choose {lowest:g} to {highest:g}")


def one_of(choices: Any, settings: Any, *names: str) -> None:
    """Refuse values that are not among the choices of a `Literal`.

    Raises:
        ConfigError: If there is one.
    """
    for name in names:
        if (value := getattr(settings, name)) not in get_args(choices):
            section = type(settings).__name__.lower()
            raise ConfigError(f"{section}.{name} {value!r}; choose one of {', '.join(get_args(choices))}")


def height_width(name: str, size: str) -> tuple[int, int]:
    """Read a size in pixels, SIDE or HEIGHTxWIDTH.

    Raises:
        ConfigError: If it is neither.
    """
    sides = str(size).split("x")
    if len(sides) > 2 or not all(side.isdigit() and int(side) > 0 for side in sides):
        raise ConfigError(f"{name} {size!r} is neither a number nor HEIGHTxWIDTH")
    return int(sides[0]), int(sides[-1])


def target_names(name: str) -> list[str]:
    """List the targets that a name stands for: `hog+ema` is two, a file's name is one."""
    return [name] if Path(name).is_file() else name.split("+")


def check_target(settings: Any) -> None:
    """Refuse a target that is no built-in one, no network by name and no backbone file.

    Raises:
        ConfigError: If it is none of them; the message names the nearest.
    """
    for name in target_names(settings.target or ""):
        if name in ("", *TARGETS) or name.startswith(("timm:", "hf:")) or name.endswith(".safetensors"):
            continue
        nearest = get_close_matches(name, TARGETS, n=1)
        rest = "timm:NAME, hf:NAME or a backbone.safetensors"
        hint = f"did you mean {nearest[0]}?" if nearest else f"{', '.join(TARGETS)}, {rest}"
        raise ConfigError(f"{type(settings).__name__.lower()}.target {name!r}; {hint}")


@dataclass(frozen=True, kw_only=True)
class Model:
    """The backbone."""

    backbone: BackboneName = "vit"
    """vit, or convvit: ConvMAE's hybrid of convolutions and transformer."""
    size: BackboneSize = "base"
    """Width and depth: of a ViT as in timm (192 x 12, 384 x 12, 768 x 12, 1024 x 24), of a ConvViT as published."""
    image_size: str = "224"
    """Side of the square crop in pixels, or HEIGHTxWIDTH."""
    patch_size: int = 16
    """Side of a token in pixels; a ConvViT has tokens of 16, 8 or 4."""
    conv_mlp_ratio: float = 8.0
    """ConvViT: width of an MLP over the width in the convolution stages; DMJD has 8, ConvMAE 4."""
    in_chans: int = 3
    """Channels of an image: 3 (RGB) or 1 (grey)."""
    class_token: bool = False
    """Give the encoder a class token."""
    reg_tokens: int = 0
    """Register tokens."""
    mask_token: bool = False
    """Pass hidden tokens through the encoder as mask tokens (SimMIM, MaskFeat); needs decoder.depth 0."""
    embed_dim: int | None = None
    """Width, where it shall differ from the size's; a ConvViT's first stages have a quarter and a half of it."""
    depth: int | None = None
    """Transformer blocks, where they shall differ from the size's."""
    num_heads: int | None = None
    """Heads, where they shall differ from the size's."""

    def __post_init__(self) -> None:
        one_of(BackboneName, self, "backbone")
        one_of(BackboneSize, self, "size")
        at_least(1, self, "patch_size", "embed_dim", "depth", "num_heads", "conv_mlp_ratio")
        at_least(0, self, "reg_tokens")
        height, width = self.image_hw
        if height % self.patch_size or width % self.patch_size:
            raise ConfigError(
                f"model.image_size {self.image_size} is not a multiple of model.patch_size {self.patch_size}"
            )
        if self.backbone == "convvit":
            if self.class_token or self.reg_tokens or self.mask_token:
                raise ConfigError("model.class_token, reg_tokens and mask_token belong to model.backbone vit")
            if self.patch_size not in (4, 8, 16):
                raise ConfigError(f"model.patch_size {self.patch_size}: tokens of a convvit have 16, 8 or 4 px")

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
class Masking:
    """Disjoint masks."""

    num_views: int = 2
    """Masked views of each image."""
    mask_ratio: float = 0.6
    """Corruption rate: share of tokens hidden in one view."""
    predict_ratio: float = 1.0
    """Prediction rate: share of tokens hidden in at least one view."""
    block: int = 2
    """Side of the squares that are hidden together, in tokens; 1 hides token by token."""

    def __post_init__(self) -> None:
        at_least(1, self, "num_views", "block")


@dataclass(frozen=True, kw_only=True)
class Masked:
    """The masked branch: predicts hidden tokens."""

    target: str = "hog"
    """What is predicted: hog, pixels, normalized_pixels, ema (the running mean of the backbone itself), or a frozen
    teacher: timm:NAME, hf:NAME (a name or folder that Hugging Face transformers loads) or a backbone.safetensors.
    ConcatTarget with + between them: the losses are summed."""
    loss: LossName = "l2"
    """Loss on hidden tokens: l2, l1, smooth_l1, cosine."""

    def __post_init__(self) -> None:
        check_target(self)
        one_of(LossName, self, "loss")


@dataclass(frozen=True, kw_only=True)
class Visible:
    """The visible branch: predicts visible tokens."""

    weight: float = 1.0
    """Weight theta of its loss; 0 leaves the branch out."""
    target: str | None = None
    """What is predicted, as in masked.target. Default: the same."""
    loss: LossName = "smooth_l1"
    """Loss on visible tokens: l2, l1, smooth_l1, cosine."""
    beta: float = 2.0
    """Where smooth_l1, on either branch, turns from quadratic to linear, in units of the target."""
    aligned: bool = True
    """Compare a visible token with its own target. The released program of the paper compares it with that of another
    visible token of the view: off for that ablation only."""

    def __post_init__(self) -> None:
        at_least(0, self, "weight")
        at_least(1e-6, self, "beta")
        check_target(self)
        one_of(LossName, self, "loss")


@dataclass(frozen=True, kw_only=True)
class Hog:
    """Histograms of oriented gradients."""

    variant: HogVariant = "dmjd"
    """dmjd: differences of neighbours, whitened; maskfeat: Sobel's gradients, over their norm; mmpretrain: the same in
    Gaussian windows."""
    cell_size: int | None = None
    """Side of a cell in pixels. Default: 8 for patches of 16, 24 ..., else half a patch (all of an odd one)."""

    def __post_init__(self) -> None:
        at_least(1, self, "cell_size")
        one_of(HogVariant, self, "variant")


@dataclass(frozen=True, kw_only=True)
class Teacher:
    """Networks among the targets."""

    layers: tuple[int, ...] = (-1,)
    """Maps whose mean is the target, by timm's numbers, negative ones from the end; give the flag once for each."""
    decay: tuple[float, float] = (0.996, 0.9999)
    """Share of the running mean (ema) that a step keeps, at the start and at the end of the run."""
    bf16: bool = False
    """A frozen teacher computes in bf16 even where the run does not: faster on CPUs that have it."""
    cache: Path | None = None
    """Folder where a frozen teacher's targets are kept, for later epochs and other runs; needs crop.variants."""

    def __post_init__(self) -> None:
        if not 0 <= self.decay[0] <= self.decay[1] <= 1:
            raise ConfigError(f"teacher.decay {self.decay}: low before high, within 0 and 1")


@dataclass(frozen=True, kw_only=True)
class Decoder:
    """The decoder of the masked branch; its width is also the projector's."""

    embed_dim: int = 512
    """Width."""
    depth: int = 8
    """Blocks; 0 is a linear head (with model.mask_token)."""
    num_heads: int = 16
    """Heads."""
    mlp_ratio: float = 4.0
    """Width of an MLP over the width of the decoder."""

    def __post_init__(self) -> None:
        at_least(1, self, "embed_dim", "num_heads")
        at_least(0, self, "depth", "mlp_ratio")
        if self.embed_dim % self.num_heads or self.embed_dim % 4:
            raise ConfigError(
                f"decoder.embed_dim {self.embed_dim} is not a multiple of 4 and of its {self.num_heads} heads"
            )


@dataclass(frozen=True, kw_only=True)
class Crop:
    """What of an image a step sees: a random resized crop and a flip."""

    scale: tuple[float, float] = (0.5, 1.0)
    """Smallest and largest share of the image's area."""
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    """Smallest and largest width over height."""
    flip: bool = True
    """Mirror every other image."""
    variants: int | None = None
    """Different crops of an image: epoch e shows crop e mod variants. Default: another crop every epoch."""

    def __post_init__(self) -> None:
        at_least(1, self, "variants")
        if not (0 < self.scale[0] <= self.scale[1] <= 1 and 0 < self.ratio[0] <= self.ratio[1]):
            raise ConfigError(
                f"crop.scale {self.scale} and crop.ratio {self.ratio}: low before high, scale within 0 and 1"
            )


@dataclass(frozen=True, kw_only=True)
class Optim:
    """The optimizer and its learning rate."""

    name: str = "adamw"
    """Any optimizer of timm that takes betas: adamw, lamb, lion ..."""
    blr: float = 6e-4
    """Base learning rate, for 256 images a step and predict_ratio = mask_ratio."""
    betas: tuple[float, float] = (0.9, 0.95)
    """Decay of the moments."""
    weight_decay: float = 0.05
    """Weight decay of matrices; vectors have none."""
    warmup_epochs: float = 20
    """Linear warm-up; a cosine to zero follows."""
    clip_grad: float = 0.0
    """Largest norm of the gradient; 0 does not clip."""
    accumulation: int = 1
    """Parts of a step's batch that are computed one after the other."""

    def __post_init__(self) -> None:
        at_least(0, self, "blr", "weight_decay", "warmup_epochs", "clip_grad")
        at_least(1, self, "accumulation")


@dataclass(frozen=True, kw_only=True)
class Log:
    """What is written down on the way."""

    log_every: int = 10
    """Steps between two lines of metrics.jsonl."""
    evals: int = 5
    """Evaluations during a run, beside the last one."""
    saves: int = 20
    """Checkpoints during a run; two are kept."""

    def __post_init__(self) -> None:
        at_least(1, self, "log_every")
        at_least(0, self, "evals", "saves")


@dataclass(frozen=True, kw_only=True)
class Monitor(Log):
    """What is written down on the way, and how good the features are."""

    max_images: int = 2000
    """Images per part (training, held out) that an evaluation looks at."""
    max_share: float = 0.05
    """Images that all evaluations during the run look at, over those that training reads: a short run has fewer
    evaluations. One costs up to as much time as training on an image."""

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(1, self, "max_images")
        at_least(0, self, "max_share")


@dataclass(frozen=True, kw_only=True)
class Run:
    """Where a verb reads and computes."""

    data: str = "shapes"
    """Folder of images, or a built-in set: shapes, cifar10, fashion-mnist (NAME:DIR where you keep a copy)."""
    device: str = "auto"
    """cpu, cuda, cuda:1, mps; auto takes the best."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """Precision of the matrix products; auto is bf16 where the GPU has it."""
    debug: bool = False
    """Show the traceback of an error."""


@dataclass(frozen=True, kw_only=True)
class Pretrain(Run):
    """Settings of `dmjd pretrain`."""

    out: Path = Path("runs/pretrain")
    """Directory of the run."""
    seed: int = 0
    """Seed of everything random."""
    workers: int | None = None
    """Processes that load images. Default: none for sets in memory, else one per core but one."""
    preset: str = "quick"
    """Recipe: mae, maskfeat, convmae, fastconvmae, dm, dmjd, dmjd-clip, dmjd-dino, data2vec; for 2 cores quick and
    quick-convmae, -fastconvmae, -dmjd, -teacher."""
    config: Path | None = None
    """YAML file that overrides the preset."""
    epochs: float = 400
    """Passes over the images; an epoch shows each image num_views times to the encoder."""
    steps: int | None = None
    """Optimizer steps, instead of epochs."""
    batch_size: int = 512
    """Images in one optimizer step."""
    resume: bool = False
    """Go on with the run in --out."""
    model: Model = field(default_factory=Model)
    masking: Masking = field(default_factory=Masking)
    masked: Masked = field(default_factory=Masked)
    visible: Visible = field(default_factory=Visible)
    hog: Hog = field(default_factory=Hog)
    teacher: Teacher = field(default_factory=Teacher)
    decoder: Decoder = field(default_factory=Decoder)
    crop: Crop = field(default_factory=Crop)
    optim: Optim = field(default_factory=Optim)
    monitor: Monitor = field(default_factory=Monitor)

    def __post_init__(self) -> None:
        at_least(1, self, "steps", "batch_size")
        at_least(0, self, "epochs", "seed", "workers")
        if self.batch_size % self.optim.accumulation:
            raise ConfigError(
                f"batch_size {self.batch_size} is no multiple of optim.accumulation {self.optim.accumulation}"
            )
        if self.teacher.cache and not self.crop.variants:
            raise ConfigError("teacher.cache keeps the targets of crops that come again: set crop.variants, such as 2")
        if self.model.mask_token != (self.decoder.depth == 0):
            raise ConfigError("model.mask_token and decoder.depth 0 (a linear head) belong together: set both or none")

    @property
    def cell_size(self) -> int:
        """Side of a HOG cell in pixels."""
        patch_size = self.model.patch_size
        half = patch_size // 2 if patch_size % 2 == 0 else patch_size
        return self.hog.cell_size or (8 if patch_size >= 16 and patch_size % 8 == 0 else half)

    @property
    def lr(self) -> float:
        """Peak learning rate: blr * images per step * (m_pred / m_corr) / 256 (section 4 of the paper)."""
        return self.optim.blr * self.batch_size * self.masking.predict_ratio / self.masking.mask_ratio / 256


@dataclass(frozen=True, kw_only=True)
class Judge(Run):
    """What every verb that judges a backbone by labels has."""

    backbone: str
    """A backbone.safetensors, or timm:NAME for a model of timm with its weights."""
    untrained: bool = False
    """Take the same network without its weights, to compare with."""
    seed: int = 0
    """Seed of everything random, and of the held-out images where the set does not name them."""


@dataclass(frozen=True, kw_only=True)
class Knn(Judge):
    """Settings of `dmjd knn`."""

    out: Path | None = None
    """Directory of the report; without it, only the line of JSON is printed."""
    k: int = 20
    """Neighbours that vote."""
    temperature: float = 0.07
    """A neighbour's vote weighs exp(cosine similarity / temperature)."""
    batch_size: int = 256
    """Images at a time."""
    layers: tuple[int, ...] = ()
    """Blocks whose mean-pooled tokens are joined, by number, negative ones from the end; give the flag once for each.
    Default: the pooled output."""

    def __post_init__(self) -> None:
        at_least(1, self, "k", "batch_size")
        at_least(0, self, "seed")
        at_least(0.02, self, "temperature")  # exp(1 / 0.01) is beyond float32


@dataclass(frozen=True, kw_only=True)
class Learn(Judge):
    """What every verb that trains with labels has."""

    out: Path
    """Directory of the run."""
    workers: int | None = None
    """Processes that load images. Default: none for sets in memory, else one per core but one."""
    config: Path | None = None
    """YAML file that overrides the preset."""
    epochs: float = 100
    """Passes over the images."""
    steps: int | None = None
    """Optimizer steps, instead of epochs."""
    batch_size: int = 1024
    """Images in one optimizer step."""
    resume: bool = False
    """Go on with the run in --out."""
    log: Log = field(default_factory=Log)

    def __post_init__(self) -> None:
        at_least(1, self, "steps", "batch_size")
        at_least(0, self, "epochs", "seed", "workers")


@dataclass(frozen=True, kw_only=True)
class Few(Learn):
    """What every verb that learns from the labels of images has."""

    fraction: float = 1.0
    """Share of the training images of every class whose labels are used, at least one; larger shares hold smaller."""
    shots: int | None = None
    """Training images of every class whose labels are used, instead of a share."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.fraction <= 1:
            raise ConfigError(f"fraction {self.fraction} is out of range; choose above 0, at most 1")
        if self.shots is not None and self.fraction != 1:
            raise ConfigError(f"fraction {self.fraction} and shots {self.shots}; choose one of them")
        at_least(1, self, "shots")


@dataclass(frozen=True, kw_only=True)
class Linear(Few):
    """Settings of `dmjd linear`."""

    out: Path = Path("runs/linear")
    """Directory of the results."""
    preset: str = "base"
    """Numbers of the paper's recipe: base, large."""
    recipe: Literal["features", "paper"] = "features"
    """features: logistic regression on features computed once, the penalty chosen on a slice of the training images.
    paper: BatchNorm and a linear layer, trained by LARS on augmented images."""
    layers: tuple[int, ...] = ()
    """Blocks whose mean-pooled tokens are joined, by number, negative ones from the end; give the flag once for each.
    Default: the pooled output."""
    blr: float = 0.1
    """Base learning rate of the paper's recipe, for 256 images a step."""
    warmup_epochs: float = 10
    """Linear warm-up of the paper's recipe; a cosine to zero follows."""

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(0, self, "blr", "warmup_epochs")

    @property
    def lr(self) -> float:
        """Peak learning rate."""
        return self.blr * self.batch_size / 256


@dataclass(frozen=True, kw_only=True)
class Augment:
    """What training sees of an image; names and meanings are timm's."""

    scale: tuple[float, float] = (0.08, 1.0)
    """Smallest and largest share of the image's area in a crop."""
    flip: bool = True
    """Mirror every other image."""
    auto_augment: str = "rand-m9-mstd0.5-inc1"
    """Policy of RandAugment; none for none."""
    random_erasing: float = 0.25
    """Probability of erasing a box."""
    mixup: float = 0.8
    """Alpha of mixup; 0 for none."""
    cutmix: float = 1.0
    """Alpha of cutmix; 0 for none."""
    label_smoothing: float = 0.1
    """Share of a label that is spread over all classes."""

    def __post_init__(self) -> None:
        if not 0 < self.scale[0] <= self.scale[1] <= 1:
            raise ConfigError(f"augment.scale {self.scale}: low before high, within 0 and 1")
        at_least(0, self, "random_erasing", "mixup", "cutmix", "label_smoothing")
        for name in ("random_erasing", "label_smoothing"):
            if getattr(self, name) >= 1:
                raise ConfigError(f"augment.{name} {getattr(self, name)} is out of range; choose below 1")


@dataclass(frozen=True, kw_only=True)
class Tune(Learn):
    """What every verb that trains a backbone on labels has."""

    layer_decay: float = 0.65
    """The learning rate of a layer is this times that of the layer after it."""
    drop_path: float = 0.1
    """Stochastic depth of the last block; it grows linearly from 0 at the first one."""
    optim: Optim = field(default_factory=lambda: Optim(blr=5e-4, betas=(0.9, 0.999), warmup_epochs=5.0))

    def __post_init__(self) -> None:
        super().__post_init__()
        within(0.01, 1.0, self, "layer_decay")
        within(0.0, 0.99, self, "drop_path")
        if self.batch_size % self.optim.accumulation:
            raise ConfigError(
                f"batch_size {self.batch_size} is no multiple of optim.accumulation {self.optim.accumulation}"
            )

    @property
    def lr(self) -> float:
        """Peak learning rate of the head."""
        return self.optim.blr * self.batch_size / 256


@dataclass(frozen=True, kw_only=True)
class Finetune(Few, Tune):
    """Settings of `dmjd finetune`."""

    out: Path = Path("runs/finetune")
    """Directory of the run."""
    preset: str = "quick"
    """Recipe to start from: quick, base, large."""
    ema: float = 0.0
    """Decay of a running mean of the weights, which is then what is judged and kept; 0 for none."""
    augment: Augment = field(default_factory=Augment)

    def __post_init__(self) -> None:
        super().__post_init__()
        within(0.0, 0.9999999, self, "ema")


@dataclass(frozen=True, kw_only=True)
class Dense(Tune):
    """What segmentation and detection have in common."""

    predict: Path | None = None
    """An image or a folder of images: write what a trained --backbone RUN/last.safetensors sees in them to --out,
    instead of training."""
    classes: Path | None = None
    """File with the name of a class in every line. Default: DATA/classes.txt, else what the annotations have."""
    crop_size: str = "512"
    """Side of a training crop in pixels, or HEIGHTxWIDTH."""
    scale: tuple[float, float] = (0.5, 2.0)
    """Smallest and largest size of a training image before it is cropped, times the size it is judged at."""
    flip: bool = True
    """Mirror every other image."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.data and self.predict is None:
            raise ConfigError("no data: give --data to train, or --predict with a trained --backbone")
        if not 0 < self.scale[0] <= self.scale[1] < math.inf:
            raise ConfigError(f"scale {self.scale}: low before high, above 0")
        height_width("crop_size", self.crop_size)

    @property
    def crop_hw(self) -> tuple[int, int]:
        """Height and width of a training crop in pixels."""
        return height_width("crop_size", self.crop_size)


@dataclass(frozen=True, kw_only=True)
class Segment(Dense):
    """Settings of `dmjd segment`."""

    data: str = ""
    """Folder with images/PART/NAME.jpg and annotations/PART/NAME.png, the parts called train and val."""
    out: Path = Path("runs/segment")
    """Directory of the run."""
    preset: str = "camvid"
    """Recipe to start from: camvid (for 2 cores), ade20k (the published one)."""
    ignore_index: int = 255
    """Label of pixels that are neither trained on nor counted."""
    reduce_zero_label: bool = False
    """Label 0 has no class either, and label 1 is the first class, as in ADE20K."""
    photometric: bool = True
    """Change brightness, contrast, saturation and hue of training images."""
    inference: Literal["whole", "slide"] = "whole"
    """Look at a whole image, or at windows of the crop's size whose logits are averaged."""
    stride: int | None = None
    """Pixels from one window to the next. Default: two thirds of a window."""
    decoder_channels: int = 512
    """Width of UPerNet."""
    auxiliary_weight: float = 0.4
    """Weight of the loss of a second head on the map of stride 16; 0 for none."""
    schedule: Literal["cosine", "poly"] = "poly"
    """How the learning rate falls after the warm-up: cosine, or poly, a straight line."""

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(0, self, "ignore_index", "auxiliary_weight")
        at_least(1, self, "stride", "decoder_channels")
        if self.stride and self.stride > min(self.crop_hw):
            raise ConfigError(f"stride {self.stride} leaves gaps between windows of {self.crop_size}")
        if self.batch_size < 2 * self.optim.accumulation:
            raise ConfigError("batch_size: BatchNorm needs two images at a time or more")

    @property
    def short_side(self) -> int:
        """Pixels of the shorter side of an image that is judged."""
        return min(self.crop_hw)


@dataclass(frozen=True, kw_only=True)
class Detect(Dense):
    """Settings of `dmjd detect`."""

    data: str = ""
    """Folder of a set as COCO (annotations/*train*.json, *val*.json) or Pascal VOC (ImageSets/Main) has it."""
    out: Path = Path("runs/detect")
    """Directory of the run."""
    preset: str = "bccd"
    """Recipe to start from: bccd (for 2 cores), coco (the published one)."""
    fpn_channels: int = 256
    """Width of the feature pyramid network."""
    head_channels: int = 1024
    """Width of the layers that judge a box."""
    window: int | None = None
    """Side, in tokens, of the windows that all but four blocks of a ViT attend in: for large images. Default: none."""

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(1, self, "fpn_channels", "head_channels", "window")


@dataclass(frozen=True, kw_only=True)
class Embed(Run):
    """Settings of `dmjd embed`."""

    backbone: str
    """A backbone.safetensors, or timm:NAME for a model of timm with its weights."""
    out: Path
    """Features go to this .npy file, the images' paths and labels to the .csv beside it."""
    batch_size: int = 256
    """Images at a time."""

    def __post_init__(self) -> None:
        at_least(1, self, "batch_size")


def to_dict(config: Any) -> dict[str, Any]:
    """Turn settings into plain YAML values; those left at None are left out."""
    plain: dict[str, Any] = {}
    for setting in fields(config):
        value = getattr(config, setting.name)
        if is_dataclass(value):
            plain[setting.name] = to_dict(value)
        elif value is not None:
            plain[setting.name] = (
                list(value) if isinstance(value, tuple) else str(value) if isinstance(value, Path) else value
            )
    return plain


def to_yaml(config: Any) -> str:
    """Write settings as YAML."""
    return yaml.safe_dump(to_dict(config), sort_keys=False)
