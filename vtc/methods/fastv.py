# SPDX-License-Identifier: Apache-2.0
"""FastV: after a few layers, drop tokens with little attention from the prompt's last token."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from vtc.core import LayerState, Positions, Rows, ScorerMethod, check_whole, scale_layers


@dataclass(frozen=True)
class FastV(ScorerMethod):
    """Keep the vision tokens with the most attention from the prompt's last token.

    Before 0-based decoder layer K, vision tokens are ranked by the attention they get from the
    last prompt token in layer K - 1: softmax over all keys, mean over heads, not renormalised
    over the vision tokens. Ties go to the earlier token. The first K layers see every token.

    The paper's text describes the attention a token receives on average from all others; its code
    reads only the last row, and so does this. As in the code, all vision tokens of a sample compete
    for the sum of its images' budgets; an image may lose more than another. Budgets refer to an
    image's original tokens.

    The paper's main setting drops half of the tokens at K = 2, the default here; its ablations
    drop 25, 50, 75 and 87.5 %, and the authors' Hugging Face demo 75 % at K = 3. `keep` is the
    fraction kept, one minus their ratio R, and counts tokens after the cut; the mean over
    all layers is higher.

    Args:
        keep: fraction of an image's tokens, or a whole number of tokens per image.
        layer: K, from 1 to the number of decoder layers minus one.
        positions: "original" (as in the code) or "contiguous".

    Raises:
        ArgumentError, ArgumentTypeError: a setting that is not accepted.
    """

    name = "fastv"
    title = "FastV: an image is worth 1/2 tokens after layer 2"
    paper = "arXiv:2403.06764"
    year = 2024

    keep: float | int = 0.5
    layer: int = 2
    positions: Positions = "original"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_whole("layer", self.layer, lowest=1)

    def prune_layers(self, num_layers: int) -> tuple[int, ...]:
        """(K,).

        Raises:
            ArgumentError: the model has no layer K.
        """
        return scale_layers(self.layer, (), num_layers)

    def taps(self, num_layers: int) -> dict[int, Rows]:
        """The prompt's last row of layer K - 1."""
        return {layer - 1: "last" for layer in self.prune_layers(num_layers)}

    def score_layer(self, state: LayerState) -> Tensor:
        """(n,) the attention of the prompt's last token."""
        return state.attention[self.layer - 1][-1, state.vision]
