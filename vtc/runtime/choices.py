# SPDX-License-Identifier: Apache-2.0
"""The selections of one forward, and how those for one image are made."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from vtc.core import Method, Selection, VisionTokens
from vtc.core.events import Event, Listener, Selected

Part = tuple[int, Method]
"""A method with its number in its composition."""

Decisions = dict[tuple[Any, ...], Selection | None]
"""Selections by ("sequence", part, row, image) or ("layers", part, layer, row)."""


@dataclass
class Choices:
    """What the methods chose in one forward.

    Attributes:
        listeners: called with every event.
        shows: whether someone listens to `Shown`, which costs something to make.
        decisions: the selections.
        memory: by part and row, what the part returned as memory in its last selection.
        dropped: numbers of the parts that dropped a token.
        replay: `decisions` are those of an earlier step, to be repeated without running a method.
    """

    listeners: Sequence[Listener] = ()
    shows: bool = False
    decisions: Decisions = field(default_factory=dict)
    memory: dict[tuple[int, int], Tensor | None] = field(default_factory=dict)
    dropped: set[int] = field(default_factory=set)
    replay: bool = False

    def emit(self, event: Event) -> None:
        """Call every listener with `event`, unless an earlier step was reported already."""
        if not self.replay:
            for listener in self.listeners:
                listener(event)


@dataclass(frozen=True)
class Chosen:
    """What is left of one image.

    Attributes:
        steps: each part that ran, with the (k,) tokens that it left, as indices into those that
            entered the first.
        features: (k, d) contents of the tokens left by the last.
        replaced: some method gave new contents.
    """

    steps: list[tuple[Method, Tensor]]
    features: Tensor
    replaced: bool

    @property
    def alive(self) -> Tensor:
        """(k,) indices of the tokens left by the last part that ran."""
        return self.steps[-1][1]


def choose(
    choices: Choices,
    parts: Sequence[Part],
    sample: int,
    image: int,
    features: Tensor,
    tokens: Callable[[Method, Tensor, Tensor], VisionTokens],
) -> Chosen | None:
    """Run the parts of the sequence stage on one image.

    Args:
        choices: of the forward in progress; receives the selections.
        parts: the methods, in order.
        sample: row of the batch.
        image: ordinal of the image in its sample.
        features: (n, d) contents of its tokens.
        tokens: makes what a method receives, from the method, the features (k, d) and the indices
            (k,) of the tokens that are left.

    Returns:
        What is left; `None` if there is no token, or no method.

    Raises:
        TypeError: a method does not return a `Selection`.
        ValueError: a selection is invalid.
    """
    alive = torch.arange(len(features), device=features.device)
    if not len(alive):  # the mask hides all that the tower made
        return None
    steps: list[tuple[Method, Tensor]] = []
    replaced = False
    for number, method in parts:
        key = ("sequence", number, sample, image)
        if choices.replay:
            selection = choices.decisions[key]
        else:
            shown = tokens(method, features, alive)
            with no_autocast(features):
                selection = checked(method, method.select(shown), len(shown))
            choices.decisions[key] = selection
            choices.emit(Selected("sequence", method, sample, image, None, len(shown), selection))
        assert selection is not None
        index = selection.indices.to(alive.device)
        if len(index) < len(alive):
            choices.dropped.add(number)
        alive, features = alive[index], features[index]
        if selection.features is not None:
            features, replaced = selection.features.to(features), True
        steps.append((method, alive))
    return Chosen(steps, features, replaced) if steps else None


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
            number from the features; or `sources` does not map the n tokens onto these k.
    """
    if not isinstance(selection, Selection):
        raise TypeError(f"{method.name}: expected a Selection, got {type(selection).__name__}")
    indices, features, sources = selection.indices, selection.features, selection.sources
    if indices.dim() != 1 or indices.dtype != torch.long:
        raise ValueError(
            f"{method.name}: indices must be an int64 tensor of shape (k,), "
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
    if sources is not None:
        if sources.dtype != torch.long or sources.shape != (n,):
            raise ValueError(
                f"{method.name}: sources must be an int64 tensor of shape ({n},), "
                f"got {sources.dtype} {tuple(sources.shape)}"
            )
        if n and not -1 <= int(sources.min()) <= int(sources.max()) < max(len(indices), 0):
            raise ValueError(
                f"{method.name}: sources must lie within [-1, {len(indices)}), "
                f"got {int(sources.min())} to {int(sources.max())}"
            )
    return selection
