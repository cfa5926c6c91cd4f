# SPDX-License-Identifier: Apache-2.0
"""Models whose vision tokens enter an encoder: Florence-2 (BART), and BLIP-2, InstructBLIP and
InstructBLIP for clips with T5.

The truth is the plain model on one row, given embeddings and a mask over the encoder's input that
closes the dropped tokens. Both the encoder and the decoder's cross-attention follow this mask, and
nothing is removed. Where gaps close, they are cut out of the embeddings by hand.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from functools import cache
from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor
from transformers.modeling_outputs import BaseModelOutput

import vtc
from tests.reference.families import (
    BOS,
    FIRST_WORD,
    IMAGE,
    PAD,
    VOCABULARY,
    draw_weights,
)
from tests.reference.families_own import Blip2
from tests.reference.probes import Probe, Ragged
from tests.runtime.test_exactness import CONTROL, NEW, TOLERANCE, difference
from vtc.core import Method, Positions, Selection, VisionTokens
from vtc.core.errors import ArgumentError

NAMES = ("florence2", "blip-2", "instructblip", "instructblipvideo")
ATTENTIONS = ("eager", "sdpa")
LAYOUTS: dict[str, tuple[tuple[int | str, ...], ...]] = {
    "one": ((2, "image", 7),),
    "ragged": ((1, "image", 9), (4, "image", 3), (0, "image", 6)),
    "images": ((2, "image", 3, "image", 5), (1, "image", 4)),
    "mixed": ((2, "image", 6), (21,), (1, "image", 5)),
}
ONE_IMAGE = {"instructblip", "instructblipvideo"}
"""Their Q-Former reads the text of each image's row."""
LABELS = torch.tensor([[30, 31, 32, 33], [40, 41, 42, 43], [50, 51, 52, 53]])


@dataclass(frozen=True)
class Blend(Probe):
    """Reads the text, drops, and gives new contents."""

    positions: Positions = "original"
    needs = frozenset({"text", "segment"})

    def select(self, tokens: VisionTokens) -> Selection:
        assert tokens.text is not None
        assert tokens.segment is not None
        chosen = (tokens.features[:, 1] + tokens.image).topk(4).indices.sort().values
        hint = tokens.text.mean(0) + tokens.segment.sum(0)
        return Selection(chosen, 0.7 * tokens.features[chosen] + 0.1 * hint)


METHODS: dict[str, Method] = {
    "ragged": Ragged(),
    "ragged-contiguous": Ragged(positions="contiguous"),
    "blend": Blend(),
    "blend-contiguous": Blend(positions="contiguous"),
    "divprune": vtc.DivPrune(keep=0.4),
}


# ---- models -------------------------------------------------------------------------------------
def config_of(name: str) -> Any:
    if name == "florence2":
        text = hf.BartConfig(
            vocab_size=VOCABULARY,
            d_model=32,
            encoder_layers=3,
            decoder_layers=3,
            encoder_attention_heads=4,
            decoder_attention_heads=4,
            encoder_ffn_dim=48,
            decoder_ffn_dim=48,
            max_position_embeddings=128,
            pad_token_id=PAD,
            bos_token_id=BOS,
            eos_token_id=2,
            decoder_start_token_id=2,
            forced_eos_token_id=None,
        )
        return hf.Florence2Config(
            vision_config={
                "depths": (1, 1, 1, 1),
                "embed_dim": (8, 8, 16, 16),
                "num_heads": (2, 2, 2, 2),
                "num_groups": (2, 2, 2, 2),
                "window_size": 4,
                "projection_dim": 32,
                "drop_path_rate": 0.0,
            },
            text_config=text.to_dict(),
            image_token_id=IMAGE,
            tie_word_embeddings=False,
        )
    text = hf.T5Config(
        vocab_size=VOCABULARY,
        d_model=32,
        d_kv=8,
        d_ff=48,
        num_layers=3,
        num_heads=4,
        relative_attention_num_buckets=16,
        relative_attention_max_distance=40,
        pad_token_id=PAD,
        bos_token_id=BOS,
        eos_token_id=2,
        decoder_start_token_id=PAD,
        tie_word_embeddings=False,
    )
    settings = Blip2().settings() | {"text_config": text.to_dict()}
    if name == "blip-2":
        return hf.Blip2Config(**settings)
    if name == "instructblip":
        return hf.InstructBlipConfig(**settings)
    settings["video_token_index"] = settings.pop("image_token_index")
    return hf.InstructBlipVideoConfig(**settings)


