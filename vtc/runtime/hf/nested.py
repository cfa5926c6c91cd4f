# SPDX-License-Identifier: Apache-2.0
"""The engine for models whose language model is a model of its own (BLIP-2 and its relatives).

Their `generate` merges images into embeddings and calls `language_model.generate` with these, so
that the base model's forward never runs. The forwards of the language model are hooked instead: one
inside a forward of the base model belongs to it; any other is a step of `generate`, or a call of
the user.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from vtc.core.errors import ArgumentError
from vtc.core.prefill import Stopwatch
from vtc.models.blip import Blip2, Blip2Seq2Seq
from vtc.runtime.forward import Forward
from vtc.runtime.hf.arguments import by_name
from vtc.runtime.hf.cache import cache_in, ledger_of
from vtc.runtime.hf.encoder import EncoderEngine
from vtc.runtime.hf.engine import Engine
from vtc.runtime.hf.generation import Request
from vtc.runtime.hf.guards import UNHANDLED, refuse_hidden_answers
from vtc.runtime.hf.images import Ends
from vtc.runtime.hf.override import Override
from vtc.runtime.hf.vision import Encoding
from vtc.runtime.signals import ImageSignals


class NestedEngine(Engine):
    """Runs `method` on a model that contains a language model with its own `generate`.

    Args:
        adapter: bound to the model.
        method: what to run.

    Raises:
        ArgumentError: the method acts in a stage or at a layer that the model lacks, or its parts
            do not compose.
        UnsupportedModelError: the method reads what vtc cannot capture in this model.
    """

    adapter: Blip2

    def _install(self) -> None:
        super()._install()
        inner = self.adapter.generator
        self.overrides += [
            Override(inner, "forward", self._run_language),
            Override(inner, "generate", self._generate_text),
        ]

    def _no_gaps(self) -> str | None:
        between = (part for part in self.method.parts if "layers" in part.stages)
        if self.adapter.learned and any(part.closes_gaps_by_choice for part in between):
            return (
                "whose positions are learned and added to what enters: gaps of tokens that are "
                "dropped between layers stay"
            )
        return super()._no_gaps()

    # ---- generate -----------------------------------------------------------------------------
    @property
    def _uncompiled(self) -> str:
        return "its language model is a model of its own"

    def _generate(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        self._check_in_place()
        request = Request(self.adapter.generator, original, args, kwargs)
        request.refuse_pieces()
        request.refuse_guesses("its prompt reaches the language model as embeddings")
        request.refuse_compiling(self._uncompiled)
        with self.calls.generate(images=True) as call:
            call.prompt_given = begin(self, self.adapter, request.given)
            with encoding(self, self.adapter, request.given):
                out = original(*args, **kwargs)
        if not call.handled:
            raise RuntimeError(UNHANDLED.format(model=type(self.adapter.model).__name__))
        return out

    def _generate_text(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """`generate` of the language model: as part of the model's own, or called by the user."""
        call = self.calls.generating
        if call is None or call.prompt_given is None:
            with self.calls.generate(images=False):
                return original(*args, **kwargs)
        begun, call.prompt_given = call.prompt_given, None
        embeds = kwargs["inputs_embeds"]
        begun.stop(self, embeds.device)
        mask, features = merged(self.adapter, begun.given, kwargs.get("input_ids"), embeds)
        call.embedded = mask, features, signals_of(self, self.adapter, features, begun.before)
        with self.calls.encode(None):
            return original(*args, **kwargs)

    # ---- forward ------------------------------------------------------------------------------
    def _run_base(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if self.adapter.model._compiled_call_impl is not None:
            self._warn_of_compiling()
        self._check_in_place()
        shown = kwargs.pop("prompt_labels", None)
        given = by_name(self.adapter.base, args, kwargs)
        labels = given.get("labels") if shown is None else shown
        if labels is None and self.calls.generating is None and self.reads_prompt:
            refuse_hidden_answers(self.adapter.model, self.method, given)
        with self.lock, self.calls.model(labels, given.get("logits_to_keep", 0)):
            return super()._run_base(original, *args, **kwargs)

    def _run_language(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        outer = self.forward
        if outer is not None and not outer.reached:
            outer.reached = True
            return original(*args, **kwargs)
        self._check_in_place()
        given = by_name(self.adapter.generator, args, kwargs)
        forward = Forward(
            labels=given.get("labels"),
            given=given,
            logits_to_keep=given.get("logits_to_keep", 0),
            generating=self.calls.step(),
            reached=True,
            choices=self._choices(),
        )
        with self._in_forward(forward):
            self._look_at_prompt(forward, given)
            out = original(*args, **kwargs)
        if forward.images_seen and forward.phase != "prefill":
            raise RuntimeError(UNHANDLED.format(model=type(self.adapter.model).__name__))
        return out

    def _look_at_prompt(self, forward: Forward, given: dict[str, Any]) -> None:
        """Give a step of `generate` that holds the prompt the images that were merged into it."""
        cache, step = cache_in(given), forward.generating
        if cache is not None and int(cache.get_seq_length()) > 0:
            return
        if step is None or step.embedded is None:
            if given.get("input_ids") is None and ledger_of(cache) is None:
                raise ArgumentError("inputs_embeds", _HIDDEN)
            return
        embeds = given.get("inputs_embeds")
        if embeds is None:
            raise ArgumentError(
                "use_cache",
                "without a cache, transformers feeds the prompt again without its images; leave it "
                "out, or unpatch",
            )
        mask, features, signals = step.embedded
        repeats = embeds.shape[0] // mask.shape[0]  # beams
        forward.images_seen = True
        of_rows = iter(signals)
        of_row = [[next(of_rows) for _ in range(n)] for n in _counts(mask, features)]
        signals = [found for own in of_row for _ in range(repeats) for found in own]
        mask = mask.repeat_interleave(repeats, dim=0)
        features = embeds[mask].view(-1, *features.shape[1:])
        show(self, self.adapter, forward, mask, features, signals)

    def _enter_decoder(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        ids = kwargs.get("input_ids")
        if ids is not None and ledger_of(cache_in(kwargs)) is not None:
            table = self.adapter.generator.get_input_embeddings()
            kwargs = {**kwargs, "input_ids": None, "inputs_embeds": table(ids)}
        return super()._enter_decoder(module, args, kwargs)

    @property
    def _slices_logits(self) -> bool:
        return True  # every language model of transformers does


class NestedEncoderEngine(EncoderEngine):
    """The same where the language model has an encoder, which the vision tokens enter.

    Args:
        adapter: bound to the model.
        method: what to run.

    Raises:
        ArgumentError: the method acts in a stage other than the sequence stage.
        UnsupportedModelError: the method reads what vtc cannot capture in this model.
    """

    adapter: Blip2Seq2Seq

    def _install(self) -> None:
        super()._install()
        self.overrides.append(Override(self.adapter.generator, "generate", self._generate_text))

    def _generate(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        def run(*args: Any, **kwargs: Any) -> Any:
            call = self.calls.generating
            if call is not None and call.images:
                call.prompt_given = begin(self, self.adapter, kwargs)
            with encoding(self, self.adapter, kwargs):
                return original(*args, **kwargs)

        return super()._generate(run, *args, **kwargs)

    def _generate_text(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """`generate` of the language model: as part of the model's own, or called by the user."""
        call = self.calls.generating
        if call is None or call.embedded is None:
            with self.calls.generate(images=False):
                return original(*args, **kwargs)
        forward = call.embedded
        if not forward.vision:  # otherwise the model has asked where they are
            embeds = kwargs["inputs_embeds"]
            call.prompt_given.stop(self, embeds.device)
            ids = forward.given.get("input_ids")
            mask, features = merged(self.adapter, forward.given, ids, embeds)
            signals = signals_of(self, self.adapter, features, None)
            show(self, self.adapter, forward, mask, features, signals)
        with self.calls.encode(None):
            return original(*args, **kwargs)

    def _enter_decoder(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        if self.forward is None and kwargs.get("inputs_embeds") is not None:
            raise ArgumentError("inputs_embeds", _HIDDEN)
        return super()._enter_decoder(module, args, kwargs)


_HIDDEN = (
    "the language model of a patched model cannot tell vision tokens from text in embeddings; call "
    "the whole model with pixel_values, or unpatch"
)


def merged(
    adapter: Blip2, given: Mapping[str, Any], ids: Tensor | None, embeds: Tensor
) -> tuple[Tensor, Tensor]:
    """Where the images are in the embeddings that a model made for its language model.

    Args:
        adapter: bound to the model.
        given: the arguments of the model's `generate`.
        ids: (b, s) the prompt, or `None`.
        embeds: (b, s, d) its embeddings.

    Returns:
        (b, s) bool, True at vision tokens, and their (images, n, d) contents.

    Raises:
        RuntimeError: they are no whole number of images.
    """
    mask = adapter.embedded(given, ids, embeds).to(embeds.device)
    per_image = adapter.queries()
    if adapter.encodes == "video":
        per_image *= given["pixel_values"].shape[1]
    if int(mask.sum()) % per_image:
        raise RuntimeError(
            f"{int(mask.sum())} vision tokens in the prompt, which are no whole number of images "
            f"of {per_image}: vtc cannot tell which image a token belongs to"
        )
    return mask, embeds[mask].view(-1, per_image, embeds.shape[-1])


def _counts(mask: Tensor, features: Tensor) -> list[int]:
    """The number of images (images, n, d) in each row of (b, s)."""
    return [int(count) // features.shape[1] for count in mask.sum(1)]


@dataclass(frozen=True)
class Begun:
    """A model's `generate` until its language model's begins.

    Attributes:
        given: its arguments.
        clock: runs meanwhile.
        started: what the clock returned.
        before: the latest features before, if any.
    """

    given: Mapping[str, Any]
    clock: Stopwatch
    started: Any
    before: list[Ends] | None

    def stop(self, engine: Engine, device: Any) -> None:
        """Report what has run as the encoding of the images.

        Args:
            engine: of the model.
            device: on which it ran.
        """
        self.clock.stop(self.started, device)
        encoding = engine.calls.encoding
        engine.calls.seen.clocks = self.clock, Stopwatch() if encoding is None else encoding.heard


def begin(engine: Engine, adapter: Blip2, given: Mapping[str, Any]) -> Begun:
    """Start the clock of a model's `generate`.

    Args:
        engine: of the model.
        adapter: bound to the model.
        given: the arguments of `generate`.
    """
    clock = Stopwatch()
    started = clock.start(adapter.base.query_tokens.device)
    return Begun(given, clock, started, engine.calls.seen.recent.get(adapter.encodes))


@contextmanager
def encoding(engine: Engine, adapter: Blip2, given: Mapping[str, Any]) -> Iterator[None]:
    """Context of a model's `generate`, which may run the tower and the Q-Former itself.

    Args:
        engine: hears what the method reads of them.
        adapter: bound to the model.
        given: the arguments of `generate`.
    """
    vision = engine.vision
    if not adapter.encodes_apart or not (vision.tower_layers or vision.reads_encoder):
        yield
        return
    bound = adapter.bind(adapter.model)
    with Encoding(vision, engine.calls, bound, adapter.encodes, given).listening():
        yield


def signals_of(
    engine: Engine, adapter: Blip2, features: Tensor, before: list[Ends] | None
) -> list[list[ImageSignals]]:
    """The signals of images that the model's `generate` has encoded.

    Args:
        engine: in its context `encoding`.
        adapter: bound to the model.
        features: (images, n, d) of the images.
        before: the latest features before `generate` began, if any.

    Returns:
        One list for each image.
    """
    if engine.calls.encoding is not None:
        found: list[list[ImageSignals]] = engine.calls.encoding.heard_of(features)
        return found
    recent = engine.calls.seen.recent.get(adapter.encodes)
    if recent is not None and recent is not before and len(recent) == len(features):
        return [of_one for _, _, of_one in recent]
    maps = adapter.image_maps(adapter.encodes, {}, features)
    return [[ImageSignals(found) for found in of_one] for of_one in maps]


def show(
    engine: Engine,
    adapter: Blip2,
    forward: Forward,
    mask: Tensor,
    features: Tensor,
    signals: list[list[ImageSignals]],
) -> None:
    """Tell a forward of the images that were merged into its embeddings.

    Args:
        engine: whose forward it is.
        adapter: bound to the model.
        forward: the forward.
        mask: (b, s) bool, True at vision tokens.
        features: (images, n, d) their contents.
        signals: one list for each image.
    """
    modality = adapter.encodes
    engine.vision.images.remember(engine.calls.seen.recent, modality, features, signals)
    forward.features[modality], forward.vision[modality] = features, mask
