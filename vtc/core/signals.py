# SPDX-License-Identifier: Apache-2.0
"""What a method may ask for in `needs`: one table of signals, from which all that fills, splits and
counts them reads."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

from .names import unknown

Signal = Literal[
    "cls_attention", "low_attention", "cls_query", "keys", "encoder", "text", "segment", "patches"
]
"""Names of the signals; see `SIGNALS` and `VisionTokens`."""

Scope = Literal["token", "tile", "image"]
"""Whether there is one row for each token, one value for each tile ([CLS]), or one of the image."""

Source = Literal["tower attention", "tower state", "text", "grid"]

Size = Literal["n", "m", "v", "t", "d"]
"""Vision tokens, patches of a token, width of the tower, tokens of text, width of the decoder."""


@dataclass(frozen=True)
class Field:
    """A field of `VisionTokens` that comes with a signal.

    Attributes:
        name: of the field.
        scope: what it has a value of.
        shape: its sizes; () for what is no tensor.
        of_tiles: of the scope "tile", the field with the values of all tiles of a tiled image;
            `name` is of the thumbnail then.
    """

    name: str
    scope: Scope
    shape: tuple[Size, ...] = ()
    of_tiles: str = ""


@dataclass(frozen=True)
class SignalSpec:
    """A signal: where it comes from, which fields it fills, and what it costs.

    Attributes:
        name: what `needs` calls it.
        source: where it is read.
        fields: the one of its name, and those that come with it.
        layer: the class attribute of a method that says which tower layer it is read at, or `None`.
        rows: whether reading it costs attention rows of that layer beside the layer's own: that of
            [CLS], or in towers without [CLS] those of all patches.
    """

    name: Signal
    source: Source
    fields: tuple[Field, ...]
    layer: Literal["vision_layer", "low_layer"] | None = None
    rows: bool = False


_HEADS = Field("heads", "image")

SIGNALS: Mapping[Signal, SignalSpec] = MappingProxyType(
    {
        spec.name: spec
        for spec in (
            SignalSpec(
                "cls_attention",
                "tower attention",
                (Field("cls_attention", "token", ("n",)), _HEADS),
                layer="vision_layer",
                rows=True,
            ),
            SignalSpec(
                "low_attention",
                "tower attention",
                (Field("low_attention", "token", ("n",)),),
                layer="low_layer",
                rows=True,
            ),
            SignalSpec(
                "cls_query",
                "tower attention",
                (
                    Field("cls_query", "tile", ("v",), of_tiles="crop_query"),
                    Field("cls_key", "tile", ("v",), of_tiles="crop_key"),
                    _HEADS,
                ),
                layer="vision_layer",
                rows=True,
            ),
            SignalSpec(
                "keys",
                "tower attention",
                (Field("keys", "token", ("n", "v")), _HEADS),
                layer="vision_layer",
                rows=True,
            ),
            SignalSpec(
                "encoder",
                "tower state",
                (
                    Field("encoder", "token", ("n", "v")),
                    Field("encoder_cls", "tile", ("v",), of_tiles="crop_cls"),
                    Field("project", "image"),
                ),
            ),
            SignalSpec("text", "text", (Field("text", "image", ("t", "d")),)),
            SignalSpec("segment", "text", (Field("segment", "image", ("t", "d")),)),
            SignalSpec("patches", "grid", (Field("patches", "token", ("n", "m")),)),
        )
    }
)


def fields_of(scope: Scope) -> dict[str, Field]:
    """All fields of signals with this scope, by name."""
    every = (field for spec in SIGNALS.values() for field in spec.fields)
    return {field.name: field for field in every if field.scope == scope}


def read_at(layer: str) -> frozenset[Signal]:
    """The signals that are read at the tower layer that `layer` names."""
    return frozenset(name for name, spec in SIGNALS.items() if spec.layer == layer)


def read_in_tower() -> frozenset[Signal]:
    """The signals that come from the vision tower."""
    return frozenset(name for name, spec in SIGNALS.items() if spec.source.startswith("tower"))


def check_needs(method: str, needs: Iterable[str]) -> None:
    """Refuse signals that there are not.

    Raises:
        ValueError: names the method, the signal and those that there are.
    """
    for name in sorted(needs):
        if name not in SIGNALS:
            raise ValueError(f"{method}: {unknown(name, SIGNALS, 'signal in needs', 'accepted')}")