def build(name: str, attention: str = "sdpa") -> Any:
    cls = {
        "florence2": hf.Florence2ForConditionalGeneration,
        "blip-2": hf.Blip2ForConditionalGeneration,
        "instructblip": hf.InstructBlipForConditionalGeneration,
        "instructblipvideo": hf.InstructBlipVideoForConditionalGeneration,
    }[name]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model: Any = cls._from_config(config_of(name), attn_implementation=attention)
    draw_weights(model, 0, range(FIRST_WORD))
    if (
        name != "florence2"
    ):  # T5's head is its table, in which placeholders must differ from padding
        rows = torch.randn(FIRST_WORD, 32, generator=torch.Generator().manual_seed(1))
        model.language_model.shared.weight.data[:FIRST_WORD] = 0.1 * rows
    for part in {id(m): m for m in (model, getattr(model, "language_model", model))}.values():
        part.generation_config.eos_token_id = None
        part.generation_config.pad_token_id = PAD
        part.generation_config.decoder_start_token_id = 2 if name == "florence2" else PAD
    return model.eval()


@cache
def shared(name: str, attention: str) -> Any:
    return build(name, attention)


@cache
def pristine(name: str) -> Any:
    """For the truth: never patched."""
    return build(name, "eager")


# ---- rows ---------------------------------------------------------------------------------------
@dataclass(frozen=True, eq=False)
class Row:
    ids: Tensor
    pixels: Tensor | None


def count_of(name: str) -> int:
    return {"florence2": 17, "instructblipvideo": 32}.get(name, 16)


def row_of(name: str, layout: tuple[int | str, ...], seed: int) -> Row:
    generator = torch.Generator().manual_seed(seed)
    ids, pixels = [BOS], []
    for part in layout:
        if isinstance(part, int):
            words = torch.randint(FIRST_WORD, VOCABULARY, (part,), generator=generator)
            ids += words.tolist()
            continue
        ids += [IMAGE] * count_of(name)
        shape = {"florence2": (3, 128, 128), "instructblipvideo": (2, 3, 28, 28)}
        pixels.append(torch.randn(shape.get(name, (3, 28, 28)), generator=generator))
    return Row(torch.tensor(ids), torch.stack(pixels) if pixels else None)


def rows_of(name: str, kind: str) -> list[Row]:
    if name in ONE_IMAGE and kind in ("images", "mixed"):
        pytest.skip("the Q-Former reads one text for each image")
    return [row_of(name, layout, 7 + i) for i, layout in enumerate(LAYOUTS[kind])]


def collate(name: str, rows: list[Row], side: str = "right") -> dict[str, Tensor]:
    width = max(len(row.ids) for row in rows)
    ids = torch.full((len(rows), width), PAD)
    mask = torch.zeros(len(rows), width, dtype=torch.long)
    for i, row in enumerate(rows):
        n = len(row.ids)
        span = slice(0, n) if side == "right" else slice(width - n, width)
        ids[i, span], mask[i, span] = row.ids, 1
    pixels = [row.pixels for row in rows if row.pixels is not None]
    batch = {"input_ids": ids, "attention_mask": mask}
    if pixels:
        batch["pixel_values"] = torch.cat(pixels)
    if name in ONE_IMAGE:
        batch["qformer_input_ids"] = torch.full((len(rows), 3), 30) + torch.arange(3)
    return batch


