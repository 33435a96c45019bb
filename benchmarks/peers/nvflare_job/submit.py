"""The command that submits benchmarks/peers/nvflare.py's job: FedAvg with PyTorch tensors sent directly.

It runs in NVFlare's environment, in the folder of this file, and imports nothing of this project.
"""

import argparse

from net import Net
from nvflare.app_opt.pt.recipes.fedavg import FedAvgRecipe
from nvflare.client.config import ExchangeFormat
from nvflare.recipe.prod_env import ProdEnv


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--agents", type=int, required=True)
    parser.add_argument("--rounds", type=int, required=True)
    parser.add_argument("--shapes", required=True)
    parser.add_argument("--marks", required=True)
    parser.add_argument("--startup-kit", required=True)
    arguments = parser.parse_args()
    recipe = FedAvgRecipe(
        name="round-trip",
        model=Net(arguments.shapes),
        min_clients=arguments.agents,
        num_rounds=arguments.rounds,
        train_script="client.py",
        train_args=f"--marks {arguments.marks}",
        server_expected_format=ExchangeFormat.PYTORCH,
    )
    run = recipe.execute(ProdEnv(arguments.startup_kit, login_timeout=60.0))
    print("submitted", run.get_job_id() if run else "")


if __name__ == "__main__":
    main()
