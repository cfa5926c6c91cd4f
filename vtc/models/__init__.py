# SPDX-License-Identifier: Apache-2.0
"""The supported architectures, one file per family; `find` binds a model's adapter.

Importing this package registers all families of vtc.
"""

from __future__ import annotations

import sys
from types import ModuleType

from vtc.core.images import ImageMap, Modality

from .aria import Aria
from .base import CACHE, Adapter, UnsupportedModelError
from .blip import Blip2, InstructBlipVideo
from .cohere import CohereVision
from .convolutional import FastVLM, GotOcr2
from .deepseek_vl import DeepseekVL
from .discrete import Chameleon, Emu3
from .gemma import Gemma3, Gemma3n, Gemma4, PaliGemma
from .idefics import Idefics2, Idefics3, SmolVLM
from .internvl import InternVL, QianfanOCR
from .janus import Janus
from .kimi import KimiK25
from .lfm2_vl import Lfm2VL
from .llama4 import Llama4
from .llava import Llava, VideoLlava, VipLlava
from .llava_next import LlavaNext, LlavaOnevision
from .minicpmv import MiniCPMV
from .mistral3 import LightOnOcr, Mistral3
from .mllama import Mllama
from .muse import MuseGlimmer
from .ovis2 import Ovis2
from .perception import PerceptionLM
from .qwen import GlmV, Qwen3_5, QwenOmni, QwenVL
from .qwen_like import Ernie45VL, OneAxis, PaddleOCRVL, VideoLlama3
from .registry import FamilyInfo, families, find, models
from .seq2seq import Florence2

__all__ = [
    "CACHE",
    "Adapter",
    "Aria",
    "Blip2",
    "Chameleon",
    "CohereVision",
    "DeepseekVL",
    "Emu3",
    "Ernie45VL",
    "FamilyInfo",
    "FastVLM",
    "Florence2",
    "Gemma3",
    "Gemma3n",
    "Gemma4",
    "GlmV",
    "GotOcr2",
    "Idefics2",
    "Idefics3",
    "ImageMap",
    "InstructBlipVideo",
    "InternVL",
    "Janus",
    "KimiK25",
    "Lfm2VL",
    "LightOnOcr",
    "Llama4",
    "Llava",
    "LlavaNext",
    "LlavaOnevision",
    "MiniCPMV",
    "Mistral3",
    "Mllama",
    "Modality",
    "MuseGlimmer",
    "OneAxis",
    "Ovis2",
    "PaddleOCRVL",
    "PaliGemma",
    "PerceptionLM",
    "QianfanOCR",
    "Qwen3_5",
    "QwenOmni",
    "QwenVL",
    "SmolVLM",
    "UnsupportedModelError",
    "VideoLlama3",
    "VideoLlava",
    "VipLlava",
    "families",
    "find",
    "models",
]


class _Package(ModuleType):
    """`vtc.models` is this package, and the function of the same name."""

    def __call__(self) -> list[FamilyInfo]:
        return models()


sys.modules[__name__].__class__ = _Package