# ---- truth --------------------------------------------------------------------------------------
class Truth:
    """The compressed model on one row."""

    @torch.no_grad()
    def __init__(self, name: str, method: Method | None, row: Row) -> None:
        self.model = pristine(name)
        ids = row.ids
        embeds = self.model.get_input_embeddings()(ids[None])[0].clone()
        self.alive = torch.ones(len(ids), dtype=torch.bool)
        self.left: list[int] = []
        closes = method is not None and getattr(method, "positions", "") == "contiguous"
        if row.pixels is not None:
            batch = collate(name, [row])
            given = {k: batch[k] for k in ("pixel_values", "qformer_input_ids") if k in batch}
            what = "video" if name == "instructblipvideo" else "image"
            features = getattr(self.model, f"get_{what}_features")(**given).pooler_output
            places = (ids == IMAGE).nonzero()[:, 0].view(len(features), -1)
            embeds[places] = features
        untouched = embeds.clone()
        text = ids != IMAGE
        if row.pixels is not None:
            text &= torch.arange(len(ids)) > places[0, 0]
        for i in range(0 if row.pixels is None or method is None else len(places)):
            shown = places[i, 1:] if name == "florence2" else places[i]
            last = int(places[i + 1, 0]) if i + 1 < len(places) else len(ids)
            segment = text & (torch.arange(len(ids)) > shown[-1]) & (torch.arange(len(ids)) < last)
            side = int(len(shown) ** 0.5)
            plane = torch.cartesian_prod(torch.arange(side), torch.arange(side))
            grid = torch.cat([torch.zeros(side * side, 1, dtype=torch.long), plane], dim=1)
            chosen = method.select(
                VisionTokens(
                    features=untouched[shown],
                    grid=grid if name == "florence2" else None,
                    image=i,
                    text=untouched[text] if "text" in method.needs else None,
                    segment=untouched[segment] if "segment" in method.needs else None,
                )
            )
            self.alive[shown] = False
            self.alive[shown[chosen.indices]] = True
            self.left.append(len(chosen.indices))
            if chosen.features is not None:
                embeds[shown[chosen.indices]] = chosen.features
        if closes:
            embeds, self.alive = embeds[self.alive], self.alive[self.alive]
        self.embeds = embeds

    @torch.no_grad()
    def logits(self, answer: Tensor) -> Tensor:
        """(t, V) after each of the decoder's tokens `answer` (t,)."""
        inner = getattr(self.model, "language_model", self.model)
        found = inner(
            inputs_embeds=self.embeds[None],
            attention_mask=self.alive[None].long(),
            decoder_input_ids=answer[None],
        )
        return found.logits[0]  # type: ignore[no-any-return]


@cache
def truths(name: str, method: str, kind: str) -> tuple[Truth, ...]:
    return tuple(Truth(name, METHODS[method], row) for row in rows_of(name, kind))


def answers(rows: int) -> Tensor:
    return torch.cat([torch.full((rows, 1), 2), LABELS[:rows]], dim=1)


def generate(model: Any, batch: dict[str, Tensor], **more: Any) -> Any:
    return model.generate(
        **batch,
        **{"max_new_tokens": NEW, "do_sample": False, **more},
        return_dict_in_generate=True,
        output_logits=True,
    )


# ---- exactness ----------------------------------------------------------------------------------
@pytest.mark.parametrize("attention", ATTENTIONS)
@pytest.mark.parametrize("kind", LAYOUTS)
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", NAMES)
def test_forward(name: str, method: str, kind: str, attention: str) -> None:
    rows, model = rows_of(name, kind), shared(name, attention)
    expected = truths(name, method, kind)
    answer = answers(len(rows))
    batch = collate(name, rows)
    with vtc.patch(model, METHODS[method]) as patch, torch.no_grad():
        found = model(**batch, decoder_input_ids=answer).logits
    for i, (truth, row) in enumerate(zip(expected, rows, strict=True)):
        assert difference(found[i], truth.logits(answer[i])) < TOLERANCE
        plain = Truth(name, None, row).logits(answer[i])
        assert row.pixels is None or difference(found[i], plain) > CONTROL
    left = [count for truth in expected for count in truth.left]
    shown = count_of(name) - (name == "florence2")
    assert [(image.original, image.steps[0][1]) for image in patch.report.images] == [
        (shown, count) for count in left
    ]


