# SPDX-License-Identifier: Apache-2.0
"""The vision tokens that a method leaves to each decoder layer, computed without a model."""

from __future__ import annotations

from vtc.core import Compose, Method
from vtc.core.errors import ArgumentError


def token_schedule(method: Method, n: int, layers: int, tiles: int = 1) -> tuple[int, ...]:
    """`method.token_schedule`, or an error that names what is unknown in advance.

    Args:
        method: a method, of vtc or user-defined.
        n: vision tokens of the image before compression.
        layers: decoder layers.
        tiles: tiles of equal size that the image is divided into.

    Returns:
        Vision tokens that each layer processes; add the text tokens for `prefill_flops` and the
        like.

    Raises:
        ArgumentError: the number of tokens depends on the image.
    """
    found = method.token_schedule(n, layers, tiles)
    if found is not None:
        return found
    for part in _simple(method):
        if part.token_schedule(n, layers, tiles) is not None:
            continue
        hint = "; give it a keep" if _lacks_keep(part) else ""
        raise ArgumentError(
            "method", f"the tokens of {part} cannot be computed, as they depend on the image{hint}"
        )
    relative = next(part for part in method.parts if part.counts_found)
    raise ArgumentError(
        "method",
        f"the tokens of {method} cannot be computed, as those of {relative.name} depend on "
        "what the other methods leave",
    )


def _lacks_keep(method: Method) -> bool:
    return getattr(method, "keep", 0) is None


def _simple(method: Method) -> list[Method]:
    """The simple methods that `method` consists of."""
    if isinstance(method, Compose):
        return [simple for part in method.parts for simple in _simple(part)]
    inner = [getattr(method, name, None) for name in ("inner", "of_thumbnail")]
    held = [part for part in inner if isinstance(part, Method)]
    return [simple for part in held for simple in _simple(part)] or [method]
