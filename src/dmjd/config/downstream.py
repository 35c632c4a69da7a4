"""Settings of the verbs that start from a backbone."""

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, ClassVar, Literal

from dmjd.config.common import (
    SEEDS,
    BackboneSettings,
    LabelSubset,
    LogSettings,
    OptimSettings,
    PartSettings,
    ReadSettings,
    RunSettings,
    StartSettings,
    flat,
    group,
)
from dmjd.config.load import by_flag, read_yaml
from dmjd.config.rules import (
    LONGEST,
    PRESETS,
    flags_of,
    height_width,
    names_settings,
    ordered,
    to_dict,
    within,
)
from dmjd.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class KnnSettings:
    """Settings of `dmjd knn`."""

    run: Annotated[ReadSettings, flat("Run")] = field(default_factory=ReadSettings)
    start: Annotated[StartSettings, flat("Backbone")]
    labels: Annotated[PartSettings, flat("Labels")] = field(default_factory=PartSettings)
    out: Annotated[Path | None, group("Run")] = None
    """Directory of the report; without it, only the line of JSON is printed."""
    seed: Annotated[int, group("Run")] = 0
    """Seed of an untrained network, and of the choice of held-out images where the set has no part for them."""
    k: Annotated[int, group("Task")] = 20
    """Neighbours that vote."""
    temperature: Annotated[float, group("Task")] = 0.07
    """Temperature of the votes: a neighbour has weight exp(cosine similarity / temperature)."""
    layers: Annotated[tuple[int, ...], group("Task")] = ()
    """Blocks whose mean-pooled tokens are joined, by number, negative ones from the end; give the flag once for each.
    Default: the pooled output."""

    def __post_init__(self) -> None:
        within(0, SEEDS, self, "seed")
        within(1, 1_000_000, self, "k")
        within(0.02, 1000, self, "temperature")  # exp(1 / 0.01) is beyond float32
        within(-1000, 1000, self, "layers")


@dataclass(frozen=True, kw_only=True)
class EmbedSettings:
    """Settings of `dmjd embed`."""

    run: Annotated[ReadSettings, flat("Run")] = field(default_factory=ReadSettings)
    start: Annotated[BackboneSettings, flat("Backbone")]
    out: Annotated[Path, group("Run")]
    """F.npy: one row of features per image, with paths and labels in F.csv, and backbone and settings in F.json.
    F.parquet: paths, labels and features in one table. In F.csv, names that a spreadsheet would take for formulas are
    prefixed with a quote (')."""
    resume: Annotated[bool, group("Run")] = False
    """Continue from what an interrupted run with the same settings has written, if anything."""
    layers: Annotated[tuple[int, ...], group("Task")] = ()
    """Blocks whose mean-pooled tokens are joined, by number, negative ones from the end; give the flag once for each.
    Default: the pooled output."""
    tokens: Annotated[bool, group("Task")] = False
    """Write features of every patch, (N, L, D) for L patches, instead of one row per image: those of --layers, or of
    the last block after the final norm (a hybrid's norm comes after pooling)."""
    dtype: Annotated[Literal["float32", "float16"], group("Task")] = "float32"
    """Type of the features; float16 halves the file."""

    def __post_init__(self) -> None:
        within(-1000, 1000, self, "layers")


@dataclass(frozen=True, kw_only=True)
class LinearRun(RunSettings):
    """Where, how long and on what `dmjd linear` computes."""

    out: Path = Path("runs/linear")
    """Directory of the results."""
    preset: str = "base"
    """Hyperparameters of the paper's recipe: base, large."""


