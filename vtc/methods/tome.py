# SPDX-License-Identifier: Apache-2.0
"""ToMe: merge the most similar patches in every layer of the vision tower."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from vtc.core import EncoderState, Merging, Method, Positions
from vtc.core.errors import ArgumentError
from vtc.core.settings import budget, check_choice, check_flag, check_keep, check_positions
from vtc.ops import bipartite_match


@dataclass(frozen=True)
class ToMe(Method):
    """Merge r pairs of patches between the attention and the MLP of each tower layer.

    Tokens are assigned alternately to two sets A and B, [CLS] first and never merged. Each token
    of A is paired with the token of B with the most similar keys (cosine, mean over heads); the r
    best pairs are merged, their contents averaged by the patches they stand for (section 3 of the
    paper). With `proportional_attention` a token counts in later attention as often as it stands
    for patches, as in the paper's models used without training.

    The paper removes a constant r in every layer. Here r follows from the budget, as the number of
    tokens left matters in VLMs: the excess is divided evenly among the layers left, rounded up, and
    more is merged if halving in the layers left would not suffice. Only layers whose output the
    projector gets take part (23 of CLIP's 24 in LLaVA). Ties go to the earlier token; the official
    code's sort is not stable. At the end tokens are in the order of their first patches.

    Args:
        keep: fraction of an image's patches, or a whole number of tokens per image.
        proportional_attention: whether attention counts sizes.
        order: order of what A keeps in towers without [CLS], "sequence" or "similarity".
        positions: "contiguous" (the language model sees a shorter image) or "original".

    Raises:
        ArgumentError, ArgumentTypeError: a setting that is not accepted.
    """

    name = "tome"
    title = "ToMe: token merging in the vision tower"
    paper = "arXiv:2210.09461"
    year = 2023
    by_tile = True

    keep: float | int = 0.25
    proportional_attention: bool = True
    order: Literal["sequence", "similarity"] = "sequence"
    positions: Positions = "contiguous"

    def __post_init__(self) -> None:
        check_keep(self.keep)
        check_flag("proportional_attention", self.proportional_attention)
        check_choice("order", self.order, ("sequence", "similarity"))
        check_positions(self.positions)

    @property
    def weighs_sizes(self) -> bool:  # type: ignore[override]
        """`proportional_attention`."""
        return self.proportional_attention

    def merge(self, state: EncoderState) -> Merging | None:
        """Targets of the n tokens: first what A keeps, then B, in sequence order.

        Raises:
            ArgumentError: halving in every layer would not suffice.
        """
        n, wanted = len(state), budget(self.keep, state.original)
        r = self.pairs(n, wanted, state.num_layers - state.layer)
        if r == 0:
            return None
        # [CLS] takes the first place of A, so that patches after it begin with B.
        keys = state.keys.float().mean(1)
        ranked = self.order == "similarity" and not state.has_cls
        return Merging(bipartite_match(keys, r, begins_with_a=not state.has_cls, ranked=ranked))

    def pairs(self, n: int, wanted: int, layers_left: int) -> int:
        """Pairs to merge in a layer that n tokens enter.

        Args:
            n: tokens that enter the layer.
            wanted: tokens to leave in the end.
            layers_left: layers left, including this one.

        Raises:
            ArgumentError: halving in every layer would not suffice.
        """
        if n <= wanted:
            return 0
        # The layers after this one can halve at best; an odd token stays.
        most = wanted
        for _ in range(layers_left - 1):
            most *= 2
        r = max(-(-(n - wanted) // layers_left), n - most)
        if r > n // 2:
            least = n
            for _ in range(layers_left):
                least -= least // 2
            raise ArgumentError(
                "keep",
                f"{layers_left} tower layers, each of which at best halves, cannot leave "
                f"{wanted} of {n} tokens; at least {least}",
            )
        return r
