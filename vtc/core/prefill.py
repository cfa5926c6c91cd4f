# SPDX-License-Identifier: Apache-2.0
"""What is measured of one forward with images: tokens by image and layer, and times."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

if TYPE_CHECKING:
    import torch

__all__ = ["ImageTokens", "Prefill", "Sample", "Stopwatch", "logits_of"]


class Stopwatch:
    """Sums the milliseconds of measured intervals; on a GPU with events, without synchronising.

    Class attributes:
        host: clock in seconds on a CPU; a benchmark may count process time instead.
    """

    host: ClassVar[Callable[[], float]] = staticmethod(time.perf_counter)

    def __init__(self) -> None:
        self._host_ms = 0.0
        self._events: list[tuple[Any, Any]] = []

    def reset(self) -> None:
        """Start from 0."""
        self._host_ms = 0.0
        self._events.clear()

    def copy(self) -> Stopwatch:
        """A copy; does not wait for a device, unlike `ms`."""
        made = Stopwatch()
        made._host_ms, made._events = self._host_ms, list(self._events)
        return made

    def start(self, device: torch.device) -> Any:
        """Begin an interval on `device`; returns what `stop` takes."""
        if device.type == "cuda":
            import torch

            event = torch.cuda.Event(enable_timing=True)
            event.record()
            return event
        return Stopwatch.host()

    def stop(self, started: Any, device: torch.device) -> None:
        """End the interval that `started`."""
        if device.type == "cuda":
            import torch

            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self._events.append((started, event))
        else:
            self._host_ms += (Stopwatch.host() - started) * 1e3

    @contextmanager
    def measure(self, device: torch.device) -> Iterator[None]:
        """Context of an interval on `device`."""
        started = self.start(device)
        try:
            yield
        finally:
            self.stop(started, device)

    def settle(self) -> None:
        """Turn events into milliseconds; waits for unfinished ones."""
        for first, last in self._events:
            last.synchronize()
            self._host_ms += first.elapsed_time(last)
        self._events.clear()

    @property
    def ms(self) -> float:
        """Milliseconds so far; waits for unfinished events."""
        self.settle()
        return self._host_ms

    def __getstate__(self) -> dict[str, Any]:
        # Events belong to a device and a process; copies and pickles hold the sum.
        return {"_host_ms": self.ms, "_events": []}


@dataclass(frozen=True)
class ImageTokens:
    """Token counts of one image.

    Attributes:
        original: its vision tokens before compression.
        encoded: those from the vision tower; fewer with fewer pixels or merged patches.
        steps: (layer, count) pairs: from decoder layer `layer` on, `count` tokens are left.
        num_layers: number of decoder layers.
        passed: patches that entered each tower layer and left the last, if they were merged there;
            of all tiles together.
        passed_by_tile: the same for each tile.
        tiles: tiles (or frames) that the tower ran on, including padding, or `None` if unknown.
        patches: patches per tile, or `None` if as in the configuration.
        extent: (frames, rows, columns) of its vision tokens, or `None` if they do not fill a block.
    """

    original: int
    encoded: int
    steps: tuple[tuple[int, int], ...]
    num_layers: int
    passed: tuple[int, ...] = ()
    passed_by_tile: tuple[tuple[int, ...], ...] = ()
    tiles: int | None = None
    patches: int | None = None
    extent: tuple[int, int, int] | None = None

    @property
    def ran_on(self) -> tuple[int, ...] | tuple[tuple[int, ...], ...] | None:
        """Patches per tile by tower layer, for each tile if they were merged, or `None` if as in
        the configuration."""
        if self.passed_by_tile:
            return self.passed_by_tile
        if self.passed:
            return self.passed
        own = self.encoded if self.encoded != self.original else self.patches
        return None if own is None else (own,)

    @property
    def per_layer(self) -> tuple[int, ...]:
        """Vision tokens that each decoder layer processed."""
        ends = [layer for layer, _ in self.steps[1:]] + [self.num_layers]
        return tuple(
            count
            for (start, count), end in zip(self.steps, ends, strict=True)
            for _ in range(start, end)
        )


@dataclass(frozen=True)
class Sample:
    """One row of a batch at prefill.

    Attributes:
        text_tokens: all tokens except vision tokens and row separators.
        images: its images.
        lengths: all tokens that each decoder layer processed; for a cross-attention layer
            the vision states that it read.
        logits: positions for which the output head ran.
        cached: all tokens that the cache of each layer holds after the prefill, where tokens were
            taken off it; `None` if it holds `lengths`.
    """

    text_tokens: int
    images: tuple[ImageTokens, ...]
    lengths: tuple[int, ...]
    logits: int = 1
    cached: tuple[int, ...] | None = None


@dataclass
class Prefill:
    """One forward with images. Times are for the whole batch, in milliseconds.

    `lm_ms` is the language model and `vision_ms` the tower and the projector, both without the
    selector; `selector_ms` includes the attention rows computed for it. `bytes_per_value` follows
    the language model's precision. The clocks `vision` and `lm` also run during `heard` (captures
    in the tower) and `selector`.
    """

    samples: list[Sample]
    bytes_per_value: int
    vision: Stopwatch = field(repr=False)
    heard: Stopwatch = field(repr=False)
    selector: Stopwatch = field(repr=False)
    lm: Stopwatch = field(repr=False)

    @property
    def vision_ms(self) -> float:
        """Milliseconds of the tower and the projector."""
        return max(self.vision.ms - self.heard.ms, 0.0)

    @property
    def selector_ms(self) -> float:
        """Milliseconds of the methods and of what was captured for them."""
        return self.heard.ms + self.selector.ms

    @property
    def lm_ms(self) -> float:
        """Milliseconds of the language model."""
        return max(self.lm.ms - self.selector.ms, 0.0)


def logits_of(logits_to_keep: Any, tokens: int) -> int:
    """Positions out of `tokens` for which the output head runs.

    Args:
        logits_to_keep: as given to the model: the number of last positions, 0 for all, a vector of
            positions, or `None` if no head runs.
        tokens: length of the sequence.
    """
    if logits_to_keep is None:
        return 0
    if hasattr(logits_to_keep, "numel"):
        return int(logits_to_keep.numel())
    return min(int(logits_to_keep), tokens) or tokens
