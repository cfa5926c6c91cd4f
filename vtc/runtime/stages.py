# SPDX-License-Identifier: Apache-2.0
"""Runs methods on a prompt, one image or one sample at a time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from vtc.core import SIGNALS, LayerState, Method, Rows, VisionTokens
from vtc.core.events import Selected, Shown
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


def show_images(forward: Forward, embeds: Tensor) -> None:
    """Report every image, as it enters the language model, to those who listen.

    Args:
        forward: the forward in progress.
        embeds: (b, s, d) what would enter.
    """
    if forward.choices.replay or not forward.choices.shows:
        return
    for span in forward.prompt.spans:
        made = _made(span, embeds.device)
        features = embeds[span.sample, span.index[made]]
        if len(made):
            tokens = _tokens(span, features, made, patches=span.signals.filled_patches)
            forward.choices.emit(Shown(span.sample, tokens))


def _made(span: ImageSpan, device: torch.device) -> Tensor:
    """(k,) which tokens of an image the tower made."""
    if span.signals.kept is not None:
        return span.signals.kept.to(device)
    return torch.arange(len(span.index), device=device)


def select_in_sequence(
    forward: Forward,
    parts: Sequence[Part],
    embeds: Tensor,
    held: Tensor,
    tower_layer: TowerPlace,
    project: Callable[[Tensor], Tensor] | None,
) -> tuple[Tensor, Tensor]:
    """Run the sequence-stage methods on every image.

    Args:
        forward: the forward in progress. `choices` receives the selections; `places.gap` marks
            tokens that a method with contiguous positions drops.
        parts: the methods of the sequence stage, in order.
        embeds: (b, s, d) what would enter the language model.
        held: (b, s) bool, the tokens left by what acted before.
        tower_layer: maps a method and its layer setting to a 0-based tower layer.
        project: the projector, (k, d_v) to (k, d); `None` if it joins patches.

    Returns:
        `embeds` with merged contents in place, and (b, s) bool of the kept tokens.

    Raises:
        TypeError: a method does not return a `Selection`.
        ValueError: a selection is invalid.
    """
    prompt, gap = forward.prompt, forward.places.gap
    keep, given = held.clone(), embeds
    for span in prompt.spans:
        b, made = span.sample, _made(span, embeds.device)
        first = held[b, span.index[made]].nonzero().squeeze(1)  # of those, not dropped since
        filled = made[first]

        def tokens(
            method: Method,
            features: Tensor,
            alive: Tensor,
            span: ImageSpan = span,
            first: Tensor = first,
            filled: Tensor = filled,
        ) -> VisionTokens:
            signals = _signals(forward, method, span, first[alive], given, tower_layer, project)
            return _tokens(span, features, filled[alive], **signals)

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
        keep[b, span.index[filled]] = False
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
    found: dict[str, Any] = {"project": project} if "encoder" in method.needs else {}
    for need in method.needs:
        spec = SIGNALS[need]
        if spec.source == "text":
            last = int(span.index[-1])
            text = forward.prompt.text_for(b, span.ordinal, last, segment=need == "segment")
            found[need] = embeds[b, text]
            continue
        source: Any = signals
        if spec.layer is not None:
            source = signals.tower[tower_layer(method, getattr(method, spec.layer))]
        for part in spec.fields:
            for name, attribute in part.captures.items():
                value = getattr(source, attribute, None)
                if isinstance(value, Tensor):
                    value = value.to(device)
                    value = value[alive] if part.scope == "token" else value
                found.setdefault(name, value)
    return found


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
    layout, prompt, choices = forward.layout, forward.prompt, forward.choices
    keep = layout.valid.clone()
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
            state = _layer_state(forward, part, layer, num_layers, b, places, hidden[b], ahead)
            versions = _versions(state)
            with no_autocast(hidden):
                selection = method.prune(state)
            if _versions(state) != versions:
                raise RuntimeError(
                    f"{method.name}: prune wrote to tensors of its state in place; these belong to "
                    "the model: compute with copies"
                )
            if selection is not None:
                selection = checked(method, selection, n)
                choices.memory[number, b] = selection.memory
                choices.emit(Selected("layers", method, b, None, layer, n, selection))
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
        left = torch.zeros(prompt.length, dtype=torch.bool, device=index.device)
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


def _layer_state(
    forward: Forward,
    part: Part,
    layer: int,
    num_layers: int,
    b: int,
    places: Tensor,
    hidden: Tensor,
    ahead: Heard | None,
) -> LayerState:
    """What a method receives of row `b`, whose tokens are at `places` (s,) of the current layout,
    with `hidden` (k, d) states of all places; the rest as for `prune_between_layers`."""
    number, method = part
    layout, prompt, captured, device = (
        forward.layout, forward.prompt, forward.captured, hidden.device
    )  # fmt: skip
    index, length = layout.index[b, places], prompt.length
    records = method.records(num_layers)

    def attended(heard: Heard, rows: Rows) -> Tensor:
        return heard.at(rows, b, index, length, method.by_head).to(device)

    return LayerState(
        layer=layer,
        num_layers=num_layers,
        hidden=still_held(hidden, layout, b, index, length),
        image=prompt.image[b, index].to(device),
        text=prompt.text[b, index].to(device),
        grid=prompt.grid[b, index].to(device),
        prompt_length=int((index < prompt.ends[b]).sum()),
        original=tuple(len(span.index) for span in prompt.spans if span.sample == b),
        attention={
            tapped: attended(captured.attention[tapped], rows)
            for tapped, rows in method.taps(num_layers).items()
            if tapped in captured.attention
        },
        ahead=None if ahead is None else attended(ahead, method.peeks(num_layers)[layer]),
        recorded={
            (at, name): still_held(kept[b], before, b, index, length).to(device)
            for (at, name), (before, kept) in captured.records.items()
            if name in records.get(at, ())
        },
        memory=forward.choices.memory.get((number, b)),
    )


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
