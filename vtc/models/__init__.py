# SPDX-License-Identifier: Apache-2.0
"""One file per family that needs code; `find` picks the family of a model."""

from __future__ import annotations

import sys
import warnings
from dataclasses import dataclass
from types import ModuleType

import transformers
from packaging.version import Version
from torch import nn

from vtc.models.base import CACHE, Backbone, Family, ImageMap, Modality, UnsupportedModelError
from vtc.models.gemma import Gemma3, Gemma3n, Gemma4, PaliGemma
from vtc.models.llava import (
    Convolutional,
    DeepseekVL,
    KimiK25,
    Llava,
    Ovis2,
    PerceptionLM,
    VideoLlava,
    VipLlava,
)
from vtc.models.mllama import Mllama
from vtc.models.qwen import Qwen3_5, QwenVL
from vtc.models.shuffle import CohereVision, Idefics2, Idefics3, InternVL, Llama4, Mistral3, SmolVLM
from vtc.models.tiles import LlavaNext, LlavaOnevision

FAMILIES: tuple[Family, ...] = (
    Llava(),
    VipLlava(),
    LlavaNext(),
    LlavaOnevision(),
    VideoLlava(),
    InternVL(),
    QwenVL(),
    Qwen3_5(),
    Idefics2(),
    Idefics3(),
    SmolVLM(),
    PaliGemma(),
    Gemma3(),
    Gemma3n(),
    Gemma4(),
    Mistral3(),
    CohereVision(),
    DeepseekVL(),
    Ovis2(),
    Llama4(),
    Convolutional(),
    PerceptionLM(),
    KimiK25(),
    Mllama(),
)
GENERIC = Family()


@dataclass(frozen=True)
class FamilyInfo:
    """What `vtc.models()` tells of a family.

    Attributes:
        name: of the family.
        model_types: the `config.model_type` of its models; none for the generic family.
        stages: where methods can act.
        video: "clips", "frames" (each an image of its own) or "none".
        positions: "one axis", on which gaps can close, "places in the picture" (m-RoPE), or "none".
        attention: how the tokens of an image see one another.
        tower: what methods can read of the vision tower: "attention, keys", with "patch states"
            where the projector makes one token of each, or "nothing".
        tested: whether it is held to the reference; else it works with a warning.
        about: what is particular to it.
    """

    name: str
    model_types: tuple[str, ...]
    stages: tuple[str, ...]
    video: str
    positions: str
    attention: str
    tower: str
    tested: bool
    about: str


def _readable(family: Family) -> str:
    if not family.tower:
        return "nothing"
    known = type(family).projector is not Family.projector or not family.axial
    known = known and family.projects_patches and not isinstance(family, DeepseekVL)
    return "attention, keys" + ", patch states" * known


def models() -> list[FamilyInfo]:
    """The supported families; "generic" stands for any other model of the common shape."""
    return [
        FamilyInfo(
            name=f.name,
            model_types=f.model_types,
            stages=f.stages,
            video="clips" if f.video else "frames" if f.frames else "none",
            positions=f.positions,
            attention=f.attention,
            tower=_readable(f),
            tested=bool(f.model_types),
            about=" ".join((type(f).__doc__ or "").split("\n\n")[0].split()),
        )
        for f in (*FAMILIES, GENERIC)
    ]


def find(model: nn.Module) -> tuple[Family, Backbone]:
    """The family of `model` and where its parts are.

    Warns:
        UserWarning: the family is unknown but has the common shape; says what was assumed.

    Raises:
        UnsupportedModelError: not a VLM, or of a shape that vtc does not cover.
    """
    supported = ", ".join(kind for f in FAMILIES for kind in f.model_types)
    config = getattr(model, "config", None)
    if not isinstance(model, nn.Module) or config is None:
        raise UnsupportedModelError(
            f"model: expected a vision-language model of transformers, got {type(model).__name__}; "
            f"supported are {supported}, and others of the same shape"
        )
    kind = getattr(config, "model_type", None)
    if not hasattr(config, "vision_config") and not hasattr(model, "get_image_features"):
        raise UnsupportedModelError(
            f"model: {type(model).__name__} ({kind}) has no vision; supported are {supported}, and "
            "other vision-language models of the same shape"
        )
    family = next((f for f in FAMILIES if kind in f.model_types), GENERIC)
    needed = family.since.get(str(kind))
    if needed is not None and Version(transformers.__version__) < Version(needed):
        raise UnsupportedModelError(
            f"model: the {type(model).__name__} of transformers {transformers.__version__} lacks "
            f"what vtc hooks; it needs transformers {needed} or newer"
        )
    try:
        backbone = family.backbone(model)
        family.check(backbone)
    except UnsupportedModelError as error:
        raise UnsupportedModelError(f"{error}. Supported are {supported}") from None
    if family is GENERIC:
        warnings.warn(
            f"{type(model).__name__} ({kind}) is not a family that vtc is tested on. Assumed: "
            "vision features replace placeholder tokens one by one, a square grid of patches an "
            "image, causal attention and one-dimensional rotary positions. Compare its outputs "
            "with a run in which the dropped tokens are masked before you rely on it",
            stacklevel=4,
        )
    return family, backbone


__all__ = [
    "CACHE",
    "FAMILIES",
    "Backbone",
    "Family",
    "FamilyInfo",
    "ImageMap",
    "Modality",
    "UnsupportedModelError",
    "find",
    "models",
]


class _Package(ModuleType):
    """`vtc.models` is this package, and the function of the same name."""

    def __call__(self) -> list[FamilyInfo]:
        return models()


sys.modules[__name__].__class__ = _Package
