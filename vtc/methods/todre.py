# SPDX-License-Identifier: Apache-2.0
"""ToDRE: a diverse set before the language model, no vision tokens in its last layers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from vtc.core import LayerState, Method, Positions, Rows, Selection, VisionTokens
from vtc.core.settings import (
    check_choice,
    check_flag,
    check_keep,
    check_layer,
    check_number,
    check_positions,
    scale_layers,
)
from vtc.ops import farthest_first, max_sum


@dataclass(frozen=True)
class ToDRE(Method):
    """Token diversity first, then task relevance.

    Stage 1, before the language model: start from the pivot, the token with the most attention
    from [CLS], and greedily add tokens dissimilar to those chosen (eqs. 4-7, Algorithm 1).
    `mode="maxsum"` (version 2 of the paper) adds the token with the smallest sum of cosines to all
    chosen ones; `mode="kcenter"` (what version 1 names) the one whose largest cosine is smallest.
    Max-sum may pick a duplicate of a chosen token while others remain; k-center never does. For a
    tiled image the pivot comes from the thumbnail; for a clip from all frames. Towers
    without [CLS] use the attention each token receives; the paper draws the pivot
    at random there and finds that it matters little.

    Stage 2, after l* decoder layers: if in layer l* (1-based; softmax over all keys, mean
    over heads) the text gives less than `tau` of its attention to the vision tokens, and these less
    than `tau` of theirs to the text, the layers after it get no vision tokens. There is one
    check, and all tokens go or none. The paper's quotients are means over the rows of all text and
    of all vision tokens of the sample. "Text" is the prompt's text after the first vision token;
    text before it counts as the system prompt. So under a causal mask, vision tokens see text only
    if another image follows it: with all text after the image their attention to it
    is 0, and the first condition decides.

    The paper evaluates 25 % and 10 % of the tokens. `keep=1.0` switches off both stages; a
    whole number beyond any image's size keeps all in stage 1 and leaves stage 2 on.

    Args:
        keep: fraction of an image's tokens, or a whole number of tokens per image, in stage 1.
        mode: "maxsum" or "kcenter".
        second_stage: whether stage 2 acts.
        layer: l*, decoder layers that still see vision tokens, from 1 to the number of layers minus
            one; by default 7/8 of them, rounded down. The paper counts layers from 1 and checks
            *after* layer l*, which is *before* 0-based layer l*.
        tau: threshold of stage 2, at least 0; 0 never drops, above 1 always drops.
        positions: of stage 1, "contiguous" (the paper's model renumbers the shortened sequence)
            or "original". Stage 2 keeps positions, which the paper does not specify, so the text
            has the same rotation in all layers.

    Raises:
        ArgumentError, ArgumentTypeError: a setting that is not accepted.
    """

    name = "todre"
    title = "ToDRE: token diversity and task relevance"
    paper = "arXiv:2505.18757"
    year = 2025
    needs = frozenset({"cls_attention"})
    vision_layer = -1  # eq. 3 uses the last layer

    keep: float | int = 0.25
    mode: Literal["maxsum", "kcenter"] = "maxsum"
    second_stage: bool = True
    layer: int | None = None
    tau: float = 0.1
    positions: Positions = "contiguous"

    def __post_init__(self) -> None:
        check_keep(self.keep)
        check_choice("mode", self.mode, ("maxsum", "kcenter"))
        check_flag("second_stage", self.second_stage)
        check_layer("layer", self.layer, lowest=1)
        check_number("tau", self.tau, "[0, inf)")
        check_positions(self.positions)

    @property
    def stages(self) -> tuple[str, ...]:
        """("sequence", "layers"), or only the former if stage 2 is off."""
        return ("sequence", "layers") if self._drops else ("sequence",)

    @property
    def _drops(self) -> bool:
        # keep=1.0 promises the plain model bit for bit; the whole number 1 is one token.
        return self.second_stage and not (isinstance(self.keep, float) and self.keep == 1.0)

    # ---- stage 1 ------------------------------------------------------------------------------
    def select(self, tokens: VisionTokens) -> Selection:
        """Ascending indices, (k,).

        Raises:
            ValueError: `tokens` comes without `cls_attention`, or features are not finite.
        """
        n = len(tokens)
        k = tokens.budget(self.keep)
        if k >= n:
            return Selection(torch.arange(n, device=tokens.features.device))
        choose = max_sum if self.mode == "maxsum" else farthest_first
        return Selection(choose(tokens.features, k, _pivot(tokens)).sort().values)

    # ---- stage 2 ------------------------------------------------------------------------------
    def prune_layers(self, num_layers: int) -> tuple[int, ...]:
        """(l*,), or () if stage 2 is off or the model has only one layer.

        Raises:
            ArgumentError: the model has no layer after `layer`.
        """
        if not self._drops:
            return ()
        if self.layer is None:
            return (7 * num_layers // 8,) if num_layers > 1 else ()
        return scale_layers(self.layer, (), num_layers)

    def is_bound(self, n: int, tiles: int = 1) -> bool:
        """Whether stage 2 is on, which may drop all tokens."""
        return self._drops

    def taps(self, num_layers: int) -> dict[int, Rows]:
        """Vision and text rows of the last layer that sees vision tokens."""
        return {layer - 1: "vision_text" for layer in self.prune_layers(num_layers)}

    @property
    def prune_positions(self) -> Positions:
        """ "original": stage 2 keeps positions."""
        return "original"

    def prune(self, state: LayerState) -> Selection | None:
        """No indices if text and vision no longer attend to each other, else `None`.

        A prompt without text after its image gives no evidence and keeps its tokens.
        """
        rows, is_vision = state.attention[state.layer - 1], state.image >= 0
        # The rows are those of vision and text, in sequence order.
        of_vision = is_vision[is_vision | state.text]
        if bool(of_vision.all()) or not bool(of_vision.any()):
            return None
        # Rows sum to 1, so the paper's quotients of sums are means of the rows' mass.
        text_to_vision = rows[~of_vision][:, is_vision].sum(1).mean()
        vision_to_text = rows[of_vision][:, state.text].sum(1).mean()
        if torch.maximum(text_to_vision, vision_to_text) < self.tau:
            return Selection(torch.empty(0, dtype=torch.long, device=rows.device))
        return None


def _pivot(tokens: VisionTokens) -> Tensor:
    """0-d index of the token with the most [CLS] attention, ties to the lowest."""
    attention = tokens.cls_attention
    if attention is None:
        raise ValueError("cls_attention: ToDRE's pivot needs it, got tokens without")
    if tokens.crop is not None and (thumbnail := tokens.crop == 0).any():
        attention = attention.masked_fill(~thumbnail, -torch.inf)
    return attention.argmax()
