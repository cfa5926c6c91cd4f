# SPDX-License-Identifier: Apache-2.0
"""The slow truth that patched models are compared with. It shares no code with the engine.

Nothing is removed here. One sample at a time, without padding, without a cache: a hand-written
decoder runs over the whole sequence, and from the layer before which a token was dropped on, no
query sees its key. What is dropped is decided by the method itself, which is shown what the
contract in `vtc/methods/base.py` promises, computed naively. That a patched model agrees with this
on padded batches with caches proves padding, batching and caching as well.

Decoder layers of the Llama shape are understood: `input_layernorm`, `self_attn` with
`q_proj`, `k_proj`, `v_proj`, `o_proj`, `post_attention_layernorm`, `mlp`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor
from torch.nn.functional import log_softmax
from transformers import LlavaForConditionalGeneration

from tests.reference.models import IMAGE, Sample
from vtc.core import SIGNALS, EncoderState, LayerState, Method, Selection, VisionTokens


def _wide(scores: Tensor) -> Tensor:
    """At least fp32."""
    return scores.to(torch.promote_types(scores.dtype, torch.float32))


# ---- the vision side ----------------------------------------------------------------------------
@dataclass(frozen=True)
class Encoded:
    """One image: embeddings (n, d), grid (n, 3), and what a tower layer and the projector show.

    Attributes:
        score: (n,) attention from [CLS], or received.
        keys: (n, d_k).
        query, own_key: (d_k,) of [CLS], or `None`.
        states: (n, d_v) what the projector receives.
        cls: (d_v,) state of [CLS] beside these, or `None`.
    """

    features: Tensor
    grid: Tensor
    score: Tensor
    keys: Tensor
    query: Tensor | None
    own_key: Tensor | None
    states: Tensor
    cls: Tensor | None


@torch.no_grad()
def encode(
    model: LlavaForConditionalGeneration, image: Tensor, vision_layer: int | float = -1
) -> Encoded:
    """One image (3, h, w), read at the tower's layer `vision_layer`.

    By default that is the last that there is (not the one whose output is used); a fraction is a
    share of the depth. Computed by hand from the hidden states that enter it. Without [CLS], a
    token's score is the attention it receives, averaged over heads and queries.
    """
    base = model.model
    pixels = image[None].to(model.dtype)
    features = base.get_image_features(pixels, return_dict=True).pooler_output[0]
    layers = base.vision_tower.encoder.layers
    through = base.vision_tower(pixels, output_hidden_states=True).hidden_states
    entering = through[:-1]
    assert len(entering) == len(layers)
    if isinstance(vision_layer, float):
        vision_layer = int(vision_layer * len(layers))
    hidden, layer = entering[vision_layer], layers[vision_layer]
    attention = layer.self_attn
    normed = layer.layer_norm1(hidden)[0]
    tokens = normed.shape[0]
    heads = model.config.vision_config.num_attention_heads
    queries = attention.q_proj(normed).view(tokens, heads, -1)
    keys = attention.k_proj(normed)
    scores = torch.einsum("ihd,jhd->hij", queries, keys.view(tokens, heads, -1))
    probabilities = (_wide(scores) * queries.shape[-1] ** -0.5).softmax(-1).mean(0)
    has_cls = hasattr(base.vision_tower.embeddings, "class_embedding")
    states, query, own_key, cls = through[model.config.vision_feature_layer][0], None, None, None
    if has_cls:
        score, own_key, query = probabilities[0, 1:], keys[0], queries[0].flatten()
        keys = keys[1:]
        cls, states = states[0], states[1:]
    else:
        score = probabilities.mean(0)
    patch = model.config.vision_config.patch_size
    rows, columns = image.shape[1] // patch, image.shape[2] // patch
    grid = torch.tensor([(0, r, c) for r in range(rows) for c in range(columns)])
    assert len(grid) == len(features) == len(score) == len(keys) == len(states)
    return Encoded(features, grid, score, keys, query, own_key, states, cls)


@torch.no_grad()
def encode_merging(
    model: LlavaForConditionalGeneration, image: Tensor, method: Method
) -> tuple[Tensor, Tensor]:
    """Features (m, d) and places (m,), ascending, of an image (3, h, w) merged in the tower.

    Tokens are lists of the patches they stand for; [CLS] is kept apart.
    """
    base = model.model
    tower, config = base.vision_tower, model.config.vision_config
    hidden = tower(image[None].to(model.dtype), output_hidden_states=True).hidden_states[0][0]
    has_cls = hasattr(tower.embeddings, "class_embedding")
    prefix, heads = int(has_cls), config.num_attention_heads
    used = range(len(tower.encoder.layers) + 1)[model.config.vision_feature_layer]
    groups = [[patch] for patch in range(len(hidden) - prefix)]
    original, memory = len(groups), None
    for i, layer in enumerate(tower.encoder.layers[:used]):
        normed = layer.layer_norm1(hidden)
        queries, keys, values = (
            projection(normed).view(len(normed), heads, -1)
            for projection in (
                layer.self_attn.q_proj,
                layer.self_attn.k_proj,
                layer.self_attn.v_proj,
            )
        )
        scores = _wide(torch.einsum("ihd,jhd->hij", queries, keys)) * queries.shape[-1] ** -0.5
        if method.weighs_sizes:
            scores = scores + torch.tensor([1.0] * prefix + [len(g) for g in groups]).log()
        probabilities = scores.softmax(-1)
        mixed = torch.einsum("hij,jhd->ihd", probabilities.to(values.dtype), values)
        hidden = hidden + layer.self_attn.out_proj(mixed.reshape(len(normed), -1))
        mean = probabilities.mean(0)
        state = EncoderState(
            layer=i,
            num_layers=used,
            original=original,
            has_cls=has_cls,
            attention=mean[0, 1:] if has_cls else mean.mean(0),
            keys=keys[prefix:],
            values=values[prefix:],
            cls_value=values[0] if has_cls else None,
            size=torch.tensor([float(len(g)) for g in groups]),
            memory=memory,
        )
        merging = method.merge(state)
        if merging is not None:
            rows, joined = list(hidden[:prefix]), []
            for token in range(int(merging.target.max()) + 1):
                members = (merging.target == token).nonzero().flatten().tolist()
                weights = torch.tensor([float(len(groups[m])) for m in members])
                contents = hidden[[prefix + m for m in members]] * weights[:, None]
                rows.append(contents.sum(0) / weights.sum())
                joined.append(sorted(patch for m in members for patch in groups[m]))
            hidden, groups, memory = torch.stack(rows), joined, merging.memory
        hidden = hidden + layer.mlp(layer.layer_norm2(hidden))
    order = sorted(range(len(groups)), key=lambda token: groups[token][0])
    states = hidden[[prefix + token for token in order]]
    return base.multi_modal_projector(states), torch.tensor([groups[t][0] for t in order])


# ---- the decoder --------------------------------------------------------------------------------
def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """RoPE in the "half" layout on (b, heads, s, d_head)."""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin


def _layer(
    model: LlavaForConditionalGeneration,
    index: int,
    hidden: Tensor,
    visible: Tensor,
    positions: Tensor,
    notes: dict[str, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """One decoder layer on (b, s, d): its output, and its (b, h, s, s) attention.

    `notes` takes, of the first row, all that methods may have recorded.

    Args:
        visible: (s, s) bool, which key (column) each query (row) sees.
        positions: (s,) rotary positions.
    """
    language = model.model.language_model
    layer = language.layers[index]
    attention = layer.self_attn
    b, s, _ = hidden.shape
    normed = layer.input_layernorm(hidden)

    def heads(projection: torch.nn.Linear) -> Tensor:
        return projection(normed).view(b, s, -1, attention.head_dim).transpose(1, 2)

    cos, sin = language.rotary_emb(hidden, position_ids=positions[None])
    queries = _rotate(heads(attention.q_proj), cos[:, None], sin[:, None])
    keys = _rotate(heads(attention.k_proj), cos[:, None], sin[:, None])
    values = heads(attention.v_proj)
    groups = queries.shape[1] // keys.shape[1]
    plain_keys, entering = keys, hidden
    keys, values = keys.repeat_interleave(groups, 1), values.repeat_interleave(groups, 1)
    scores = queries @ keys.transpose(2, 3) * attention.head_dim**-0.5
    scores = _wide(scores).masked_fill(~visible, torch.finfo(torch.float32).min)
    probabilities = scores.softmax(-1)
    mixed = probabilities.to(values.dtype) @ values
    attended = attention.o_proj(mixed.transpose(1, 2).reshape(b, s, -1))
    hidden = hidden + attended
    between = layer.post_attention_layernorm(hidden)
    changed = layer.mlp(between)
    hidden = hidden + changed
    if notes is not None:
        notes["input"], notes["output"] = entering[0], hidden[0]
        notes["normed"] = language.norm(hidden)[0]
        notes["attention_in"], notes["attention_out"] = normed[0], attended[0]
        notes["mlp_in"], notes["mlp_out"] = between[0], changed[0]
        notes["keys"] = plain_keys[0].transpose(0, 1).reshape(s, -1)
        # What layers rotate differently about is the distance between two tokens.
        ones = torch.ones(1, 1, s, attention.head_dim)
        notes["rotary"] = _rotate(ones, cos[:, None], sin[:, None])[0, 0]
    return hidden, probabilities


def _rows(method: Method, attention: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Of (h, s, s) attention, by head or averaged, some rows and columns."""
    found = attention[:, rows][:, :, columns]
    return found if method.by_head else found.mean(0)


