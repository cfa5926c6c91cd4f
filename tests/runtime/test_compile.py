# SPDX-License-Identifier: Apache-2.0
"""Steps of decoding that `generate` compiles on a static cache: one graph where the plain model has
one, as many graphs as it has, and the logits of the masked reference.

A step may only be compiled once: what compiles anew, or leaves the graph, is a fault here, although
its numbers would be right.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import CompileConfig, StaticCache, StoppingCriteria

import vtc
from tests.conftest import Recorder
from tests.reference.families import FAMILIES
from tests.reference.models import MODELS, build_model, collate, samples, shared_model
from tests.runtime import test_families, test_seq2seq, test_serving
from tests.runtime.test_exactness import (
    BEAMS,
    CONTROL,
    EVERY_METHOD,
    NEW,
    ROUNDING,
    TOLERANCE,
    best_beams,
    difference,
    generate,
    new_words,
    positions_of,
    some_now,
    steps_of,
    truths,
    unpruned_difference,
)
from tests.runtime.test_families import PROBES
from vtc.core import Method
from vtc.runtime.hf import steps
from vtc.runtime.hf.cache import ledger_of

flash = test_serving.flash
ROOM = 320
"""Tokens of a static cache, which also holds further turns."""
NAMES = ("clip+llama", "siglip+qwen2", "clip+mistral")
CHOSEN = ("divprune", "fastv", "tome", "flowcut|fastv", "ragged|stairs-contiguous", "sparsevlm")
"""The sequence stage, layers, the tower; positions that shift; rows of unequal lengths."""
BUILT = {"qwen2_vl": 1, "gemma3_short": 2, "qwen3_5": 1, "lfm2_vl": 1, "gemma3n_short": 2}
BUILT |= {"vipllava": 1, "paligemma": 1, "llama4": 0}
"""Families that differ in a step: M-RoPE, windows, recurrent layers, layers that take rotations by
place; and how many graphs transformers makes of the plain model's steps: layers with a window count
in Python, and of Llama 4 it compiles none."""


# ---- compiling ----------------------------------------------------------------------------------
GRAPHS: list[int] = []
"""Operations of each graph that was compiled."""


def counting(graph: Any, examples: Any) -> Any:
    """A backend that counts the graphs, and runs them as they are."""
    GRAPHS.append(len(graph.graph.nodes))
    return graph.forward


def settings(backend: Any = counting, **more: Any) -> Any:
    config: Any = CompileConfig(
        **{"backend": backend, "mode": None, "fullgraph": True, **more}  # type: ignore[arg-type]
    )
    config._compile_all_devices = True
    return config


class Notes(StoppingCriteria):
    """How many graphs there are after each step; calls `then` with the number of steps."""

    def __init__(self, then: Callable[[int], None] = lambda count: None) -> None:
        self.graphs: list[int] = []
        self.then = then

    def __call__(self, input_ids: Any, scores: Any, **kwargs: Any) -> Any:
        self.graphs.append(len(GRAPHS))
        self.then(len(self.graphs))
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)


def compiled(model: Any, batch: dict[str, Tensor], **more: Any) -> tuple[Any, list[int]]:
    """The output of a compiled `generate`, and how many graphs there were after each step."""
    notes = Notes()
    if more.get("past_key_values") is None:
        more["cache_implementation"] = "static"
    more = {"compile_config": settings(), "stopping_criteria": [notes], **more}
    try:
        return generate(model, batch, **more), notes.graphs
    finally:  # transformers keeps what it compiled on the model, which tests share
        for name in ("_compiled_call", "_last_compile_config"):
            vars(model).pop(name, None)


def forget() -> None:
    torch.compiler.reset()
    GRAPHS.clear()


@pytest.fixture(autouse=True)
def _nothing_compiled() -> Iterator[None]:
    forget()
    yield
    forget()


def shared_of(name: str) -> Any:
    return shared_model(name, "sdpa")


def static(model: Any) -> StaticCache:
    return StaticCache(config=model.config.get_text_config(), max_cache_len=ROOM)


# ---- held to the masked reference ---------------------------------------------------------------
@pytest.mark.parametrize(
    ("method", "name", "kind"), some_now(17, CHOSEN, NAMES, ("one", "ragged", "images", "mixed"))
)
def test_steps_are_one_graph(method: str, name: str, kind: str, recorder: Recorder) -> None:
    """Padded batches, several pictures, rows without any; and the next call compiles no more."""
    batch, model = collate(samples(kind, MODELS[name][0])), shared_of(name)
    with vtc.patch(model, EVERY_METHOD[method]()):
        out, graphs = compiled(model, batch)
        again, more = compiled(model, batch)
        running = generate(model, batch, cache_implementation="static")
    assert graphs == [0, *[1] * (NEW - 1)]
    assert more == [1] * NEW
    assert torch.equal(steps_of(again), steps_of(out))
    assert difference(steps_of(out), steps_of(running)) < ROUNDING
    found = off(out, batch, truths(method, name, kind))
    control = unpruned_difference(method, name, kind)
    recorder.note(f"compiled {method} {name} {kind}", found, control)
    assert control > CONTROL
    assert found < TOLERANCE


def off(out: Any, batch: dict[str, Tensor], expected: Any) -> float:
    """The largest difference from the reference."""
    produced, logits = out.sequences[:, batch["input_ids"].shape[1] :], steps_of(out)
    pairs = enumerate(expected)
    return max(difference(logits[i], t.step_logits(produced[i][None])[0]) for i, t in pairs)


@pytest.mark.parametrize(
    ("name", "probe"),
    [
        pytest.param(name, probe, marks=() if name in now else pytest.mark.slow)
        for probe, now in {
            "divprune": ("gemma3_short",),
            "fastv": ("qwen2_vl",),
            "ragged|layers": ("lfm2_vl",),
        }.items()
        for name in BUILT
    ],
)
def test_every_kind_of_step(name: str, probe: str, recorder: Recorder) -> None:
    family, model = FAMILIES[name], test_families.shared(name, "sdpa")
    batch, method = family.collate(family.rows("ragged")), PROBES[probe](family)
    assert method is not None
    with vtc.patch(model, method):
        out, graphs = compiled(model, batch)
    assert graphs == steps_as_plain(name)
    found = off(out, batch, test_families.truths(name, probe, "ragged"))
    control = test_families.distance(name, probe, "ragged")
    recorder.note(f"compiled {name} {probe}", found, control)
    assert control > CONTROL
    assert found < TOLERANCE


def steps_as_plain(name: str) -> list[int]:
    return [0, *(min(step, BUILT[name]) for step in range(1, NEW))]


@pytest.mark.slow
@pytest.mark.parametrize("name", BUILT)
def test_the_plain_model_has_as_many_graphs(name: str) -> None:
    family, model = FAMILIES[name], test_families.shared(name, "sdpa")
    _, graphs = compiled(model, family.collate(family.rows("ragged")))
    assert graphs == steps_as_plain(name)


@pytest.mark.parametrize(
    ("kind", "method"), [("ragged", vtc.Full()), ("text", vtc.FastV(keep=0.3))]
)
def test_where_nothing_is_dropped_steps_are_those_of_the_plain_model(
    kind: str, method: Method
) -> None:
    """Bit for bit; and so they are afterwards, whatever was compiled under the patch."""
    batch, model = collate(samples(kind, "clip")), shared_of("clip+llama")
    plain, graphs = compiled(model, batch)
    with vtc.patch(model, method):
        found, _ = compiled(model, batch)
    afterwards, _ = compiled(model, batch)
    assert graphs[-1] == 1
    for out in (found, afterwards):
        assert torch.equal(steps_of(out), steps_of(plain))


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compilers_of_torch(backend: str) -> None:
    batch, model = collate(samples("ragged", "clip")), shared_of("clip+llama")
    torch._dynamo.utils.counters.clear()
    with vtc.patch(model, EVERY_METHOD["ragged|stairs-contiguous"]()):
        out, _ = compiled(model, batch, compile_config=settings(backend))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    assert off(out, batch, truths("ragged|stairs-contiguous", "clip+llama", "ragged")) < TOLERANCE


@pytest.mark.parametrize("method", ["divprune", "fastv"])
def test_beams(method: str) -> None:
    """transformers compiles no step of a beam search, but its cache is as static."""
    batch, model = collate(samples("ragged", "clip")), shared_of("clip+llama")
    with vtc.patch(model, EVERY_METHOD[method]()):
        out, graphs = compiled(model, batch, num_beams=BEAMS, output_scores=True)
    assert graphs == [0] * NEW
    width = batch["input_ids"].shape[1]
    for i, (tokens, score) in enumerate(best_beams(method, "clip+llama", "ragged")):
        assert torch.equal(out.sequences[i, width:], tokens)
        assert abs(float(out.sequences_scores[i]) - score) < TOLERANCE


# ---- the same cache -----------------------------------------------------------------------------
@pytest.mark.parametrize(
    "method",
    ["fastv", *(pytest.param(name, marks=pytest.mark.slow) for name in CHOSEN if name != "fastv")],
)
def test_further_turns(method: str) -> None:
    """More words, then none, then a forward by itself: all of one graph."""
    batch, model = collate(samples("ragged", "clip")), shared_of("clip+llama")
    rows, width = batch["input_ids"].shape
    cache, expected = static(model), truths(method, "clip+llama", "ragged")
    mask, ids, turns = batch["attention_mask"], batch["input_ids"], []
    with vtc.patch(model, EVERY_METHOD[method]()):
        for words in (None, 3, 0):
            if words is not None:
                ids = torch.cat([ids, new_words(rows, words, words)], dim=1)
                batch = {"input_ids": ids}
            mask = nn.functional.pad(mask, (0, ids.shape[1] - mask.shape[1]), value=1)
            out, graphs = compiled(model, {**batch, "attention_mask": mask}, past_key_values=cache)
            turns.append((out, graphs))
            ids = out.sequences
        mask = nn.functional.pad(mask, (0, ids.shape[1] - mask.shape[1]), value=1)
        last = go_on(model, ids, mask, cache)
    assert [graphs for _, graphs in turns] == [[0, 1, 1, 1], [1] * NEW, [1] * NEW]
    for i, truth in enumerate(expected):
        answer = truth.logits(ids[i : i + 1, width:])[0]
        assert difference(last[i], answer[-last.shape[1] :]) < TOLERANCE
        for out, _ in turns:
            after = out.sequences[i : i + 1, width:]
            own = truth.step_logits(after)[0, -NEW:]
            assert difference(steps_of(out)[i], own) < TOLERANCE


def go_on(model: Any, ids: Tensor, mask: Tensor, cache: Any) -> Tensor:
    """Logits of the tokens that the cache has not seen yet, in one forward."""
    known = cache.get_seq_length()
    with torch.no_grad():
        return model(
            input_ids=ids[:, known:],
            attention_mask=mask,
            position_ids=positions_of(mask)[:, known:],
            past_key_values=cache,
        ).logits


@pytest.mark.parametrize("where", ["between steps", "before the decoder", "in the decoder"])
def test_an_interrupt_leaves_the_count_right(where: str) -> None:
    """A step that was prepared and never ran is not counted, and the cache can be gone on with."""
    batch, model = collate(samples("ragged", "clip")), shared_of("clip+llama")
    width, cache, calls = batch["input_ids"].shape[1], static(model), []

    def halt(*_: Any) -> None:
        calls.append(True)
        if len(calls) == 3:  # the prompt, a step, and this
            raise KeyboardInterrupt

    part = {
        "between steps": None,
        "before the decoder": model.get_input_embeddings(),
        "in the decoder": model.model.language_model,
    }[where]
    criteria = [] if part is not None else [Notes(halt)]
    with vtc.patch(model, EVERY_METHOD["fastv"]()):
        ids = generate(model, batch).sequences
        handle = None if part is None else part.register_forward_pre_hook(halt)
        with pytest.raises(KeyboardInterrupt):
            generate(model, batch, past_key_values=cache, stopping_criteria=criteria)
        if handle is not None:
            handle.remove()
        ledger = ledger_of(cache)
        assert ledger is not None
        assert ledger.logical == cache.get_seq_length() == width + (2 if part is None else 1)
        held = [layer.get_seq_length() for layer in cache.layers]
        assert [int(n) for n in held] == [
            ledger.groups[ledger.group_of(i)].length for i in range(len(held))
        ]
        assert steps.pending({"past_key_values": cache}) is None
        assert not ledger.may_write
        mask = nn.functional.pad(batch["attention_mask"], (0, NEW), value=1)
        found = go_on(model, ids, mask, cache)
    for i, truth in enumerate(truths("fastv", "clip+llama", "ragged")):
        answer = truth.logits(ids[i : i + 1, width:])[0]
        assert difference(found[i], answer[-found.shape[1] :]) < TOLERANCE


# ---- CUDA graphs --------------------------------------------------------------------------------
@pytest.mark.parametrize("name", ["vipllava", "qwen2_vl", "gemma3"])
@pytest.mark.parametrize("probe", ["divprune", "ragged|layers"])
def test_what_a_step_takes_is_laid_out_alike(
    name: str, probe: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a CUDA graph needs: it reads its inputs at fixed places, of fixed shapes."""
    family, model, seen, prepare = (
        FAMILIES[name],
        test_families.shared(name, "sdpa"),
        [],
        steps.prepare,
    )

    def note(groups: Any, inputs: dict[str, Any]) -> None:
        prepare(groups, inputs)
        step = steps.pending(inputs)
        given: list[Any] = []
        torch.utils._pytree.tree_map(given.append, (vars(step), inputs["attention_mask"]))
        seen.append([layout(value) for value in given])

    monkeypatch.setattr(steps, "prepare", note)
    method, batch = PROBES[probe](family), family.collate(family.rows("ragged"))
    assert method is not None
    with vtc.patch(model, method):
        generate(model, batch, cache_implementation="static", max_new_tokens=12)
    assert len(seen) == 11
    assert any(of_one is not None for of_one in seen[0])
    assert all(found == seen[0] for found in seen)


