# SPDX-License-Identifier: Apache-2.0
"""Methods written as text, as the command line and lmms-eval's `--model_args` have them.

    todre                       a method with its default settings
    fastv:layer=3:rank=last     with settings, each after a colon
    todre+fastv:keep=9          composed: the first acts first

`keep` is usually swept on its own, so it is given beside the text. In a composition it goes to the
first method that has such a setting and was not given one of its own.
"""

from __future__ import annotations

import ast
import dataclasses
from typing import Any

from .methods.base import Method, make, methods

__all__ = ["parse_keep", "parse_method", "split_list", "takes_keep"]

Keep = int | float


def split_list(text: str, separator: str = ",") -> list[str]:
    """Split at `separator` outside of brackets, without surrounding spaces and empty parts.

    Raises:
        ValueError: brackets that do not match.
    """
    parts, depth, start = [], 0, 0
    for i, char in enumerate(text):
        depth += (char in "([{") - (char in ")]}")
        if depth < 0:
            break
        if char == separator and depth == 0:
            parts.append(text[start:i])
            start = i + 1
    if depth:
        raise ValueError(f"brackets do not match in {text!r}")
    return [part.strip() for part in [*parts, text[start:]] if part.strip()]


def parse_keep(text: str) -> Keep:
    """`"0.25"` is a quarter of an image's tokens, `"64"` is 64 tokens; `"1"` is one, `"1.0"` all.

    Raises:
        ValueError: neither a fraction in (0, 1] nor a whole number of at least 1.
    """
    try:
        keep: Keep = int(text)
        good = keep >= 1
    except ValueError:
        try:
            keep = float(text)
        except ValueError:
            keep = 0.0
        good = 0.0 < keep <= 1.0
    if not good:
        raise ValueError(
            f"keep: expected a fraction in (0, 1] or a whole number of tokens, got {text!r}"
        )
    return keep


def _value(text: str) -> Any:
    """A Python literal, or else the text itself."""
    if text.lower() in ("true", "false", "none"):
        return {"true": True, "false": False, "none": None}[text.lower()]
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def _parts(text: str) -> list[tuple[str, dict[str, Any]]]:
    """[(name, settings)] of each method in `text`, names checked."""
    parts = []
    for part in split_list(text, "+"):
        name, *pairs = split_list(part, ":")
        if name.lower() not in methods():
            raise ValueError(f"method: unknown name {name!r}; known are {', '.join(methods())}")
        settings = {}
        for pair in pairs:
            key, equals, value = pair.partition("=")
            if not equals:
                raise ValueError(
                    f"method: expected setting=value after {name!r} and a colon, got {pair!r}"
                )
            settings[key.strip()] = _value(value.strip())
        parts.append((name.lower(), settings))
    if not parts:
        raise ValueError(f"method: expected a name, got {text!r}")
    return parts


def _fields(name: str) -> set[str]:
    return {f.name for f in dataclasses.fields(methods()[name]) if f.init}  # type: ignore[arg-type]


def _keep_goes_to(parts: list[tuple[str, dict[str, Any]]]) -> int | None:
    free = (
        i
        for i, (name, settings) in enumerate(parts)
        if "keep" in _fields(name) and "keep" not in settings
    )
    return next(free, None)


def takes_keep(text: str) -> bool:
    """Whether the method has a `keep` that `text` leaves open."""
    return _keep_goes_to(_parts(text)) is not None


def parse_method(text: str, keep: Keep | None = None, seed: int | None = None) -> Method:
    """The method that `text` names.

    Args:
        text: see the module's head.
        keep: for the first method that has such a setting and is not given one in `text`.
        seed: for every method that samples and is not given one in `text`.

    Raises:
        ValueError: unknown name, malformed settings, or a value the method refuses.
        TypeError: a setting the method does not have, `keep` where no method has one left open,
            or a setting without a default left out.
    """
    parts = _parts(text)
    if keep is not None:
        index = _keep_goes_to(parts)
        if index is None:
            raise TypeError(f"keep: {text!r} has no such setting, or is given one already")
        parts[index][1]["keep"] = keep
    if seed is not None:
        for name, settings in parts:
            if "seed" in _fields(name):
                settings.setdefault("seed", seed)
    made = [make(name, **settings) for name, settings in parts]
    whole = made[0]
    for other in made[1:]:
        whole = whole | other
    return whole
