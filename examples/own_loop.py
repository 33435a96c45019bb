"""An agent with a training loop of a user's own, in plain PyTorch; examples/README.md has the command."""

import sys
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

import ecavg


def train(
    model: nn.Module, data: ecavg.Data, start: ecavg.Start, report: ecavg.Report
) -> Mapping[str, Tensor]:
    """Return the weights after some epochs of Adam on batches that are shuffled anew for each."""
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    loader = DataLoader(data, batch_size=16, shuffle=True)
    num_steps, step = start.config.epochs * len(loader), 0
    for _ in range(start.config.epochs):
        for inputs, targets in loader:
            optimizer.zero_grad()
            scores = model(inputs.to(start.device))
            loss = nn.functional.cross_entropy(scores, targets.to(start.device))
            loss.backward()
            optimizer.step()
            step += 1
            # The agent shows and tells this. Where the agent is to stop, the call raises an error.
            report(step, num_steps, loss.item())
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
