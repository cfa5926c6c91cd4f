# SPDX-License-Identifier: Apache-2.0
"""What the matrix does not show of the families of `tests.reference.families_recent`."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers

import vtc
from tests.reference.families import FAMILIES
from tests.reference.masked import Masked
from tests.reference.probes import Ragged
from tests.runtime.test_exactness import CONTROL, TOLERANCE, difference
from tests.runtime.test_families import rows_of, shared

NAMES = (
    *("hunyuan_vl", "granite4_vision", "granite_docling", "cohere_compass", "molmo2", "step3p7"),
    *("cosmos3_edge", "gemma4_unified", "shieldgemma2", "deepseek_ocr2", "mistral3_mistral4"),
)
KEEP_ALL = [vtc.Full(), vtc.Random(keep=1.0), vtc.FastV(keep=1.0, layer=2)]


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("name", [name for name in NAMES if name in FAMILIES])
def test_keeping_all_keeps_all(name: str) -> None:
    """Bitwise the plain model, where features are added between layers as well."""
    family = FAMILIES[name]
    model, batch = shared(name, "sdpa"), family.collate(rows_of(name, "ragged"))
    with torch.no_grad():
        plain = model(**batch).logits
        for method in KEEP_ALL:
            with vtc.patch(model, method):
                assert torch.equal(model(**batch).logits, plain)


@pytest.mark.skipif("granite4_vision" not in FAMILIES, reason="this transformers is too old for it")
def test_features_between_layers_come_to_the_tokens_that_are_left() -> None:
    """Each of those that Granite adds counts, before and after tokens are dropped between layers,
    and the model's own function gets them back with the patch off."""
    family, method = FAMILIES["granite4_vision"], vtc.FastV(keep=0.4, layer=3)
    model: Any = family.build("sdpa")
    batch = family.collate(rows_of("granite4_vision", "ragged"))
    given: list[Any] = []

    def without(gone: int) -> Any:
        def change(module: Any, args: Any, kwargs: Any) -> Any:
            given.append(sorted(kwargs["deepstack_features"]))
            features = dict(kwargs["deepstack_features"])
            features[gone] = torch.zeros_like(features[gone])
            return args, {**kwargs, "deepstack_features": features}

        # Before the engine's hook, which takes them.
        return model.model.language_model.register_forward_pre_hook(
            change, with_kwargs=True, prepend=True
        )

    with torch.no_grad(), vtc.patch(model, method):
        whole = model(**batch).logits[:, -1]
        for layer in (0, 1, 2, 3, 5):
            handle = without(layer)
            try:
                assert difference(model(**batch).logits[:, -1], whole) > CONTROL
            finally:
                handle.remove()
    assert given == [[0, 1, 2, 3, 5]] * 5


@pytest.mark.skipif("shieldgemma2" not in FAMILIES, reason="this transformers is too old for it")
def test_a_classifier_around_the_model_is_compressed() -> None:
    family, rows = FAMILIES["shieldgemma2"], rows_of("shieldgemma2", "ragged")
    inner: Any = family.build("sdpa")
    model = transformers.ShieldGemma2ForImageClassification(inner.config).eval()
    model.model = inner
    plain, words, worst, away = family.build("eager"), [30, 31], 0.0, 0.0
    for row in rows:
        batch = family.collate([row])
        with torch.no_grad():
            before = model(**batch).logits[0]
            with vtc.patch(model, Ragged()) as patch:
                found = model(**batch).logits[0]
            assert patch.report.tokens_out < patch.report.tokens_in
            assert torch.equal(model(**batch).logits[0], before)
        truth = Masked(family, plain, Ragged(), row).logits()[0, -1, words]
        worst, away = max(worst, difference(found, truth)), max(away, difference(before, truth))
    assert worst < TOLERANCE
    assert away > CONTROL


@pytest.mark.skipif("mistral3_mistral4" not in FAMILIES, reason="this transformers is too old")
def test_flash_attention_that_reads_positions_is_refused() -> None:
    model: Any = FAMILIES["mistral3_mistral4"].build("sdpa")
    model.model.language_model.config._attn_implementation = "flash_attention_2"
    with pytest.raises(vtc.UnsupportedModelError, match="scales queries by position"):
        vtc.patch(model, "divprune")
