"""Data sources of a user's own, for tests."""

import sys
import time


def endless(split: str) -> None:
    """As good as a folder with very many photos: it cannot be interrupted."""
    print("endless data source", file=sys.stderr, flush=True)
    while True:
        time.sleep(0.1)
