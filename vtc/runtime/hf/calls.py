# SPDX-License-Identifier: Apache-2.0
"""The calls in progress on a patched model, per thread."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from vtc.core.prefill import Stopwatch
from vtc.runtime.hf import taps
from vtc.runtime.hf.cache import cache_in
from vtc.runtime.hf.images import Recent

_ENCODED = "mm_encoder_outputs"
PIXELS = ("pixel_values", "pixel_values_videos", "pixel_values_images", "image_pixel_values")


@dataclass
class Generating:
    """One call of `generate`.

    Attributes:
        images: the call has images.
        width: tokens per row of the prompt, if candidate tokens reach the model together with it.
        asked: whether the next call of the model is a step of `generate`, and not one that a logits
            processor or a stopping criterion makes; `None` before `generate` prepares inputs.
        handled: a method has received the images.
        prompt: the arguments of the first step without a cache, and its selections.
        prompt_given: where the language model is a model of its own, what the whole model's
            `generate` was given and when it began, until the language model's begins.
        embedded: the placeholders (b, s) bool and the features (images, n, d) that entered as
            embeddings there.
        kept: of an encoder's output, the layout of the tokens left and the length of its input.
        masks: the masks that `generate` builds for its first step on a static cache.
        prepared: the cache for which a step was prepared last, or `None`.
    """

    images: bool = False
    width: int | None = None
    asked: bool | None = None
    handled: bool = False
    prompt: tuple[Mapping[str, Any], Any] | None = None
    prompt_given: Any = None
    embedded: Any = None
    kept: Any = None
    masks: Any = None
    prepared: Any = None

    def chosen(self, given: Mapping[str, Any], made: Any) -> Any:
        """The selections of the first step, for `generate` without a cache, which feeds the prompt
        again at every step.

        Args:
            given: the arguments of this step.
            made: the selections to store, if this is the first step.

        Returns:
            What the first step stored; `None` at the first step, with a cache, or if `given` does
            not continue the first step's prompt.
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
    """Arguments of the model that its base model does not receive.

    Attributes:
        labels: (b, s) labels, or `None`.
        logits: `logits_to_keep`; `None` if the base model runs alone.
        generating: the call of `generate` of which this is a step, or `None`.
    """

    labels: Tensor | None = None
    logits: Any = None
    generating: Generating | None = None


@dataclass
class Seen:
    """The images that were encoded since the last forward, or in this one.

    Attributes:
        recent: the latest features, by modality.
        clocks: of the last encoding: all of it, and the captures alone.
    """

    recent: Recent = field(default_factory=dict)
    clocks: tuple[Stopwatch, Stopwatch] = field(default_factory=lambda: (Stopwatch(), Stopwatch()))

    def take_clocks(self) -> tuple[Stopwatch, Stopwatch]:
        """Return and reset the clocks."""
        clocks, self.clocks = self.clocks, (Stopwatch(), Stopwatch())
        return clocks


class Calls(threading.local):
    """The innermost call of each kind in this thread.

    Attributes:
        generating: the call of `generate`, or `None`.
        asked: the call of the model with its head, until its base model takes it; or `None`.
        forward: the forward of the base model, or `None`.
        encoding: the call that encodes images, or `None`.
        seen: the images that were encoded.
    """

    def __init__(self) -> None:
        self.generating: Generating | None = None
        self.asked: Asked | None = None
        self.forward: Any = None
        self.encoding: Any = None
        self.seen = Seen()

    def refuse_in_forward(self) -> None:
        """Refuse to remove a patch while the model runs.

        Raises:
            RuntimeError: this thread is in a forward.
        """
        if self.forward is not None:
            raise RuntimeError(
                "patch: it cannot be removed, replaced or disabled during a forward; do it between "
                "two forwards"
            )

    @contextmanager
    def generate(self, images: bool, width: int | None = None) -> Iterator[Generating]:
        """Context of a call of `generate`; calls may nest.

        Args:
            images: the call has images.
            width: tokens per row of the prompt, if candidate tokens follow it.

        Yields:
            The call.
        """
        before, seen = self.generating, self.seen
        self.generating = Generating(images, width)
        self.seen = Seen(dict(seen.recent), seen.take_clocks())
        try:
            yield self.generating
        finally:
            self.generating, self.seen = before, seen

    @contextmanager
    def model(self, labels: Tensor | None, logits: Any) -> Iterator[None]:
        """Context of a call of the model with its head, whose arguments the base model can read.

        Args:
            labels: (b, s) labels, or `None`.
            logits: `logits_to_keep`.
        """
        before, self.asked = self.asked, Asked(labels, logits, self.step())
        try:
            yield
        finally:
            self.asked = before

    @contextmanager
    def run(self, forward: Any) -> Iterator[None]:
        """Context of a forward of the base model. A nested one sees nothing of the outer.

        Args:
            forward: its state.
        """
        before = self.forward, self.encoding, self.seen
        heard = () if self.encoding is None else self.encoding.taps.values()
        if self.forward is not None:
            self.seen = Seen()
        self.forward, self.encoding = forward, None
        try:
            with taps.suspended(heard):
                yield
        finally:  # also after an error or an interrupt
            self.forward, self.encoding, self.seen = before

    @contextmanager
    def encode(self, encoding: Any) -> Iterator[None]:
        """Context of a call that encodes images.

        Args:
            encoding: its state.
        """
        before, self.encoding = self.encoding, encoding
        try:
            yield
        finally:
            self.encoding = before

    def take_asked(self) -> Asked:
        """Return and clear the arguments of the model that calls its base model now."""
        asked, self.asked = self.asked, None
        return asked if asked is not None else Asked(generating=self.step())

    def step(self) -> Generating | None:
        """The call of `generate` of which the model call that begins now is a step, or `None`.

        The step counts once: a further call before `generate` prepares inputs again returns `None`.
        """
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
