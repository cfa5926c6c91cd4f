# SPDX-License-Identifier: Apache-2.0
"""What a patched model does at the edges: it is right there too, or says why it will not."""

from __future__ import annotations

import copy
import re
import threading
import time
import warnings
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    AutoModelForImageTextToText,
    Blip2Config,
    Gemma3Config,
    InternVLConfig,
    InternVLForConditionalGeneration,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PaliGemmaConfig,
)
from transformers.cache_utils import DynamicCache, StaticCache

import vtc
from tests.reference.models import (
    build_model,
    collate,
    make_sample,
    pristine_model,
    samples,
    shared_model,
)
from tests.reference.probes import Fixed, Probe, Ragged
from tests.reference.reference import Truth
from vtc.core import LayerState, Method, Selection, VisionTokens
from vtc.runtime.hf import taps
from vtc.runtime.hf.override import Override

TOLERANCE = 1e-4
TODRE = vtc.ToDRE(keep=0.25, tau=2.0)
FASTV = vtc.FastV(keep=0.25)


def logits_of(model: Any, batch: dict[str, Tensor], **more: Any) -> Tensor:
    with torch.no_grad():
        return model(**batch, **more).logits


@dataclass(frozen=True)
class Shown(Probe):
    """Notes the prompt's text that `select` is shown; keeps all."""

    seen: list[int] = field(default_factory=list)
    needs = frozenset({"text"})

    def select(self, tokens: VisionTokens) -> Selection:
        assert tokens.text is not None
        self.seen.append(len(tokens.text))
        return Selection(torch.arange(len(tokens)))


# ---- decoding -----------------------------------------------------------------------------------
@pytest.mark.parametrize("method", [TODRE, FASTV, Ragged()], ids=str)
def test_rows_that_end_early(method: Method) -> None:
    """A row that is done is padded by `generate`; its neighbours go on as if alone."""
    model = shared_model("clip+llama", "sdpa")
    rows = samples("ragged", "clip")
    settings: dict[str, Any] = {"max_new_tokens": 8, "do_sample": False}
    with vtc.patch(model, method):
        batch = collate(rows)
        width = batch["input_ids"].shape[1]
        free = model.generate(**batch, **settings)[:, width:]
        stop = int(free[0, 2])  # row 0 ends here, others where they happen to
        together = model.generate(**batch, **settings, eos_token_id=stop)[:, width:]
        assert (together[0, 3:] == 0).all()
        for i, row in enumerate(rows):
            alone = model.generate(**collate([row]), **settings, eos_token_id=stop)
            alone = alone[0, len(row.input_ids) :]
            assert torch.equal(together[i, : len(alone)], alone)


