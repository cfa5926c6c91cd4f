# SPDX-License-Identifier: Apache-2.0
"""Moves methods to layers with attention, in decoders of which not every layer has it."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

from vtc.core import Method
from vtc.core.errors import ArgumentError
from vtc.core.method import Compose


def fit(method: Method, attends: Sequence[bool]) -> Method:
    """The method, acting as early as it can but not before its published layers.

    Only layers that are left at their defaults move: those that a user sets are taken as they are.
    A method whose layers cannot move, or that finds none, is returned as it is.

    Args:
        method: the method, a composition or a wrapper.
        attends: by decoder layer, whether it has attention weights that can be read.
    """
    if all(attends):
        return method
    if isinstance(method, Compose):
        return Compose(tuple(fit(part, attends) for part in method.methods))
    for field in dataclasses.fields(method):  # type: ignore[arg-type]
        value = getattr(method, field.name)
        if isinstance(value, Method):  # a wrapper
            fitted: Any = {field.name: fit(value, attends)}
            return dataclasses.replace(method, **fitted)  # type: ignore[type-var]
        if field.name in ("layer", "layers") and method.is_default(field, value):
            found = (c for c in _candidates(method, field.name, attends) if not _blind(c, attends))
            return next(found, method)
    return method


def _candidates(method: Any, name: str, attends: Sequence[bool]) -> Iterator[Method]:
    """The method, then with its layers moved up one at a time."""
    total = len(attends)
    try:
        cuts = method.prune_layers(total)
    except ArgumentError:  # too shallow for it
        return
    yield method
    if name == "layer":
        for layer in range(1, total):
            moved = _with(method, total, layer=layer)
            if moved is not None and moved.prune_layers(total)[0] > cuts[0]:
                yield moved
        return
    # Some name the layers before which they cut, some those after.
    named = ([*cuts], [cut - 1 for cut in cuts])
    layers = next(n for n in named if _cuts(_with(method, total, layers=tuple(n)), total) == cuts)
    while (moved := _with(method, total, layers=tuple(layers))) is not None:
        yield moved
        cuts = moved.prune_layers(total)
        late = next((i for i, cut in enumerate(cuts) if _blind_at(moved, cut, attends)), 0)
        layers[late] += 1
        for i in range(late + 1, len(layers)):
            layers[i] = max(layers[i], layers[i - 1] + 1)


def _with(method: Any, total: int, **layers: Any) -> Method | None:
    """The method with other layers, or `None` if it takes none such in a decoder of `total`."""
    try:
        moved: Method = dataclasses.replace(method, **layers)
        moved.prune_layers(total)
    except ArgumentError:
        return None
    return moved


def _cuts(method: Method | None, total: int) -> tuple[int, ...] | None:
    return None if method is None else method.prune_layers(total)


def _blind(method: Method, attends: Sequence[bool]) -> bool:
    """Whether it reads attention or keys of a layer that has none."""
    return any(_blind_at(method, cut, attends) for cut in method.prune_layers(len(attends)))


def _blind_at(method: Method, cut: int, attends: Sequence[bool]) -> bool:
    """Whether it does so by the time it acts before layer `cut`."""
    total = len(attends)
    seen = {*method.taps(total)}
    seen |= {layer for layer, names in method.records(total).items() if names & {"keys", "rotary"}}
    read = {layer for layer in seen if layer < cut} | {*method.peeks(total)} & {cut}
    return not all(attends[layer] for layer in read)
