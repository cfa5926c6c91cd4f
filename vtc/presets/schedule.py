# SPDX-License-Identifier: Apache-2.0
"""How many tokens a method leaves to every decoder layer, by arithmetic."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any, Literal

from vtc.core import budget
from vtc.core.errors import ArgumentError
from vtc.cost import equivalent_tokens, kv_bytes, prefill_flops, visual_flops
from vtc.methods import Compose, Method, PerFrame, PerTile
from vtc.ops import cell_grid
from vtc.presets.table import target_of


def _steps(entering: int, cuts: Sequence[tuple[int, int]], layers: int) -> list[int]:
    """Tokens that each layer sees, when before layer l at most c are left for each (l, c)."""
    most, left, seen = dict(cuts), entering, []
    for layer in range(layers):
        left = min(left, most.get(layer, left))
        seen.append(left)
    return seen


def _flat(method: Any, n: int, layers: int, tiles: int) -> list[int]:
    return [budget(method.keep, n)] * layers


def by_tile(method: Any, n: int, layers: int, tiles: int) -> list[int]:
    return [tiles * budget(method.keep, n // tiles)] * layers


def by_cell(method: Any, n: int, layers: int, tiles: int) -> list[int]:
    """Square tiles of equal size share the budget; a grid of cells is rarely met to the token."""
    wanted, side = budget(method.keep, n), math.isqrt(n // tiles)
    if wanted >= n or side * side * tiles != n:
        return [wanted] * layers
    if wanted < tiles:  # neighbouring tiles are pooled together, a token each
        return [wanted] * layers
    ends = [i * wanted // tiles for i in range(tiles + 1)]
    return [sum(math.prod(cell_grid(side, side, b - a)) for a, b in pairwise(ends))] * layers


def _one_cut(method: Any, n: int, layers: int, tiles: int) -> list[int]:
    cuts = [(layer, budget(method.keep, n)) for layer in method.prune_layers(layers)]
    return _steps(n, cuts, layers)


def _pyramid(method: Any, n: int, layers: int, tiles: int) -> list[int]:
    at = method.prune_layers(layers)
    cuts = [(layer, method.left(n, stage, len(at))) for stage, layer in enumerate(at, start=1)]
    return _steps(n, cuts, layers)


def _v2drop(method: Any, n: int, layers: int, tiles: int) -> list[int]:
    left, cuts = n, []
    for layer, share in zip(method.prune_layers(layers), (method.keep, *method.then), strict=False):
        if method.keep == 1.0:
            break
        least = 0 if share == 0 and not method.one_stays else 1
        left = min(left, max(least, int(left * share)))
        cuts.append((layer, left))
    return _steps(n, cuts, layers)


def _transprune(method: Any, n: int, layers: int, tiles: int) -> list[int]:
    shares, left, cuts = method.shares, n, []
    for stage, layer in enumerate(method.prune_layers(layers)):
        counted, share = n, method.keep * shares[stage]
        if method.schedule == "after_selection":
            counted, share = left, share if stage == 0 else shares[stage] / shares[stage - 1]
        left = min(left, max(1, int(counted * share)))
        cuts.append((layer, left))
    return _steps(n, cuts, layers)


def _vscan(method: Any, n: int, layers: int, tiles: int) -> list[int]:
    entering = budget(method.keep, n)
    then = max(1, round(method.then * entering))
    return _steps(entering, [(layer, then) for layer in method.prune_layers(layers)], layers)


def _catp(method: Any, n: int, layers: int, tiles: int) -> list[int]:
    """One image has no examples: nothing leaves before the first of its two layers."""
    _, query = method.prune_layers(layers)
    return _steps(method.halfway(n), [(query, budget(method.keep, n))], layers)


def _sparsevlm(method: Any, n: int, layers: int, tiles: int) -> list[int]:
    """Of what each cut finds, some are kept, and some of the others may come back as means."""
    left, cuts, at = n, [], method.prune_layers(layers)
    for stage, layer in enumerate(at):
        kept = method.stays(left, (n,), stage, len(at))
        if kept < left:
            gone, left = left - kept, kept
            if method.recycle:
                means = min(int(method.tau * gone) + 1, gone)
                left += min(int(method.theta * means) + 1, means)
        cuts.append((layer, left))
    return _steps(n, cuts, layers)


def _all(method: Any, n: int, layers: int, tiles: int) -> list[int]:
    return [n] * layers


def _per_tile(method: Any, n: int, layers: int, tiles: int) -> list[int]:
    """Tiles enter each by itself; a cut between layers is one for all of them."""
    own = [method.of_thumbnail if tiles > 1 else method.inner, *[method.inner] * (tiles - 1)]
    entering = sum(tokens_per_layer(each, n // tiles, layers, 1)[0] for each in own)
    whole = tokens_per_layer(method.inner, n, layers, tiles)
    return [entering if seen == whole[0] else min(entering, seen) for seen in whole]


def _per_frame(method: Any, n: int, layers: int, tiles: int) -> list[int]:
    """An image is one frame."""
    return tokens_per_layer(method.inner, n, layers, tiles)


COUNTS: dict[str, Callable[[Any, int, int, int], list[int]]] = {
    **dict.fromkeys(
        ("cdpruner", "divprune", "holov", "mmtok", "prumerge_plus", "random", "scope", "todre",
         "visionzip", "vispruner"),
        _flat,
    ),
    "catp": _catp,
    "dart": _one_cut,
    "downsample": by_cell,
    "fastv": _one_cut,
    "flowcut": by_tile,
    "full": _all,
    "per_frame": _per_frame,
    "per_tile": _per_tile,
    "pool": by_cell,
    "prumerge": _flat,
    "pyramiddrop": _pyramid,
    "sparsevlm": _sparsevlm,
    "tome": by_tile,
    "transprune": _transprune,
    "v2drop": _v2drop,
    "vscan": _vscan,
}  # fmt: skip


_CAPS = (_flat, _one_cut, _pyramid, _vscan, _catp, _all)
"""Those that leave so many of an image's tokens, whatever others have left of them."""


