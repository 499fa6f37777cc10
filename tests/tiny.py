"""A bundle of a model so small that a validation of it takes milliseconds: real graph, real original, real files."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import nn

from edgeattn.bundle import write_manifest

SIZE, CLASSES = 16, 20
PREPROCESS = {
    "resize": 18,
    "crop": SIZE,
    "interpolation": "bicubic",
    "mean": [0.485, 0.456, 0.406],
    "std": [0.229, 0.224, 0.225],
}


class Tiny(nn.Module):
    """A convolution, the mean over pixels, and a classifier."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        self.conv = nn.Conv2d(3, 8, 3, stride=2, padding=1)
        self.head = nn.Linear(8, CLASSES)
        for parameter in self.parameters():
            parameter.data = 0.3 * torch.randn(parameter.shape, generator=generator)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        """Return logits [n, 20] of images [n, 3, 16, 16]."""
        return self.head(self.conv(image).relu().mean((2, 3)))


def make_bundle(folder: Path, *, precision: str = "fp32", damage=lambda weights: None, io: str = "float32") -> Path:
    """Write a bundle; `damage` may change the weights of the exported graph (a dict of arrays) but not the original."""
    folder.mkdir(parents=True)
    for part in ("reference", "golden", "reports"):
        (folder / part).mkdir()
    module = Tiny().eval()
    program = torch.export.export(module, (torch.zeros(1, 3, SIZE, SIZE),))
    torch.export.save(program, folder / "reference" / "model.pt2")
    weights = {name: value.numpy().copy() for name, value in module.state_dict().items()}
    damage(weights)
    onnx.save(_graph(weights, precision, io), folder / "model.onnx")
    images = np.random.default_rng(0).standard_normal((2, 1, 3, SIZE, SIZE)).astype(np.float32)
    with torch.inference_mode():
        logits = np.stack([module(torch.from_numpy(image)).numpy() for image in images])
    np.savez(folder / "golden" / "inputs.npz", image=images)
    np.savez(folder / "golden" / "outputs.npz", logits=logits)
    write_manifest(folder, _manifest(precision, io))
    return folder


def _graph(weights: dict[str, np.ndarray], precision: str, io: str) -> onnx.ModelProto:
    inner = np.float16 if precision == "fp16" else np.float32
    kind = helper.np_dtype_to_tensor_dtype(np.dtype(inner))
    outside = helper.np_dtype_to_tensor_dtype(np.dtype(io))
    nodes = [
        helper.make_node("Cast", ["image"], ["x"], to=kind),
        helper.make_node("Conv", ["x", "conv.weight", "conv.bias"], ["c"], strides=[2, 2], pads=[1, 1, 1, 1]),
        helper.make_node("Relu", ["c"], ["r"]),
        helper.make_node("GlobalAveragePool", ["r"], ["p"]),
        helper.make_node("Flatten", ["p"], ["f"]),
        helper.make_node("Gemm", ["f", "head.weight", "head.bias"], ["y"], transB=1),
        helper.make_node("Cast", ["y"], ["logits"], to=outside),
    ]
    initial = [numpy_helper.from_array(value.astype(inner), name) for name, value in weights.items()]
    image = helper.make_tensor_value_info("image", TensorProto.FLOAT, [1, 3, SIZE, SIZE])
    logits = helper.make_tensor_value_info("logits", outside, [1, weights["head.bias"].shape[0]])
    graph = helper.make_graph(nodes, "tiny", [image], [logits], initial)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


def _manifest(precision: str, io: str) -> dict:
    dims = [{"size": size} for size in (1, 3, SIZE, SIZE)]
    return {
        "name": f"tiny-{precision}",
        "model": {"family": "test", "variant": "tiny", "source": "tests", "weights_sha256": "own"},
        "inputs": [{"name": "image", "dtype": "float32", "dims": dims, "preprocess": PREPROCESS}],
        "outputs": [{"name": "logits", "dtype": io, "dims": [{"size": 1}, {"size": CLASSES}]}],
        "precision": precision,
        "ops": [],
        "targets": [{"name": "portable"}],
        "stages": [],
        "tool_versions": {},
        "options": {},
    }
