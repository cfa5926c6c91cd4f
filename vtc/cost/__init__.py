# SPDX-License-Identifier: Apache-2.0
"""What a forward costs, computed from a configuration and the lengths per layer. Nothing is run.

Two conventions are in use, and numbers of one must not be compared with numbers of the other:

- `prefill_flops`, `decode_flops` and `flops_per_layer` count a multiply and an add as **2 FLOPs**,
  over everything that is a matrix product: the vision tower, the projector, the language model's
  layers, and the output head. Attention is counted as the full square of the length (no saving for
  causality, nor in a prefill for sliding windows), as PyTorch's own counter does for eager
  attention. They agree with `torch.utils.flop_counter.FlopCounterMode`, family by family, in
  `tests/cost/test_cost.py`.
- `visual_flops` is the **literature's** formula, which counts a multiply-add once and the vision
  tokens alone. It reproduces the published 3.82 T of LLaVA-1.5-7B with 576 tokens.

Of experts, those that a token is sent to count, and those that all tokens go through; Llama 4 in
transformers sends every token through every expert, mostly as zeros, which is not counted. Layers
of Gemma 4 that use another layer's keys count for all tokens, as they run in a patched model;
alone, transformers runs them in a prefill for those tokens only whose logits are asked for.

Norms, activations, softmax and rotary embeddings are not counted: they are not matrix products.
What a method's choice costs is `selector_flops`; what it leaves to each layer, `token_schedule`.

In a cross-attention layer (Mllama) a length is the number of vision states, [CLS] of each tile
and what there is of padding included; the other layers' are of tokens. Keys of the states are made
in the prefill only, and a layer without states does not run.

A part that has no formula here is `nan`, never a guess: linear attention, Gemma 3n, convolutional
towers and SAM, perceivers and Q-Formers, and any type that is not in the tables of this package.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from vtc.cost.configs import Unknown, get, text_of
from vtc.cost.decoder import Decoder, decoder_of
from vtc.cost.schedule import token_schedule
from vtc.cost.selector import selector_flops
from vtc.cost.vision import Grid, Images, Patches, projector_flops, tile_tokens, vision_flops

__all__ = [
    "Flops",
    "decode_flops",
    "equivalent_tokens",
    "flops_per_layer",
    "kv_bytes",
    "kv_bytes_per_layer",
    "prefill_flops",
    "selector_flops",
    "token_schedule",
    "visual_flops",
]


@dataclass(frozen=True)
class Flops:
    """FLOPs (2 per multiply-add) of one sample's prefill; `nan` where there is no formula.

    Attributes:
        vision: the vision tower, over all tiles of all images.
        projector: from the tower's features to the language model's width.
        lm: the decoder layers at the lengths given, and the output head.
        layers: of `lm`, each decoder layer; empty where they are not known.
        head: of `lm`, the output head and what else lies outside the layers.
    """

    vision: float
    projector: float
    lm: float
    layers: tuple[float, ...] = ()
    head: float = math.nan

    @property
    def total(self) -> float:
        """Sum of vision, projector and language model, `nan` if one of them is not known."""
        return self.vision + self.projector + self.lm

    def to_dict(self) -> dict[str, float]:
        """`{"vision": ..., "projector": ..., "lm": ...}`."""
        return {"vision": self.vision, "projector": self.projector, "lm": self.lm}


_Given = int | Sequence[int] | Sequence[Sequence[int] | None] | None


# ---- checks -------------------------------------------------------------------------------------
def _lengths(config: Any, lengths: Sequence[int]) -> list[int]:
    layers = get(text_of(config), "num_hidden_layers")
    if layers is not None and len(lengths) != layers:
        raise ValueError(
            f"lengths: expected one length for each of the {layers} decoder layers, "
            f"got {len(lengths)}"
        )
    if any(n < 0 for n in lengths):
        raise ValueError(f"lengths: expected lengths of at least 0, got {min(lengths)}")
    return list(lengths)


def _images(
    config: Any,
    images: int | Sequence[int],
    tiles: Sequence[int] | None,
    grids: Sequence[Grid | None] | None,
    patches: _Given,
) -> Images | None:
    """What was given of images, `None` for a number of images of an unknown size."""
    count = images if isinstance(images, int) else len(images)
    if tiles is not None and len(tiles) != count:
        raise ValueError(
            f"tiles: expected one number for each of the {count} images, got {len(tiles)}"
        )
    if grids is not None and len(grids) != count:
        raise ValueError(
            f"grids: expected (frames, rows, columns) for each of the {count} images, "
            f"got {len(grids)}"
        )
    if isinstance(images, int):
        try:
            images = [tile_tokens(config)] * count
        except Unknown:
            return None
    if grids is not None:
        for tokens, grid in zip(images, grids, strict=True):
            if grid is None:
                continue
            if len(grid) != 3 or math.prod(grid) != tokens or min(grid) < 1:
                raise ValueError(
                    f"grids: expected frames, rows and columns that make the image's {tokens} "
                    f"tokens, got {tuple(grid)}"
                )
    return Images(images, tiles, grids, _each(patches, count))


def _each(patches: _Given, count: int) -> list[Patches | None] | None:
    """`patches` for each of `count` images."""
    if patches is None:
        return None
    if isinstance(patches, int):
        patches = [patches]
    if patches and all(isinstance(n, int) for n in patches):
        same: Any = tuple(patches)
        return [same] * count
    if len(patches) != count or any(isinstance(own, int) or own == () for own in patches):
        raise ValueError(
            "patches: expected a whole number, whole numbers by layer, or a sequence of such (or "
            f"None) for each of the {count} images, got {patches}"
        )
    return [None if own is None else tuple(own) for own in patches]  # type: ignore[arg-type]


def _known(formula: Callable[[Any, Any], float], config: Any, given: Any) -> float:
    try:
        return formula(config, given)
    except Unknown:
        return math.nan


def _decoder(config: Any, count: int) -> Decoder | None:
    try:
        return decoder_of(config, count)
    except Unknown:
        return None


# ---- the public functions -----------------------------------------------------------------------
def prefill_flops(
    config: Any,
    lengths: Sequence[int],
    images: int | Sequence[int] = (),
    *,
    tiles: Sequence[int] | None = None,
    grids: Sequence[Grid | None] | None = None,
    patches: int | Sequence[int] | Sequence[Sequence[int] | None] | None = None,
    logits: int = 1,
) -> Flops:
    """FLOPs of one sample's prefill, 2 per multiply-add.

    Args:
        config: a vision-language configuration of transformers (or a dictionary of one), or that of
            a language model. A dictionary of sizes without a `model_type` is taken for a Llama.
        lengths: for each decoder layer, the tokens it processes (text and vision); for a
            cross-attention layer the vision states.
        images: for each image of the sample, its vision tokens *before* compression; or the
            number of images where each is one tile of the tower's fixed size.
        tiles: for each image, the tiles (or frames) that its vision tower ran on, those of padding
            included. Without it, as few as hold the image's tokens, which is exact but for families
            that cut padding off their tiles or pool a clip's frames (LLaVA-NeXT and its video
            model, LLaVA-OneVision) or average them (Kimi K2.5): there it is a lower bound. For
            Mllama, as many as its processor makes at most.
        grids: for each image, the (frames, rows, columns) of its vision tokens, or `None` where
            they are no such block. For towers that take images of any size (Qwen-VL and the like),
            and clips of LLaVA-NeXT-Video. Without it, one frame is assumed, in Qwen2.5-VL all
            attention windows are full, which is an upper bound as those at borders are smaller, and
            LLaVA-NeXT-Video is taken to pool a clip's frames behind its projector and not before.
            Padding to equal sizes (Pixtral) is not counted.
        patches: of each tile, where the tower ran on another number than its configuration says; a
            sequence where patches are merged on the way: those that enter each layer, and those
            that leave the last. Where images differ, one such sequence, or `None`, for each. For
            Gemma 4, the patches that its processor pads images to, without which its tower is not
            known.
        logits: positions for which the output head runs; `generate` asks for one.

    Raises:
        ValueError: `lengths` does not have one entry for each decoder layer, or `tiles`, `grids` or
            `patches` not one for each image, or a grid has not as many places as its image tokens.
    """
    lengths = _lengths(config, lengths)
    given = _images(config, images, tiles, grids, patches)
    decoder = _decoder(config, len(lengths))
    lm, head = math.nan, math.nan
    layers: tuple[float, ...] = ()
    if decoder is not None:
        pairs, tokens = zip(decoder.layers, lengths, strict=True), decoder.tokens(lengths)
        layers = tuple(float(layer.prefill(n, tokens)) for layer, n in pairs)
        head = 2.0 * (logits * decoder.head + tokens * decoder.entry)
        lm = sum(layers) + head
    vision = projector = math.nan
    if given is not None:
        none = not given.tokens
        vision = 0.0 if none else _known(vision_flops, config, given)
        projector = 0.0 if none else _known(projector_flops, config, given)
    return Flops(vision, projector, lm, layers, head)


def flops_per_layer(config: Any, lengths: Sequence[int], *, decoding: bool = False) -> list[float]:
    """FLOPs of each decoder layer, the output head left out; 2 per multiply-add.

    Args:
        config: as for `prefill_flops`.
        lengths: for each layer, the tokens it processes in a prefill; while decoding, those that
            its cache holds. For a cross-attention layer, vision states.
        decoding: one new token, which sees the cached ones (of a sliding window, those within) and
            itself, instead of a prefill.

    Returns:
        One number for each layer, all `nan` for a type without formula.
    """
    lengths = _lengths(config, lengths)
    decoder = _decoder(config, len(lengths))
    if decoder is None:
        return [math.nan] * len(lengths)
    pairs = zip(decoder.layers, lengths, strict=True)
    if decoding:
        return [float(layer.step(n)) for layer, n in pairs]
    tokens = decoder.tokens(lengths)
    return [float(layer.prefill(n, tokens)) for layer, n in pairs]


def decode_flops(config: Any, lengths: Sequence[int]) -> float:
    """FLOPs of generating one token when the cache holds `lengths[i]` tokens in layer i.

    The new token sees the cached ones and itself. 2 per multiply-add, the output head included.
    """
    layers = flops_per_layer(config, lengths, decoding=True)
    decoder = _decoder(config, len(layers))
    if decoder is None:
        return math.nan
    return sum(layers) + 2.0 * (decoder.head + decoder.entry)


def _bytes_per_value(config: Any) -> int:
    dtype = get(config, "dtype", "torch_dtype") or get(text_of(config), "dtype", default="float32")
    if isinstance(dtype, str):
        sizes = {"float32": 4, "bfloat16": 2, "float16": 2, "half": 2, "float64": 8}
        return sizes[dtype.removeprefix("torch.")]
    return int(dtype.itemsize)


def kv_bytes_per_layer(
    config: Any, lengths: Sequence[int], bytes_per_value: int | None = None
) -> list[float]:
    """Bytes that each layer's cache holds after a prefill with `lengths[i]` tokens in layer i.

    As `kv_bytes`, which is their sum. Layers that use another layer's keys hold none, and
    cross-attention layers those of `lengths[i]` vision states.
    """
    lengths = _lengths(config, lengths)
    decoder = _decoder(config, len(lengths))
    if decoder is None:
        return [math.nan] * len(lengths)
    size = bytes_per_value if bytes_per_value is not None else _bytes_per_value(config)
    pairs = zip(decoder.layers, lengths, strict=True)
    return [float(layer.cached * layer.held(n) * size) for layer, n in pairs]


def kv_bytes(config: Any, lengths: Sequence[int], bytes_per_value: int | None = None) -> float:
    """Bytes of keys and values (or the latents they are made of) after a prefill.

    `lengths[i]` tokens are in layer i; one with a sliding window holds less than the window.
    `bytes_per_value` is 2 for bfloat16 and float16, 4 for float32; without it, the configuration's
    dtype decides (float32 if it names none). `nan` for language models without formula.
    """
    return float(sum(kv_bytes_per_layer(config, lengths, bytes_per_value)))


def equivalent_tokens(per_layer: Sequence[int]) -> float:
    """Vision tokens averaged over the decoder layers: the one number to compare budgets by."""
    if not per_layer:
        raise ValueError("per_layer: expected at least one layer, got none")
    return sum(per_layer) / len(per_layer)


def visual_flops(per_layer: Sequence[int], d: int, m: int) -> float:
    """The literature's FLOPs of the vision tokens in the language model's prefill.

    `sum over layers of 4 n d^2 + 2 n^2 d + 3 n d m`, with n vision tokens in a layer, width d and
    feed-forward width m (as in TransPrune, arXiv 2507.20630). It counts a
    multiply-add once, full multi-head attention, and no text.
    """
    return float(sum(4 * n * d * d + 2 * n * n * d + 3 * n * d * m for n in per_layer))
