# SPDX-License-Identifier: Apache-2.0
"""The uncompressed model, as a method like any other."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from vtc.core import Method, Selection, VisionTokens


@dataclass(frozen=True)
class Full(Method):
    """Keep every vision token: the upper line of every table.

    The result is bit for bit that of the plain model. What it adds is the report, measured the
    same way as for the methods it is compared with.
    """

    name = "full"
    title = "All tokens"

    @property
    def keeps_all(self) -> bool:
        """Always."""
        return True

    def select(self, tokens: VisionTokens) -> Selection:
        """All indices, (n,)."""
        return Selection(torch.arange(len(tokens), device=tokens.features.device))
