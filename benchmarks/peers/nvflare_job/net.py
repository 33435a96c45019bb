"""A model of given shapes, for NVFlare's part of benchmarks/peers/nvflare.py."""

import json
from pathlib import Path

import torch
from torch import nn


class Net(nn.Module):
    """As many numbers as the model has whose shapes are in the file."""

    def __init__(self, shapes: str) -> None:
        super().__init__()
        self.shapes = shapes
        for name, shape in json.loads(Path(shapes).read_text("utf-8")).items():
            self.register_parameter(name.replace(".", "_"), nn.Parameter(torch.randn(shape)))
