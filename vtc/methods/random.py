# SPDX-License-Identifier: Apache-2.0
"""Random tokens: the baseline to beat."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import torch

from vtc.core import Method, Positions, Selection, VisionTokens
from vtc.core.settings import check_keep, check_positions, check_whole


@dataclass(frozen=True)
class Random(Method):
    """Keep tokens drawn uniformly without replacement; surprisingly strong.

    The draw depends only on the seed, the image's ordinal in its sample and its number of tokens,
    never on the rest of the batch or on earlier runs. So all images of one size with the same
    ordinal keep the *same* places under one seed. One run is one draw
    of places for the whole test set, so error bars come from several seeds, not from the samples.
    Under one seed, a smaller `keep` keeps a subset of what a larger one keeps.

    Args:
        keep: fraction of an image's tokens, or a whole number of tokens per image.
        seed: whole number of at least 0.
        positions: "original" or "contiguous".

    Raises:
        ArgumentError, ArgumentTypeError: a setting that is not accepted.
    """

    name = "random"
    title = "Random tokens"

    keep: float | int = 0.25
    seed: int = 0
    positions: Positions = "original"

    def __post_init__(self) -> None:
        check_keep(self.keep)
        check_whole("seed", self.seed)
        check_positions(self.positions)

    def select(self, tokens: VisionTokens) -> Selection:
        """Ascending indices, (k,)."""
        n = len(tokens)
        # Hashed, as generators with neighbouring seeds can give correlated streams.
        digest = hashlib.sha256(f"{self.seed},{tokens.image},{n}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
        # Drawn on the CPU, so that every device keeps the same tokens.
        drawn = torch.randperm(n, generator=generator)[: tokens.budget(self.keep)]
        return Selection(drawn.sort().values.to(tokens.features.device))
