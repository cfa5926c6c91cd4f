# SPDX-License-Identifier: Apache-2.0
"""Which vision tokens of a prompt are left, stage by stage: a record, and the methods that fill it.

A record is filled by a run of a patched model: `Watch` stands before the method and sees all
tokens, and `recording` makes of the method one that tells what it chooses.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from vtc.core import LayerState, Method, Selection, VisionTokens
from vtc.viz.views import Places, places_of

__all__ = ["TokenRecord", "Watch", "recording"]


@dataclass
class TokenRecord:
    """The vision tokens of one prompt, numbered as they stand, and the survivors by stage."""

    shown: list[VisionTokens] = field(default_factory=list)
    first: list[int] = field(default_factory=list)
    entered: list[list[int]] = field(default_factory=list)
    later: dict[str, list[int]] = field(default_factory=dict)

    def saw(self, tokens: VisionTokens) -> None:
        """All tokens of an image, or of a tile that is one, before any method acts."""
        if tokens.image == 0:
            self.shown, self.first, self.entered, self.later = [], [], [], {}
        self.first.append(sum(map(len, self.shown)))
        self.shown.append(tokens)
        self.entered.append(list(range(self.first[-1], self.first[-1] + len(tokens))))

    def selected(self, image: int, indices: Tensor) -> None:
        """Which of its tokens are left of an image before the language model."""
        self.entered[image] = [self.entered[image][i] for i in indices.tolist()]

    def pruned(self, layer: int, indices: Tensor) -> None:
        """Which of the prompt's tokens are left before a decoder layer."""
        before = list(self.stages.values())[-1]
        self.later[f"before layer {layer}"] = [before[i] for i in indices.tolist()]

    @property
    def stages(self) -> dict[str, list[int]]:
        """By stage, the numbers of the tokens left."""
        return {"into the language model": [n for own in self.entered for n in own], **self.later}

    def among(self, every: TokenRecord) -> dict[str, list[int]]:
        """By stage, the tokens left as `every` numbers them, which saw all; fewer are left of it
        where patches were merged in the tower."""
        if [len(t) for t in self.shown] == [len(t) for t in every.shown]:
            return self.stages
        number: dict[int, int] = {}
        for first, own, whole in zip(every.first, self.shown, every.shown, strict=True):
            at = {tuple(place): first + i for i, place in enumerate(whole.grid.tolist())}
            for place in own.grid.tolist():
                number[len(number)] = at[tuple(place)]
        return {stage: [number[n] for n in left] for stage, left in self.stages.items()}

    def places(self, pixels: Tensor | None, patch_size: int | None) -> Places:
        """Where the tokens lie; see `places_of`."""
        crops = [tokens.crop for tokens in self.shown if tokens.crop is not None]
        patches = [tokens.patches for tokens in self.shown if tokens.patches is not None]
        every = len(self.shown)
        return places_of(
            torch.cat([torch.full((len(t),), t.image) for t in self.shown]),
            torch.cat(crops).cpu() if len(crops) == every else None,
            torch.cat([tokens.grid for tokens in self.shown]).cpu(),
            torch.cat(patches).cpu() if len(patches) == every else None,
            pixels,
            patch_size,
        )


def recording(method: Method, record: TokenRecord) -> Method:
    """`method`, telling `record` what it chooses."""
    kind = type(method)

    def select(self: Method, tokens: VisionTokens) -> Selection:
        chosen = kind.select(self, tokens)
        record.selected(tokens.image, chosen.indices)
        return chosen

    def prune(self: Method, state: LayerState) -> Selection | None:
        chosen = kind.prune(self, state)
        if chosen is not None:
            record.pruned(state.layer, chosen.indices)
        return chosen

    methods: dict[str, Any] = {}
    if kind.select is not Method.select:
        methods["select"] = select
    if kind.prune is not Method.prune:
        methods["prune"] = prune
    # A subclass and not a wrapper, so that it acts where the method acts.
    recorder = type(kind.__name__, (kind,), methods)
    fields = dataclasses.fields(method)  # type: ignore[arg-type]
    made: Method = recorder(**{f.name: getattr(method, f.name) for f in fields if f.init})
    return made


@dataclass(frozen=True)
class Watch(Method):
    """Keeps all and tells `record` what there is; only merging in the tower stands before it."""

    needs = frozenset({"patches"})

    record: TokenRecord

    def select(self, tokens: VisionTokens) -> Selection:
        self.record.saw(tokens)
        return Selection(torch.arange(len(tokens), device=tokens.features.device))

    def __str__(self) -> str:
        """Nothing: it is no part of what the user composed."""
        return ""

    __repr__ = __str__


# Named here and not in the class, where it would register.
Watch.name = "watch"
