# SPDX-License-Identifier: Apache-2.0
"""The tokens that a method leaves to every decoder layer of a target, and their cost."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any, Literal

from vtc.core.errors import ArgumentError
from vtc.core.settings import check_whole
from vtc.cost import equivalent_tokens, kv_bytes, prefill_flops, token_schedule, visual_flops
from vtc.methods import Method
from vtc.presets.table import target_of


def scope_of(method: Method, tiles: int) -> Literal["image", "tile"]:
    """ "image" if all tiles of an image share one budget, "tile" if each has its own."""
    return "tile" if method.by_tile and tiles > 1 else "image"


@dataclass(frozen=True)
class Schedule:
    """What a method leaves to a target's language model, for one image, in every convention.

    Attributes:
        method: name and settings.
        target: the model.
        scope: "tile" if each tile of the image has its own budget, "image" if all share one.
        image: vision tokens of the image before compression, without `image_newline` tokens; to
            count these, add them to the text.
        text: text tokens that every layer also processes.
        per_layer: vision tokens that each decoder layer processes.
        kv_bytes: bytes of keys and values after the prefill, text included, 2 bytes per value.
        flops: FLOPs of the language model's prefill, text and output head included, 2 per
            multiply-add.
        visual_flops: the literature's count, of the vision tokens only, 1 per multiply-add.
        at_most: whether the numbers depend on the image and these are upper bounds.
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
        """Vision tokens per layer, mean over the layers: the convention "average"."""
        return equivalent_tokens(self.per_layer)

    @property
    def kept(self) -> int:
        """Vision tokens of the last layer: the convention "kept" with a single cut."""
        return self.per_layer[-1]

    def to_dict(self) -> dict[str, Any]:
        """All attributes and conventions, ready for JSON."""
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
    """What `method` leaves of one image on `target`, by arithmetic; no model runs.

    Args:
        method: a method with a fixed budget.
        target: a name in `TARGETS`.
        text: text tokens next to the image.
        image: vision tokens before compression, by default those of the target. A tiled image has
            a whole number of tiles; pooling treats every tile or image as square if possible.

    Returns:
        Tokens per layer and their cost.

    Raises:
        ArgumentError: unknown target, a number of tokens that it cannot have, or a method whose
            number of tokens depends on the image.
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
    check_whole("text", text)
    tiles = model.tiles_of(n)
    seen = token_schedule(method, n, model.layers, tiles)
    lengths = [text + count for count in seen]
    return Schedule(
        method=str(method),
        target=model.name,
        scope=scope_of(method, tiles),
        image=n,
        text=text,
        per_layer=seen,
        kv_bytes=kv_bytes(model.decoder, lengths, bytes_per_value=2),
        flops=prefill_flops(model.decoder, lengths).lm,
        visual_flops=visual_flops(
            seen, model.decoder["hidden_size"], model.decoder["intermediate_size"]
        ),
        at_most=method.is_bound(n, tiles),
    )
