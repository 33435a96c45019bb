"""Flower's part of benchmarks/peers/flower.py: FedAvg over agents that return the weights unchanged.

This module runs in Flower's own environment, and imports nothing of this project.
"""

import json
import time
from pathlib import Path

import numpy as np
from flwr.app import Array, ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg

server = ServerApp()
client = ClientApp()


@server.main()
def main(grid: Grid, context: Context) -> None:
    config = context.run_config
    shapes = json.loads(Path(config["shapes"]).read_text("utf-8"))
    generator = np.random.default_rng(0)
    arrays = {name: Array(generator.random(shape, np.float32)) for name, shape in shapes.items()}
    num_agents = config["num-agents"]
    strategy = FedAvg(fraction_evaluate=0.0, min_train_nodes=num_agents, min_available_nodes=num_agents)

    def mark(_number: int, _arrays: ArrayRecord) -> None:
        """Append the time to the file of marks; Flower calls this before the first round and after each."""
        with Path(config["marks"]).open("a", encoding="utf-8") as file:
            file.write(f"{time.time()}\n")

    strategy.start(
        grid=grid, initial_arrays=ArrayRecord(arrays), num_rounds=config["num-rounds"], evaluate_fn=mark
    )


@client.train()
def train(message: Message, _context: Context) -> Message:
    reply = RecordDict({"arrays": message.content["arrays"], "metrics": MetricRecord({"num-examples": 4})})
    return Message(content=reply, reply_to=message)
