# SPDX-License-Identifier: Apache-2.0
"""Base of methods that score tokens and keep the best."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .method import Method
from .settings import check_keep, check_positions
from .states import LayerState, Selection, VisionTokens

if TYPE_CHECKING:
    from torch import Tensor


class ScorerMethod(Method):
    """Base of methods that keep the tokens with the highest scores.

    A subclass has a setting `keep` and implements `score`, for the sequence stage, or `score_layer`
    with `prune_layers`, for the layers stage, or both. Budgets come from `VisionTokens.budget`
    and `leaves`; between layers all vision tokens of a sample compete for the sum of its images'
    budgets. Ties go to the earlier token; kept tokens are in ascending order. If all tokens fit the
    budget, nothing is scored.

    `__post_init__` checks `keep` and `positions`; a subclass with more settings calls it.
    """

    keep: float | int

    def __post_init__(self) -> None:
        if not hasattr(self, "keep"):
            raise TypeError(f"{type(self).__name__}: a ScorerMethod needs a setting `keep`")
        check_keep(self.keep)
        check_positions(self.positions)

    # ---- what a subclass implements -----------------------------------------------------------
    def score(self, tokens: VisionTokens) -> Tensor:
        """(n,) scores of the tokens of one image, higher for those that should stay.

        Raises:
            NotImplementedError: it scores only between layers.
        """
        raise NotImplementedError

    def score_layer(self, state: LayerState) -> Tensor:
        """(n,) scores of the vision tokens `state.vision` of one sample.

        Raises:
            NotImplementedError: it scores only before the language model.
        """
        raise NotImplementedError

    # ---- what it provides ---------------------------------------------------------------------
    @classmethod
    def implements(cls, hook: str) -> bool:
        """Whether the hook is overridden, or the score that it calls."""
        scores = {"select": "score", "prune": "score_layer"}.get(hook)
        if scores is None or getattr(cls, hook) is not getattr(ScorerMethod, hook):
            return super().implements(hook)
        return getattr(cls, scores) is not getattr(ScorerMethod, scores)

    def select(self, tokens: VisionTokens) -> Selection:
        """(k,) ascending indices of the highest scores.

        Raises:
            TypeError: the method has no `score`.
            ValueError: not one score for each token.
        """
        if not self.implements("select"):
            return super().select(tokens)
        n, k = len(tokens), tokens.budget(self.keep)
        if k >= n:
            return _all(tokens.features)
        return self._best(self.score(tokens), n, k)

    def prune(self, state: LayerState) -> Selection | None:
        """(k,) ascending indices of the highest scores, or `None` if all fit the budget.

        Raises:
            TypeError: the method has no `score_layer`.
            ValueError: not one score for each token.
        """
        if not self.implements("prune"):
            return super().prune(state)
        cuts, held = self.prune_layers(state.num_layers), len(state.vision)
        k = self.leaves(state.original, held, cuts.index(state.layer), len(cuts))
        if k is None or k >= held or self.keeps_all:
            return None
        return self._best(self.score_layer(state), held, k)

    def _best(self, scores: Tensor, n: int, k: int) -> Selection:
        """The k highest of the (n,) `scores`.

        Raises:
            ValueError: not one score for each token.
        """
        from vtc.ops import top_k

        if scores.shape != (n,):
            raise ValueError(
                f"{self.name}: expected one score for each of the {n} tokens, of shape ({n},), got "
                f"{tuple(scores.shape)}"
            )
        return Selection(top_k(scores, k).sort().values)


# PyTorch is imported in functions, as commands that do not need it import `vtc.core`.
def _all(features: Tensor) -> Selection:
    """All of the (n, d) `features`."""
    import torch

    return Selection(torch.arange(len(features), device=features.device))
