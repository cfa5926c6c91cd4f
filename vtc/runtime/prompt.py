# SPDX-License-Identifier: Apache-2.0
"""Where a prompt ends."""

from __future__ import annotations

import torch
from torch import Tensor


def prompt_ends(vision: Tensor, labels: Tensor | None, width: int | None = None) -> Tensor:
    """Where the prompt of each row ends: at the answer that is being scored, which `generate` would
    not have seen, or with the tokens.

    Images are of the prompt: earlier turns, or labels left on all tokens, do not end it.

    Args:
        vision: (b, s) bool, the tokens of images.
        labels: (b, s) -100 for what is not scored, or `None` without an answer.
        width: tokens of a row of the prompt, if others follow it.

    Returns:
        (b,) tokens of each row, padding included.
    """
    rows, length = vision.shape
    end = torch.full((rows,), length, device=vision.device)
    if labels is not None:
        place = torch.arange(length, device=vision.device)
        shown = torch.where(vision, place + 1, 0).max(dim=1).values
        answer = (labels.to(vision.device) != -100) & (place >= shown[:, None])
        end = torch.where(answer, place, length).min(dim=1).values
    return end if width is None else end.clamp_max(width)
