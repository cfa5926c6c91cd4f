# SPDX-License-Identifier: Apache-2.0
"""The reference is right: checked against transformers itself, before anything is held to it."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor

from tests.reference.models import (
    LAYERS,
    LAYOUTS,
    MODELS,
    collate,
    pristine_model,
    samples,
    shared_model,
)
from tests.reference.probes import Fixed, Merge, Nothing, Ragged, Spy, Stairs
from tests.reference.reference import Truth, encode, token_loss
from vtc.core import LayerState, VisionTokens

TOLERANCE = 1e-4
EXACT = 2e-5

everything = pytest.mark.parametrize("name", MODELS)


def difference(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max())


@everything
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("kind", LAYOUTS)
def test_without_a_method_it_is_the_model(name: str, attention: str, kind: str) -> None:
    model = shared_model(name, attention)
    rows = samples(kind, MODELS[name][0])
    with torch.no_grad():
        batch = model(**collate(rows, "right")).logits
        for i, row in enumerate(rows):
            expected = Truth(pristine_model(name), None, row).logits()[0]
            alone = model(**collate([row])).logits[0]
            assert difference(alone, expected) < EXACT
            assert difference(batch[i, : len(expected)], expected) < EXACT


@everything
def test_a_method_that_drops_nothing_changes_nothing(name: str) -> None:
    row = samples("images", MODELS[name][0])[1]
    plain = Truth(pristine_model(name), None, row).logits()
    assert torch.equal(Truth(pristine_model(name), Nothing(), row).logits(), plain)


@everything
@pytest.mark.parametrize("probe", [Ragged(), Merge(), Stairs(), Fixed(), Fixed(layer=3)])
def test_dropping_changes_the_logits_a_lot(name: str, probe: object) -> None:
    for row in samples("ragged", MODELS[name][0]):
        plain = Truth(pristine_model(name), None, row).logits()[0, -1]
        truth = Truth(pristine_model(name), probe, row)
        assert truth.dropped > 0
        assert difference(truth.logits()[0, -1], plain) > 100 * TOLERANCE


@everything
def test_decoding_equals_generate(name: str) -> None:
    model = shared_model(name, "sdpa")
    rows = samples("images", MODELS[name][0])
    batch = collate(rows)
    width = batch["input_ids"].shape[1]
    settings = {"return_dict_in_generate": True, "max_new_tokens": 5, "do_sample": False}
    greedy = model.generate(**batch, output_logits=True, **settings)
    beam = model.generate(**batch, output_scores=True, num_beams=3, **settings)
    for i, row in enumerate(rows):
        truth = Truth(pristine_model(name), None, row)
        tokens = greedy.sequences[i, width:]
        assert torch.equal(truth.greedy(5), tokens)
        steps = torch.stack([step[i] for step in greedy.logits])
        assert difference(truth.step_logits(tokens[None])[0], steps) < EXACT
        best, score = truth.beam(3, 5)
        assert torch.equal(best, beam.sequences[i, width:])
        assert abs(score - float(beam.sequences_scores[i])) < TOLERANCE


@everything
def test_loss_equals_the_models(name: str) -> None:
    rows = samples("mixed", MODELS[name][0])
    batch = collate(rows, "right")
    labels = torch.full_like(batch["input_ids"], -100)
    own, truths = [], []
    for i, row in enumerate(rows):
        length = len(row.input_ids)
        labels[i, length - 3 : length] = row.input_ids[-3:]
        own.append(labels[i, :length])
        truths.append(Truth(pristine_model(name), None, row, prompt_length=length - 3))
    with torch.no_grad():
        loss = shared_model(name, "sdpa")(**batch, labels=labels).loss
    assert abs(float(loss) - token_loss(truths, own)) < TOLERANCE


@everything
@pytest.mark.parametrize("positions", ["original", "contiguous"])
def test_masking_equals_removing_before_the_decoder(name: str, positions: str) -> None:
    """Tokens masked in every layer = tokens taken out of `inputs_embeds` of the plain model."""
    model = pristine_model(name)
    row = samples("images", MODELS[name][0])[1]
    truth = Truth(model, Fixed(positions=positions), row)
    kept = truth.alive.nonzero().flatten()
    where = kept if positions == "original" else torch.arange(len(kept))
    with torch.no_grad():
        removed = model(
            inputs_embeds=truth.embeds[None, kept],
            position_ids=where[None],
            attention_mask=torch.ones(1, len(kept), dtype=torch.long),
        ).logits[0]
    assert difference(truth.logits()[0, kept], removed) < EXACT
    # A dropped position repeats what the kept token before it says.
    gone = (~truth.alive).nonzero().flatten()
    before = torch.stack([kept[kept < g].max() for g in gone])
    assert torch.equal(truth.logits()[0, gone], truth.logits()[0, before])


@everything
@pytest.mark.parametrize("positions", ["original", "contiguous"])
def test_masking_equals_removing_between_layers(name: str, positions: str) -> None:
    """Tokens masked from layer 3 on = hidden states gathered before the model's own layer 3."""
    model = pristine_model(name)
    language = model.model.language_model
    row = samples("images", MODELS[name][0])[1]
    truth = Truth(model, Fixed(layer=3, positions=positions), row)
    kept = truth.alive.nonzero().flatten()
    after = kept if positions == "original" else torch.arange(len(kept))
    hidden, where = truth.embeds[None], torch.arange(truth.length)
    with torch.no_grad():
        for index, layer in enumerate(language.layers):
            if index == 3:
                hidden, where = hidden[:, kept], after
            size = hidden.shape[1]
            mask = torch.full((size, size), torch.finfo(torch.float32).min).triu(1)
            hidden = layer(
                hidden,
                attention_mask=mask[None, None],
                position_embeddings=language.rotary_emb(hidden, position_ids=where[None]),
            )
        removed = model.lm_head(language.norm(hidden))[0]
    assert difference(truth.logits()[0, kept], removed) < EXACT
    for image, counts in enumerate(truth.per_layer):
        survivors = int((truth.image[kept] == image).sum())
        assert counts == truth.original[:1] * 3 + (survivors,) * (LAYERS - 3)


