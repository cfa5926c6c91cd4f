# SPDX-License-Identifier: Apache-2.0
"""Tiny random LLaVA models and batches for them, seeded and ready in a fraction of a second.

Weights are drawn so that attention is peaked and every layer matters: with the default
initialisation a random model hardly notices that tokens were dropped, and a test of the dropping
would pass whatever the code did.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    MistralConfig,
    Qwen2Config,
    SiglipVisionConfig,
)

PAD, BOS, IMAGE = 0, 1, 2
FIRST_WORD, VOCABULARY = 3, 64
LAYERS = 8
PATCH = 14
GRIDS = {"clip": 6, "siglip": 7}
"""Patches along one side of an image, by tower."""


# ---- models -------------------------------------------------------------------------------------
def _vision_config(tower: str) -> CLIPVisionConfig | SiglipVisionConfig:
    settings: dict[str, Any] = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "image_size": GRIDS[tower] * PATCH,
        "patch_size": PATCH,
    }
    if tower == "clip":
        return CLIPVisionConfig(projection_dim=16, **settings)
    return SiglipVisionConfig(**settings)


def _text_config(decoder: str) -> LlamaConfig | Qwen2Config | MistralConfig:
    settings: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "pad_token_id": PAD,
        "bos_token_id": BOS,
        "eos_token_id": None,
        "tie_word_embeddings": False,
    }
    if decoder == "llama":
        return LlamaConfig(**settings)
    if decoder == "qwen2":
        return Qwen2Config(**settings)
    if decoder == "mistral":
        return MistralConfig(sliding_window=None, **settings)
    if decoder == "mistral_window":
        return MistralConfig(sliding_window=400, **settings)
    raise ValueError(f"decoder: expected llama, qwen2, mistral or mistral_window, got {decoder!r}")


@torch.no_grad()
def _draw_weights(model: torch.nn.Module, seed: int) -> None:
    """Give every parameter a scale at which a random transformer attends to few tokens."""
    generator = torch.Generator().manual_seed(seed)

    def normal(parameter: Tensor, std: float, mean: float = 0.0) -> None:
        parameter.copy_(mean + std * torch.randn(parameter.shape, generator=generator))

    for name, parameter in model.named_parameters():
        kind = name.rsplit(".", 1)[-1]
        if kind == "class_embedding" or ("embed" in name and "patch" not in name):
            normal(parameter, 1.0)
        elif kind == "bias":
            normal(parameter, 0.1)
        elif parameter.dim() == 1:  # the weight of a norm
            normal(parameter, 0.1, mean=1.0)
        else:
            fan_in = parameter[0].numel()
            gain = 1.3 if "q_proj" in name or "k_proj" in name else 1.0
            normal(parameter, gain / fan_in**0.5)
    # Placeholders and padding are never generated, as in a trained model.
    model.lm_head.weight[[PAD, IMAGE]] = 0.0


def build_model(
    tower: str = "clip",
    decoder: str = "llama",
    attention: str = "sdpa",
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> LlavaForConditionalGeneration:
    """A new tiny LLaVA, in evaluation mode.

    Args:
        tower: "clip" ([CLS], features of layer -2 without it) or "siglip" (no [CLS], layer -1).
        decoder: "llama", "qwen2", "mistral" or "mistral_window" (window longer than any prompt).
        attention: "eager" or "sdpa", for both the tower and the decoder.
        dtype: of the weights; they are drawn in fp32 and rounded.
        seed: of the weights; equal seeds give equal weights whatever the attention.
    """
    config = LlavaConfig(
        vision_config=_vision_config(tower),
        text_config=_text_config(decoder),
        image_token_index=IMAGE,
        image_seq_length=GRIDS[tower] ** 2,
        vision_feature_select_strategy="default" if tower == "clip" else "full",
        vision_feature_layer=-2 if tower == "clip" else -1,
    )
    model = LlavaForConditionalGeneration._from_config(config, attn_implementation=attention)
    _draw_weights(model, seed)
    model.generation_config.pad_token_id = PAD
    model.generation_config.bos_token_id = BOS
    model.generation_config.eos_token_id = None
    return model.to(dtype).eval()


MODELS = {
    "clip+llama": ("clip", "llama"),
    "siglip+qwen2": ("siglip", "qwen2"),
    "clip+mistral": ("clip", "mistral"),
    "clip+mistral_window": ("clip", "mistral_window"),
}
_SEEDS = {name: seed for seed, name in enumerate(MODELS)}


@cache
def shared_model(name: str, attention: str) -> LlavaForConditionalGeneration:
    """The model of `MODELS`, built once. Whoever patches it unpatches it."""
    return build_model(*MODELS[name], attention=attention, seed=_SEEDS[name])


@cache
def pristine_model(name: str) -> LlavaForConditionalGeneration:
    """Equal weights in a model that no test ever patches: the one the reference reads."""
    return build_model(*MODELS[name], attention="eager", seed=_SEEDS[name])


# ---- inputs -------------------------------------------------------------------------------------
@dataclass(frozen=True, eq=False)
class Sample:
    """One row of a batch, without padding.

    Attributes:
        input_ids: (s,) whole numbers, with one `IMAGE` placeholder per vision token.
        pixel_values: (images, 3, height, width), or `None` for a row of text.
    """

    input_ids: Tensor
    pixel_values: Tensor | None

    @property
    def images(self) -> int:
        return 0 if self.pixel_values is None else self.pixel_values.shape[0]


def make_sample(tower: str, layout: Sequence[str | int], seed: int) -> Sample:
    """A row that starts with BOS and then holds, in order, n random words or one "image"."""
    generator = torch.Generator().manual_seed(seed)
    side = GRIDS[tower]
    ids, pixels = [torch.tensor([BOS])], []
    for piece in layout:
        if piece == "image":
            ids.append(torch.full((side * side,), IMAGE))
            pixels.append(torch.randn(3, side * PATCH, side * PATCH, generator=generator))
        else:
            ids.append(torch.randint(FIRST_WORD, VOCABULARY, (int(piece),), generator=generator))
    return Sample(torch.cat(ids), torch.stack(pixels) if pixels else None)


LAYOUTS: dict[str, tuple[tuple[str | int, ...], ...]] = {
    "one": ((2, "image", 7),),
    "ragged": ((1, "image", 9), (4, "image", 3), (2, "image", 6)),
    "images": ((2, "image", 5), (1, "image", 4, "image", 6), (3, "image", 4)),
    "mixed": ((2, "image", 6), (11,), (1, "image", "image", 5)),
    "text": ((9,), (5,)),
    "image_last": ((3, "image"), (2, "image", 4, "image")),
}
"""Batches by name. "mixed" has a row of text, and two images with nothing between them."""


@cache
def samples(kind: str, tower: str) -> tuple[Sample, ...]:
    """The rows of the batch `kind` of `LAYOUTS`."""
    return tuple(make_sample(tower, layout, 100 + i) for i, layout in enumerate(LAYOUTS[kind]))


def collate(rows: Sequence[Sample], side: str = "left") -> dict[str, Tensor]:
    """`input_ids`, `attention_mask` and, with any image, `pixel_values` of a padded batch."""
    width = max(row.input_ids.numel() for row in rows)
    input_ids = torch.full((len(rows), width), PAD)
    attention_mask = torch.zeros(len(rows), width, dtype=torch.long)
    for i, row in enumerate(rows):
        length = row.input_ids.numel()
        span = slice(width - length, width) if side == "left" else slice(0, length)
        input_ids[i, span] = row.input_ids
        attention_mask[i, span] = 1
    batch = {"input_ids": input_ids, "attention_mask": attention_mask}
    pixels = [row.pixel_values for row in rows if row.pixel_values is not None]
    if pixels:
        batch["pixel_values"] = torch.cat(pixels)
    return batch
