# SPDX-License-Identifier: Apache-2.0
"""Which methods the models of each family take, found on models without weights."""

from __future__ import annotations

import re
import warnings
from collections import defaultdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from packaging.version import Version

if TYPE_CHECKING:
    from vtc.models import Adapter

__all__ = ["skeleton", "table"]

_REPAIRS: dict[str, dict[str, Any]] = {
    "chameleon": {"vocabulary_map": {"<image>": 8711}},
    "cohere_compass": {
        "text_config": {
            "rope_parameters": {
                "sliding_attention": {
                    "rope_type": "default",
                    "rope_theta": 50_000.0,
                    "mrope_section": [24, 20, 20],
                },
                "full_attention": None,
            }
        }
    },
    "deepseek_ocr2": {
        "text_config": {"num_hidden_layers": 12, "mlp_layer_types": ["dense"] + ["sparse"] * 11}
    },
    "emu3": {"vocabulary_map": {"<image>": 151851}},
    "granite4_vision": {
        "deepstack_layer_map": [[-19, 9], [-13, 6], [-7, 3], [-1, 0]],
        "spatial_target_layers": [12, 15, 18, 21],
        "downsample_rate": "4/8",
    },
    "hunyuan_vl": {"text_config": {"head_dim": 128}},
    "gemma4": {"vision_config": {}},
    "lfm2_vl": {
        "text_config": {
            "model_type": "lfm2",
            "num_hidden_layers": 16,
            "full_attn_idxs": [2, 5, 8, 10, 12, 14],
        }
    },
    "aya_vision": {
        "vision_config": {"model_type": "siglip_vision_model", "num_attention_heads": 16}
    },
    "nemotron_h_omni": {
        "text_config": {
            "model_type": "nemotron_h",
            "hybrid_override_pattern": "MEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEMEM*EMEMEMEME",
        }
    },
    "perception_lm": {
        "vision_config": {
            "architecture": "vit_pe_core_large_patch14_336",
            "model_args": {
                "embed_dim": 1024,
                "img_size": (448, 448),
                "depth": 23,
                "global_pool": "",
                "use_post_transformer_norm": False,
                "init_values": 0.1,
                "ref_feat_shape": (32, 32),
            },
        }
    },
}
"""Settings without which the default configuration of a type makes no model, or none of the kind
that is published."""


def skeleton(model: str) -> Any:
    """A model on the meta device.

    Args:
        model: an id on the hub, a folder, or a model type, whose default configuration is taken.

    Raises:
        OSError: no such model.
        ValueError: not a vision-language model, or a configuration that makes none.
    """
    import torch
    from transformers import (
        CONFIG_MAPPING,
        AutoConfig,
        AutoModelForCausalLM,
        AutoModelForImageTextToText,
    )

    if model in CONFIG_MAPPING and not Path(model).exists():
        config = AutoConfig.for_model(model, **_REPAIRS.get(model, {}))
    else:
        config = AutoConfig.from_pretrained(Path(model).expanduser() if "~" in model else model)
    with warnings.catch_warnings(), torch.device("meta"):
        warnings.simplefilter("ignore")
        # Phi-4 multimodal is registered as a language model only.
        seen = type(config) in AutoModelForImageTextToText._model_mapping
        return (AutoModelForImageTextToText if seen else AutoModelForCausalLM).from_config(config)


def table() -> str:
    """The methods by families, as Markdown: a table, and the reasons of refusals.

    A family of several model types takes a method if each of them does.
    """
    import vtc
    from vtc.models import families

    names = list(vtc.methods())
    columns: dict[str, dict[str, str]] = {}
    taken = total = 0
    for family in families():
        refused: dict[str, str] = {}
        kinds = [kind for kind in family.model_types if _here(family, kind)]
        if not kinds:
            continue
        for kind in kinds:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                own = vtc.refusals(skeleton(kind))
            taken, total = taken + len(names) - len(own), total + len(names)
            refused |= own
        columns[kinds[0]] = refused
    share = f"{taken} of {total} pairs of a method and a model type ({taken / total:.0%})"
    lines = [f"{share}, with default settings.", ""]
    lines.append("| | " + " | ".join(columns) + " |")
    lines.append("| --- |" + " --- |" * len(columns))
    reasons: dict[str, list[str]] = defaultdict(list)
    for name in names:
        marks = []
        for kind, refused in columns.items():
            marks.append("" if name in refused else "x")
            if name in refused:
                reasons[_reason(refused[name], name)].append(f"{kind}: {name}")
        lines.append(f"| {name} | " + " | ".join(marks) + " |")
    lines += ["", "Not taken, and why:", ""]
    for reason, pairs in sorted(reasons.items()):
        lines.append(f"- {reason}: {_grouped(pairs)}")
    return "\n".join(lines) + "\n"


def _here(family: type[Adapter], kind: str) -> bool:
    """Whether the installed transformers has what vtc needs of a model type."""
    import transformers

    oldest = Version(family.since.get(kind, "0"))
    return kind in transformers.CONFIG_MAPPING and Version(transformers.__version__) >= oldest


def _reason(text: str, name: str) -> str:
    """The reason of a refusal, without the names of model and method."""
    text = re.sub(rf"\b{name}\b(\([^)]*\))?", "the method", text.partition(": ")[2])
    text = re.sub(r"(of )?(the )?\w+ForConditionalGeneration", r"\1the model", text)
    text = re.sub(
        r"the family .* does not support(: [^;]*)?; .*", r"the family does not support\1", text
    )
    return re.sub(r"reads [\w, ]+ of the vision tower", "reads the vision tower", text)


def _grouped(pairs: list[str]) -> str:
    """The pairs of a reason, by model type."""
    by_kind: dict[str, list[str]] = defaultdict(list)
    for pair in pairs:
        kind, _, name = pair.partition(": ")
        by_kind[kind].append(name)
    return "; ".join(f"{kind} ({', '.join(names)})" for kind, names in by_kind.items())
