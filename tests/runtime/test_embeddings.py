# SPDX-License-Identifier: Apache-2.0
"""`inputs_embeds` beside `pixel_values`: images are found where embeddings are a placeholder's."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import vtc
from tests.reference.families import FAMILIES
from tests.reference.models import build_model, collate, samples
from tests.runtime.test_families import REFUSED, rows_of, shared
from vtc.core import Method

NAMES = [name for name, family in FAMILIES.items() if family.model_type not in REFUSED]
METHODS: list[Method] = [vtc.DivPrune(keep=0.4), vtc.FastV(keep=0.4, layer=2)]


def _compare(model: Any, batch: dict[str, Any], methods: list[Method]) -> None:
    """Embeddings give what ids give, plain and patched, or fail in the plain model as well."""
    given = {**batch, "inputs_embeds": model.get_input_embeddings()(batch["input_ids"])}
    del given["input_ids"]
    with torch.no_grad():
        try:
            plain = model(**given).logits
        except Exception as error:
            pytest.skip(f"transformers itself: {type(error).__name__}: {error}")
        if not torch.equal(plain, model(**batch).logits):
            pytest.skip("transformers itself gives other logits")
        for method in methods:
            with vtc.patch(model, method):
                expected = model(**batch).logits
                assert torch.equal(model(**given).logits, expected)
                assert not torch.equal(expected, plain)


@pytest.mark.parametrize("name", NAMES)
def test_embeddings_beside_pixels(name: str) -> None:
    family = FAMILIES[name]
    model = shared(name, family.attentions[-1])
    sequence_only = (
        name.startswith(("gemma3n", "qwen3_5", "lfm2_vl", "minicpm")) or "device" in name
    )
    methods = METHODS[:1] if sequence_only else METHODS
    _compare(model, family.collate(rows_of(name, "ragged")), methods)


def test_embeddings_beside_pixels_of_llava() -> None:
    _compare(build_model("clip", "llama"), collate(samples("ragged", "clip")), METHODS)
