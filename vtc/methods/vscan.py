# SPDX-License-Identifier: Apache-2.0
"""VScan: local and global scans of the vision tower, then a cut in the middle of the decoder."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from vtc.core import LayerState, Positions, Rows, ScorerMethod, Selection, VisionTokens
from vtc.core.settings import budget, check_layer, check_number, check_whole, scale_layers
from vtc.ops import merge_into_nearest, top_k


@dataclass(frozen=True)
class VScan(ScorerMethod):
    """Global and local scans before the language model, the prompt's attention inside it.

    Stage 1 keeps T tokens. Local: int(T / 2) by the attention of [CLS] in an early tower layer, the
    same number from each of `windows` x `windows` windows of the grid; the remainder, and what
    small windows cannot supply, goes to the best tokens anywhere (the code keeps fewer
    than T then). Global: the rest by the attention in the layer whose output is used. Dropped
    tokens are merged into the kept one with the most similar embedding, by a plain mean.

    Stage 2, before the layer at half of the depth: of the remaining tokens, those with the most
    look-ahead attention from the prompt's last token in the layer about to run.

    Published for LLaVA-1.5: 96 tokens, of which 32 in the second half, for 64 on average; the early
    layer is 5 of 24, the cut before layer 16 of 32. Towers without [CLS] use the attention a patch
    receives.

    Args:
        keep: T, as a fraction of an image's tokens or a whole number of tokens per image.
        then: fraction of T left by stage 2, in (0, 1]; 1 switches it off.
        windows: windows along each side of the grid, at least 1.
        layer: 0-based layer before which stage 2 cuts; by default at half of the depth.
        positions: "contiguous" (as in LLaVA) or "original", for both stages.

    Raises:
        ArgumentError, ArgumentTypeError: a setting that is not accepted.
    """

    name = "vscan"
    title = "VScan: two-stage visual token reduction"
    paper = "arXiv:2505.22654"
    year = 2025
    needs = frozenset({"cls_attention", "low_attention"})
    reads_places = True
    vision_layer = -2
    low_layer = 0.2084

    keep: float | int = 1 / 6
    then: float = 1 / 3
    windows: int = 4
    layer: int | None = None
    positions: Positions = "contiguous"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number("then", self.then, "(0, 1]")
        check_whole("windows", self.windows, lowest=1)
        check_layer("layer", self.layer, lowest=1)

    @property
    def stages(self) -> tuple[str, ...]:
        """("sequence", "layers"), or only the former if stage 2 is off."""
        return ("sequence", "layers") if self._cuts else ("sequence",)

    @property
    def _cuts(self) -> bool:
        # keep=1.0 promises the plain model bit for bit.
        return self.then < 1 and not (isinstance(self.keep, float) and self.keep == 1.0)

    # ---- stage 1 ------------------------------------------------------------------------------
    def select(self, tokens: VisionTokens) -> Selection:
        """(k,) ascending indices and (k, d) merged contents.

        Raises:
            ValueError: `tokens` comes without `cls_attention`, `low_attention` or places.
        """
        n = len(tokens)
        k = tokens.budget(self.keep)
        if k >= n:
            return Selection(torch.arange(n, device=tokens.features.device))
        if tokens.cls_attention is None or tokens.low_attention is None:
            raise ValueError("cls_attention, low_attention: needed, got tokens without")
        grid = tokens.places(self.name, "divides the grid of tokens into windows")
        stays = self._local(tokens.low_attention.float(), grid, k // 2)
        rest = tokens.cls_attention.float().masked_fill(stays, -torch.inf)
        stays[top_k(rest, k - int(stays.sum()))] = True
        kept = stays.nonzero().squeeze(1)
        return Selection(kept, merge_into_nearest(tokens.features, tokens.features, kept))

    def _local(self, attention: Tensor, grid: Tensor, wanted: int) -> Tensor:
        """(n,) bool: `wanted` tokens, spread evenly over the windows."""
        stays = torch.zeros(len(attention), dtype=torch.bool, device=attention.device)
        place = grid - grid.amin(0)
        size = place.amax(0) + 1
        window = place * self.windows // size.clamp_min(self.windows)
        number = (place[:, 0] * self.windows + window[:, 1]) * self.windows + window[:, 2]
        every, number = number.unique(return_inverse=True)
        share = wanted // len(every)
        ranked = top_k(attention, len(attention))
        ranked = ranked[number[ranked].argsort(stable=True)]
        size = torch.bincount(number)
        rank = (
            torch.arange(len(ranked), device=grid.device) - (size.cumsum(0) - size)[number[ranked]]
        )
        stays[ranked[rank < share]] = True
        left = attention.masked_fill(stays, -torch.inf)
        stays[top_k(left, wanted - int(stays.sum()))] = True
        return stays

    # ---- stage 2 ------------------------------------------------------------------------------
    def prune_layers(self, num_layers: int) -> tuple[int, ...]:
        """The layer before which stage 2 cuts, if it is on.

        Raises:
            ArgumentError: the model has no such layer.
        """
        if not self._cuts:
            return ()
        return scale_layers(self.layer, (0.5,), num_layers)

    def peeks(self, num_layers: int) -> dict[int, Rows]:
        """The prompt's last row."""
        return dict.fromkeys(self.prune_layers(num_layers), "last")

    def leaves(self, sizes: tuple[int, ...], held: int, cut: int, cuts: int) -> int:
        """`then` of what stage 1 left of each image."""
        return sum(max(1, round(self.then * budget(self.keep, n))) for n in sizes)

    def score_layer(self, state: LayerState) -> Tensor:
        """(n,) look-ahead attention from the prompt's last token.

        Raises:
            ValueError: `state` comes without `ahead`.
        """
        if state.ahead is None:
            raise ValueError("ahead: VScan needs it, got a state without")
        return state.ahead[-1, state.vision]
