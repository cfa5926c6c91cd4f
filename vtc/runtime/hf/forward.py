# SPDX-License-Identifier: Apache-2.0
"""The state of one forward under a patch, and the choices made in it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from vtc.core import SIGNALS, LayerState, Method, Record, Rows, Selection, VisionTokens
from vtc.models import ImageMap, Modality
from vtc.report import ImageTokens, Sample, Stopwatch, logits_of
from vtc.runtime.hf.calls import Generating
from vtc.runtime.hf.ledger import Ledger
from vtc.runtime.hf.taps import TowerSignals
from vtc.runtime.layout import Layout, gather_last


@dataclass(frozen=True)
class ImageSignals:
    """What the vision side left for one image.

    Attributes:
        map: what its placeholders stand for.
        kept: (k,) places filled by a run on fewer pixels or patches, or `None` if all are.
        passed: patches that entered each tower layer and left the last, if they were merged there.
        tower: what each tower layer that is read shows of the tokens that are filled.
        encoder: (k, d_v) what the projector received of these, if it is read.
        cls: (d_v,) state of [CLS] beside it, where there is one.
        open_patches: `patches`, if the user's mask hides some of the image's tokens.
    """

    map: ImageMap
    kept: Tensor | None = None
    passed: tuple[int, ...] = ()
    tower: dict[int, TowerSignals] = field(default_factory=dict)
    encoder: Tensor | None = None
    cls: Tensor | None = None
    crop_cls: Tensor | None = None
    open_patches: Tensor | None = None

    @property
    def patches(self) -> Tensor | None:
        """(n, m) tower patches of each vision token, those that are not filled included."""
        if self.open_patches is not None or self.map.patches is None:
            return self.open_patches
        separator = self.map.separator
        return self.map.patches if separator is None else self.map.patches[~separator]

    def only(self, seen: Tensor) -> ImageSignals:
        """The signals of the vision tokens `seen` (n,) bool, as if there were no others."""
        filled = seen if self.kept is None else seen[self.kept.to(seen.device)]
        kept = self.kept
        if kept is not None:
            place = seen.long().cumsum(0) - 1
            kept = place[kept.to(seen.device)[filled]]
        picked = filled.nonzero()
        encoder = self.encoder
        patches = self.patches
        return replace(
            self,
            kept=kept,
            open_patches=None if patches is None else patches[seen.to(patches.device)],
            tower={layer: heard.of(picked) for layer, heard in self.tower.items()},
            encoder=None if encoder is None else encoder[picked[:, 0].to(encoder.device)],
        )


@dataclass(frozen=True)
class ImageSpan:
    """One image of one sample.

    Attributes:
        ordinal: which of the sample's images it is.
        index: (n,) places of its vision tokens in the sequence, without those that are masked.
        grid: (n, 3) their (frame, row, column).
        crop: (n,) the tile of each, or `None`.
        separators: (m,) places of the features that end its rows.
        ends: (m, n) bool, the tokens of the row that each of them ends.
    """

    sample: int
    ordinal: int
    index: Tensor
    signals: ImageSignals
    grid: Tensor
    crop: Tensor | None
    separators: Tensor
    ends: Tensor

    @classmethod
    def of(
        cls, sample: int, ordinal: int, place: Tensor, signals: ImageSignals, valid: Tensor
    ) -> ImageSpan:
        """The image whose placeholders are at `place` (n,); of its vision tokens those that `valid`
        (s,) masks are not there for methods, and in no count."""
        found = signals.map
        grid = found.grid.to(place.device)
        crop = None if found.crop is None else found.crop.to(place.device)
        none = place.new_empty(0)
        ends = torch.zeros(len(place), dtype=torch.bool, device=place.device)
        if found.separator is not None:
            ends = found.separator.to(place.device)
        seen = valid[place]
        if not bool((seen | ends).all()):
            signals, left = signals.only(seen[~ends]), seen | ends
            place, grid, ends = place[left], grid[left], ends[left]
            crop = None if crop is None else crop[left]
        if not bool(ends.any()):
            return cls(sample, ordinal, place, signals, grid, crop, none, none[:, None].bool())
        planes = grid[:, :2]
        if crop is not None:
            # Tiles side by side share their rows; the thumbnail has its own.
            planes = torch.cat([planes, (crop == 0).long()[:, None]], dim=1)
        closes = (planes[ends][:, None] == planes[~ends][None]).all(-1)
        of_frame = grid[ends][:, 1:2] == -1
        closes |= of_frame & (grid[ends][:, None, 0] == grid[~ends][None, :, 0])
        closes |= grid[ends][:, 1:2] == -2
        crop = None if crop is None else crop[~ends]
        return cls(sample, ordinal, place[~ends], signals, grid[~ends], crop, place[ends], closes)

    def emptied(self, alive: Tensor) -> Tensor:
        """Places of the separators none of whose row is left, of `alive` (n,) bool. A row that was
        empty from the start, as in a plane cut to no columns, was not emptied."""
        return self.separators[self.ends.any(1) & ~(self.ends & alive).any(1)]


@dataclass(frozen=True)
class Heard:
    """Attention rows of a decoder layer, as the tap of the layer left them.

    Attributes:
        layout: the tokens held when it ran.
        rows: for each kind of rows and each sample, their places in that layout.
        captured: [(b, h or 1, r, past + k)] probabilities, by head or averaged, or [] if no sample
            has such a row.
        past: columns that come from the cache, unless a window lost some.
    """

    layout: Layout
    rows: dict[Rows, list[Tensor]]
    captured: list[Tensor]
    past: int

    def at(self, kind: Rows, b: int, index: Tensor, length: int, by_head: bool) -> Tensor:
        """(r, s) the rows `kind` of sample `b`, over the tokens at the (s,) places `index` of a
        sequence of `length`; (h, r, s) `by_head`."""
        if not self.captured:
            none = torch.zeros(1, 0, len(index), device=index.device)
            return none if by_head else none[0]
        start = 0
        for name, per_sample in self.rows.items():
            if name == kind:
                break
            start += max(len(places) for places in per_sample)
        places = self.rows[kind][b]
        captured = self.captured[0][b, :, start : start + len(places)]
        if not by_head:
            captured = captured.mean(0, keepdim=True)
        held = torch.isin(self.layout.index[b, places], index)
        if not bool(held.all()):  # rows of vision tokens that have been dropped since
            captured = captured[:, held.to(captured.device)]
        # This forward's columns follow the cache's; a static cache has spare room after them.
        width = self.layout.index.shape[1]
        first = min(self.past, captured.shape[-1] - width)
        heads, r = captured.shape[:2]
        flat = captured[..., first : first + width].flatten(0, 1).T
        found = _still_held(flat, self.layout, b, index, length).T
        return found.reshape(heads, r, len(index)) if by_head else found


Decisions = dict[tuple[Any, ...], Selection | None]
"""Selections already made, by (method, row, image or layer)."""


@dataclass
class Forward:
    """One call of the model.

    Attributes:
        images_seen: pixels or vision features were passed in.
        features: what is scattered into the sequence, by modality: (n, d) an image, or
            (images, n, d).
        vision: (b, s) bool by modality, the placeholders that hold it.
        given: the arguments of the base model.
        logits_to_keep: what the model was given of this name, 0 where it was not; `None` if the
            base model runs alone.
        generating: the call of `generate` that this is a step of.
        phase: "plain" leaves the model alone; "prefill" compresses; "decode" continues a
            compressed cache.
    """

    images_seen: bool = False
    labels: Tensor | None = None
    features: dict[Modality, Any] = field(default_factory=dict)
    vision: dict[Modality, Tensor] = field(default_factory=dict)
    given: Mapping[str, Any] = field(default_factory=dict)
    logits_to_keep: Any = None
    generating: Generating | None = None
    phase: str = "plain"

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

    def describe_prompt(self, width: int | None = None) -> None:
        """Derive `image`, `grid`, `text` and `prompt_length` from spans, mask and labels.

        Args:
            width: tokens of a row of the prompt, if others follow it.
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
        end = self.valid.new_full((rows,), length, dtype=torch.long)
        if self.labels is not None:
            # The answer being scored is not part of the prompt: `generate` would not have seen it.
            # Images always are: earlier turns, or labels left on all tokens, do not end it.
            shown = torch.where(self.image >= 0, place + 1, 0).max(dim=1).values
            answer = (self.labels.to(self.valid.device) != -100) & (place >= shown[:, None])
            end = torch.where(answer, place, length).min(dim=1).values
        if width is not None:
            end = end.clamp_max(width)
        is_vision = self.image >= 0
        started = is_vision.cumsum(1) > 0
        fed = self.separator.clone()
        for modality in self.features.keys() & self.vision.keys():
            fed |= self.vision[modality]
        self.text = ~fed & self.valid & started & (place < end[:, None])
        self.prompt_length = end.tolist()

    def text_at_the_end(self) -> int:
        """How many of the last tokens are text in every row: these a cache can lose again."""
        kept = self.valid & (self.image < 0) & ~self.separator
        return int(kept.flip(1).long().cumprod(1).sum(1).min())

    def rotary_positions(self, number: int) -> Tensor:
        """(b, k) or (axes, b, k) rotary positions of this forward's tokens in layer group
        `number`."""
        if self.phase == "decode":
            shift = self.ledger.groups[number].shift
            return self.positions if shift is None else self.positions - shift
        index = self.layout.index
        positions = gather_last(self.positions, index)
        if positions.dim() == 3:
            return positions  # several axes, on which no gap closes
        positions = positions - gather_last(self.gap.cumsum(1), index)
        shift = self.past_shift[number]
        positions = positions if shift is None else positions - shift
        return positions.clamp_min(0)

    def count_tokens(self, layer: int) -> None:
        """Note how many tokens of each image decoder layer `layer` and those after it process."""
        image = self.image.gather(1, self.layout.index).masked_fill(~self.layout.valid, -1)
        most = max((span.ordinal for span in self.spans), default=-1) + 2
        counts = image.new_zeros(image.shape[0], most)
        counts.scatter_add_(1, image + 1, torch.ones_like(image))
        self.counts[layer] = counts[:, 1:].tolist()
        self.held[layer] = self.layout.valid.sum(1).tolist()

    def gather_blocks(self, length: int) -> Tensor | None:
        """(b, length) blocks of all that a layer group of `length` tokens holds, these last."""
        if self.blocks is None:
            return None
        blocks = self.blocks.gather(1, self.layout.index).masked_fill(~self.layout.valid, -1)
        return torch.nn.functional.pad(blocks, (length - blocks.shape[1], 0), value=-1)

    def samples(self, num_layers: int) -> list[Sample]:
        """The report of this prefill."""
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


