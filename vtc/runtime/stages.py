# SPDX-License-Identifier: Apache-2.0
"""Runs methods on a prompt, one image or one sample at a time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from vtc.core import SIGNALS, LayerState, Method, Rows, VisionTokens
from vtc.core.events import Selected
from vtc.runtime.choices import Part, checked, choose, no_autocast
from vtc.runtime.forward import Forward
from vtc.runtime.signals import Heard, ImageSpan, still_held


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
    parts: Sequence[Part],
    embeds: Tensor,
    tower_layer: TowerPlace,
    project: Callable[[Tensor], Tensor] | None,
) -> tuple[Tensor, Tensor]:
    """Run the sequence-stage methods on every image.

    Args:
        forward: the forward in progress. `choices` receives the selections; `places.gap` marks
            tokens that a method with contiguous positions drops.
        parts: the methods of the sequence stage, in order.
        embeds: (b, s, d) what would enter the language model.
        tower_layer: maps a method and its layer setting to a 0-based tower layer.
        project: the projector, (k, d_v) to (k, d); `None` if it joins patches.

    Returns:
        `embeds` with merged contents in place, and (b, s) bool of the kept tokens.

    Raises:
        TypeError: a method does not return a `Selection`.
        ValueError: a selection is invalid.
    """
    prompt, gap = forward.prompt, forward.places.gap
    keep, given = prompt.valid.clone(), embeds
    for span in prompt.spans:
        b, signals = span.sample, span.signals
        filled = torch.arange(len(span.index), device=embeds.device)
        if signals.kept is not None:
            filled = signals.kept.to(embeds.device)

        def tokens(
            method: Method | None,
            features: Tensor,
            alive: Tensor,
            span: ImageSpan = span,
            filled: Tensor = filled,
        ) -> VisionTokens:
            if method is None:
                shown = {"patches": span.signals.filled_patches}
            else:
                shown = _signals(forward, method, span, alive, given, tower_layer, project)
            return _tokens(span, features, filled[alive], **shown)

        chosen = choose(
            forward.choices, parts, b, span.ordinal, given[b, span.index[filled]], tokens
        )
        current = filled if chosen is None else filled[chosen.alive]
        before = filled
        for method, alive in () if chosen is None else chosen.steps:
            after = filled[alive]
            gone = _emptied(span, after, keep)
            keep[b, gone] = False
            if method.positions == "contiguous":
                gap[b, gone] = True
                gap[b, span.index[before]] = True
                gap[b, span.index[after]] = False
            before = after
        keep[b, span.index] = False
        keep[b, span.index[current]] = True
        if chosen is not None and chosen.replaced:
            embeds = embeds.clone() if embeds is given else embeds
            embeds[b, span.index[current]] = chosen.features
    return embeds, keep


def _tokens(span: ImageSpan, features: Tensor, current: Tensor, **signals: Any) -> VisionTokens:
    """The `VisionTokens` of the tokens `current` (n,) of an image."""
    return VisionTokens.among(
        features,
        span.grid,
        span.crop,
        current,
        total=len(span.index),
        image=span.ordinal,
        **signals,
    )


def _signals(
    forward: Forward,
    method: Method,
    span: ImageSpan,
    alive: Tensor,
    embeds: Tensor,
    tower_layer: TowerPlace,
    project: Callable[[Tensor], Tensor] | None,
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
    text = forward.prompt.text[span.sample]
    if not segment:
        return text
    place = torch.arange(len(text), device=text.device)
    later = forward.prompt.image[span.sample] > span.ordinal
    end = int(later.nonzero()[0]) if bool(later.any()) else len(text)
    return text & (place > span.index[-1]) & (place < end)


def prune_between_layers(
    forward: Forward,
    part: Part,
    layer: int,
    num_layers: int,
    hidden: Tensor,
    ahead: Heard | None,
) -> tuple[Tensor, Tensor]:
    """Run one layers-stage method on every sample before a decoder layer.

    Args:
        forward: the forward in progress; `choices` and `places.gap` are updated.
        part: the method, with its number in its composition.
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
    number, method = part
    layout, prompt, choices, captured = (
        forward.layout, forward.prompt, forward.choices, forward.captured
    )  # fmt: skip
    keep = layout.valid.clone()
    wanted, peeked = method.taps(num_layers), method.peeks(num_layers)
    records = method.records(num_layers)
    length = prompt.length
    for b in range(hidden.shape[0]):
        places = layout.valid[b].nonzero().squeeze(1)
        index = layout.index[b, places]
        image = prompt.image[b, index]
        n = int((image >= 0).sum())
        if n == 0:
            continue
        key = ("layers", number, layer, b)
        if choices.replay:
            selection = choices.decisions[key]
        else:
            state = LayerState(
                layer=layer,
                num_layers=num_layers,
                hidden=still_held(hidden[b], layout, b, index, length),
                image=image.to(hidden.device),
                text=prompt.text[b, index].to(hidden.device),
                grid=prompt.grid[b, index].to(hidden.device),
                prompt_length=int((index < prompt.ends[b]).sum()),
                original=tuple(len(s.index) for s in prompt.spans if s.sample == b),
                attention={
                    tapped: captured.attention[tapped]
                    .at(rows, b, index, length, method.by_head)
                    .to(hidden.device)
                    for tapped, rows in wanted.items()
                    if tapped in captured.attention
                },
                ahead=None
                if ahead is None
                else ahead.at(peeked[layer], b, index, length, method.by_head).to(hidden.device),
                recorded={
                    (at, name): still_held(kept[b], before, b, index, length).to(hidden.device)
                    for (at, name), (before, kept) in captured.records.items()
                    if name in records.get(at, ())
                },
                memory=choices.memory.get((number, b)),
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
                choices.memory[number, b] = selection.memory
                choices.emit(Selected(method, b, None, layer, n, selection))
            choices.decisions[key] = selection
        if selection is None:
            continue
        if len(selection.indices) < n:
            choices.dropped.add(number)
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
            [span.emptied(left[span.index]) for span in prompt.spans if span.sample == b]
        )
        ended = places[torch.isin(index, emptied)]
        keep[b, ended] = False
        if method.prune_positions == "contiguous":
            forward.places.gap[b, layout.index[b, vision[gone]]] = True
            forward.places.gap[b, layout.index[b, ended]] = True
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
    layout, prompt = forward.layout, forward.prompt
    found: dict[Rows, list[Tensor]] = {}
    for kind in sorted(kinds):
        found[kind] = []
        for b, end in enumerate(prompt.ends):
            if kind == "text":
                wanted = prompt.text[b, layout.index[b]] & layout.valid[b]
                found[kind].append(wanted.nonzero().squeeze(1))
            elif kind != "last":
                wanted = prompt.image[b, layout.index[b]] >= 0
                if kind == "vision_text":
                    wanted |= prompt.text[b, layout.index[b]]
                found[kind].append((wanted & layout.valid[b]).nonzero().squeeze(1))
            else:
                inside = layout.valid[b] & (layout.index[b] < end)
                found[kind].append(inside.nonzero().squeeze(1)[-1:])
    return found