@dataclass(frozen=True, kw_only=True)
class LinearSettings:
    """Settings of `dmjd linear`."""

    run: Annotated[LinearRun, flat("Run")] = field(default_factory=LinearRun)
    start: Annotated[StartSettings, flat("Backbone")]
    labels: Annotated[LabelSubset, flat("Labels")] = field(default_factory=LabelSubset)
    recipe: Annotated[Literal["features", "paper"], group("Task")] = "features"
    """features: logistic regression on features computed once, its penalty chosen by five-fold cross-validation. paper:
    BatchNorm and a linear layer, trained with LARS on augmented images; training flags apply to this recipe only."""
    layers: Annotated[tuple[int, ...], group("Task")] = ()
    """Blocks whose mean-pooled tokens are joined, by number, negative ones from the end; give the flag once for each.
    Default: the pooled output."""
    blr: Annotated[float, group("Task")] = 0.1
    """Base learning rate of the paper's recipe, for 256 images per step."""
    warmup_epochs: Annotated[float, group("Task")] = 10.0
    """Epochs of linear warm-up in the paper's recipe; a cosine to zero follows."""
    log: Annotated[LogSettings, group("Log")] = field(default_factory=LogSettings)

    def __post_init__(self) -> None:
        if self.run.activation_checkpointing:
            raise ConfigError("linear trains no blocks; --activation_checkpointing; leave it out")
        names_settings(self, self.run.allow_change)
        within(-1000, 1000, self, "layers")
        within(0, 1000, self, "blr")
        within(0, 10_000, self, "warmup_epochs")
        if self.recipe == "features":
            refuse_training(self)

    @property
    def lr(self) -> float:
        """Peak learning rate."""
        return self.blr * self.run.batch_size / 256


# Training settings of `dmjd linear`; only the paper's recipe trains step by step.
OF_TRAINING = (
    *("epochs", "steps", "batch_size", "parallel", "compile", "deterministic", "resume", "allow_change"),
    *("checkpoint_minutes", "max_bad", "log_to", "blr", "warmup_epochs", "log.log_every", "log.evals", "log.saves"),
)


def refuse_training(settings: LinearSettings) -> None:
    """Refuse training flags, which would have no effect here; files may contain settings that are not used.

    Raises:
        ConfigError: If such a flag is given.
    """
    run, usual, given = settings.run, flags_of(LinearSettings), by_flag(to_dict(settings))
    preset = usual | by_flag(read_yaml(PRESETS / "linear" / f"{run.preset}.yaml"))
    filed = by_flag(read_yaml(run.config)) if run.config else {}
    for name in OF_TRAINING:
        if name not in filed and given.get(name) not in (usual[name], preset[name]):
            raise ConfigError(f"--{name} is for --recipe paper; leave it out, or give --recipe paper")


# timm's syntax: magnitude, operations, their probability, noise and upper bound of the magnitude, choice of operations.
RAND_AUGMENT = re.compile(
    r"none|rand(-(m\d{1,2}|n\d{1,2}|p(0(\.\d+)?|1(\.0+)?)|mstd\d{1,3}(\.\d+)?|mmax\d{1,2}|inc[01]|tweights))*"
)


@dataclass(frozen=True, kw_only=True)
class AugmentSettings:
    """Augmentation of training images; names and meanings are timm's."""

    SECTION: ClassVar[str] = "augment."

    scale: tuple[float, float] = (0.08, 1.0)
    """Smallest and largest share of the image's area in a crop."""
    flip: bool = True
    """Mirror half of the images, at random."""
    auto_augment: str = "rand-m9-mstd0.5-inc1"
    """RandAugment policy, or none. Images of more than 8 bits, or with neither 1 nor 3 channels, are not augmented by
    it, and a line on stderr says so."""
    random_erasing: float = 0.25
    """Probability of erasing a box."""
    mixup: float = 0.8
    """Alpha of mixup; 0 for none."""
    cutmix: float = 1.0
    """Alpha of cutmix; 0 for none."""
    label_smoothing: float = 0.1
    """Share of each label's weight that is spread over all classes."""

    def __post_init__(self) -> None:
        ordered(0.0001, 1, self, "scale")
        if not RAND_AUGMENT.fullmatch(self.auto_augment):
            said = f"no policy of RandAugment; augment.auto_augment {self.auto_augment!r}"
            raise ConfigError(f"{said}; choose none, or one such as rand-m9-n2-p0.5-mstd0.5-inc1")
        within(0, 0.999, self, "random_erasing", "label_smoothing")
        within(0, 1000, self, "mixup", "cutmix")


@dataclass(frozen=True, kw_only=True)
class TuningSettings:
    """How a backbone is fine-tuned."""

    layer_decay: float = 0.65
    """Learning rate of a layer, as a multiple of that of the layer after it."""
    drop_path: float = 0.1
    """Stochastic depth rate of the last block; it grows linearly from 0 in the first one."""

    def __post_init__(self) -> None:
        within(0.01, 1, self, "layer_decay")
        within(0, 0.99, self, "drop_path")


@dataclass(frozen=True, kw_only=True)
class TuningOptim(OptimSettings):
    """The optimizer and its learning rate, for a pre-trained backbone."""

    blr: float = 5e-4
    """Base learning rate of the head, for 256 images per step."""
    betas: tuple[float, float] = (0.9, 0.999)
    warmup_epochs: float = 5.0


