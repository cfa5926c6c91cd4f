# SPDX-License-Identifier: Apache-2.0
"""Methods by name, from a dictionary, and as text on the command line.

    todre                       a method with its default settings
    fastv:layer=3:rank=last     with settings, each after a colon
    "todre|fastv:keep=9"        composed, the first acts first; quote the | in a shell
    divprune@tile               on each tile of an image separately, `vtc.PerTile`
    divprune@tile:thumbnail=64  the same, with another keep or method for the thumbnail
    divprune@frame              on each frame of a clip separately, `vtc.PerFrame`

`keep` is usually swept, so it is given separately from the text. In a composition it goes to the
first method that has a `keep` and does not set it. After `@` it counts per tile or frame.
`vtc.methods.Compose` says what a fraction means after other methods.

Values are Python literals or bare words: `layers=(3,9)`, `version=v2`. Separators inside brackets
and quotes belong to the value.
"""

from __future__ import annotations

import ast
import dataclasses
import re
from collections.abc import Iterator, Mapping
from typing import Any

from .errors import ArgumentError, ArgumentTypeError, argument_of, within
from .method import Compose, Method
from .names import meant, unknown
from .registry import find, methods, wrappers

__all__ = [
    "compact",
    "keep_is_at_fault",
    "make",
    "parse_keep",
    "parse_method",
    "split_list",
    "takes_keep",
]

Keep = int | float
Part = tuple[str, str, dict[str, Any]]
"""A method's name, the part of an image it is applied to ("" for whole images), its settings."""

_BRACKETS = {"(": ")", "[": "]", "{": "}"}
_WORD = re.compile(r"[\w.+~/\\-]+")
"""Numbers, names and paths, which need no quotes."""


def _accepted_fields(cls: type[Method]) -> Iterator[str]:
    for f in dataclasses.fields(cls):  # type: ignore[arg-type]
        if f.init:
            yield f.name


def make(method: str | Method | Mapping[str, Any], **settings: Any) -> Method:
    """Make a method from a name with settings, text, a dictionary from `to_dict`, or a method.

    Args:
        method: a name, text such as `"fastv:layer=3"`, a dictionary, or a method.
        settings: the method's settings, with a name only; with other text only `keep`.

    Raises:
        ArgumentError: unknown name, or a value that the method refuses.
        ArgumentTypeError: a setting the method does not have or of the wrong type, settings next to
            a method object, or not a method.
        TypeError: a required setting is missing.
    """
    if isinstance(method, Mapping):
        spec = dict(method)
        name = spec.pop("method", None)
        if not isinstance(name, str):
            raise ArgumentError("method", f"a dictionary needs a name under 'method', got {name!r}")
        if name != "compose":
            return make(name, **spec, **settings)
        if settings or set(spec) != {"methods"}:
            raise ArgumentTypeError(
                "method",
                "a composition has 'methods' and no settings of its own, got "
                f"{', '.join([*spec, *settings]) or 'none'}",
            )
        return Compose(tuple(make(m) for m in spec["methods"]))
    if isinstance(method, Method):
        for part in method.parts:
            if not dataclasses.is_dataclass(part) or not hasattr(part, "name"):
                raise ArgumentTypeError(
                    "method",
                    f"{type(part).__name__} must be a dataclass with a `name`; its fields are its "
                    "settings",
                )
        if settings:
            raise ArgumentTypeError(
                next(iter(settings)),
                f"settings go with a method's name; {method} is a method already: pass them to its "
                "constructor",
            )
        return method
    if isinstance(method, type) and issubclass(method, Method):
        raise ArgumentTypeError(
            "method", f"got the class {method.__name__}; give {method.__name__}(...)"
        )
    if isinstance(method, str) and set(method) & set("|+:@"):
        # Settings and compositions as text, as on the command line.
        if set(settings) - {"keep"}:
            raise ArgumentTypeError(
                "settings", f"write them in {method!r}, or name a single method"
            )
        return parse_method(method, settings.get("keep"))
    if not isinstance(method, str):
        raise ArgumentTypeError(
            "method", f"expected a name, a method or a composition, got {type(method).__name__}"
        )
    cls = find(method.lower())
    if cls is None:
        raise ArgumentError("method", unknown(method, methods()))
    accepted = list(_accepted_fields(cls))
    strange = [key for key in settings if key not in accepted]
    if strange:
        known = f"accepted are {', '.join(accepted) or 'none'}"
        raise ArgumentTypeError(
            strange[0], f"{method} has no such setting{meant(strange[0], accepted)}; {known}"
        )
    return cls(**settings)


def split_list(text: str, separator: str = ",") -> list[str]:
    """Split at `separator` outside brackets and quotes and strip the parts; "" gives [].

    Args:
        text: the list.
        separator: a single character.

    Raises:
        ArgumentError: unmatched brackets or quotes, or an empty part.
    """
    parts = _split(text, separator)
    if parts == [""]:
        return []
    if "" in parts:
        raise ArgumentError(
            "text", f"expected something on both sides of each {separator!r}, got {text!r}"
        )
    return parts


def _split(text: str, separator: str, argument: str = "text") -> list[str]:
    """The stripped parts between separators outside brackets and quotes, including empty ones;
    `argument` is what `text` is of."""
    parts, start, quote = [], 0, ""
    closers: list[str] = []
    for i, char in enumerate(text):
        if quote:
            quote = "" if char == quote else quote
        elif char in "'\"":
            quote = char
        elif char in _BRACKETS:
            closers.append(_BRACKETS[char])
        elif char in ")]}":
            if not closers or closers.pop() != char:
                raise ArgumentError(argument, f"brackets do not match in {text!r}")
        elif char == separator and not closers:
            parts.append(text[start:i])
            start = i + 1
    if closers or quote:
        what = "quotes" if quote else "brackets"
        raise ArgumentError(argument, f"{what} do not match in {text!r}")
    return [part.strip() for part in [*parts, text[start:]]]


