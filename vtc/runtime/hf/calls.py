# SPDX-License-Identifier: Apache-2.0
"""What is under way on a patched model, by thread: state of a call belongs to the call."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vtc.runtime.hf.cache import cache_in

_ENCODED = "mm_encoder_outputs"
PIXELS = ("pixel_values", "pixel_values_videos", "pixel_values_images")


@dataclass
class Generating:
    """One call of `generate`.

    Attributes:
        images: it was given images.
        width: tokens of a row of its prompt, if guesses reach the model together with it.
        asked: the next call of the model is a step of it, and no call that a logits processor or
            a stopping criterion makes; `None` while nothing told.
        handled: images of it reached a method.
        prompt: what the first step without a cache was given, and what was chosen in it.
        masks: those that `generate` would have handed to its first step on a static cache.
    """

    images: bool = False
    width: int | None = None
    asked: bool | None = None
    handled: bool = False
    prompt: tuple[Mapping[str, Any], Any] | None = None
    masks: Any = None

    def chosen(self, given: Mapping[str, Any], made: Any) -> Any:
        """Without a cache, `generate` feeds the prompt again at every step: what was chosen at the
        first one holds, as it does with a cache.

        Args:
            given: the arguments of this step.
            made: what is to hold for later steps, if this is the first.

        Returns:
            What was made at the first step, or `None` if this is it, or if there is a cache.
        """
        if cache_in(given) is not None:
            return None
        if self.prompt is None:
            self.prompt = given, made
            return None
        before, found = self.prompt
        return found if _continues(before, given) else None


@dataclass
class Asked:
    """What the model was given that its base model is not told: `labels`, and `logits_to_keep`,
    `None` if the base model runs alone."""

    labels: Tensor | None = None
    logits: Any = None
    generating: Generating | None = None


class Calls(threading.local):
    """The calls that this thread is in, the innermost of each kind."""

    def __init__(self) -> None:
        self.generating: Generating | None = None
        self.asked: Asked | None = None
        self.forward: Any = None
        self.vision: dict[str, Any] = {}

    def refuse_in_forward(self) -> None:
        """Raise `RuntimeError` where a patch would be taken off a model that is running."""
        if self.forward is not None:
            raise RuntimeError(
                "patch: it cannot be taken off, replaced or disabled by something that the model "
                "calls in the middle of a forward; do so between two forwards"
            )

    @contextmanager
    def generate(self, images: bool, width: int | None = None) -> Iterator[Generating]:
        """A call of `generate`, perhaps within another one."""
        before, vision = self.generating, self.vision
        self.generating = Generating(images, width)
        try:
            yield self.generating
        finally:
            self.generating, self.vision = before, vision

    @contextmanager
    def model(self, labels: Tensor | None, logits: Any) -> Iterator[None]:
        """A call of the model, whose base model is told what it was given."""
        before, self.asked = self.asked, Asked(labels, logits, self.step())
        try:
            yield
        finally:
            self.asked = before

    def take_asked(self) -> Asked:
        """What the model that calls its base model now was given; to be asked for once."""
        asked, self.asked = self.asked, None
        return asked if asked is not None else Asked(generating=self.step())

    def step(self) -> Generating | None:
        """The call of `generate` of which the call of the model that begins now is a step."""
        found = self.generating
        if found is None or found.asked is False:
            return None
        if found.asked:
            found.asked = False
        return found


def _continues(before: Mapping[str, Any], given: Mapping[str, Any]) -> bool:
    """Whether `given` is the prompt `before` with more tokens after it, and the same images."""
    old, new = before.get("input_ids"), given.get("input_ids")
    if old is None or new is None:
        return True
    if old.shape[0] != new.shape[0] or not torch.equal(old, new[:, : old.shape[1]]):
        return False
    return all(_same(before.get(name), given.get(name)) for name in (*PIXELS, _ENCODED))


def _same(a: Any, b: Any) -> bool:
    if a is b:
        return True
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a.shape == b.shape and torch.equal(a, b.to(a.device))
    if isinstance(a, Mapping) and isinstance(b, Mapping):
        return a.keys() == b.keys() and all(_same(a[name], b[name]) for name in a)
    if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)):
        return len(a) == len(b) and all(map(_same, a, b))
    return bool(a == b)