def no_autocast(like: Tensor) -> torch.autocast:
    """For what methods compute: under autocast half precision would turn their near ties."""
    return torch.autocast(like.device.type, enabled=False)


def checked(method: Method, selection: Any, n: int) -> Selection:
    """`selection` if it is one over `n` tokens, else an error that names the method."""
    if not isinstance(selection, Selection):
        raise TypeError(f"{method.name}: expected a Selection, got {type(selection).__name__}")
    indices, features = selection.indices, selection.features
    if indices.dim() != 1 or indices.dtype != torch.long:
        raise ValueError(
            f"{method.name}: indices must be whole numbers of shape (k,), "
            f"got {indices.dtype} {tuple(indices.shape)}"
        )
    if len(indices) and (
        int(indices[0]) < 0 or int(indices[-1]) >= n or not bool((indices.diff() > 0).all())
    ):
        raise ValueError(
            f"{method.name}: indices must ascend within [0, {n}), got {indices.tolist()}"
        )
    if features is not None and len(features) != len(indices):
        raise ValueError(
            f"{method.name}: {len(features)} features for {len(indices)} indices; they must match"
        )
    return selection


def _emptied(span: ImageSpan, kept: Tensor, held: Tensor) -> Tensor:
    """Places, out of those `held` (b, s), of the separators of `span` whose rows are empty once
    only its tokens `kept` (k,) are left."""
    alive = torch.zeros(len(span.index), dtype=torch.bool, device=span.index.device)
    alive[kept.to(alive.device)] = True
    gone = span.emptied(alive)
    return gone[held[span.sample, gone.to(held.device)].to(gone.device)]


