# SPDX-License-Identifier: Apache-2.0
"""MMTok: tokens that cover both the text and the image."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from vtc.core import Method, Positions, Selection, VisionTokens
from vtc.core.settings import check_keep, check_number, check_positions
from vtc.ops import coverage_greedy, unit_rows


@dataclass(frozen=True)
class MMTok(Method):
    """Joint greedy coverage of the prompt's text and of all vision tokens.

    For each of m text tokens, the softmax over the n vision tokens of cosine / text_temperature,
    divided by m; for each vision token, the softmax of cosine / vision_temperature, divided by n
    and multiplied by alpha. Text rows use the embeddings after the projector, vision rows the
    states before it. A token's gain is the increase of each row's maximum over the chosen tokens.

    The code takes the question's words, without two standard endings and some stop words; here the
    text is everything after the first image. It also leaves out patches inside padding, which it
    finds in the picture's border; a method here sees no pixels.

    Args:
        keep: fraction of an image's tokens, or a whole number of tokens per image.
        alpha: weight of covering the image, at least 0.
        text_temperature: above 0; 0.02 for LLaVA, 0.01 for Qwen in the code.
        vision_temperature: above 0, by default 0.2.
        positions: "contiguous" (as in LLaVA) or "original".

    Raises:
        ArgumentError, ArgumentTypeError: a setting that is not accepted.
    """

    name = "mmtok"
    title = "MMTok: multimodal coverage"
    paper = "arXiv:2508.18264"
    year = 2025
    needs = frozenset({"encoder", "text"})

    keep: float | int = 0.1111
    alpha: float = 0.5
    text_temperature: float = 0.02
    vision_temperature: float = 0.2
    positions: Positions = "contiguous"

    def __post_init__(self) -> None:
        check_keep(self.keep)
        check_number("alpha", self.alpha, "[0, inf)")
        check_number("text_temperature", self.text_temperature, "(0, inf)")
        check_number("vision_temperature", self.vision_temperature, "(0, inf)")
        check_positions(self.positions)

    def select(self, tokens: VisionTokens) -> Selection:
        """Ascending indices, (k,).

        Raises:
            ValueError: `tokens` comes without `encoder` or `text`.
        """
        n = len(tokens)
        k = tokens.budget(self.keep)
        if k >= n:
            return Selection(torch.arange(n, device=tokens.features.device))
        if tokens.encoder is None or tokens.text is None:
            raise ValueError("encoder, text: needed, got tokens without")
        states = unit_rows(tokens.encoder)
        rows = [self.alpha * (states @ states.T / self.vision_temperature).softmax(1) / n]
        if m := tokens.text.shape[0]:
            cosines = unit_rows(tokens.text) @ unit_rows(tokens.features).T
            rows.append((cosines / self.text_temperature).softmax(1) / m)
        return Selection(coverage_greedy(torch.cat(rows), k).sort().values)
