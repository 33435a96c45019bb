"""A model of given shapes, for NVFlare's part of benchmarks/peers/nvflare.py."""

import json
from pathlib import Path

import torch
from torch import nn


class Net(nn.Module):
    """A model whose parameters have the shapes that a JSON file lists.

    Args:
        shapes: the path of the JSON file, which maps each name to a shape.
    """

    def __init__(self, shapes: str) -> None:
        super().__init__()
        self.shapes = shapes
        for name, shape in json.loads(Path(shapes).read_text("utf-8")).items():
            self.register_parameter(name.replace(".", "_"), nn.Parameter(torch.randn(shape)))
