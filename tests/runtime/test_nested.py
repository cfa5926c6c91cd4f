# SPDX-License-Identifier: Apache-2.0
"""BLIP-2 and its relatives beyond the matrix: their language model is a model of its own."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import vtc
from tests.reference.families import FAMILIES, FIRST_WORD, VOCABULARY
from tests.reference.masked import Masked
from tests.reference.probes import Fixed, Ragged, Spy
from tests.runtime.test_exactness import NEW, TOLERANCE, difference, generate, steps_of
from tests.runtime.test_families import PROBES, Steps, rows_of, shared, truths
from vtc.core import Record, VisionTokens
from vtc.core.errors import ArgumentError

NAMES = ("blip_2", "instructblip")


class Peeks(Steps):
    """Reads rows of attention only, also of the layer about to run."""

    def records(self, num_layers: int) -> dict[int, frozenset[Record]]:
        return {}


@pytest.mark.parametrize("probe", ["ragged-contiguous", "layers", "ragged|layers"])
@pytest.mark.parametrize("name", NAMES)
def test_a_further_turn_goes_on_with_the_language_model(name: str, probe: str) -> None:
    family, model = FAMILIES[name], shared(name, "sdpa")
    batch, expected = family.collate(rows_of(name, "ragged")), truths(name, probe, "ragged")
    method = PROBES[probe](family)
    assert method is not None
    with vtc.patch(model, method):
        first = generate(model, batch)
        width = batch["input_ids"].shape[1]
        sequences, mask = first.sequences, batch["attention_mask"]
        known = width + NEW - 1
        for count in (3, 1):
            words = torch.randint(FIRST_WORD, VOCABULARY, (len(expected), count))
            sequences = torch.cat([sequences, words], dim=1)
            mask = nn.functional.pad(mask, (0, sequences.shape[1] - mask.shape[1]), value=1)
            # OPT finds positions in the mask; Llama does not.
            places = (mask.cumsum(1) - 1)[:, known:] if name == "instructblip" else None
            with torch.no_grad():
                out = model.language_model(
                    input_ids=sequences[:, known:],
                    attention_mask=mask,
                    cache=first.cache,
                    position_ids=places,
                )
            for i, truth in enumerate(expected):
                answer = truth.logits(sequences[i : i + 1, width:])[0]
                fed = sequences.shape[1] - known
                assert difference(out.logits[i], answer[-fed:]) < TOLERANCE
            known = sequences.shape[1]


def test_opt_is_looked_ahead_at() -> None:
    family, row = FAMILIES["blip_2"], rows_of("blip_2", "one")[0]
    truth = Masked(family, FAMILIES["blip_2"].build("eager"), Peeks(), row)
    with vtc.patch(shared("blip_2", "sdpa"), Peeks()) as patch, torch.no_grad():
        found = patch.model(**family.collate((row,))).logits[0]
    assert difference(found, truth.logits()[0]) < TOLERANCE


@pytest.mark.parametrize("name", NAMES)
def test_generate_takes_embeddings_or_no_prompt_at_all(name: str) -> None:
    family, model = FAMILIES[name], shared(name, "sdpa")
    batch = family.collate(rows_of(name, "ragged"))
    ids = batch.pop("input_ids")
    embedded = model.get_input_embeddings()(ids)
    alone = {key: value for key, value in batch.items() if key != "attention_mask"}
    bos = [model.config.image_token_index] * 16 + [model.config.text_config.bos_token_id]
    default = torch.tensor([bos]).expand(len(ids), -1)
    with vtc.patch(model, Ragged()) as patch:
        expected = steps_of(generate(model, {**batch, "input_ids": ids}))
        assert (
            difference(steps_of(generate(model, {**batch, "inputs_embeds": embedded})), expected)
            < TOLERANCE
        )
        short = steps_of(generate(model, alone))
        assert (
            difference(short, steps_of(generate(model, {**alone, "input_ids": default})))
            < TOLERANCE
        )
    assert [image.original for image in patch.report.images] == [16] * 12
    assert all(image.steps[0][1] < 16 for image in patch.report.images)
    assert patch.report.flops["lm"] > 0


@pytest.mark.parametrize("name", NAMES)
def test_the_language_model_alone_runs_as_without_a_patch(name: str) -> None:
    model = shared(name, "sdpa")
    ids = torch.randint(FIRST_WORD, VOCABULARY, (2, 7))
    given = {"input_ids": ids, "max_new_tokens": 4, "do_sample": False}
    expected = model.language_model.generate(**given)
    embeds = model.get_input_embeddings()(ids)
    with vtc.patch(model, Ragged()) as patch:
        assert torch.equal(model.language_model.generate(**given), expected)
        assert not patch.report.prefills
        with pytest.raises(ArgumentError, match="cannot tell vision tokens from text"):
            model.language_model(inputs_embeds=embeds)


@pytest.mark.parametrize("setting", [{"prefill_chunk_size": 4}, {"prompt_lookup_num_tokens": 2}])
def test_ways_of_decoding_that_are_refused(setting: dict[str, Any]) -> None:
    model = shared("blip_2", "sdpa")
    batch = FAMILIES["blip_2"].collate(rows_of("blip_2", "one"))
    with vtc.patch(model, Ragged()), pytest.raises(ArgumentError, match=next(iter(setting))):
        model.generate(**batch, **setting)


def test_gaps_cannot_close_where_positions_were_added() -> None:
    with pytest.warns(UserWarning, match="has no meaning for Blip2.* are learned"):
        vtc.patch(shared("blip_2", "sdpa"), vtc.FastV(positions="contiguous")).unpatch()
    vtc.patch(shared("blip_2", "sdpa"), vtc.DivPrune(positions="contiguous")).unpatch()


@pytest.mark.parametrize("name", NAMES)
def test_a_selection_does_not_depend_on_the_batch(name: str) -> None:
    family, model, rows = FAMILIES[name], shared(name, "sdpa"), rows_of(name, "ragged")
    with vtc.patch(model, Ragged() | vtc.FastV(keep=3, layer=2)), torch.no_grad():
        together = model(**family.collate(rows)).logits
        for own, row in zip(together, rows, strict=True):
            alone = model(**family.collate((row,))).logits[0]
            assert difference(own[-len(alone) :], alone) < TOLERANCE


def test_a_clip_is_one_image() -> None:
    spy, family = Spy(Fixed(stride=2)), FAMILIES["instructblipvideo"]
    with vtc.patch(shared("instructblipvideo", "sdpa"), spy) as patch:
        generate(patch.model, family.collate(rows_of("instructblipvideo", "video")))
    shown = [len(tokens) for tokens, _ in spy.notes if isinstance(tokens, VisionTokens)]
    assert shown == [32, 32]
    assert [image.steps for image in patch.report.images] == [((0, 16),)] * 2
