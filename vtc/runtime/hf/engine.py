# SPDX-License-Identifier: Apache-2.0
"""The engine: hooks that run a method on one model instance, and that come off without a trace.

A forward goes through these points, each a method of `Engine`:

    get_image_features   capture vision signals; encode fewer tokens (images and clips)
    model, base model    serialize calls; tell prefill from decoding
    the family's merger  locate the vision tokens
    decoder, in          drop tokens; mask and positions for a compressed cache
    decoder layers       drop tokens; masks and positions for the layers after a drop
    decoder, out         restore hidden states to full length; attach the ledger to the cache

What is dropped there is the concern of the runners in `stages/`, of which the engine knows only the
contract.
"""

from __future__ import annotations

import functools
import inspect
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache
from transformers.masking_utils import create_masks_for_generate

from vtc.core import STAGES, Method, stage_of
from vtc.core.errors import ArgumentError
from vtc.core.images import Modality
from vtc.core.prefill import Prefill
from vtc.models import Adapter
from vtc.runtime.forward import Forward, Places
from vtc.runtime.hf import injected, steps
from vtc.runtime.hf.arguments import by_name, is_per_token, keep_all_states, ones, split_mask, take
from vtc.runtime.hf.cache import attach, cache_in, ledger_of
from vtc.runtime.hf.calls import PIXELS
from vtc.runtime.hf.generation import Request
from vtc.runtime.hf.groups import LayerGroups
from vtc.runtime.hf.guards import HOOKS_INSIDE, UNHANDLED, refuse_checkpoint, refuse_packed
from vtc.runtime.hf.hooked import Hooked
from vtc.runtime.hf.override import Override
from vtc.runtime.hf.stages import RUNNERS, Runner
from vtc.runtime.hf.vision import Vision
from vtc.runtime.layout import Layout, gather_tokens
from vtc.runtime.ledger import Ledger
from vtc.runtime.prompt import Prompt
from vtc.runtime.stages import show_images