@everything
def test_positions_matter(name: str) -> None:
    row = samples("images", MODELS[name][0])[1]
    for layer in (None, 3):
        a, b = (
            Truth(pristine_model(name), Fixed(layer=layer, positions=p), row).logits()[0, -1]
            for p in ("original", "contiguous")
        )
        assert difference(a, b) > 100 * TOLERANCE


def test_continuations_are_independent_of_each_other() -> None:
    truth = Truth(pristine_model("clip+llama"), Stairs(), samples("one", "clip")[0])
    tails = torch.randint(3, 64, (3, 4), generator=torch.Generator().manual_seed(5))
    together = truth.logits(tails)
    for i in range(3):
        assert difference(truth.logits(tails[i : i + 1])[0], together[i]) < EXACT
    # Causal: what comes later does not change what was said before.
    assert difference(together[:, : truth.length], truth.logits().expand(3, -1, -1)) < EXACT


@pytest.mark.parametrize("layer", [-1, -2, 0])
@pytest.mark.parametrize(("name", "has_cls"), [("clip+llama", True), ("siglip+qwen2", False)])
def test_signals_of_the_tower_equal_output_attentions(name: str, has_cls: bool, layer: int) -> None:
    model = pristine_model(name)
    tower = copy.deepcopy(model.model.vision_tower)
    tower.set_attn_implementation("eager")
    image = samples("one", MODELS[name][0])[0].pixel_values[0]
    caught = []
    projection = tower.encoder.layers[layer].self_attn.k_proj
    projection.register_forward_hook(lambda module, args, output: caught.append(output[0]))
    with torch.no_grad():
        mean = tower(image[None], output_attentions=True).attentions[layer][0].mean(0)
    seen = encode(model, image, layer)
    grid, score, keys = seen.grid, seen.score, seen.keys
    if has_cls:
        expected, vision_keys = mean[0, 1:], caught[0][1:]
    else:
        expected, vision_keys = mean.mean(0), caught[0]
    assert difference(score, expected) < 1e-6
    assert difference(keys, vision_keys) < EXACT
    assert (seen.query is None) == (seen.cls is None) == (not has_cls)
    projected = model.model.multi_modal_projector(seen.states)
    assert difference(projected, seen.features) < EXACT
    side = int(len(grid) ** 0.5)
    assert grid[side].tolist() == [0, 1, 0]
    assert grid[-1].tolist() == [0, side - 1, side - 1]


@everything
def test_attention_shown_to_methods_equals_output_attentions(name: str) -> None:
    model = pristine_model(name)
    row = samples("images", MODELS[name][0])[1]
    spy = Spy(Stairs())
    truth = Truth(model, spy, row)
    with torch.no_grad():
        attentions = model(**collate([row]), output_attentions=True).attentions
    (early, chosen), (late, _) = spy.notes
    assert isinstance(early, LayerState)
    assert early.attention[1].shape == (1, truth.length)
    assert difference(early.attention[1], attentions[1][0].mean(0)[-1:]) < 1e-6
    # After the first drop the method sees survivors only, and rows still sum to one.
    survivors = truth.length - len(early.vision) + len(chosen.indices)
    assert late.attention[4].shape == (10, survivors)
    assert torch.allclose(late.attention[4].sum(1), torch.ones(10), atol=1e-5)
    assert late.hidden.shape[0] == survivors == len(late.image) == len(late.text)
    assert int(late.text.sum()) == 10  # the four and the six words after the first image
    assert late.original == (len(early.vision) // 2,) * 2
    assert late.num_layers == LAYERS


def test_methods_see_one_image_at_a_time_and_only_what_they_ask_for() -> None:
    spy = Spy(Ragged())
    truth = Truth(pristine_model("clip+llama"), spy | Merge(), samples("images", "clip")[1])
    tokens = [entry.shown for entry in truth.seen if isinstance(entry.shown, VisionTokens)]
    assert [shown.image for shown in tokens] == [0, 1, 0, 1]
    assert all(shown.text is shown.keys is shown.cls_attention is None for shown in tokens[:2])
    assert all(shown.text is not None and len(shown.text) == 10 for shown in tokens[2:])
    for first, (_, chosen), second in zip(tokens[:2], spy.notes, tokens[2:], strict=True):
        assert torch.equal(second.features, first.features[chosen.indices])
        assert torch.equal(second.grid, first.grid[chosen.indices])


def test_the_answer_being_scored_is_not_part_of_the_prompt() -> None:
    row = samples("one", "clip")[0]
    spy = Spy(Stairs())
    Truth(pristine_model("clip+llama"), spy, row, prompt_length=len(row.input_ids) - 3)
    state = spy.notes[0][0]
    assert state.prompt_length == len(state.hidden) - 3
    assert not state.text[-3:].any()
    assert int(state.text.sum()) == 4
    assert float(state.attention[1][0, -3:].abs().max()) == 0.0
