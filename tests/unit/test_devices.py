"""The device of a process, and what makes it repeatable."""

import pytest
import torch

from ecavg.common.devices import select_device
from ecavg.common.errors import UsageError
from tests.recipes import CPU


def test_devices() -> None:
    gpus = torch.cuda.device_count()
    assert select_device("cpu") == CPU
    assert select_device("auto") == (torch.device("cuda:0") if gpus else CPU)
    for name in ("gpu", "cuda:", "cuda:-1", "", f"cuda:{gpus}", *([] if gpus else ["cuda"])):
        with pytest.raises(UsageError, match=f"device '{name}' is not there: choose auto, cpu"):
            select_device(name)
