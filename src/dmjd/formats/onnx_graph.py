"""A graph for ONNX runtimes, for any batch size."""

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dmjd.errors import extra
from dmjd.formats.network import Original, compare
from dmjd.formats.torch_program import describe, trace

OPSET = 20


def write_onnx(original: Original, path: Path) -> None:
    """Write the graph, whose input is images of 0..1, and check that ONNX Runtime computes the same: 1e-4.

    Raises:
        ConfigError: If this kind of network has no graph, or the extra `onnx` is missing.
    """
    with extra("onnx", "--to onnx"):
        import onnxruntime
        import onnxscript  # noqa: F401 (torch's exporter needs it)
    program, network = trace(original)
    graph: Any = torch.onnx.export(
        program,
        input_names=["images"],
        dynamic_shapes=({0: "batch"},),  # the name of the axis; the program has it for any number already
        output_names=["features" if original.kind == "backbone" else "logits"],
        opset_version=OPSET,
        dynamo=True,
        verbose=False,
    )
    said = {key: value if isinstance(value, str) else json.dumps(value) for key, value in describe(original).items()}
    graph.model.metadata_props.update(said)
    graph.save(path)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])

    def run(images: Tensor) -> Tensor:
        return torch.from_numpy(session.run(None, {"images": images.numpy()})[0])

    compare(network, run, original.input_size, tolerance=1e-4)
