# SPDX-License-Identifier: Apache-2.0
"""The engine for models whose cross-attention layers read vision states (Mllama).

The decoder sequence contains no vision tokens, so no token is removed and no position changes.
Dropped states are removed between the projector and the decoder; the cross layers compute and cache
keys and values of the remaining states only. In this step and every later one, the base model's
mask over all states is indexed at the remaining columns.

The [CLS] state of each tile always stays, so that a token that sees a tile has something to attend
to. States of padding tiles and padding images go as soon as anything is dropped. Tokens that see an
image never see those; transformers lets only tokens that see no image, such as those before the
first image, attend to every state of their row, and skip the layer's MLP for them. Under a patch
that drops anything, such tokens attend to the remaining states, and a row without images computes
what it does in a batch of text. In the plain model both depend on how many images the other rows
have. If every image keeps all of its tokens, nothing is removed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers.masking_utils import create_masks_for_generate

from vtc.core import Method, VisionTokens
from vtc.core.errors import ArgumentError
from vtc.core.events import Shown
from vtc.core.prefill import ImageTokens, Prefill, Sample, Stopwatch, logits_of
from vtc.core.signals import read_in_tower
from vtc.models import UnsupportedModelError
from vtc.models.mllama import CrossImage, Mllama
from vtc.runtime.choices import Choices, choose
from vtc.runtime.hf.arguments import by_name, split_mask
from vtc.runtime.hf.cache import attach, cache_in, ledger_of
from vtc.runtime.hf.calls import Generating
from vtc.runtime.hf.generation import Request
from vtc.runtime.hf.guards import refuse_packed
from vtc.runtime.hf.hooked import Hooked
from vtc.runtime.layout import Layout, gather_tokens
from vtc.runtime.ledger import Group, Ledger
from vtc.runtime.prompt import prompt_ends, text_for


@dataclass
class Columns(Group):
    """The vision states that the cross layers of a cache hold.

    Attributes:
        length: number of states held, padding included.
        valid: (b, length) bool, False at padding.
        index: (b, length) the column of each state in the model's own mask.
        total: number of columns of that mask.
    """

    index: Tensor = field(default_factory=lambda: torch.empty(0))
    total: int = 0

    def append(self, layout: Layout, total: int) -> None:
        """Append states.

        Args:
            layout: (b, k) the states that are kept, as columns of the new ones.
            total: number of new columns of the model's own mask.
        """
        index = layout.index + self.total
        self.index = torch.cat([self.index, index], dim=1) if self.length else index
        self.extend(layout.valid, index.shape[1])
        self.total += total

    def map_rows(self, index: Tensor) -> None:
        """Take the rows `index` (b',)."""
        super().map_rows(index)
        self.index = self.index[index.to(self.index.device)]

    def repeat_rows(self, repeats: int) -> None:
        """Repeat each row `repeats` times."""
        super().repeat_rows(repeats)
        self.index = self.index.repeat_interleave(repeats, dim=0)


@dataclass
class _Call:
    """One forward: the arguments of the base model, and the state of the compression."""

    given: dict[str, Any]
    labels: Tensor | None
    logits_to_keep: Any = None
    generating: Generating | None = None
    vision: Stopwatch = field(default_factory=Stopwatch)
    selector: Stopwatch = field(default_factory=Stopwatch)
    lm: Stopwatch = field(default_factory=Stopwatch)
    vision_started: Any = None
    lm_started: Any = None
    ledger: Ledger | None = None
    logical: int = 0
    samples: list[Sample] | None = None
    choices: Choices = field(default_factory=Choices)
    prompt_end: Tensor | None = None


class CrossEngine(Hooked):
    """Runs `method` on a model whose cross-attention layers read the vision states.

    Args:
        adapter: bound to the model.
        method: what to run.

    Raises:
        ArgumentError: the method acts in a stage other than the sequence stage.
        UnsupportedModelError: the method reads signals of the vision tower.
    """

    adapter: Mllama

    def __init__(self, adapter: Mllama, method: Method) -> None:
        super().__init__(adapter, method)
        for part in method.parts:
            if read := part.needs & read_in_tower():
                raise UnsupportedModelError(
                    f"model: {part.name} reads {', '.join(sorted(read))} of the vision tower, and "
                    f"the states of {type(adapter.model).__name__} join several layers of two "
                    "encoders over all tiles, for which this has no meaning; choose a method that "
                    "reads features or text"
                )
        self.parts = tuple(enumerate(method.parts))
        self.cross_layers = adapter.cross_layers()

    def _refuses(self, stage: str) -> bool:
        return stage not in self.adapter.stages

    def _lacks(self, stage: str) -> str:
        return (
            f"{self.method} acts in the stage {stage!r}, which {type(self.adapter.model).__name__} "
            "does not have: its vision states are read by cross-attention layers and are no tokens "
            "of the decoder, and all tiles pass its tower together; it has "
            f"{', '.join(self.adapter.stages)}"
        )

    def _no_gaps(self) -> str | None:
        return "whose vision states have no positions"

    @property
    def call(self) -> _Call | None:
        """The innermost forward of this thread, or `None` outside a forward."""
        found: _Call | None = self.calls.forward
        return found

    # ---- the model ----------------------------------------------------------------------------
    def _generate(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        request = Request(self.adapter.model, original, args, kwargs)
        request.refuse_compiling("its cross layers run as they are under a patch")
        if request.given.get("pixel_values") is not None:
            request.refuse_pieces()
            request.refuse_guesses(
                "taking back those that were wrong would cut vision states off the cross layers' "
                "cache"
            )
        with self.calls.generate(request.given.get("pixel_values") is not None):
            return original(*args, **kwargs)

    def _create_masks(self, original: Callable[..., Any] | None, **kwargs: Any) -> Any:
        """Keep the 2-D mask at the prefill; the decoder builds its own from it."""
        if kwargs.get("is_first_iteration"):
            return kwargs.get("attention_mask")
        return (original or create_masks_for_generate)(**kwargs)

    def _run_base(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if self.calls.asked is None:  # otherwise the model with its head has checked
            self._check_in_place()
        asked = self.calls.take_asked()
        given = by_name(self.adapter.base, args, kwargs)
        self.adapter.check_inputs(given)
        call = _Call(given, asked.labels, asked.logits, asked.generating, choices=self._choices())
        with self.lock, self.calls.run(call):
            try:
                if given.get("pixel_values") is not None:
                    call.vision_started = call.vision.start(given["pixel_values"].device)
                return original(*args, **kwargs)
            finally:  # also after an error or an interrupt
                if call.ledger is not None:
                    call.ledger.may_write = False

    # ---- decoder ------------------------------------------------------------------------------
    def _enter_decoder(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        call, ledger = self.call, ledger_of(cache_in(kwargs))
        if call is None:
            return None
        if kwargs.get("cross_attention_states") is not None:
            self._compress(call, ledger, kwargs)
        elif ledger is not None:
            ledger.may_write, call.ledger = True, ledger
            call.logical = ledger.logical + _tokens(kwargs).shape[1]
            self._narrow(ledger, kwargs)
        return args, kwargs

    def _compress(self, call: _Call, ledger: Ledger | None, kwargs: dict[str, Any]) -> None:
        """Prefill with images: run the methods and pass on the states that are kept."""
        states, cache = kwargs["cross_attention_states"], cache_in(kwargs)
        call.vision.stop(call.vision_started, call.given["pixel_values"].device)
        call.lm_started = call.lm.start(states.device)
        shape, tokens = states.shape, _tokens(kwargs)
        rows, count = tokens.shape[:2]
        past = int(cache.get_seq_length()) if cache is not None else 0
        _, valid = split_mask(call.given.get("attention_mask"), past, rows, count)
        if valid is None:
            valid = torch.ones(rows, count, dtype=torch.bool, device=tokens.device)
        with call.selector.measure(states.device):
            images = self.adapter.images(call.given)
            self._freeze(call, valid)
            states = states.reshape(rows, -1, shape[-1])
            before = states
            states, keep, left = self._select(call, images, states, valid)
            dropped = any(
                kept < len(image.columns)
                for own, of_row in zip(images, left, strict=True)
                for image, kept in zip(own, of_row, strict=True)
            )
            if dropped or states is not before:
                flash = "flash" in (self.adapter.decoder.config._attn_implementation or "")
                refuse_packed(call.given, kwargs, flash)
            if not dropped:
                keep = torch.ones_like(keep)
            if dropped or ledger is not None:
                layout, place = Layout.whole(torch.ones_like(keep)).compact(keep)
                # A zero state has a zero key and a zero value: for a row of zero states only, the
                # cross layers leave the residual stream unchanged.
                kept_states = gather_tokens(states, place).masked_fill(~layout.valid[..., None], 0)
                kwargs["cross_attention_states"] = kept_states
                call.ledger = ledger or self._fresh(cache, rows, past, keep.device)
                self._columns(call.ledger).append(layout, keep.shape[1])
                call.ledger.may_write, call.logical = True, past + count
                self._narrow(call.ledger, kwargs)
            elif states is not before:
                kwargs["cross_attention_states"] = states.reshape(shape)
        held = keep.sum(1).tolist()
        call.samples = [
            self._sample(call, int(valid[b].sum()), held[b], images[b], left[b])
            for b in range(rows)
        ]

    def _select(
        self, call: _Call, images: list[list[CrossImage]], states: Tensor, valid: Tensor
    ) -> tuple[Tensor, Tensor, list[list[int]]]:
        """Run the methods on every image.

        Args:
            states: (b, n, d) what the cross layers would read.
            valid: (b, s) bool, False at padding tokens.

        Returns:
            The states with merged contents in place, (b, n) bool of the kept states, and the number
            of kept patches by row and image.
        """
        keep = torch.zeros(states.shape[:2], dtype=torch.bool, device=states.device)
        left: list[list[int]] = []
        replaced: list[tuple[int, Tensor, Tensor]] = []
        for b, own in enumerate(images):
            left.append([])
            for i, image in enumerate(own):
                current = image.columns.to(states.device)

                def tokens(
                    method: Method | None,
                    features: Tensor,
                    alive: Tensor,
                    b: int = b,
                    i: int = i,
                    image: CrossImage = image,
                    count: int = len(own),
                ) -> VisionTokens:
                    texts = {}
                    if method is not None:
                        texts = self._texts(call, method, b, i, count, valid)
                    return VisionTokens.among(
                        features,
                        image.grid,
                        image.crop,
                        alive,
                        total=len(image.columns),
                        image=i,
                        **texts,
                    )

                if call.choices.shows and len(current):
                    shown = tokens(None, states[b, current], torch.arange(len(current)))
                    call.choices.emit(Shown(b, shown))
                chosen = choose(call.choices, self.parts, b, i, states[b, current], tokens)
                if chosen is not None:
                    current = current[chosen.alive]
                    if chosen.replaced:
                        replaced.append((b, current, chosen.features))
                keep[b, current] = True
                keep[b, image.cls.to(states.device)] = True
                left[b].append(len(current))
        if replaced:
            states = states.clone()
            for b, current, features in replaced:
                states[b, current] = features
        return states, keep, left

    def _texts(
        self, call: _Call, method: Method, b: int, image: int, count: int, valid: Tensor
    ) -> dict[str, Any]:
        """The text signals that `method` needs for image `image`, one of `count`, of row `b`."""
        if not method.needs & {"text", "segment"}:
            return {}
        ids = call.given.get("input_ids")
        if ids is None:
            raise ArgumentError(
                "inputs_embeds",
                f"{method.name} reads the prompt's text, in which embeddings do not "
                "tell where images stand; pass input_ids, or unpatch",
            )
        marks = (ids[b] == self.adapter.image_token()) & valid[b]
        places = marks.nonzero().flatten().tolist()
        if len(places) != count:
            raise ArgumentError(
                "input_ids",
                f"row {b} has {len(places)} image tokens for {count} images, and "
                f"{method.name} reads the text between them",
            )
        assert call.prompt_end is not None
        place = torch.arange(len(marks), device=ids.device)
        text = valid[b] & ~marks & (place > places[0]) & (place < call.prompt_end[b])
        ordinal = torch.where(marks, marks.cumsum(0) - 1, -1)
        embedded = self.adapter.decoder.embed_tokens(ids[b])
        return {
            need: embedded[text_for(text, ordinal, image, places[image], need == "segment")]
            for need in method.needs & {"text", "segment"}
        }

    def _freeze(self, call: _Call, valid: Tensor) -> None:
        """Record where the prompt ends; in `generate` without a cache, repeat the selections of the
        first step."""
        call.prompt_end = self._prompt_end(call, valid)
        made = call.choices.decisions, call.prompt_end
        found = call.generating and call.generating.chosen(call.given, made)
        if found:
            decisions, call.prompt_end = found
            call.choices = replace(call.choices, decisions=decisions, replay=True)

    def _prompt_end(self, call: _Call, valid: Tensor) -> Tensor:
        """(b,) end of the prompt: the start of the scored answer, or the end of the tokens."""
        ids = call.given.get("input_ids")
        if ids is None:
            return prompt_ends(torch.zeros_like(valid), None)
        return prompt_ends(ids == self.adapter.image_token(), call.labels)

    def _fresh(self, cache: Any, rows: int, past: int, device: torch.device) -> Ledger:
        """A ledger for a cache that holds `past` tokens and the states of a plain prefill."""
        columns = Columns(first_layer=0, diverged=True)
        layer = self._cross_layer(cache)
        keys = getattr(layer, "keys", None)
        held = 0 if keys is None or keys.dim() != 4 else keys.shape[-2]
        if held and not getattr(layer, "is_compileable", False):
            whole = torch.ones(rows, held, dtype=torch.bool, device=device)
            columns.append(Layout.whole(whole), held)
        return Ledger([columns], logical=past)

    def _cross_layer(self, cache: Any) -> Any:
        first = self.cross_layers[0]
        layers = getattr(cache, "layers", ())
        return layers[first] if first < len(layers) else None

    @staticmethod
    def _columns(ledger: Ledger) -> Columns:
        columns = ledger.groups[0]
        assert isinstance(columns, Columns)
        return columns

    def _narrow(self, ledger: Ledger, kwargs: dict[str, Any]) -> None:
        """Index the masks over all states at the columns that the cache holds."""
        columns = self._columns(ledger)
        assert columns.valid is not None
        mask, full = kwargs.get("cross_attention_mask"), "full_text_row_masked_out_mask"
        dtype = self.adapter.base.dtype if mask is None else mask.dtype
        some = columns.valid.any(1, keepdim=True)
        if mask is None:
            found = torch.zeros(*columns.valid[:, None, None].shape, dtype=dtype)
            found = found.to(columns.valid.device)
        else:
            if mask.shape[-1] != columns.total:
                raise ArgumentError(
                    "cross_attention_mask",
                    f"it covers {mask.shape[-1]} vision states, but images "
                    f"so far have {columns.total}; give one column for each tile of each image",
                )
            found = mask.gather(-1, columns.index[:, None, None].expand(-1, *mask.shape[1:3], -1))
        shut = (~columns.valid & some)[:, None, None]
        lowest = torch.finfo(dtype).min
        found = found.masked_fill(shut, lowest)
        layer = self._cross_layer(cache_in(kwargs))
        if getattr(layer, "is_compileable", False):  # a static cache has spare room at the end
            spare = layer.max_cache_len - columns.length
            found = nn.functional.pad(found, (0, spare), value=lowest)
        kwargs["cross_attention_mask"] = found
        if not bool(some.all()):
            seen = some[:, None, :, None].to(dtype)
            kwargs[full] = seen if kwargs.get(full) is None else kwargs[full] * seen

    def _leave_decoder(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> None:
        call = self.call
        if call is None:
            return
        if call.ledger is not None:  # only now: the decoder derives positions from it
            call.ledger.logical = call.logical
        if call.samples is None:
            return
        hidden, cache = output.last_hidden_state, cache_in(output)
        call.lm.stop(call.lm_started, hidden.device)
        if cache is not None and call.ledger is not None:
            attach(cache, call.ledger)
        if any(sample.images for sample in call.samples):
            clocks = call.vision, Stopwatch(), call.selector, call.lm
            self._finish(call.choices, Prefill(call.samples, hidden.element_size(), *clocks))

    def _sample(
        self, call: _Call, tokens: int, held: int, images: list[CrossImage], left: list[int]
    ) -> Sample:
        """The report of one row. Only cross layers process vision states, but an image counts in
        every layer with the tokens that these read, so that figures are comparable between
        families. Lengths are numbers of keys: in cross layers states (with [CLS], and with padding
        if nothing was dropped), in the others tokens."""
        layers, tiles = len(self.adapter.layers), call.given["pixel_values"].shape[2]
        shown = tuple(
            ImageTokens(len(image.columns), len(image.columns), ((0, kept),), layers, tiles=tiles)
            for image, kept in zip(images, left, strict=True)
        )
        lengths = tuple(held if i in self.cross_layers else tokens for i in range(layers))
        return Sample(tokens, shown, lengths, logits_of(call.logits_to_keep, tokens))


def _tokens(kwargs: dict[str, Any]) -> Tensor:
    """(b, s) ids or (b, s, d) embeddings that enter the decoder."""
    ids = kwargs.get("input_ids")
    return kwargs["inputs_embeds"] if ids is None else ids