def tuning_lr(run: RunSettings, optim: OptimSettings) -> float:
    """Compute the peak learning rate of a head."""
    return optim.blr * run.batch_size / 256


# Length of a run without --epochs: steps, and the fewest and most epochs (docs/results/tuning_length.md).
FEW_STEPS, EPOCHS = 500, (10, 100)


@dataclass(frozen=True, kw_only=True)
class FinetuneRun(RunSettings):
    """Where, how long and on what `dmjd finetune` computes."""

    FEWEST_EPOCHS: ClassVar[float] = 0.0

    out: Path = Path("runs/finetune")
    preset: str = "quick"
    """Recipe to start from: quick, base, large."""
    epochs: float = 0.0
    """Passes over the images; 0 takes as many as 500 steps need, at least 10 and at most 100."""

    def num_steps(self, count: int) -> int:
        """Count the steps of a run over `count` images."""
        fewest, most = EPOCHS
        by_number = min(max(fewest, FEW_STEPS * self.batch_size / max(count, 1)), most)
        return self.steps or max(round((self.epochs or by_number) * count / self.batch_size), 1)


@dataclass(frozen=True, kw_only=True)
class FinetuneSettings:
    """Settings of `dmjd finetune`."""

    run: Annotated[FinetuneRun, flat("Run")] = field(default_factory=FinetuneRun)
    start: Annotated[StartSettings, flat("Backbone")]
    labels: Annotated[LabelSubset, flat("Labels")] = field(default_factory=LabelSubset)
    tuning: Annotated[TuningSettings, flat("Fine-tuning")] = field(default_factory=TuningSettings)
    ema: Annotated[float, group("Fine-tuning")] = 0.0
    """Decay of an exponential moving average of the weights, which is then evaluated and saved in their place; 0 for
    none."""
    augment: Annotated[AugmentSettings, group("Augmentation")] = field(default_factory=AugmentSettings)
    optim: Annotated[TuningOptim, group("Optimizer")] = field(default_factory=TuningOptim)
    log: Annotated[LogSettings, group("Log")] = field(default_factory=LogSettings)

    def __post_init__(self) -> None:
        names_settings(self, self.run.allow_change)
        within(0, 0.9999999, self, "ema")

    @property
    def lr(self) -> float:
        """Peak learning rate of the head."""
        return tuning_lr(self.run, self.optim)


@dataclass(frozen=True, kw_only=True)
class DenseSettings(PartSettings):
    """Settings that segmentation and detection share."""

    predict: Path | None = None
    """An image or a folder of images: write the predictions of a trained --backbone RUN/last.safetensors for them to
    --out, instead of training."""
    classes: Path | None = None
    """File with one class name per line. Default: DATA/classes.txt, else the classes in the annotations."""
    crop_size: str = "512"
    """Side of a training crop in pixels, or HEIGHTxWIDTH."""
    scale: tuple[float, float] = (0.5, 2.0)
    """Smallest and largest size of a training image before cropping, as multiples of its size in evaluation."""
    flip: bool = True
    """Mirror half of the images, at random."""

    def __post_init__(self) -> None:
        ordered(0.01, 100, self, "scale")
        height_width("crop_size", self.crop_size)

    @property
    def crop_hw(self) -> tuple[int, int]:
        """Height and width of a training crop in pixels."""
        return height_width("crop_size", self.crop_size)


def check_dense(run: RunSettings, dense: DenseSettings) -> None:
    """Refuse incompatible settings of a dense task.

    Raises:
        ConfigError: If there are no images to train on or predict.
    """
    if not run.data and dense.predict is None:
        raise ConfigError("no data: give --data to train, or --predict with a trained --backbone")


@dataclass(frozen=True, kw_only=True)
class SegmentRun(RunSettings):
    """Where, how long and on what `dmjd segment` computes."""

    data: str = ""
    """Folder with images/PART/NAME.jpg and annotations/PART/NAME.png, where PART is train or val."""
    out: Path = Path("runs/segment")
    preset: str = "camvid"
    """Recipe to start from: camvid (for 2 cores), ade20k (the published one)."""


