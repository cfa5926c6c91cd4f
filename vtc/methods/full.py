# SPDX-License-Identifier: Apache-2.0
"""The uncompressed model as a method."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from vtc.core import Method, Selection, VisionTokens


@dataclass(frozen=True)
class Full(Method):
    """Keep every vision token: the reference of every table.

    The result is bitwise that of the plain model; the report is measured as for other methods.
    """

    name = "full"
    title = "All tokens"

    @property
    def keeps_all(self) -> bool:
        """Always `True`."""
        return True

    def select(self, tokens: VisionTokens) -> Selection:
        """All indices, (n,)."""
        return Selection(torch.arange(len(tokens), device=tokens.features.device))
