# SPDX-License-Identifier: Apache-2.0
"""The engine for models whose vision tokens enter an encoder, beside the text (Florence-2, BLIP-2
with T5).

Tokens are dropped before the encoder, so that it and the decoder's cross-attention run on those
that are left: the cross-attention's cache holds keys of these only, and the encoder's output is
shorter than its input. Positions stay those of the whole sequence: learned ones are looked up,
biases by distance computed for the tokens that are left. The user's mask over the encoder's input,
which `generate` hands to every step, is indexed at them. The decoder's positions and its own cache
do not change.

In `generate` the encoder runs before the model's forward. What is known of the images until then is
held by the call.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import embedding
from torch.utils.weak import WeakTensorKeyDictionary
from transformers.masking_utils import create_masks_for_generate

from vtc.core import Method
from vtc.core.errors import ArgumentError
from vtc.core.images import Modality
from vtc.core.prefill import Prefill
from vtc.models.seq2seq import Seq2Seq
from vtc.runtime.forward import Forward, Places
from vtc.runtime.hf.arguments import ones, split_mask
from vtc.runtime.hf.calls import PIXELS
from vtc.runtime.hf.engine import Engine
from vtc.runtime.hf.generation import Request
from vtc.runtime.hf.guards import UNHANDLED, refuse_checkpoint
from vtc.runtime.hf.override import Override
from vtc.runtime.layout import Layout
from vtc.runtime.prompt import Prompt
from vtc.runtime.stages import show_images


class EncoderEngine(Engine):
    """Runs `method` on a model whose vision tokens enter an encoder.

    Args:
        adapter: bound to the model.
        method: what to run.

    Raises:
        ArgumentError: the method acts in a stage other than the sequence stage.
        UnsupportedModelError: the method reads what vtc cannot capture in this model.
    """

    adapter: Seq2Seq

    def __init__(self, adapter: Seq2Seq, method: Method) -> None:
        super().__init__(adapter, method)
        self.reads_prompt = False  # the answer is not part of what the encoder reads

    def _refuses(self, stage: str) -> bool:
        return stage != "sequence"

    def _lacks(self, stage: str) -> str:
        return (
            f"{self.method} acts in the stage {stage!r}, but of {type(self.adapter.model).__name__}"
            " vtc drops tokens before the encoder, in the stage 'sequence'"
        )

    def _forget(self) -> None:
        super()._forget()
        self.kept: Any = WeakTensorKeyDictionary()  # by output of the encoder: layout and length

    def __getstate__(self) -> dict[str, Any]:
        state = super().__getstate__()
        del state["kept"]
        return state

    @property
    def forward(self) -> Forward | None:
        """The innermost forward of this thread; before it, in `generate`, what holds the images."""
        found: Forward | None = self.calls.forward
        call = self.calls.generating
        return call.embedded if found is None and call is not None else found

    # ---- on and off ---------------------------------------------------------------------------
    def _install(self) -> None:
        super()._install()
        reader = self.adapter.reader
        self.handles.append(reader.register_forward_pre_hook(self._read, with_kwargs=True))
        biased = self.adapter.distances()
        if biased is None:
            table = self.adapter.decoder.embed_positions
            self.handles.append(table.register_forward_hook(self._look_up))
        else:
            self.overrides.append(Override(biased, "compute_bias", self._bias))

    # ---- generate -----------------------------------------------------------------------------
    @property
    def _uncompiled(self) -> str:
        return "the answer is decoded from what an encoder leaves"

    def _generate(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        self._check_in_place()
        request = Request(self.adapter.generator, original, args, kwargs)
        given = request.given
        encoded = given.get("mm_encoder_outputs") or {}
        images = any(given.get(name) is not None for name in PIXELS) or bool(encoded)
        images = images and given.get("encoder_outputs") is None
        if images:
            request.refuse_pieces()
            request.refuse_guesses("the encoder's output is shorter than its input")
        request.refuse_compiling(self._uncompiled)
        with self.calls.generate(images) as call:
            if images:
                call.embedded = Forward(given=given, generating=call, choices=self._choices())
                call.embedded.features |= {
                    name: self.adapter.features(own) for name, own in encoded.items()
                }
            out = original(*args, **kwargs)
        if images and not call.handled:
            raise RuntimeError(UNHANDLED.format(model=type(self.adapter.model).__name__))
        return out

    def _create_masks(self, original: Callable[..., Any] | None, **kwargs: Any) -> Any:
        """The decoder's own masks do not change."""
        return (original or create_masks_for_generate)(**kwargs)

    # ---- forward ------------------------------------------------------------------------------
    def _look_at(self, forward: Forward, given: dict[str, Any]) -> None:
        """Record the inputs of this forward; refuse embeddings that hide the vision tokens."""
        if given.get("encoder_outputs") is not None:
            return
        encoded = given.get("mm_encoder_outputs") or {}
        shown = [*encoded.values(), *(given.get(name) for name in PIXELS)]
        forward.images_seen = any(value is not None for value in shown)
        if given.get("inputs_embeds") is not None and not forward.images_seen:
            raise ArgumentError(
                "inputs_embeds",
                "a patched model cannot tell vision tokens from text in embeddings; "
                "pass input_ids with pixel_values, inputs_embeds with pixel_values, or unpatch",
            )
        names: tuple[Modality, ...] = ("image", "video")
        for name in names:
            if encoded.get(name) is not None:
                forward.features[name] = self.adapter.features(encoded[name])

    def _enter_layer(self, layer: int, module: Any, args: Any, kwargs: Any) -> None:
        return None

    def _is_idle(self, given: Mapping[str, Any]) -> bool:
        return False  # `generate` merges images in before it calls the encoder, in no forward

    # ---- encoder ------------------------------------------------------------------------------
    def _compress(self, forward: Forward, kwargs: dict[str, Any]) -> None:
        """Run the methods on what enters the encoder, and pass on the tokens that are kept."""
        embeds = kwargs["inputs_embeds"]
        rows, length = embeds.shape[:2]
        _, valid = split_mask(kwargs.get("attention_mask"), 0, rows, length)
        valid = ones(embeds, length) if valid is None else valid
        shown = [mask for name, mask in forward.vision.items() if name in forward.features]
        place = torch.arange(length, device=embeds.device).expand(rows, -1)
        forward.places = Places(place, torch.zeros_like(valid), 0 * place[:, :1], [None])
        spans = self.vision.spans(self.calls, forward, valid)
        forward.prompt = Prompt.of(valid, spans, shown, None)
        forward.phase = "prefill"
        if forward.generating is not None:
            forward.generating.handled = True
        with forward.selector.measure(embeds.device):
            forward.layout, found = Layout.whole(valid), embeds
            show_images(forward, embeds)
            keep = self.vision.made(forward)
            for runner in self.runners:
                found, keep = runner.enter(forward, found, keep, self.vision)
            if not torch.equal(keep, valid):
                found, _ = forward.drop(keep, found)
                kwargs["attention_mask"] = forward.layout.valid.long()
            forward.counts.note(forward.prompt, forward.layout, 0)
        kwargs["inputs_embeds"] = found

    @torch.compiler.disable
    def _leave_decoder(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> None:
        forward = self.forward
        if forward is None or forward.phase != "prefill":
            return
        states = output.last_hidden_state
        forward.lm.stop(forward.lm_started, states.device)
        kept = forward.layout, forward.prompt.length
        if not forward.whole:
            self.kept[states] = kept
        call = forward.generating
        if call is not None and call.embedded is forward:
            call.embedded, call.kept = None, None if forward.whole else kept
        samples = forward.counts.samples(forward.prompt, self.num_layers, None)
        clocks = *self.calls.seen.take_clocks(), forward.selector, forward.lm
        self._finish(forward.choices, Prefill(samples, states.element_size(), *clocks))

    @property
    def _places(self) -> Tensor | None:
        """(b, k) the positions of the tokens in the encoder that runs; `None` if all are there."""
        forward = self.forward
        if forward is None or forward.phase != "prefill" or forward.whole:
            return None
        return forward.rotary_positions(0)

    def _look_up(self, module: Any, args: Any, output: Tensor) -> Tensor | None:
        """Learned positions of the tokens that are left."""
        places = self._places
        if places is None:
            return None
        return embedding(places.to(output.device) + module.offset, module.weight)

    def _bias(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """(b, h, k, k) biases by the distances between the tokens that are left."""
        places = self._places
        if places is None:
            return original(*args, **kwargs)
        refuse_checkpoint(self.layers[0], "biases are those between the tokens that are left")
        module = self.adapter.distances()
        bucket = module._relative_position_bucket(
            places[:, None] - places[:, :, None],
            bidirectional=True,
            num_buckets=module.relative_attention_num_buckets,
            max_distance=module.relative_attention_max_distance,
        )
        table = module.relative_attention_bias
        return table(bucket.to(table.weight.device)).permute(0, 3, 1, 2)

    # ---- decoder ------------------------------------------------------------------------------
    @torch.compiler.disable
    def _read(self, module: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        """Index the mask over the encoder's input at the tokens that its output holds."""
        states = kwargs.get("encoder_hidden_states")
        if states is None:
            return None
        call = self.calls.generating
        kept = self.kept.get(states)
        if kept is None and call is not None:  # copies, for beams
            kept = call.kept
        mask = kwargs.get("encoder_attention_mask")
        if kept is None:
            if mask is not None and mask.shape[-1] != states.shape[1]:
                raise ArgumentError(
                    "encoder_outputs",
                    f"they hold {states.shape[1]} tokens for a mask of {mask.shape[-1]}, and a "
                    "patched model takes only those that it has made, as they are",
                )
            return None
        layout, length = kept
        repeats = states.shape[0] // layout.index.shape[0]
        index = layout.index.repeat_interleave(repeats, dim=0).to(states.device)
        left = layout.valid.repeat_interleave(repeats, dim=0).to(states.device)
        _, seen = split_mask(mask, 0, len(index), length)
        if seen is not None:
            left = left & seen.to(states.device).gather(1, index)
        kwargs["encoder_attention_mask"] = left.long()
        return args, kwargs
