# SPDX-License-Identifier: Apache-2.0
"""Every image-text-to-text model of transformers is supported, accepted with a warning, or refused
with a reason: `vtc.patch` raises nothing else. MODELS.md has the table.

Models that are in no matrix are built from their default configs on the meta device, where they
have modules but no weights: `vtc.patch` reads modules only.
"""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
import transformers
from packaging.version import Version
from transformers import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

import vtc
from tests.reference.families import FAMILIES
from vtc.models import families
from vtc.models.others import ACCEPTED, OTHERS, WRITTEN_FOR

CLASSES: dict[str, Any] = dict(MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES)
SUPPORTED = {kind for cls in families() for kind in cls.model_types}
TINY = {family.model_type: name for name, family in FAMILIES.items()}
SAME = Version(transformers.__version__).release[:2] == Version(WRITTEN_FOR).release[:2]

LACKING: dict[str, dict[str, Any]] = {
    "chameleon": {"": {"vocabulary_map": {"<image>": 4}}},
    "diffusion_gemma": {
        "text_config": {"num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 64}
    },
    "emu3": {"": {"vocabulary_map": {"<image>": 4, "<|extra_200|>": 5}}},
    # As released: only its first layers have full attention.
    "minimax_m3_vl": {
        "text_config": {"layer_types": ["full_attention"] * 3 + ["minimax_m3_sparse"] * 57}
    },
    "qwen4_exp": {
        "text_config": {
            "indexer_budget": 64,
            "indexer_compress_ratio": 4,
            "indexer_n_heads": 2,
            "indexer_kv_heads": 1,
            "indexer_head_dim": 16,
        }
    },
}
"""What default configs lack, by config; "" is the model's own."""


def built(kind: str) -> Any:
    """A model of the type; skips the test with the reason if there is none."""
    if kind in TINY:
        family = FAMILIES[TINY[kind]]
        return family.build(family.attentions[-1])
    try:
        config = CONFIG_MAPPING[kind]()
        for name, settings in LACKING.get(kind, {}).items():
            for setting, value in settings.items():
                setattr(getattr(config, name) if name else config, setting, value)
        with torch.device("meta"):
            return getattr(transformers, CLASSES[kind])(config)
    except (AttributeError, ImportError, KeyError, TypeError, ValueError) as error:
        pytest.skip(f"its default config makes no model: {error}")


def outcome(kind: str) -> str:
    """ "accepted", or why it is refused."""
    model = built(kind)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            vtc.patch(model, "divprune").unpatch()
    except vtc.UnsupportedModelError as error:
        return str(error).removeprefix("model: ").partition(". Supported are ")[0]
    return ACCEPTED


@pytest.mark.parametrize("kind", sorted(CLASSES))
def test_a_type_is_taken_or_refused(kind: str) -> None:
    found = outcome(kind)
    if kind in SUPPORTED:
        assert found == ACCEPTED or not SAME
        assert kind not in OTHERS
    elif SAME:
        assert OTHERS[kind] == found
