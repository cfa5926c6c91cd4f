# SPDX-License-Identifier: Apache-2.0
"""Records which vision tokens of a prompt each stage keeps, as a listener of a patch."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from vtc.core import VisionTokens
from vtc.core.events import Event, Selected, Shown
from vtc.viz.views import Places, places_of

__all__ = ["TokenRecord"]


@dataclass
class TokenRecord:
    """The vision tokens of one prompt, numbered in sequence order, and those kept by each stage.

    Pass `record.hear` to `Patch.listen`. The record holds the last prompt; of a batch, its first
    row.

    Attributes:
        shown: tokens of each image before compression.
        first: number of each image's first token.
        entered: for each image, the numbers of its tokens that enter the language model.
        later: by stage between decoder layers, the numbers of the prompt's kept tokens.
    """

    shown: list[VisionTokens] = field(default_factory=list)
    first: list[int] = field(default_factory=list)
    entered: list[list[int]] = field(default_factory=list)
    later: dict[str, list[int]] = field(default_factory=dict)

    def hear(self, event: Event) -> None:
        """Record an event of a patch."""
        if not isinstance(event, Shown | Selected) or event.sample != 0:
            return
        if isinstance(event, Shown):
            self._saw(event.tokens)
        elif event.layer is None:
            self._selected(event.image or 0, event.selection.indices)
        else:
            self._pruned(event.layer, event.selection.indices)

    def _saw(self, tokens: VisionTokens) -> None:
        """Record an image's tokens, or those of a tile that counts as one, before any method
        acts."""
        if tokens.image == 0:
            self.shown, self.first, self.entered, self.later = [], [], [], {}
        self.first.append(sum(map(len, self.shown)))
        self.shown.append(tokens)
        self.entered.append(list(range(self.first[-1], self.first[-1] + len(tokens))))

    def _selected(self, image: int, indices: Tensor) -> None:
        """Record an image's tokens that enter the language model."""
        self.entered[image] = [self.entered[image][i] for i in indices.tolist()]

    def _pruned(self, layer: int, indices: Tensor) -> None:
        """Record the prompt's tokens kept before a decoder layer."""
        before = list(self.stages.values())[-1]
        self.later[f"before layer {layer}"] = [before[i] for i in indices.tolist()]

    @property
    def stages(self) -> dict[str, list[int]]:
        """The numbers of the kept tokens, by stage."""
        return {"into the language model": [n for own in self.entered for n in own], **self.later}

    def among(self, every: TokenRecord) -> dict[str, list[int]]:
        """The kept tokens by stage, in the numbering of another record.

        Args:
            every: record of a run with all tokens; this one has fewer if the tower merges patches.

        Returns:
            By stage, the numbers of the kept tokens.
        """
        if [len(t) for t in self.shown] == [len(t) for t in every.shown]:
            return self.stages
        number: dict[int, int] = {}
        for first, own, whole in zip(every.first, self.shown, every.shown, strict=True):
            at = {tuple(place): first + i for i, place in enumerate(_grid(whole).tolist())}
            for place in _grid(own).tolist():
                number[len(number)] = at[tuple(place)]
        return {stage: [number[n] for n in left] for stage, left in self.stages.items()}

    def places(self, pixels: Tensor | None, patch_size: int | None) -> Places:
        """The places of the tokens in the picture.

        Args:
            pixels, patch_size: as in `places_of`.

        Raises:
            ValueError: the tokens have no places in the picture.
        """
        crops = [tokens.crop for tokens in self.shown if tokens.crop is not None]
        patches = [tokens.patches for tokens in self.shown if tokens.patches is not None]
        every = len(self.shown)
        return places_of(
            torch.cat([torch.full((len(t),), t.image) for t in self.shown]),
            torch.cat(crops).cpu() if len(crops) == every else None,
            torch.cat([_grid(tokens) for tokens in self.shown]).cpu(),
            torch.cat(patches).cpu() if len(patches) == every else None,
            pixels,
            patch_size,
        )


def _grid(tokens: VisionTokens) -> Tensor:
    return tokens.places("trace", "draws tokens where they lie")
