# SPDX-License-Identifier: Apache-2.0
"""Where a prompt ends."""

from __future__ import annotations

import torch
from torch import Tensor


def prompt_ends(vision: Tensor, labels: Tensor | None, width: int | None = None) -> Tensor:
    """The end of each row's prompt: the start of the scored answer, which `generate` would not
    see, or the end of the row.

    The answer starts after the last image, so labels on earlier turns or on all tokens do not end
    the prompt.

    Args:
        vision: (b, s) bool, True at tokens of images.
        labels: (b, s), -100 where nothing is scored; `None` without an answer.
        width: tokens per row of the prompt, if candidate tokens follow it.

    Returns:
        (b,) tokens of the prompt in each row, padding included.
    """
    rows, length = vision.shape
    end = torch.full((rows,), length, device=vision.device)
    if labels is not None:
        place = torch.arange(length, device=vision.device)
        shown = torch.where(vision, place + 1, 0).max(dim=1).values
        answer = (labels.to(vision.device) != -100) & (place >= shown[:, None])
        end = torch.where(answer, place, length).min(dim=1).values
    return end if width is None else end.clamp_max(width)
