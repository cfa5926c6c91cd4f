# SPDX-License-Identifier: Apache-2.0
"""The cost of a method's selection, counted on random tensors without a model."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from vtc.core import SIGNALS, LayerState, Method, VisionTokens, make
from vtc.core.settings import check_whole
from vtc.core.signals import Field
from vtc.ops.greedy import PLAINLY

_PRODUCTS = {
    # PyTorch counts only matrix products; greedy selections multiply one vector at a time.
    torch.ops.aten.mv: lambda matrix, vector, **_: 2 * matrix[0] * matrix[1],
    torch.ops.aten.addmv: lambda bias, matrix, vector, **_: 2 * matrix[0] * matrix[1],
    torch.ops.aten.dot: lambda one, other, **_: 2 * one[0],
}


def selector_flops(
    method: str | Method | Mapping[str, Any],
    tokens: int,
    d: int,
    *,
    text: int = 32,
    layers: int = 32,
    vision_d: int | None = None,
    cls: bool = True,
    heads: int = 16,
    q: int | None = None,
    seed: int = 0,
    **settings: Any,
) -> float:
    """FLOPs of `method`'s selection for one image, 2 per multiply-add; `nan` if unknown.

    This counts the minimum that the algorithm needs, on any device: a greedy selection compares
    each chosen token with all (ToDRE: 2 n k d), DivPrune's first token all pairs (2 n n d). For
    speed `vtc.ops` may compute all pairs if many tokens are kept, or on a CPU similarities of
    likely next tokens, some in vain, or rule out pairs by bounds; this does not count.

    Before the language model, PyTorch's counter counts a `select` on random tensors of these
    sizes, and between layers a `prune`. Attention rows that either reads are added by
    arithmetic: 2 r s w for r rows over s tokens in a layer of width w, which the engine computes
    in addition to the layer's own attention. Only products of matrices and vectors count: norms,
    softmax, sorting, gathering, sums of patches and their projection do not.
    If the selection depends on the contents, so may its cost.

    The prompt is the image followed by the text. Counting takes about as long as the selection
    itself, on the CPU in float32.

    Args:
        method: a name (with `settings`), a method, or a dictionary of one.
        tokens: vision tokens of the image, n.
        d: width of the language model.
        text: text tokens after the image.
        layers: decoder layers.
        vision_d: width of the vision tower; by default `d`.
        cls: whether the tower has [CLS], so that one attention row is read; else all patches' rows
            are. Each vision token counts as one patch.
        heads: attention heads of the tower and of the decoder.
        q: width of the decoder's queries, heads times head size; by default `d`.
        seed: seed of the random tensors.
        settings: the method's settings, if `method` is a name.

    Returns:
        `nan` for methods in the vision tower, for those with look-ahead, and
        for those that need inputs unknown here. 0 for methods without products, and for fewer
        pixels.

    Raises:
        ArgumentError: a size is below 1, the method is unknown, or it refuses its settings.
    """
    sizes = {"tokens": tokens, "d": d, "text": text, "layers": layers, "heads": heads}
    sizes |= {"vision_d": d if vision_d is None else vision_d, "q": d if q is None else q}
    for name, value in sizes.items():
        check_whole(name, value, lowest=1)
    made = make(method, **settings)
    if "encoder" in made.stages or any(part.peeks(layers) for part in made.parts):
        return math.nan
    specs = (SIGNALS[need] for part in made.parts for need in part.needs)
    if any("m" in field.shape for spec in specs for field in spec.fields):
        return math.nan  # the number of patches per token is unknown
    generator = torch.Generator().manual_seed(seed)
    token = PLAINLY.set(True)
    try:
        with torch.no_grad():
            return float(_Run(sizes, cls, generator).flops(made))
    finally:
        PLAINLY.reset(token)


class _Run:
    """One image passing through the methods."""

    def __init__(self, sizes: Mapping[str, int], cls: bool, generator: torch.Generator) -> None:
        self.generator = generator
        self.sizes, self.cls = sizes, cls
        self.heard: list[dict[int, Tensor]] = []
        self.memory: list[Tensor | None] = []
        side = math.isqrt(sizes["tokens"] - 1) + 1
        raster = torch.arange(sizes["tokens"])
        self.grid = torch.stack([raster * 0, raster // side, raster % side], dim=1)
        self.every, self.original = self.grid, sizes["tokens"]

    def random(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.generator)

    def rows(self, *shape: int) -> Tensor:
        """Attention probabilities."""
        return self.random(*shape).softmax(-1)

    def flops(self, method: Method) -> int:
        total = sum(self._select(part) for part in method.parts if "sequence" in part.stages)
        acting = [part for part in method.parts if "layers" in part.stages]
        layers = self.sizes["layers"]
        self.heard, self.memory = [{} for _ in acting], [None for _ in acting]
        for layer in range(layers):
            for i, part in enumerate(acting):
                if layer in part.prune_layers(layers):
                    total += self._prune(part, layer, i)
            for i, part in enumerate(acting):
                rows = part.taps(layers).get(layer)
                if rows is not None:
                    self.heard[i][layer], cost = self._tap(part, rows)
                    total += cost
        return total

    def _counted(self, run: Any, argument: Any) -> tuple[Any, int]:
        with FlopCounterMode(display=False, custom_mapping=_PRODUCTS) as counter:
            found = run(argument)
        return found, counter.get_total_flops()

    # ---- before the language model ------------------------------------------------------------
    def _select(self, part: Method) -> int:
        n, d, wide = len(self.grid), self.sizes["d"], self.sizes["vision_d"]
        specs = [SIGNALS[need] for need in sorted(part.needs)]
        signals = {
            field.name: self._signal(field, spec.rows)
            for spec in specs
            for field in spec.fields
            if field.name != "heads"
        }
        shown = VisionTokens(
            features=self.random(n, d),
            grid=self.grid,
            heads=math.gcd(self.sizes["heads"], wide),
            every_grid=self.every,
            **signals,
        )
        found, flops = self._counted(part.select, shown)
        taps = len({spec.layer for spec in specs if spec.rows})
        flops += taps * 2 * (1 if self.cls else self.original) * self.original * wide
        self.grid = self.grid[found.indices]
        return flops

    def _signal(self, field: Field, rows: bool) -> Any:
        """Random values for a field of `VisionTokens`: probabilities if it has one value per token
        from attention `rows`; `None` for what only towers with [CLS] have."""
        sizes = {"n": len(self.grid), "v": self.sizes["vision_d"], "t": self.sizes["text"]}
        sizes["d"] = d = self.sizes["d"]
        if field.name == "project":
            return lambda states: self.random(len(states), d)
        if field.scope == "tile" and not self.cls:
            return None
        shape = [sizes[size] for size in field.shape]
        return self.rows(*shape) if rows and field.shape == ("n",) else self.random(*shape)

    # ---- between layers -----------------------------------------------------------------------
    def _tap(self, part: Method, which: str) -> tuple[Tensor, int]:
        n, text = len(self.grid), self.sizes["text"]
        r = {"last": 1, "text": text, "vision": n, "vision_text": n + text}[which]
        shape = (self.sizes["heads"], r, n + text) if part.by_head else (r, n + text)
        return self.rows(*shape), 2 * r * (n + text) * self.sizes["q"]

    def _prune(self, part: Method, layer: int, i: int) -> int:
        n, text, d = len(self.grid), self.sizes["text"], self.sizes["d"]
        if not n:
            return 0
        seen = n + text
        is_text = torch.arange(seen) >= n
        head = max(1, self.sizes["q"] // self.sizes["heads"])
        recorded = {
            (at, name): torch.ones(seen, head) if name == "rotary" else self.random(seen, d)
            for at, names in part.records(self.sizes["layers"]).items()
            if at <= layer
            for name in sorted(names)
        }
        state = LayerState(
            layer=layer,
            num_layers=self.sizes["layers"],
            hidden=self.random(seen, d),
            image=torch.where(is_text, -1, 0),
            text=is_text,
            grid=torch.cat([self.grid, self.grid.new_full((text, 3), -1)]),
            prompt_length=seen,
            original=(self.original,),
            attention=self.heard[i],
            recorded=recorded,
            memory=self.memory[i],
        )
        found, flops = self._counted(part.prune, state)
        if found is not None:
            self.memory[i] = found.memory
            # Columns of dropped tokens leave all methods' captures, as in the engine.
            stay = torch.cat([found.indices, torch.arange(n, seen)])
            for heard in self.heard:
                heard.update({at: rows[..., stay] for at, rows in heard.items()})
            self.grid = self.grid[found.indices]
        return flops
