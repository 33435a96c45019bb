"""Seeds: all that chance decides is drawn from streams that have names."""

import hashlib
import json


def derive_seed(seed: int, *parts: str | int) -> int:
    """Return a seed of 63 bits for the stream that `parts` name: SHA-256, so streams are independent."""
    # JSON tells 1 from "1", and ("a", "b") from ("ab",).
    text = json.dumps([seed, *parts])
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8]) >> 1
