# SPDX-License-Identifier: Apache-2.0
"""What to measure: preset model sizes, settings, and the variants planned from them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import vtc
from vtc.core.spec import Keep, compact, parse_method, takes_keep

from ..harness.plan import of_method
from ..harness.run import DTYPES, BadInput

if TYPE_CHECKING:
    import torch


# ---- sizes --------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Preset:
    """Model sizes: keyword arguments of its configurations, and the image's (height, width)."""

    kind: str
    text: Mapping[str, Any]
    vision: Mapping[str, Any]
    image: tuple[int, int]


def _decoder(kind: str, d: int, wide: int, layers: int, heads: int, kv: int, vocab: int) -> Any:
    return {
        "model_type": kind,
        "hidden_size": d,
        "intermediate_size": wide,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv,
        "vocab_size": vocab,
        "max_position_embeddings": 32768,
        "tie_word_embeddings": False,
    }


def _clip(d: int, layers: int, heads: int, size: int = 336) -> Any:
    return {
        "model_type": "clip_vision_model",
        "hidden_size": d,
        "intermediate_size": 4 * d,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "image_size": size,
        "patch_size": 14,
    }


def _qwen_tower(width: int, depth: int = 32, d: int = 1280, heads: int = 16) -> Any:
    return {"depth": depth, "embed_dim": d, "num_heads": heads, "hidden_size": width}


_VICUNA_7B = _decoder("llama", 4096, 11008, 32, 32, 32, 32064)
_VICUNA_13B = _decoder("llama", 5120, 13824, 40, 40, 40, 32064)
_MISTRAL_7B = _decoder("mistral", 4096, 14336, 32, 32, 8, 32064) | {"sliding_window": None}
_QWEN2_2B = _decoder("qwen2_vl_text", 1536, 8960, 28, 12, 2, 151936)
_QWEN2_7B = _decoder("qwen2_vl_text", 3584, 18944, 28, 28, 4, 152064)
_MROPE = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]}

PRESETS: dict[str, Preset] = {
    "tiny": Preset(
        "llava", _decoder("llama", 64, 176, 4, 4, 4, 512), _clip(32, 2, 2, 84), (84, 84)
    ),
    "speed-bar": Preset(
        "llava", _decoder("llama", 1024, 2816, 16, 16, 16, 32000), _clip(256, 4, 4), (672, 840)
    ),
    "llava-1.5-7b": Preset("llava", _VICUNA_7B, _clip(1024, 24, 16), (336, 336)),
    "llava-1.5-13b": Preset("llava", _VICUNA_13B, _clip(1024, 24, 16), (336, 336)),
    "llava-next-vicuna-7b": Preset("llava_next", _VICUNA_7B, _clip(1024, 24, 16), (672, 672)),
    "llava-next-mistral-7b": Preset("llava_next", _MISTRAL_7B, _clip(1024, 24, 16), (672, 672)),
    "qwen2-vl-2b": Preset(
        "qwen2_vl",
        _QWEN2_2B | {"rope_parameters": _MROPE, "tie_word_embeddings": True},
        _qwen_tower(1536),
        (1008, 1008),
    ),
    "qwen2-vl-7b": Preset(
        "qwen2_vl", _QWEN2_7B | {"rope_parameters": _MROPE}, _qwen_tower(3584), (1008, 1008)
    ),
}
"""Sizes by name. "speed-bar" is the model of vtc's speed targets: 48 x 60 = 2880 tokens."""

PLAIN, TILED, NATIVE = ("llava",), ("llava_next",), ("qwen2_vl", "qwen2_5_vl")


