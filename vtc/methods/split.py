# SPDX-License-Identifier: Apache-2.0
"""A budget for every tile of a tiled image, or for every frame of a clip."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vtc.core import (
    LayerState,
    Method,
    Positions,
    Record,
    Rows,
    Selection,
    Signal,
    VisionTokens,
    make,
)
from vtc.core.errors import ArgumentError, within
from vtc.core.settings import check_keep
from vtc.core.signals import fields_of, read_at

_OF_TOKENS = ("features", "grid", "crop", *fields_of("token"))
"""Fields of `VisionTokens` with one row per token."""

_OF_TILES = {name: field.of_tiles for name, field in fields_of("tile").items()}
"""Its fields for the whole image, and the names of the same for each tile."""

_AT_VISION_LAYER, _AT_LOW_LAYER = read_at("vision_layer"), read_at("low_layer")


class _Split(Method):
    """Base of `PerTile` and `PerFrame`: only the sequence stage is split."""

    listed = False
    inner: Method

    @property
    def stages(self) -> tuple[str, ...]:
        """Stages of the inner method."""
        return self.inner.stages

    @property
    def closes_gaps_by_choice(self) -> bool:
        """As in the inner method."""
        return self.inner.closes_gaps_by_choice

    @property
    def keeps_all(self) -> bool:
        """Whether all of the methods keep all tokens."""
        return all(method.keeps_all for method in self._methods)

    @property
    def needs(self) -> frozenset[Signal]:  # type: ignore[override]
        """The signals that any of the methods needs."""
        return frozenset().union(*(method.needs for method in self._methods))

    @property
    def vision_layer(self) -> int | float:  # type: ignore[override]
        """That of the method that reads it."""
        return self._reader(_AT_VISION_LAYER).vision_layer

    @property
    def low_layer(self) -> int | float:  # type: ignore[override]
        """That of the method that reads it."""
        return self._reader(_AT_LOW_LAYER).low_layer

    @property
    def positions(self) -> Positions:  # type: ignore[override]
        """That of the inner method."""
        return self.inner.positions

    # ---- between layers: the inner method, on all that is left -----------------------------------
    @property
    def prune_positions(self) -> Positions:
        """That of the inner method."""
        return self.inner.prune_positions

    @property
    def by_head(self) -> bool:
        """As in the inner method."""
        return self.inner.by_head

    def prune_layers(self, num_layers: int) -> tuple[int, ...]:
        """Those of the inner method."""
        return self.inner.prune_layers(num_layers)

    # ---- how many tokens it leaves: of an image, which is one frame ------------------------------
    def entering(self, n: int, tiles: int = 1) -> int | None:
        """As in the inner method."""
        return self.inner.entering(n, tiles)

    def leaves(self, sizes: tuple[int, ...], held: int, cut: int, cuts: int) -> int | None:
        """As in the inner method."""
        return self.inner.leaves(sizes, held, cut, cuts)

    def is_bound(self, n: int, tiles: int = 1) -> bool:
        """As in the inner method."""
        return self.inner.is_bound(n, tiles)

    @property
    def by_tile(self) -> bool:  # type: ignore[override]
        """As in the inner method."""
        return self.inner.by_tile

    @property
    def reads_places(self) -> bool:  # type: ignore[override]
        """As in the inner method."""
        return any(method.reads_places for method in self._methods)

    @property
    def counts_found(self) -> bool:
        """Always `True`: earlier methods may have taken more from some parts than from others."""
        return True

    def taps(self, num_layers: int) -> dict[int, Rows]:
        """Those of the inner method."""
        return self.inner.taps(num_layers)

    def peeks(self, num_layers: int) -> dict[int, Rows]:
        """Those of the inner method."""
        return self.inner.peeks(num_layers)

    def records(self, num_layers: int) -> dict[int, frozenset[Record]]:
        """Those of the inner method."""
        return self.inner.records(num_layers)

    def prune(self, state: LayerState) -> Selection | None:
        """The inner method's choice among all vision tokens of the sample."""
        return self.inner.prune(state)

    # ---- before the language model --------------------------------------------------------------
    @property
    def _methods(self) -> tuple[Method, ...]:
        return (self.inner,)

    def _reader(self, signals: frozenset[Signal]) -> Method:
        return next((m for m in self._methods if m.needs & signals), self.inner)

    def _apply(
        self,
        tokens: VisionTokens,
        part: Tensor,
        every: Tensor | None,
        first: Method,
        tiles: bool = False,
    ) -> Selection:
        """(k,) ascending indices, and (k, d) contents if a part was merged.

        Args:
            part: (n,) the part each token belongs to.
            every: (N,) the same for all original tokens, or `None` if none was dropped.
            first: method for part 0; the inner method acts on all others.
            tiles: whether the parts are tiles, each with its own [CLS].
        """
        indices, contents, merged = [], [], False
        for number, name in enumerate(part.unique().tolist()):
            places = (part == name).nonzero().squeeze(1)
            signals: dict[str, Any] = {
                field: None if (value := getattr(tokens, field)) is None else value[places]
                for field in _OF_TOKENS
            }
            signals["total"] = None
            if every is not None:
                own = every == name
                signals["total"] = int(own.sum())
                for field in ("every_grid", "every_crop"):
                    whole = getattr(tokens, field)
                    signals[field] = None if whole is None else whole[own]
            for field, of_tiles in _OF_TILES.items() if tiles else ():
                if (rows := getattr(tokens, of_tiles)) is not None:
                    signals |= {field: rows[name], of_tiles: None}
            # Methods seeded by the image's ordinal must not draw alike in all parts.
            image = tokens.image + (number << 16)
            method = first if name == 0 else self.inner
            found = method.select(dataclasses.replace(tokens, image=image, **signals))
            chosen = places[found.indices]
            indices.append(chosen)
            merged = merged or found.features is not None
            contents.append(tokens.features[chosen] if found.features is None else found.features)
        every = torch.cat(indices)
        order = every.argsort()
        features = torch.cat([rows.to(tokens.features) for rows in contents]) if merged else None
        return Selection(every[order], None if features is None else features[order])


