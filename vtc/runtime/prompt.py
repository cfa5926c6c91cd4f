# SPDX-License-Identifier: Apache-2.0
"""The sequence that enters the decoder in a prefill, and where its prompt ends."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from vtc.runtime.signals import ImageSpan


@dataclass(frozen=True)
class Prompt:
    """What the places of a batch hold, before any token is dropped.

    Attributes:
        valid: (b, s) bool, False at padding and at what the user's mask hides.
        spans: the images, by sample and in sequence order.
        image: (b, s) ordinal of the image of each vision token, -1 elsewhere.
        grid: (b, s, 3) place of each vision token in its image; -1 elsewhere, and for tokens
            without places.
        separator: (b, s) bool, True at the features that end rows of tiles.
        text: (b, s) bool, the prompt's text after the first vision token.
        ends: tokens of the prompt by row, padding included; an answer that is scored follows.
        blocks: (b, s) block numbers of tokens that attend in both directions, -1 at causal ones;
            `None` if all are causal.
    """

    valid: Tensor
    spans: list[ImageSpan]
    image: Tensor
    grid: Tensor
    separator: Tensor
    text: Tensor
    ends: list[int]
    blocks: Tensor | None = None

    @classmethod
    def of(
        cls,
        valid: Tensor,
        spans: list[ImageSpan],
        placeholders: list[Tensor],
        labels: Tensor | None,
        width: int | None = None,
        blocks: Tensor | None = None,
    ) -> Prompt:
        """Describe a batch.

        Args:
            valid: (b, s) bool mask.
            spans: the images.
            placeholders: (b, s) bool each, True at the placeholders of one modality.
            labels: (b, s) labels, or `None`.
            width: tokens per row of the prompt, if candidate tokens follow it.
            blocks: as the attribute.
        """
        rows, length = valid.shape
        image = torch.full((rows, length), -1, device=valid.device)
        grid = image.new_full((rows, length, 3), -1)
        separator = torch.zeros_like(valid)
        for span in spans:
            image[span.sample, span.index] = span.ordinal
            if span.grid is not None:
                grid[span.sample, span.index] = span.grid.to(grid)
            separator[span.sample, span.separators] = True
        place = torch.arange(length, device=valid.device)
        end = prompt_ends(image >= 0, labels, width)
        started = (image >= 0).cumsum(1) > 0
        fed = separator.clone()
        for mask in placeholders:
            fed |= mask
        text = ~fed & valid & started & (place < end[:, None])
        return cls(valid, spans, image, grid, separator, text, end.tolist(), blocks)

    def text_for(self, sample: int, image: int, last: int, segment: bool) -> Tensor:
        """The text that a method reads.

        Args:
            sample: row of the batch.
            image: ordinal of the image.
            last: place of its last token.
            segment: only the text up to the next image.

        Returns:
            (s,) bool.
        """
        return text_for(self.text[sample], self.image[sample], image, last, segment)

    @property
    def length(self) -> int:
        """Places per row."""
        return self.valid.shape[1]

    @property
    def text_at_the_end(self) -> int:
        """The number of last tokens that are text in every row, which a cache can crop."""
        kept = self.valid & (self.image < 0) & ~self.separator
        return int(kept.flip(1).long().cumprod(1).sum(1).min())


def text_for(text: Tensor, image: Tensor, ordinal: int, last: int, segment: bool) -> Tensor:
    """The text of a row that a method reads: all of the prompt's, or only a segment.

    Args:
        text: (s,) bool, the prompt's text after the first image.
        image: (s,) ordinal of the image of each place, -1 elsewhere.
        ordinal: of the image.
        last: place of its last token.
        segment: only the text up to the next image.

    Returns:
        (s,) bool.
    """
    if not segment:
        return text
    place = torch.arange(len(text), device=text.device)
    later = (image > ordinal).nonzero()
    end = int(later[0]) if len(later) else len(text)
    return text & (place > last) & (place < end)


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
