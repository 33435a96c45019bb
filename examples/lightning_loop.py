"""An agent that trains by a LightningModule; it takes `pip install pytorch-lightning`."""

import sys
from collections.abc import Mapping

import pytorch_lightning as lightning
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

import ecavg


class Classifier(lightning.LightningModule):
    """The run's model with a loss and an optimizer."""

    def __init__(self, model: nn.Module, num_steps: int, report: ecavg.Report) -> None:
        super().__init__()
        self.model, self._num_steps, self._report = model, num_steps, report

    def training_step(self, batch: tuple[Tensor, Tensor], _: int) -> Tensor:
        """Return the loss of a batch, which the agent shows as well."""
        inputs, targets = batch
        loss = nn.functional.cross_entropy(self.model(inputs), targets)
        self._report(self.global_step + 1, self._num_steps, loss.item())
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return Adam on all weights."""
        return torch.optim.Adam(self.model.parameters(), lr=0.01)


def train(
    model: nn.Module, data: ecavg.Data, start: ecavg.Start, report: ecavg.Report
) -> Mapping[str, Tensor]:
    """Return the weights after the epochs that the run asks for."""
    loader = DataLoader(data, batch_size=16, shuffle=True)
    trainer = lightning.Trainer(
        max_epochs=start.config.epochs,
        accelerator="gpu" if start.device.type == "cuda" else "cpu",
        devices=1,
        # The agent shows the progress and keeps the weights.
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(Classifier(model, start.config.epochs * len(loader), report), loader)
    return model.state_dict()


def main(server: str, agent_id: str, partition: str) -> None:
    """Take part in the run of shapes.toml."""
    agent = ecavg.Agent(
        server,
        agent_id=agent_id,
        data="shapes:images",
        partition=partition,
        allow_factory=["shapes:net"],
    )
    agent.run(train)


if __name__ == "__main__":
    main(*sys.argv[1:])
