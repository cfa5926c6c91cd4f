# SPDX-License-Identifier: Apache-2.0
"""The base of families whose tokens come from a resampler that has attention of its own."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import nn

from vtc.core.images import ImageMap
from vtc.models.base import Adapter


class Resampled(Adapter):
    """Learned queries read the patches of an image and become its tokens, which have no places.

    Each token mixes all patches, so that no patch is its own. It stands for itself: its signals are
    those of its row in the resampler, whose layers are the ones that methods name, the last being
    -1. The attention of a token is what its row receives from the rows of all tokens of its image,
    the mean over those that may see it: rows of patches or of text do not count, since what they
    attend to in the last layer enters no token. Its key is that of its row, its state what leaves
    the resampler there. There is no [CLS]. Methods that merge patch states merge tokens.
    """

    projects_patches: ClassVar[bool] = False
    places: ClassVar[bool] = False
    stages: ClassVar[tuple[str, ...]] = ("sequence", "layers")
    unmerged: ClassVar[str] = "each token mixes all patches of its image (a resampler)"

    @classmethod
    def readable(cls) -> str:
        return "attention, keys, states of the resampler's queries"

    def resampler_attention(self) -> list[nn.Module]:
        """The attention module in each layer of the resampler in which queries attend to one
        another, first to last."""
        raise NotImplementedError

    def tower_attention(self) -> list[nn.Module]:
        return self.resampler_attention()

    def has_cls(self) -> bool:
        return False  # the resampler has none, whatever the tower has

    def of_queries(self, n: int, first: int) -> ImageMap:
        """The map of one image.

        Args:
            n: number of its tokens.
            first: number of the first in the order in which the resampler makes tokens.
        """
        return ImageMap(None, count=n, patches=torch.arange(first, first + n)[:, None])
