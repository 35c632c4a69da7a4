"""Settings of `dmjd export`."""

from dataclasses import KW_ONLY, dataclass
from pathlib import Path
from typing import Annotated, Literal

from dmjd.config.common import group
from dmjd.config.rules import one_of

Format = Literal["timm", "hf", "onnx", "torch"]


@dataclass(frozen=True)
class ExportSettings:
    """Settings of `dmjd export`."""

    run: Annotated[Path, group("Run")]
    """Directory of a run, or a file in it: backbone.safetensors, best.safetensors, linear.safetensors ..."""
    _: KW_ONLY
    to: Annotated[Format, group("Run")]
    """timm: weights for timm.create_model. hf: a folder with a model card, for the Hugging Face hub, transformers and
    timm. onnx: an ONNX graph, and torch: a torch.export program; both take any number of images of the training size,
    with values of 0 to 1, and normalise them inside. A classifier keeps its head and the names of its classes in all of
    them, a segmenter its head in onnx and torch, a detector its heads in none."""
    out: Annotated[Path, group("Run")]
    """File to write, or folder with hf; a missing file extension is added."""
    license: Annotated[str, group("Run")] = "apache-2.0"
    """Licence of the weights, as the hub names it; hf writes it in the model card."""
    debug: Annotated[bool, group("Run")] = False
    """Show the traceback of an error."""

    def __post_init__(self) -> None:
        one_of(Format, self, "to")