TowerPlace = Callable[[Method, int | float], int]


def select_in_sequence(
    forward: Forward,
    methods: list[Method],
    embeds: Tensor,
    tower_layer: TowerPlace,
    project: Callable[[Tensor], Tensor],
) -> tuple[Tensor, Tensor]:
    """Run the sequence-stage methods on every image.

    Args:
        embeds: (b, s, d) what would enter the language model.
        tower_layer: the 0-based tower layer that a method means.
        project: the projector, (k, d_v) to (k, d).

    Returns:
        embeds with merged contents in place, and (b, s) bool of the tokens that stay. Tokens that
        leave through a method with contiguous positions are marked in `forward.gap`.
    """
    keep = forward.valid.clone()
    for span in forward.spans:
        b, signals = span.sample, span.signals
        current = torch.arange(len(span.index), device=embeds.device)
        if signals.kept is not None:
            current = signals.kept.to(embeds.device)
        features = embeds[b, span.index[current]]
        alive = torch.arange(len(current), device=embeds.device)
        replaced = False
        for number, method in enumerate(methods):
            if not len(current):  # all that the tower made of it is masked
                break
            key = (number, b, span.ordinal)
            if forward.replay:
                selection = forward.decisions[key]
            else:
                grid = span.grid.to(embeds.device)
                crop = None if span.crop is None else span.crop.to(embeds.device)
                tokens = VisionTokens(
                    features=features,
                    grid=grid[current],
                    image=span.ordinal,
                    crop=None if crop is None else crop[current],
                    every_grid=grid,
                    every_crop=crop,
                    **_signals(forward, method, span, alive, embeds, tower_layer, project),
                )
                with no_autocast(embeds):
                    selection = checked(method, method.select(tokens), len(tokens))
                forward.decisions[key] = selection
            assert selection is not None
            chosen = selection.indices.to(embeds.device)
            gone = _emptied(span, current[chosen], keep)
            keep[b, gone] = False
            if method.positions == "contiguous":
                forward.gap[b, gone] = True
                forward.gap[b, span.index[current]] = True
                forward.gap[b, span.index[current[chosen]]] = False
            features = features[chosen]
            if selection.features is not None:
                features, replaced = selection.features.to(embeds), True
            current, alive = current[chosen], alive[chosen]
        keep[b, span.index] = False
        keep[b, span.index[current]] = True
        if replaced:
            embeds = embeds.clone()
            embeds[b, span.index[current]] = features
    return embeds, keep


