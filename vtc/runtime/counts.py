# SPDX-License-Identifier: Apache-2.0
"""How many tokens each decoder layer processes in a prefill."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from vtc.core.prefill import ImageTokens, Sample, logits_of
from vtc.runtime.layout import Layout
from vtc.runtime.prompt import Prompt


@dataclass
class TokenCounts:
    """Tokens from each decoder layer on at which their number changes.

    Attributes:
        images: by layer, for each row the vision tokens of each image.
        held: by layer, for each row all tokens.
        cached: for each row, all tokens that each layer's cache holds after the prefill; `None` if
            no stage took tokens off it.
    """

    images: dict[int, list[list[int]]] = field(default_factory=dict)
    held: dict[int, list[int]] = field(default_factory=dict)
    cached: list[tuple[int, ...]] | None = None

    def note(self, prompt: Prompt, layout: Layout, layer: int) -> None:
        """Record the tokens that decoder layers process from `layer` on.

        Args:
            prompt: the sequence before compression.
            layout: the tokens held.
            layer: 0-based decoder layer.
        """
        image = prompt.image.gather(1, layout.index).masked_fill(~layout.valid, -1)
        most = max((span.ordinal for span in prompt.spans), default=-1) + 2
        counts = image.new_zeros(image.shape[0], most)
        counts.scatter_add_(1, image + 1, image.new_ones(()).expand_as(image))
        self.images[layer] = counts[:, 1:].tolist()
        self.held[layer] = layout.valid.sum(1).tolist()

    def samples(self, prompt: Prompt, num_layers: int, logits_to_keep: Any) -> list[Sample]:
        """The report of a prefill, one sample per row.

        Args:
            prompt: the sequence before compression.
            num_layers: number of decoder layers.
            logits_to_keep: as given to the model.

        Returns:
            One sample per row.
        """
        totals: dict[int, list[dict[str, Any]]] = {}
        for span in prompt.spans:
            kept, own = span.signals.kept, span.signals.map
            sizes = {
                "original": len(span.index),
                "encoded": len(span.index if kept is None else kept),
                "passed": tuple(map(sum, zip(*span.signals.passed, strict=True))),
                "passed_by_tile": span.signals.passed,
                "tiles": own.tiles,
                "patches": own.tile_patches,
                "extent": own.extent,
            }
            totals.setdefault(span.sample, []).append(sizes)
        every = prompt.valid.sum(1).tolist()
        fed = (prompt.valid & ((prompt.image >= 0) | prompt.separator)).sum(1).tolist()
        steps = sorted(self.held)
        ends = [*steps[1:], num_layers]
        return [
            Sample(
                int(every[b]) - fed[b],
                tuple(
                    ImageTokens(
                        **sizes,
                        steps=tuple(
                            (layer, rows[b][i]) for layer, rows in sorted(self.images.items())
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
                logits_of(logits_to_keep, int(every[b])),
                None if self.cached is None else self.cached[b],
            )
            for b in range(len(every))
        ]
