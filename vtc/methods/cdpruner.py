# SPDX-License-Identifier: Apache-2.0
"""CDPruner: tokens relevant to the question and dissimilar to one another."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from vtc.core import Method, Positions, Selection, VisionTokens
from vtc.core.settings import check_choice, check_keep, check_positions
from vtc.ops import dpp_greedy, unit_rows


@dataclass(frozen=True)
class CDPruner(Method):
    """Greedy MAP of a determinantal point process whose kernel is diag(r) S diag(r).

    S holds the cosines of the embeddings after the projector, r each token's relevance to the text,
    scaled to (0, 1] over the image. Relevant, dissimilar tokens have a large determinant.

    The paper takes relevance from CLIP's text tower, which a vision-language model does not have;
    its code negates the cosine, as CLIP's patches point away from what they show. Here relevance is
    the mean cosine to the embeddings of the text after the image, in the language model's space and
    without negation, as the authors suggest for models without CLIP. Results on LLaVA
    therefore differ from the paper's. The code scales relevance over a whole batch; here each
    image has its own scale.

    Args:
        keep: fraction of an image's tokens, or a whole number of tokens per image.
        relevance: "text", or "none" for diversity alone.
        positions: "contiguous" (as in LLaVA) or "original".

    Raises:
        ArgumentError, ArgumentTypeError: a setting that is not accepted.
    """

    name = "cdpruner"
    title = "CDPruner: conditional diversity by a DPP"
    paper = "arXiv:2506.10967"
    year = 2025
    needs = frozenset({"text"})

    keep: float | int = 0.1111
    relevance: Literal["text", "none"] = "text"
    positions: Positions = "contiguous"

    def __post_init__(self) -> None:
        check_keep(self.keep)
        check_choice("relevance", self.relevance, ("text", "none"))
        check_positions(self.positions)

    def select(self, tokens: VisionTokens) -> Selection:
        """Ascending indices, (k,).

        Raises:
            ValueError: `tokens` comes without `text`.
        """
        n = len(tokens)
        k = tokens.budget(self.keep)
        if k >= n:
            return Selection(torch.arange(n, device=tokens.features.device))
        rows = unit_rows(tokens.features.double())
        if self.relevance == "text":
            if tokens.text is None:
                raise ValueError("text: needed, got tokens without")
            if tokens.text.shape[0]:
                # The mean cosine is that to the mean of the unit rows.
                found = rows @ unit_rows(tokens.text.double()).mean(0)
                span = (found.amax() - found.amin()).clamp_min(1e-12)
                scaled = (found - found.amin() + 1e-6) / span
                rows = scaled[:, None] * rows
        return Selection(dpp_greedy(rows, k).sort().values)