def _signals(
    forward: Forward,
    method: Method,
    span: ImageSpan,
    alive: Tensor,
    embeds: Tensor,
    tower_layer: TowerPlace,
    project: Callable[[Tensor], Tensor],
) -> dict[str, Any]:
    """The signals of `VisionTokens` that `method` needs, for the tokens `alive` of an image."""
    signals, device, b = span.signals, embeds.device, span.sample
    found: dict[str, Any] = {}
    for need in method.needs:
        spec = SIGNALS[need]
        source: dict[str, Any] = {"project": project, "encoder_cls": signals.cls, **vars(signals)}
        if spec.layer is not None:
            heard = signals.tower[tower_layer(method, getattr(method, spec.layer))]
            received = dict.fromkeys(("cls_attention", "low_attention"), heard.attention)
            source = {**vars(heard), **received}
        elif spec.source == "text":
            source = {need: embeds[b, _text_of(forward, span, need == "segment")]}
        elif spec.source == "grid" and (whole := signals.patches) is not None:
            kept = signals.kept
            source = {need: whole if kept is None else whole[kept.to(whole.device)]}
        for part in spec.fields:
            for name in filter(None, (part.name, part.of_tiles)):
                value = source.get(name)
                if isinstance(value, Tensor):
                    value = value.to(device)
                    value = value[alive] if part.scope == "token" else value
                found[name] = value
    return found


def _text_of(forward: Forward, span: ImageSpan, segment: bool) -> Tensor:
    """(s,) bool, the prompt's text; of its `segment` alone up to the next image."""
    text = forward.text[span.sample]
    if not segment:
        return text
    place = torch.arange(len(text), device=text.device)
    later = forward.image[span.sample] > span.ordinal
    end = int(later.nonzero()[0]) if bool(later.any()) else len(text)
    return text & (place > span.index[-1]) & (place < end)


