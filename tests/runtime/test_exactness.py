# SPDX-License-Identifier: Apache-2.0
"""A patched model says what the compressed model says: the matrix of the design.

Every cell runs a patched model the way a user would and holds it to `tests/reference/reference.py`,
which computes the same model with nothing removed. The tokens a run produced are fed to the
reference one after the other, so every way of decoding is checked step by step. A covering part of
the product runs unmarked; all of it with `-m "slow or not slow"`.
"""

from __future__ import annotations

import copy
import itertools
import pickle
from collections.abc import Callable, Iterable
from functools import cache
from typing import Any

import accelerate
import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import softmax
from transformers import LlamaForCausalLM, LlavaForConditionalGeneration
from vtc.eval.embedded.vlm import embedded_atp_path

import vtc
from tests.conftest import Recorder
from tests.reference.models import (
    FIRST_WORD,
    LAYERS,
    MODELS,
    VOCABULARY,
    Sample,
    build_model,
    collate,
    make_sample,
    pristine_model,
    samples,
    shared_model,
)
from tests.reference.probes import Answers, Broken, Fixed, Merge, Nothing, Ragged, Spy, Stairs
from tests.reference.reference import Truth, token_loss
from vtc.core import LayerState, Method, Positions, VisionTokens

TOLERANCE = 1e-4
CONTROL = 100 * TOLERANCE
"""The unpruned model must be at least this far away, or agreement means nothing."""
ROUNDING = 2e-5
"""Between two runs of one model whose sums are taken in another order."""
NEW = 4
BEAMS = 3
ANSWER = 3
"""Tokens at the end of each row that are scored when labels are given."""

METHODS: dict[str, Callable[[], Method]] = {
    "random": lambda: vtc.make("random", keep=0.25),
    "pool": lambda: vtc.make("pool", keep=0.25),
    "downsample": lambda: vtc.make("downsample", keep=0.25, how="grid"),
    "todre-maxsum-drops": lambda: vtc.make("todre", keep=0.25, mode="maxsum", tau=2.0),
    "todre-kcenter-stays": lambda: vtc.make("todre", keep=0.25, mode="kcenter", tau=0.0),
    "fastv": lambda: vtc.make("fastv", keep=0.5),
    "tome": lambda: vtc.make("tome", keep=0.5),
    "tome-plain-original": lambda: vtc.ToMe(
        keep=0.3, proportional_attention=False, positions="original"
    ),
    "flowcut": lambda: vtc.make("flowcut", keep=0.25),
    "flowcut|fastv": lambda: vtc.FlowCut(keep=0.6) | vtc.make("fastv", keep=0.3),
    "divprune": lambda: vtc.make("divprune", keep=0.2),
    "visionzip": lambda: vtc.make("visionzip", keep=0.3),
    "visionzip-original": lambda: vtc.make("visionzip", keep=0.3, positions="original"),
    "pyramiddrop": lambda: vtc.make("pyramiddrop", keep=0.4),
    "v2drop": lambda: vtc.make("v2drop"),
    "dart": lambda: vtc.make("dart", keep=0.4),
    "scope": lambda: vtc.make("scope", keep=0.3),
    "mmtok": lambda: vtc.make("mmtok", keep=0.3),
    "catp": lambda: vtc.make("catp", keep=0.3),
    "transprune": lambda: vtc.make("transprune"),
    "transprune-original": lambda: vtc.make(
        "transprune",
        schedule="low",
        direction="signed",
        softmax_scope="sequence",
        positions="original",
    ),
    "visionzip|transprune": lambda: (
        vtc.VisionZip(keep=0.6) | vtc.TransPrune(schedule="after_selection")
    ),
    "cdpruner": lambda: vtc.make("cdpruner", keep=0.3),
    "correlation": lambda: vtc.make("correlation", keep=0.3),
    "correlation-adapts": lambda: vtc.make("correlation", alpha=0.2, beta=0.1),
    "vispruner": lambda: vtc.make("vispruner", keep=0.3),
    "vscan": lambda: vtc.make("vscan", keep=0.4, windows=2),
    "prumerge": lambda: vtc.make("prumerge", keep=0.3),
    "prumerge_plus": lambda: vtc.make("prumerge_plus", keep=0.3),
    "prumerge_plus-adapts": lambda: vtc.make("prumerge_plus", positions="original"),
    "atp": lambda: vtc.ATP.from_pretrained(embedded_atp_path()),
    "atp-fixed": lambda: vtc.ATP(theta_r=0.5, theta_s=0.9),
    "atp-log-contiguous": lambda: vtc.ATP(
        theta_r=0.6, theta_s=0.95, normalise="log", layers=(2, 5), positions="contiguous"
    ),
    "holov": lambda: vtc.make("holov", keep=0.3),
    "holov-paper": lambda: vtc.make("holov", keep=0.3, variant="paper", positions="original"),
    "sparsevlm": lambda: vtc.make("sparsevlm", keep=(0.7, 0.5, 0.3)),
    "sparsevlm-original": lambda: vtc.make("sparsevlm", keep=0.3, positions="original"),
    "sparsevlm-v2": lambda: vtc.make("sparsevlm", keep=(0.6, 0.4, 0.2), version="v2"),
    "visionzip|dart": lambda: vtc.VisionZip(keep=0.6) | vtc.DART(keep=0.3, layer=3),
    "todre|fastv": lambda: (
        vtc.make("todre", keep=0.5, second_stage=False) | vtc.make("fastv", keep=0.25)
    ),
    "random-contiguous": lambda: vtc.make("random", keep=0.25, positions="contiguous"),
    "fastv-contiguous": lambda: vtc.make("fastv", keep=0.25, positions="contiguous"),
    # Their images are one tile and one frame, so that they have to be the inner method.
    "vscan@tile": lambda: vtc.PerTile(vtc.VScan(keep=0.4, windows=2)),
    "todre@frame": lambda: vtc.PerFrame(vtc.ToDRE(keep=0.25, tau=2.0)),
}
PROBES: dict[str, Callable[[], Method]] = {
    "ragged": lambda: Ragged(),
    "ragged-contiguous": lambda: Ragged(positions="contiguous"),
    "merge": lambda: Merge(),
    "stairs": lambda: Stairs(),
    "stairs-contiguous": lambda: Stairs(positions="contiguous"),
    "stairs-heads|fastv": lambda: Stairs(heads=True) | vtc.make("fastv", keep=3, layer=6),
    "ragged|stairs-contiguous": lambda: Ragged() | Stairs(positions="contiguous"),
    "ragged-contiguous|todre-drops": lambda: (
        Ragged(positions="contiguous") | vtc.make("todre", keep=3, tau=2.0, positions="original")
    ),
}
EVERY_METHOD = {**METHODS, **PROBES}
PRODUCT_MODELS = ("clip+llama", "siglip+qwen2", "clip+mistral")
KINDS = ("one", "ragged", "images", "mixed")
ATTENTIONS = ("eager", "sdpa")
MODES = (
    "forward",
    "greedy",
    "beam",
    "sampling",
    "no_cache",
    "static_cache",
    "second_turn",
    "second_generate",
    "labels",
)