def _checked(name: str, method: Any, layers: bool = True) -> Method:
    """A simple method of the sequence stage, from a method, its name or its dictionary.

    Args:
        name: the argument, for errors.
        method: what was given.
        layers: whether it may also act between layers.
    """
    try:
        found = make(method)
    except (TypeError, ValueError) as error:
        raise within(name, error) from None
    accepted = [("sequence",), ("sequence", "layers")][: 1 + layers]
    if found.parts != (found,) or found.stages not in accepted:
        stages = "stage, or there and between layers" if layers else "stage alone"
        acts = ", ".join(found.stages) or "nothing"
        raise ArgumentError(
            name,
            f"expected one method that acts in the sequence {stages}, got {found} ({acts}); "
            "compose others with `|`",
        )
    keep = getattr(found, "keep", 1.0)
    if "layers" in found.stages and not isinstance(keep, float):
        raise ArgumentError(
            name,
            f"expected a fraction as keep of {found.name}, whose stage between layers counts all "
            f"tokens of an image, got {keep!r}",
        )
    return found


@dataclass(frozen=True)
class PerTile(_Split):
    """Apply a method to each tile of a tiled image separately, so that `inner.keep` is per tile.

    Text signals are those of the whole image; everything else is the tile's own. An image that is
    not tiled, or has a single tile, counts as one tile. A clip whose frames are not tiled is not
    split; see `PerFrame`. Between layers the inner method acts on all tiles together; its `keep`
    must then be a fraction, which applies to each tile and to all.

    Args:
        inner: a method of the sequence stage, which may also act between layers, its name, or
            its dictionary.
        thumbnail: what acts on the thumbnail (crop 0 of several) instead: a method of only the
            sequence stage, or another `keep` if the inner method is one; `None` treats it as any
            tile.

    Raises:
        ArgumentError: methods of other stages, or a thumbnail method whose positions or tower
            layers differ from those of `inner`.
        ArgumentTypeError: neither a method nor a `keep`.
    """

    name = "per_tile"
    each = "tile"
    title = "A method for each tile of an image by itself"

    inner: Method
    thumbnail: Method | float | int | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "inner", _checked("inner", self.inner))
        given = self.thumbnail
        if given is None:
            return
        if "layers" in self.inner.stages:
            raise ArgumentError(
                "thumbnail",
                f"expected None, as {self.inner.name} acts between layers on all tiles together, "
                f"got {given!r}",
            )
        if isinstance(given, (str, Mapping, Method)):
            object.__setattr__(self, "thumbnail", _checked("thumbnail", given, layers=False))
        else:
            try:
                check_keep(given)
            except (TypeError, ValueError) as error:
                raise within("thumbnail", error) from None
            if "keep" not in {f.name for f in dataclasses.fields(self.inner)}:  # type: ignore[arg-type]
                raise ArgumentError(
                    "thumbnail", f"{self.inner.name} has no keep; expected a method, got {given!r}"
                )
        other = self.of_thumbnail
        shared = self.inner.needs & other.needs
        for what, counts in (
            ("positions", True),
            ("vision_layer", bool(shared & _AT_VISION_LAYER)),
            ("low_layer", bool(shared & _AT_LOW_LAYER)),
        ):
            mine, its = getattr(self.inner, what), getattr(other, what)
            if counts and mine != its:
                raise ArgumentError(
                    "thumbnail",
                    f"expected {what} {mine!r} as {self.inner.name} has it, got {its!r}",
                )

    @property
    def of_thumbnail(self) -> Method:
        """The method that acts on the thumbnail."""
        if self.thumbnail is None:
            return self.inner
        if isinstance(self.thumbnail, Method):
            return self.thumbnail
        return dataclasses.replace(self.inner, keep=self.thumbnail)  # type: ignore[type-var]

    @property
    def _methods(self) -> tuple[Method, ...]:
        return (self.inner, self.of_thumbnail)

    by_tile = True

    def entering(self, n: int, tiles: int = 1) -> int | None:
        """The sum over the tiles; the first of several is the thumbnail."""
        first = self.of_thumbnail if tiles > 1 else self.inner
        own = [m.entering(n // tiles) for m in (first, *[self.inner] * (tiles - 1))]
        known = [count for count in own if count is not None]
        return sum(known) if len(known) == len(own) else None

    def is_bound(self, n: int, tiles: int = 1) -> bool:
        """Whether the schedule of a tile is an upper bound."""
        return any(method.is_bound(n // tiles) for method in self._methods)

    def select(self, tokens: VisionTokens) -> Selection:
        """(k,) ascending indices, and (k, d) contents if the method merges."""
        if tokens.crop is None:
            return self.inner.select(tokens)
        # A single tile, the only one or the only one left, is not a thumbnail.
        several = bool((tokens.crop != tokens.crop[0]).any())
        first = self.of_thumbnail if several else self.inner
        return self._apply(tokens, tokens.crop, tokens.every_crop, first, tiles=True)

    def to_dict(self) -> dict[str, Any]:
        """Both methods, ready for JSON; `make` is the inverse."""
        given = self.thumbnail
        thumbnail = given.to_dict() if isinstance(given, Method) else given
        return {"method": self.name, "inner": self.inner.to_dict(), "thumbnail": thumbnail}

    def __str__(self) -> str:
        other = "" if self.thumbnail is None else f", thumbnail={self.thumbnail}"
        return f"{self.name}({self.inner}{other})"


@dataclass(frozen=True)
class PerFrame(_Split):
    """Apply a method to each frame of a clip separately, so that `inner.keep` is per frame.

    Without it, a clip is one image to a method, and `keep` its budget. [CLS] and text signals are
    those of the whole clip; everything else is the frame's own. An image is one frame. Between
    layers the inner method acts on all frames together; its `keep` must then be a fraction.

    Args:
        inner: a method of the sequence stage, which may also act between layers, its name, or
            its dictionary.

    Raises:
        ArgumentError: a method of other stages.
        ArgumentTypeError: not a method.
    """

    name = "per_frame"
    each = "frame"
    title = "A method for each frame of a clip by itself"
    reads_places = True

    inner: Method

    def __post_init__(self) -> None:
        object.__setattr__(self, "inner", _checked("inner", self.inner))

    def select(self, tokens: VisionTokens) -> Selection:
        """(k,) ascending indices, and (k, d) contents if the method merges.

        Raises:
            ValueError: the tokens have no places.
        """
        grid = tokens.places(self.name, "divides tokens by frame")
        frame, every = grid[:, 0], None
        if tokens.every_grid is not None:  # earlier methods may have left one frame of several
            every = tokens.every_grid[:, 0]
        whole = frame if every is None else every
        if not bool((whole != whole[:1]).any()):
            return self.inner.select(tokens)
        return self._apply(tokens, frame, every, self.inner)

    def to_dict(self) -> dict[str, Any]:
        """The inner method, ready for JSON; `make` is the inverse."""
        return {"method": self.name, "inner": self.inner.to_dict()}

    def __str__(self) -> str:
        return f"{self.name}({self.inner})"
