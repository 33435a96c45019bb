"""Strict JSON, which every reader takes."""

import json
import math
from collections.abc import Mapping
from typing import Any

from ecavg.common.errors import encodable


def to_json(value: Any, **options: Any) -> str:
    """Return strict JSON: null replaces NaN and the infinities, and all text can be written in UTF-8."""
    return json.dumps(_for_json(value), allow_nan=False, **options)


def _for_json(value: Any) -> Any:
    """Return the value with what strict JSON does not have replaced, at any depth."""
    if isinstance(value, str):
        return encodable(value)
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {_for_json(key): _for_json(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_for_json(item) for item in value]
    return value