def layout(value: Any) -> Any:
    if not isinstance(value, Tensor):
        return value
    return value.shape, value.stride(), value.dtype, value.device, value.requires_grad


@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a GPU")
@pytest.mark.parametrize("method", CHOSEN)
def test_cuda_graphs(method: str) -> None:
    """The default of transformers on a GPU."""
    model: Any = build_model().cuda()
    batch = {name: value.cuda() for name, value in collate(samples("ragged", "clip")).items()}
    with vtc.patch(model, EVERY_METHOD[method]()):
        running = generate(model, batch, cache_implementation="static", disable_compile=True)
        config = CompileConfig(mode="reduce-overhead", fullgraph=True)
        out, _ = compiled(model, batch, compile_config=config, max_new_tokens=4 * NEW)
    assert torch.equal(out.sequences[:, : running.sequences.shape[1]], running.sequences)
    assert difference(steps_of(out)[:, :NEW], steps_of(running)) < 1e-3


# ---- the whole model ----------------------------------------------------------------------------
@pytest.mark.parametrize(
    "how", ["torch.compile", pytest.param("model.compile", marks=pytest.mark.slow)]
)
def test_a_model_compiled_as_a_whole(how: str) -> None:
    """Its steps are compiled as those of any other, whatever stands around them."""
    batch = collate(samples("ragged", "clip"))
    model: Any = build_model()
    called = torch.compile(model, backend=counting) if how == "torch.compile" else model
    if called is model:
        model.compile(backend=counting)
    with vtc.patch(called, EVERY_METHOD["fastv"]()):
        out, _ = compiled(called, batch)
    assert off(out, batch, truths("fastv", "clip+llama", "ragged")) < TOLERANCE