def prune_between_layers(
    forward: Forward,
    number: int,
    method: Method,
    layer: int,
    num_layers: int,
    hidden: Tensor,
    ahead: Heard | None,
) -> tuple[Tensor, Tensor]:
    """Run one layers-stage method on every sample before decoder layer `layer`.

    Args:
        hidden: (b, k, d) hidden states in the current layout.
        ahead: attention of that layer on them, if the method peeks.

    Returns:
        hidden with merged contents in place, and (b, k) bool of the tokens that stay.
    """
    layout = forward.layout
    keep = layout.valid.clone()
    wanted, peeked = method.taps(num_layers), method.peeks(num_layers)
    records = method.records(num_layers)
    length = forward.valid.shape[1]
    for b in range(hidden.shape[0]):
        places = layout.valid[b].nonzero().squeeze(1)
        index = layout.index[b, places]
        image = forward.image[b, index]
        n = int((image >= 0).sum())
        if n == 0:
            continue
        key = ("layers", number, layer, b)
        if forward.replay:
            selection = forward.decisions[key]
        else:
            state = LayerState(
                layer=layer,
                num_layers=num_layers,
                hidden=_still_held(hidden[b], layout, b, index, length),
                image=image.to(hidden.device),
                text=forward.text[b, index].to(hidden.device),
                grid=forward.grid[b, index].to(hidden.device),
                prompt_length=int((index < forward.prompt_length[b]).sum()),
                original=tuple(len(s.index) for s in forward.spans if s.sample == b),
                attention={
                    tapped: forward.attention[tapped]
                    .at(rows, b, index, length, method.by_head)
                    .to(hidden.device)
                    for tapped, rows in wanted.items()
                    if tapped in forward.attention
                },
                ahead=None
                if ahead is None
                else ahead.at(peeked[layer], b, index, length, method.by_head).to(hidden.device),
                recorded={
                    (at, name): _still_held(kept[b], before, b, index, length).to(hidden.device)
                    for (at, name), (before, kept) in forward.recorded.items()
                    if name in records.get(at, ())
                },
                memory=forward.memory.get((number, b)),
            )
            with no_autocast(hidden):
                selection = method.prune(state)
            if selection is not None:
                selection = checked(method, selection, n)
                forward.memory[number, b] = selection.memory
            forward.decisions[key] = selection
        if selection is None:
            continue
        if len(selection.indices) < n:
            forward.dropped.add(number)
        vision = places[image >= 0]
        chosen = selection.indices.to(vision.device)
        keep[b, vision] = False
        keep[b, vision[chosen]] = True
        if selection.features is not None:
            hidden = hidden.clone()
            hidden[b, vision[chosen].to(hidden.device)] = selection.features.to(hidden)
        gone = torch.ones_like(vision, dtype=torch.bool)
        gone[chosen] = False
        left = torch.zeros(length, dtype=torch.bool, device=index.device)
        left[layout.index[b, vision[chosen]]] = True
        emptied = torch.cat(
            [span.emptied(left[span.index]) for span in forward.spans if span.sample == b]
        )
        ended = places[torch.isin(index, emptied)]
        keep[b, ended] = False
        if method.prune_positions == "contiguous":
            forward.gap[b, layout.index[b, vision[gone]]] = True
            forward.gap[b, layout.index[b, ended]] = True
    return hidden, keep


def rows_of(forward: Forward, kinds: set[Rows]) -> dict[Rows, list[Tensor]]:
    """For each kind of rows and each sample, their places in the current layout."""
    layout = forward.layout
    found: dict[Rows, list[Tensor]] = {}
    for kind in sorted(kinds):
        found[kind] = []
        for b, end in enumerate(forward.prompt_length):
            if kind == "text":
                wanted = forward.text[b, layout.index[b]] & layout.valid[b]
                found[kind].append(wanted.nonzero().squeeze(1))
            elif kind != "last":
                wanted = forward.image[b, layout.index[b]] >= 0
                if kind == "vision_text":
                    wanted |= forward.text[b, layout.index[b]]
                found[kind].append((wanted & layout.valid[b]).nonzero().squeeze(1))
            else:
                inside = layout.valid[b] & (layout.index[b] < end)
                found[kind].append(inside.nonzero().squeeze(1)[-1:])
    return found


def _still_held(rows: Tensor, layout: Layout, b: int, index: Tensor, length: int) -> Tensor:
    """Of the rows (k, d) of the tokens that `layout` holds of sample `b`, those at `index`, which
    are among them; `rows` itself if that is all."""
    held, valid = layout.index[b], layout.valid[b]
    if len(index) == len(held):  # both ascend, so none has left and none is padding
        return rows
    place = held.new_zeros(length)
    place[held[valid]] = valid.nonzero().squeeze(1)
    return rows[place[index].to(rows.device)]