@pytest.mark.parametrize("method", ["ragged", "blend-contiguous"])
def test_left_padding_of_t5_moves_nothing(method: str) -> None:
    """It counts distances; BART numbers padding, too."""
    rows = rows_of("blip-2", "ragged")
    answer = answers(3)
    with vtc.patch(shared("blip-2", "sdpa"), METHODS[method]) as patch, torch.no_grad():
        found = patch.model(**collate("blip-2", rows, "left"), decoder_input_ids=answer).logits
    for i, truth in enumerate(truths("blip-2", method, "ragged")):
        assert difference(found[i], truth.logits(answer[i])) < TOLERANCE


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"use_cache": False},
        {"cache_implementation": "static"},
        {"do_sample": True, "suppress_tokens": list(range(FIRST_WORD))},
        {"num_beams": 3, "output_scores": True},
    ],
    ids=["greedy", "no_cache", "static_cache", "sampling", "beam"],
)
@pytest.mark.parametrize("method", ["ragged", "blend-contiguous"])
@pytest.mark.parametrize("kind", ["ragged", "mixed"])
@pytest.mark.parametrize("name", NAMES)
def test_generate(name: str, kind: str, method: str, settings: dict[str, Any]) -> None:
    if (name, kind) == ("blip-2", "mixed") and "num_beams" in settings:
        pytest.skip("covered by the ragged batch")
    rows, model = rows_of(name, kind), shared(name, "sdpa")
    expected = truths(name, method, kind)
    torch.manual_seed(0)
    with vtc.patch(model, METHODS[method]):
        out = generate(model, collate(name, rows), **settings)
    for i, truth in enumerate(expected):
        found = truth.logits(out.sequences[i, :-1])
        if "num_beams" in settings:
            chances = found.log_softmax(-1).gather(1, out.sequences[i, 1:, None])
            assert abs(float(out.sequences_scores[i]) - float(chances.mean())) < TOLERANCE
            continue
        steps = torch.stack([step[i] for step in out.logits])
        assert difference(steps, found) < TOLERANCE
        if not settings.get("do_sample"):
            assert out.sequences[i, 1:].tolist() == found.argmax(-1).tolist()


@pytest.mark.parametrize("name", NAMES)
def test_a_loss(name: str) -> None:
    """Labels are the decoder's."""
    rows, model = rows_of(name, "ragged"), shared(name, "sdpa")
    losses = []
    for i, truth in enumerate(truths(name, "ragged", "ragged")):
        start = torch.tensor([2 if name == "florence2" else PAD])
        logits = truth.logits(torch.cat([start, LABELS[i, :-1]]))
        losses.append(torch.nn.functional.cross_entropy(logits, LABELS[i]))
    with vtc.patch(model, Ragged()), torch.no_grad():
        found = model(**collate(name, rows), labels=LABELS).loss
    assert abs(float(found) - float(torch.stack(losses).mean())) < TOLERANCE


def test_outputs_of_the_encoder_are_taken_again() -> None:
    """A user's own loop: the encoder once, then the decoder step by step on its cache."""
    model, rows = shared("florence2", "sdpa"), rows_of("florence2", "ragged")
    batch, answer = collate("florence2", rows), answers(3)
    with vtc.patch(model, Ragged()), torch.no_grad():
        first = model(**batch, decoder_input_ids=answer[:, :1], use_cache=True)
        states = BaseModelOutput(last_hidden_state=first.encoder_last_hidden_state)
        assert states.last_hidden_state.shape[1] < batch["input_ids"].shape[1]
        second = model(
            encoder_outputs=states,
            attention_mask=batch["attention_mask"],
            decoder_input_ids=answer[:, 1:],
            cache=first.cache,
        )
        copied = BaseModelOutput(last_hidden_state=states.last_hidden_state.clone())
        with pytest.raises(ArgumentError, match="encoder_outputs"):
            model(
                encoder_outputs=copied,
                attention_mask=batch["attention_mask"],
                decoder_input_ids=answer,
            )
    for i, truth in enumerate(truths("florence2", "ragged", "ragged")):
        found = torch.cat([first.logits[i], second.logits[i]])
        assert difference(found, truth.logits(answer[i])) < TOLERANCE


# ---- what is shown and restored -----------------------------------------------------------------
def test_florence_shows_places_without_the_mean() -> None:
    model, rows = shared("florence2", "sdpa"), rows_of("florence2", "images")
    seen: list[VisionTokens] = []

    @dataclass(frozen=True)
    class Looks(Probe):
        def select(self, tokens: VisionTokens) -> Selection:
            seen.append(tokens)
            return Selection(torch.arange(len(tokens)))

    batch = collate("florence2", rows)
    with torch.no_grad():
        expected = model(**batch).logits
        with vtc.patch(model, Looks()):
            assert difference(model(**batch).logits, expected) < TOLERANCE
        with vtc.patch(model, "full"):
            assert torch.equal(model(**batch).logits, expected)
    for tokens in seen:
        assert tokens.grid is not None
        assert tokens.grid.tolist() == [[0, r, c] for r in range(4) for c in range(4)]


