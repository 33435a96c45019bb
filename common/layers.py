"""How a configuration is put together: preset, file, environment and flags, of which the later win.

Unknown keys are errors that name the key. The keys themselves are in config.py of `common` and of each side.
"""

import os
import tomllib
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any, TypeVar

from pydantic import ValidationError

from ecavg.common.config import ProcessConfig, expand_home
from ecavg.common.errors import UsageError, one_line
from ecavg.common.files import read_text

# An error quotes so much of what the user has written.
MAX_QUOTED_CHARACTERS = 500
# A larger configuration file is another file than the user meant.
MAX_CONFIG_BYTES = 2**20

Config = TypeVar("Config", bound=ProcessConfig)


def load(
    config_class: type[Config],
    *,
    env_prefix: str,
    preset: str | None = None,
    config_file: str | None = None,
    flags: Mapping[str, Any],
    environ: Mapping[str, str] = os.environ,
) -> Config:
    """Merge preset, file, environment and flags into one validated configuration.

    An empty text in the file, the environment or a flag counts as not given.

    Raises:
        UsageError: naming the key that is unknown or out of range, and where it came from.
    """
    layers: dict[str, dict[str, Any]] = {}
    if preset is not None:
        layers[f"preset {preset}"] = read_preset(preset)
    if config_file:
        layers[config_file] = _without_empty(_read_toml(config_file))
    layers["the environment"] = _read_environment(config_class, env_prefix, environ)
    layers["the command line"] = _without_empty(flags)

    merged: dict[str, Any] = {}
    for layer in layers.values():
        merged = deep_merge(merged, layer)
    try:
        return config_class(**merged)
    except ValidationError as error:
        raise UsageError(one_line(_first_of(error, layers))) from error


def _without_empty(layer: Mapping[str, Any]) -> dict[str, Any]:
    """Return the layer without the keys whose value is an empty text, or a list of empty texts alone."""
    given = {
        key: [item for item in value if item != ""] if isinstance(value, list) else value
        for key, value in layer.items()
    }
    return {key: value for key, value in given.items() if value != "" and (value != [] or layer[key] == [])}


def preset_names() -> list[str]:
    """Return the names of the presets, sorted."""
    return sorted(p.name.removesuffix(".toml") for p in _presets().iterdir() if p.name.endswith(".toml"))


def read_preset(name: str) -> dict[str, Any]:
    """Return the table of a preset; raise UsageError if there is none of this name."""
    if name not in preset_names():
        raise UsageError(f"unknown preset {name!r}: choose {', '.join(preset_names())}")
    return tomllib.loads(_presets().joinpath(f"{name}.toml").read_text("utf-8"))


def _presets() -> Any:
    return resources.files("ecavg.common") / "presets"


def _read_toml(file: str) -> dict[str, Any]:
    try:
        text = read_text(expand_home(Path(file)), "configuration file", MAX_CONFIG_BYTES)
    except ValueError as error:
        raise UsageError(f"configuration file {file}: {error}") from error
    try:
        return tomllib.loads(text)
    except (ValueError, RecursionError) as error:
        # The file is no TOML, or has an integer of thousands of digits.
        raise UsageError(f"configuration file {file} is not TOML: {error}") from error


def _read_environment(
    config_class: type[ProcessConfig], prefix: str, environ: Mapping[str, str]
) -> dict[str, Any]:
    # Compose passes a variable that is not set as an empty one.
    given = {variable: value for variable, value in environ.items() if value}
    for variable in given:
        key = variable.removeprefix(prefix).split("__")[0].lower()
        if variable.startswith(prefix) and key not in config_class.model_fields:
            raise UsageError(f"unknown key {key!r} in the environment variable {variable}")
    # This import takes as long as all of --help, which does without.
    from pydantic_settings import EnvSettingsSource

    source = EnvSettingsSource(
        config_class,  # type: ignore[arg-type]  # any model does, with all its options given here
        env_prefix=prefix,
        env_nested_delimiter="__",
        case_sensitive=False,
    )
    source.env_vars = {name.lower(): value for name, value in given.items()}
    try:
        return source()
    except ValueError as error:
        raise UsageError(f"environment: {error}") from error


def deep_merge(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """Return the first table with the values of the second laid over it, table by table."""
    merged = dict(base)
    for key, value in over.items():
        below = merged.get(key)
        both_tables = isinstance(below, Mapping) and isinstance(value, Mapping)
        merged[key] = deep_merge(below, value) if both_tables else value  # type: ignore[arg-type]
    return merged


def _first_of(error: ValidationError, layers: Mapping[str, Mapping[str, Any]]) -> str:
    """Return the first thing that is wrong: key, what is wrong, the value, and where it was set."""
    first = error.errors(include_url=False)[0]
    path = [str(part) for part in first["loc"]]
    where = next((name for name, layer in reversed(list(layers.items())) if _has(layer, path)), None)
    origin = f" (from {where})" if where else ""
    key = _short(".".join(path)) or "configuration"
    if first["type"] == "extra_forbidden":
        return f"unknown key {key!r}{origin}"
    if first["type"] == "missing":
        return f"{key} is required: give it as a flag, in the environment or in a --config file"
    message, found = first["msg"].removeprefix("Value error, ").removeprefix("Input "), _repr(first["input"])
    says_it_all = first["type"] == "value_error" and found in message
    value = "" if says_it_all or isinstance(first["input"], Mapping) else f", not {_short(found)}"
    return f"{key}: {_short(message)}{value}{origin}"


def _repr(value: Any) -> str:
    try:
        return repr(value)
    except ValueError:
        # Python limits the digits of decimal integers, but not of hexadecimal ones.
        return "a number of thousands of digits"


def _short(text: str) -> str:
    return text if len(text) <= MAX_QUOTED_CHARACTERS else text[:MAX_QUOTED_CHARACTERS] + "…"


def _has(layer: Any, path: Sequence[str]) -> bool:
    for part in path:
        if not isinstance(layer, Mapping) or part not in layer:
            return isinstance(layer, (list, tuple)) and part.isdigit()
        layer = layer[part]
    return True
