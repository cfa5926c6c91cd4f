# SPDX-License-Identifier: Apache-2.0
"""The encoder stage: patches merged or dropped inside the vision tower."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from vtc.core import EncoderState, Merging, Method
from vtc.core.images import Modality
from vtc.models import Adapter, UnsupportedModelError
from vtc.runtime.choices import no_autocast
from vtc.runtime.forward import Forward
from vtc.runtime.hf import taps
from vtc.runtime.hf.arguments import by_name
from vtc.runtime.hf.guards import HOOKS_INSIDE, refuse_checkpoint
from vtc.runtime.hf.override import Override
from vtc.runtime.hf.stages.base import Merged, Runner, Shortened

if TYPE_CHECKING:
    from vtc.runtime.hf.vision import Encoding


@dataclass
class Tile:
    """The tokens of one tile in the tower. Those in `fixed` are never merged.

    Attributes:
        row: its row of the tower's batch.
        fixed: (p,) places in this row of tokens that are never merged, [CLS] first.
        units: (u, m) places of the m patches of each unit.
        size: (n,) units that each token represents.
        source: (n,) the first of these units, at whose places the token stands.
        memory: (n,) what the method passes from layer to layer.
        counts: patches that entered each layer, and those that left the last.
    """

    row: int
    fixed: Tensor
    units: Tensor
    size: Tensor
    source: Tensor
    memory: Tensor | None
    counts: list[int]

    @property
    def original(self) -> int:
        """Number of units before anything was merged or dropped."""
        return len(self.units)

    @property
    def places(self) -> Tensor:
        """(t,) places of all tokens that are left: the fixed ones, then patches unit by unit."""
        return torch.cat([self.fixed, self.units[self.source].flatten()])

    @property
    def whole(self) -> bool:
        """Whether nothing was merged or dropped yet."""
        return len(self.source) == len(self.units)


class EncoderRunner(Runner):
    """Runs the tower tile by tile, so that each may keep its own number of patches.

    A unit is what becomes one vision token: a patch, or the group of patches that the projector
    joins. Methods merge and drop units. They see a unit's attention, keys and values as means over
    its patches; of merged units, each patch becomes the mean of the patches in its place in the
    group, weighted by size, so that the projector still gets whole groups. Proportional attention
    counts a patch as often as its unit stands for units.

    The model's own code runs once for all tiles. Between layers, tokens lie at the place of their
    first unit, with zeros elsewhere; each layer, and the projector where it works token by token,
    takes out and runs those that are left. A token that stands for several units has the place, the
    rotary position and the window of the first.

    The tower is modified only during a call: other models may share it, and its modules may be
    replaced between calls.
    """

    stage: ClassVar[str] = "encoder"
    shortens: ClassVar[bool] = True
    changes_tower: ClassVar[bool] = True

    def __init__(
        self, adapter: Adapter, method: Method, current: Callable[[], Forward | None]
    ) -> None:
        super().__init__(adapter, method, current)
        (self.merger,) = (part for _, part in self.parts)
        MergingTower(self.merger, adapter, "image", {}, lambda: True)

    def encode(
        self, encoding: Encoding, original: Callable[..., Any], kwargs: dict[str, Any]
    ) -> tuple[Any, list[Shortened] | Merged]:
        """Run `get_image_features` or `get_video_features`; see `Runner.encode`.

        Raises:
            UnsupportedModelError: no layer runs before the one that is read, [CLS] is a vision
                token, or the patches of these inputs cannot be merged.
            ValueError: the method returns an invalid merging.
            RuntimeError: the projector receives another number of tokens, or the method weighs
                attention and the tower uses flash attention.
        """
        if self.merger.keeps_all:
            return original(**kwargs), []
        adapter, given = encoding.adapter, encoding.given
        tower = MergingTower(
            self.merger, adapter, encoding.modality, given, lambda: encoding.current
        )
        adapter.check_encoder(encoding.modality, given)
        with tower.installed():
            out = original(**kwargs)
        return out, tower.merged()


class MergingTower:
    """The tower during one call.

    Args:
        method: what merges the patches.
        adapter: bound to the model.
        modality: "image" or "video".
        given: the arguments of the call.
        current: whether the call is the innermost of this thread.

    Raises:
        UnsupportedModelError: no layer runs before the one that is read, or [CLS] is a vision
            token, and the method does not keep all patches.
    """

    def __init__(
        self,
        method: Method,
        adapter: Adapter,
        modality: Modality,
        given: Mapping[str, Any],
        current: Callable[[], bool],
    ) -> None:
        self.method, self.adapter, self.current = method, adapter, current
        self.modality, self.given = modality, given
        self.layers = adapter.encoder_layers()
        self.used = adapter.encoder_depth(given)
        if self.used < 1 and not method.keeps_all:
            raise UnsupportedModelError(
                "vision_feature_layer: no layer of the tower runs before the one that is read, "
                f"and {method.name} merges patches in them"
            )
        self.has_cls = adapter.has_cls()
        kept = not (adapter.prefix(given) or adapter.suffix())
        if self.has_cls and kept and not method.keeps_all:
            raise UnsupportedModelError(
                "vision_feature_select_strategy: got 'full', in which [CLS] is a vision token, and "
                f"{method.name} merges patches into tokens that have a place; accepted is "
                "'default'"
            )
        self.taps: list[taps.Tap] = []
        self.tiles: list[Tile] = []
        self.shape = (0, 0)
        self.before: list[Merged] = []

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Context in which the layers of the tower merge."""
        overrides: list[Override] = []
        try:
            for i, module in enumerate(self.adapter.tower_attention()):
                watch = self.adapter.watch_attention
                self.taps.append(taps.install_in_tower(module, watch))
                layer = self.layers[i]
                overrides.append(Override(layer, "forward", functools.partial(self._layer, i)))
            for projector in self.adapter.encoder_projectors():
                project = functools.partial(self._project, projector)
                overrides.append(Override(projector, "forward", project))
            yield
        finally:
            for override in reversed(overrides):
                override.remove()
            for tap in self.taps:
                tap.remove()

    def merged(self) -> Merged:
        """What was merged, after the call; of a tower that ran several times, all in order."""
        runs, offset, tiles = [*self.before, self._run_merged()], 0, []
        for run in runs:
            tiles.append(run.tile + offset)
            offset += len(run.passed)
        return Merged(
            torch.cat([run.alive for run in runs]),
            torch.cat(tiles),
            tuple(counts for run in runs for counts in run.passed),
        )

    def _run_merged(self) -> Merged:
        """What was merged in the last run of the tower."""
        rows, length = self.shape
        alive = torch.zeros(rows, length, dtype=torch.bool)
        number = torch.zeros(rows, length, dtype=torch.long)
        for i, tile in enumerate(self.tiles):
            alive[tile.row, tile.places.cpu()] = True
            number[tile.row, tile.fixed.cpu()] = i
            number[tile.row, tile.units.flatten().cpu()] = i
        patches = torch.ones(length, dtype=torch.bool)
        if (cls := self.adapter.cls_place()) is not None:
            patches[cls] = False
        return Merged(
            alive[:, patches].flatten(),
            number[:, patches].flatten(),
            tuple(tuple(tile.counts) for tile in self.tiles),
        )

    def _begin(self, rows: int, length: int, device: torch.device) -> None:
        if self.tiles:
            self.before.append(self._run_merged())
        self.shape = rows, length
        found = self.adapter.encoder_tiles(self.modality, self.given, rows, length)
        self.tiles = [
            Tile(
                row,
                fixed.to(device),
                units.to(device),
                torch.ones(len(units), device=device),
                torch.arange(len(units), device=device),
                None,
                [],
            )
            for row, fixed, units in found
        ]

    def _joined(self, rows: int, length: int) -> None:
        """Go on after the tower has joined patches within each unit."""
        self.shape = rows, length
        found = self.adapter.encoder_tiles(self.modality, self.given, rows, length)
        for tile, (_, fixed, units) in zip(self.tiles, found, strict=True):
            tile.fixed, tile.units = fixed.to(tile.fixed), units.to(tile.units)

    def _layer(self, i: int, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if not self.current():  # of a nested call, or another thread
            return original(*args, **kwargs)
        if HOOKS_INSIDE:
            refuse_checkpoint(self.layers[i], "patches are merged between the tower's layers")
        given = dict(by_name(self.layers[i], args, kwargs))
        hidden_states: Tensor = given.pop(_first_name(self.layers[i].__class__))
        rows = hidden_states if hidden_states.dim() == 3 else hidden_states[None]
        if i == 0:
            self._begin(rows.shape[0], rows.shape[1], rows.device)
        elif rows.shape[1] != self.shape[1]:
            self._joined(rows.shape[0], rows.shape[1])
        out: Tensor | None = None
        for tile in self.tiles:
            found = self._run(i, tile, rows[tile.row, tile.places][None], given)[0]
            if out is None:
                out = found.new_zeros(*rows.shape[:2], found.shape[-1])
            out[tile.row, tile.places] = found
        assert out is not None
        return self.adapter.encoder_output(out.view(hidden_states.shape))

    def _run(self, i: int, tile: Tile, hidden: Tensor, given: Mapping[str, Any]) -> Tensor:
        """(1, t', d) a layer's output for the tokens of one tile (1, t, d)."""
        layer: Any = self.layers[i]
        places = tile.places
        order = self.adapter.encoder_order(given, places)
        if order is not None:
            places, hidden = places[order], hidden[:, order]
        own = self.adapter.encoder_given(given, tile.row, places)
        if i >= self.used:
            hidden = self.adapter.encoder_attend(layer, hidden, own)
            return self.adapter.encoder_feed(
                layer, hidden if order is None else _back(hidden, order)
            )
        m, prefix = tile.units.shape[1], len(tile.fixed)
        loose = prefix - int(self.has_cls)
        tile.counts.append(m * len(tile.source) + loose)
        sizes = self._sizes(tile, order, hidden.dtype)
        if sizes is not None and self.taps[i].handles:  # it only listens
            own = self.adapter.encoder_weighed(own, sizes)
        heard = Heard(self.current, self.has_cls, sizes)
        self.taps[i].arm(heard.capture)
        hidden = self.adapter.encoder_attend(layer, hidden, own)
        self.taps[i].armed = None
        attention, keys, values = (
            torch.cat(every) for every in (heard.paid, heard.keys, heard.values)
        )
        if order is not None:
            hidden = _back(hidden, order)
            attention, keys, values = (
                _back(one[None], order)[0] for one in (attention, keys, values)
            )
        state = EncoderState(
            layer=i,
            num_layers=self.used,
            original=tile.original,
            has_cls=self.has_cls,
            attention=_of_units(attention[prefix:], m),
            keys=_of_units(keys[prefix:], m),
            values=_of_units(values[prefix:], m),
            cls_value=values[0] if self.has_cls else None,
            size=tile.size,
            memory=tile.memory,
        )
        with no_autocast(hidden):
            merging = self.method.merge(state)
        if merging is not None:
            d = hidden.shape[-1]
            rows = merge_rows(self.method, merging, tile, hidden[0, prefix:].reshape(-1, m * d))
            hidden = torch.cat([hidden[:, :prefix], rows.view(1, -1, d)], dim=1)
        if i == self.used - 1:
            tile.counts.append(m * len(tile.source) + loose)
        return self.adapter.encoder_feed(layer, hidden)

    def _sizes(self, tile: Tile, order: Tensor | None, dtype: torch.dtype) -> Tensor | None:
        """(t,) log sizes of the tokens, added to the attention logits; `None` to add nothing."""
        if not self.method.weighs_sizes or tile.whole:
            return None
        tap = self.taps[0]
        if not tap.handles and "flash" in (tap.config._attn_implementation or ""):
            raise RuntimeError(
                f"attn_implementation: {self.method} weighs attention in the vision tower, which "
                "flash attention cannot; load the model with attn_implementation='sdpa'"
            )
        of_patches = tile.size.repeat_interleave(tile.units.shape[1])
        sizes = torch.cat([tile.size.new_ones(len(tile.fixed)), of_patches]).log().to(dtype)
        return sizes if order is None else sizes[order]

    def _project(
        self, projector: Any, original: Callable[..., Any], *args: Any, **kwargs: Any
    ) -> Any:
        """Run what makes tokens of patches or groups only for those that are left."""
        name = _first_name(projector.__class__)
        states: Tensor = args[0] if args else kwargs[name]
        if not self.current() or not self.tiles or not states.is_floating_point():
            return original(*args, **kwargs)  # numbers of words look up no states
        more, given = args[1:], {key: value for key, value in kwargs.items() if key != name}
        rows = states if states.dim() == 3 else states[None]
        # Its input holds patches, with or without [CLS], or the patches of a unit as one row.
        patches = [tile.units.numel() for tile in self.tiles]
        units = [tile.original for tile in self.tiles]
        per_row = len(self.tiles) // rows.shape[0]
        spare = rows.shape[1] - sum(patches[:per_row])
        joined = rows.shape[1] == sum(units[:per_row])
        if not joined and spare not in (0, int(self.has_cls)):
            raise RuntimeError(
                f"the projector received {rows.shape[1]} vision tokens of "
                f"{sum(patches[:per_row])} patches: {self.method} cannot tell their places"
            )
        spare = 0 if joined else spare
        total = spare + sum(units[:per_row])
        out: Tensor | None = None
        first = 0
        for i, tile in enumerate(self.tiles):
            first = 0 if i % per_row == 0 else first
            source = tile.source.sort().values
            cls = torch.arange(spare, device=source.device)
            if joined:
                taken = source + first
            else:
                taken = tile.units[source].flatten() + (spare - int(self.has_cls))
                taken = torch.cat([cls, taken])
            row = i // per_row
            found = original(_like(rows[row, taken], states), *more, **given)
            found = found if found.dim() == 2 else found[0]
            if len(found) != len(source) + spare:
                raise RuntimeError(
                    f"the projector made {len(found)} vision tokens of {len(source)} units: "
                    f"{self.method} cannot tell their places"
                )
            if out is None:
                out = found.new_zeros(rows.shape[0], total, found.shape[-1])
            out[row, torch.cat([cls, source + spare + first])] = found
            first += tile.original
        assert out is not None
        return out if states.dim() == 3 else out[0]


class Heard:
    """Captures the attention of one layer for one tile, window by window where it has windows.

    Args:
        current: whether the call is the innermost of this thread.
        has_cls: the first token is [CLS], whose row is what patches receive.
        sizes: (t,) added to the logits by key, or `None`.

    Attributes:
        paid: by window, (w,) attention from [CLS], or received from the tokens of the window.
        keys, values: by window, (w, h, d).
    """

    def __init__(self, current: Callable[[], bool], has_cls: bool, sizes: Tensor | None) -> None:
        self.current, self.has_cls, self.sizes = current, has_cls, sizes
        self.paid: list[Tensor] = []
        self.keys: list[Tensor] = []
        self.values: list[Tensor] = []

    def capture(
        self, query: Tensor, key: Tensor, value: Tensor, mask: Any, options: Mapping[str, Any]
    ) -> Tensor | None:
        """See `Tap.armed`.

        Returns:
            (1, 1, w, w) log sizes, in place of the mask; `None` to add nothing.
        """
        if not self.current():  # of a nested call in the middle of the layer
            return None
        w, bias = key.shape[2], None
        if self.sizes is not None:
            first = sum(map(len, self.paid))
            own = self.sizes[first : first + w]
            bias = own[None, None, None].expand(1, 1, w, -1)
        rows = query[:, :, :1] if self.has_cls else query
        added = None if bias is None else bias[:, :, : rows.shape[2]]
        received = taps.mean_attention(rows, key, None, added, taps.Options.of(options))
        self.paid.append(received[0, 0].mean(0))
        self.keys.append(key[0].transpose(0, 1))
        self.values.append(value[0].transpose(0, 1))
        return bias


@functools.cache
def _first_name(kind: Any) -> str:
    """The name of the first argument of a module's forward, by class: its states."""
    return list(inspect.signature(kind.forward).parameters)[1]


def _back(rows: Tensor, order: Tensor) -> Tensor:
    """(1, t, ...) the rows that `order` (t,) had sorted, as they were."""
    return rows[:, order.argsort()]


def _like(rows: Tensor, states: Tensor) -> Tensor:
    """`rows` (k, d) with as many dimensions as `states`."""
    return rows if states.dim() == 2 else rows[None]


def _of_units(values: Tensor, m: int) -> Tensor:
    """(n, ...) means over the m patches of each unit; `values` (n * m, ...) are unit by unit."""
    if m == 1:
        return values
    return values.unflatten(0, (-1, m)).float().mean(1).to(values.dtype)


def merge_rows(method: Method, merging: Merging, patches: Tile, rows: Tensor) -> Tensor:
    """Carry out a merging.

    Args:
        method: named in errors.
        merging: what it returned.
        patches: the tokens before; becomes those after.
        rows: (n, d) their states.

    Returns:
        (m, d) means of the merged states, weighted by size.

    Raises:
        ValueError: the merging is not one of n tokens into m.
    """
    target, n = merging.target, rows.shape[0]
    if target.dtype != torch.long or target.shape != (n,):
        raise ValueError(
            f"{method.name}: target must be an int64 tensor of shape ({n},), got {target.dtype} "
            f"{tuple(target.shape)}"
        )
    stays = target >= 0
    m = int(target.max()) + 1
    if m < 1 or len(target[stays].unique()) != m:
        raise ValueError(f"{method.name}: target must use every index from 0 on, at least one")
    if merging.memory is not None and merging.memory.shape != (m,):
        raise ValueError(
            f"{method.name}: memory must be of shape ({m},), got {tuple(merging.memory.shape)}"
        )
    chosen, weights = target[stays], patches.size[stays]
    size = weights.new_zeros(m).index_add(0, chosen, weights)
    first = torch.full((m,), patches.original, device=rows.device)
    patches.source = first.scatter_reduce(0, chosen, patches.source[stays], "amin")
    patches.size, patches.memory = size, merging.memory
    return _means(rows, stays.nonzero().squeeze(1), chosen, weights, size)


def _means(rows: Tensor, members: Tensor, group: Tensor, weights: Tensor, size: Tensor) -> Tensor:
    """(m, d) weighted means of the rows (n, d) at `members` (k,) per `group` (k,); `weights` (k,)
    sum to `size` (m,). Groups of one, the most common, are copied."""
    count = torch.bincount(group, minlength=len(size))
    one = torch.empty_like(count).scatter(0, group, members)
    means = rows.index_select(0, one)
    several = count > 1
    if not bool(several.any()):
        return means
    within = several[group]
    number = several.cumsum(0)[group[within]] - 1
    wide = torch.promote_types(rows.dtype, torch.float32)
    contents = rows[members[within]].to(wide) * weights[within, None]
    sums = contents.new_zeros(int(several.sum()), rows.shape[1]).index_add(0, number, contents)
    means[several] = (sums / size[several, None]).to(rows.dtype)
    return means