def _composed(method: Compose, n: int, layers: int, tiles: int) -> list[int]:
    """Budgets count the image as it was, so in every layer the smallest of them is met."""
    for part in method.parts:
        relative = getattr(part, "schedule", None) == "after_selection"
        caps = COUNTS.get(part.name) in _CAPS or (part.name == "transprune" and not relative)
        if not caps:
            raise ArgumentError(
                "method",
                f"the tokens of {method} cannot be told by arithmetic, as what {part.name} leaves "
                "follows what it finds",
            )
    rows = [tokens_per_layer(part, n, layers, tiles) for part in method.parts]
    return [min(seen) for seen in zip(*rows, strict=True)]


def scope_of(method: Method, tiles: int) -> Literal["image", "tile"]:
    """Whether all tiles of an image share one budget, or each tile has its own."""
    if isinstance(method, Compose):  # of parts that share theirs; see `_composed`
        return "image"
    while isinstance(method, PerFrame):
        method = method.inner
    alone = isinstance(method, PerTile) or COUNTS[method.name] in (by_tile, by_cell)
    return "tile" if alone and tiles > 1 else "image"


def tokens_per_layer(method: Method, n: int, layers: int, tiles: int) -> list[int]:
    if isinstance(method, Compose):
        return _composed(method, n, layers, tiles)
    if method.name not in COUNTS:
        raise ArgumentError(
            "method",
            f"the tokens of {method} cannot be told by arithmetic; those of "
            f"{', '.join(sorted(COUNTS))} can, each by itself",
        )
    if method.name.startswith("prumerge") and method.keep is None:  # type: ignore[attr-defined]
        raise ArgumentError(
            "method", f"the tokens that {method} keeps follow the image; give it a keep"
        )
    return COUNTS[method.name](method, n, layers, tiles)


