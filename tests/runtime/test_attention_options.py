# SPDX-License-Identifier: Apache-2.0
"""The attention rows that vtc computes are the model's own, whatever its attention does beside
products and softmax: sinks, soft caps, scales, norms of queries and keys, biases, windows."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor, nn

import vtc
from tests.reference.families import FAMILIES, LAYERS, TinyFamily, text_settings
from tests.reference.families_more import InternVL
from tests.reference.masked import Masked
from tests.reference.probes import Probe
from tests.runtime.test_exactness import CONTROL, TOLERANCE, difference
from tests.runtime.test_families import REFUSED, Steps
from vtc.core import LayerState, Method, Rows, Selection
from vtc.core.prefill import Stopwatch
from vtc.models import families, find
from vtc.runtime.hf import taps

WINDOWS = ["sliding_attention", "full_attention"] * (LAYERS // 2)
DECODERS: dict[str, Callable[[], Any]] = {
    "sinks": lambda: hf.GptOssConfig(
        **text_settings(head_dim=8, sliding_window=12, layer_types=WINDOWS),
        num_local_experts=4,
        num_experts_per_tok=2,
    ),
    "softcap": lambda: hf.Gemma2Config(
        **text_settings(head_dim=8, sliding_window=12, layer_types=WINDOWS),
        attn_logit_softcapping=1.5,
        query_pre_attn_scalar=20,
    ),
    "scaling": lambda: hf.GraniteConfig(**text_settings(), attention_multiplier=0.7),
    "norms": lambda: hf.Qwen3Config(**text_settings(head_dim=8)),
    "norms of all heads": lambda: hf.Olmo2Config(**text_settings()),
    "biases": lambda: hf.Qwen2Config(**text_settings()),
    "fused": lambda: hf.Phi3Config(**text_settings()),
    "one key head": lambda: hf.GemmaConfig(**text_settings(num_key_value_heads=1, head_dim=8)),
    "no positions": lambda: hf.SmolLM3Config(**text_settings(), no_rope_layers=[1, 0] * 3),
    "parallel": lambda: hf.Cohere2Config(
        **text_settings(head_dim=8, sliding_window=12, layer_types=WINDOWS)
    ),
}


class _Other(InternVL):
    """InternVL with another decoder."""

    attentions = ("eager",)

    def __init__(self, option: str) -> None:
        self.name, self.option = f"internvl with {option}", option

    def config(self) -> Any:
        found = super().config()
        found.text_config = DECODERS[self.option]()
        return found


MADE: dict[str, TinyFamily] = {
    **{name: family for name, family in FAMILIES.items() if family.model_type not in REFUSED},
    **{f"internvl with {option}": _Other(option) for option in DECODERS},
}


def _recorded(monkeypatch: pytest.MonkeyPatch) -> dict[int, list[Tensor]]:
    """The weights that each tapped module's own eager attention returns, by module."""
    found: dict[int, list[Tensor]] = {}
    default = taps._default_attention

    def recording(module: nn.Module) -> Callable[..., Any]:
        attend = default(module)

        def run(*args: Any, **kwargs: Any) -> Any:
            output, weights = attend(*args, **kwargs)
            found.setdefault(id(module), []).append(weights.detach())
            return output, weights

        return run

    monkeypatch.setattr(taps, "_default_attention", recording)
    return found


