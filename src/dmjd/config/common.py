"""Settings that several verbs share, in the groups that verbs are composed of."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from cyclopts import Group, Parameter

from dmjd.config.rules import within
from dmjd.errors import ConfigError

Precision = Literal["auto", "fp32", "bf16"]
LogTo = Literal["tensorboard", "wandb", "trackio", "mlflow"]
SEEDS = 2**63 - 1  # the largest one

# Groups of the help, in this order.
GROUPS = (
    "Plan",
    "Run",
    "Backbone",
    "Labels",
    "Model",
    "Masking",
    "Masked branch",
    "Visible branch",
    "HOG targets",
    "Teachers",
    "Decoder",
    "Crops",
    "Images",
    "Task",
    "Fine-tuning",
    "Augmentation",
    "Optimizer",
    "Monitoring",
    "Log",
)


def group(name: str) -> Parameter:
    """Put a setting, or a section of settings, into a group of the help."""
    return Parameter(group=Group(name, sort_key=GROUPS.index(name)))


def flat(name: str) -> Parameter:
    """Put settings whose flags have no section (--data, not --run.data) into a group of the help."""
    return Parameter(name="*", group=Group(name, sort_key=GROUPS.index(name)))


@dataclass(frozen=True, kw_only=True)
class DeviceSettings:
    """What a verb reads, and where it computes."""

    data: Annotated[str, Parameter(required=True)] = ""
    """Folder of images; list of them (FILE.csv, .tsv, .parquet, .txt); FILE.zip, FILE.tar or tar shards; FILE.npy;
    hf:NAME; or a built-in set: shapes, cifar10, fashion-mnist (NAME:DIR where you keep a copy)."""
    data_pages: Literal["bands", "frames"] | None = None
    """What the pages of a TIFF are: bands of one image, or frames, each an image. Default: files have one page."""
    data_range: tuple[float, float] | None = None
    """Lowest and highest value of images deeper than 8 bits. Default: the range that the backbone was trained with,
    else that of a sample of the images."""
    workers: int | None = None
    """Processes that load images. If not given: none for sets in memory, else one fewer than the cores of this rank, at
    most 16."""
    device: str = "auto"
    """cpu, cuda, cuda:1, mps; auto takes the best one available."""
    precision: Precision = "auto"
    """Precision of matrix products; auto is bf16 on GPUs that have it, and for pre-training a network of width 256 or
    more on a CPU with matrix units (AMX)."""
    debug: bool = False
    """Show the traceback of an error."""

    def __post_init__(self) -> None:
        within(-3e38, 3e38, self, "data_range")  # of float32
        if self.data_range and not self.data_range[0] < self.data_range[1]:
            raise ConfigError(f"data_range {self.data_range}: low before high")
        within(0, 512, self, "workers")

    @property
    def keywords(self) -> dict[str, Any]:
        """What `FeatureExtractor` takes from here."""
        images = {"value_range": self.data_range, "pages": self.data_pages}
        return {"precision": self.precision, "workers": self.workers, **images}


@dataclass(frozen=True, kw_only=True)
class RunSettings(DeviceSettings):
    """Settings of every verb that trains."""

    FEWEST_EPOCHS: ClassVar[float] = 1e-6

    out: Path
    """Directory of the run."""
    preset: str
    """Recipe to start from."""
    config: Path | None = None
    """YAML file that overrides the preset."""
    epochs: float = 100.0
    """Passes over the images."""
    steps: int | None = None
    """Optimizer steps, instead of epochs."""
    batch_size: int = 1024
    """Images in one optimizer step, over all processes."""
    seed: int = 0
    """Seed of everything random, and of the choice of held-out images where the set has no part for them."""
    parallel: Literal["ddp", "fsdp"] = "ddp"
    """With torchrun: ddp keeps the whole model on every process, fsdp a share of it."""
    compile: Literal["auto", "on", "off"] = "auto"
    """Compile the network with torch.compile: minutes at the start, faster steps afterwards; auto compiles on GPUs in
    runs of 2,000 steps or more. Where torch cannot, the run says so and goes on without."""
    activation_checkpointing: bool = False
    """Recompute the activations inside every block in the backward pass instead of keeping them: less memory, one more
    forward pass per step."""
    deterministic: bool = False
    """Use deterministic algorithms only: a run on a GPU, repeated or resumed, is then the same to the last bit, but
    slower. On a CPU this always holds. Where torch has no such algorithm, as for segment on a GPU, the run ends and
    says so."""
    resume: bool = False
    """Resume the run in --out."""
    allow_change: tuple[str, ...] = ()
    """Setting that may differ from the resumed run's, such as optim.blr, or data for other images; give the flag once
    for each. More epochs or steps are always allowed."""
    checkpoint_minutes: float = 15.0
    """Longest time between two checkpoints."""
    max_bad: float = 0.01
    """Share of the images that may fail to decode before the run stops."""
    log_to: tuple[LogTo, ...] = ()
    """Logger that also gets the numbers of metrics.jsonl; give the flag once for each. It has to be installed.
    TensorBoard's files go to --out; wandb, trackio and mlflow follow their own settings."""

    def __post_init__(self) -> None:
        super().__post_init__()
        within(1, 1_000_000_000, self, "steps")
        within(1, 1_000_000, self, "batch_size")
        within(self.FEWEST_EPOCHS, 1_000_000, self, "epochs")
        within(0, SEEDS, self, "seed")
        within(0, 10_000, self, "checkpoint_minutes")
        within(0, 1, self, "max_bad")

    def num_steps(self, count: int) -> int:
        """Count the steps of a run over `count` images."""
        return self.steps or max(round(self.epochs * count / self.batch_size), 1)

    @property
    def training(self) -> dict[str, Any]:
        """Arguments of `ParallelModel`."""
        return {
            "parallel": self.parallel,
            "compile": self.compile,
            "checkpointing": self.activation_checkpointing,
        }

    @property
    def plan(self) -> dict[str, Any]:
        """Arguments of the trainer's `Plan`."""
        return {
            "batch_size": self.batch_size,
            "seed": self.seed,
            "workers": self.workers,
            "checkpoint_minutes": self.checkpoint_minutes,
            "deterministic": self.deterministic,
        }