def compact(text: str) -> str:
    """`text` without spaces around separators and brackets; those in quotes stay."""
    return re.sub(
        r"""('[^']*'|"[^"]*")|\s*([|:=,@()\[\]])\s*""",
        lambda found: found[1] or found[2],
        text.strip(),
    )


def parse_keep(text: str) -> Keep:
    """`"0.25"` is a quarter of an image's tokens, `"64"` is 64 tokens; `"1"` is one, `"1.0"` all.

    Raises:
        ArgumentError: neither a fraction in (0, 1] nor a whole number of at least 1.
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
        raise ArgumentError(
            "keep", f"expected a fraction in (0, 1] or a whole number of tokens, got {text!r}"
        )
    return keep


def _value(key: str, text: str) -> Any:
    """The value of a Python literal, or the bare word itself."""
    if text.lower() in ("true", "false", "none"):
        return {"true": True, "false": False, "none": None}[text.lower()]
    if "+" in text and text.rpartition("+")[2].partition("@")[0].strip().lower() in methods():
        raise ArgumentError(key, f"got {text!r}; methods are composed with '|'")
    if _WORD.fullmatch(text):
        try:
            return ast.literal_eval(text)
        except (ValueError, SyntaxError):
            return text
    try:
        if not _comments(text):
            return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        pass
    raise ArgumentError(
        key,
        f"expected a number, a word, or a Python literal such as 'a b' or (1, 2), got {text!r}",
    )


def _comments(text: str) -> bool:
    """Whether Python would ignore the rest of `text` as a comment."""
    return any(len(part) < len(text) for part in _split(text, "#"))


def _parts(text: str) -> list[Part]:
    """The methods in `text`, with checked names."""
    parts = []
    for part in _split(text, "|", "method"):
        if not part:
            raise ArgumentError(
                "method", f"expected a name on both sides of each '|', got {text!r}"
            )
        whole, *pairs = _split(part, ":", "method")
        name, at, each = (piece.strip().lower() for piece in whole.partition("@"))
        if name not in methods():
            joined = "+" in name and all(n.strip() in methods() for n in name.split("+"))
            hint = "; methods are composed with '|'" if joined else ""
            raise ArgumentError("method", f"{unknown(name, methods())}{hint}")
        if at and each not in wrappers():
            accepted = " or ".join(f"@{known}" for known in wrappers())
            raise ArgumentError("method", f"expected {accepted} after {name!r}, got {'@' + each!r}")
        settings: dict[str, Any] = {}
        for pair in pairs:
            key, equals, value = (piece.strip() for piece in pair.partition("="))
            if not (key and equals):
                raise ArgumentError(
                    "method", f"expected setting=value after {whole!r} and a colon, got {pair!r}"
                )
            if key in settings:
                raise ArgumentError(key, f"given twice in {part!r}")
            settings[key] = _value(key, value)
        parts.append((name, each, settings))
    return parts


def _fields(name: str) -> set[str]:
    return {f.name for f in dataclasses.fields(methods()[name]) if f.init}  # type: ignore[arg-type]


def _keep_goes_to(parts: list[Part]) -> int | None:
    free = (
        i
        for i, (name, _, settings) in enumerate(parts)
        if "keep" in _fields(name) and "keep" not in settings
    )
    return next(free, None)


def takes_keep(text: str) -> bool:
    """Whether the method has a `keep` that `text` leaves open."""
    return _keep_goes_to(_parts(text)) is not None


def parse_method(text: str, keep: Keep | None = None, seed: int | None = None) -> Method:
    """The method described by `text`.

    Args:
        text: see the module's docstring.
        keep: for the first method that has a `keep` which `text` does not set.
        seed: for every method that has a `seed` which `text` does not set.

    Raises:
        ArgumentError: unknown name, malformed or repeated settings, a value that the method
            refuses, or `@` after a method that cannot act on single tiles.
        ArgumentTypeError: a setting the method does not have or of the wrong type, or `keep`
            although no method has one left to set.
        TypeError: a required setting is missing.
    """
    parts = _parts(text)
    if keep is not None:
        index = _keep_goes_to(parts)
        if index is None:
            raise ArgumentTypeError(
                "keep", f"{text!r} has no such setting, or is given one already"
            )
        parts[index][2]["keep"] = keep
    if seed is not None:
        for name, _, settings in parts:
            if "seed" in _fields(name):
                settings.setdefault("seed", seed)
    whole, *others = (_made(*part) for part in parts)
    for other in others:
        whole = whole | other
    return whole


def keep_is_at_fault(error: Exception, text: str) -> bool:
    """Whether `parse_method` refused the separate `keep`, not `text`.

    Args:
        error: what `parse_method(text, keep)` raised.
        text: a method as text.
    """
    if argument_of(error) != "keep":
        return False
    try:
        parse_method(text)
    except (ValueError, TypeError) as own:
        return argument_of(own) != "keep"  # else a `keep` in `text` is at fault too
    return True


def _made(name: str, each: str, settings: dict[str, Any]) -> Method:
    if not each:
        return make(name, **settings)
    # The wrapper's settings are given among those of the method; their names do not overlap.
    wrapper: Any = wrappers()[each]
    own = {f.name for f in dataclasses.fields(wrapper)} - {"inner"}
    inner = make(name, **{k: v for k, v in settings.items() if k not in own})
    try:
        return wrapper(inner, **{k: v for k, v in settings.items() if k in own})
    except (TypeError, ValueError) as error:
        if argument_of(error) in settings:
            raise
        raise within("method", within(f"{name}@{each}", error)) from None
