# SPDX-License-Identifier: Apache-2.0
"""CATP: pruning for in-context prompts."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from vtc.core import LayerState, Method, Positions, Rows, Selection, VisionTokens
from vtc.core.errors import ArgumentError
from vtc.core.settings import (
    budget,
    check_choice,
    check_flag,
    check_keep,
    check_layer,
    check_number,
    check_positions,
)
from vtc.ops import coverage_greedy, top_k, unit_rows

_USUAL_DEPTH: int = 32
"""Layers of the deepest published model with K = 6."""


@dataclass(frozen=True)
class CATP(Method):
    """Contextually adaptive pruning for in-context prompts: examples, then the query.

    Half of the dropped tokens go before the language model, half in two of its layers. Let R be the
    fraction dropped; similarities are rescaled to (1 + cosine) / 2:

    Stage 1, per image: keep floor(n (1 - R / 2)) tokens by greedy facility location plus
    `align` times each token's similarity to the mean embedding of the image's text: everything
    up to the next image, including what a chat template adds, which the paper strips and a method
    cannot detect.

    Stage 2, after decoder layer K (1-based): the tokens of all example images compete for the sum
    of their final budgets by max(0, A_K - A_{K-1}) + `guide` * cos(h, v_q). A is the attention of
    the prompt's last token, v_q the mean hidden state of the query: its image and all text after
    it. After layer K + 1, the query's tokens are ranked by the cosine to the mean hidden state of
    the remaining examples, by `context_pool`. `keep` sets the final budget of each image.

    The attention term is near 0.001 and the cosine near 0.5, so the published ranking is nearly
    by cosine alone; `normalize` divides the term by its maximum. A prompt with one image has
    no examples: its tokens are ranked by the cosine to v_q, which the paper leaves open. The paper
    rescales similarity, without which the sum is not monotone.

    Args:
        keep: 1 - R, as a fraction of an image's tokens or a whole number of tokens per image;
            published are 192, 128 and 64 of 576.
        layer: K, at least 2; by default 6 of 28 and of 32, 10 of 40, scaled to other depths.
        align: weight of the text in stage 1 (lambda 1), at least 0.
        guide: weight of the query in stage 2 (lambda 2), at least 0.
        context_pool: hidden states averaged for the examples: "image", or "image+text".
        normalize: whether to scale the attention term to a maximum of 1.
        positions: of stage 1, "contiguous" or "original"; stage 2 keeps them.

    Raises:
        ArgumentError, ArgumentTypeError: a setting that is not accepted.
    """

    name = "catp"
    title = "CATP: contextually adaptive token pruning"
    paper = "arXiv:2508.07871"
    year = 2026
    needs = frozenset({"segment"})

    keep: float | int = 0.222
    layer: int | None = None
    align: float = 0.7
    guide: float = 0.6
    context_pool: Literal["image", "image+text"] = "image+text"
    normalize: bool = False
    positions: Positions = "contiguous"

    def __post_init__(self) -> None:
        check_keep(self.keep)
        check_layer("layer", self.layer, lowest=2)
        check_number("align", self.align, "[0, inf)")
        check_number("guide", self.guide, "[0, inf)")
        check_flag("normalize", self.normalize)
        check_choice("context_pool", self.context_pool, ("image", "image+text"))
        check_positions(self.positions)

    @property
    def prune_positions(self) -> Positions:
        """ "original": stage 2 keeps positions."""
        return "original"

    # ---- stage 1 ------------------------------------------------------------------------------
    def halfway(self, n: int) -> int:
        """Tokens that stage 1 leaves of an image of n: floor(n (1 - R / 2)), from whole budgets."""
        return (n + budget(self.keep, n)) // 2

    def entering(self, n: int, tiles: int = 1) -> int:
        """What stage 1 leaves."""
        return self.halfway(n)

    def select(self, tokens: VisionTokens) -> Selection:
        """Ascending indices, (k,).

        Raises:
            ValueError: `tokens` comes without `segment`.
        """
        n = len(tokens)
        k = min(self.halfway(tokens.original), n)
        if k >= n:
            return Selection(torch.arange(n, device=tokens.features.device))
        if tokens.segment is None:
            raise ValueError("segment: CATP reads an image's text, got tokens without")
        rows = unit_rows(tokens.features)
        similarity = (1 + rows @ rows.T) / 2
        bonus = None
        if tokens.segment.shape[0]:
            meant = unit_rows(tokens.segment.float().mean(0, keepdim=True).to(rows.dtype))[0]
            bonus = self.align * (1 + rows @ meant) / 2
        return Selection(coverage_greedy(similarity, k, bonus=bonus).sort().values)

    # ---- stage 2 ------------------------------------------------------------------------------
    def prune_layers(self, num_layers: int) -> tuple[int, ...]:
        """(K, K + 1).

        Raises:
            ArgumentError: the model is too shallow.
        """
        k = self.layer
        if k is None:
            share = 0.1875 if num_layers <= _USUAL_DEPTH else 0.25
            k = max(2, math.ceil(share * num_layers))
        if k + 1 >= num_layers:
            raise ArgumentError(
                "layer",
                f"expected 2 to {num_layers - 2} in a model of {num_layers} decoder layers, "
                f"got {k}",
            )
        return (k, k + 1)

    def leaves(self, sizes: tuple[int, ...], held: int, cut: int, cuts: int) -> int:
        """The first cut leaves `keep` of each example, the second also of the query."""
        budgets = [budget(self.keep, n) for n in sizes]
        if cut == 0:
            return held if len(sizes) == 1 else sum(budgets[:-1]) + self.halfway(sizes[-1])
        return sum(budgets)

    def taps(self, num_layers: int) -> dict[int, Rows]:
        """The prompt's last row of layers K - 1 and K (1-based)."""
        k, _ = self.prune_layers(num_layers)
        return {k - 2: "last", k - 1: "last"}

    def prune(self, state: LayerState) -> Selection | None:
        """Ascending indices among the sample's vision tokens, or `None` if all fit the budget."""
        first, _ = self.prune_layers(state.num_layers)
        query_image = len(state.original) - 1
        budgets = [budget(self.keep, n) for n in state.original]
        owner = state.image[state.vision]
        hidden = state.hidden.float()
        # The query begins with its image and ends with the prompt.
        own = (state.image == query_image).nonzero()
        start = int(own[0]) if len(own) else int(state.vision[-1]) + 1
        place = torch.arange(len(state.image), device=owner.device)
        of_query = (place >= start) & ((state.image == query_image) | state.text)
        if state.layer == first:
            competing, k = owner != query_image, sum(budgets[:-1])
            target = hidden[of_query].mean(0)
        else:
            competing, k = owner == query_image, budgets[-1]
            pooled = state.image >= 0
            if self.context_pool == "image+text":
                pooled = pooled | state.text
            context = (place < start) & pooled
            target = hidden[context if bool(context.any()) else of_query].mean(0)
        if k >= int(competing.sum()):
            return None
        score = unit_rows(state.of_vision(hidden)) @ unit_rows(target[None])[0]
        if state.layer == first:
            score = self._rise(state, first) + self.guide * score
        ranked = top_k(score.masked_fill(~competing, -torch.inf), k)
        stays = ~competing
        stays[ranked] = True
        return Selection(stays.nonzero().squeeze(1))

    def _rise(self, state: LayerState, k: int) -> Tensor:
        """(n,) increase of the last token's attention from layer K - 1 to layer K, at least 0."""
        rows = (state.attention[layer][-1, state.vision] for layer in (k - 1, k - 2))
        now, before = rows
        rise = (now - before).clamp_min(0)
        return rise / rise.max().clamp_min(1e-12) if self.normalize else rise
