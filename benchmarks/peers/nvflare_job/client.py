"""NVFlare's part of benchmarks/peers/nvflare.py on each site, which returns the weights unchanged."""

import argparse
import time
from pathlib import Path

import nvflare.client as flare


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--marks", type=Path, required=True)
    marks = parser.parse_args().marks
    flare.init()
    while flare.is_running():
        model = flare.receive()
        if model is None:
            break
        # A round begins for all sites at the same time, so one site marks it for all.
        if flare.get_site_name() == "site-1":
            with marks.open("a", encoding="utf-8") as file:
                file.write(f"{time.time()}\n")
        flare.send(flare.FLModel(params=model.params, meta={"NUM_STEPS_CURRENT_ROUND": 1}))


if __name__ == "__main__":
    main()
