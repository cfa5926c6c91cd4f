# SPDX-License-Identifier: Apache-2.0
"""Second questions on a kept cache: that they run on it, and what they are."""

from __future__ import annotations

import math
from itertools import islice

import pytest
import torch

import vtc
from vtc.core.spec import parse_method

pytest.importorskip("lmms_eval")

from vtc.eval.analysis import multiturn
from vtc.eval.analysis.multiturn import JOINT, METHODS, SECOND, afresh, converse, dialogues, score
from vtc.eval.embedded.score import prompt_of
from vtc.eval.embedded.vlm import load


@pytest.fixture(scope="module")
def embedded():
    return load(torch.float32)


@pytest.fixture(scope="module")
def talks():
    return list(dialogues(4))


def test_dialogues_ask_of_two_places_and_are_the_same_again(talks):
    again = list(dialogues(4))
    assert [(t.first, t.second) for t in talks] == [(t.first, t.second) for t in again]
    assert [t.second.type for t in talks] == [*SECOND, *SECOND]
    for talk in dialogues(30):
        assert talk.first.type != talk.second.type
        for a in talk.first.evidence:
            for b in talk.second.evidence:
                width = min(a[2], b[2]) - max(a[0], b[0])
                height = min(a[3], b[3]) - max(a[1], b[1])
                assert width <= 0 or height <= 0
    other = list(islice(dialogues(4, seed=1), 4))
    assert [t.first.id for t in other] != [t.first.id for t in talks]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"count": 0}, "count: expected a whole number of at least 1"),
        ({"count": 1, "types": ()}, "types: expected at least one"),
        ({"count": 1, "split": "dev"}, "split: expected one of 'train', 'val', 'test', got 'dev'"),
    ],
)
def test_what_is_no_dialogue_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        next(dialogues(**options))


def test_no_score_of_nothing(embedded):
    with pytest.raises(ValueError, match="talks: expected at least one"):
        score(*embedded, "full", [])


def test_the_plain_models_second_answer_is_that_of_the_whole_dialogue(embedded, talks):
    """The cache changes nothing: the whole dialogue as one prompt gives the same answer."""
    model, processor = embedded
    for talk in talks[:2]:
        one, two = converse(model, processor, talk.image, talk.first.question, talk.second.question)
        assert one == afresh(model, processor, talk.image, talk.first.question)
        prompt = prompt_of(processor, talk.first.question)
        whole = f"{prompt} {one}</s>{JOINT.format(question=talk.second.question)}"
        inputs = processor(images=talk.image, text=whole, return_tensors="pt")
        with torch.inference_mode():
            out = model.generate(**inputs, max_new_tokens=16, do_sample=False)
        said = processor.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        assert two == said.strip()


@pytest.mark.parametrize("name", ["fastv", "divprune"])
def test_the_second_question_sees_what_the_first_one_left(embedded, talks, name, monkeypatch):
    model, processor = embedded
    seen, held = [], []
    vision = model.model.vision_tower.register_forward_hook(lambda *_: seen.append(1))
    original = multiturn._generate

    def generate(model, inputs):
        found = original(model, inputs)
        held.append([layer.get_seq_length() for layer in found[1].layers])
        return found

    monkeypatch.setattr(multiturn, "_generate", generate)
    talk = talks[0]
    try:
        with vtc.patch(model, name, keep=8) as patch:
            converse(model, processor, talk.image, talk.first.question, talk.second.question)
            assert len(patch.report.prefills) == 1  # one image was compressed, once
    finally:
        vision.remove()
    assert len(seen) == 1
    first, second = held
    # The same growth in every layer, and the last never had the image's 576 tokens.
    assert len({b - a for a, b in zip(first, second, strict=True)}) == 1
    assert second[-1] > first[-1]
    assert second[-1] < 576


def test_every_method_that_is_compared_takes_a_keep():
    for name in METHODS:
        assert parse_method(name, 0.1).keep == 0.1  # type: ignore[attr-defined]
    assert set(METHODS.values()) == {True, False}


@pytest.mark.slow
def test_scores_are_of_the_answers(embedded):
    """The plain model is near its accuracy in a second turn; eight tokens answer little."""
    model, processor = embedded
    talks = list(dialogues(20))
    full = score(model, processor, "full", talks)
    assert (full.dialogues, full.query_aware) == (20, None)
    assert full.first >= 0.8
    assert full.fresh >= 0.8
    assert full.second >= full.fresh - 0.3
    assert full.cost == pytest.approx(full.fresh - full.second)
    columns = list(zip(*full.right, strict=True))
    assert [sum(column) / 20 for column in columns] == [full.first, full.second, full.fresh]
    assert full.interval[0] <= full.cost <= full.interval[1]
    few = score(model, processor, vtc.DivPrune(keep=4), talks, "few", False)
    assert math.isclose(few.tokens, 4)
    assert few.second < full.second
    assert few.fresh < full.fresh
