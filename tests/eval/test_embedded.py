# SPDX-License-Identifier: Apache-2.0
"""The embedded VLM: it loads as any LLaVA does, stops by itself, and answers from the picture."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    LlavaForConditionalGeneration,
    LlavaProcessor,
)
from vtc.eval.embedded.score import answers, is_right, prompt_of, score
from vtc.eval.embedded.training.common import (
    LOOKING_HEADS,
    LOOKING_LAYERS,
    language_forward,
    to_pixels,
    vision_forward,
)
from vtc.eval.embedded.vlm import (
    EOS,
    IMAGE,
    IMAGE_TOKENS,
    build_model,
    embedded_atp_path,
    embedded_path,
    load,
)
from vtc.eval.tasks.parquet import scene_questions

Loaded = tuple[LlavaForConditionalGeneration, LlavaProcessor]


@pytest.fixture(scope="module")
def loaded() -> Loaded:
    return load(torch.float32)


def test_the_folder_is_small_and_whole() -> None:
    files = [f for f in embedded_path().iterdir() if f.is_file()]
    sizes = {f.name: f.stat().st_size for f in files}
    assert max(sizes.values()) < 20 * 2**20
    assert sum(sizes.values()) < 40 * 2**20
    assert {"config.json", "generation_config.json", "tokenizer.json", "scores.json"} <= set(sizes)
    assert (embedded_path().parent / "RECIPE.md").is_file()


def test_the_auto_classes_load_it() -> None:
    model = AutoModelForImageTextToText.from_pretrained(embedded_path())
    processor = AutoProcessor.from_pretrained(embedded_path())
    assert isinstance(model, LlavaForConditionalGeneration)
    assert isinstance(processor, LlavaProcessor)
    assert model.config.text_config.num_hidden_layers >= 8
    assert processor.tokenizer.padding_side == "left"
    assert model.generation_config.eos_token_id == processor.tokenizer.eos_token_id == EOS


def test_chat_template_takes_strings_and_parts(loaded: Loaded) -> None:
    _, processor = loaded
    text = prompt_of(processor, "What is shown?")
    assert text == "USER: <image>\nWhat is shown? ASSISTANT:"
    flat = [{"role": "user", "content": "<image>\nWhat is shown?"}]
    assert text == processor.tokenizer.apply_chat_template(
        flat, tokenize=False, add_generation_prompt=True
    )
    whole = processor.tokenizer.apply_chat_template(
        [*flat, {"role": "assistant", "content": "red star"}], tokenize=False
    )
    assert whole == text + " red star</s>"


def test_any_text_survives_the_tokenizer(loaded: Loaded) -> None:
    tokenizer = loaded[1].tokenizer
    for text in ("Is there a red star?", "ZEBRA 407, 12.50", "naïve ☕ 漢字"):
        ids = tokenizer.encode(text, add_special_tokens=False)
        assert tokenizer.decode(ids) == text
    assert len(tokenizer.encode(" 407", add_special_tokens=False)) == 4
    assert len(tokenizer.encode(" red star", add_special_tokens=False)) == 2


def test_a_prompt_holds_576_vision_tokens(loaded: Loaded) -> None:
    model, processor = loaded
    ((question, image),) = scene_questions(1)
    inputs = processor(
        images=[image], text=[prompt_of(processor, question.question)], return_tensors="pt"
    )
    assert (inputs["input_ids"] == IMAGE).sum() == IMAGE_TOKENS == 576
    features = model.get_image_features(inputs["pixel_values"]).pooler_output
    assert features[0].shape == (IMAGE_TOKENS, model.config.text_config.hidden_size)


def test_a_left_padded_batch_answers_as_single_questions_do(loaded: Loaded) -> None:
    model, processor = loaded
    samples = list(scene_questions(8, seed=3))
    together = answers(model, processor, samples)
    alone = [answers(model, processor, [sample])[0] for sample in samples]
    assert together == alone
    assert len({len(q.question) for q, _ in samples}) > 1


def test_it_stops_by_itself(loaded: Loaded) -> None:
    model, processor = loaded
    ((question, image),) = scene_questions(1, seed=1)
    inputs = processor(
        images=[image], text=[prompt_of(processor, question.question)], return_tensors="pt"
    )
    out = model.generate(**inputs, max_new_tokens=200)
    assert out[0, -1] == EOS
    assert out.shape[1] - inputs["input_ids"].shape[1] < 24


def test_it_sees(loaded: Loaded) -> None:
    """Far better with the picture than with a grey one, where guessing does not pay.

    Yes and no are half right blindly, so they are left out; RECIPE.md has the scores of all types.
    """
    model, processor = loaded
    kinds = ("attribute", "digits", "position")
    samples = [s for s in scene_questions(128, seed=2) if s[0].type in kinds]
    full, total = score(model, processor, samples)["all"]
    blind, _ = score(model, processor, samples, "blind")["all"]
    assert total == 48
    assert full / total > 0.4
    assert full - blind > 0.3 * total


def test_scores_are_reported_with_the_weights() -> None:
    scores = json.loads((embedded_path() / "scores.json").read_text())
    weights = hashlib.sha256((embedded_path() / "model.safetensors").read_bytes()).hexdigest()
    assert scores["weights"] == weights
    suites = scores["suites"]
    assert set(suites["vtc_scenes"]["all"]) == {"questions", "full", "blind", "random"}
    least = {"existence": 90, "attribute": 90, "position": 85, "count": 70, "digits": 80}
    for kind, bar in least.items():
        assert suites["vtc_scenes"][kind]["full"] >= bar
    assert suites["vtc_mosaic"]["existence"]["full"] >= 70
    assert suites["vtc_photo"]["name"]["full"] >= 40
    digits = suites["vtc_scenes"]["digits"]
    assert digits["full"] - digits["random"] >= 15


def test_the_heads_of_atp_meet_their_budget_and_spend_more_where_more_is_shown() -> None:
    folder = embedded_atp_path()
    figures = json.loads((folder / "figures.json").read_text())
    weights = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    assert figures["weights"] == weights
    assert abs(figures["tokens"] - figures["target"]) <= 0.1 * figures["target"]
    assert figures["all"]["atp"] >= figures["all"]["random"] + 10
    found = figures["correlation of tokens kept with"]["scenes of objects only"]["objects"]
    assert min(found["pearson"]["r"], found["spearman"]["r"]) >= 0.3


def test_exact_match_ignores_case_and_blanks() -> None:
    assert is_right(" Red Star\n", "red star")
    assert not is_right("red", "red star")


def test_the_training_forward_is_the_models_own() -> None:
    """Training calls the layers itself, for speed; it must compute what the model computes."""
    torch.manual_seed(0)
    model = build_model(300).eval()
    pixels = torch.randn(2, 3, 336, 336)
    ids = torch.randint(10, 300, (2, 9))
    with torch.no_grad():
        tower = model.model.vision_tower
        states = tower(pixels, output_hidden_states=True).hidden_states
        read, last = vision_forward(tower, pixels, None, last=True)
        assert last is not None
        torch.testing.assert_close(read, states[-2], atol=2e-5, rtol=1e-4)
        torch.testing.assert_close(last, states[-1], atol=2e-5, rtol=1e-4)
        language = model.model.language_model
        want = language(input_ids=ids).last_hidden_state
        mask = torch.full((9, 9), -1e4).triu(1).expand(2, 1, -1, -1)
        positions = torch.arange(9)[None].expand(2, -1)
        where = torch.tensor([[0, 4], [1, 8]])
        embedded = language.embed_tokens(ids)
        found, looks = language_forward(language, embedded, positions, mask, where)
        language.set_attn_implementation("eager")
        attentions = language(input_ids=ids, output_attentions=True).attentions
    torch.testing.assert_close(found, want, atol=2e-3, rtol=2e-2)
    assert len(looks) == len(LOOKING_LAYERS)
    for layer, look in zip(LOOKING_LAYERS, looks, strict=True):
        heads = attentions[layer][:, list(LOOKING_HEADS)]
        expected = torch.stack([heads[row, :, place] for row, place in where.tolist()])
        torch.testing.assert_close(look.exp(), expected, atol=1e-3, rtol=2e-2)


def test_training_and_the_processor_see_the_same_pixels(loaded: Loaded) -> None:
    ((_, image),) = scene_questions(1, seed=5)
    mine = to_pixels(np.asarray(image)[None]).float()
    theirs = loaded[1].image_processor(image, return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(mine, theirs, atol=0.02, rtol=0.01)


def test_no_path_of_the_machine_is_in_the_folder() -> None:
    root = str(Path(__file__).resolve().parents[2])
    for file in embedded_path().glob("*.json"):
        assert root not in file.read_text()
