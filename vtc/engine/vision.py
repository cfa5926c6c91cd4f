# SPDX-License-Identifier: Apache-2.0
"""The vision side of a patched model: fewer pixels, signals from the tower, images in a prompt."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from vtc.families import Backbone, Family, UnsupportedModelError
from vtc.methods.base import Method

from . import taps
from .encoder import EncoderSide, Merged
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
        mergers = [m for m in method.parts if "encoder" in m.stages]
        if len(mergers) > 1 or (mergers and (reducers or method.parts[0] is not mergers[0])):
            raise ValueError(f"method: in {method} merging in the tower must come first, and once")
        self.merger = EncoderSide(family, backbone, mergers[0]) if mergers else None
        self.tower_layers: set[int] = set()
        self.reads_encoder = False
        for part in method.parts:
            if "sequence" not in part.stages:
                continue
            for layer in layers_read(part):
                self.tower_layers.add(self.tower_layer(part, layer))
            if "encoder" in part.needs:
                if family.projector(backbone) is None:
                    raise UnsupportedModelError(
                        f"model: {part.name} reads what the projector receives, and vtc knows no "
                        f"projector of {type(backbone.model).__name__}"
                    )
                self.reads_encoder = True
        if self.merger is not None and (self.tower_layers or self.reads_encoder):
            raise ValueError(
                f"method: in {method} patches are merged in the tower, after which its attention "
                "no longer maps onto vision tokens, which another part reads"
            )
        self.taps: dict[int, taps.Tap] = {}
        self.handles: list[Any] = []
        self.forget()

    def forget(self) -> None:
        self.listening = False
        self.cls_states: Tensor | None = None
        self.encoder_states: Tensor | None = None
        self.signals: Any = WeakTensorKeyDictionary()
        self.clock, self.heard = Stopwatch(), Stopwatch()

    def __getstate__(self) -> dict[str, Any]:
        state = self.__dict__.copy()
        for name in ("signals", "clock", "heard", "listening", "cls_states", "encoder_states"):
            del state[name]
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.forget()

    def tower_layer(self, part: Method, layer: int | float) -> int:
        """The 0-based tower layer that `part` means by `layer`."""
        count = len(self.family.tower_attention(self.backbone))
        place = int(layer * count) if isinstance(layer, float) else layer
        if not -count <= place < count:
            raise ValueError(
                f"{part.name}: reads vision layer {layer}, but the tower of "
                f"{type(self.backbone.model).__name__} has {count}"
            )
        return place % count

    def install(self) -> None:
        for layer in self.tower_layers:
            modules = self.family.tower_attention(self.backbone)
            self.taps[layer] = taps.install(modules[layer])
        if self.merger is not None:
            self.merger.install()
        if self.reads_encoder:
            projector: Any = self.family.projector(self.backbone)
            self.handles = [
                self.backbone.tower.register_forward_hook(self._leave_tower),
                projector.register_forward_hook(self._leave_projector),
            ]

    def _leave_tower(self, module: Any, args: Any, output: Any) -> None:
        if self.listening:
            self.cls_states = self.family.cls_states(self.backbone, output)

    def _leave_projector(self, module: Any, args: Any, output: Tensor) -> None:
        if not self.listening:
            return
        if args[0].shape[:-1] != output.shape[:-1]:
            raise UnsupportedModelError(
                f"model: the projector of {type(self.backbone.model).__name__} mixes patches, "
                f"and {self.method} reads one patch state for each vision token"
            )
        # With its gradient: merged states are contents, not only a signal.
        self.encoder_states = args[0]

    def project(self, states: Tensor) -> Tensor:
        """The projector, on patch states (k, d_v) of one image."""
        projector: Any = self.family.projector(self.backbone)
        return projector(states[None])[0]

    def uninstall(self) -> None:
        for handle in self.handles:
            handle.remove()
        self.handles = []
        if self.merger is not None:
            self.merger.uninstall()
        for tap in self.taps.values():
            tap.remove()
        self.taps = {}
        self.forget()

    def take_clocks(self) -> tuple[Stopwatch, Stopwatch]:
        """The time spent encoding since this was last asked, and of it that of listening."""
        clocks = self.clock, self.heard
        self.clock, self.heard = Stopwatch(), Stopwatch()
        return clocks

    def encode(self, original: Callable[..., Any], kwargs: dict[str, Any]) -> Any:
        """`get_image_features`, on fewer pixels if the method says so, with the tower tapped."""
        device = next(self.backbone.base.parameters()).device
        self.clock, self.heard = Stopwatch(), Stopwatch()
        has_cls = bool(self.taps) and self.family.has_cls(self.backbone)
        for tap in self.taps.values():
            taps.listen_tower(tap, has_cls, self.heard)
        started = self.clock.start(device)
        self.listening, self.cls_states, self.encoder_states = True, None, None
        reductions: list[tuple[tuple[int, int], tuple[int, int]]] | None = None
        merged: list[Merged] = []
        try:
            if self.reducer is not None:
                pixels = kwargs.pop("pixel_values")
                out, reductions = self.family.downsampled_features(
                    self.backbone, original, pixels, self.reducer, kwargs
                )
            elif self.merger is not None and not self.merger.method.keeps_all:
                out, merged = self.merger.encode(original, kwargs)
            else:
                out = original(**kwargs)
        finally:
            self.listening = False
            self.clock.stop(started, device)
            for tap in self.taps.values():
                tap.armed = None
        image_sizes = kwargs.get("image_sizes")
        found, signals = [], []
        for i, features in enumerate(out.pooler_output):
            kept = None
            if reductions is not None and reductions[i][0] != reductions[i][1]:
                features, kept = _spread(features, *reductions[i])
            elif merged and len(merged[i].places) < merged[i].original:
                kept = merged[i].places
                whole = features.new_zeros(merged[i].original, features.shape[1])
                whole[kept] = features
                features = whole
            height_width = None
            if image_sizes is not None:
                height_width = (int(image_sizes[i][0]), int(image_sizes[i][1]))
            signals.append(
                ImageSignals(
                    grid=self.family.grid(self.backbone, len(features), height_width),
                    kept=kept,
                    passed=merged[i].counts if merged else (),
                    tower=self._tower_signals(i, len(features) if kept is None else len(kept)),
                    **self._encoder_signals(i, len(features) if kept is None else len(kept)),
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
        self.cls_states = self.encoder_states = None
        return out

    def _tower_signals(self, image: int, n: int) -> dict[int, taps.TowerSignals]:
        signals = {}
        for layer in self.tower_layers:
            heard = self.taps[layer].captured[image]
            prefix = len(heard.attention) - n
            if prefix not in (0, 1):
                raise RuntimeError(
                    f"the vision tower has {len(heard.attention)} tokens for {n} vision tokens: "
                    f"its attention does not map onto them, and {self.method} needs it"
                )
            signals[layer] = heard.without(prefix)
        return signals

    def _encoder_signals(self, image: int, n: int) -> dict[str, Any]:
        if not self.reads_encoder:
            return {}
        states, cls = self.encoder_states, self.cls_states
        if states is None or states.dim() != 3 or states.shape[1] != n:
            shape = None if states is None else tuple(states.shape)
            raise RuntimeError(
                f"the projector received {shape} for {n} vision tokens of an image: its input does "
                f"not map onto them, and {self.method} needs it"
            )
        return {"encoder": states[image], "cls": None if cls is None else cls[image]}

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
                if self.tower_layers or self.reads_encoder or self.shortens is not None:
                    raise ValueError(
                        f"mm_encoder_outputs: {self.method} reads the vision tower, and these "
                        "features did not come from get_image_features of the patched model"
                    )
                signals = ImageSignals(self.family.grid(self.backbone, size, None))
            spans.append(ImageSpan(b, seen[b], place[start : start + size], signals))
            seen[b] += 1
            start += size
        return spans

    @property
    def shortens(self) -> Method | None:
        """The method after which the tower makes fewer tokens, if there is one."""
        return self.reducer if self.merger is None else self.merger.method

    def mark_uncoded(self, forward: Forward) -> None:
        """Note the gaps of tokens that the tower never made, if gaps are to close."""
        if self.shortens is None or self.shortens.positions != "contiguous":
            return
        for span in forward.spans:
            if span.signals.kept is not None:
                gone = torch.ones(len(span.index), dtype=torch.bool, device=span.index.device)
                gone[span.signals.kept.to(gone.device)] = False
                forward.gap[span.sample, span.index[gone]] = True


def layers_read(method: Method) -> list[int | float]:
    """The tower layers that the sequence stage of `method` reads, as it names them."""
    layers: list[int | float] = []
    if method.needs & {"cls_attention", "cls_query", "keys"}:
        layers.append(method.vision_layer)
    if "low_attention" in method.needs:
        layers.append(method.low_layer)
    return layers


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
