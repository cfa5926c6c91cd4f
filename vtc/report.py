# SPDX-License-Identifier: Apache-2.0
"""What a patch measured: tokens per image and layer, times, FLOPs and bytes."""

from __future__ import annotations

import math
from collections import deque
from dataclasses import asdict
from itertools import pairwise
from typing import Any

from vtc.core.events import Event, Prefilled
from vtc.core.figures import counted, three_digits
from vtc.core.prefill import ImageTokens, Prefill, Sample


class Report:
    """All prefills since patching or `reset`, at most the last 100,000.

    Token counts are means over images, times means over prefills, FLOPs and bytes means over
    samples. They are `nan` before the first image.
    """

    def __init__(self, config: Any) -> None:
        self._config = config
        self._prefills: deque[Prefill] = deque(maxlen=100_000)

    def reset(self) -> None:
        """Forget all prefills."""
        self._prefills.clear()

    def hear(self, event: Event) -> None:
        """Add the prefill that `event` reports; other events are ignored."""
        if isinstance(event, Prefilled):
            self.add(event.prefill)

    def add(self, prefill: Prefill) -> None:
        """Add a prefill."""
        if self._prefills:
            # Its events have finished by now; a server must not accumulate them.
            last = self._prefills[-1]
            for clock in (last.vision, last.heard, last.selector, last.lm):
                clock.settle()
        self._prefills.append(prefill)

    @property
    def prefills(self) -> list[Prefill]:
        """One entry per forward with images, oldest first."""
        return list(self._prefills)

    @property
    def samples(self) -> list[Sample]:
        """All rows of all prefills."""
        return [sample for prefill in self.prefills for sample in prefill.samples]

    @property
    def images(self) -> list[ImageTokens]:
        """All images of all prefills."""
        return [image for sample in self.samples for image in sample.images]

    @property
    def tokens_in(self) -> float:
        """Vision tokens of an image before compression."""
        return _mean([image.original for image in self.images])

    @property
    def tokens_out(self) -> float:
        """Vision tokens of an image that enter the first decoder layer."""
        return _mean([image.per_layer[0] for image in self.images])

    @property
    def tokens_per_layer(self) -> list[float]:
        """Vision tokens of an image that each decoder layer processes."""
        return [_mean(list(c)) for c in zip(*(i.per_layer for i in self.images), strict=True)]

    @property
    def equivalent_tokens(self) -> float:
        """Vision tokens of an image, averaged over the decoder layers."""
        return _mean(self.tokens_per_layer)

    @property
    def vision_ms(self) -> float:
        """Milliseconds of the tower and the projector in a prefill."""
        return _mean([prefill.vision_ms for prefill in self.prefills])

    @property
    def selector_ms(self) -> float:
        """Milliseconds of the methods, with what is captured for them, in a prefill."""
        return _mean([prefill.selector_ms for prefill in self.prefills])

    @property
    def lm_ms(self) -> float:
        """Milliseconds of the language model in a prefill."""
        return _mean([prefill.lm_ms for prefill in self.prefills])

    @property
    def flops(self) -> dict[str, float]:
        """FLOPs of one sample's prefill: "vision", "projector" and "lm"; see `vtc.cost`.

        They count the tiles, windows, clips and lengths that ran, and the output head at the
        positions it ran for. Not counted: the selector (`vtc.cost.selector_flops`),
        padding of shorter rows and smaller images in a batch, and attention to a cache from earlier
        turns. `nan` for a part without a formula.
        """
        from vtc.cost import prefill_flops

        costs = []
        for sample in self.samples:
            if not sample.images:
                continue
            tiles = [image.tiles for image in sample.images]
            found = prefill_flops(
                self._config,
                sample.lengths,
                [image.original for image in sample.images],
                tiles=None if None in tiles else tiles,  # type: ignore[arg-type]
                grids=[image.extent for image in sample.images],
                patches=[image.ran_on for image in sample.images],
                logits=sample.logits,
            )
            costs.append(asdict(found))
        return {
            part: _mean([cost[part] for cost in costs]) for part in ("vision", "projector", "lm")
        }

    @property
    def kv_bytes(self) -> float:
        """Bytes of one sample's cache after prefill, in the model's precision."""
        from vtc.cost import kv_bytes

        return _mean(
            [
                kv_bytes(self._config, sample.cached or sample.lengths, prefill.bytes_per_value)
                for prefill in self.prefills
                for sample in prefill.samples
                if sample.images
            ]
        )

    def to_dict(self) -> dict[str, Any]:
        """All figures, ready for JSON."""
        return {
            "prefills": len(self.prefills),
            "images": len(self.images),
            "tokens_in": self.tokens_in,
            "tokens_out": self.tokens_out,
            "tokens_per_layer": self.tokens_per_layer,
            "equivalent_tokens": self.equivalent_tokens,
            "vision_ms": self.vision_ms,
            "selector_ms": self.selector_ms,
            "lm_ms": self.lm_ms,
            "flops": self.flops,
            "kv_bytes": self.kv_bytes,
        }

    def __str__(self) -> str:
        if not self.images:
            return "no image seen yet"
        steps = [f"{self.tokens_per_layer[0]:.1f} from layer 0"]
        for layer, (before, now) in enumerate(pairwise(self.tokens_per_layer), start=1):
            if now != before:
                steps.append(f"{now:.1f} from layer {layer}")
        return (
            f"{counted(len(self.images), 'image')} in {counted(len(self.prefills), 'prefill')}\n"
            f"vision tokens an image: {self.tokens_in:.0f} before; {', '.join(steps)}; "
            f"{self.equivalent_tokens:.1f} on average over the layers\n"
            f"a prefill: vision {self.vision_ms:.1f} ms, selector {self.selector_ms:.1f} ms, "
            f"language model {self.lm_ms:.1f} ms\n"
            f"a sample: {_operations(self.flops)}; "
            f"{_mebibytes(self.kv_bytes)} of keys and values"
        )

    __repr__ = __str__


def _mebibytes(value: float) -> str:
    return "unknown MiB" if math.isnan(value) else f"{three_digits(value / 2**20)} MiB"


def _operations(flops: dict[str, float]) -> str:
    """The FLOPs of each part in one unit."""
    names = {"vision": "vision", "projector": "projector", "lm": "language model"}
    known = {names[part]: value for part, value in flops.items() if not math.isnan(value)}
    scale, unit = (1e12, "TFLOPs") if max(known.values(), default=0) >= 1e12 else (1e9, "GFLOPs")
    listed = ", ".join(f"{name} {three_digits(value / scale)}" for name, value in known.items())
    unknown = [name for name in names.values() if name not in known]
    note = f" ({', '.join(unknown)} not known)" if unknown else ""
    return f"{listed} {unit}{note}" if known else "FLOPs not known"


def _mean(values: list[Any]) -> float:
    return float(sum(values)) / len(values) if values else float("nan")
