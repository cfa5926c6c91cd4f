# SPDX-License-Identifier: Apache-2.0
"""The slow truth for every family: the plain model on one sample, in which nothing is removed.

It shares no code with the engine. The whole sequence goes through the family's own eager model,
without padding and without a cache; hooks only hand every decoder layer a mask of our own, in
which the columns of dropped tokens are closed. What is dropped is decided by the method, which is
shown what the contract promises, taken from `tests.reference.families` and from the running model.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from tests.reference.families import IMAGE, VIDEO, ImageTruth, Row, TinyFamily
from vtc.core import LayerState, Method, VisionTokens

TILES_ARE_IMAGES = {
    "aya_vision",
    "cohere2_vision",
    "idefics2",
    "idefics3",
    "smolvlm",
    "llama4",
    "ovis2",
    "lfm2_vl",
    "aria",
    "minicpmv4_6",
    "minicpmv4_7",
    "minicpm_ocr",
    "granite_docling",
}
"""Families whose model is not told which tiles make up an image: each is one of its own."""
FRAMES_ARE_IMAGES = {"internvl", "smolvlm", "kimi_k25"}
PREFIX = {"paligemma"}
"""The whole prompt is seen in both directions."""
NO_PLACES = {
    *("idefics2", "aria", "deepseek_ocr2"),
    *("blip-2", "instructblip", "instructblipvideo"),
}
"""Their tokens come from a resampler."""
MERGES_IN_DECODER = {"chameleon", "phi4_multimodal"}
"""Their decoder takes ids and pixels."""
UNUSED_AXES = {"exaone4_5"}
"""Their models inherit `rope_deltas` and use none."""
BOTH_WAYS = {"gemma3", "gemma4", "gemma4_unified", "shieldgemma2"}
"""The tokens of an image are."""


def decoder_of(model: Any) -> Any:
    base = model.model if hasattr(model, "model") else model
    if model.config.model_type in MERGES_IN_DECODER:
        return base
    found = getattr(base, "language_model", None) or base.text_model
    while not hasattr(found, "layers"):
        found = getattr(found, "model", None) or found.decoder
    return found


def _attention_in(layer: Any) -> Any:
    """The attention of a decoder layer, or `None`."""
    if getattr(layer, "block_type", "full_attention") != "full_attention":
        return None
    return getattr(layer, "self_attn", None) or getattr(layer, "mixer", None)


def _recurrence_in(layer: Any) -> Any:
    """What stands for attention in a recurrent layer, or `None`."""
    if getattr(layer, "block_type", "") == "linear_attention" and hasattr(layer, "mixer"):
        return layer.mixer
    return getattr(layer, "linear_attn", None) or getattr(layer, "conv", None)


def _feed_forward_in(layer: Any) -> Any:
    """The feed-forward of a decoder layer, or `None`."""
    if getattr(layer, "block_type", "") in ("mlp", "moe"):
        return layer.mixer
    return getattr(layer, "mlp", None) or getattr(layer, "feed_forward", None)


def images_of(family: TinyFamily, row: Row) -> list[ImageTruth]:
    """The row's images as methods are to see them."""
    found: list[ImageTruth] = []
    for image in row.images:
        keys: list[Any] = [None] * len(image.index)
        if image.crop is not None and family.model_type in TILES_ARE_IMAGES:
            keys = list(image.crop)
        elif image.video and family.model_type in FRAMES_ARE_IMAGES:
            keys = [frame for frame, _, _ in image.grid]
        parts = dict.fromkeys(keys)
        if len(parts) == 1:
            crop = None if family.model_type in TILES_ARE_IMAGES else image.crop
            found.append(ImageTruth(image.index, image.separators, image.grid, crop, image.video))
            continue
        for part in parts:
            mine = [i for i, key in enumerate(keys) if key == part]
            grid = [image.grid[i] for i in mine]
            found.append(
                ImageTruth(
                    tuple(image.index[i] for i in mine),
                    (),
                    tuple((0, r, c) for _, r, c in grid),
                    None,
                )
            )
    return found


@dataclass
class _Step:
    """What is true from one decoder layer on, for the tokens of the prompt."""

    alive: Tensor
    closed: Tensor
    replaced: list[tuple[Tensor, Tensor]] = field(default_factory=list)