# ---- the reference, computed once for all cells that need it ------------------------------------
@cache
def truths(method: str, model: str, kind: str) -> tuple[Truth, ...]:
    rows = samples(kind, MODELS[model][0])
    return tuple(Truth(pristine_model(model), EVERY_METHOD[method](), row) for row in rows)


@cache
def scored_truths(method: str, model: str, kind: str) -> tuple[Truth, ...]:
    """As `truths`, but the last tokens of each row are an answer and not part of the prompt."""
    rows = samples(kind, MODELS[model][0])
    return tuple(
        Truth(
            pristine_model(model),
            EVERY_METHOD[method](),
            row,
            prompt_length=len(row.input_ids) - ANSWER,
        )
        for row in rows
    )


@cache
def prompt_logits(method: str, model: str, kind: str, scored: bool = False) -> tuple[Tensor, ...]:
    """For each row, (s, V)."""
    source = scored_truths if scored else truths
    return tuple(truth.logits()[0] for truth in source(method, model, kind))


@cache
def plain_logits(model: str, kind: str) -> tuple[Tensor, ...]:
    """The uncompressed model's, for each row (s, V)."""
    rows = samples(kind, MODELS[model][0])
    return tuple(Truth(pristine_model(model), None, row).logits()[0] for row in rows)


@cache
def best_beams(method: str, model: str, kind: str) -> tuple[tuple[Tensor, float], ...]:
    return tuple(truth.beam(BEAMS, NEW) for truth in truths(method, model, kind))


def difference(a: Tensor, b: Tensor) -> float:
    assert a.shape == b.shape, (a.shape, b.shape)
    assert torch.isfinite(a).all()
    return float((a - b).abs().max()) if a.numel() else 0.0


def unpruned_difference(method: str, model: str, kind: str) -> float:
    """How far the uncompressed model is away at the end of the prompt: the closest image row."""
    distances = []
    rows = samples(kind, MODELS[model][0])
    both = zip(prompt_logits(method, model, kind), plain_logits(model, kind), strict=True)
    for row, (compressed, plain) in zip(rows, both, strict=True):
        distance = difference(compressed[-1], plain[-1])
        if row.images:
            distances.append(distance)
        else:
            assert distance == 0.0
    return min(distances)


# ---- running a patched model --------------------------------------------------------------------
def positions_of(mask: Tensor) -> Tensor:
    """What `generate` gives padded rows: 0 at the first real token."""
    return (mask.cumsum(1) - 1).clamp_min(0)


def generate(model: nn.Module, batch: dict[str, Tensor], **settings: Any) -> Any:
    torch.manual_seed(0)
    return model.generate(
        **batch,
        **{
            "max_new_tokens": NEW,
            "do_sample": False,
            "output_logits": True,
            "return_dict_in_generate": True,
            **settings,
        },
    )


def steps_of(output: Any) -> Tensor:
    """(rows, steps, V) raw logits of a `generate` without beams."""
    return torch.stack(output.logits, dim=1)


def held_to(truth: Truth, logits: Tensor, produced: Tensor) -> float:
    """Largest difference over the steps (steps, V) that led to the tokens `produced`."""
    return difference(logits, truth.step_logits(produced[None])[0])


def assert_greedy(logits: Tensor, produced: Tensor) -> None:
    """The tokens are the most likely ones, up to ties within the tolerance."""
    picked = logits.gather(-1, produced[..., None])[..., 0]
    assert bool((picked >= logits.max(-1).values - TOLERANCE).all())


