# SPDX-License-Identifier: Apache-2.0
"""Published token targets: `preset("visionzip", "llava-1.5", 64)` is a method that meets one.

Papers mean several things by "N tokens", and tables that mix them are not comparable:

- "exact": vision tokens that enter the language model;
- "average": vision tokens that a decoder layer processes, mean over the layers;
- "kept": vision tokens left after one cut between layers; the layers before it see all;
- "counted": what the authors' own counter reports, if it is less than what is processed.

A preset says which one it meets; `Preset.schedule` counts all of them, with the bytes of the
cache and the FLOPs. For methods that act between layers the default is "average"; if both are
listed, request "kept" explicitly. Settings that depend on the target are solved for the
decoder's depth, so that `preset("fastv", "llava-1.5", 64, layer=3)` still averages 64.

A tiled image (LLaVA-NeXT: at most 5 tiles of 576 tokens) is divided as in the source, and
`Preset.scope` says how:

- "tile": each tile has its own budget. VisionZip, VisPruner, CDPruner, SCOPE, MMTok, PruMerge+
  (inferred) and VScan's first stage come as `vtc.PerTile`. All but VScan have a number of tokens:
  640 of 2880 is 128 per tile, for any number of tiles, including tiles that the model crops to
  the picture's shape. VScan has a fraction, as its cut in the decoder is one for all tiles. Methods
  of the vision tower (`tome`, `flowcut`) see one tile at a time, and `pool` and `downsample` divide
  by tile themselves; these have fractions.
- "image": the tiles compete for one budget, a fraction of all their tokens: DivPrune, HoloV,
  ToDRE, and all methods that act only in the decoder (FastV, SparseVLM, PyramidDrop, DART, V2Drop,
  TransPrune). `random`, which has no source, is treated likewise.

`image_newline` tokens do not count towards a budget here. VisionZip, SCOPE, MMTok, FlowCut and
HoloV drop them, VisPruner, CDPruner and ToDRE run without any, VScan keeps all and does not count
them, and DivPrune treats them as tokens. transformers puts one after each row of tiles:
vtc keeps those of rows that keep a token, in addition to the target.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any, Literal, get_args

from vtc.core.errors import ArgumentError, ArgumentTypeError
from vtc.core.names import meant
from vtc.cost import equivalent_tokens, token_schedule
from vtc.methods import Method, PerTile, make, methods
from vtc.presets.cost import Schedule, describe, scope_of
from vtc.presets.table import (
    NEVER,
    SHARE,
    TABLE,
    TARGET,
    TARGETS,
    WITHOUT,
    Convention,
    Open,
    Row,
    Target,
    target_of,
)

__all__ = [
    "TARGETS",
    "Convention",
    "InfeasibleError",
    "Preset",
    "Schedule",
    "Target",
    "describe",
    "find",
    "preset",
    "presets",
]


@dataclass(frozen=True)
class Preset:
    """Settings with which a method meets a token target.

    Attributes:
        method: name of the method.
        target: the model, a name in `TARGETS`.
        tokens: the target, a number of vision tokens, or a fraction if image sizes differ.
        convention: what `tokens` counts.
        settings: settings of the method.
        source: where they come from, or that they were solved or inferred.
        each: whether the method is applied to each tile separately, with `settings` per tile.
    """

    method: str
    target: str
    tokens: int | float
    convention: Convention
    settings: Mapping[str, Any] = field(hash=False)
    source: str
    each: bool = False

    @property
    def scope(self) -> Literal["image", "tile"]:
        """ "image" if all tiles of an image share one budget, "tile" if each has its own."""
        return scope_of(self.make(), TARGETS[self.target].tiles)

    @property
    def text(self) -> str:
        """The method as text, for the command line and `vtc.core.spec`."""
        settings = "".join(f":{name}={value!r}" for name, value in self.settings.items())
        return self.method + "@tile" * self.each + settings

    def make(self) -> Method:
        """The method, ready for `vtc.patch`.

        Raises:
            ArgumentError: no such method is registered.
        """
        return _made(self.method, self.settings, self.each)

    def schedule(self, *, text: int = 0, image: int | None = None) -> Schedule:
        """Tokens of every layer, in all conventions, and their cost; see `describe`.

        Args:
            text, image: as in `describe`.
        """
        return describe(self.make(), self.target, text=text, image=image)


def _made(method: str, settings: Mapping[str, Any], each: bool) -> Method:
    inner = make(method, **settings)
    return PerTile(inner) if each else inner


def presets(method: str | None = None, target: str | None = None) -> list[Preset]:
    """All feasible presets of the registered methods, in the order of the table.

    Args:
        method: only those of this method.
        target: only those of this model.

    Returns:
        The presets; empty if the method is not registered or has none on the target.

    Raises:
        ArgumentError: a method without presets, or an unknown target.
    """
    rows = [row for row in TABLE if row.method in methods()]
    if method is not None:
        _rows_of(method)
        rows = [row for row in rows if row.method == method.lower()]
    if target is not None:
        rows = [row for row in rows if row.target == target_of(target).name]
    return list(_feasible(rows))


def preset(
    method: str,
    target: str,
    tokens: int | float,
    *,
    convention: Convention | None = None,
    **settings: Any,
) -> Method:
    """The method with which `target` keeps `tokens` vision tokens, ready for `vtc.patch`.

    Args:
        method: a name; `presets()` lists them.
        target: "llava-1.5" (576 vision tokens), "llava-next" (2880) or "qwen2.5-vl" (any number).
        tokens: 64, or the fraction 64 / 576; on Qwen2.5-VL a fraction. Precise to a thousandth.
        convention: what `tokens` counts, if the method has presets of several conventions (see the
            module's docstring); by default the first one listed.
        settings: other settings of the method, which solved ones take into account. Settings that
            the preset fixes are refused, except a listed `version` ("v2" of SparseVLM).

    Returns:
        The method with its settings; applied per tile if the preset says so.

    Raises:
        ArgumentError: unknown method, target, tokens or convention, or a target that the method
            cannot meet, with the smallest (or largest) one that it can.
        TypeError: a setting that the method does not have or that the preset fixes.
    """
    return find(method, target, tokens, convention=convention, **settings).make()


def find(
    method: str,
    target: str,
    tokens: int | float,
    *,
    convention: Convention | None = None,
    **settings: Any,
) -> Preset:
    """Like `preset`, but returns the `Preset` with convention, source and schedule.

    Args:
        method, target, tokens, convention, settings: as in `preset`.

    Returns:
        The preset, with the settings solved.

    Raises:
        ArgumentError, ArgumentTypeError: as in `preset`.
    """
    rows, model = _rows_of(method), target_of(target)
    if convention is not None and convention not in get_args(Convention):
        expected = ", ".join(map(repr, get_args(Convention)))
        raise ArgumentError("convention", f"expected one of {expected}, got {convention!r}")
    here = [row for row in rows if row.target == model.name]
    if not here:
        known = ", ".join(dict.fromkeys(row.target for row in rows))
        raise ArgumentError("target", f"{method} has no presets on {model.name}; it has on {known}")
    here = _chosen(here, "convention", convention, lambda row: row.convention)
    # Each version of a method has its own rows.
    if all("version" in row.settings for row in here):
        version = settings.pop("version", None)
        here = _chosen(here, "version", version, lambda row: row.settings["version"])
    row = here[0]
    wanted = _listed(tokens, row, model)
    if wanted is None:
        more = [
            f"; with convention={other.convention!r}: {_names(other.tokens)}"
            for other in TABLE
            if (other.method, other.target) == (row.method, row.target)
            and other.convention != row.convention
        ]
        raise ArgumentError(
            "tokens",
            f"{method} has presets on {model.name} for {_names(row.tokens)} ({row.convention}), "
            f"got {tokens!r}{''.join(more)}",
        )
    return _resolved(row, wanted, settings)


def _chosen(rows: list[Row], name: str, value: Any, of: Callable[[Row], Any]) -> list[Row]:
    """The rows whose `of` is `value`, or all if it is `None`."""
    found = [row for row in rows if value is None or of(row) == value]
    if not found:
        known = ", ".join(dict.fromkeys(repr(of(row)) for row in rows))
        raise ArgumentError(
            name, f"{rows[0].method} has presets on {rows[0].target} for {known}, got {value!r}"
        )
    return found


def _rows_of(method: str) -> list[Row]:
    if not isinstance(method, str):
        raise ArgumentTypeError("method", f"expected a name, got {type(method).__name__}")
    rows = [row for row in TABLE if row.method == method.lower()]
    if not rows:
        known = list(dict.fromkeys(row.method for row in TABLE))
        why = f": {WITHOUT[method.lower()]}" if method.lower() in WITHOUT else meant(method, known)
        raise ArgumentError(
            "method", f"there are no presets of {method!r}{why}; there are of {', '.join(known)}"
        )
    return rows


def _names(tokens: Sequence[int | float]) -> str:
    return ", ".join(str(t) if isinstance(t, int) else f"{t:.4g}" for t in tokens)


def _listed(tokens: int | float, row: Row, model: Target) -> int | float | None:
    """The matching entry of the row, or `None`."""
    if isinstance(tokens, bool) or not isinstance(tokens, (int, float)):
        raise ArgumentTypeError(
            "tokens", f"expected a number of tokens or a fraction, got {tokens!r}"
        )
    for entry in row.tokens:
        if isinstance(tokens, int):
            if isinstance(entry, int) and tokens == entry:
                return entry
        # Users write a third as 0.333.
        elif abs(tokens - _share(entry, model)) < 1e-3:
            return entry
    return None


def _share(tokens: int | float, model: Target) -> float:
    return tokens / model.tokens if isinstance(tokens, int) else tokens


def _feasible(rows: Sequence[Row]) -> Iterator[Preset]:
    for row in rows:
        for tokens in row.tokens:
            try:
                yield _resolved(row, tokens, {})
            except InfeasibleError:
                continue


class InfeasibleError(ArgumentError):
    """A target that a method cannot meet."""


_LITTLE = 1e-9
_MANY = 10**9
"""An image so large that rounding to whole tokens does not matter."""


def _resolved(row: Row, tokens: int | float, given: Mapping[str, Any]) -> Preset:
    for name in given:
        if name in row.fixed:
            raise ArgumentTypeError(
                name,
                f"the preset of {tokens:.4g} tokens sets it; for another value make the "
                f"method, {row.method}({name}=...)",
            )
    settings = {**row.at(tokens), **given}
    open_keep = settings["keep"]
    if open_keep is TARGET:
        model = TARGETS[row.target]
        if row.each and isinstance(tokens, int):
            settings["keep"] = tokens // model.tiles
        else:
            settings["keep"] = tokens if model.tiles == 1 else _share(tokens, model)
    elif isinstance(open_keep, Open):
        settings["keep"] = _solved(row, tokens, settings)
    return Preset(
        row.method, row.target, tokens, row.convention, settings, row.source(tokens), row.each
    )


def _solved(row: Row, tokens: int | float, settings: Mapping[str, Any]) -> int | float:
    """The `keep` with which a layer sees `tokens` vision tokens on average."""
    model = TARGETS[row.target]
    wanted = _share(tokens, model)

    def average(keep: Any, n: int, tiles: int = 1) -> float:
        method = _made(row.method, {**settings, "keep": keep}, row.each)
        return equivalent_tokens(token_schedule(method, n, model.layers, tiles)) / n

    least = average((1, 1, 1) if row.method == "sparsevlm" else _LITTLE, model.tokens, model.tiles)
    if settings["keep"] is NEVER or wanted < least:
        raise _infeasible(row, tokens, "smallest", least)
    low, high = _LITTLE, 1.0
    if wanted > (most := average(1 - _LITTLE, _MANY)) + 1e-6:
        raise _infeasible(row, tokens, "largest", most)
    # The average grows with `keep`; sixty bisections exhaust a float's precision.
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (low, middle) if average(middle, _MANY) > wanted else (middle, high)
    if settings["keep"] is SHARE:
        return round(high, 4)
    size = model.tokens // (model.tiles if row.each else 1)
    count = max(1, round(high * size))
    return count if model.tiles == 1 else count / size


def _infeasible(row: Row, tokens: int | float, which: str, limit: float) -> InfeasibleError:
    """The error for `tokens`; `limit` is a fraction of the image's tokens."""
    model, toward = TARGETS[row.target], math.ceil if which == "smallest" else math.floor
    if isinstance(tokens, int):
        # The result of a division may lie slightly above an integer.
        best = f"{toward(round(limit * model.tokens, 6))}"
        asked = f"{tokens} of {model.tokens} tokens"
    else:
        best = f"{toward(round(limit * 1000, 6)) / 1000:g}"
        asked = f"{tokens:.4g} of the tokens"
    others = [
        other.convention
        for other in TABLE
        if (other.method, other.target) == (row.method, row.target)
        and other.convention != row.convention
        and tokens in other.tokens
    ]
    hint = "".join(f"; convention={other!r} has a preset of {tokens:.4g}" for other in others)
    return InfeasibleError(
        "tokens",
        f"{row.method} cannot meet {asked} on {row.target} on average over the {model.layers} "
        f"layers; the {which} it can meet is {best}{hint}",
    )


class _Package(ModuleType):
    """`vtc.presets` is this package and also the function of the same name."""

    def __call__(self, method: str | None = None, target: str | None = None) -> list[Preset]:
        return presets(method, target)


sys.modules[__name__].__class__ = _Package
