# SPDX-License-Identifier: Apache-2.0
"""Runs methods on a prompt, one image or one sample at a time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from vtc.core import SIGNALS, LayerState, Method, Rows, Selection, VisionTokens
from vtc.core.events import Selected, Shown
from vtc.runtime.forward import Forward
from vtc.runtime.signals import Heard, ImageSpan, still_held


def no_autocast(like: Tensor) -> torch.autocast:
    """A context without autocast for what methods compute: half precision would flip near ties.

    Args:
        like: a tensor on the device in use.
    """
    return torch.autocast(like.device.type, enabled=False)


def checked(method: Method, selection: Any, n: int) -> Selection:
    """Check what a method returned.

    Args:
        method: named in the error.
        selection: what it returned.
        n: number of tokens that it received.

    Returns:
        `selection`.

    Raises:
        TypeError: not a `Selection`.
        ValueError: indices are not int64 of shape (k,), do not ascend within [0, n), or differ in
            number from the features.
    """
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
    """Places among `held` (b, s) bool of the separators of `span` whose rows are empty when only
    its tokens `kept` (k,) are left."""
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
        forward: the forward in progress. `decisions` receives the selections; `gap` marks tokens
            that a method with contiguous positions drops.
        methods: the methods of the sequence stage, in order.
        embeds: (b, s, d) what would enter the language model.
        tower_layer: maps a method and its layer setting to a 0-based tower layer.
        project: the projector, (k, d_v) to (k, d).

    Returns:
        `embeds` with merged contents in place, and (b, s) bool of the kept tokens.

    Raises:
        TypeError: a method does not return a `Selection`.
        ValueError: a selection is invalid.
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
        if forward.listeners and len(current) and not forward.replay:
            forward.emit(Shown(b, _tokens(span, features, current, patches=signals.filled_patches)))
        for number, method in enumerate(methods):
            if not len(current):  # the mask hides all that the tower made
                break
            key = (number, b, span.ordinal)
            if forward.replay:
                selection = forward.decisions[key]
            else:
                signals_read = _signals(forward, method, span, alive, embeds, tower_layer, project)
                tokens = _tokens(span, features, current, **signals_read)
                with no_autocast(embeds):
                    selection = checked(method, method.select(tokens), len(tokens))
                forward.decisions[key] = selection
                forward.emit(Selected(method, b, span.ordinal, None, len(tokens), selection))
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


def _tokens(span: ImageSpan, features: Tensor, current: Tensor, **signals: Any) -> VisionTokens:
    """The `VisionTokens` of the tokens `current` (n,) of an image."""
    grid = span.grid.to(current.device)
    crop = None if span.crop is None else span.crop.to(current.device)
    return VisionTokens(
        features=features,
        grid=grid[current],
        image=span.ordinal,
        crop=None if crop is None else crop[current],
        every_grid=grid,
        every_crop=crop,
        **signals,
    )


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
        elif spec.source == "grid":
            source = {need: signals.filled_patches}
        for part in spec.fields:
            for name in filter(None, (part.name, part.of_tiles)):
                value = source.get(name)
                if isinstance(value, Tensor):
                    value = value.to(device)
                    value = value[alive] if part.scope == "token" else value
                found[name] = value
    return found


def _text_of(forward: Forward, span: ImageSpan, segment: bool) -> Tensor:
    """(s,) bool: the prompt's text, or for a `segment` only the text up to the next image."""
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
    """Run one layers-stage method on every sample before a decoder layer.

    Args:
        forward: the forward in progress; `decisions`, `memory`, `dropped` and `gap` are updated.
        number: of the method in its composition.
        method: the method.
        layer: 0-based decoder layer that is about to run.
        num_layers: number of decoder layers.
        hidden: (b, k, d) hidden states in the current layout.
        ahead: look-ahead attention of that layer, if the method peeks; else `None`.

    Returns:
        `hidden` with merged contents in place, and (b, k) bool of the kept tokens.

    Raises:
        TypeError: the method returns neither a `Selection` nor `None`.
        ValueError: a selection is invalid.
        RuntimeError: the method writes to tensors of its state in place.
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
                hidden=still_held(hidden[b], layout, b, index, length),
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
                    (at, name): still_held(kept[b], before, b, index, length).to(hidden.device)
                    for (at, name), (before, kept) in forward.recorded.items()
                    if name in records.get(at, ())
                },
                memory=forward.memory.get((number, b)),
            )
            versions = _versions(state)
            with no_autocast(hidden):
                selection = method.prune(state)
            if _versions(state) != versions:
                raise RuntimeError(
                    f"{method.name}: prune wrote to tensors of its state, which are the model's "
                    "own; it may compute with copies of them"
                )
            if selection is not None:
                selection = checked(method, selection, n)
                forward.memory[number, b] = selection.memory
                forward.emit(Selected(method, b, None, layer, n, selection))
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


def _versions(state: LayerState) -> list[int]:
    """The version counter of each tensor of a state that has one."""
    seen = (state.hidden, *state.recorded.values(), *state.attention.values())
    return [tensor._version for tensor in seen if not tensor.is_inference()]


def rows_of(forward: Forward, kinds: set[Rows]) -> dict[Rows, list[Tensor]]:
    """The places of attention rows in the current layout.

    Args:
        forward: the forward in progress.
        kinds: of rows.

    Returns:
        By kind, sorted, and by sample: (r,) places.
    """
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