def new_words(rows: int, count: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(FIRST_WORD, VOCABULARY, (rows, count), generator=generator)


def run_forward(model: Any, rows: tuple[Sample, ...], expected: tuple[Truth, ...]) -> float:
    worst = 0.0
    for side in ("left", "right"):
        batch = collate(rows, side)
        with torch.no_grad():
            logits = model(**batch).logits
        assert logits.shape[:2] == batch["input_ids"].shape
        for i, truth in enumerate(expected):
            real = batch["attention_mask"][i].bool()
            worst = max(worst, difference(logits[i, real], truth.logits()[0]))
    return worst


def run_generate(
    model: Any, rows: tuple[Sample, ...], expected: tuple[Truth, ...], **settings: Any
) -> float:
    batch = collate(rows)
    output = generate(model, batch, **settings)
    width = batch["input_ids"].shape[1]
    assert torch.equal(output.sequences[:, :width], batch["input_ids"])
    produced, logits = output.sequences[:, width:], steps_of(output)
    if settings.get("do_sample"):
        # The same seed must draw the same tokens from the reference's distribution.
        truth_steps = torch.cat(
            [t.step_logits(p[None]) for t, p in zip(expected, produced, strict=True)]
        )
        torch.manual_seed(0)
        for step in range(NEW):
            drawn = torch.multinomial(softmax(truth_steps[:, step], dim=-1), 1)[:, 0]
            assert torch.equal(drawn, produced[:, step])
    else:
        assert_greedy(logits, produced)
        for i, truth in enumerate(expected):
            assert_greedy(truth.step_logits(produced[i][None])[0], produced[i])
    return max(held_to(t, logits[i], produced[i]) for i, t in enumerate(expected))


def run_beam(model: Any, rows: tuple[Sample, ...], best: tuple[tuple[Tensor, float], ...]) -> float:
    batch = collate(rows)
    output = generate(model, batch, num_beams=BEAMS, output_scores=True)
    width = batch["input_ids"].shape[1]
    worst = 0.0
    for i, (tokens, score) in enumerate(best):
        assert torch.equal(output.sequences[i, width:], tokens)
        worst = max(worst, abs(float(output.sequences_scores[i]) - score))
    return worst


def run_second_turn(model: Any, rows: tuple[Sample, ...], expected: tuple[Truth, ...]) -> float:
    """Two more forwards on the cache that `generate` returned, with the new tokens only."""
    batch = collate(rows)
    first = generate(model, batch)
    width = batch["input_ids"].shape[1]
    cache, sequences, mask = first.past_key_values, first.sequences, batch["attention_mask"]
    # The last token produced has not been through the model yet.
    assert cache.get_seq_length() == width + NEW - 1
    worst = 0.0
    known = width + NEW - 1
    for turn, count in enumerate((3, 1)):
        sequences = torch.cat((sequences, new_words(len(rows), count, turn)), dim=1)
        mask = nn.functional.pad(mask, (0, sequences.shape[1] - mask.shape[1]), value=1)
        settings = {}
        if not bool(mask.all()):
            settings["position_ids"] = positions_of(mask)[:, known:]
        with torch.no_grad():
            output = model(
                input_ids=sequences[:, known:],
                attention_mask=mask,
                past_key_values=cache,
                use_cache=True,
                **settings,
            )
        assert cache.get_seq_length() == sequences.shape[1]
        for i, truth in enumerate(expected):
            answer = truth.logits(sequences[i : i + 1, width:])[0]
            fed = sequences.shape[1] - known
            worst = max(worst, difference(output.logits[i], answer[-fed:]))
        known = sequences.shape[1]
    return worst


def run_second_generate(model: Any, rows: tuple[Sample, ...], expected: tuple[Truth, ...]) -> float:
    """`generate` again, with all ids and the cache of the first turn; also from a copy of it."""
    batch = collate(rows)
    first = generate(model, batch)
    width = batch["input_ids"].shape[1]
    ids = torch.cat((first.sequences, new_words(len(rows), 3, 0)), dim=1)
    mask = nn.functional.pad(batch["attention_mask"], (0, ids.shape[1] - width), value=1)
    worst = 0.0
    for past in (copy.deepcopy(first.past_key_values), first.past_key_values):
        second = generate(model, {"input_ids": ids, "attention_mask": mask}, past_key_values=past)
        assert torch.equal(second.sequences[:, : ids.shape[1]], ids)
        logits = steps_of(second)
        for i, truth in enumerate(expected):
            tail = second.sequences[i : i + 1, width:]
            answer = truth.step_logits(tail)[0, -NEW:]
            worst = max(worst, difference(logits[i], answer))
            assert_greedy(answer, tail[0, -NEW:])
    return worst


def labels_of(batch: dict[str, Tensor]) -> Tensor:
    """The last `ANSWER` real tokens of each row, -100 elsewhere."""
    from_end = batch["attention_mask"].flip(1).cumsum(1).flip(1)
    answer = (from_end <= ANSWER) & batch["attention_mask"].bool()
    return batch["input_ids"].masked_fill(~answer, -100)


def run_labels(model: Any, rows: tuple[Sample, ...], expected: tuple[Truth, ...]) -> float:
    worst = 0.0
    for side in ("right", "left"):
        batch = collate(rows, side)
        labels = labels_of(batch)
        with torch.no_grad():
            output = model(**batch, labels=labels)
        own = []
        for i, truth in enumerate(expected):
            real = batch["attention_mask"][i].bool()
            own.append(labels[i, real])
            worst = max(worst, difference(output.logits[i, real], truth.logits()[0]))
        worst = max(worst, abs(float(output.loss) - token_loss(list(expected), own)))
    return worst


def run(mode: str, patched: Any, method: str, model: str, kind: str) -> float:
    """Largest difference between the patched model and the reference in one cell."""
    rows = samples(kind, MODELS[model][0])
    if mode == "labels":
        return run_labels(patched, rows, scored_truths(method, model, kind))
    if mode == "beam":
        return run_beam(patched, rows, best_beams(method, model, kind))
    expected = truths(method, model, kind)
    if mode == "forward":
        return run_forward(patched, rows, expected)
    if mode == "second_turn":
        return run_second_turn(patched, rows, expected)
    if mode == "second_generate":
        return run_second_generate(patched, rows, expected)
    settings: dict[str, dict[str, Any]] = {
        "greedy": {},
        "sampling": {"do_sample": True, "top_k": 0, "temperature": 1.0},
        "no_cache": {"use_cache": False},
        "static_cache": {"cache_implementation": "static"},
    }
    return run_generate(patched, rows, expected, **settings[mode])


def some_now(every: int, *axes: Iterable[Any]) -> list[Any]:
    """The product of `axes`; all but every so-many are marked slow.

    Give a prime that divides no axis' length: then all of each axis occur in the unmarked part.
    """
    cells = []
    for number, cell in enumerate(itertools.product(*axes)):
        marks = [] if number % every == 0 else [pytest.mark.slow]
        cells.append(pytest.param(*cell, marks=marks, id="-".join(map(str, cell))))
    return cells


def matrix() -> list[Any]:
    """One cell in 31 unmarked: every pair of method and mode is among these.

    Of the rest of the product, a third is in the slow part; of the probes, and of the model with a
    sliding window, a seventh.
    """
    cells = some_now(31, EVERY_METHOD, MODELS, KINDS, ATTENTIONS, MODES)
    return [
        cell
        for number, cell in enumerate(cells)
        if not cell.marks
        or number % 7 == 0
        # Another third of the ways of decoding for each of what comes before.
        or (
            (number + number // len(MODES)) % 3 == 0
            and cell.values[0] in METHODS
            and cell.values[1] in PRODUCT_MODELS
        )
    ]


@pytest.mark.parametrize(("method", "model", "kind", "attention", "mode"), matrix())
def test_cell(
    method: str, model: str, kind: str, attention: str, mode: str, recorder: Recorder
) -> None:
    with vtc.patch(shared_model(model, attention), EVERY_METHOD[method]()) as patch:
        found = run(mode, patch.model, method, model, kind)
    control = unpruned_difference(method, model, kind)
    recorder.note(f"{method} {model} {kind} {attention} {mode}", found, control)
    assert control > CONTROL
    assert found < TOLERANCE


# ---- what methods are shown, and what is reported -----------------------------------------------
def _closest(shown: Any, notes: list[tuple[Any, Any]]) -> tuple[Any, Any]:
    """The engine's note on what the reference has as `shown`; the order of rows is its own."""
    if isinstance(shown, VisionTokens):
        same = [
            note
            for note in notes
            if isinstance(note[0], VisionTokens)
            and note[0].image == shown.image
            and note[0].features.shape == shown.features.shape
            and torch.allclose(note[0].features, shown.features, atol=TOLERANCE)
        ]
    else:
        same = [
            note
            for note in notes
            if isinstance(note[0], LayerState)
            and note[0].layer == shown.layer
            and note[0].hidden.shape == shown.hidden.shape
            and torch.allclose(note[0].hidden, shown.hidden, atol=TOLERANCE)
        ]
    assert len(same) == 1, f"{len(same)} calls of {len(notes)} were shown what the reference saw"
    return same[0]


SHOWN: dict[str, Callable[[], Method]] = {
    "merge": lambda: Spy(Merge()),
    "stairs": lambda: Spy(Stairs()),
    "stairs-heads": lambda: Spy(Stairs(heads=True, positions="contiguous")),
    "ragged|merge|stairs": lambda: Spy(Ragged()) | Spy(Merge()) | Spy(Stairs()),
    "todre": lambda: Spy(vtc.make("todre", keep=0.25, tau=2.0)),
    "ragged|fastv|stairs": lambda: (
        Spy(Ragged(positions="contiguous"))
        | Spy(vtc.make("fastv", keep=3, positions="contiguous"))
        | Spy(Stairs(first=3, second=6))
    ),
}


@pytest.mark.parametrize(
    ("name", "model", "kind", "attention", "scored"),
    some_now(7, SHOWN, PRODUCT_MODELS, ("images", "mixed"), ATTENTIONS, (False, True)),
)
def test_methods_are_shown_what_the_contract_promises(
    name: str, model: str, kind: str, attention: str, scored: bool
) -> None:
    method = SHOWN[name]()
    batch = collate(samples(kind, MODELS[model][0]))
    settings = {"labels": labels_of(batch)} if scored else {}
    with vtc.patch(shared_model(model, attention), method) as patch, torch.no_grad():
        patch.model(**batch, **settings)
    notes = {id(part): list(part.notes) for part in method.parts}
    calls = 0
    for row in samples(kind, MODELS[model][0]):
        length = len(row.input_ids) - (ANSWER if scored else 0)
        truth = Truth(pristine_model(model), method, row, prompt_length=length)
        for seen in truth.seen:
            calls += 1
            shown, chosen = _closest(seen.shown, notes[id(seen.method)])
            _assert_same_view(shown, seen.shown)
            if seen.chosen is None:
                assert chosen is None
            else:
                assert torch.equal(chosen.indices, seen.chosen.indices)
    assert calls == sum(len(n) for n in notes.values()) > 0


def _assert_same_view(shown: Any, expected: Any) -> None:
    if isinstance(expected, VisionTokens):
        assert torch.equal(shown.grid, expected.grid)
        assert shown.crop is None
        for signal in ("text", "cls_attention", "keys"):
            a, b = getattr(shown, signal), getattr(expected, signal)
            if b is None:
                assert a is None, f"{signal} was not asked for"
            else:
                assert difference(a, b) < TOLERANCE
        return
    assert shown.num_layers == expected.num_layers == LAYERS
    assert shown.prompt_length == expected.prompt_length
    assert tuple(shown.original) == expected.original
    assert torch.equal(shown.image, expected.image)
    assert torch.equal(shown.text, expected.text)
    assert torch.equal(shown.grid, expected.grid)
    assert set(shown.attention) == set(expected.attention)
    for layer, rows in expected.attention.items():
        assert difference(shown.attention[layer], rows) < TOLERANCE
        assert shown.attention[layer].dtype == torch.float32
    assert set(shown.recorded) == set(expected.recorded)
    for key, states in expected.recorded.items():
        assert difference(shown.recorded[key], states) < TOLERANCE
    for signal in ("ahead", "memory"):
        a, b = getattr(shown, signal), getattr(expected, signal)
        assert (a is None) == (b is None)
        assert b is None or difference(a, b) < TOLERANCE


@pytest.mark.parametrize(("method", "kind"), some_now(3, EVERY_METHOD, KINDS))
def test_report_counts_what_the_layers_process(method: str, kind: str) -> None:
    model = "siglip+qwen2"
    batch = collate(samples(kind, "siglip"))
    expected = truths(method, model, kind)
    with vtc.patch(shared_model(model, "sdpa"), EVERY_METHOD[method]()) as patch:
        generate(patch.model, batch)
        report = patch.report
    assert len(report.prefills) == 1
    reported = report.prefills[0].samples
    assert len(reported) == len(expected)
    for sample, truth in zip(reported, expected, strict=True):
        assert tuple(image.original for image in sample.images) == truth.original
        assert tuple(image.per_layer for image in sample.images) == truth.per_layer
        assert sample.text_tokens == truth.length - sum(truth.original)
        sums = [sum(image[layer] for image in truth.per_layer) for layer in range(LAYERS)]
        assert sample.lengths == tuple(sample.text_tokens + n for n in sums)
    images = [image for truth in expected for image in truth.per_layer]
    assert report.tokens_in == pytest.approx(49)
    assert report.tokens_out == pytest.approx(sum(i[0] for i in images) / len(images))
    mean = sum(sum(i) for i in images) / LAYERS / len(images)
    assert report.equivalent_tokens == pytest.approx(mean)
    report.reset()
    assert report.prefills == []


# ---- nothing changes where nothing should -------------------------------------------------------
def plain_outputs(model: Any, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    with torch.no_grad():
        logits = model(**batch).logits
    output = generate(model, batch)
    return logits, output.sequences, steps_of(output)


@cache
def unpatched(model: str, attention: str, kind: str, count: int = 3) -> tuple[Tensor, ...]:
    """`plain_outputs` of the shared model, to be asked for before it is patched."""
    batch = collate(samples(kind, MODELS[model][0])[:count])
    return plain_outputs(shared_model(model, attention), batch)


def assert_bitwise(a: tuple[Tensor, ...], b: tuple[Tensor, ...]) -> None:
    for x, y in zip(a, b, strict=True):
        assert torch.equal(x, y)


@pytest.mark.parametrize(("method", "model", "attention"), some_now(5, METHODS, MODELS, ATTENTIONS))
def test_text_only_is_bitwise_the_plain_model(method: str, model: str, attention: str) -> None:
    instance, rows = shared_model(model, attention), samples("text", MODELS[model][0])
    every = {count: unpatched(model, attention, "text", count) for count in (3, 1)}
    with vtc.patch(instance, EVERY_METHOD[method]()):
        for count, expected in every.items():
            assert_bitwise(plain_outputs(instance, collate(rows[:count])), expected)


ALL_KEPT = [
    vtc.make("full"),
    vtc.make("random", keep=1.0),
    vtc.make("pool", keep=1.0, positions="contiguous"),
    vtc.make("downsample", keep=1.0),
    vtc.make("todre", keep=1.0),
    vtc.make("fastv", keep=1.0, positions="contiguous"),
    vtc.make("random", keep=10_000) | vtc.make("fastv", keep=10_000),
    Nothing(),
]


@pytest.mark.parametrize(
    ("method", "model", "kind", "attention"), some_now(13, ALL_KEPT, MODELS, KINDS, ATTENTIONS)
)
def test_keeping_everything_is_bitwise_the_plain_model(
    method: Method, kind: str, model: str, attention: str
) -> None:
    instance = shared_model(model, attention)
    batch = collate(samples(kind, MODELS[model][0]))
    expected = unpatched(model, attention, kind)
    with vtc.patch(instance, method):
        assert_bitwise(plain_outputs(instance, batch), expected)


def fingerprint(model: nn.Module) -> dict[str, Any]:
    """All that a patch might leave behind on the modules of a model."""
    found: dict[str, Any] = {}
    for name, module in model.named_modules():
        hooks = {key: len(value) for key, value in vars(module).items() if key.endswith("_hooks")}
        config = getattr(module, "config", None)
        found[name] = (type(module), sorted(vars(module)), hooks, id(config))
        if config is not None:
            found[name] += (config._attn_implementation, str(config.to_dict()))
    return found


@pytest.mark.parametrize(("method", "attention"), some_now(5, EVERY_METHOD, ATTENTIONS))
def test_unpatching_restores_bit_for_bit(method: str, attention: str) -> None:
    model = build_model("clip", "llama", attention)
    other = shared_model("clip+llama", attention)
    batch = collate(samples("images", "clip"))
    before = plain_outputs(model, batch)
    traces = fingerprint(model)
    weights = {key: value.clone() for key, value in model.state_dict().items()}
    patch = vtc.patch(model, EVERY_METHOD[method]())
    assert list(model.state_dict()) == list(weights)
    assert type(model) is LlavaForConditionalGeneration
    during = plain_outputs(model, batch)
    assert difference(during[0][:, -1], before[0][:, -1]) > CONTROL
    # Another model of the same class in the same process is not touched.
    assert "vtc" not in str(fingerprint(other))
    assert_bitwise(plain_outputs(other, batch), before)
    patch.unpatch()
    for key, value in model.state_dict().items():
        assert torch.equal(value, weights[key])
    assert fingerprint(model) == traces
    assert_bitwise(plain_outputs(model, batch), before)
    vtc.patch(model, EVERY_METHOD[method]())
    assert_bitwise(plain_outputs(model, batch), during)
    vtc.unpatch(model)
    assert fingerprint(model) == traces


# ---- one row at a time, one call after the other ------------------------------------------------
@pytest.mark.parametrize(
    ("method", "kind", "attention"),
    some_now(5, EVERY_METHOD, ("ragged", "images", "mixed"), ATTENTIONS),
)
def test_rows_of_a_batch_equal_themselves_alone(method: str, kind: str, attention: str) -> None:
    rows = samples(kind, "siglip")
    with vtc.patch(shared_model("siglip+qwen2", attention), EVERY_METHOD[method]()) as patch:
        batch = collate(rows)
        together = generate(patch.model, batch)
        width = batch["input_ids"].shape[1]
        for i, row in enumerate(rows):
            alone = generate(patch.model, collate([row]))
            assert torch.equal(
                alone.sequences[0, len(row.input_ids) :], together.sequences[i, width:]
            )
            assert difference(steps_of(alone)[0], steps_of(together)[i]) < ROUNDING


@pytest.mark.parametrize("method", ["random", "todre-maxsum-drops", "fastv-contiguous", "stairs"])
def test_calls_leave_nothing_behind(method: str) -> None:
    """Images, then text, then images; and a method that fails in between."""
    model = shared_model("clip+llama", "sdpa")
    images, text = collate(samples("images", "clip")), collate(samples("text", "clip"))
    plain_text = plain_outputs(model, text)
    broken = Broken()
    with vtc.patch(model, EVERY_METHOD[method]() | broken):
        first = plain_outputs(model, images)
        assert_bitwise(plain_outputs(model, text), plain_text)
        broken.fails.append(True)
        with pytest.raises(ArithmeticError):
            model(**images)
        with pytest.raises(ArithmeticError):
            generate(model, images)
        broken.fails.clear()
        assert_bitwise(plain_outputs(model, text), plain_text)
        assert_bitwise(plain_outputs(model, images), first)


@pytest.mark.parametrize("attention", ATTENTIONS)
@pytest.mark.parametrize("method", ["ragged-contiguous", "stairs", "stairs-contiguous", "fastv"])
def test_two_conversations_take_turns(method: str, attention: str) -> None:
    """What was dropped belongs to a cache, not to the model: two caches used in turns."""
    model_name = "clip+mistral"
    with vtc.patch(shared_model(model_name, attention), EVERY_METHOD[method]()) as patch:
        talks = []
        for kind in ("ragged", "images"):
            batch = collate(samples(kind, "clip"))
            with torch.no_grad():
                output = patch.model(**batch, use_cache=True)
            talks.append([kind, batch, output.past_key_values, batch["input_ids"][:, :0]])
        for step in range(3):
            for talk in talks:
                kind, batch, cache, said = talk
                talk[3] = said = torch.cat((said, new_words(3, 1, step)), dim=1)
                mask = nn.functional.pad(batch["attention_mask"], (0, step + 1), value=1)
                with torch.no_grad():
                    output = patch.model(
                        input_ids=said[:, -1:],
                        attention_mask=mask,
                        past_key_values=cache,
                        use_cache=True,
                    )
                for i, truth in enumerate(truths(method, model_name, kind)):
                    expected = truth.logits(said[i : i + 1])[0, -1]
                    assert difference(output.logits[i, -1], expected) < TOLERANCE


@pytest.mark.parametrize(("method", "attention"), some_now(3, EVERY_METHOD, ATTENTIONS))
def test_a_prompt_may_end_with_its_image(method: str, attention: str) -> None:
    """The last token may then be dropped; what follows is said by the one before it."""
    found = run_generate(
        vtc.patch(shared_model("clip+llama", attention), EVERY_METHOD[method]()).model,
        samples("image_last", "clip"),
        truths(method, "clip+llama", "image_last"),
    )
    vtc.unpatch(shared_model("clip+llama", attention))
    assert found < TOLERANCE


@pytest.mark.parametrize("use_cache", [False, True])
@pytest.mark.parametrize(
    ("method", "attention"),
    some_now(3, ("random", "ragged-contiguous", "stairs", "fastv-contiguous"), ATTENTIONS),
)
def test_without_an_attention_mask(method: str, attention: str, use_cache: bool) -> None:
    """Gaps in positions must not be taken for packed sequences, nor shorter rows for full ones.

    transformers looks for packed sequences when there is neither a mask nor a cache.
    """
    rows = (samples("ragged", "clip")[0],) * 2 + (make_sample("clip", (1, "image", 9), 7),)
    batch = collate(rows)
    assert bool(batch.pop("attention_mask").all())
    probe = EVERY_METHOD[method]()
    with vtc.patch(shared_model("clip+llama", attention), probe) as patch, torch.no_grad():
        logits = patch.model(**batch, use_cache=use_cache).logits
    for i, row in enumerate(rows):
        truth = Truth(pristine_model("clip+llama"), probe, row)
        assert difference(logits[i], truth.logits()[0]) < TOLERANCE


@pytest.mark.parametrize("method", ["ragged", "merge", "stairs", "fastv"])
def test_several_answers_to_each_prompt(method: str) -> None:
    rows = samples("mixed", "clip")
    batch = collate(rows)
    width = batch["input_ids"].shape[1]
    with vtc.patch(shared_model("clip+llama", "sdpa"), EVERY_METHOD[method]()) as patch:
        output = generate(patch.model, batch, do_sample=True, top_k=0, num_return_sequences=2)
    logits = steps_of(output)
    for i in range(2 * len(rows)):
        truth = truths(method, "clip+llama", "mixed")[i // 2]
        assert held_to(truth, logits[i], output.sequences[i, width:]) < TOLERANCE


@pytest.mark.parametrize("attention", ATTENTIONS)
@pytest.mark.parametrize(
    "probe",
    [
        Fixed(),
        Fixed(positions="contiguous"),
        Fixed(layer=3),
        Fixed(layer=3, positions="contiguous"),
        Fixed() | Fixed(layer=5, stride=2, positions="contiguous"),
    ],
    ids=str,
)
def test_another_image_in_the_second_turn(probe: Method, attention: str) -> None:
    """Strides that divide an image choose the same in two turns as in one prompt of both."""
    first = make_sample("clip", (2, "image", 5), 1)
    second = make_sample("clip", (3, "image", 4), 2)
    with vtc.patch(shared_model("clip+llama", attention), probe) as patch:
        begun = generate(patch.model, collate([first]))
        ids = torch.cat((begun.sequences, second.input_ids[None]), dim=1)
        output = generate(
            patch.model,
            {"input_ids": ids, "attention_mask": torch.ones_like(ids)},
            pixel_values=second.pixel_values,
            past_key_values=begun.past_key_values,
        )
    pixels = torch.cat((first.pixel_values, second.pixel_values))
    truth = Truth(pristine_model("clip+llama"), probe, Sample(ids[0], pixels))
    produced = output.sequences[0, ids.shape[1] :]
    assert held_to(truth, steps_of(output)[0], produced) < TOLERANCE


def test_logits_to_keep_counts_from_the_end_of_the_full_length() -> None:
    model = shared_model("clip+llama", "sdpa")
    batch = collate(samples("ragged", "clip"))
    with vtc.patch(model, "random", keep=0.25), torch.no_grad():
        everything = model(**batch).logits
        some = model(**batch, logits_to_keep=12).logits
    assert difference(everything[:, -12:], some) < ROUNDING


@pytest.mark.parametrize(
    "method",
    [Fixed(), Fixed(layer=3, positions="contiguous"), Merge(), vtc.make("pool", keep=0.25)],
    ids=str,
)
def test_inference_mode_and_gradients(method: Method) -> None:
    """The methods choose the same whatever the projector's weights: the loss is then smooth."""
    model = build_model("clip", "llama", "sdpa")
    rows = samples("images", "clip")
    batch = collate(rows, "right")
    labels = labels_of(batch)
    expected = [
        Truth(model, method, row, prompt_length=len(row.input_ids) - ANSWER) for row in rows
    ]
    own = [labels[i, : len(row.input_ids)] for i, row in enumerate(rows)]
    truth = token_loss(expected, own)
    with vtc.patch(model, method):
        with torch.inference_mode():
            inference = model(**batch, labels=labels).loss
            generate(model, batch)
        loss = model(**batch, labels=labels).loss
        loss.backward()
    assert abs(float(inference) - truth) < TOLERANCE
    assert abs(float(loss.detach()) - truth) < TOLERANCE
    # The gradient is that of the compressed model's loss: it predicts a small step's effect.
    weight = model.model.multi_modal_projector.linear_2.weight
    assert weight.grad is not None
    step = 1e-3 * weight.grad / weight.grad.norm()
    predicted = float((step * weight.grad).sum())
    with torch.no_grad():
        weight.add_(step)
        expected = [
            Truth(model, method, row, prompt_length=len(row.input_ids) - ANSWER) for row in rows
        ]
    assert token_loss(expected, own) - truth == pytest.approx(predicted, rel=0.1)


@pytest.mark.parametrize("method", ["random", "pool", "todre-maxsum-drops", "fastv"])
def test_bfloat16(method: str) -> None:
    """As near to the reference, itself in bf16, as the plain model is to its own reference.

    Rows where near ties made the two keep other tokens are not compared; not all may be such.
    """
    model = build_model("clip", "llama", "sdpa", torch.bfloat16)
    spy = Spy(EVERY_METHOD[method]())
    rows = samples("ragged", "clip")
    batch = collate(rows)
    batch["pixel_values"] = batch["pixel_values"].bfloat16()
    expected = [Truth(model, EVERY_METHOD[method](), row) for row in rows]
    with torch.no_grad():
        plain = model(**batch).logits
        with vtc.patch(model, spy):
            logits = model(**batch).logits
    assert logits.dtype == torch.bfloat16

    def error(found: Tensor, answer: Tensor) -> float:
        return float((found.float() - answer.float()).norm() / answer.float().norm())

    compared = 0
    for i, (row, truth) in enumerate(zip(rows, expected, strict=True)):
        kept = [seen.chosen.indices.tolist() for seen in truth.seen if seen.chosen]
        found = [chosen.indices.tolist() for _, chosen in spy.notes if chosen]
        if not all(indices in found for indices in kept):
            continue
        compared += 1
        real = batch["attention_mask"][i].bool()
        rounding = error(plain[i, real], Truth(model, None, row).logits()[0])
        assert rounding < 5e-2
        assert error(logits[i, real], truth.logits()[0]) < 5e-2 + rounding
        assert error(plain[i, real], truth.logits()[0]) > 0.2
    assert compared >= 1


# ---- copies and accelerate ----------------------------------------------------------------------
@pytest.mark.parametrize(("method", "how"), some_now(5, EVERY_METHOD, ("deepcopy", "pickle")))
def test_copies_are_patched_and_independent(method: str, how: str) -> None:
    batch = collate(samples("images", "clip"))
    model = build_model("clip", "llama", "sdpa")
    vtc.patch(model, EVERY_METHOD[method]())
    if how == "pickle":
        # Before its first forward: after it, transformers' own hooks on the tower (which collect
        # hidden states) are local functions, and no LLaVA can be pickled any more.
        twin = pickle.loads(pickle.dumps(model))
    patched = plain_outputs(model, batch)
    with vtc.patch(build_model("clip", "llama", "sdpa"), "full") as full:
        plain = plain_outputs(full.model, batch)
    if how == "deepcopy":
        twin = copy.deepcopy(model)
    assert difference(patched[0][:, -1], plain[0][:, -1]) > CONTROL
    assert_bitwise(plain_outputs(twin, batch), patched)
    with torch.no_grad():
        twin.lm_head.weight.mul_(2.0)
    assert difference(plain_outputs(twin, batch)[0], 2 * patched[0]) < TOLERANCE
    assert_bitwise(plain_outputs(model, batch), patched)
    vtc.unpatch(twin)
    assert difference(plain_outputs(twin, batch)[0], 2 * plain[0]) < TOLERANCE
    assert_bitwise(plain_outputs(model, batch), patched)
    vtc.unpatch(model)
    assert_bitwise(plain_outputs(model, batch), plain)


@pytest.mark.parametrize(
    ("method", "how", "first"),
    some_now(
        3,
        ("random", "merge", "fastv", "stairs", "todre-maxsum-drops"),
        ("dispatch", "offload"),
        ("patch", "accelerate"),
    ),
)
def test_accelerate_hooks(method: str, how: str, first: str) -> None:
    model = build_model("clip", "llama", "sdpa")
    batch = collate(samples("images", "clip"))
    with vtc.patch(model, EVERY_METHOD[method]()):
        expected = plain_outputs(model, batch)
    if first == "patch":
        vtc.patch(model, EVERY_METHOD[method]())
    if how == "dispatch":
        accelerate.dispatch_model(model, device_map={"": "cpu"}, force_hooks=True)
    else:
        accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    if first == "accelerate":
        vtc.patch(model, EVERY_METHOD[method]())
    assert_bitwise(plain_outputs(model, batch), expected)


# ---- patching -----------------------------------------------------------------------------------
def test_a_second_patch_replaces_the_first() -> None:
    model = build_model("clip", "llama", "sdpa")
    batch = collate(samples("images", "clip"))
    plain, traces = plain_outputs(model, batch), fingerprint(model)
    with vtc.patch(model, "random", keep=0.25):
        expected = plain_outputs(model, batch)
    vtc.patch(model, "fastv", keep=0.25)
    patch = vtc.patch(model, "random", keep=0.25)
    assert patch.method == vtc.make("random", keep=0.25)
    assert patch.model is model
    assert_bitwise(plain_outputs(model, batch), expected)
    vtc.patch(model, "random", keep=0.25)
    assert_bitwise(plain_outputs(model, batch), expected)
    vtc.unpatch(model)
    assert fingerprint(model) == traces
    assert_bitwise(plain_outputs(model, batch), plain)


def test_leaving_an_inner_patch_leaves_the_model_clean() -> None:
    """A nested patch replaces the outer one; after both, the model is what it was."""
    model = build_model("clip", "llama", "sdpa")
    batch = collate(samples("one", "clip"))
    plain, traces = plain_outputs(model, batch), fingerprint(model)
    with vtc.patch(model, "random", keep=0.25), vtc.patch(model, "random", keep=0.5) as inner:
        assert inner.report.prefills == []
        plain_outputs(model, batch)
        assert inner.report.tokens_out == 18
    assert fingerprint(model) == traces
    assert_bitwise(plain_outputs(model, batch), plain)


def test_an_old_patch_does_not_remove_a_newer_one() -> None:
    model = build_model("clip", "llama", "sdpa")
    batch = collate(samples("one", "clip"))
    old = vtc.patch(model, "random", keep=0.5)
    vtc.patch(model, "random", keep=0.25)
    expected = plain_outputs(model, batch)
    old.unpatch()
    assert_bitwise(plain_outputs(model, batch), expected)


def test_a_patch_is_left_when_its_block_fails() -> None:
    model = build_model("clip", "llama", "sdpa")
    traces = fingerprint(model)
    with pytest.raises(ZeroDivisionError), vtc.patch(model, "random", keep=0.25):
        raise ZeroDivisionError
    assert fingerprint(model) == traces


def test_disabling_a_patch_for_a_while() -> None:
    model = build_model("clip", "llama", "sdpa")
    batch = collate(samples("images", "clip"))
    plain = plain_outputs(model, batch)
    patch = vtc.patch(model, "todre", keep=0.25)
    patched = plain_outputs(model, batch)
    count = len(patch.report.prefills)
    with patch.disable():
        assert_bitwise(plain_outputs(model, batch), plain)
        assert len(patch.report.prefills) == count
    assert_bitwise(plain_outputs(model, batch), patched)


def test_unpatching_twice_is_harmless() -> None:
    model = build_model("clip", "llama", "sdpa")
    traces = fingerprint(model)
    patch = vtc.patch(model, "random", keep=0.25)
    patch.unpatch()
    patch.unpatch()
    vtc.unpatch(model)
    assert fingerprint(model) == traces


# ---- what is refused ----------------------------------------------------------------------------
def test_embeddings_instead_of_ids_are_refused() -> None:
    """Without ids nobody knows where the images are; pruning nothing silently would be worse."""
    model = shared_model("clip+llama", "sdpa")
    embeds = torch.randn(1, 50, 32, generator=torch.Generator().manual_seed(0))
    with vtc.patch(model, "random", keep=0.25):
        with pytest.raises((ValueError, RuntimeError)):
            model(inputs_embeds=embeds)
        with pytest.raises((ValueError, RuntimeError)):
            model.generate(inputs_embeds=embeds, max_new_tokens=2)


def test_models_without_vision_are_refused() -> None:
    text = pristine_model("clip+llama").config.text_config
    model = LlamaForCausalLM._from_config(text)
    traces = fingerprint(model)
    with pytest.raises(vtc.UnsupportedModelError):
        vtc.patch(model, "random", keep=0.25)
    with pytest.raises((vtc.UnsupportedModelError, TypeError)):
        vtc.patch(nn.Linear(2, 2), "random", keep=0.25)
    assert fingerprint(model) == traces


def test_models_of_an_unknown_shape_are_refused() -> None:
    model = build_model("clip", "llama", "sdpa")
    model.model.eyes = model.model.vision_tower
    del model.model.vision_tower
    with pytest.raises(vtc.UnsupportedModelError):
        vtc.patch(model, "todre", keep=0.25)


@pytest.mark.parametrize(
    ("error", "match", "arguments", "settings"),
    [
        (ValueError, "random", ("no_such_method",), {}),
        (TypeError, "keep", ("random",), {"kep": 0.5}),
        (ValueError, "keep", ("random",), {"keep": 0.0}),
        (ValueError, "keep", ("random",), {"keep": 1.5}),
        (ValueError, "keep", ("random",), {"keep": -3}),
        (ValueError, "keep", ("random",), {"keep": float("nan")}),
        (TypeError, "keep", ("random",), {"keep": True}),
        (ValueError, "positions", ("random",), {"positions": "somewhere"}),
        (ValueError, "layer", ("fastv",), {"layer": 0}),
        (ValueError, "layer", ("fastv",), {"layer": LAYERS}),
        (ValueError, "layer", ("todre",), {"layer": LAYERS}),
        (TypeError, "method", (7,), {}),
    ],
)
def test_wrong_arguments_name_themselves(
    error: type[Exception], match: str, arguments: tuple[Any, ...], settings: dict[str, Any]
) -> None:
    model = build_model("clip", "llama", "sdpa")
    traces = fingerprint(model)
    with pytest.raises(error, match=match):
        vtc.patch(model, *arguments, **settings)
    assert fingerprint(model) == traces


def test_a_selection_that_breaks_the_contract_is_refused() -> None:
    """Indices out of order, twice, out of range; features of another length."""
    model = shared_model("clip+llama", "sdpa")
    batch = collate(samples("one", "clip"))
    for indices in ((3, 1), (1, 1), (0, 36), (-1, 2)):
        with vtc.patch(model, Answers(indices)), pytest.raises((ValueError, RuntimeError)):
            model(**batch)
    with vtc.patch(model, Answers((1, 2), 3)), pytest.raises((ValueError, RuntimeError)):
        model(**batch)


def test_registry_lists_what_it_should() -> None:
    assert {"full", "random", "pool", "downsample", "todre", "fastv"} <= set(vtc.methods())
    assert "probe" not in vtc.methods()
    assert any("llava" in str(family).lower() for family in vtc.models())


@pytest.mark.parametrize("layer", [-1, 0, LAYERS])
def test_acting_where_there_is_no_layer_before_is_refused(layer: int) -> None:
    """Before the first layer is what the sequence stage is for."""
    with pytest.raises(ValueError, match="layer"):
        vtc.patch(shared_model("clip+llama", "sdpa"), Fixed(layer=layer))


@pytest.mark.parametrize("attention", ATTENTIONS)
@pytest.mark.parametrize("layer", [1, LAYERS - 1])
@pytest.mark.parametrize("positions", ["original", "contiguous"])
def test_the_first_and_the_last_layer_that_can_be_pruned_before(
    positions: Positions, layer: int, attention: str
) -> None:
    rows = samples("images", "clip")
    probe = Fixed(layer=layer, positions=positions)
    expected = tuple(Truth(pristine_model("clip+llama"), probe, row) for row in rows)
    with vtc.patch(shared_model("clip+llama", attention), probe) as patch:
        assert run_generate(patch.model, rows, expected) < TOLERANCE
