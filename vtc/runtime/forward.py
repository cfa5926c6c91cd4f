# SPDX-License-Identifier: Apache-2.0
"""The state of one forward of a patched model, and the selections made in it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from vtc.core import Record, Selection
from vtc.core.events import Event, Listener
from vtc.core.images import Modality
from vtc.report import ImageTokens, Sample, Stopwatch, logits_of
from vtc.runtime.layout import Layout, gather_last
from vtc.runtime.ledger import Ledger
from vtc.runtime.prompt import prompt_ends
from vtc.runtime.signals import Heard, ImageSpan

Decisions = dict[tuple[Any, ...], Selection | None]
"""Selections by (number, row, image) or ("layers", number, layer, row); the number is that of the
method."""


@dataclass
class Forward:
    """One call of the model.

    Attributes:
        images_seen: the call has pixels or vision features.
        labels: (b, s) labels, or `None`.
        features: what is scattered into the sequence, by modality: a list of (n, d), one per image,
            or (images, n, d).
        vision: (b, s) bool by modality, True at the placeholders of the features.
        given: the arguments of the base model.
        logits_to_keep: this argument of the model, 0 by default; `None` if the base model runs
            alone.
        generating: the executor's record of the `generate` call of which this is a step, or `None`.
        phase: "plain" leaves the model alone; "prefill" compresses; "decode" continues a
            compressed cache.
        listeners: called with every event.
    """

    images_seen: bool = False
    labels: Tensor | None = None
    features: dict[Modality, Any] = field(default_factory=dict)
    vision: dict[Modality, Tensor] = field(default_factory=dict)
    given: Mapping[str, Any] = field(default_factory=dict)
    logits_to_keep: Any = None
    generating: Any = None
    phase: str = "plain"
    listeners: Sequence[Listener] = ()

    # Set at prefill. `valid`, `gap`, `image`, `separator`, `text` and `blocks` are (b, s) over the
    # whole sequence, `grid` is (b, s, 3).
    valid: Tensor = field(default_factory=lambda: torch.empty(0))
    gap: Tensor = field(default_factory=lambda: torch.empty(0))
    image: Tensor = field(default_factory=lambda: torch.empty(0))
    separator: Tensor = field(default_factory=lambda: torch.empty(0))
    blocks: Tensor | None = None
    deepstack: Tensor | None = None
    text: Tensor = field(default_factory=lambda: torch.empty(0))
    grid: Tensor = field(default_factory=lambda: torch.empty(0))
    prompt_length: list[int] = field(default_factory=list)
    entering: Mapping[str, Any] = field(default_factory=dict)
    spans: list[ImageSpan] = field(default_factory=list)
    layout: Layout = None  # type: ignore[assignment]
    entered: Layout | None = None
    decisions: Decisions = field(default_factory=dict)
    memory: dict[tuple[int, int], Tensor | None] = field(default_factory=dict)
    dropped: set[int] = field(default_factory=set)
    replay: bool = False
    counts: dict[int, list[list[int]]] = field(default_factory=dict)
    held: dict[int, list[int]] = field(default_factory=dict)
    attention: dict[int, Heard] = field(default_factory=dict)
    recorded: dict[tuple[int, Record], tuple[Layout, Tensor]] = field(default_factory=dict)

    # Set whenever a compressed cache is written.
    ledger: Ledger = None  # type: ignore[assignment]
    past_shift: list[Tensor | None] = field(default_factory=list)
    positions: Tensor = field(default_factory=lambda: torch.empty(0))
    offset: Tensor = field(default_factory=lambda: torch.empty(0))
    memo: dict[Any, Any] = field(default_factory=dict)

    selector: Stopwatch = field(default_factory=Stopwatch)
    lm: Stopwatch = field(default_factory=Stopwatch)
    lm_started: Any = None

    def emit(self, event: Event) -> None:
        """Call every listener with `event`."""
        for listener in self.listeners:
            listener(event)

    def describe_prompt(self, width: int | None = None) -> None:
        """Derive `image`, `grid`, `separator`, `text` and `prompt_length` from spans, mask and
        labels.

        Args:
            width: tokens per row of the prompt, if candidate tokens follow it.
        """
        rows, length = self.valid.shape
        self.image = torch.full((rows, length), -1, device=self.valid.device)
        self.grid = self.image.new_full((rows, length, 3), -1)
        self.separator = torch.zeros_like(self.valid)
        for span in self.spans:
            self.image[span.sample, span.index] = span.ordinal
            self.grid[span.sample, span.index] = span.grid.to(self.grid)
            self.separator[span.sample, span.separators] = True
        place = torch.arange(length, device=self.valid.device)
        is_vision = self.image >= 0
        end = prompt_ends(is_vision, self.labels, width)
        started = is_vision.cumsum(1) > 0
        fed = self.separator.clone()
        for modality in self.features.keys() & self.vision.keys():
            fed |= self.vision[modality]
        self.text = ~fed & self.valid & started & (place < end[:, None])
        self.prompt_length = end.tolist()

    def text_at_the_end(self) -> int:
        """The number of last tokens that are text in every row, which a cache can crop."""
        kept = self.valid & (self.image < 0) & ~self.separator
        return int(kept.flip(1).long().cumprod(1).sum(1).min())

    def rotary_positions(self, number: int) -> Tensor:
        """Rotary positions of this forward's tokens in a layer group.

        Args:
            number: the layer group.

        Returns:
            (b, k), or (axes, b, k) with M-RoPE.
        """
        if self.phase == "decode":
            shift = self.ledger.groups[number].shift
            return self.positions if shift is None else self.positions - shift
        index = self.layout.index
        positions = gather_last(self.positions, index)
        if positions.dim() == 3:
            return positions  # M-RoPE: gaps never close
        positions = positions - gather_last(self.gap.cumsum(1), index)
        shift = self.past_shift[number]
        positions = positions if shift is None else positions - shift
        return positions.clamp_min(0)

    def count_tokens(self, layer: int) -> None:
        """Record the tokens per image that decoder layers process from `layer` on."""
        image = self.image.gather(1, self.layout.index).masked_fill(~self.layout.valid, -1)
        most = max((span.ordinal for span in self.spans), default=-1) + 2
        counts = image.new_zeros(image.shape[0], most)
        counts.scatter_add_(1, image + 1, torch.ones_like(image))
        self.counts[layer] = counts[:, 1:].tolist()
        self.held[layer] = self.layout.valid.sum(1).tolist()

    def gather_blocks(self, length: int) -> Tensor | None:
        """Block numbers of all tokens that a layer group holds.

        Args:
            length: number of tokens that the group holds, those of this forward last.

        Returns:
            (b, length), -1 at cached tokens and padding; `None` if the family has no blocks.
        """
        if self.blocks is None:
            return None
        blocks = self.blocks.gather(1, self.layout.index).masked_fill(~self.layout.valid, -1)
        return torch.nn.functional.pad(blocks, (length - blocks.shape[1], 0), value=-1)

    def samples(self, num_layers: int) -> list[Sample]:
        """The report of this prefill, one sample per row.

        Args:
            num_layers: number of decoder layers.
        """
        totals: dict[int, list[dict[str, Any]]] = {}
        for span in self.spans:
            kept, own = span.signals.kept, span.signals.map
            sizes = {
                "original": len(span.index),
                "encoded": len(span.index if kept is None else kept),
                "passed": span.signals.passed,
                "tiles": own.tiles,
                "patches": own.tile_patches,
                "extent": own.extent,
            }
            totals.setdefault(span.sample, []).append(sizes)
        every = self.valid.sum(1).tolist()
        logits = [logits_of(self.logits_to_keep, int(n)) for n in every]
        fed = (self.valid & ((self.image >= 0) | self.separator)).sum(1).tolist()
        text = [int(n) - v for n, v in zip(every, fed, strict=True)]
        steps = sorted(self.held)
        ends = [*steps[1:], num_layers]
        return [
            Sample(
                text[b],
                tuple(
                    ImageTokens(
                        **sizes,
                        steps=tuple(
                            (layer, rows[b][i]) for layer, rows in sorted(self.counts.items())
                        ),
                        num_layers=num_layers,
                    )
                    for i, sizes in enumerate(totals.get(b, []))
                ),
                tuple(
                    self.held[layer][b]
                    for layer, end in zip(steps, ends, strict=True)
                    for _ in range(layer, end)
                ),
                logits[b],
            )
            for b in range(self.valid.shape[0])
        ]
