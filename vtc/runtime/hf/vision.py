# SPDX-License-Identifier: Apache-2.0
"""The vision side of a patched model: reduced pixels, tower signals, images of a prompt."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from vtc.core import Method
from vtc.core.images import ImageMap, Modality
from vtc.core.signals import read_at
from vtc.models import Adapter, UnsupportedModelError
from vtc.report import Stopwatch
from vtc.runtime.forward import Forward
from vtc.runtime.hf import taps
from vtc.runtime.hf.encoder import EncoderSide, Merged
from vtc.runtime.hf.images import SeenImages, stacked
from vtc.runtime.signals import ImageSignals, ImageSpan, TowerSignals


class VisionSide:
    """Runs the encoder, on fewer pixels or patches if `method` says so, and captures its signals.

    Args:
        adapter: bound to the model.
        method: what to run.

    Attributes:
        images: the captured signals, by image.

    Raises:
        ValueError: pixel reduction or merging in the tower is not the first part, appears twice,
            or another part reads a tower that merges.
        UnsupportedModelError: the method reads what vtc cannot capture in this model.
    """

    def __init__(self, adapter: Adapter, method: Method) -> None:
        self.adapter, self.method = adapter, method
        reducers = [m for m in method.parts if "pixels" in m.stages]
        if len(reducers) > 1 or (reducers and method.parts[0] is not reducers[0]):
            raise ValueError(f"method: in {method} a reduction of pixels must come first, and once")
        self.reducer: Any = reducers[0] if reducers else None
        if self.reducer is not None:
            adapter.check_pixels({})
        mergers = [m for m in method.parts if "encoder" in m.stages]
        if len(mergers) > 1 or (mergers and (reducers or method.parts[0] is not mergers[0])):
            raise ValueError(f"method: in {method} merging in the tower must come first, and once")
        self.merger = EncoderSide(adapter, mergers[0]) if mergers else None
        self.reads_encoder = False
        self.tower_layers = self._layers_read()
        for part in method.parts:
            if "sequence" in part.stages and "encoder" in part.needs:
                if adapter.projector() is None or not adapter.projects_patches:
                    raise UnsupportedModelError(
                        f"model: {part.name} reads what the projector receives for each token, and "
                        f"vtc knows no projector of {type(adapter.model).__name__} that makes one "
                        "token of each patch"
                    )
                self.reads_encoder = True
        if self.merger is not None and (self.tower_layers or self.reads_encoder):
            raise ValueError(
                f"method: in {method} patches are merged in the tower, after which its attention "
                "no longer maps onto vision tokens, which another part reads"
            )
        self.forget()

    def _layers_read(self) -> set[int]:
        """The 0-based tower layers that the sequence stage reads."""
        parts = [part for part in self.method.parts if "sequence" in part.stages]
        found = {self.tower_layer(part, layer) for part in parts for layer in layers_read(part)}
        for layer in found:
            module = self.adapter.tower_attention()[layer]
            if foreign := taps.foreign_options(module):
                raise UnsupportedModelError(
                    f"model: {type(module).__name__} attends with {', '.join(foreign)}, which "
                    f"vtc does not follow, and {self.method} reads its attention"
                )
        return found

    def forget(self) -> None:
        """Start with no call in progress and no captured images."""
        self.listening: int | None = None
        """The thread that is encoding, or `None`."""
        self.given: Mapping[str, Any] = {}
        self.taps: dict[int, taps.Tap] = {}
        self.cls_states: Tensor | None = None
        self.encoder_states: Tensor | None = None
        self.images = SeenImages(self.adapter, self.method)
        self.clock, self.heard = Stopwatch(), Stopwatch()

    def exchange(self, under_way: dict[str, Any]) -> dict[str, Any]:
        """Swap the state of the call in progress, so that threads and nested calls do not mix.

        Args:
            under_way: the state to resume, as an earlier call returned it; empty for none.

        Returns:
            The state that was current.
        """
        names = (
            *("listening", "given", "taps", "cls_states", "encoder_states"),
            *("clock", "heard", "adapter", "tower_layers"),
        )
        left = {name: self.__dict__[name] for name in names}
        left["recent"] = self.images.recent
        left["states"] = [(tap.armed, tap.captured) for tap in self.taps.values()]
        for tap in self.taps.values():  # they stay installed, but capture nothing
            tap.armed = None
        images = self.images
        self.forget()
        self.images = images
        for name in under_way.keys() & set(names):
            self.__dict__[name] = under_way[name]
        # Copies, so that the resumed state does not change.
        images.recent, self.taps = dict(under_way.get("recent", {})), dict(self.taps)
        for tap, state in zip(self.taps.values(), under_way.get("states", ()), strict=True):
            tap.armed, tap.captured = state
        return left

    def __getstate__(self) -> dict[str, Any]:
        state = self.__dict__.copy()
        for name in (
            "images",
            "clock",
            "heard",
            "listening",
            "given",
            "taps",
            "cls_states",
            "encoder_states",
        ):
            del state[name]
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.forget()

    def tower_layer(self, part: Method, layer: int | float) -> int:
        """The 0-based tower layer that `part` means.

        Args:
            part: the method that reads the layer.
            layer: an index, negative from the end, or a fraction of the tower's depth.

        Returns:
            An index from 0.

        Raises:
            ValueError: the tower has no such layer.
        """
        count = len(self.adapter.tower_attention())
        place = int(layer * count) if isinstance(layer, float) else layer
        if not -count <= place < count:
            raise ValueError(
                f"{part.name}: reads vision layer {layer}, but the tower of "
                f"{type(self.adapter.model).__name__} has {count}"
            )
        return place % count

    @contextmanager
    def _tapped(self, given: dict[str, Any]) -> Iterator[None]:
        """Tap the current tower and projector for this call only: modules may be replaced between
        calls, and other models may share them."""
        has_cls = self.adapter.has_cls()
        projector: Any = self.adapter.projector()
        handles: list[Any] = []
        self.listening, self.given = threading.get_ident(), given
        self.cls_states = self.encoder_states = None
        try:
            if projector is not None and not all(part.keeps_all for part in self.method.parts):
                handles.append(projector.register_forward_pre_hook(self._enter_projector))
            for layer in self.tower_layers:
                tap = taps.install(self.adapter.tower_attention()[layer])
                self.taps[layer] = tap
                taps.listen_tower(tap, has_cls, self.heard)
            if self.reads_encoder:
                handles += [
                    self.adapter.tower.register_forward_hook(self._leave_tower),
                    projector.register_forward_hook(self._leave_projector),
                ]
            yield
        finally:
            self.listening = None
            for handle in handles:
                handle.remove()
            for tap in self.taps.values():
                tap.remove()

    @torch.compiler.disable
    def _enter_projector(self, module: Any, args: Any) -> Any:
        """Make patch states contiguous. Without [CLS] they are a strided view, except for a single
        image. For a strided input PyTorch adds a linear layer's bias separately and rounds twice,
        so that the features of an image would differ in the last bit between batch sizes."""
        if self.listening != threading.get_ident():
            return None
        return tuple(arg.contiguous() if isinstance(arg, Tensor) else arg for arg in args)

    @torch.compiler.disable
    def _leave_tower(self, module: Any, args: Any, output: Any) -> None:
        if self.listening == threading.get_ident():
            self.cls_states = self.adapter.cls_states(output, self.given)

    @torch.compiler.disable
    def _leave_projector(self, module: Any, args: Any, output: Tensor) -> None:
        if self.listening != threading.get_ident():
            return
        if args[0].shape[:-1] != output.shape[:-1]:
            raise UnsupportedModelError(
                f"model: the projector of {type(self.adapter.model).__name__} mixes patches, "
                f"and {self.method} reads one patch state for each vision token"
            )
        # Keep the gradient: merged states become token contents, not only a signal.
        self.encoder_states = args[0]

    def project(self, states: Tensor) -> Tensor:
        """Run the projector on patch states of one image.

        Args:
            states: (k, d_v) patch states.

        Returns:
            (k, d) features.
        """
        projector: Any = self.adapter.projector()
        return projector(states[None])[0]

    def take_clocks(self) -> tuple[Stopwatch, Stopwatch]:
        """Return and reset the clocks of the last encoding: all of it, and capturing alone."""
        clocks = self.clock, self.heard
        self.clock, self.heard = Stopwatch(), Stopwatch()
        return clocks

    def encode(
        self, modality: Modality, original: Callable[..., Any], kwargs: dict[str, Any]
    ) -> Any:
        """Run `get_image_features` or `get_video_features`, with reduced pixels, merging or a
        tapped tower as the method demands.

        Args:
            modality: "image" or "video".
            original: the model's own function.
            kwargs: its arguments; some are removed or set in place.

        Returns:
            The model's output, a tuple if `return_dict` is false; features of dropped pixels or
            patches are zeros on the full grid.

        Raises:
            UnsupportedModelError: tower patches or projector inputs cannot be matched to tokens.
            RuntimeError: the number of features or patches is not what vtc expects.
        """
        found = self.adapter.bind(self.adapter.model)
        self.adapter = replace(found, tower=found.tower_of(modality))
        self.tower_layers = self._layers_read()
        device = next(found.base.parameters()).device
        self.clock, self.heard = Stopwatch(), Stopwatch()
        wanted = kwargs.pop("return_dict", None)
        if wanted is None:
            wanted = getattr(found.base.config, "return_dict", True)
        given = dict(kwargs)
        kwargs["return_dict"] = True
        started = self.clock.start(device)
        reductions: list[tuple[tuple[int, int], tuple[int, int]]] | None = None
        merged: list[Merged] = []
        try:
            with self._tapped(given):
                if self.reducer is not None:
                    self.adapter.check_pixels(given)
                    pixels = kwargs.pop("pixel_values")
                    out, reductions = self.adapter.downsampled_features(
                        original, pixels, self.reducer, kwargs
                    )
                elif self.merger is not None and not self.merger.method.keeps_all:
                    out, merged = self.merger.encode(self.adapter, given, original, kwargs)
                else:
                    out = original(**kwargs)
            self.clock.stop(started, device)
            if reductions is not None or merged:
                signals = self._fewer(out, reductions, merged, given)
            else:
                features = self.adapter.features(out)
                # The vision clock includes capturing, which the report subtracts.
                with self.clock.measure(device), self.heard.measure(device):
                    signals = self._all(modality, given, features)
        finally:
            self.adapter, self.taps, self.given = found, {}, {}
            self.cls_states = self.encoder_states = None
        self.images.remember(modality, self.adapter.features(out), signals)
        return out if wanted else out.to_tuple()

    def _fewer(
        self,
        out: Any,
        reductions: list[tuple[tuple[int, int], tuple[int, int]]] | None,
        merged: list[Merged],
        given: dict[str, Any],
    ) -> list[list[ImageSignals]]:
        """Signals of a run on fewer pixels or patches; spreads features over the full grid."""
        found, signals, first = [], [], 0
        for i, features in enumerate(out.pooler_output):
            kept = None
            if reductions is not None and reductions[i][0] != reductions[i][1]:
                features, kept = _spread(features, *reductions[i])
            elif merged and len(merged[i].places) < merged[i].original:
                kept = merged[i].places
                whole = features.new_zeros(merged[i].original, features.shape[1])
                whole[kept] = features
                features = whole
            count = len(features) if kept is None else len(kept)
            plain = self.adapter.plain_map(len(features), first, self.adapter._size_of(given, i))
            patches = torch.arange(first, first + count)[:, None]
            signals.append(
                [
                    ImageSignals(
                        map=plain,
                        kept=kept,
                        passed=merged[i].counts if merged else (),
                        **self._read(patches),
                    )
                ]
            )
            first += count
            found.append(features)
        # Return the container type that the model returned: a list, or one tensor.
        if not isinstance(out.pooler_output, Tensor):
            out.pooler_output = found
        elif reductions:
            out.pooler_output = torch.stack(found)
        return signals

    def _all(
        self, modality: Modality, given: dict[str, Any], features: Any
    ) -> list[list[ImageSignals]]:
        """Signals of all images of a call, by element of `features`."""
        maps = self.adapter.image_maps(modality, given, features)
        for own, of_one in zip(features, maps, strict=True):
            count = own.shape[:-1].numel()
            if sum(len(found) for found in of_one) != count:
                raise RuntimeError(
                    f"an image of {type(self.adapter.model).__name__} has {count} features, but "
                    f"vtc knows the places of {sum(len(found) for found in of_one)}"
                )
        if self.taps and type(self.adapter).image_maps is Adapter.image_maps:
            rows = next(iter(self.taps.values())).captured
            prefix = self.adapter.prefix(given)
            heard = sum(len(row.without(prefix).attention) for row in rows)
            tokens = sum(own.shape[:-1].numel() for own in features)
            if heard != tokens:
                raise UnsupportedModelError(
                    f"model: the tower of {type(self.adapter.model).__name__} showed {heard} "
                    f"patches for {tokens} vision tokens, and {self.method} reads one patch for "
                    "each; use a method that does not read the tower"
                )
        order = self.adapter.tower_order(given) if self.taps else None
        return [
            [ImageSignals(map=found, **self._of(found, order, modality)) for found in of_one]
            for of_one in maps
        ]

    def _of(self, found: ImageMap, order: Tensor | None, modality: Modality) -> dict[str, Any]:
        if not (self.taps or self.reads_encoder):
            return {}
        if found.patches is None:
            raise UnsupportedModelError(
                f"model: {self.method} reads the vision tower, whose patches vtc cannot match to "
                f"the vision tokens of these inputs of {type(self.adapter.model).__name__}"
            )
        patches, states, crop = found.patches, found.states, found.crop
        if found.separator is not None:
            patches = patches[~found.separator]
            states = None if states is None else states[~found.separator]
            crop = None if crop is None else crop[~found.separator]
        if order is not None:
            patches = order[patches]
        shown = self._read(patches, crop, states)
        if modality == "video":  # each frame has its own [CLS]; the clip has none
            shown.pop("cls", None)
            shown["tower"] = {
                layer: replace(heard, cls_query=None, cls_key=None)
                for layer, heard in shown.get("tower", {}).items()
            }
        return shown

    def _read(
        self, patches: Tensor, crop: Tensor | None = None, places: Tensor | None = None
    ) -> dict[str, Any]:
        """Tower and projector signals of the tokens of an image, from their patches (n, m), which
        are numbered across tiles. `crop` (n,) is the tile of each token, a row of the tower's
        batch; `places` (n, k) are the projector's rows where they differ from the patches."""
        found: dict[str, Any] = {}
        if self.taps:
            found["tower"] = {
                layer: self._heard(layer, patches, crop) for layer in self.tower_layers
            }
        if self.reads_encoder:
            states, cls = self.encoder_states, self.cls_states
            if states is None or states.dim() != 3 or (places is None and patches.shape[1] != 1):
                shape = None if states is None else tuple(states.shape)
                raise RuntimeError(
                    f"the projector received {shape} for {len(patches)} vision tokens of an image: "
                    f"its input does not map onto them, and {self.method} needs it"
                )
            places = (patches if places is None else places).to(states.device)
            every = states.flatten(0, 1)
            one = places.shape[1] == 1
            found["encoder"] = every[places[:, 0]] if one else every[places].mean(1)
            if cls is not None:
                row = places[:, 0] // states.shape[1]
                found["cls"] = cls[int(row[0])]
                if crop is not None:
                    found["crop_cls"] = cls[_rows_of_tiles(crop, row)]
        return found

    def _heard(self, layer: int, patches: Tensor, crop: Tensor | None) -> TowerSignals:
        prefix = self.adapter.prefix(self.given)
        rows: list[TowerSignals] = self.taps[layer].captured
        rows = [row.without(prefix) for row in rows]
        size = sum(len(row.attention) for row in rows)
        if int(patches.max()) >= size:
            raise RuntimeError(
                f"the vision tower showed {size} patches, and vtc looked for patch "
                f"{int(patches.max())}: its attention does not map onto the vision tokens, and "
                f"{self.method} needs it"
            )
        first, start = 0, int(patches.min())
        while start >= len(rows[first].attention):
            start -= len(rows[first].attention)
            first += 1
        if patches.shape[1] == 1 and start == 0 and len(rows[first].attention) == len(patches):
            return rows[first]  # one grid, one token a patch
        joined = TowerSignals(
            attention=torch.cat([row.attention for row in rows]),
            keys=torch.cat([row.keys for row in rows]),
            # For a tiled image, the [CLS] of the thumbnail.
            cls_query=rows[first].cls_query,
            cls_key=rows[first].cls_key,
            heads=rows[first].heads,
        )
        if crop is not None and rows[first].cls_query is not None:
            of_tiles = _rows_of_tiles(crop, patches[:, 0] // len(rows[first].attention))
            own = [rows[i] for i in of_tiles]
            joined = replace(
                joined,
                crop_query=stacked([row.cls_query for row in own]),
                crop_key=stacked([row.cls_key for row in own]),
            )
        return joined.of(patches)

    def spans(self, forward: Forward) -> list[ImageSpan]:
        """The images of this forward, by sample.

        Args:
            forward: the forward in progress.

        Returns:
            What `SeenImages.spans` returns.

        Raises:
            ValueError: features without signals that the method or the family needs.
            RuntimeError: features that do not match the vision tokens of the samples.
        """
        reads = bool(self.tower_layers) or self.reads_encoder or self.shortens is not None
        return self.images.spans(forward, reads)

    @property
    def shortens(self) -> Method | None:
        """The method that makes the tower emit fewer tokens, or `None`."""
        return self.reducer if self.merger is None else self.merger.method

    def mark_uncoded(self, forward: Forward) -> None:
        """Mark tokens that the tower never made as gaps, if positions are "contiguous".

        Args:
            forward: the forward in progress; its `gap` changes in place.
        """
        if self.shortens is None or self.shortens.positions != "contiguous":
            return
        for span in forward.spans:
            if span.signals.kept is not None:
                gone = torch.ones(len(span.index), dtype=torch.bool, device=span.index.device)
                gone[span.signals.kept.to(gone.device)] = False
                forward.gap[span.sample, span.index[gone]] = True


def layers_read(method: Method) -> list[int | float]:
    """The tower layers that the sequence stage of `method` reads, as the method gives them.

    Args:
        method: a single method.

    Returns:
        The values of its `vision_layer` and `low_layer`, where its needs include what they name.
    """
    named = [layer for layer in ("vision_layer", "low_layer") if method.needs & read_at(layer)]
    return [getattr(method, layer) for layer in named]


def _rows_of_tiles(crop: Tensor, row: Tensor) -> list[int]:
    """The tower row of tiles 0, 1, ..., from the tile and the row (n,) of each token. A tile that
    unpadding leaves no token of takes the thumbnail's."""
    of_tile: dict[int, int] = dict(zip(crop.tolist(), row.tolist(), strict=True))
    return [of_tile.get(tile, of_tile[0]) for tile in range(max(of_tile) + 1)]


def _spread(
    features: Tensor, size: tuple[int, int], reduced: tuple[int, int]
) -> tuple[Tensor, Tensor]:
    """Put features (r * c, d) at the nearest places of a full grid.

    Returns:
        (rows * columns, d), zeros elsewhere, and the (r * c,) filled places.
    """
    (rows, columns), (r, c) = size, reduced
    row = ((torch.arange(r) + 0.5) * rows / r).long()
    column = ((torch.arange(c) + 0.5) * columns / c).long()
    kept = (row[:, None] * columns + column).flatten().to(features.device)
    full = features.new_zeros(rows * columns, features.shape[1])
    full[kept] = features
    return full, kept