@pytest.mark.parametrize("name", NAMES)
def test_unpatching_restores_everything(name: str) -> None:
    model, batch = build(name), collate(name, rows_of(name, "ragged"))
    answer = answers(3)
    before = {id(module): set(vars(module)) for module in model.modules()}
    with torch.no_grad():
        expected = model(**batch, decoder_input_ids=answer).logits
        tokens = generate(model, batch).sequences
        with vtc.patch(model, Ragged()):
            found = model(**batch, decoder_input_ids=answer).logits
            assert difference(found, expected) > CONTROL
            twin = copy.deepcopy(model)
        again = twin(**batch, decoder_input_ids=answer).logits
        assert difference(again, found) < TOLERANCE
        assert torch.equal(model(**batch, decoder_input_ids=answer).logits, expected)
        assert torch.equal(generate(model, batch).sequences, tokens)
    assert before == {id(module): set(vars(module)) for module in model.modules()}


@pytest.mark.parametrize("name", NAMES)
def test_what_is_refused(name: str) -> None:
    model = shared(name, "sdpa")
    with pytest.raises(ArgumentError, match="before the encoder"):
        vtc.patch(model, "fastv")
    with pytest.raises(ArgumentError, match="before the encoder"):
        vtc.patch(model, "tome")
    if name == "florence2":
        with pytest.raises(vtc.UnsupportedModelError, match="windows"):
            vtc.patch(model, "visionzip")
    batch = collate(name, rows_of(name, "one"))
    with vtc.patch(model, Ragged()), pytest.raises(ArgumentError, match="prompt_lookup"):
        model.generate(**batch, prompt_lookup_num_tokens=2)


@pytest.mark.parametrize("method", ["visionzip", "scope", "mmtok"])
@pytest.mark.parametrize("name", [name for name in NAMES if name != "florence2"])
def test_generate_reads_the_tower_as_a_forward_does(name: str, method: str) -> None:
    model, batch = shared(name, "sdpa"), collate(name, rows_of(name, "ragged"))
    start = torch.full(
        (len(batch["input_ids"]), 1), model.config.text_config.decoder_start_token_id
    )
    with torch.no_grad():
        plain = model(**batch, decoder_input_ids=start).logits[:, -1]
        with vtc.patch(model, method, keep=0.5) as patch:
            expected = model(**batch, decoder_input_ids=start).logits[:, -1]
            out = generate(model, batch, output_scores=True)
        assert len(patch.report.prefills) == 2
        assert all(prefill.vision_ms > 0 for prefill in patch.report.prefills)
    assert difference(out.scores[0], expected) < TOLERANCE
    assert difference(expected, plain) > CONTROL


def test_text_is_as_without_a_patch() -> None:
    model = shared("florence2", "sdpa")
    batch = collate("florence2", [row_of("florence2", (9,), 0), row_of("florence2", (5,), 1)])
    expected = generate(model, batch).sequences
    inner = shared("blip-2", "sdpa")
    given = {"max_new_tokens": 3, "do_sample": False, **batch}
    alone = inner.language_model.generate(**given)
    with vtc.patch(model, Ragged()) as patch, vtc.patch(inner, Ragged()) as other:
        assert torch.equal(generate(model, batch).sequences, expected)
        assert torch.equal(inner.language_model.generate(**given), alone)
        assert not patch.report.prefills
        assert not other.report.prefills
        with pytest.raises(ArgumentError, match="cannot tell vision tokens"):
            inner.language_model.generate(inputs_embeds=torch.randn(1, 4, 32))


@pytest.mark.parametrize("name", ["blip-2", "instructblip"])
def test_generate_takes_embeddings_or_no_prompt(name: str) -> None:
    model, batch = shared(name, "sdpa"), collate(name, rows_of(name, "ragged"))
    ids = batch.pop("input_ids")
    embeds = model.get_input_embeddings()(ids)
    with vtc.patch(model, Ragged()) as patch:
        expected = generate(model, {**batch, "input_ids": ids}).sequences
        assert torch.equal(generate(model, {**batch, "inputs_embeds": embeds}).sequences, expected)
        del batch["attention_mask"]
        generate(model, batch)
    assert [image.original for image in patch.report.images] == [16] * 9
    assert all(image.steps[0][1] < 16 for image in patch.report.images)
