"""The measuring of models on the combined data, in which all ranks do a part.

Rank 0 says what is to be done, and with which weights. The other ranks wait for it in `serve`.
"""

from typing import Literal

import torch
from torch import nn

from ecavg.cloud_server.trainer.finetune import CombinedData
from ecavg.common.batches import DeviceData
from ecavg.common.config import RunConfig
from ecavg.common.evaluation import Evaluation, batch_norms, evaluate, recompute_statistics
from ecavg.common.ranks import ALONE, Ranks
from ecavg.common.seeds import derive_seed
from ecavg.common.sharding import is_sharded, load
from ecavg.common.tasks.task import task_of
from ecavg.common.weights import copy_into

_Work = Literal["measure", "recompute_statistics", "end"]


class Measuring:
    """One rank's part in the measuring of a model.

    Args:
        model: a model of the run's structure, which holds what is measured; on the other ranks than 0 it gets
            the weights of rank 0's.
        run: the configuration of the run.
        data: the combined data of the members.
        device: the device on which the model is measured.
        ranks: the processes that measure together.
        sharded: the ranks' sharded model, which is measured in the place of `model`; None: there is none.
    """

    def __init__(
        self,
        model: nn.Module,
        run: RunConfig,
        data: CombinedData,
        device: torch.device,
        ranks: Ranks = ALONE,
        sharded: nn.Module | None = None,
    ) -> None:
        self.model = model
        self._on_ranks = sharded or model
        self.run = run
        self.data = data
        self._device = device
        self._ranks = ranks
        self._task = task_of(run)
        # The inputs that are on the device while candidates are made, by the name of their part of the data.
        self._moved: dict[str, DeviceData] = {}

    def measure(self) -> Evaluation | None:
        """Evaluate the model as it is on held-out data; return None if there is no such data."""
        if not len(self.data.held_out.targets):
            return None
        self._hand_out("measure")
        return self._measured()

    def recompute_statistics(self) -> None:
        """Fit BatchNorm's running statistics to the weights in the model, which are an average."""
        if self.run.recompute_statistics and batch_norms(self.model):
            self._hand_out("recompute_statistics")
            self._recompute_statistics()

    def end(self) -> None:
        """Have the other ranks leave `serve`, and give back the memory of the device."""
        self._ranks.share("end")
        self._moved.clear()

    def serve(self) -> None:
        """Do this rank's part of all that rank 0 does, until that calls `end`."""
        while (work := self._ranks.share("")) != "end":
            self._receive()
            if work == "measure":
                self._measured()
            else:
                self._recompute_statistics()
        self._moved.clear()

    def _hand_out(self, work: _Work) -> None:
        """Tell the other ranks what is to be done, and send them the weights."""
        if self._ranks.world_size > 1:
            self._ranks.share(work)
            if is_sharded(self._on_ranks):
                load(self._on_ranks, self.model.state_dict(), self._ranks)
            else:
                self._ranks.share_tensors(self.model.state_dict())

    def _receive(self) -> None:
        """Take the weights that rank 0 sends."""
        if is_sharded(self._on_ranks):
            load(self._on_ranks, {}, self._ranks)
        else:
            copy_into(self.model, self._ranks.share_tensors({}))

    def _measured(self) -> Evaluation:
        inputs, targets = self._on_device("held_out"), self.data.held_out.targets
        return evaluate(
            self._on_ranks, inputs, targets, task=self._task, device=self._device, ranks=self._ranks
        )

    def _recompute_statistics(self) -> None:
        recompute_statistics(
            self._on_ranks,
            self._on_device("train"),
            spec=self.run.spec,
            device=self._device,
            seed=derive_seed(self.run.seed, "statistics"),
            ranks=self._ranks,
        )
        if self._on_ranks is not self.model:
            for name, buffer in self._on_ranks.named_buffers():
                self.model.get_buffer(name).copy_(buffer)

    def _on_device(self, part: Literal["train", "held_out"]) -> DeviceData:
        """Return the inputs of a part of the data, which are moved to the device when they are first used."""
        if part not in self._moved:
            inputs = getattr(self.data, part).inputs
            self._moved[part] = DeviceData(inputs, self.run.spec, self._device)
        return self._moved[part]