@dataclass(frozen=True, kw_only=True)
class SegmentSettings:
    """Settings of `dmjd segment`."""

    run: Annotated[SegmentRun, flat("Run")] = field(default_factory=SegmentRun)
    start: Annotated[StartSettings, flat("Backbone")]
    tuning: Annotated[TuningSettings, flat("Fine-tuning")] = field(default_factory=TuningSettings)
    dense: Annotated[DenseSettings, flat("Images")] = field(default_factory=DenseSettings)
    ignore_index: Annotated[int, group("Task")] = 255
    """Label of pixels that neither training nor evaluation counts."""
    reduce_zero_label: Annotated[bool, group("Task")] = False
    """Ignore label 0 too, and take label 1 for the first class, as in ADE20K."""
    photometric: Annotated[bool, group("Task")] = True
    """Jitter brightness, contrast, saturation and hue of training images; images with neither 1 nor 3 channels stay as
    they are."""
    inference: Annotated[Literal["whole", "slide"], group("Task")] = "whole"
    """Predict a whole image at once, or sliding windows of the crop's size whose logits are averaged. Either way its
    shorter side is resized to that of the crop, or to less where the longer side would exceed four times as many
    pixels."""
    stride: Annotated[int | None, group("Task")] = None
    """Pixels from one window to the next. Default: two thirds of a window."""
    decoder_channels: Annotated[int, group("Task")] = 512
    """Width of UPerNet."""
    auxiliary_weight: Annotated[float, group("Task")] = 0.4
    """Weight of the loss of an auxiliary head on the feature map of stride 16; 0 for none."""
    schedule: Annotated[Literal["cosine", "poly"], group("Task")] = "poly"
    """How the learning rate falls after the warm-up: cosine, or poly, which is linear."""
    optim: Annotated[TuningOptim, group("Optimizer")] = field(default_factory=TuningOptim)
    log: Annotated[LogSettings, group("Log")] = field(default_factory=LogSettings)

    def __post_init__(self) -> None:
        names_settings(self, self.run.allow_change)
        check_dense(self.run, self.dense)
        within(0, 65_535, self, "ignore_index")
        within(1, LONGEST, self, "stride")
        within(1, 16_384, self, "decoder_channels")
        within(0, 1000, self, "auxiliary_weight")
        if self.stride and self.stride > min(self.dense.crop_hw):
            raise ConfigError(f"stride {self.stride} leaves gaps between windows of {self.dense.crop_size}")
        if self.run.batch_size < 2 * self.optim.accumulation:
            raise ConfigError("batch_size: BatchNorm needs two images at a time or more")

    @property
    def lr(self) -> float:
        """Peak learning rate of the heads."""
        return tuning_lr(self.run, self.optim)


@dataclass(frozen=True, kw_only=True)
class DetectRun(RunSettings):
    """Where, how long and on what `dmjd detect` computes."""

    data: str = ""
    """Folder laid out as COCO (`annotations/*train*.json`, `*val*.json`) or Pascal VOC (ImageSets/Main)."""
    out: Path = Path("runs/detect")
    preset: str = "bccd"
    """Recipe to start from: bccd (for 2 cores), coco (the published one)."""


@dataclass(frozen=True, kw_only=True)
class DetectSettings:
    """Settings of `dmjd detect`."""

    run: Annotated[DetectRun, flat("Run")] = field(default_factory=DetectRun)
    start: Annotated[StartSettings, flat("Backbone")]
    tuning: Annotated[TuningSettings, flat("Fine-tuning")] = field(default_factory=TuningSettings)
    dense: Annotated[DenseSettings, flat("Images")] = field(default_factory=DenseSettings)
    fpn_channels: Annotated[int, group("Task")] = 256
    """Width of the feature pyramid network."""
    head_channels: Annotated[int, group("Task")] = 1024
    """Width of the layers that classify and refine a box."""
    window: Annotated[int | None, group("Task")] = None
    """For large images: side, in tokens, of the attention windows in all but four blocks of a ViT. Default: no
    windows."""
    optim: Annotated[TuningOptim, group("Optimizer")] = field(default_factory=TuningOptim)
    log: Annotated[LogSettings, group("Log")] = field(default_factory=LogSettings)

    def __post_init__(self) -> None:
        names_settings(self, self.run.allow_change)
        check_dense(self.run, self.dense)
        within(1, 16_384, self, "fpn_channels", "head_channels")
        within(1, 1024, self, "window")

    @property
    def lr(self) -> float:
        """Peak learning rate of the heads."""
        return tuning_lr(self.run, self.optim)