# ---- what is refused ----------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("chameleon", "its base model is its decoder"),
        ("blip_2", "its language model is a model of its own"),
        ("mllama", "its cross layers run as they are"),
    ],
)
def test_models_whose_steps_leave_the_graph(name: str, reason: str) -> None:
    family, model = FAMILIES[name], test_families.shared(name, "sdpa")
    batch = family.collate(family.rows("one"))
    with vtc.patch(model, vtc.DivPrune(keep=0.4)) as patch:
        refused(patch, batch, reason)


@pytest.mark.parametrize("name", ["florence2", pytest.param("blip-2", marks=pytest.mark.slow)])
def test_models_with_an_encoder_of_text(name: str) -> None:
    """BLIP-2 with T5 is one."""
    model = test_seq2seq.shared(name, "sdpa")
    batch = test_seq2seq.collate(name, test_seq2seq.rows_of(name, "one"))
    with vtc.patch(model, vtc.DivPrune(keep=0.4)) as patch:
        refused(patch, batch, "decoded from what an encoder leaves")


def refused(patch: Any, batch: dict[str, Tensor], reason: str) -> None:
    """As one graph; else said, and run as it is."""
    model: Any = patch.model
    with pytest.raises(ValueError, match=f"compile_config: .*fullgraph=False.*{reason}"):
        compiled(model, batch)
    assert patch.report.prefills == []
    with pytest.warns(UserWarning, match=f"compile_config: what cannot be compiled.*{reason}"):
        out, _ = compiled(model, batch, compile_config=settings(fullgraph=False))
    running = generate(model, batch, cache_implementation="static")
    assert difference(steps_of(out), steps_of(running)) < ROUNDING


def test_flash_attention(flash: list[str]) -> None:
    model: Any = FAMILIES["llava_onevision"].build()
    model.set_attn_implementation({"text_config": test_serving.FLASH})
    batch = test_serving.batch_of("llava_onevision", "one")
    with (
        vtc.patch(model, vtc.FastV(keep=0.3)),
        pytest.raises(ValueError, match=r"compile_config: .*flash attention builds no masks"),
    ):
        compiled(model, batch)


def test_prompts_in_pieces() -> None:
    """transformers compiles the pieces, too."""
    model, batch = shared_of("clip+llama"), collate(samples("text", "clip"))
    with (
        vtc.patch(model, vtc.FastV(keep=0.3)),
        pytest.raises(ValueError, match=r"compile_config: .*a prompt in pieces runs as it is"),
    ):
        compiled(model, batch, prefill_chunk_size=4)