class Masked:
    """The compressed model on one row, decided once, then asked for any continuation.

    Args:
        model: an unpatched eager model of `family`; its weights and its own code are used.
        method: the compression, or `None` for the plain model.
        prompt_length: tokens of the row that are prompt, by default all.
        deep: the deep features of the vision tokens, where a method changes the tower.
    """

    def __init__(
        self,
        family: TinyFamily,
        model: Any,
        method: Method | None,
        row: Row,
        prompt_length: int | None = None,
        deep: list[Tensor] | None = None,
    ) -> None:
        self.family, self.model, self.row, self.deep = family, model, row, deep
        self.decoder = decoder_of(model)
        self.config = self.decoder.config
        self.num_layers = len(self.decoder.layers)
        self.parts = () if method is None else method.parts
        self.length = len(row.input_ids)
        self.prompt_length = self.length if prompt_length is None else prompt_length
        self.images = images_of(family, row)
        self.has_places = family.model_type not in NO_PLACES
        self.image = torch.full((self.length,), -1)
        self.grid = torch.full((self.length, 3), -1)
        for i, image in enumerate(self.images):
            self.image[list(image.index)] = i
            if self.has_places:
                self.grid[list(image.index)] = torch.tensor(image.grid)
        ids = row.input_ids
        fed = (self.image >= 0) | (ids == self.image_id) | (ids == VIDEO)
        self.newline = fed & (self.image < 0)
        first = self.image.ge(0).nonzero().flatten()[:1]
        after = torch.arange(self.length) > (int(first) if len(first) else self.length)
        inside = torch.arange(self.length) < self.prompt_length
        self.text = ~fed & after & inside
        self.steps: dict[int, _Step] = {}
        self.alive = torch.ones(self.length, dtype=torch.bool)
        self.closed = torch.zeros(self.length, dtype=torch.long)
        self.decided = not self.parts
        self.attention: dict[int, Tensor] = {}
        self.notes: dict[int, dict[str, Tensor]] = {}
        self.memory: list[Tensor | None] = [None for _ in self.parts]
        if not self.decided:
            self._logits(torch.empty(0, dtype=torch.long), {})
            self.decided = True

    @property
    def image_id(self) -> int:
        return int(getattr(self.family, "image_id", IMAGE))

    @property
    def recurrent(self) -> bool:
        """Whether some layers read tokens one after the other. These cannot be masked: from where
        tokens are dropped on, they are handed the others only."""
        return bool(
            {"linear_attention", "conv"} & {*(getattr(self.config, "layer_types", None) or ())}
        )

    # ---- masks and positions --------------------------------------------------------------------
    def _blocks(self, total: int) -> Tensor:
        blocks = torch.full((total,), -1)
        if self.family.model_type in PREFIX:
            blocks[: self.length] = 0
        if self.family.model_type == "molmo2":
            kinds = self.row.extras["mm_token_type_ids"][0]
            blocks[: self.length] = torch.where(kinds == 1, 0, -1)
        both = self.family.model_type in BOTH_WAYS
        if both and getattr(self.config, "use_bidirectional_attention", "vision") in (
            "vision",
            False,
        ):
            seen = -1
            for place in range(self.length):
                mine = self.image[place]
                before = self.image[place - 1] if place else torch.tensor(-1)
                if mine >= 0:
                    seen += int(before < 0)
                    blocks[place] = seen
        return blocks

    def _visible(self, layer: int, alive: Tensor, total: int) -> Tensor:
        """(total, total) bool; windows and chunks count the tokens that are alive."""
        alive = torch.cat([alive, alive.new_ones(total - self.length)])
        place = torch.arange(total)
        blocks = self._blocks(total)
        seen = place[:, None] >= place
        kinds = getattr(self.config, "layer_types", None)
        # Of Gemma 4, only layers with a window see images in both directions.
        if self.family.model_type != "gemma4" or kinds[layer] == "sliding_attention":
            seen |= (blocks[:, None] == blocks) & (blocks[:, None] >= 0)
        rank = alive.cumsum(0) - 1
        window = getattr(self.config, "sliding_window", None)
        if window and (kinds is None or kinds[layer] == "sliding_attention"):
            near = rank > rank[:, None] - window
            if self.family.model_type == "gemma4_unified":  # its images are seen from afar
                near |= (blocks[:, None] == blocks) & (blocks[:, None] >= 0)
            seen &= near
        if kinds is not None and kinds[layer] == "chunked_attention":
            chunk = self.config.attention_chunk_size
            seen &= rank // chunk == rank[:, None] // chunk
        seen &= alive
        # Dropped tokens are not read, but a row that sees nothing would spoil the others.
        return seen | torch.eye(total, dtype=torch.bool)

    def _drop(self, gone: Tensor, contiguous: bool) -> None:
        self.alive = self.alive & ~gone
        if contiguous and not self._axial:
            self.closed = self.closed + gone.cumsum(0)

    @property
    def _axial(self) -> bool:
        if self.family.model_type in UNUSED_AXES:
            return False
        base = self.model.model if hasattr(self.model, "model") else self.model
        return hasattr(base, "rope_deltas")

    def _emptied(self) -> Tensor:
        """(s,) bool: features between vision tokens that nothing is left to separate."""
        gone = torch.zeros(self.length, dtype=torch.bool)
        for place in (self.newline & self.alive).nonzero().flatten().tolist():
            owner = [i for i in self.images if place in i.separators]
            if len(owner) != 1:
                continue
            mine = self._belongs(owner[0], place)
            if mine and not self.alive[mine].any():  # a row that never had a token is not emptied
                gone[place] = True
        return gone

    def _belongs(self, image: ImageTruth, place: int) -> list[int]:
        """Places of the vision tokens that the feature at `place` stands beside."""
        kind = self.family.model_type
        if kind == "video_llava":  # [CLS] of a frame, before its patches
            after = [i for i in image.index if i > place]
            frame = image.grid[image.index.index(after[0])][0]
            return [i for i, (f, _, _) in zip(image.index, image.grid, strict=True) if f == frame]
        if kind == "phi4_multimodal":
            if place - 1 in image.separators:  # between the tiles and the thumbnail
                return list(image.index)
            before = max(i for i in image.index if i < place)
            at = image.index.index(before)
            assert image.crop is not None
            mine = (image.grid[at][1], image.crop[at] == 0)
            rows = zip(image.index, image.grid, image.crop, strict=True)
            return [i for i, (_, r, _), crop in rows if (r, crop == 0) == mine]
        ends = (image.separators[0], image.separators[-1])
        if kind == "emu3" or (kind == "hunyuan_vl" and place not in ends):
            before = max(i for i in image.index if i < place)
            row = image.grid[image.index.index(before)][1]
            return [i for i, (_, r, _) in zip(image.index, image.grid, strict=True) if r == row]
        if image.video or image.crop is None or kind == "deepseek_ocr2":  # one after all
            return list(image.index)
        before = max(i for i in image.index if i < place)
        row = image.grid[image.index.index(before)][1]
        return [
            i
            for i, (_, r, _), crop in zip(image.index, image.grid, image.crop, strict=True)
            if r == row and crop > 0
        ]

    # ---- deciding -------------------------------------------------------------------------------
    def _select(self, embeds: Tensor) -> None:
        """The sequence stage, on (s, d) what enters the decoder; replaced contents are noted."""
        embeds = embeds.clone()
        untouched = embeds.clone()
        replaced = []
        for part in self.parts:
            if "sequence" not in part.stages:
                continue
            gone = torch.zeros_like(self.alive)
            for i, image in enumerate(self.images):
                where = torch.tensor(image.index)
                stay = self.alive[where]
                candidates = where[stay]
                crop = None if image.crop is None else torch.tensor(image.crop)[stay]
                chosen = part.select(
                    VisionTokens(
                        features=embeds[candidates],
                        grid=self.grid[candidates] if self.has_places else None,
                        image=i,
                        crop=crop,
                        every_grid=self.grid[where] if self.has_places else None,
                        total=len(where),
                        every_crop=None if image.crop is None else torch.tensor(image.crop),
                        text=untouched[self.text] if "text" in part.needs else None,
                        segment=untouched[self._segment(i)] if "segment" in part.needs else None,
                    )
                )
                kept = candidates[chosen.indices]
                gone[candidates] = True
                gone[kept] = False
                if chosen.features is not None:
                    embeds[kept] = chosen.features
                    replaced.append((kept, chosen.features))
            contiguous = part.positions == "contiguous"
            self._drop(gone, contiguous)
            self._drop(self._emptied(), contiguous)
        self.steps[-1] = _Step(self.alive, self.closed, replaced)

    def _segment(self, i: int) -> Tensor:
        last = max(self.images[i].index)
        later = [min(o.index) for o in self.images if min(o.index) > last]
        end = min(later) if later else self.length
        place = torch.arange(self.length)
        return self.text & (place > last) & (place < end)

    def _prune(self, layer: int, hidden: Tensor, ahead: Callable[[], Tensor]) -> None:
        """The layers stage before `layer`, on (s, d)."""
        replaced = []
        for number, part in enumerate(self.parts):
            if "layers" not in part.stages or layer not in part.prune_layers(self.num_layers):
                continue
            vision = self.alive & (self.image >= 0)
            if not vision.any():
                continue
            state = self._state(part, layer, hidden, ahead, self.memory[number])
            chosen = part.prune(state)
            if chosen is None:
                continue
            self.memory[number] = chosen.memory
            candidates = vision.nonzero().flatten()
            kept = candidates[chosen.indices]
            gone = vision.clone()
            gone[kept] = False
            contiguous = part.prune_positions == "contiguous"
            self._drop(gone, contiguous)
            self._drop(self._emptied(), contiguous)
            if chosen.features is not None:
                hidden = hidden.clone()
                hidden[kept] = chosen.features
                replaced.append((kept, chosen.features))
        self.steps[layer] = _Step(self.alive, self.closed, replaced)

    def _state(
        self,
        part: Method,
        layer: int,
        hidden: Tensor,
        ahead: Callable[[], Tensor],
        memory: Tensor | None,
    ) -> LayerState:
        here = self.alive.nonzero().flatten()
        prompt = here[here < self.prompt_length]
        rows = {
            "last": prompt[-1:],
            "text": self.text.nonzero().flatten(),
            "vision": here[self.image[here] >= 0],
            "vision_text": here[(self.image[here] >= 0) | self.text[here]],
        }

        def pick(attention: Tensor, which: str) -> Tensor:
            found = attention[:, rows[which]][:, :, here]
            return found if part.by_head else found.mean(0)

        peeked = part.peeks(self.num_layers)
        return LayerState(
            layer=layer,
            num_layers=self.num_layers,
            hidden=hidden[here].clone(),
            image=self.image[here],
            text=self.text[here],
            grid=self.grid[here],
            prompt_length=len(prompt),
            original=tuple(len(image.index) for image in self.images),
            attention={
                tapped: pick(self.attention[tapped], which)
                for tapped, which in part.taps(self.num_layers).items()
                if tapped < layer
            },
            ahead=pick(ahead(), peeked[layer]) if layer in peeked else None,
            recorded={
                (at, name): self.notes[at][name][here]
                for at, names in part.records(self.num_layers).items()
                for name in names
                if at < layer
            },
            memory=memory,
        )

    # ---- running --------------------------------------------------------------------------------
    @torch.no_grad()
    def _logits(self, extra: Tensor, more: dict[str, Any]) -> Tensor:
        """(s + e, V) of the plain model under our masks; decides where that is not done yet."""
        total = self.length + len(extra)
        batch = self.family.collate([self.row])
        batch["input_ids"] = torch.cat([batch["input_ids"], extra[None]], dim=1)
        batch["attention_mask"] = torch.ones_like(batch["input_ids"])
        for name in self.family.per_token:
            if name in batch:
                tail = 1 if self.family.model_type in PREFIX else 0
                shape = batch[name].shape
                filling = batch[name].new_full((1, len(extra), *shape[2:]), tail)
                batch[name] = torch.cat([batch[name], filling], dim=1)
        handles = [self.decoder.register_forward_pre_hook(self._enter(total), with_kwargs=True)]
        for i, layer in enumerate(self.decoder.layers):
            if mixer := _recurrence_in(layer):
                handles += self._without_dropped(i, mixer, total)
            hook = self._layer(i, total)
            handles.append(layer.register_forward_pre_hook(hook, with_kwargs=True))
            if not self.decided:
                handles += self._listen(i, layer)
        try:
            return self.model(**batch, use_cache=False, **more).logits[0]
        finally:
            for handle in handles:
                handle.remove()

    def _enter(self, total: int) -> Callable[..., Any]:
        def hook(module: Any, args: Any, kwargs: dict[str, Any]) -> Any:
            if self.family.model_type == "phi4_multimodal":
                ids, names = kwargs.pop("input_ids"), ("pixel_values", "sizes", "attention_mask")
                images = {f"image_{name}": kwargs.pop(f"image_{name}", None) for name in names}
                words = module.embed_tokens(ids)
                kwargs["inputs_embeds"] = module.embed_tokens_extend(ids, words, **images)
            elif self.family.model_type in MERGES_IN_DECODER:
                ids, pixels = kwargs.pop("input_ids"), kwargs.pop("pixel_values")
                kwargs["inputs_embeds"] = module.embed_tokens(ids)
                if pixels is not None:
                    fed = module.get_image_features(pixels).pooler_output.flatten(0, 1)
                    kwargs["inputs_embeds"][0, ids[0] == self.image_id] = fed
            embeds = kwargs["inputs_embeds"].clone()
            injected = kwargs.get("deepstack_features")
            if injected is not None:  # vision tokens enter as zeros, and methods see the first
                injected = dict(injected)
                mask, first = kwargs["vision_mask"][0, :, 0], min(injected)
                embeds[0, mask] = injected[first]
            if not self.decided:
                self._select(embeds[0])
            if self.parts:
                step = self.steps[-1]
                for kept, contents in step.replaced:
                    embeds[0, kept] = contents
            if injected is not None:
                injected[first] = embeds[0, mask]
                kwargs["deepstack_features"], embeds[0, mask] = injected, 0.0
            if self.parts:
                positions = kwargs.get("position_ids")
                if positions is None:
                    positions = torch.arange(total)[None]
                self.positions = positions
                kwargs["position_ids"] = self._moved(step)
            kwargs["inputs_embeds"] = embeds
            if self.deep is not None and kwargs.get("deepstack_visual_embeds") is not None:
                kwargs["deepstack_visual_embeds"] = self.deep
            return args, kwargs

        return hook

    def _without_dropped(self, i: int, mixer: Any, total: int) -> list[Any]:
        """Hooks that leave dropped tokens out of what a recurrent layer reads."""

        def kept() -> Tensor:
            return torch.cat([self.steps[i].alive, torch.ones(total - self.length).bool()])

        def enter(module: Any, args: Any, kwargs: dict[str, Any]) -> Any:
            if not self.parts:
                return None
            self.mixed = args[0] if args else kwargs["hidden_states"]
            if not self.decided:
                self.notes[i]["attention_in"] = self.mixed[0]
            left, given = self.mixed[:, kept()], {**kwargs, "attention_mask": None}
            return ((left,), given) if args else (args, {**given, "hidden_states": left})

        def leave(module: Any, args: Any, output: Tensor) -> Any:
            if not self.parts:
                return None
            every = torch.zeros_like(self.mixed)
            every[:, kept()] = output
            if not self.decided:
                self.notes[i]["attention_out"] = every[0]
            return every

        return [
            mixer.register_forward_pre_hook(enter, with_kwargs=True),
            mixer.register_forward_hook(leave),
        ]

    def _moved(self, step: _Step) -> Tensor:
        if self._axial:
            return self.positions
        total = self.positions.shape[-1]
        last = step.closed[-1:].expand(total - self.length)
        return self.positions - torch.cat([step.closed, last])

    def _layer(self, i: int, total: int) -> Callable[..., Any]:
        def hook(module: Any, args: Any, kwargs: dict[str, Any]) -> Any:
            if not self.parts:
                return None
            if len(args) > 1:
                names = list(inspect.signature(type(module).forward).parameters)[2:]
                kwargs = {**kwargs, **dict(zip(names, args[1:], strict=False))}
                args = args[:1]
            entering = args[0] if args else kwargs["hidden_states"]
            hidden = self._in_a_row(entering)

            def prepared(given: dict[str, Any], step: _Step) -> dict[str, Any]:
                seen = self._visible(i, step.alive, total)
                low = torch.finfo(hidden.dtype).min
                mask = hidden.new_zeros(total, total).masked_fill(~seen, low)[None, None]
                changed = {**given, "attention_mask": mask}
                moved = bool((step.closed != self.steps[-1].closed).any())
                turns = _attention_in(module) is not None
                if turns and moved and given.get("position_embeddings") is not None:
                    changed["position_embeddings"] = self._rotary(i, hidden, self._moved(step))
                return changed

            def ahead() -> Tensor:
                step = _Step(self.alive, self.closed)
                given = prepared({k: v for k, v in kwargs.items() if k != "hidden_states"}, step)
                found: list[Tensor] = []
                handle = _attention_in(module).register_forward_hook(
                    lambda module, args, output: found.append(output[1][0])
                )
                decided, self.decided = self.decided, True  # what runs now is not the run
                module.forward(self._apart(hidden), **given)
                self.decided = decided
                handle.remove()
                return found[0].float()

            if not self.decided:
                self.notes[i] = {}
                self._prune(i, hidden[0], ahead)
            step = self.steps[i]
            hidden = hidden.clone()
            for kept, contents in step.replaced:
                hidden[0, kept] = contents
            if not self.decided:
                self.notes[i]["input"] = hidden[0]
            kwargs = prepared(kwargs, step)
            hidden = self._apart(hidden)
            return ((hidden,), kwargs) if args else (args, {**kwargs, "hidden_states": hidden})

        return hook

    def _in_a_row(self, hidden: Tensor) -> Tensor:
        """(b, s, d): of Gemma 3n, whose layers take (streams, b, s, d), all streams in a row."""
        return hidden.permute(1, 2, 0, 3).flatten(2) if hidden.dim() == 4 else hidden

    def _apart(self, hidden: Tensor) -> Tensor:
        streams = getattr(self.config, "altup_num_inputs", None)
        return hidden if streams is None else hidden.unflatten(2, (streams, -1)).permute(2, 0, 1, 3)

    def _rotary(self, layer: int, hidden: Tensor, positions: Tensor) -> Any:
        kinds = getattr(self.config, "layer_types", None)
        if "layer_type" in inspect.signature(self.decoder.rotary_emb.forward).parameters:
            assert kinds is not None
            return self.decoder.rotary_emb(hidden, positions, kinds[layer])
        if getattr(self.decoder, "rope_types", ["scaled"] * (layer + 1))[layer] == "unscaled":
            return self.decoder.rotary_emb_unscaled(hidden, positions)
        return self.decoder.rotary_emb(hidden, positions)

    def _listen(self, i: int, layer: Any) -> list[Any]:
        def note(name: str, value: Tensor) -> None:
            if not self.decided:
                self.notes[i][name] = value[0]

        def leave_attention(module: Any, args: Any, output: Any) -> None:
            if not self.decided:
                self.attention[i] = output[1][0].float()
            note("attention_out", output[0])

        def enter_attention(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
            note("attention_in", args[0] if args else kwargs["hidden_states"])

        def leave_layer(module: Any, args: Any, output: Any) -> None:
            value = output[0] if isinstance(output, tuple) else output
            note("output", self._in_a_row(value))
            value = value[0] if value.dim() == 4 else value  # the stream that layers act on
            norm = getattr(self.decoder, "norm", None)
            norm = norm or getattr(self.decoder, "embedding_norm", None)
            norm = norm or getattr(self.decoder, "norm_f", None)
            if norm is not None:
                note("normed", norm(value))

        handles = [layer.register_forward_hook(leave_layer)]

        def leave_mlp(module: Any, args: Any, output: Any) -> None:
            value = output[0] if isinstance(output, tuple) else output
            note("mlp_out", value.reshape(1, -1, value.shape[-1]))

        if (mlp := _feed_forward_in(layer)) is not None:
            handles += [
                mlp.register_forward_pre_hook(lambda m, args: note("mlp_in", args[0])),
                mlp.register_forward_hook(leave_mlp),
            ]
        if self.family.model_type == "gemma4":  # here the output of the experts is added
            handles.append(
                layer.post_feedforward_layernorm.register_forward_pre_hook(
                    lambda m, args: note("mlp_out", args[0])
                )
            )
        if (attention := _attention_in(layer)) is not None:
            handles += [
                attention.register_forward_hook(leave_attention),
                attention.register_forward_pre_hook(enter_attention, with_kwargs=True),
            ]
        return handles

    def logits(self, extra: Tensor | None = None) -> Tensor:
        """(b, s + e, V) after the row and each of the continuations (b, e)."""
        return self._of_prompt if extra is None else self._after(extra)

    @cached_property
    def _of_prompt(self) -> Tensor:
        return self._after(torch.empty(1, 0, dtype=torch.long))

    def _after(self, extra: Tensor) -> Tensor:
        found = torch.stack([self._logits(tail, {}) for tail in extra])
        every = torch.arange(found.shape[1])
        kept = torch.cat([self.alive_at_end, self.alive.new_ones(extra.shape[1])])
        source = torch.where(kept, every, 0).cummax(0).values
        return found[:, source]

    @property
    def alive_at_end(self) -> Tensor:
        if not self.parts:
            return self.alive
        return self.steps[self.num_layers - 1].alive

    def step_logits(self, produced: Tensor) -> Tensor:
        """(b, e, V): what each of the tokens `produced` (b, e) was chosen from."""
        return self.logits(produced)[:, self.length - 1 : -1]

    @property
    def per_layer(self) -> tuple[tuple[int, ...], ...]:
        """For each image, its tokens in each decoder layer."""
        return tuple(
            tuple(
                int((self.steps[layer].alive & (self.image == i)).sum())
                for layer in range(self.num_layers)
            )
            for i in range(len(self.images))
        )