@dataclass
class _Step:
    """What is true from one decoder layer on, for the tokens known when decisions were made.

    Attributes:
        alive: (s,) bool, tokens not dropped.
        positions: (s,) rotary positions of the alive tokens (anything for the others).
        shift: how much less than its index the position of any later token is.
        replaced: (k,) indices of tokens that were given new contents on entry, and (k, d) these.
    """

    alive: Tensor
    positions: Tensor
    shift: int
    replaced: list[tuple[Tensor, Tensor]] = field(default_factory=list)


def _check_shown(method: Method, shown: VisionTokens) -> None:
    """A signal of the table that `method` did not ask for is not shown."""
    asked = {own.name for need in method.needs for own in SIGNALS[need].fields}
    for own in (own for spec in SIGNALS.values() for own in spec.fields):
        plain = VisionTokens.__dataclass_fields__[own.name].default
        assert own.name in asked or getattr(shown, own.name) == plain, own.name


@dataclass
class Seen:
    """What a method was shown and what it chose, in the order of the calls."""

    method: Method
    shown: VisionTokens | LayerState
    chosen: Selection | None


class Truth:
    """The compressed model on one sample: decided once, then asked for any continuation.

    Args:
        model: an unpatched LLaVA; only its weights are used.
        method: the compression, or `None` for the uncompressed model.
        sample: the prompt, and its answer if one is scored.
        prompt_length: tokens of `sample` that are prompt, by default all; the others are an
            answer being scored, which methods are told apart from the prompt.
    """

    @torch.no_grad()
    def __init__(
        self,
        model: LlavaForConditionalGeneration,
        method: Method | None,
        sample: Sample,
        prompt_length: int | None = None,
    ) -> None:
        self.model = model
        self.sample = sample
        self.num_layers = model.config.text_config.num_hidden_layers
        self.parts = () if method is None else method.parts
        self.length = len(sample.input_ids)
        self.prompt_length = self.length if prompt_length is None else prompt_length
        self.seen: list[Seen] = []
        window = getattr(model.config.text_config, "sliding_window", None)
        self.window = window if window is not None else float("inf")

        self.embeds = model.get_input_embeddings()(sample.input_ids)
        self.image = torch.full((self.length,), -1)
        self.alive = torch.ones(self.length, dtype=torch.bool)
        self.positions = torch.arange(self.length)
        self.shift = 0
        self._steps: dict[int, _Step] = {}
        self._place_images()
        self._untouched = self.embeds.clone()
        first = (self.image >= 0).nonzero().flatten()[:1]
        after = torch.arange(self.length) > (first if len(first) else self.length)
        self.text = after & (self.image < 0) & (torch.arange(self.length) < self.prompt_length)
        self.original = tuple(int((self.image == i).sum()) for i in range(sample.images))
        self._merge_in_tower()
        self._compress_sequence()
        self._decide_layers()

    # ---- deciding -------------------------------------------------------------------------------
    def _place_images(self) -> None:
        """Fill the placeholders, in order, with the features of the images."""
        slots = (self.sample.input_ids == IMAGE).nonzero().flatten()
        self._where = []
        self.grid = torch.full((self.length, 3), -1)
        start = 0
        for i in range(self.sample.images):
            encoded = encode(self.model, self.sample.pixel_values[i])
            features = encoded.features
            where = slots[start : start + len(features)]
            start += len(features)
            self.embeds[where] = features
            self.image[where], self.grid[where] = i, encoded.grid
            self._where.append(where)
        assert start == len(slots), "placeholders and features do not match"

    def _drop(self, gone: Tensor, contiguous: bool) -> None:
        """Mark the tokens `gone` (s,) bool as dropped from here on."""
        self.alive = self.alive & ~gone
        if contiguous:
            self.positions = self.positions - (gone.cumsum(0) - gone.long())
            self.shift += int(gone.sum())

    def _merge_in_tower(self) -> None:
        for part in self.parts:
            if "encoder" not in part.stages:
                continue
            dropped = torch.zeros_like(self.alive)
            for i, where in enumerate(self._where):
                pixels = self.sample.pixel_values[i]
                features, places = encode_merging(self.model, pixels, part)
                dropped[where] = True
                dropped[where[places]] = False
                self.embeds[where[places]] = features
            self._drop(dropped, part.positions == "contiguous")

    def _compress_sequence(self) -> None:
        for part in self.parts:
            if "sequence" not in part.stages:
                continue
            dropped = torch.zeros_like(self.alive)
            # Text embeddings are looked up before: no selection changes them.
            text = self.embeds[self.text].clone() if "text" in part.needs else None
            for i, where in enumerate(self._where):
                pixels = self.sample.pixel_values[i]
                seen = encode(self.model, pixels, part.vision_layer)
                low = encode(self.model, pixels, part.low_layer).score
                stay = self.alive[where]
                candidates = where[stay]
                shown = VisionTokens(
                    features=self.embeds[candidates].clone(),
                    grid=seen.grid[stay],
                    every_grid=seen.grid,
                    image=i,
                    text=text,
                    cls_attention=seen.score[stay] if "cls_attention" in part.needs else None,
                    keys=seen.keys[stay] if "keys" in part.needs else None,
                    heads=self.model.config.vision_config.num_attention_heads
                    if part.needs & {"cls_attention", "cls_query", "keys"}
                    else 1,
                    low_attention=low[stay] if "low_attention" in part.needs else None,
                    cls_query=seen.query if "cls_query" in part.needs else None,
                    cls_key=seen.own_key if "cls_query" in part.needs else None,
                    encoder=seen.states[stay] if "encoder" in part.needs else None,
                    encoder_cls=seen.cls if "encoder" in part.needs else None,
                    project=self._project if "encoder" in part.needs else None,
                    segment=self._segment(i) if "segment" in part.needs else None,
                )
                _check_shown(part, shown)
                chosen = part.select(shown)
                self.seen.append(Seen(part, shown, chosen))
                kept = candidates[chosen.indices]
                dropped[candidates] = True
                dropped[kept] = False
                if chosen.features is not None:
                    self.embeds[kept] = chosen.features.to(self.embeds.dtype)
            self._drop(dropped, part.positions == "contiguous")

    @torch.no_grad()
    def _project(self, states: Tensor) -> Tensor:
        return self.model.model.multi_modal_projector(states)

    def _segment(self, image: int) -> Tensor:
        """The text that follows an image, up to the next one."""
        tokens, found = range(int(self._where[image][-1]) + 1, self.length), []
        for token in tokens:
            if self.image[token] >= 0:
                break
            if self.text[token]:
                found.append(token)
        return self._untouched[found]

    def _decide_layers(self) -> None:
        """Run the prompt (and answer) once, calling `prune` where methods ask for it."""
        hidden = self.embeds[None]
        attention: dict[int, Tensor] = {}
        notes: dict[int, dict[str, Tensor]] = {}
        memory: list[Tensor | None] = [None for _ in self.parts]
        for layer in range(self.num_layers):
            replaced = []
            for number, part in enumerate(self.parts):
                if "layers" not in part.stages:
                    continue
                if layer not in part.prune_layers(self.num_layers):
                    continue
                vision = self.alive & (self.image >= 0)
                if not vision.any():
                    continue
                state = self._state(part, layer, hidden[0], attention, notes, memory[number])
                chosen = part.prune(state)
                self.seen.append(Seen(part, state, chosen))
                if chosen is None:
                    continue
                memory[number] = chosen.memory
                candidates = vision.nonzero().flatten()
                kept = candidates[chosen.indices]
                gone = vision.clone()
                gone[kept] = False
                self._drop(gone, part.prune_positions == "contiguous")
                if chosen.features is not None:
                    hidden = hidden.clone()
                    hidden[0, kept] = chosen.features.to(hidden.dtype)
                    replaced.append((kept, chosen.features.to(hidden.dtype)))
            self._steps[layer] = _Step(self.alive, self.positions, self.shift, replaced)
            notes[layer] = {}
            hidden, probabilities = _layer(
                self.model,
                layer,
                hidden,
                self._visible(self.alive, 0),
                self.positions,
                notes[layer],
            )
            attention[layer] = probabilities[0]

    def _state(
        self,
        part: Method,
        layer: int,
        hidden: Tensor,
        attention: dict[int, Tensor],
        notes: dict[int, dict[str, Tensor]],
        memory: Tensor | None,
    ) -> LayerState:
        """What `part` is shown before `layer`: the tokens not yet dropped, nothing else."""
        here = self.alive.nonzero().flatten()
        prompt = here[here < self.prompt_length]
        rows = {
            "last": prompt[-1:],
            "text": self.text.nonzero().flatten(),
            "vision": here[self.image[here] >= 0],
            "vision_text": here[(self.image[here] >= 0) | self.text[here]],
        }
        asked, peeked = part.taps(self.num_layers), part.peeks(self.num_layers)
        ahead = None
        if layer in peeked:
            visible = self._visible(self.alive, 0)
            _, all_rows = _layer(self.model, layer, hidden[None], visible, self.positions)
            ahead = _rows(part, all_rows[0], rows[peeked[layer]], here)
        return LayerState(
            layer=layer,
            num_layers=self.num_layers,
            hidden=hidden[here].clone(),
            image=self.image[here],
            text=self.text[here],
            grid=self.grid[here],
            prompt_length=len(prompt),
            original=self.original,
            attention={
                tapped: _rows(part, attention[tapped], rows[which], here)
                for tapped, which in asked.items()
                if tapped < layer
            },
            ahead=ahead,
            recorded={
                (at, name): notes[at][name][here]
                for at, names in part.records(self.num_layers).items()
                for name in names
                if at < layer
            },
            memory=memory,
        )

    # ---- answering ------------------------------------------------------------------------------
    def _visible(self, alive: Tensor, extra: int) -> Tensor:
        """(s, s) bool: causal, minus the columns of dropped tokens."""
        seen = torch.cat((alive, torch.ones(extra, dtype=torch.bool)))
        if len(seen) > self.window:
            raise ValueError("the reference defines no sliding window shorter than the text")
        return torch.ones(len(seen), len(seen), dtype=torch.bool).tril() & seen

    def logits(self, extra: Tensor | None = None) -> Tensor:
        """Logits (b, s + e, V) after the sample followed by each of the continuations (b, e).

        At a dropped position they are those of the nearest kept token before it.
        """
        return self._of_prompt if extra is None else self._logits(extra)

    @cached_property
    def _of_prompt(self) -> Tensor:
        return self._logits(torch.empty(1, 0, dtype=torch.long))

    @torch.no_grad()
    def _logits(self, extra: Tensor) -> Tensor:
        b, e = extra.shape
        tail = self.model.get_input_embeddings()(extra)
        hidden = torch.cat((self.embeds.expand(b, -1, -1), tail), dim=1)
        later = torch.arange(self.length, self.length + e)
        alive = self.alive
        for layer in range(self.num_layers):
            step = self._steps[layer]
            for indices, contents in step.replaced:
                hidden = hidden.clone()
                hidden[:, indices] = contents
            positions = torch.cat((step.positions, later - step.shift))
            hidden, _ = _layer(self.model, layer, hidden, self._visible(step.alive, e), positions)
        output = self.model.lm_head(self.model.model.language_model.norm(hidden))
        everything = torch.arange(self.length + e)
        kept = torch.cat((alive, torch.ones(e, dtype=torch.bool)))
        source = torch.where(kept, everything, torch.zeros_like(everything)).cummax(0).values
        return output[:, source]

    def step_logits(self, produced: Tensor) -> Tensor:
        """(b, e, V): what each of the tokens `produced` (b, e) after the prompt was chosen from."""
        return self.logits(produced)[:, self.length - 1 : -1]

    def greedy(self, steps: int) -> Tensor:
        """(steps,) the tokens of greedy decoding, the whole sequence recomputed for each."""
        produced = torch.empty(1, 0, dtype=torch.long)
        for _ in range(steps):
            chosen = self.logits(produced)[:, -1].argmax(-1, keepdim=True)
            produced = torch.cat((produced, chosen), dim=1)
        return produced[0]

    def beam(self, beams: int, steps: int) -> tuple[Tensor, float]:
        """(steps,) the best of `beams` beams without an end token, and its mean log-probability."""
        running, total = torch.empty(1, 0, dtype=torch.long), torch.zeros(1)
        for _ in range(steps):
            scores = total[:, None] + log_softmax(self.logits(running)[:, -1].float(), dim=-1)
            total, flat = scores.flatten().topk(beams)
            parents = flat // scores.shape[1]
            chosen = flat % scores.shape[1]
            running = torch.cat((running[parents], chosen[:, None]), dim=1)
        return running[0], float(total[0]) / steps

    # ---- counting -------------------------------------------------------------------------------
    @property
    def per_layer(self) -> tuple[tuple[int, ...], ...]:
        """For each image, the number of its tokens that each decoder layer processes."""
        return tuple(
            tuple(
                int((self._steps[layer].alive & (self.image == i)).sum())
                for layer in range(self.num_layers)
            )
            for i in range(self.sample.images)
        )

    @property
    def dropped(self) -> int:
        """Tokens that are missing in the last layer."""
        return int((~self.alive).sum())


def token_loss(truths: list[Truth], labels: list[Tensor]) -> float:
    """Mean next-token cross-entropy over all labels (s,) that are not -100, of all rows."""
    losses = []
    for truth, row in zip(truths, labels, strict=True):
        log_probabilities = log_softmax(truth.logits()[0, :-1].float(), dim=-1)
        targets = row[1:]
        scored = targets != -100
        picked = log_probabilities[scored].gather(1, targets[scored][:, None])
        losses.append(-picked[:, 0])
    return float(torch.cat(losses).mean())