@pytest.mark.parametrize(("method", "use_cache"), [(FASTV, False), (TODRE, True)], ids=str)
def test_threads_wait_for_one_another(method: Method, use_cache: bool) -> None:
    """Without a cache `generate` remembers its choices; ToDRE reads the tower outside a forward."""
    model = build_model("clip", "llama")
    rows = [make_sample("clip", (2, "image", n), n) for n in (4, 6, 8, 10)]
    settings: dict[str, Any] = {"max_new_tokens": 5, "do_sample": False, "use_cache": use_cache}
    with vtc.patch(model, method):
        alone = [model.generate(**collate([row]), **settings) for row in rows]
        found: dict[int, Tensor] = {}
        failed: list[BaseException] = []

        def ask(i: int) -> None:
            try:
                for _ in range(3):
                    found[i] = model.generate(**collate([rows[i]]), **settings)
                    logits_of(model, collate([rows[i]]))
            except BaseException as error:
                failed.append(error)

        threads = [threading.Thread(target=ask, args=(i,)) for i in range(len(rows))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not failed
    for i, expected in enumerate(alone):
        assert torch.equal(found[i], expected)


def test_labels_of_one_thread_are_not_those_of_another() -> None:
    """They end the prompt, so that a row's loss would follow from its neighbour's labels."""
    model = build_model("clip", "llama")
    batches = []
    for n in (4, 9, 14, 19):
        batch = collate([make_sample("clip", (2, "image", n), n)])
        labels = torch.full_like(batch["input_ids"], -100)
        labels[:, -(n // 2) :] = batch["input_ids"][:, -(n // 2) :]
        batches.append({**batch, "labels": labels})
    with vtc.patch(model, FASTV):
        alone = [float(model(**batch).loss.detach()) for batch in batches]
        found: list[list[float]] = [[] for _ in batches]

        def ask(i: int) -> None:
            for _ in range(15):
                found[i].append(float(model(**batches[i]).loss.detach()))

        threads = [threading.Thread(target=ask, args=(i,)) for i in range(len(batches))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    for expected, losses in zip(alone, found, strict=True):
        assert losses == [expected] * 15


@pytest.mark.parametrize(
    "where", ["vision_tower", "language_model.layers.3", "language_model.norm"]
)
def test_an_interrupted_forward_locks_nobody_out(where: str) -> None:
    """Torch calls no hook when Ctrl-C ends a forward."""
    model = build_model("clip", "llama")
    batch = collate(samples("one", "clip"))

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    with vtc.patch(model, TODRE | vtc.FastV(keep=3)) as patch:
        expected = logits_of(model, batch)
        handle = model.model.get_submodule(where).register_forward_pre_hook(interrupt)
        with pytest.raises(KeyboardInterrupt):
            model.generate(**batch, max_new_tokens=2)
        handle.remove()
        assert patch._bound.forward is None
        found: list[Tensor] = []
        thread = threading.Thread(target=lambda: found.append(logits_of(model, batch)), daemon=True)
        thread.start()
        thread.join(30)
        assert not thread.is_alive()
    assert torch.equal(found[0], expected)


# ---- prompts ------------------------------------------------------------------------------------
@pytest.mark.parametrize("method", [TODRE, vtc.ToDRE(keep=0.25, tau=0.0), FASTV], ids=str)
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_a_prompt_without_text_after_its_image(method: Method, attention: str) -> None:
    row = samples("image_last", "clip")[0]
    truth = Truth(pristine_model("clip+llama"), method, row)
    with vtc.patch(shared_model("clip+llama", attention), method) as patch:
        found = logits_of(patch.model, collate([row]))
    assert (found[0] - truth.logits()[0]).abs().max() < TOLERANCE


@pytest.mark.parametrize("positional", [False, True])
def test_the_prompt_ends_at_the_first_label_after_the_last_image(positional: bool) -> None:
    model = shared_model("clip+llama", "sdpa")
    row = make_sample("clip", (3, "image", 9), 5)
    batch = collate([row])
    image = int((row.input_ids == model.config.image_token_id).nonzero()[-1]) + 1
    on_all = batch["input_ids"].clone()
    answer = torch.full_like(on_all, -100)
    answer[:, -4:] = on_all[:, -4:]
    earlier = answer.clone()
    earlier[:, 1] = on_all[:, 1]  # an answer of an earlier turn
    text = len(row.input_ids) - image
    cases = ((on_all, 0), (answer, text - 4), (earlier, text - 4))
    for labels, expected in cases:
        probe = Shown()
        with vtc.patch(model, probe):
            if positional:
                ids, mask, pixels = (
                    batch["input_ids"],
                    batch["attention_mask"],
                    batch["pixel_values"],
                )
                model(ids, pixels, mask, None, None, None, None, None, labels)
            else:
                model(**batch, labels=labels)
        assert probe.seen == [expected]
    for method in (TODRE, FASTV):
        with vtc.patch(model, method):
            assert torch.isfinite(model(**batch, labels=on_all).loss)


# ---- the model changes under the patch ----------------------------------------------------------
@pytest.mark.parametrize("method", [TODRE, FASTV], ids=str)
@pytest.mark.parametrize(("before", "after"), [("eager", "sdpa"), ("sdpa", "eager")])
def test_another_attention_implementation_after_patching(
    method: Method, before: str, after: str
) -> None:
    batch = collate(samples("images", "clip"))
    model = build_model("clip", "llama", before)
    with vtc.patch(build_model("clip", "llama", after), method) as patch:
        expected = logits_of(patch.model, batch)
    with vtc.patch(model, method):
        model.set_attn_implementation(after)
        found = logits_of(model, batch)
    assert (found - expected).abs().max() < TOLERANCE
    assert model.model.language_model.layers[1].self_attn.config._attn_implementation == after


def test_gradient_checkpointing_with_a_prune_between_layers_is_refused() -> None:
    batch = collate(samples("one", "clip"))
    model = build_model("clip", "llama").train()
    model.gradient_checkpointing_enable()
    labels = batch["input_ids"]
    with vtc.patch(model, FASTV), pytest.raises(RuntimeError, match="gradient_checkpointing"):
        model(**batch, labels=labels)
    with vtc.patch(model, "random"):
        model(**batch, labels=labels).loss.backward()
    assert model.lm_head.weight.grad is not None


def test_disabling_and_then_unpatching_or_patching_anew() -> None:
    batch = collate(samples("one", "clip"))
    model = build_model("clip", "llama")
    plain = logits_of(model, batch)
    patch = vtc.patch(model, FASTV)
    with patch.disable():
        assert torch.equal(logits_of(model, batch), plain)
        vtc.unpatch(model)
    assert torch.equal(logits_of(model, batch), plain)
    patch = vtc.patch(model, FASTV)
    with patch.disable():
        other = vtc.patch(model, "random")
        expected = logits_of(model, batch)
    assert other.active
    assert torch.equal(logits_of(model, batch), expected)
    vtc.unpatch(model)
    assert torch.equal(logits_of(model, batch), plain)


def test_disabling_twice() -> None:
    model = build_model("clip", "llama")
    batch = collate(samples("one", "clip"))
    plain, before = logits_of(model, batch), set(vars(model))
    patch = vtc.patch(model, FASTV)
    compressed = logits_of(model, batch)
    with patch.disable():
        with patch.disable():
            assert torch.equal(logits_of(model, batch), plain)
        assert torch.equal(logits_of(model, batch), plain)
    assert torch.equal(logits_of(model, batch), compressed)
    patch.unpatch()
    assert torch.equal(logits_of(model, batch), plain)
    assert set(vars(model)) == before


@pytest.mark.parametrize("inner_first", [False, True])
def test_a_model_and_its_base_have_one_patch(inner_first: bool) -> None:
    model = build_model("clip", "llama")
    batch = collate(samples("one", "clip"))
    plain = logits_of(model, batch)
    order = [model.model, model] if inner_first else [model, model.model]
    first = vtc.patch(order[0], TODRE)
    second = vtc.patch(order[1], FASTV)
    assert not first.active
    assert second.active
    with vtc.patch(build_model("clip", "llama"), FASTV) as other:
        assert torch.equal(logits_of(model, batch), logits_of(other.model, batch))
    vtc.unpatch(order[0])
    assert not second.active
    assert torch.equal(logits_of(model, batch), plain)


def test_a_removed_patch_is_no_context() -> None:
    model = build_model("clip", "llama")
    with vtc.patch(model, FASTV) as patch:
        pass
    with pytest.raises(RuntimeError, match="not on its model"), patch:
        pass
    with pytest.raises(TypeError, match="NoneType"):
        vtc.unpatch(None)  # type: ignore[arg-type]


def test_what_others_did_to_a_patched_model_stays() -> None:
    model = build_model("clip", "llama")
    batch = collate(samples("one", "clip"))
    settings: dict[str, Any] = {"max_new_tokens": 3, "do_sample": False}
    expected = model.generate(**batch, **settings)
    vtc.patch(model, FASTV)
    del model.generate
    vtc.unpatch(model)
    assert torch.equal(model.generate(**batch, **settings), expected)

    patched = vtc.patch(model, FASTV).model.generate
    calls = []

    def wrapper(**kwargs: Any) -> Any:
        calls.append(1)
        return patched(**kwargs)

    model.generate = wrapper
    vtc.unpatch(model)
    assert model.generate is wrapper
    assert torch.equal(model.generate(**batch, **settings), expected)
    assert calls == [1]


def test_a_part_that_finds_nothing_to_drop_says_so() -> None:
    model = build_model("clip", "llama")
    batch = collate(samples("one", "clip"))
    idle = vtc.ToDRE(keep=0.25, second_stage=False) | vtc.FastV(keep=0.5)
    with vtc.patch(model, idle), pytest.warns(UserWarning, match="fastv dropped nothing"):
        logits_of(model, batch)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with vtc.patch(model, vtc.ToDRE(keep=0.5, second_stage=False) | FASTV):
            logits_of(model, batch)


def test_reading_the_tower_is_the_selectors_time(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build_model("clip", "llama")
    batch = collate(samples("one", "clip"))
    rows = taps.row_attention

    def slow(*args: Any) -> Tensor:
        time.sleep(0.2)
        return rows(*args)

    with vtc.patch(model, "visionzip", keep=0.3) as patch:
        logits_of(model, batch)
        patch.report.reset()
        monkeypatch.setattr(taps, "row_attention", slow)
        logits_of(model, batch)
        assert patch.report.selector_ms > 200
        assert patch.report.vision_ms < 150


def test_a_patch_that_cannot_be_made_leaves_the_old_one() -> None:
    batch = collate(samples("one", "clip"))
    model = build_model("clip", "llama")
    first = vtc.patch(model, "random")
    expected = logits_of(model, batch)
    attention = model.model.language_model.layers[1].self_attn
    del model.model.language_model.layers[1].self_attn
    with pytest.raises(vtc.UnsupportedModelError, match="layer 1"):
        vtc.patch(model, FASTV)
    model.model.language_model.layers[1].self_attn = attention
    assert first.active
    assert torch.equal(logits_of(model, batch), expected)


def test_a_failed_forward_leaves_nothing_behind() -> None:
    batch = collate(samples("one", "clip"))
    model = build_model("clip", "llama")
    with vtc.patch(model, FASTV) as patch:
        expected = logits_of(model, batch)
        handle = model.lm_head.register_forward_pre_hook(lambda *_: None)
        blow = model.model.language_model.layers[5].register_forward_pre_hook(_raise)
        with pytest.raises(ZeroDivisionError):
            model(**batch)
        blow.remove()
        handle.remove()
        engine = patch._bound
        assert engine.forward is None
        (layers,) = engine.runners
        taps = layers.reader.taps.values()
        assert taps
        assert all(not tap.captured and tap.armed is None for tap in taps)
        done = threading.Thread(target=lambda: logits_of(model, batch))
        done.start()
        done.join(30)
        assert not done.is_alive()  # the lock was given back
        assert torch.equal(logits_of(model, batch), expected)


def _raise(*_: Any) -> None:
    raise ZeroDivisionError


# ---- caches -------------------------------------------------------------------------------------
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_a_compressed_cache_knows_its_patch(attention: str) -> None:
    model = build_model("clip", "llama", attention)
    batch = collate(samples("one", "clip"))
    word = torch.tensor([[9]])
    with vtc.patch(model, FASTV), torch.no_grad():
        cache = model(**batch, use_cache=True).past_key_values
        kept = copy.deepcopy(cache)
        model(input_ids=word, past_key_values=cache)
    with vtc.patch(model, "random"), pytest.raises(ValueError, match="past_key_values"):
        model(input_ids=word, past_key_values=copy.deepcopy(kept))
    with pytest.raises(RuntimeError, match="not patched"):
        model(input_ids=word, past_key_values=copy.deepcopy(kept))
    with pytest.raises(ValueError, match="tokens_to_remove"):
        kept.crop(-8)  # seven words follow the image


@pytest.mark.parametrize("method", [TODRE, FASTV], ids=str)
def test_a_compressed_static_cache_knows_its_patch(method: Method) -> None:
    model = build_model("clip", "llama")
    batch = collate(samples("one", "clip"))
    cache = StaticCache(config=model.config.text_config, max_cache_len=96)
    with vtc.patch(model, method):
        out = model.generate(
            **batch, past_key_values=cache, max_new_tokens=3, do_sample=False, use_cache=True
        )
    longer = torch.cat([out, out[:, -2:]], dim=1)
    with pytest.raises(RuntimeError, match="not patched"):
        model.generate(input_ids=longer, past_key_values=cache, max_new_tokens=3)


def test_a_plain_cache_goes_on_under_a_patch() -> None:
    model = build_model("clip", "llama")
    batch = collate(samples("one", "clip"))
    words = torch.tensor([[9, 11]])
    with torch.no_grad():
        cache = DynamicCache(config=model.config)
        model(**batch, past_key_values=cache)
        expected = model(input_ids=words, past_key_values=copy.deepcopy(cache)).logits
        with vtc.patch(model, FASTV):
            found = model(input_ids=words, past_key_values=cache).logits
    assert torch.equal(found, expected)


def test_unequal_rows_on_a_windowed_cache_are_refused() -> None:
    model = build_model("clip", "mistral_window")
    batch = collate(samples("ragged", "clip"))
    again = collate([make_sample("clip", ("image", n), n) for n in (3, 4, 6)])
    with vtc.patch(model, Ragged()), torch.no_grad():
        cache = model(**batch, use_cache=True).past_key_values
        again["attention_mask"] = torch.cat(
            [batch["attention_mask"], again["attention_mask"]], dim=1
        )
        with pytest.raises(ValueError, match="sliding window"):
            model(**again, past_key_values=cache)


# ---- methods that break the contract ------------------------------------------------------------
@dataclass(frozen=True)
class NoLayers(Probe):
    """A prune that is never called."""

    def prune(self, state: LayerState) -> Selection | None:
        return None


@dataclass(frozen=True)
class NoPrune(Probe):
    """Layers to prune before, and nothing that prunes."""

    def select(self, tokens: VisionTokens) -> Selection:
        return Selection(torch.arange(len(tokens)))

    def prune_layers(self, num_layers: int) -> tuple[int, ...]:
        return (2,)


@dataclass(frozen=True)
class Strange(Fixed):
    """Reads what there is not, as `what` says."""

    what: str = ""
    layer: int | None = 2

    @property
    def needs(self) -> frozenset[str]:  # type: ignore[override]
        return frozenset({"cls"} if self.what == "needs" else ())

    def taps(self, num_layers: int) -> Any:
        return {"rows": {1: "all"}, "late": {2: "last"}}.get(self.what, {})


class NoDataclass(Probe):
    def select(self, tokens: VisionTokens) -> Selection:
        return Selection(torch.arange(len(tokens)))


@pytest.mark.parametrize(
    ("method", "error", "says"),
    [
        (Probe(), TypeError, "dataclass"),
        (NoDataclass(), TypeError, "dataclass"),
        (NoLayers(), ValueError, "before no layer"),
        (NoPrune(), ValueError, "no prune"),
        (Strange(what="needs"), ValueError, "unknown signal 'cls'"),
        (Strange(what="rows"), ValueError, "unknown rows 'all'"),
        (Strange(what="late"), ValueError, "accepted are 0 to 1"),
        (vtc.ToDRE, TypeError, r"give ToDRE\(...\)"),
        ({"method": "compose"}, TypeError, "composition"),
        ({}, ValueError, "under 'method'"),
    ],
)
def test_methods_that_cannot_act_are_refused(
    method: Any, error: type[Exception], says: str
) -> None:
    model = shared_model("clip+llama", "sdpa")
    with pytest.raises(error, match=says):
        vtc.patch(model, method)
    assert "_vtc_patch" not in vars(model.model)


def test_settings_are_never_dropped() -> None:
    composed = (vtc.Random(keep=0.5) | FASTV).to_dict()
    with pytest.raises(TypeError, match="keep"):
        vtc.make(composed, keep=0.1)
    assert vtc.make("todre|fastv:layer=3", keep=0.2) == vtc.ToDRE(keep=0.2) | vtc.FastV(layer=3)
    with pytest.raises(TypeError, match="settings"):
        vtc.make("todre|fastv", tau=0.2)


# ---- other models -------------------------------------------------------------------------------
class OtherConfig(LlavaConfig):
    model_type = "a_llava_nobody_knows"


@pytest.mark.parametrize("method", [TODRE, FASTV, Ragged()], ids=str)
def test_an_unknown_family_of_the_common_shape(method: Method) -> None:
    """Right, with a warning that says what was assumed."""
    known = build_model("clip", "llama")
    config = OtherConfig(**{k: v for k, v in known.config.to_dict().items() if k != "model_type"})
    model = LlavaForConditionalGeneration._from_config(config, attn_implementation="sdpa").eval()
    model.load_state_dict(known.state_dict())
    batch = collate(samples("images", "clip"))
    with vtc.patch(known, method):
        expected = logits_of(known, batch)
    with pytest.warns(UserWarning, match="Assumed"):
        patch = vtc.patch(model, method)
    assert torch.equal(logits_of(model, batch), expected)
    patch.unpatch()
    assert (logits_of(model, batch) - expected).abs().max() > 1e-2


VISION = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 56,
    "patch_size": 14,
}
TEXT = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
}
FOREIGN = {
    "takes token_type_ids": [
        lambda: PaliGemmaConfig(
            vision_config={**VISION, "model_type": "siglip_vision_model"},
            text_config={**TEXT, "model_type": "gemma"},
        ),
    ],
    "one rotary embedding": [
        lambda: Gemma3Config(vision_config=VISION, text_config=TEXT, mm_tokens_per_image=4),
        lambda: LlavaConfig(
            vision_config={**VISION, "model_type": "clip_vision_model"},
            text_config={**TEXT, "model_type": "gemma3_text"},
        ),
    ],
    "generate of its own": [
        lambda: Blip2Config(
            vision_config=VISION,
            qformer_config={
                "vocab_size": 32,
                "hidden_size": 32,
                "num_hidden_layers": 2,
                "num_attention_heads": 4,
                "intermediate_size": 48,
                "encoder_hidden_size": 32,
            },
            text_config={
                "model_type": "opt",
                "vocab_size": 64,
                "hidden_size": 32,
                "ffn_dim": 48,
                "num_hidden_layers": 2,
                "num_attention_heads": 4,
                "word_embed_proj_dim": 32,
            },
        )
    ],
}


@pytest.mark.parametrize(
    ("says", "config"), [(says, config) for says, made in FOREIGN.items() for config in made]
)
def test_shapes_that_need_a_family_are_refused_before_anything_changed(
    says: str, config: Any
) -> None:
    model = AutoModelForImageTextToText.from_config(config())
    model.config.model_type = "unknown"  # a family of its own knows what to do
    with pytest.raises(vtc.UnsupportedModelError, match=says) as caught:
        vtc.patch(model, FASTV)
    assert "Supported are apertus1p5, aria, aya_vision" in str(caught.value)
    assert not any(isinstance(v, Override) for m in model.modules() for v in vars(m).values())


def test_an_unknown_family_that_hands_on_one_tensor_of_features() -> None:
    """Its features come as one tensor, LLaVA's as a list."""
    torch.manual_seed(0)
    config = InternVLConfig(
        vision_config={
            "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
            "num_attention_heads": 4, "image_size": [56, 56], "patch_size": [7, 7],
        },
        text_config={
            "model_type": "qwen2", "hidden_size": 48, "intermediate_size": 96,
            "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2,
            "vocab_size": 99, "initializer_range": 0.3,
        },
        image_token_id=98,
    )  # fmt: skip
    model = InternVLForConditionalGeneration._from_config(config).eval()
    model.config.model_type = "unknown"
    ids = torch.tensor([[1, 2, *[98] * 16, 3, 4, 5], [1, *[98] * 16, 6, 7, 8, 9]])
    batch = {"input_ids": ids, "pixel_values": torch.randn(2, 3, 56, 56)}
    probe = Fixed(stride=3)
    with pytest.warns(UserWarning, match="Assumed"):
        patch = vtc.patch(model, probe)
    found = logits_of(model, batch)
    settings: dict[str, Any] = {"max_new_tokens": 1, "do_sample": False, "pad_token_id": 0}
    beams = model.generate(**batch, num_beams=2, **settings)
    patch.unpatch()
    # The same, by masking: every third token of each image is seen.
    seen = torch.ones_like(ids)
    for row, places in enumerate(ids == 98):
        vision = places.nonzero()[:, 0]
        seen[row, vision] = 0
        seen[row, vision[::3]] = 1
    positions = torch.arange(ids.shape[1])[None].expand_as(ids)
    expected = logits_of(model, batch, attention_mask=seen, position_ids=positions)
    plain = logits_of(model, batch)
    assert (found[:, -3:] - expected[:, -3:]).abs().max() < TOLERANCE
    assert (plain[:, -3:] - expected[:, -3:]).abs().max() > 1e-2
    assert torch.equal(beams[:, -1], expected[:, -1].argmax(-1))


# ---- figures ------------------------------------------------------------------------------------
def test_the_report_knows_precision_and_fewer_pixels() -> None:
    model = build_model("clip", "llama")
    batch = collate(samples("one", "clip"))
    found = {}
    for how in ("grid", "pixels"):
        with vtc.patch(model, vtc.Downsample(keep=9, how=how)) as patch:
            logits_of(model, batch)
            found[how] = patch.report
    assert found["pixels"].tokens_out == found["grid"].tokens_out == 9
    assert found["pixels"].flops["vision"] < 0.5 * found["grid"].flops["vision"]
    assert found["pixels"].flops["projector"] == found["grid"].flops["projector"] * 9 / 36
    assert found["pixels"].flops["lm"] == found["grid"].flops["lm"]
    exact = found["grid"].kv_bytes
    halved = build_model("clip", "llama").bfloat16()
    batch["pixel_values"] = batch["pixel_values"].bfloat16()
    with vtc.patch(halved, vtc.Downsample(keep=9)) as patch:
        logits_of(halved, batch)
    assert patch.report.kv_bytes == exact / 2
    text = str(patch.report)
    assert text.startswith("1 image in 1 prefill\n") or len(patch.report.images) != 1
    parts = r"a sample: vision [\d.]+, projector [\d.]+, language model [\d.]+ GFLOPs; [\d.]+ MiB"
    assert re.search(parts, text)
    for figure in ("36 before", "9.0 from layer 0", "GFLOPs", "keys and values", "selector"):
        assert figure in text
