# SPDX-License-Identifier: Apache-2.0
"""The signals that a method may request in `needs`: one table for all code that fills, splits or
counts them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

from .errors import ArgumentError
from .names import unknown

Signal = Literal[
    "cls_attention", "low_attention", "cls_query", "keys", "encoder", "text", "segment", "patches"
]
"""Names of the signals; see `SIGNALS` and `VisionTokens`."""

Scope = Literal["token", "tile", "image"]
"""One row per token, one value per tile ([CLS]), or one value per image."""

Source = Literal["tower attention", "tower state", "text", "grid"]

Size = Literal["n", "m", "v", "t", "d"]
"""Vision tokens, patches per token, tower width, text tokens, decoder width."""


@dataclass(frozen=True)
class Field:
    """A field of `VisionTokens` that comes with a signal.

    Attributes:
        name: name of the field.
        scope: what it holds a value for.
        shape: its sizes; () if it is not a tensor.
        of_tiles: for the scope "tile", the field with the values of all tiles of a tiled image;
            `name` then holds the thumbnail's.
        captured: its name among what an executor captures, if another.
    """

    name: str
    scope: Scope
    shape: tuple[Size, ...] = ()
    of_tiles: str = ""
    captured: str = ""

    @property
    def captures(self) -> dict[str, str]:
        """The fields of `VisionTokens` that it fills, and the captured values that fill them."""
        own = {self.name: self.captured or self.name}
        return {**own, self.of_tiles: self.of_tiles} if self.of_tiles else own


@dataclass(frozen=True)
class SignalSpec:
    """A signal: where it comes from, which fields it fills, and what it costs.

    Attributes:
        name: its name in `needs`.
        source: where it is captured.
        fields: the field of its name, and those that come with it.
        layer: the class attribute of a method that gives the tower layer to capture, or `None`.
        rows: whether capturing it costs extra attention rows in that layer: the row of [CLS], or
            all rows in towers without [CLS].
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
                (Field("cls_attention", "token", ("n",), captured="attention"), _HEADS),
                layer="vision_layer",
                rows=True,
            ),
            SignalSpec(
                "low_attention",
                "tower attention",
                (Field("low_attention", "token", ("n",), captured="attention"),),
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
            SignalSpec(
                "patches",
                "grid",
                (Field("patches", "token", ("n", "m"), captured="filled_patches"),),
            ),
        )
    }
)


def fields_of(scope: Scope) -> dict[str, Field]:
    """All fields of signals with this scope, by name."""
    every = (field for spec in SIGNALS.values() for field in spec.fields)
    return {field.name: field for field in every if field.scope == scope}


def read_at(layer: str) -> frozenset[Signal]:
    """The signals captured at the tower layer that the class attribute `layer` gives."""
    return frozenset(name for name, spec in SIGNALS.items() if spec.layer == layer)


def read_in_tower() -> frozenset[Signal]:
    """The signals that come from the vision tower."""
    return frozenset(name for name, spec in SIGNALS.items() if spec.source.startswith("tower"))


def check_needs(method: str, needs: Iterable[str]) -> None:
    """Refuse unknown signals.

    Raises:
        ArgumentError: names the method, the unknown signal and the known ones.
    """
    for name in sorted(needs):
        if name not in SIGNALS:
            message = unknown(name, SIGNALS, "signal", "accepted")
            raise ArgumentError("needs", f"{method}: {message}")
