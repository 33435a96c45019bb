"""The user's own code, by name: models, data sources and tasks."""

import importlib
from collections.abc import Callable, Collection
from typing import Any

from ecavg.common.errors import UsageError


def import_factory(name: str, allowed_factories: Collection[str] | None) -> Callable[..., Any]:
    """Import and return the user's own factory.

    Args:
        name: the factory as `package.module:factory`.
        allowed_factories: the names that may be imported; None allows any name.

    Raises:
        UsageError: the name is not allowed here, or cannot be imported, or is not callable.
    """
    if allowed_factories is not None and name not in allowed_factories:
        raise UsageError(
            f"this device does not allow the factory {name!r}:"
            f" if you trust its code, start the agent with --allow-factory {name}"
        )
    module_name, _, attribute = name.partition(":")
    try:
        factory = getattr(importlib.import_module(module_name), attribute)
    # The import runs the user's code, which may raise any error.
    except Exception as error:
        raise UsageError(
            f"cannot import the factory {name!r} (is its folder on PYTHONPATH?): {first_line(error)}"
        ) from error
    if not callable(factory):
        raise UsageError(f"the factory {name!r} is not a function")
    return factory  # type: ignore[no-any-return]


def first_line(error: Exception) -> str:
    """Return the first line of an error's text, or else its type."""
    return next(iter(str(error).splitlines()), "") or type(error).__name__
