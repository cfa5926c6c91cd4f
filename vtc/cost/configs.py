# SPDX-License-Identifier: Apache-2.0
"""Reading sizes from configurations: transformers objects, or dictionaries of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


class Unknown(Exception):
    """A formula, or a size that it needs, is missing: the part becomes `nan`."""


def get(config: Any, *names: str, default: Any = None) -> Any:
    """The first of `names` that `config` (an object or a mapping) has with a value not `None`.

    Raises:
        Unknown: the attribute differs from layer to layer; see `of_layer`.
    """
    for name in names:
        try:
            value = config.get(name) if isinstance(config, Mapping) else getattr(config, name, None)
        except RuntimeError as error:  # AmbiguousGlobalPerLayerAttributeError of transformers
            raise Unknown(name) from error
        if value is not None:
            return value
    return default


def size(config: Any, *names: str, default: int | None = None) -> int:
    """Like `get` for an integer.

    Raises:
        Unknown: it is missing or not an integer.
    """
    value = get(config, *names, default=default)
    if isinstance(value, bool) or not isinstance(value, int):
        raise Unknown(names[0])
    return value


def pair(config: Any, name: str, default: int | None = None) -> tuple[int, int]:
    """A (height, width), which configurations often give as one number.

    Raises:
        Unknown: it is missing or something else.
    """
    value = get(config, name, default=default)
    values = (value, value) if isinstance(value, int) else tuple(value or ())
    if len(values) != 2 or not all(isinstance(v, int) for v in values):
        raise Unknown(name)
    return values[0], values[1]


def text_of(config: Any) -> Any:
    """The language model's part of a vision-language configuration, or all of it."""
    return get(config, "text_config", "llm_config", "language_config", default=config)


def of_layer(text: Any, index: int) -> Any:
    """The configuration of decoder layer `index`, if it differs by layer."""
    own = get(text, "per_layer_config")
    if own is None:
        return text
    if isinstance(own, Mapping):  # in a dictionary: what differs from the rest
        return {**text, **(own.get(str(index)) or own.get(index) or {})}
    return own[index]