class Engine(Hooked):
    """Runs `method` on a model whose decoder sequence contains the vision tokens.

    Args:
        adapter: bound to the model.
        method: what to run.

    Raises:
        ArgumentError: the method acts in a stage or at a layer that the model lacks, or its parts
            do not compose.
        UnsupportedModelError: the method reads what vtc cannot capture in this model.
    """

    def __init__(self, adapter: Adapter, method: Method) -> None:
        super().__init__(adapter, method)
        shortening = [
            (number, stage)
            for number, part in enumerate(method.parts)
            for stage in part.stages
            if RUNNERS[stage].shortens
        ]
        if len(shortening) > 1 or (shortening and shortening[0][0] > 0):
            place = stage_of(shortening[-1][1]).place
            raise ArgumentError(
                "method",
                f"{method}: the part that acts {place} must come first, and there can be only one",
            )
        self.runners: tuple[Runner, ...] = tuple(
            RUNNERS[stage.name](adapter, method, self._current)
            for stage in STAGES
            if stage.name in method.stages
        )
        shortener = next((runner for runner in self.runners if runner.shortens), None)
        self.vision = Vision(adapter, method, shortener)
        starts = sorted({layer for runner in self.runners for layer in runner.starts})
        self.groups = LayerGroups(adapter, method, tuple(starts))
        self.told = False

    def _forget(self) -> None:
        super()._forget()
        # Beside `forward`, since torch cannot compile the look-up of a thread's.
        self.running = False

    def _current(self) -> Forward | None:
        return self.forward

    @property
    def forward(self) -> Forward | None:
        """The innermost forward of this thread, or `None` outside a forward."""
        found: Forward | None = self.calls.forward
        return found

    # ---- on and off ---------------------------------------------------------------------------
    def _install(self) -> None:
        super()._install()
        b = self.adapter
        self.flash = self._flash()
        idle = self._is_idle  # some models ask for placeholders at every step
        self.overrides.append(Override(b.holder, b.merger, self._merge_features, idle))
        for modality in ("image", "video"):
            if hasattr(b.holder, name := f"get_{modality}_features"):
                encode = functools.partial(self._encode, modality)
                self.overrides.append(Override(b.holder, name, encode))
        if hasattr(b.decoder, "_deepstack_process"):
            self.overrides.append(Override(b.decoder, "_deepstack_process", self._deepstack))
        for i, layer in enumerate(self.layers):
            watched = any(runner.watches(i) for runner in self.runners)
            watched = watched or i in self.adapter.injects()
            if self.flash or watched or self.groups.group_of[i] > 0:
                hook = functools.partial(self._enter_layer, i)
                self.handles.append(layer.register_forward_pre_hook(hook, with_kwargs=True))
        self.takes = tuple(inspect.signature(type(self.layers[0]).forward).parameters)[1:]
        for runner in self.runners:
            runner.install()

    def _uninstall(self) -> None:
        super()._uninstall()
        for runner in self.runners:
            runner.uninstall()

    # ---- generate -----------------------------------------------------------------------------
    def _generate(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        request = Request(self.adapter.model, original, args, kwargs)
        images = any(request.given.get(name) is not None for name in PIXELS)
        images = images or bool(request.given.get("mm_encoder_outputs"))
        images = images and not request.drafts
        if images:
            request.refuse_pieces()
            request.refuse_drafts()
        reason = self._uncompiled
        if reason is None and request.setting("prefill_chunk_size") is not None:
            reason = "a prompt in pieces runs as it is"
        if reason is not None:
            request.refuse_compiling(reason)
        with self.calls.generate(images, request.prompt_width if request.guesses else None) as call:
            try:
                out = original(*args, **kwargs)
            finally:  # also after an error or an interrupt
                steps.discard(call.prepared)
        if images and not call.handled:
            raise RuntimeError(UNHANDLED.format(model=type(self.adapter.model).__name__))
        return out

    def _prepare_step(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        out = super()._prepare_step(original, *args, **kwargs)
        call, cache = self.calls.generating, cache_in(out)
        if (
            call is not None
            and getattr(cache, "is_compileable", False)
            and isinstance(cache, Cache)
            and self._is_step(out)
            and self._uncompiled is None
        ):
            self._check_in_place()
            steps.prepare(self.groups, out)
            call.prepared, call.asked = cache, False
        return out

    def _is_step(self, inputs: Mapping[str, Any]) -> bool:
        """Whether `generate` feeds one more token after a prompt, and nothing else."""
        ids, cache = inputs.get("input_ids"), cache_in(inputs)
        shown = any(inputs.get(name) is not None for name in (*PIXELS, "mm_encoder_outputs"))
        single = ids is not None and ids.shape[1] == 1 and inputs.get("position_ids") is not None
        return single and not shown and int(cache.get_seq_length()) > 0

    @property
    def _uncompiled(self) -> str | None:
        """Why steps of decoding run as they are, or `None` if torch may compile them."""
        if self.adapter.merges_in_decoder:
            return "its base model is its decoder"
        if self.flash:
            return "flash attention builds no masks of a fixed shape"
        if any(type(runner).leave is not Runner.leave for runner in self.runners):
            return f"{self.method} may change the cache after each step"
        return None

    def _passes(self, given: Mapping[str, Any]) -> bool:
        return steps.pending(given) is not None

    def _is_idle(self, given: Mapping[str, Any]) -> bool:
        return not self.running

    def _create_masks(self, original: Callable[..., Any] | None, **kwargs: Any) -> Any:
        """For static caches transformers builds 4-D masks before the forward, sized for the full
        sequence. A compressed cache needs the 2-D mask; the forward builds masks that fit."""
        given, call = kwargs.get("attention_mask"), self.calls.generating
        if ledger_of(cache_in(kwargs)) is not None:
            return given
        made = (original or create_masks_for_generate)(**kwargs)
        if not kwargs.get("is_first_iteration") or (call is not None and not call.images):
            return made
        if call is not None:
            call.masks = made
        return given

    # ---- base model ---------------------------------------------------------------------------
    def _encode(
        self, modality: Modality, original: Callable[..., Any], *args: Any, **kwargs: Any
    ) -> Any:
        if args:
            kwargs = {**inspect.signature(original).bind_partial(*args).arguments, **kwargs}
        if self.calls.encoding is not None:  # some models encode clips as images
            return original(**kwargs)
        clip = self.forward is not None and "video" not in self.forward.features
        if modality == "image" and clip and self.adapter.clips_as_images:
            pixels = self.forward.given.get("pixel_values_videos")  # type: ignore[union-attr]
            if pixels is not None and kwargs.get("pixel_values") is pixels:
                modality = "video"
        with self.lock:  # the threads of a server share the tower that is tapped
            out = self.vision.encode(self.calls, modality, original, kwargs, self._choices().emit)
        if self.forward is not None:
            self.forward.features[modality] = self.adapter.features(out)
        return out

    def _merge_features(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        out = original(*args, **kwargs)
        if self.forward is not None:
            given = by_name(self.adapter.holder, args, kwargs, self.adapter.merger)
            found = self.adapter.placeholders(out, given)
            for modality, mask in found.items():
                seen = self.forward.vision.get(modality)
                self.forward.vision[modality] = mask if seen is None else seen | mask
        return out

    def _deepstack(
        self,
        original: Callable[..., Any],
        hidden_states: Tensor,
        visual_pos_masks: Tensor,
        visual_embeds: Tensor,
    ) -> Tensor:
        """Add the DeepStack features of tower layers to the vision tokens that are kept."""
        forward = self.forward
        if forward is None or forward.phase != "prefill" or forward.deepstack is None:
            return original(hidden_states, visual_pos_masks, visual_embeds)
        return original(hidden_states, *forward.deepstack_left(visual_embeds))

    def _run_model(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if self.adapter.model._compiled_call_impl is not None:
            self._warn_of_compiling()
        return super()._run_model(original, *args, **kwargs)

    def _check_in_place(self) -> None:
        super()._check_in_place()
        for runner in self.runners:
            runner.check_in_place()

    def _run_base(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if self.calls.asked is None:  # otherwise the model with its head has checked
            self._check_in_place()
        asked = self.calls.take_asked()
        given = by_name(self.adapter.base, args, kwargs)
        labels, logits = asked.labels, asked.logits
        if labels is None:  # the base model may be the whole model
            labels = given.get("labels")
        if self.adapter.model is self.adapter.base and self._slices_logits:
            logits = given.get("logits_to_keep", 0)
        forward = Forward(
            labels=labels,
            given=given,
            logits_to_keep=logits,
            generating=asked.generating,
            choices=self._choices(),
        )
        with self._in_forward(forward):
            self._look_at(forward, given)
            if self.adapter.masks_in_base and ledger_of(cache_in(given)) is not None:
                # The base model's own masks would not fit; `forward.given` keeps this one.
                args, kwargs = (), {**given, "attention_mask": None}
            if self.adapter.merges_in_decoder:
                out = self._run_merged(original, given)
            else:
                out = original(*args, **kwargs)
        if forward.images_seen and forward.phase != "prefill":
            raise RuntimeError(UNHANDLED.format(model=type(self.adapter.model).__name__))
        return out

    def _run_merged(self, original: Callable[..., Any], given: Mapping[str, Any]) -> Any:
        """Run a base model that is the decoder: merge images in, as it would, and then enter it."""
        wanted = given.get("return_dict")
        if wanted is None:
            wanted = getattr(self.adapter.base.config, "return_dict", True)
        kwargs = {**self.adapter.merged(given), "return_dict": True}
        self._enter_decoder(self.adapter.decoder, (), kwargs)
        out = original(**kwargs)
        self._leave_decoder(self.adapter.decoder, (), kwargs, out)
        return out if wanted else out.to_tuple()

    @contextmanager
    def _in_forward(self, forward: Forward) -> Iterator[None]:
        """Make `forward` the current one of this thread, and restore the outer one afterwards."""
        with self.lock, self.calls.run(forward), ExitStack() as outer:
            for runner in self.runners:
                outer.enter_context(runner.suspended())
            before, self.running = self.running, True
            try:
                yield
            finally:  # also after an error or an interrupt
                self.running = before
                if forward.ledger is not None:
                    forward.ledger.may_write = False

    def _look_at(self, forward: Forward, given: dict[str, Any]) -> None:
        """Record the inputs of this forward; refuse embeddings that hide the vision tokens."""
        encoded = given.get("mm_encoder_outputs") or {}
        names: tuple[Modality, ...] = ("image", "video")
        shown = [encoded.get(name) for name in names]
        shown += [given.get(name) for name in PIXELS]
        images = any(value is not None for value in shown)
        images = images and not self.adapter.ignores_images(given)
        cache, ids = cache_in(given), given.get("input_ids")
        if ids is None and not images and (cache is None or int(cache.get_seq_length()) == 0):
            raise ArgumentError(
                "inputs_embeds",
                "a patched model cannot tell vision tokens from text in embeddings; "
                "pass input_ids with pixel_values, inputs_embeds with pixel_values, or unpatch",
            )
        forward.images_seen = images
        for name in names:
            if encoded.get(name) is not None:
                forward.features[name] = self.adapter.features(encoded[name])

    # ---- decoder ------------------------------------------------------------------------------
    def _enter_decoder(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        if (step := steps.pending(kwargs)) is not None:
            if step.positions is not None:
                kwargs["position_ids"] = step.positions
            return args, kwargs
        return self._begin(args, kwargs)

    @torch.compiler.disable
    def _begin(
        self, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        forward = self.forward
        if forward is None or kwargs.get("inputs_embeds") is None:
            return None
        if self._flash() != self.flash:
            raise RuntimeError(
                "attn_implementation: it was changed from or to flash attention under a patch; "
                "call vtc.patch again"
            )
        ledger = ledger_of(cache_in(kwargs))
        shown = [mask for name, mask in forward.vision.items() if name in forward.features]
        if any(bool(mask.any()) for mask in shown):
            forward.lm_started = forward.lm.start(kwargs["inputs_embeds"].device)
            self._compress(forward, kwargs)
        elif ledger is not None:
            self._continue(forward, ledger, kwargs)
        else:
            return None
        return args, kwargs

    def _compress(self, forward: Forward, kwargs: dict[str, Any]) -> None:
        """Prefill with images: run the sequence stage and pass on the tokens that are kept."""
        forward.deepstack = kwargs.get("visual_pos_masks")
        embeds, cache = injected.take(self.adapter, forward, kwargs), cache_in(kwargs)
        rows, length = embeds.shape[:2]
        forward.entering = dict(kwargs)
        ledger = ledger_of(cache)
        plain = ledger is None
        past = ledger.logical if ledger else int(cache.get_seq_length()) if cache is not None else 0
        past_valid, valid = split_mask(self.groups.padding(forward, kwargs), past, rows, length)
        valid = valid if valid is not None else ones(embeds, length)
        blocks = self.adapter.blocks(forward.given)
        if blocks is not None:  # candidate tokens of assisted decoding have no type
            blocks = nn.functional.pad(blocks, (0, max(length - blocks.shape[1], 0)), value=-1)
        forward.ledger = ledger or Ledger.fresh(self.groups.first_layers, past, past_valid)
        forward.ledger.may_write = True
        self.groups.check(forward.ledger)
        positions = kwargs.get("position_ids")
        if positions is None:
            mask = self.groups.padding(forward, kwargs)
            positions = self.adapter.numbered(mask, past, length, embeds.device)
        positions = positions.expand(*positions.shape[:-2], rows, -1)
        axis = positions if positions.dim() == 2 else positions[0]
        first = axis.gather(1, valid.long().argmax(1, keepdim=True))
        seen = past if past_valid is None else past_valid.sum(1, keepdim=True)
        shifts = [group.shift for group in forward.ledger.groups]
        forward.places = Places(positions, torch.zeros_like(valid), first - seen, shifts)
        # Candidate tokens are not part of the prompt, and neither is an answer that is scored.
        step = forward.generating
        forward.prompt = Prompt.of(
            valid,
            self.vision.spans(self.calls, forward, valid),
            [mask for name, mask in forward.vision.items() if name in forward.features],
            forward.labels,
            None if step is None else step.width,
            blocks,
        )
        self._freeze(forward)
        forward.phase = "prefill"
        if forward.generating is not None:
            forward.generating.handled = True

        with forward.selector.measure(embeds.device):
            forward.layout, new_embeds = Layout.whole(valid), embeds
            show_images(forward, embeds)
            keep = self.vision.made(forward)
            for runner in self.runners:
                new_embeds, keep = runner.enter(forward, new_embeds, keep, self.vision)
            dropped = not torch.equal(keep, valid)
            if dropped or new_embeds is not embeds:
                refuse_packed(forward.given, forward.entering, self.flash)
            new_embeds = injected.put(forward, new_embeds)
            if dropped:
                new_embeds, place = forward.drop(keep, new_embeds)
                for name, value in kwargs.items():
                    own = name in ("attention_mask", "position_ids")
                    if not own and is_per_token(value, rows, length):
                        kwargs[name] = take(value, place)
            forward.counts.note(forward.prompt, forward.layout, 0)
        forward.entered = forward.layout
        kwargs["inputs_embeds"] = new_embeds
        self.groups.open(forward, 0)
        group = forward.ledger.groups[0]
        if group.diverged or len(forward.ledger.groups) > 1:
            keep_all_states(kwargs)
        if plain and not group.diverged:
            # Nothing was dropped: the model's own masks and positions are right.
            call = forward.generating
            alike = self.adapter.masks_alike or len(forward.ledger.groups) == 1
            if alike and call is not None and call.masks is not None:
                kwargs["attention_mask"], call.masks = call.masks, None
            return
        if self.adapter.masks_in_base:
            kwargs["attention_mask"] = self.groups.of_decoder(forward, new_embeds, cache)
            kwargs["position_ids"] = forward.rotary_positions(0)
            return
        # Always pass a mask: without one, transformers takes gaps in the positions for packed
        # sequences.
        mask = group.valid if group.valid is not None else ones(new_embeds, group.length)
        kwargs["attention_mask"] = mask.long()
        kwargs["position_ids"] = forward.rotary_positions(0)

    def _continue(self, forward: Forward, ledger: Ledger, kwargs: dict[str, Any]) -> None:
        """New tokens on a compressed cache: adapt mask and positions to what it holds."""
        embeds = kwargs["inputs_embeds"]
        rows, count = embeds.shape[:2]
        self.groups.check(ledger)
        past = ledger.logical
        _, valid = split_mask(self.groups.padding(forward, kwargs), past, rows, count)
        if valid is not None and bool(valid.all()):
            valid = None
        positions = kwargs.get("position_ids")
        if positions is None:
            mask = self.groups.padding(forward, kwargs)
            positions = self.adapter.numbered(mask, past, count, embeds.device)
        positions = positions.expand(*positions.shape[:-2], rows, -1)
        forward.places = Places(positions, positions.new_empty(0), positions.new_empty(0), [])
        for group in ledger.groups:
            self.groups.refuse_padding(group, valid)
        for group in ledger.groups:
            group.extend(valid, count)
        ledger.may_write = True
        ledger.logical += count
        ledger.croppable += count
        forward.ledger, forward.phase = ledger, "decode"
        keep_all_states(kwargs)
        first = ledger.groups[0]
        kwargs["attention_mask"] = None if first.valid is None else first.valid.long()
        kwargs["position_ids"] = forward.rotary_positions(0)

    def _leave_decoder(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> None:
        if steps.pending(kwargs) is not None:
            steps.take(cache_in(kwargs))
        else:
            self._end(output)

    @torch.compiler.disable
    def _end(self, output: Any) -> None:
        forward = self.forward
        if forward is None or forward.phase == "plain":
            return
        if forward.phase == "decode":
            for runner in self.runners:
                runner.leave(forward, cache_in(output))
            return
        hidden = output.last_hidden_state
        length = forward.prompt.length
        if not forward.whole:
            place = forward.layout.nearest(length).to(hidden.device)
            if (last := self._last_wanted(forward)) is not None:
                place = place[:, -last:]
            output.last_hidden_state = gather_tokens(hidden, place)
        forward.lm.stop(forward.lm_started, hidden.device)
        ledger, cache = forward.ledger, cache_in(output)
        ledger.logical += length
        ledger.croppable = forward.prompt.text_at_the_end
        for runner in self.runners:
            runner.leave(forward, cache)
        if cache is not None and any(group.diverged for group in ledger.groups):
            attach(cache, ledger)
        samples = forward.counts.samples(forward.prompt, self.num_layers, forward.logits_to_keep)
        clocks = *self.calls.seen.take_clocks(), forward.selector, forward.lm
        self._finish(forward.choices, Prefill(samples, hidden.element_size(), *clocks))

    @property
    def _slices_logits(self) -> bool:
        """Whether the model has a head that takes `logits_to_keep`."""
        return "logits_to_keep" in inspect.signature(type(self.adapter.model).forward).parameters

    def _last_wanted(self, forward: Forward) -> int | None:
        """How many of the last positions the head reads, `None` for all. In `generate` it is one:
        restoring the others would cost a good part of the time that a selection takes."""
        wanted = forward.logits_to_keep
        if (
            not self._slices_logits
            or forward.labels is not None
            or not isinstance(wanted, int)
            or wanted < 1
        ):
            return None
        return wanted

    def _warn_of_compiling(self) -> None:
        if not self.told:
            self.told = True
            warnings.warn(
                "torch.compile: of a patched model two things can be compiled, the rest runs as it "
                "is: steps of generate(cache_implementation='static'), and the decoder by itself, "
                "with model.model.language_model = torch.compile(...)",
                stacklevel=2,
            )

    # ---- decoder layers -----------------------------------------------------------------------
    def _enter_layer(
        self,
        layer: int,
        module: nn.Module,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        if (step := steps.pending(kwargs)) is not None:
            given = (
                ("attention_mask", step.masks[layer]),
                ("position_embeddings", step.rotations[layer]),
            )
            for name, value in given:
                if value is None:
                    continue
                if name in self.takes[: len(args)]:  # Gemma 3n
                    place = self.takes.index(name)
                    args = (*args[:place], value, *args[place + 1 :])
                else:
                    kwargs[name] = value
            return args, kwargs
        return self._adapt_layer(layer, module, args, kwargs)

    @torch.compiler.disable
    def _adapt_layer(
        self,
        layer: int,
        module: nn.Module,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        forward = self.forward
        if forward is None or forward.phase == "plain":
            return None
        if len(args) > 1:  # Gemma 3n
            named = by_name(module, args, kwargs)
            args, kwargs = (args[0],), {k: v for k, v in named.items() if v is not args[0]}
        hidden = self.adapter.join_streams(args[0] if args else kwargs["hidden_states"])
        if self.groups.group_of[layer] > 0:
            refuse_checkpoint(module, f"{self.method} changes lengths between layers")
        if forward.phase == "prefill":
            hidden = injected.add(forward, layer, module, hidden)
            if layer in self.groups.first_layers[1:]:
                hidden = self._drop(forward, layer, hidden, cache_in(kwargs))
            if args:
                args = (self.adapter.part_streams(hidden),)
            else:
                kwargs["hidden_states"] = self.adapter.part_streams(hidden)
            for runner in self.runners:
                if runner.watches(layer):
                    runner.watch(forward, layer, hidden)
        if forward.ledger.groups[self.groups.group_of[layer]].diverged:
            self.groups.adapt_layer(forward, layer, hidden, kwargs)
            if forward.phase == "prefill" and self.groups.group_of[layer] > 0:
                for name in set(kwargs) - _ADAPTED:
                    kwargs[name] = self._cut(forward, kwargs[name])
            if self.flash:
                if HOOKS_INSIDE:
                    refuse_checkpoint(module, "flash attention is kept from reading gaps")
                # Flash attention takes gaps in the positions for packed sequences. The rotation
                # is computed already, so the layer does not need them.
                kwargs["position_ids"] = None
        return args, kwargs

    def _drop(self, forward: Forward, layer: int, hidden: Tensor, cache: Any) -> Tensor:
        """Let the runners drop tokens before a layer at which a group starts."""
        before = forward.layout, hidden
        with forward.selector.measure(hidden.device):
            for runner in self.runners:
                if layer in runner.starts:
                    hidden = runner.before_layer(forward, layer, hidden, cache)
            if forward.layout is not before[0] or hidden is not before[1]:
                refuse_packed(forward.given, forward.entering, self.flash)
            forward.counts.note(forward.prompt, forward.layout, layer)
        self.groups.open(forward, self.groups.group_of[layer])
        return hidden

    def _cut(self, forward: Forward, value: Any) -> Any:
        """`value` at the tokens still held, if it has a row for each token that entered."""
        first, rows = forward.entered, forward.layout.index.shape[0]
        if first is None or not is_per_token(value, rows, first.index.shape[1]):
            return value
        return take(value, first.places_of(forward.layout.index, forward.prompt.length))

    # ---- bookkeeping --------------------------------------------------------------------------
    def _flash(self) -> bool:
        return "flash" in (self.adapter.decoder.config._attn_implementation or "")

    def _freeze(self, forward: Forward) -> None:
        """In `generate` without a cache, repeat the selections of the first step."""
        made = forward.choices.decisions, forward.prompt.ends
        found = forward.generating and forward.generating.chosen(forward.given, made)
        if found:
            decisions, ends = found
            forward.choices = replace(forward.choices, decisions=decisions, replay=True)
            forward.prompt = replace(forward.prompt, ends=ends)


_ADAPTED = {"hidden_states", "attention_mask", "position_ids", "position_embeddings"}
