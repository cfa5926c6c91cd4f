# SPDX-License-Identifier: Apache-2.0
"""What a patch measured: tokens per image and layer, times, FLOPs and bytes."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from typing import Any, ClassVar

import torch

from vtc.core.figures import counted, three_digits


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
        self._host_ms = 0.0
        self._events.clear()

    def copy(self) -> Stopwatch:
        """A copy; does not wait for a device, unlike `ms`."""
        made = Stopwatch()
        made._host_ms, made._events = self._host_ms, list(self._events)
        return made

    def start(self, device: torch.device) -> Any:
        if device.type == "cuda":
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            return event
        return Stopwatch.host()

    def stop(self, started: Any, device: torch.device) -> None:
        if device.type == "cuda":
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self._events.append((started, event))
        else:
            self._host_ms += (Stopwatch.host() - started) * 1e3

    @contextmanager
    def measure(self, device: torch.device) -> Iterator[None]:
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
        passed: patches that entered each tower layer and left the last, if they were merged there.
        tiles: tiles (or frames) that the tower ran on, including padding, or `None` if unknown.
        patches: patches per tile, or `None` if as in the configuration.
        extent: (frames, rows, columns) of its vision tokens, or `None` if they do not fill a block.
    """

    original: int
    encoded: int
    steps: tuple[tuple[int, int], ...]
    num_layers: int
    passed: tuple[int, ...] = ()
    tiles: int | None = None
    patches: int | None = None
    extent: tuple[int, int, int] | None = None

    @property
    def ran_on(self) -> tuple[int, ...] | None:
        """Patches per tile by tower layer, or `None` if as in the configuration."""
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
    """

    text_tokens: int
    images: tuple[ImageTokens, ...]
    lengths: tuple[int, ...]
    logits: int = 1


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
        return max(self.vision.ms - self.heard.ms, 0.0)

    @property
    def selector_ms(self) -> float:
        return self.heard.ms + self.selector.ms

    @property
    def lm_ms(self) -> float:
        return max(self.lm.ms - self.selector.ms, 0.0)


class Report:
    """All prefills since patching or `reset`, at most the last 100,000.

    Token counts are means over images, times means over prefills, FLOPs and bytes means over
    samples. They are `nan` before the first image.
    """

    def __init__(self, config: Any) -> None:
        self._config = config
        self._prefills: deque[Prefill] = deque(maxlen=100_000)

    def reset(self) -> None:
        self._prefills.clear()

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
        return [sample for prefill in self.prefills for sample in prefill.samples]

    @property
    def images(self) -> list[ImageTokens]:
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
        return _mean([prefill.vision_ms for prefill in self.prefills])

    @property
    def selector_ms(self) -> float:
        return _mean([prefill.selector_ms for prefill in self.prefills])

    @property
    def lm_ms(self) -> float:
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
                kv_bytes(self._config, sample.lengths, prefill.bytes_per_value)
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
            f"{three_digits(self.kv_bytes / 2**20)} MiB of keys and values"
        )

    __repr__ = __str__


def logits_of(logits_to_keep: Any, tokens: int) -> int:
    """Positions out of `tokens` for which the output head runs.

    Args:
        logits_to_keep: as given to the model: the number of last positions, 0 for all, a vector of
            positions, or `None` if no head runs.
        tokens: length of the sequence.
    """
    if logits_to_keep is None:
        return 0
    if isinstance(logits_to_keep, torch.Tensor):
        return logits_to_keep.numel()
    return min(int(logits_to_keep), tokens) or tokens


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
