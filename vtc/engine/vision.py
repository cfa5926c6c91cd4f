# SPDX-License-Identifier: Apache-2.0
"""The vision side of a patched model: fewer pixels, signals from the tower, images in a prompt."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from vtc.families import Backbone, Family
from vtc.methods.base import Method

from . import taps
from .forward import Forward, ImageSignals, ImageSpan
from .report import Stopwatch


class VisionSide:
    """Runs the encoder for `method`, and remembers what it saw of each image.

    Under `generate` the encoder runs before the model's forward, and beam search repeats its
    features; signals are therefore found by the feature tensor they belong to.
    """

    def __init__(self, family: Family, backbone: Backbone, method: Method) -> None:
        self.family, self.backbone, self.method = family, backbone, method
        reducers = [m for m in method.parts if "pixels" in m.stages]
        if len(reducers) > 1 or (reducers and method.parts[0] is not reducers[0]):
            raise ValueError(f"method: in {method} a reduction of pixels must come first, and once")
        self.reducer: Any = reducers[0] if reducers else None
        if self.reducer is not None:
            family.check_pixels(backbone)
        self.tower_layers: set[int] = set()
        for part in method.parts:
            if "sequence" in part.stages and part.needs & {"cls_attention", "keys"}:
                count = len(family.tower_attention(backbone))
                if not -count <= part.vision_layer < count:
                    raise ValueError(
                        f"{part.name}: reads vision layer {part.vision_layer}, but the tower of "
                        f"{type(backbone.model).__name__} has {count}"
                    )
                self.tower_layers.add(part.vision_layer)
        self.taps: dict[int, taps.Tap] = {}
        self.forget()

    def forget(self) -> None:
        self.signals: Any = WeakTensorKeyDictionary()
        self.clock = Stopwatch()

    def __getstate__(self) -> dict[str, Any]:
        state = self.__dict__.copy()
        del state["signals"], state["clock"]
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.forget()

    def install(self) -> None:
        for layer in self.tower_layers:
            modules = self.family.tower_attention(self.backbone)
            if (place := layer % len(modules)) not in self.taps:
                self.taps[place] = taps.install(modules[place])

    def uninstall(self) -> None:
        for tap in self.taps.values():
            tap.remove()
        self.taps = {}
        self.forget()

    def take_clock(self) -> Stopwatch:
        """The time spent encoding since this was last asked."""
        clock, self.clock = self.clock, Stopwatch()
        return clock

    def encode(self, original: Callable[..., Any], kwargs: dict[str, Any]) -> Any:
        """`get_image_features`, on fewer pixels if the method says so, with the tower tapped."""
        device = next(self.backbone.base.parameters()).device
        self.clock = Stopwatch()
        has_cls = bool(self.taps) and self.family.has_cls(self.backbone)
        for tap in self.taps.values():
            taps.listen_tower(tap, has_cls, self.clock)
        # The taps' own time counts here: it cannot be told from the tower's without a stop.
        started = self.clock.start(device)
        reductions: list[tuple[tuple[int, int], tuple[int, int]]] | None = None
        try:
            if self.reducer is not None:
                pixels = kwargs.pop("pixel_values")
                out, reductions = self.family.downsampled_features(
                    self.backbone, original, pixels, self.reducer, kwargs
                )
            else:
                out = original(**kwargs)
        finally:
            self.clock.stop(started, device)
            for tap in self.taps.values():
                tap.armed = None
        image_sizes = kwargs.get("image_sizes")
        found, signals = [], []
        for i, features in enumerate(out.pooler_output):
            kept = None
            if reductions is not None and reductions[i][0] != reductions[i][1]:
                features, kept = _spread(features, *reductions[i])
            height_width = None
            if image_sizes is not None:
                height_width = (int(image_sizes[i][0]), int(image_sizes[i][1]))
            signals.append(
                ImageSignals(
                    grid=self.family.grid(self.backbone, len(features), height_width),
                    kept=kept,
                    tower=self._tower_signals(i, len(features) if kept is None else len(kept)),
                )
            )
            found.append(features)
        # Models take a list, or one tensor of all images; each goes back as it came.
        if isinstance(out.pooler_output, Tensor):
            out.pooler_output = torch.stack(found) if reductions else out.pooler_output
            self.signals[out.pooler_output] = signals
        else:
            out.pooler_output = found
            for features, of_one in zip(found, signals, strict=True):
                self.signals[features] = [of_one]
        for tap in self.taps.values():
            tap.captured = []
        return out

    def _tower_signals(self, image: int, n: int) -> dict[int, tuple[Tensor, Tensor]]:
        signals = {}
        for layer in self.tower_layers:
            count = len(self.family.tower_attention(self.backbone))
            attention, keys = self.taps[layer % count].captured[image]
            prefix = len(attention) - n
            if prefix not in (0, 1):
                raise RuntimeError(
                    f"the vision tower has {len(attention)} tokens for {n} vision tokens: its "
                    f"attention does not map onto them, and {self.method} needs it"
                )
            signals[layer] = (attention[prefix:], keys[prefix:])
        return signals

    def spans(self, forward: Forward) -> list[ImageSpan]:
        """The images of this forward by sample, in the order in which they stand."""
        assert forward.vision is not None
        sample, place = forward.vision.expand_as(forward.valid).nonzero(as_tuple=True)
        given = forward.features if forward.features is not None else []
        sizes = [len(features) for features in given]
        if isinstance(given, Tensor):
            known = self.signals.get(given, [None] * len(sizes))
        else:
            known = [self.signals.get(features, [None])[0] for features in given]
        if sum(sizes) != len(place):
            raise RuntimeError(
                f"{len(place)} vision tokens in the prompt, but {sum(sizes)} vision features in "
                f"{len(sizes)} images: vtc cannot tell which image a token belongs to"
            )
        spans, seen = [], [0] * len(forward.valid)
        start = 0
        rows = sample.tolist()
        for signals, size in zip(known, sizes, strict=True):
            b = rows[start]
            if signals is None:
                if self.tower_layers or self.reducer is not None:
                    raise ValueError(
                        f"mm_encoder_outputs: {self.method} reads the vision tower, and these "
                        "features did not come from get_image_features of the patched model"
                    )
                signals = ImageSignals(self.family.grid(self.backbone, size, None))
            spans.append(ImageSpan(b, seen[b], place[start : start + size], signals))
            seen[b] += 1
            start += size
        return spans

    def mark_uncoded(self, forward: Forward) -> None:
        """Note the gaps that tokens left which fewer pixels never made, if gaps are to close."""
        if self.reducer is None or self.reducer.positions != "contiguous":
            return
        for span in forward.spans:
            if span.signals.kept is not None:
                gone = torch.ones(len(span.index), dtype=torch.bool, device=span.index.device)
                gone[span.signals.kept.to(gone.device)] = False
                forward.gap[span.sample, span.index[gone]] = True


def _spread(
    features: Tensor, size: tuple[int, int], reduced: tuple[int, int]
) -> tuple[Tensor, Tensor]:
    """Put features (r * c, d) at the nearest places of a full grid.

    Returns:
        (rows * columns, d) with zeros elsewhere, and the (r * c,) places that are filled.
    """
    (rows, columns), (r, c) = size, reduced
    row = ((torch.arange(r) + 0.5) * rows / r).long()
    column = ((torch.arange(c) + 0.5) * columns / c).long()
    kept = (row[:, None] * columns + column).flatten().to(features.device)
    full = features.new_zeros(rows * columns, features.shape[1])
    full[kept] = features
    return full, kept
