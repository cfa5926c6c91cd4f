# SPDX-License-Identifier: Apache-2.0
"""V2Drop: vision tokens that a decoder layer hardly changes are dropped."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from vtc.core import (
    LayerState,
    Positions,
    Record,
    ScorerMethod,
    check_choice,
    check_layer,
    scale_layers,
)

_LAYERS = (0.09375, 0.53125, 0.6875)
"""Layers 3, 17 and 22 of 32, as shares of the depth."""


@dataclass(frozen=True)
class V2Drop(ScorerMethod):
    """Before three decoder layers, keep the tokens that the layer before changed most.

    The change is the L2 distance between the hidden states that enter layer l and layer l - 1,
    without a norm. Of an image's n tokens the first cut leaves int(n * keep), and later ones shares
    of what they find, rounded down; at least one, or none where the share is 0. The last share is
    0 in all published settings; the code leaves one token even there, which `one_stays` restores.
    Tokens of several images compete with one another. Ties go to the earlier token.

    Published for LLaVA-1.5-7B, before layers 3, 17 and 22 of 32, shares (0.5, 0.3, 0), (0.28, 0.25,
    0) and (0.05, 0.05, 0) for 192, 128 and 64 tokens on average over the layers. The repository's
    own literal is (0.5, 0.5, 0), which is none of these.

    Args:
        keep: share of an image's tokens left by the first cut, a fraction in (0, 1]; 1.0 drops
            nothing anywhere.
        then: shares left by the later cuts, of what they find, each in [0, 1].
        layers: 0-based layers before which it cuts, ascending; by default 3, 17 and 22, scaled from
            32 layers to the depth.
        one_stays: whether a share of 0 leaves one token.
        positions: "original" (as in the code) or "contiguous".
    """

    name = "v2drop"
    title = "V2Drop: dropping by variation between layers"
    paper = "arXiv:2509.01552"
    year = 2025

    keep: float = 0.28
    then: tuple[float, ...] = (0.25, 0.0)
    layers: tuple[int, ...] | None = None
    one_stays: bool = False
    positions: Positions = "original"

    def __post_init__(self) -> None:
        object.__setattr__(self, "then", tuple(self.then))
        for name, share in (("keep", self.keep), *(("then", share) for share in self.then)):
            # A whole number would be one of tokens: 1 is not all of them.
            if not isinstance(share, float) and (name, share) != ("then", 0):
                raise TypeError(f"{name}: a share such as 0.25; got {share!r}")
            if not (0 < share <= 1 or (name, share) == ("then", 0)):
                accepted = "(0, 1]" if name == "keep" else "[0, 1]"
                raise ValueError(f"{name}: a share must lie in {accepted}, got {share!r}")
        if self.layers is not None:
            object.__setattr__(self, "layers", tuple(self.layers))
            if len(self.layers) != 1 + len(self.then):
                raise ValueError(
                    f"layers: expected {1 + len(self.then)}, one for keep and each share of then, "
                    f"got {len(self.layers)}"
                )
            for layer in self.layers:
                check_layer("layers", layer, lowest=1)
        check_choice("positions", self.positions, ("original", "contiguous"))

    def prune_layers(self, num_layers: int) -> tuple[int, ...]:
        """The layers before which it cuts.

        Raises:
            ValueError: layers that do not ascend, or that the model has not.
        """
        return scale_layers(self.layers, _LAYERS[: 1 + len(self.then)], num_layers)

    def records(self, num_layers: int) -> dict[int, frozenset[Record]]:
        """What enters the layers before its cuts."""
        return {layer - 1: frozenset({"input"}) for layer in self.prune_layers(num_layers)}

    def leaves(self, sizes: tuple[int, ...], held: int, cut: int, cuts: int) -> int:
        """The first cut counts the images as they were, later ones what they find."""
        share = (self.keep, *self.then)[cut]
        least = 0 if share == 0 and not self.one_stays else 1
        return max(least, int((held if cut else sum(sizes)) * share))

    @property
    def counts_found(self) -> bool:
        """As its later cuts do."""
        return True

    def score_layer(self, state: LayerState) -> Tensor:
        """(n,) how far the layer before moved each token."""
        before = state.of_vision(state.recorded[state.layer - 1, "input"]).float()
        return torch.linalg.vector_norm(state.of_vision(state.hidden).float() - before, dim=1)
