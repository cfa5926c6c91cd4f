# SPDX-License-Identifier: Apache-2.0
"""Settings that methods share, budgets and layers, and their checks."""

from __future__ import annotations

import math
from collections.abc import Sequence
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


def check_positions(value: Any) -> None:
    """Refuse `positions` that are neither "original" nor "contiguous".

    Raises:
        ArgumentError: for the setting `positions`.
    """
    check_choice("positions", value, ("original", "contiguous"))


def check_flag(name: str, value: Any) -> None:
    """Refuse a `value` that is neither `True` nor `False`.

    Raises:
        ArgumentTypeError: for the setting `name`.
    """
    if not isinstance(value, bool):
        raise ArgumentTypeError(name, f"expected True or False, got {value!r}")


def check_number(name: str, value: Any, interval: str) -> None:
    """Refuse a `value` that is not a number in `interval`.

    Args:
        name: the setting, for the error.
        value: its value.
        interval: such as "[0, 1)" or "(0, inf)", for the error as well.

    Raises:
        ArgumentTypeError: for the setting `name`, not a number.
        ArgumentError: likewise, a number outside of the interval, or NaN.
    """
    message = f"expected a number in {interval}, got {value!r}"
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ArgumentTypeError(name, message)
    low, high = map(float, interval[1:-1].split(","))
    ends = [end for end, open_ in ((low, "("), (high, ")")) if open_ not in interval]
    if not (low < value < high or value in ends):
        raise ArgumentError(name, message)


def check_fraction(name: str, value: Any, interval: str = "(0, 1]") -> None:
    """Like `check_number`, for what cannot be a number of tokens: `1` does not mean all.

    Raises:
        ArgumentTypeError: not a fraction.
        ArgumentError: outside `interval`.
    """
    if not isinstance(value, float):
        raise ArgumentTypeError(name, f"expected a fraction such as 0.25, got {value!r}")
    check_number(name, value, interval)


def check_whole(name: str, value: Any, lowest: int | None = 0) -> None:
    """Refuse a `value` that is not a whole number of at least `lowest`.

    Args:
        name: the setting, for the error.
        value: its value.
        lowest: the lowest accepted number; `None` accepts all.

    Raises:
        ArgumentTypeError: for the setting `name`, not a whole number.
        ArgumentError: likewise, too low.
    """
    least = "" if lowest is None else f" of at least {lowest}"
    message = f"expected a whole number{least}, got {value!r}"
    if isinstance(value, bool) or not isinstance(value, int):
        raise ArgumentTypeError(name, message)
    if lowest is not None and value < lowest:
        raise ArgumentError(name, message)


def check_layer(name: str, value: int | None, lowest: int = 0) -> None:
    """Like `check_whole`, for a setting that may be `None`: a layer, by default the published."""
    if value is not None:
        check_whole(name, value, lowest)


def as_tuple(name: str, value: Any) -> tuple[Any, ...]:
    """The sequence `value` as a tuple: lists come from JSON.

    Raises:
        ArgumentTypeError: for the setting `name`, not a sequence.
    """
    if not isinstance(value, Sequence) or isinstance(value, str):
        raise ArgumentTypeError(name, f"expected several values in brackets, got {value!r}")
    return tuple(value)


def check_layers(name: str, value: Any, lowest: int = 0) -> tuple[int, ...] | None:
    """The checked `value` as a tuple.

    Args:
        name: the setting, for the error.
        value: layers, or `None`.
        lowest: the lowest accepted layer.

    Raises:
        ArgumentTypeError: for the setting `name`, not a sequence of whole numbers.
        ArgumentError: likewise, a layer that is too low.
    """
    if value is None:
        return None
    layers = as_tuple(name, value)
    for layer in layers:
        check_whole(name, layer, lowest)
    return layers


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