@dataclass(frozen=True, kw_only=True)
class ReadSettings(DeviceSettings):
    """Settings of every verb that reads images without training on them."""

    batch_size: int = 256
    """Images at a time."""

    def __post_init__(self) -> None:
        super().__post_init__()
        within(1, 1_000_000, self, "batch_size")


@dataclass(frozen=True, kw_only=True)
class BackboneSettings:
    """The backbone that a verb uses."""

    backbone: str
    """A backbone.safetensors, or timm:NAME for a model of timm with its weights."""

    @property
    def keywords(self) -> dict[str, Any]:
        """What `FeatureExtractor` takes from here."""
        return {"name": self.backbone}


@dataclass(frozen=True, kw_only=True)
class StartSettings(BackboneSettings):
    """The backbone that a verb starts from."""

    untrained: bool = False
    """Use the same network with random weights, as a baseline."""

    @property
    def keywords(self) -> dict[str, Any]:
        """What `FeatureExtractor` takes from here."""
        return {"name": self.backbone, "pretrained": not self.untrained}


@dataclass(frozen=True, kw_only=True)
class PartSettings:
    """Which images a network is evaluated on."""

    part: str | None = None
    """Part of the set to evaluate on, such as test. Default: the first of val, valid, validation and test that the set
    has, else images held out by seed."""


@dataclass(frozen=True, kw_only=True)
class LabelSubset(PartSettings):
    """Which labels are used."""

    fraction: float = 1.0
    """Share of each class's training images whose labels are used, at least one; smaller subsets are part of larger
    ones."""
    shots: int | None = None
    """Training images per class whose labels are used, instead of a share."""

    @property
    def keywords(self) -> dict[str, Any]:
        """Arguments of `labelled_parts`."""
        return {"fraction": self.fraction, "shots": self.shots}

    def __post_init__(self) -> None:
        if not 0 < self.fraction <= 1:
            raise ConfigError(f"fraction {self.fraction} is out of range; choose above 0, at most 1")
        if self.shots is not None and self.fraction != 1:
            raise ConfigError(f"fraction {self.fraction} and shots {self.shots}; choose one of them")
        within(1, 1_000_000, self, "shots")


@dataclass(frozen=True, kw_only=True)
class OptimSettings:
    """The optimizer and its learning rate."""

    SECTION: ClassVar[str] = "optim."

    name: str = "adamw"
    """Any timm optimizer that takes betas: adamw, lamb, lion ..."""
    blr: float = 6e-4
    """Base learning rate, for 256 images per step and predict_ratio = mask_ratio."""
    betas: tuple[float, float] = (0.9, 0.95)
    """Decay rates of the two moments."""
    weight_decay: float = 0.05
    """Weight decay of matrices; vectors are not decayed."""
    warmup_epochs: float = 20.0
    """Epochs of linear warm-up; a cosine to zero follows."""
    clip_grad: float = 0.0
    """Largest norm of the gradient; 0 turns clipping off."""
    accumulation: int = 1
    """Micro-batches per step, computed one after the other (gradient accumulation)."""

    def __post_init__(self) -> None:
        within(0, 1000, self, "blr", "weight_decay", "clip_grad")
        within(0, 0.9999999, self, "betas")
        within(0, 1_000_000, self, "warmup_epochs")  # as many as there may be epochs
        within(1, 10_000, self, "accumulation")

    @property
    def keywords(self) -> dict[str, Any]:
        """Arguments of `create_optimizer`."""
        return {"name": self.name, "weight_decay": self.weight_decay, "betas": self.betas}

    @property
    def plan(self) -> dict[str, Any]:
        """Arguments of the trainer's `Plan`."""
        return {
            "accumulation": self.accumulation,
            "clip_grad": self.clip_grad,
            "warmup_epochs": self.warmup_epochs,
        }


@dataclass(frozen=True, kw_only=True)
class LogSettings:
    """What is recorded during a run."""

    SECTION: ClassVar[str] = "log."

    log_every: int = 10
    """Steps between two lines of metrics.jsonl."""
    evals: int = 5
    """Evaluations during a run, besides the last one."""
    saves: int = 20
    """Checkpoints during a run; the last two are kept."""

    def __post_init__(self) -> None:
        within(1, 1_000_000, self, "log_every")
        within(0, 100_000, self, "evals", "saves")

    @property
    def plan(self) -> dict[str, Any]:
        """Arguments of the trainer's `Plan`."""
        return {"log_every": self.log_every, "evals": self.evals, "saves": self.saves}
