# SPDX-License-Identifier: Apache-2.0
"""Token-level correlation-guided compression: a budget by each crop's information."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from vtc.core import Method, Positions, Selection, VisionTokens
from vtc.core.settings import (
    budget,
    check_choice,
    check_keep,
    check_number,
    check_positions,
    check_whole,
)
from vtc.ops import merge_into_nearest, top_k, unit_rows


@dataclass(frozen=True)
class Correlation(Method):
    """Compress each crop of a document by its redundancy.

    Density: a patch is redundant if its key is more similar than `alpha` (cosine) to more than
    `beta` of the crop's other patches; D is the fraction of non-redundant ones, at least `least`,
    and round(D n) tokens are sampled. Global branch: outliers of [CLS] attention in the last layer,
    above Q3 + 1.5 (Q3 - Q1), are kept whatever D is. Local branch:
    round(D n) patches by the attention of [CLS] in an early layer. The rest is merged into the kept
    patch with the most similar key, by means weighted with the attention of the last layer. With a
    fixed `keep` the global branch is part of the budget: its strongest first, then the local
    branch.

    The code was never released and the paper's layers and thresholds are not known: `alpha`,
    `beta`, `least` and the layers (keys and global attention: the last; local: a quarter of the
    depth) are choices of this library, the first three by a sweep over generated documents
    (`eval/analysis/sweeps/correlation.md`). The paper samples the local branch at random;
    `sampler="topk"` is deterministic, `"multinomial"` draws from a generator with `seed`. Crops are
    compressed separately; an image without crops is one crop. Towers without [CLS] use the
    attention a patch receives.

    Args:
        keep: a fixed budget per crop instead of D: a fraction or a whole number; `None` adapts.
        alpha: cosine above which two patches are redundant, in [-1, 1].
        beta: fraction of the crop's patches, in [0, 1].
        least: least density, in (0, 1].
        sampler: "topk" or "multinomial".
        seed: seed of the multinomial sampler.
        positions: "contiguous" or "original".

    Raises:
        ArgumentError, ArgumentTypeError: a setting that is not accepted.
    """

    name = "correlation"
    title = "Token-level correlation-guided compression"
    paper = "arXiv:2407.14439"
    year = 2024
    needs = frozenset({"cls_attention", "low_attention", "keys"})
    vision_layer = -1
    low_layer = 0.25
    by_tile = True

    keep: float | int | None = None
    alpha: float = 0.95
    beta: float = 0.125
    least: float = 0.1
    sampler: Literal["topk", "multinomial"] = "topk"
    seed: int = 0
    positions: Positions = "contiguous"

    def __post_init__(self) -> None:
        if self.keep is not None:
            check_keep(self.keep)
        check_number("alpha", self.alpha, "[-1, 1]")
        check_number("beta", self.beta, "[0, 1]")
        check_number("least", self.least, "(0, 1]")
        check_choice("sampler", self.sampler, ("topk", "multinomial"))
        check_whole("seed", self.seed, lowest=None)
        check_positions(self.positions)

    def density(self, keys: Tensor) -> float:
        """The fraction of non-redundant patches of a crop with (n, d_k) keys, at least `least`."""
        rows = unit_rows(keys)
        alike = (rows @ rows.T > self.alpha).sum(1) - 1  # itself
        redundant = (alike > self.beta * keys.shape[0]).float().mean()
        return max(1 - float(redundant), self.least)

    def select(self, tokens: VisionTokens) -> Selection:
        """(k,) ascending indices and (k, d) merged contents.

        Raises:
            ValueError: `tokens` comes without the signals in `needs`.
        """
        n, device = len(tokens), tokens.features.device
        if self.keep is not None and tokens.budget(self.keep) >= n and tokens.original == n:
            return Selection(torch.arange(n, device=device))
        if tokens.cls_attention is None or tokens.low_attention is None or tokens.keys is None:
            raise ValueError("cls_attention, low_attention, keys: needed, got tokens without")
        crops = torch.zeros(n, dtype=torch.long, device=device)
        if tokens.crop is not None:
            crops = tokens.crop
        at_first = tokens.crop if tokens.every_crop is None else tokens.every_crop
        indices, contents = [], []
        for crop in crops.unique():
            places = (crops == crop).nonzero().squeeze(1)
            attention, keys = tokens.cls_attention[places].float(), tokens.keys[places]
            low = tokens.low_attention[places].float()
            if self.keep is None:
                k = budget(self.density(keys), len(places))
            else:
                whole = tokens.original if at_first is None else int((at_first == crop).sum())
                k = min(budget(self.keep, whole), len(places))
            # Generators distinguish seeds by their lower half.
            seed = (self.seed * 1_000_003 + tokens.image * 1_009 + int(crop)) & 0xFFFFFFFF
            kept = self._kept(attention, low, k, seed)
            features = tokens.features[places]
            indices.append(places[kept])
            contents.append(merge_into_nearest(features, keys, kept, attention))
        every = torch.cat(indices)
        if len(every) == n:
            return Selection(torch.arange(n, device=device))
        order = every.argsort()
        return Selection(every[order], torch.cat(contents)[order])

    def _kept(self, attention: Tensor, low: Tensor, k: int, seed: int) -> Tensor:
        """Ascending indices of a crop: k of the local branch and the outliers of the global one, or
        k in all with a fixed `keep`."""
        if k >= len(attention):
            return torch.arange(len(attention), device=attention.device)
        lower, upper = torch.quantile(attention, 0.25), torch.quantile(attention, 0.75)
        stays = attention > upper + 1.5 * (upper - lower)
        low = low.clamp_min(1e-12)
        if self.keep is not None:
            strongest = torch.zeros_like(stays)
            strongest[top_k(attention, k)] = True
            stays &= strongest
            k -= int(stays.sum())
            low = low.masked_fill(stays, 0)
        if self.sampler == "topk":
            stays[top_k(low, k)] = True
        else:
            # On the CPU, so that a seed gives the same draw on every device.
            generator = torch.Generator().manual_seed(seed)
            if k:
                chosen = torch.multinomial(low.cpu(), k, generator=generator)
                stays[chosen.to(low.device)] = True
        return stays.nonzero().squeeze(1)