@dataclass(frozen=True)
class Schedule:
    """What a method leaves to the language model of a target, for one image, in every convention.

    Attributes:
        method: name and settings.
        target: the model.
        scope: "tile" if each tile of the image has a budget of its own, "image" if all share one.
        image: vision tokens of the image before compression. Newlines are none; those that a model
            puts between rows are counted if they are given as text.
        text: tokens of text that every layer sees as well.
        per_layer: vision tokens that each decoder layer processes.
        kv_bytes: of keys and values after the prefill, text included, 2 bytes a value.
        flops: of the language model's prefill, text and output head included, 2 per multiply-add.
        visual_flops: the literature's count, of the vision tokens alone, 1 per multiply-add.
        at_most: whether the image decides, and these are the largest numbers it can come to.
    """

    method: str
    target: str
    scope: Literal["image", "tile"]
    image: int
    text: int
    per_layer: tuple[int, ...]
    kv_bytes: float
    flops: float
    visual_flops: float
    at_most: bool = False

    @property
    def entering(self) -> int:
        """Vision tokens that enter the language model: the convention "exact"."""
        return self.per_layer[0]

    @property
    def average(self) -> float:
        """Vision tokens of a layer, mean over the layers: the convention "average"."""
        return equivalent_tokens(self.per_layer)

    @property
    def kept(self) -> int:
        """Vision tokens of the last layer: the convention "kept" where there is one cut."""
        return self.per_layer[-1]

    def to_dict(self) -> dict[str, Any]:
        """All of it, ready for JSON."""
        counts = {"entering": self.entering, "average": self.average, "kept": self.kept}
        return {**asdict(self), "per_layer": list(self.per_layer), **counts}

    def __str__(self) -> str:
        steps = [f"{self.entering} from layer 0"]
        for layer, (before, now) in enumerate(pairwise(self.per_layer), start=1):
            if now != before:
                steps.append(f"{now} from layer {layer}")
        most = "at most " if self.at_most else ""
        tiles = target_of(self.target).tiles_of(self.image)
        scope = "each its own budget" if self.scope == "tile" else "one budget for all"
        tiled = f" in {tiles} tiles, {scope}," if tiles > 1 else ""
        return (
            f"{self.method} on {self.target}, {self.image} vision tokens{tiled} and {self.text} "
            f"of text\n"
            f"  {most}{', '.join(steps)}; {self.average:.1f} on average over the layers\n"
            f"  KV cache {self.kv_bytes / 2**20:.1f} MiB, prefill {self.flops / 1e12:.2f} TFLOPs "
            f"(vision tokens alone, literature's count: {self.visual_flops / 1e12:.2f} T)"
        )


def describe(method: Method, target: str, *, text: int = 0, image: int | None = None) -> Schedule:
    """What `method` does to the tokens of one image on `target`, by arithmetic; nothing is run.

    Args:
        method: a finished method with a fixed budget.
        target: a name of `TARGETS`.
        text: tokens of text beside the image.
        image: vision tokens before compression, by default those of the target. A tiled image has
            a whole number of tiles; pooling counts every tile or image as square where it can.

    Raises:
        ValueError: unknown target, a number of tokens that it cannot have, or a method whose
            tokens follow the image or that is not known here.
    """
    model = target_of(target)
    n = model.tokens if image is None else image
    good = isinstance(n, int) and not isinstance(n, bool) and n >= 1
    if good and model.tile is not None:
        good = n % model.tile == 0 and n <= model.tokens
    if not good:
        accepted = f"1 to {model.tiles} times {model.tile}" if model.tile else "1 or more"
        raise ArgumentError(
            "image", f"expected {accepted} vision tokens on {model.name}, got {image!r}"
        )
    if isinstance(text, bool) or not isinstance(text, int) or text < 0:
        raise ArgumentError("text", f"expected a whole number of at least 0, got {text!r}")
    tiles = model.tiles_of(n)
    seen = tokens_per_layer(method, n, model.layers, tiles)
    lengths = [text + count for count in seen]
    side = math.isqrt(n)
    plain = method
    while isinstance(plain, (PerTile, PerFrame)):
        plain = plain.inner
    cells = not isinstance(plain, Compose) and plain.name in ("pool", "downsample")
    unsure = cells and not model.tile and side * side != n
    unsure = unsure or any(part.name == "todre" and "layers" in part.stages for part in plain.parts)
    return Schedule(
        method=str(method),
        target=model.name,
        scope=scope_of(method, tiles),
        image=n,
        text=text,
        per_layer=tuple(seen),
        kv_bytes=kv_bytes(model.decoder, lengths, bytes_per_value=2),
        flops=prefill_flops(model.decoder, lengths).lm,
        visual_flops=visual_flops(
            seen, model.decoder["hidden_size"], model.decoder["intermediate_size"]
        ),
        at_most=unsure,
    )
