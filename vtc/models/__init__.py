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
from .cohere_compass import CohereCompass
from .convolutional import FastVLM, GotOcr2
from .cosmos3 import Cosmos3Edge, Cosmos3Omni
from .deepseek_ocr2 import DeepseekOcr2
from .deepseek_vl import DeepseekVL
from .discrete import Apertus15, Chameleon, Emu3
from .gemma import Gemma3, Gemma3n, Gemma4, Gemma4Unified, PaliGemma, ShieldGemma2
from .granite_docling import GraniteDocling
from .hunyuan import HunYuanVL
from .idefics import Idefics2, Idefics3, SmolVLM
from .internvl import InternVL, QianfanOCR
from .janus import Janus
from .kimi import KimiK25
from .lfm2_vl import Lfm2VL, Lfm3VL
from .llama4 import Llama4
from .llava import Llava, VideoLlava, VipLlava
from .llava_next import Granite4Vision, LlavaNext, LlavaOnevision
from .minicpmv import MiniCPMV
from .mistral3 import LightOnOcr, Mistral3
from .mllama import Mllama
from .molmo2 import Molmo2
from .muse import MuseGlimmer
from .nemotron import NemotronOmni
from .ovis2 import Ovis2
from .perception import PerceptionLM
from .phi4 import Phi4Multimodal
from .qwen import GlmV, Qwen3_5, QwenOmni, QwenVL
from .qwen_like import Ernie45VL, OneAxis, PaddleOCRVL, VideoLlama3
from .registry import FamilyInfo, families, find, models
from .seq2seq import Florence2
from .step import Step3p7

__all__ = [
    "CACHE",
    "Adapter",
    "Apertus15",
    "Aria",
    "Blip2",
    "Chameleon",
    "CohereCompass",
    "CohereVision",
    "Cosmos3Edge",
    "Cosmos3Omni",
    "DeepseekOcr2",
    "DeepseekVL",
    "Emu3",
    "Ernie45VL",
    "FamilyInfo",
    "FastVLM",
    "Florence2",
    "Gemma3",
    "Gemma3n",
    "Gemma4",
    "Gemma4Unified",
    "GlmV",
    "GotOcr2",
    "Granite4Vision",
    "GraniteDocling",
    "HunYuanVL",
    "Idefics2",
    "Idefics3",
    "ImageMap",
    "InstructBlipVideo",
    "InternVL",
    "Janus",
    "KimiK25",
    "Lfm2VL",
    "Lfm3VL",
    "LightOnOcr",
    "Llama4",
    "Llava",
    "LlavaNext",
    "LlavaOnevision",
    "MiniCPMV",
    "Mistral3",
    "Mllama",
    "Modality",
    "Molmo2",
    "MuseGlimmer",
    "NemotronOmni",
    "OneAxis",
    "Ovis2",
    "PaddleOCRVL",
    "PaliGemma",
    "PerceptionLM",
    "Phi4Multimodal",
    "QianfanOCR",
    "Qwen3_5",
    "QwenOmni",
    "QwenVL",
    "ShieldGemma2",
    "SmolVLM",
    "Step3p7",
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
