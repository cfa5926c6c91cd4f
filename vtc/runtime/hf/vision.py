# SPDX-License-Identifier: Apache-2.0
"""The vision side of a patched model: tower signals, images of a prompt, and the call that encodes
images."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from vtc.core import SIGNALS, Method
from vtc.core.errors import ArgumentError
from vtc.core.events import Encoded, Listener
from vtc.core.images import ImageMap, Modality
from vtc.core.prefill import Stopwatch
from vtc.models import Adapter, UnsupportedModelError
from vtc.runtime.forward import Forward
from vtc.runtime.hf import taps
from vtc.runtime.hf.calls import Calls
from vtc.runtime.hf.images import SeenImages, stacked
from vtc.runtime.hf.stages.base import Merged, Runner, Shortened
from vtc.runtime.signals import ImageSignals, ImageSpan, TowerSignals


class Vision:
    """What a method reads of the vision tower and the projector. It holds no state of a call.

    Args:
        adapter: bound to the model.
        method: what runs.
        shortener: the runner of the stage that makes the tower emit fewer tokens, or `None`.

    Attributes:
        images: the captured signals, by image.
        tower_layers: the 0-based tower layers that are read.
        reads_encoder: the projector's input is read.

    Raises:
        ArgumentError: a part reads a tower whose tokens another part changes.
        UnsupportedModelError: the method reads what vtc cannot capture in this model.
    """

    def __init__(self, adapter: Adapter, method: Method, shortener: Runner | None) -> None:
        self.adapter, self.method, self.shortener = adapter, method, shortener
        self.tower_layers = self.layers_read(adapter)
        self.reads_encoder = False
        for part in method.parts:
            if "sequence" in part.stages and "encoder" in part.needs:
                why = "" if adapter.shows_states else adapter.unread
                if adapter.projector() is None:
                    why = why or "its projector is unknown"
                if why:
                    raise UnsupportedModelError(
                        f"model: {part.name} reads what the projector receives for each token, "
                        f"which vtc does not read in {type(adapter.model).__name__}: {why}"
                    )
                self.reads_encoder = True
        if (
            shortener is not None
            and shortener.changes_tower
            and (self.tower_layers or self.reads_encoder)
        ):
            raise ArgumentError(
                "method",
                f"{method} merges patches in the tower, so its attention no longer maps to vision "
                "tokens, but another part reads it",
            )
        self._forget()

    def _forget(self) -> None:
        self.images = SeenImages(self.adapter, self.method)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "images"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._forget()

    def layers_read(self, adapter: Adapter) -> set[int]:
        """The 0-based layers of the tower of `adapter` that the sequence stage reads.

        Raises:
            ArgumentError: the tower has no such layer.
            UnsupportedModelError: their attention has options that vtc does not follow.
        """
        parts = [part for part in self.method.parts if "sequence" in part.stages]
        found = {tower_layer(adapter, part, layer) for part in parts for layer in layers_read(part)}
        for layer in found:
            module = adapter.tower_attention()[layer]
            if foreign := taps.foreign_options(module):
                raise UnsupportedModelError(
                    f"model: {type(module).__name__} attends with {', '.join(foreign)}, which "
                    f"vtc does not follow, and {self.method} reads its attention"
                )
        return found

    def tower_layer(self, part: Method, layer: int | float) -> int:
        """The 0-based layer that `part` means by `layer`, in the tower that the model has now."""
        return tower_layer(self.adapter.bind(self.adapter.model), part, layer)

    def project(self, states: Tensor) -> Tensor:
        """Run the projector on patch states of one image.

        Args:
            states: (k, d_v) patch states.

        Returns:
            (k, d) features.
        """
        projector: Any = self.adapter.bind(self.adapter.model).projector()
        return projector(states[None])[0]

    def encode(
        self,
        calls: Calls,
        modality: Modality,
        original: Callable[..., Any],
        kwargs: dict[str, Any],
        emit: Listener,
    ) -> Any:
        """Run `get_image_features` or `get_video_features`, on fewer tokens or with a tapped tower
        as the method demands.

        Args:
            calls: in progress.
            modality: "image" or "video".
            original: the model's own function.
            kwargs: its arguments.
            emit: called with the event `Encoded`.

        Returns:
            The model's output, a tuple if `return_dict` is false; features of tokens that were not
            made are zeros on the full grid.

        Raises:
            UnsupportedModelError: tower patches or projector inputs cannot be matched to tokens.
            RuntimeError: the number of features or patches is not what vtc expects.
        """
        found = self.adapter.bind(self.adapter.model)
        wanted = kwargs.pop("return_dict", None)
        if wanted is None:
            wanted = getattr(found.base.config, "return_dict", True)
        encoding = Encoding(self, calls, found, modality, dict(kwargs))
        out, signals = encoding.run(original, {**kwargs, "return_dict": True}, emit)
        calls.seen.clocks = encoding.clock, encoding.heard
        self.images.remember(calls.seen.recent, modality, found.features(out), signals)
        return out if wanted else out.to_tuple()

    def spans(self, calls: Calls, forward: Forward, valid: Tensor) -> list[ImageSpan]:
        """The images of this forward, by sample.

        Args:
            calls: in progress.
            forward: the forward in progress.
            valid: (b, s) bool mask of the sequence.

        Returns:
            What `SeenImages.spans` returns.

        Raises:
            ArgumentError: features without signals that the method or the family needs.
            RuntimeError: features that do not match the vision tokens of the samples.
        """
        reads = bool(self.tower_layers) or self.reads_encoder or self.shortener is not None
        return self.images.spans(calls.seen.recent, forward, valid, reads)

    def made(self, forward: Forward) -> Tensor:
        """Leave out the tokens that the tower never made.

        Args:
            forward: the forward in progress; they become gaps if positions are "contiguous".

        Returns:
            (b, s) bool, `forward.prompt.valid` without them.
        """
        keep = forward.prompt.valid
        if self.shortener is None:
            return keep
        keep = keep.clone()
        ((number, part),) = self.shortener.parts
        for span in forward.prompt.spans:
            if span.signals.kept is None:
                continue
            forward.choices.dropped.add(number)
            alive = torch.zeros(len(span.index), dtype=torch.bool, device=span.index.device)
            alive[span.signals.kept.to(alive.device)] = True
            gone = torch.cat([span.index[~alive], span.emptied(alive)])
            keep[span.sample, gone] = False
            if part.positions == "contiguous":
                forward.places.gap[span.sample, gone] = True
        return keep


class Encoding:
    """One call of `get_image_features` or `get_video_features`.

    Args:
        vision: what is read.
        calls: in progress.
        adapter: bound to the model as it is now; modules may be replaced between calls.
        modality: "image" or "video".
        given: the arguments of the call.

    Attributes:
        clock: runs during all of it.
        heard: runs during the captures.
    """

    def __init__(
        self,
        vision: Vision,
        calls: Calls,
        adapter: Adapter,
        modality: Modality,
        given: Mapping[str, Any],
    ) -> None:
        self.vision, self.calls, self.method = vision, calls, vision.method
        self.adapter = replace(adapter, tower=adapter.tower_of(modality))
        self.modality, self.given = modality, given
        self.tower_layers = vision.layers_read(self.adapter)
        self.reads_encoder = vision.reads_encoder
        self.clock, self.heard = Stopwatch(), Stopwatch()
        self.taps: dict[int, taps.Tap] = {}
        self.cls_states: Tensor | None = None
        self.encoder_states: Tensor | None = None

    @property
    def current(self) -> bool:
        """Whether this is the innermost call of this thread. Others may run the same modules."""
        return self.calls.encoding is self

    def run(
        self, original: Callable[..., Any], kwargs: dict[str, Any], emit: Listener
    ) -> tuple[Any, list[list[ImageSignals]]]:
        """Encode.

        Args:
            original: the model's own function.
            kwargs: its arguments.
            emit: called with the event `Encoded`.

        Returns:
            The model's output, and the signals of its images by element of its features.
        """
        device = next(self.adapter.base.parameters()).device
        started = self.clock.start(device)
        shortened: list[Shortened] | Merged = []
        with self.listening():
            if (runner := self.vision.shortener) is not None:
                out, shortened = runner.encode(self, original, kwargs)
            else:
                out = original(**kwargs)
        self.clock.stop(started, device)
        emit(Encoded(self.clock, self.heard))
        if isinstance(shortened, Merged):
            return out, self._merged(out, shortened)
        if any(of_one.kept is not None for of_one in shortened):
            return out, self._fewer(out, shortened)
        features = self.adapter.features(out)
        # The vision clock includes capturing, which the report subtracts.
        with self.clock.measure(device), self.heard.measure(device):
            return out, self.heard_of(features)

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Context in which what runs of the tower and the projector in this thread is heard."""
        with self.calls.encode(self), self._tapped():
            yield

    @contextmanager
    def _tapped(self) -> Iterator[None]:
        """Tap the current tower and projector for this call only: modules may be replaced between
        calls, and other models may share them."""
        cls = self.adapter.cls_place()
        projector: Any = self.adapter.projector()
        handles: list[Any] = []
        try:
            if projector is not None and not all(part.keeps_all for part in self.method.parts):
                handles.append(projector.register_forward_pre_hook(self._enter_projector))
            for layer in self.tower_layers:
                module = self.adapter.tower_attention()[layer]
                tap = taps.install_in_tower(module, self.adapter.watch_attention)
                self.taps[layer] = tap
                taps.listen_tower(tap, cls, self.heard, self.adapter.tokens_in)
            if self.reads_encoder:
                if self.adapter.projects_patches:
                    handles.append(projector.register_forward_hook(self._leave_projector))
                    handles.append(self.adapter.tower.register_forward_hook(self._leave_tower))
                else:
                    shows = self.adapter.states_from()
                    hook = shows.register_forward_hook(self._pass_states, with_kwargs=True)
                    handles.append(hook)
            yield
        finally:
            for handle in handles:
                handle.remove()
            for tap in self.taps.values():
                tap.remove()

    @torch.compiler.disable
    def _enter_projector(self, module: Any, args: Any) -> Any:
        """Make patch states contiguous. Without [CLS] they are a strided view, except for a single
        image. For a strided input PyTorch adds a linear layer's bias separately and rounds twice,
        so that the features of an image would differ in the last bit between batch sizes."""
        if not self.current:
            return None
        return tuple(arg.contiguous() if isinstance(arg, Tensor) else arg for arg in args)

    @torch.compiler.disable
    def _leave_tower(self, module: Any, args: Any, output: Any) -> None:
        if self.current:
            self.cls_states = self.adapter.cls_states(output, self.given)

    @torch.compiler.disable
    def _leave_projector(self, module: Any, args: Any, output: Tensor) -> None:
        if not self.current:
            return
        if args[0].shape[:-1] != output.shape[:-1]:
            raise UnsupportedModelError(
                f"model: the projector of {type(self.adapter.model).__name__} mixes patches, "
                f"and {self.method} reads one patch state for each vision token"
            )
        # Keep the gradient: merged states become token contents, not only a signal.
        self.encoder_states = args[0]

    @torch.compiler.disable
    def _pass_states(self, module: Any, args: Any, kwargs: Any, output: Any) -> None:
        if self.current:
            states = self.adapter.patch_states((*args, *kwargs.values())[0], output)
            rows, before = states.detach().reshape(1, -1, states.shape[-1]), self.encoder_states
            # Some towers run on pictures, then on their tiles.
            self.encoder_states = rows if before is None else torch.cat([before, rows], dim=1)

    def _fewer(self, out: Any, shortened: list[Shortened]) -> list[list[ImageSignals]]:
        """Signals of a run on fewer tokens; spreads its features over the full grid."""
        found, signals, first = [], [], 0
        for i, (features, of_one) in enumerate(zip(out.pooler_output, shortened, strict=True)):
            kept = None
            if of_one.kept is not None:
                kept = of_one.kept.to(features.device)
                whole = features.new_zeros(of_one.total, features.shape[1])
                whole[kept] = features
                features = whole
            count = len(features) if kept is None else len(kept)
            plain = self.adapter.plain_map(
                len(features), first, self.adapter._size_of(self.given, i)
            )
            patches = torch.arange(first, first + count)[:, None]
            signals.append([ImageSignals(map=plain, kept=kept, **self._read(patches))])
            first += count
            found.append(features)
        # Return the container type that the model returned: a list, or one tensor.
        as_one = isinstance(out.pooler_output, Tensor)
        out.pooler_output = torch.stack(found) if as_one else found
        return signals

    def _merged(self, out: Any, merged: Merged) -> list[list[ImageSignals]]:
        """Signals of a run in which the tower merged patches: a token is there if the tower holds
        all its patches. The features of the others become zeros."""
        features = self.adapter.features(out)
        order = self.adapter.tower_order(self.given)
        alive, tile = merged.alive.cpu(), merged.tile.cpu()
        if order is not None:
            alive, tile = alive[order], tile[order]
        if type(self.adapter).image_maps is Adapter.image_maps:
            tokens = sum(own.shape[:-1].numel() for own in features)
            if tokens != len(alive):
                raise UnsupportedModelError(
                    f"model: {type(self.adapter.model).__name__} made {tokens} vision tokens of "
                    f"{len(alive)} patches: {self.method} cannot tell their places"
                )
        found, signals = [], []
        for own, maps in zip(features, self._maps(features), strict=True):
            of_one, there = [], []
            for of_image in maps:
                assert of_image.patches is not None
                separator = of_image.separator
                if separator is None:
                    separator = torch.zeros(len(of_image), dtype=torch.bool)
                patches = of_image.patches[~separator]
                made = alive[patches].all(1)
                tiles = tile[patches].unique().tolist()
                count = 1 if self.adapter.joins_frames else of_image.tiles
                if len(tiles) < count:  # unpadding leaves no token of some, which follow others
                    tiles = range(tiles[0], max(tiles[-1] + 1, tiles[0] + count))
                every = separator.clone()
                every[~separator] = made
                there.append(every)
                of_one.append(
                    ImageSignals(
                        map=of_image,
                        kept=None if bool(made.all()) else made.nonzero()[:, 0],
                        passed=tuple(merged.passed[i] for i in tiles),
                    )
                )
            rows = torch.cat(there).to(own.device).view(own.shape[:-1])
            found.append(torch.where(rows[..., None], own, own.new_zeros(())))
            signals.append(of_one)
        as_one = isinstance(features, Tensor)
        self.adapter.replace_features(out, torch.stack(found) if as_one else found)
        return signals

    def _maps(self, features: Any) -> list[list[ImageMap]]:
        """The maps of all images of a call, by element of `features`."""
        maps = self.adapter.image_maps(self.modality, self.given, features)
        for own, of_one in zip(features, maps, strict=True):
            count = own.shape[:-1].numel()
            if sum(len(found) for found in of_one) != count:
                raise RuntimeError(
                    f"an image of {type(self.adapter.model).__name__} has {count} features, but "
                    f"vtc knows the places of {sum(len(found) for found in of_one)}"
                )
        return maps

    def heard_of(self, features: Any) -> list[list[ImageSignals]]:
        """Signals of all images of a call, after it.

        Args:
            features: (images, n, d), or a list of (n, d), that the call made.

        Returns:
            A list for each element of `features`.

        Raises:
            UnsupportedModelError, RuntimeError: as `Vision.encode`.
        """
        maps = self._maps(features)
        if self.taps and type(self.adapter).image_maps is Adapter.image_maps:
            rows = next(iter(self.taps.values())).captured
            prefix = self.adapter.prefix(self.given)
            heard = sum(len(row.without(prefix).attention) for row in rows)
            tokens = sum(own.shape[:-1].numel() for own in features)
            if heard != tokens or len(rows) not in (1, len(features)):  # else it has windows
                raise UnsupportedModelError(
                    f"model: the tower of {type(self.adapter.model).__name__} yielded {heard} "
                    f"patches for {tokens} vision tokens, and {self.method} reads one patch for "
                    "each; use a method that does not read the tower"
                )
        reads = bool(self.taps) or self.reads_encoder
        order = self.adapter.tower_order(self.given) if reads else None
        return [
            [ImageSignals(map=found, **self._of(found, order)) for found in of_one]
            for of_one in maps
        ]

    def _of(self, found: ImageMap, order: Tensor | None) -> dict[str, Any]:
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
            states = None if states is None else order[states]
        shown = self._read(patches, crop, states)
        if self.modality == "video":  # each frame has its own [CLS]; the clip has none
            shown.pop("encoder_cls", None)
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
                layer: self._heard(layer, self.adapter.patches_at(layer, patches, self.given), crop)
                for layer in self.tower_layers
            }
        if self.reads_encoder:
            states, cls = self.encoder_states, self.cls_states
            joined = not self.adapter.projects_patches
            if (
                states is None
                or states.dim() != 3
                or (places is None and patches.shape[1] != 1 and not joined)
            ):
                shape = None if states is None else tuple(states.shape)
                raise RuntimeError(
                    f"the projector received {shape} for {len(patches)} vision tokens of an image: "
                    f"its input does not map onto them, and {self.method} needs it"
                )
            places = (patches if places is None else places).to(states.device)
            every = states.flatten(0, 1)
            # What pooling before the projector has joined, as in clips, is one state.
            found["encoder"] = _mean_of(every, places, patches.shape[1] if joined else 1)
            if cls is not None:
                row = places[:, 0] // states.shape[1]
                found["encoder_cls"] = cls[int(row[0])]
                if crop is not None:
                    found["crop_cls"] = cls[_rows_of_tiles(crop, row)]
        return found

    def _heard(self, layer: int, patches: Tensor, crop: Tensor | None) -> TowerSignals:
        prefix, suffix = self.adapter.prefix(self.given), self.adapter.suffix()
        rows: list[TowerSignals] = self.taps[layer].captured
        rows = [row.without(prefix, suffix) for row in rows]
        size = sum(len(row.attention) for row in rows)
        if int(patches.max()) >= size:
            raise RuntimeError(
                f"the vision tower yielded {size} patches, but patch {int(patches.max())} was "
                f"requested: its attention does not map onto the vision tokens, and "
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


def tower_layer(adapter: Adapter, part: Method, layer: int | float) -> int:
    """The 0-based tower layer that `part` means.

    Args:
        adapter: bound to the model.
        part: the method that reads the layer.
        layer: an index, negative from the end, or a fraction of the tower's depth.

    Returns:
        An index from 0.

    Raises:
        ArgumentError: the tower has no such layer.
    """
    count = len(adapter.tower_attention())
    place = int(layer * count) if isinstance(layer, float) else layer
    if not -count <= place < count:
        raise ArgumentError(
            "method",
            f"{part.name} reads vision layer {layer}, but the tower of "
            f"{type(adapter.model).__name__} has {count}",
        )
    return place % count


def layers_read(method: Method) -> list[int | float]:
    """The tower layers that the sequence stage of `method` reads, as the method gives them.

    Args:
        method: a single method.

    Returns:
        The values of its `vision_layer` and `low_layer`, where its needs include what they name.
    """
    named = {SIGNALS[need].layer for need in method.needs} - {None}
    return [getattr(method, str(layer)) for layer in sorted(map(str, named))]


def _mean_of(states: Tensor, places: Tensor, patches: int) -> Tensor:
    """(n, d_v) the mean state of the `patches` patches of each token: of the rows `places` (n, m)
    of states (r, d_v), or, where the model has joined patches already, of parts of one row."""
    if places.shape[1] > 1:
        return states[places].float().mean(1).to(states.dtype)
    rows = states[places[:, 0]]
    if patches == 1:
        return rows
    return rows.unflatten(1, (patches, -1)).float().mean(1).to(states.dtype)


def _rows_of_tiles(crop: Tensor, row: Tensor) -> list[int]:
    """The tower row of tiles 0, 1, ..., from the tile and the row (n,) of each token. A tile that
    unpadding leaves no token of takes the thumbnail's."""
    of_tile: dict[int, int] = dict(zip(crop.tolist(), row.tolist(), strict=True))
    return [of_tile.get(tile, of_tile[0]) for tile in range(max(of_tile) + 1)]