@pytest.mark.parametrize("name", MADE)
def test_rows_of_decoders(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """All rows of all layers, head by head, in a padded batch."""
    family, own = MADE[name], _recorded(monkeypatch)
    model = family.build("eager")
    adapter = find(model)
    batch = family.collate(family.rows("ragged"))
    valid = batch["attention_mask"].bool()
    places = torch.arange(valid.shape[1]).expand_as(valid)
    modules = [adapter.attention_of(layer) for layer in range(len(adapter.layers))]
    tapped = [taps.install(m) for m in modules if m is not None and hasattr(m, "config")]
    for tap in tapped:
        assert not taps.foreign_options(tap.module)
        taps.listen_rows(tap, places, valid, 0, Stopwatch(), by_head=True)
    with torch.no_grad():
        model(**batch)
    assert tapped
    for tap in tapped:
        (rows,), (weights,) = tap.captured, own[id(tap.module)]
        seen = valid[:, None, :, None].expand_as(weights)
        torch.testing.assert_close(rows[seen], weights.float()[seen], rtol=1e-4, atol=1e-6)
        tap.remove()
    if "sinks" in name:
        assert all((own[id(tap.module)][0].sum(-1) < 0.999).any() for tap in tapped)


def _towers() -> list[str]:
    """Those that attend through transformers, to all patches; tests/runtime/test_tower_signals.py
    has all, and tests/runtime/test_phi4.py the tower that may be causal."""
    own = ("perception_lm", "got_ocr2", "pp_chart2table", "fast_vlm")
    own += ("phi4_multimodal", "phi4_multimodal_odd")
    towers = [name for name in MADE if " with " not in name and name not in own]
    return [name for name in towers if not find_quietly(name).unread]


def find_quietly(name: str) -> Any:
    return next(cls for cls in families() if MADE[name].model_type in cls.model_types)


@pytest.mark.parametrize("name", _towers())
def test_attention_of_towers(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """[CLS]'s row, or what each patch receives of those that see it, mean over the heads."""
    family, own = MADE[name], _recorded(monkeypatch)
    model = family.build("eager")
    adapter = find(model)
    tapped = [taps.install(module) for module in adapter.tower_attention()]
    cls = adapter.cls_place()
    for tap in tapped:
        assert not taps.foreign_options(tap.module)
        taps.listen_tower(tap, cls, Stopwatch())
    with torch.no_grad():
        model(**family.collate(family.rows("one")))
    for tap in tapped:
        weights = [row for of_call in own[id(tap.module)] for row in of_call.float().mean(1)]
        assert len(tap.captured) == len(weights) > 0
        for heard, of_row in zip(tap.captured, weights, strict=True):
            if cls is not None:
                expected = of_row[cls]
            else:
                sees = of_row > 1e-12
                expected = of_row.sum(0) / sees.sum(0)
            torch.testing.assert_close(heard.attention, expected, rtol=1e-4, atol=1e-6)
        tap.remove()


# ---- the whole way ------------------------------------------------------------------------------
@pytest.mark.parametrize("method", [Steps(), vtc.FastV(keep=0.3, layer=2)], ids=["steps", "fastv"])
@pytest.mark.parametrize("option", DECODERS)
def test_removal_is_masking_with_every_option(option: str, method: Method) -> None:
    """What the reference chooses by the model's own weights is what is chosen."""
    family = _Other(option)
    if option == "norms of all heads" and isinstance(method, Steps):
        method = Steps(plain=True)  # it has no norm before attention, and is not looked ahead at
    model, rows = family.build("eager"), family.rows("ragged")
    truths = [Masked(family, model, method, row).logits()[0] for row in rows]
    plain = [Masked(family, model, None, row).logits()[0] for row in rows]
    batch = family.collate(rows)
    with torch.no_grad(), vtc.patch(model, method):
        logits = model(**batch).logits
    for i, truth in enumerate(truths):
        assert difference(logits[i, batch["attention_mask"][i].bool()], truth) < TOLERANCE
    assert max(difference(p[-1], t[-1]) for p, t in zip(plain, truths, strict=True)) > CONTROL


# ---- what is not followed -----------------------------------------------------------------------
@dataclass(frozen=True)
class _Reads(Probe):
    def prune_layers(self, num_layers: int) -> tuple[int, ...]:
        return (2,)

    def taps(self, num_layers: int) -> dict[int, Rows]:
        return {1: "last"}

    def prune(self, state: LayerState) -> Selection | None:
        return None


def test_an_option_that_is_not_known_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """As sparse attention, whose function is told which keys to look at."""

    def eager(
        module: Any, query: Any, key: Any, value: Any, attention_mask: Any, indices: Any
    ) -> Any:
        raise AssertionError("not called")

    model = FAMILIES["internvl"].build("eager")
    adapter = find(model)
    attention = adapter.attention_of(0)
    tower: Any = adapter.tower_attention()[0]
    monkeypatch.setattr(f"{type(attention).__module__}.eager_attention_forward", eager)
    with pytest.raises(vtc.UnsupportedModelError, match=r"Qwen2Attention attends with indices"):
        vtc.patch(model, _Reads())
    vtc.unpatch(vtc.patch(model, vtc.DivPrune(keep=0.5)).model)
    monkeypatch.setattr(f"{type(tower).__module__}.eager_attention_forward", eager)
    with pytest.raises(vtc.UnsupportedModelError, match=r"VisionAttention attends with indices"):
        vtc.patch(model, vtc.ToDRE(keep=4, second_stage=False))


@pytest.mark.parametrize(
    ("name", "method"),
    [
        ("llama4_short", vtc.PyramidDrop()),
        ("aya_vision", vtc.DART(layer=3, keep=6, image_pivots=2, text_pivots=1)),
        ("cohere2_vision", vtc.DART(layer=3, keep=6, image_pivots=2, text_pivots=1)),
    ],
    ids=["chunks", "no positions", "no positions either"],
)
@pytest.mark.parametrize("seed", range(4))
def test_padding_before_a_row_changes_no_choice(name: str, method: Method, seed: int) -> None:
    """Chunks are counted from a row's first token, and a layer that turns no keys has none to turn
    back."""
    family = FAMILIES[name]
    model, rows = family.build("sdpa", seed=seed), family.rows("ragged")
    with vtc.patch(model, method), torch.no_grad():
        together = model(**family.collate(rows)).logits
        for i, row in enumerate(rows):
            alone = model(**family.collate([row])).logits[0]
            assert difference(together[i, -len(alone) :], alone) < TOLERANCE
