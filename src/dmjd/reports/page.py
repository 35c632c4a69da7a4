"""A page: a self-contained HTML file, rendered from a template."""

import base64
import io
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt8
from jinja2 import Environment, FileSystemLoader
from PIL import Image

from dmjd.engine.checkpoint import write_atomically

TEMPLATES = Path(__file__).parent / "templates"


def write_page(path: Path, template: str, page: Mapping[str, Any]) -> None:
    """Write a page atomically, creating its folder: readers of `path` see either the old page or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, render(template, page))


def render(template: str, page: Mapping[str, Any]) -> str:
    """Render one of the templates; text is escaped unless it is `Markup`."""
    environment = Environment(loader=FileSystemLoader(TEMPLATES), autoescape=True, trim_blocks=True)
    environment.filters |= {"duration": duration, "compact": compact, "quote": lambda text: shlex.quote(str(text))}
    return environment.get_template(template).render(page)


def duration(seconds: float) -> str:
    """Format seconds in at most two units."""
    if round(seconds) < 60:
        return f"{seconds:.0f}\u00a0s"
    hours, rest = divmod(round(seconds / 60), 60)
    return "\u00a0".join(([f"{hours:,}\u00a0h"] if hours else []) + ([f"{rest}\u00a0min"] if hours < 100 else []))


def compact(value: float) -> str:
    """Format a number for display: 86.6 M from a million up, and a decimal only for small numbers that have one."""
    if value >= 1e6:
        return f"{value / 1e6:,.1f}\u00a0M"
    return f"{value:,.0f}" if value >= 100 or value == round(value) else f"{value:.1f}"


def data_uri(file: bytes, kind: str = "png") -> str:
    """Encode the bytes of an image file as a data URI."""
    return f"data:image/{kind};base64,{base64.b64encode(file).decode()}"


def jpeg(picture: UInt8[np.ndarray, "H W 3"], width: int = 320) -> str:
    """Encode a photograph as a JPEG data URI, shrunk if a side is longer than `width`."""
    image = Image.fromarray(picture)
    image.thumbnail((width, width))
    buffer = io.BytesIO()
    image.save(buffer, "jpeg", quality=85)
    return data_uri(buffer.getvalue(), "jpeg")


def png(picture: UInt8[np.ndarray, "C H W"]) -> str:
    """Encode a picture as a PNG data URI: its first three channels, or the first one if it has fewer."""
    colour = len(picture) > 2
    image = Image.fromarray(picture[:3].transpose(1, 2, 0).copy() if colour else picture[0])
    image = image.quantize(256) if colour else image  # a palette: a third of the bytes
    buffer = io.BytesIO()
    image.save(buffer, "png", optimize=True)
    return data_uri(buffer.getvalue())
