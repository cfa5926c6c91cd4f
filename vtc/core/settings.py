# SPDX-License-Identifier: Apache-2.0
"""Settings that methods share, budgets and layers, and their checks."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

from .errors import ArgumentError, ArgumentTypeError


def check_keep(keep: float | int) -> None:
    """Refuse a `keep` that is neither a fraction in (0, 1] nor a positive whole number.

    `1.0` means all tokens; `1` means one token.

    Raises:
        ArgumentTypeError: not a number.
        ArgumentError: a number outside these ranges.
    """
    if isinstance(keep, bool) or not isinstance(keep, (int, float)):
        raise ArgumentTypeError(
            "keep", f"expected a fraction or a whole number of tokens, got {keep!r}"
        )
    if isinstance(keep, int) and keep < 1:
        raise ArgumentError("keep", f"a whole number of tokens must be at least 1, got {keep}")
    if isinstance(keep, float) and not (math.isfinite(keep) and 0.0 < keep <= 1.0):
        raise ArgumentError(
            "keep",
            f"a fraction must lie in (0, 1], got {keep}; "
            "for a number of tokens give a whole number",
        )


def check_choice(name: str, value: Any, accepted: tuple[Any, ...]) -> None:
    """Refuse a `value` that is not in `accepted`.

    Args:
        name: the setting, for the error.
        value: its value.
        accepted: the accepted values.

    Raises:
        ArgumentError: for the setting `name`.
    """
    if value not in accepted:
        raise ArgumentError(
            name, f"expected one of {', '.join(map(repr, accepted))}, got {value!r}"
        )


def check_layer(name: str, value: int | None, lowest: int = 0) -> None:
    """Refuse a layer that is neither `None` nor a whole number of at least `lowest`.

    Args:
        name: the setting, for the error.
        value: its value.
        lowest: the lowest accepted layer.

    Raises:
        ArgumentError: for the setting `name`.
    """
    if value is None:
        return
    if isinstance(value, bool) or not isinstance(value, int) or value < lowest:
        raise ArgumentError(name, f"expected a whole number of at least {lowest}, got {value!r}")


def budget(keep: float | int, n: int) -> int:
    """Tokens to keep out of `n`.

    Args:
        keep: a fraction, which is rounded to at least one token, or a number, capped at `n`.
        n: tokens of the image.
    """
    wanted = max(1, round(keep * n)) if isinstance(keep, float) else keep
    return min(wanted, n)


def scale_layers(
    given: int | tuple[int, ...] | None,
    published: tuple[float, ...],
    num_layers: int,
    *,
    after: bool = False,
) -> tuple[int, ...]:
    """The 0-based layers before which a method acts in a decoder of `num_layers`.

    Args:
        given: the user's `layers`, or one `layer`; `None` for the published ones.
        published: fractions of the depth, rounded half up to distinct layers. A decoder too
            shallow for all of them gets as many as fit.
        after: whether the method acts after the given layers, not before.

    Raises:
        ArgumentError: given layers that do not ascend, or that the decoder does not have.
    """
    if given is not None:
        layers = (given,) if isinstance(given, int) else given
        last = num_layers - 1 - after
        if any(a >= b for a, b in pairwise(layers)) or (layers and layers[-1] > last):
            name, what = ("layers", "ascending layers") if layers == given else ("layer", "a layer")
            raise ArgumentError(
                name,
                f"expected {what} up to {last} in a model of {num_layers} decoder layers, "
                f"got {given}",
            )
        return tuple(layer + after for layer in layers)
    scaled: list[int] = []
    for share in published:
        wanted = int(share * num_layers + 0.5)
        wanted = max(wanted, scaled[-1] + 1 if scaled else 1)
        if wanted < num_layers:
            scaled.append(wanted)
    return tuple(scaled)
