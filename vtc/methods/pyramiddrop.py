# SPDX-License-Identifier: Apache-2.0
"""PyramidDrop: a shrinking fraction of the vision tokens in each stage of the decoder."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from vtc.core import LayerState, Positions, Rows, ScorerMethod, check_layers, scale_layers


@dataclass(frozen=True)
class PyramidDrop(ScorerMethod):
    """Before three decoder layers, keep the tokens with the most attention from the prompt's last
    token.

    The attention is a look-ahead at the layer about to run (its norm, queries and keys on the
    current hidden states), softmax over all keys, mean over heads. Stage s leaves
    int(N * keep ** s) of an image's N original tokens. All vision tokens of a sample compete for
    the sum of its images' budgets. Ties go to the earlier token.

    Published for 32 layers: cuts before layers 8, 16 and 24, keep 0.5. For other budgets the
    authors keep the powers and move the layers: before 2, 8 and 16, keep 0.5596, 0.4197 and 0.1916
    leave 192, 128 and 64 of 576 tokens on average over the layers.

    Args:
        keep: fraction left by the first stage, its powers by the later ones; as a whole number, the
            tokens per image that the last stage leaves.
        layers: ascending 0-based layers before which it cuts; by default at a quarter, a half and
            three quarters of the depth.
        positions: "contiguous" (as in the code) or "original".

    Raises:
        ArgumentError, ArgumentTypeError: a setting that is not accepted.
    """

    name = "pyramiddrop"
    title = "PyramidDrop: progressive pruning by stages"
    paper = "arXiv:2410.17247"
    year = 2024

    keep: float | int = 0.5
    layers: tuple[int, ...] | None = None
    positions: Positions = "contiguous"

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "layers", check_layers("layers", self.layers, lowest=1))

    def prune_layers(self, num_layers: int) -> tuple[int, ...]:
        """The layers before which it cuts.

        Raises:
            ArgumentError: layers that do not ascend, or that the model does not have.
        """
        return scale_layers(self.layers, (0.25, 0.5, 0.75), num_layers)

    def peeks(self, num_layers: int) -> dict[int, Rows]:
        """The prompt's last row in every layer before which it cuts."""
        return dict.fromkeys(self.prune_layers(num_layers), "last")

    def left(self, n: int, stage: int, stages: int) -> int:
        """Tokens of an image of n that stage 1, 2, ... of `stages` leaves; at least one."""
        share = self.keep
        if isinstance(share, int):
            share = min(share / n, 1.0) ** (1 / stages)
            return max(1, round(n * share**stage))
        return max(1, int(n * share**stage))

    def leaves(self, sizes: tuple[int, ...], held: int, cut: int, cuts: int) -> int:
        """The sum of what the stage leaves of each image."""
        return sum(self.left(n, cut + 1, cuts) for n in sizes)

    def score_layer(self, state: LayerState) -> Tensor:
        """(n,) look-ahead attention from the prompt's last token.

        Raises:
            ValueError: `state` comes without `ahead`.
        """
        if state.ahead is None:
            raise ValueError("ahead: PyramidDrop needs it, got a state without")
        return state.ahead[-1, state.vision]
