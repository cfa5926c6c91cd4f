# SPDX-License-Identifier: Apache-2.0
"""V2Drop: drop vision tokens that a decoder layer hardly changes."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from vtc.core import LayerState, Positions, Record, ScorerMethod
from vtc.core.errors import ArgumentError
from vtc.core.settings import (
    as_tuple,
    check_flag,
    check_fraction,
    check_layers,
    check_positions,
    scale_layers,
)

_LAYERS = (0.09375, 0.53125, 0.6875)
"""Layers 3, 17 and 22 of 32, as fractions of the depth."""


@dataclass(frozen=True)
class V2Drop(ScorerMethod):
    """Before three decoder layers, keep the tokens that the previous layer changed most.

    The change is the L2 distance between the hidden states that enter layer l and layer l - 1,
    without a norm. Of an image's n tokens the first cut leaves int(n * keep), and later cuts
    fractions of what they find, rounded down; at least one, or none if the fraction is 0. The last
    fraction is 0 in all published settings; the code still leaves one token, as `one_stays` does.
    Tokens of several images compete with one another. Ties go to the earlier token.

    Published for LLaVA-1.5-7B, before layers 3, 17 and 22 of 32, fractions (0.5, 0.3, 0), (0.28,
    0.25, 0) and (0.05, 0.05, 0) for 192, 128 and 64 tokens on average over the layers. The
    repository's own literal is (0.5, 0.5, 0), which is none of these.

    Args:
        keep: fraction of an image's tokens left by the first cut, in (0, 1]; 1.0 drops
            nothing in any layer.
        then: fractions that the later cuts leave of what they find, each in [0, 1].
        layers: ascending 0-based layers before which it cuts; by default 3, 17 and 22, scaled from
            32 layers to the depth.
        one_stays: whether a fraction of 0 leaves one token.
        positions: "original" (as in the code) or "contiguous".

    Raises:
        ArgumentError, ArgumentTypeError: a setting that is not accepted.
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
        check_fraction("keep", self.keep)
        object.__setattr__(self, "then", as_tuple("then", self.then))
        for share in self.then:
            if share != 0:
                check_fraction("then", share, "[0, 1]")
        object.__setattr__(self, "layers", check_layers("layers", self.layers, lowest=1))
        if self.layers is not None and len(self.layers) != 1 + len(self.then):
            raise ArgumentError(
                "layers",
                f"expected {1 + len(self.then)}, one for keep and each fraction of then, "
                f"got {len(self.layers)}",
            )
        check_flag("one_stays", self.one_stays)
        check_positions(self.positions)

    def prune_layers(self, num_layers: int) -> tuple[int, ...]:
        """The layers before which it cuts.

        Raises:
            ArgumentError: layers that do not ascend, or that the model does not have.
        """
        return scale_layers(self.layers, _LAYERS[: 1 + len(self.then)], num_layers)

    def records(self, num_layers: int) -> dict[int, frozenset[Record]]:
        """The input of the layer before each cut."""
        return {layer - 1: frozenset({"input"}) for layer in self.prune_layers(num_layers)}

    def leaves(self, sizes: tuple[int, ...], held: int, cut: int, cuts: int) -> int:
        """The first cut counts the original images, later ones what they find."""
        share = (self.keep, *self.then)[cut]
        least = 0 if share == 0 and not self.one_stays else 1
        return max(least, int((held if cut else sum(sizes)) * share))

    @property
    def counts_found(self) -> bool:
        """Always `True`: its later cuts do."""
        return True

    def score_layer(self, state: LayerState) -> Tensor:
        """(n,) how much the previous layer changed each token."""
        before = state.of_vision(state.recorded[state.layer - 1, "input"]).float()
        return torch.linalg.vector_norm(state.of_vision(state.hidden).float() - before, dim=1)