@dataclass(frozen=True)
class Settings:
    """What to measure.

    Attributes:
        config: a name in `PRESETS`, a folder with a config.json, or a hub id.
        layers: number of decoder layers; `None` for the configuration's.
        pretrained: load the checkpoint's weights instead of random ones.
        methods: methods as text (`vtc.core.spec`).
        keeps: budgets for each method that does not set its `keep`.
        batches: batch sizes; each row has one image.
        dtypes: of "float32", "bfloat16", "float16".
        device: "cpu", "cuda", "cuda:1"; `None` for a GPU if there is one.
        image: (height, width) in pixels; `None` for the preset's or the tower's.
        text: text tokens of the prompt, a quarter of them before the image.
        decode: decoding steps after each prefill.
        unpatched: run the plain model with all tokens, which takes longest; otherwise there are no
            ratios to it and to the ideal.
        warmup, repeats: number of warm-up rounds and of measured rounds.
        threads: PyTorch's threads on a CPU; `None` for its default.
        seed: seed of weights, inputs and sampling methods.
        out: folder for bench.json and bench.csv, or `None`.
    """

    config: str = "speed-bar"
    layers: int | None = None
    pretrained: bool = False
    methods: tuple[str, ...] = ("todre", "divprune", "visionzip", "fastv")
    keeps: tuple[Keep, ...] = (0.1,)
    batches: tuple[int, ...] = (1,)
    dtypes: tuple[str, ...] = ("float32",)
    device: str | None = None
    image: tuple[int, int] | None = None
    text: int = 64
    decode: int = 8
    unpatched: bool = True
    warmup: int = 1
    repeats: int = 7
    threads: int | None = None
    seed: int = 0
    out: Path | None = None


@dataclass
class Variant:
    """One variant: a method, the plain model (`method` is `None`), or the plain model truncated to
    `lengths`, the tokens of each decoder layer.

    Attributes:
        seen: by batch row, the tokens that each layer processed; set by a run.
        runs: milliseconds by name, one entry per measured round.
    """

    label: str
    keep: Keep | None = None
    method: vtc.Method | None = None
    lengths: tuple[int, ...] | None = None
    seen: list[tuple[int, ...]] = field(default_factory=list)
    runs: dict[str, list[float]] = field(default_factory=dict)
    reference: Variant | None = None
    peak: int | None = None
    error: str | None = None


# ---- planning -----------------------------------------------------------------------------------
def plan(settings: Settings) -> list[Variant]:
    """The methods to measure, in order, without repetition.

    Raises:
        BadInput: an invalid setting, as far as can be checked without the model.
    """
    least = {
        "--layers": (settings.layers, 1),
        "--text": (settings.text, 4),
        "--decode": (settings.decode, 1),
        "--warmup": (settings.warmup, 1),
        "--repeats": (settings.repeats, 2),
        "--threads": (settings.threads, 1),
        "--seed": (settings.seed, 0),
    }
    for option, (value, lowest) in least.items():
        if value is not None and value < lowest:
            raise BadInput(option, f"expected at least {lowest}, got {value}")
    listed = {"methods": settings.methods, "batch": settings.batches, "dtype": settings.dtypes}
    for name, values in listed.items():
        if not values:
            raise BadInput(f"--{name}", "expected at least one, got none")
    for batch in settings.batches:
        if batch < 1:
            raise BadInput("--batch", f"expected at least 1, got {batch}")
    for dtype in settings.dtypes:
        if dtype not in DTYPES:
            raise BadInput("--dtype", f"expected one of {', '.join(DTYPES)}, got {dtype!r}")
    if settings.image is not None and min(settings.image) < 1:
        raise BadInput("--image", f"expected height x width in pixels, got {settings.image}")
    if settings.pretrained and (settings.config in PRESETS or settings.layers is not None):
        raise BadInput(
            "--pretrained", "needs a checkpoint (a folder or a hub id), without --layers"
        )
    found: list[Variant] = []
    for label in dict.fromkeys(compact(text) for text in settings.methods):
        try:
            if not takes_keep(label):
                found.append(Variant(label, None, parse_method(label, None, settings.seed)))
                continue
            if not settings.keeps:
                raise BadInput("--keep", f"expected a value for {label}, got none")
            for keep in dict.fromkeys(settings.keeps):
                found.append(Variant(label, keep, parse_method(label, keep, settings.seed)))
        except BadInput:
            raise
        except (ValueError, TypeError) as error:
            raise of_method(error, label) from error
    return found


def device_of(given: str | None) -> torch.device:
    import torch

    try:
        device = torch.device(given or ("cuda" if torch.cuda.is_available() else "cpu"))
    except RuntimeError:
        raise BadInput("--device", f"expected cpu, cuda or cuda:0, got {given!r}") from None
    if device.type not in ("cpu", "cuda"):
        raise BadInput("--device", f"expected cpu or cuda, got {given!r}")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise BadInput("--device", f"got {given!r}, but PyTorch sees no GPU")
    return device
