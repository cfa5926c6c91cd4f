# SPDX-License-Identifier: Apache-2.0
"""The cost of a forward, computed from a configuration and the lengths per layer. No model runs.

There are two conventions; never compare numbers of one with numbers of the other:

- `prefill_flops`, `decode_flops` and `flops_per_layer` count a multiply and an add as **2 FLOPs**,
  over all matrix products: the vision tower, the projector, the language model's
  layers, and the output head. Attention counts the full square of the length (no saving for
  causality, nor in a prefill for sliding windows), as PyTorch's own counter does for eager
  attention. `tests/cost/test_cost.py` compares them with
  `torch.utils.flop_counter.FlopCounterMode` for every family.
- `visual_flops` is the **literature's** formula, which counts a multiply-add once and only the
  vision tokens. It reproduces the published 3.82 T of LLaVA-1.5-7B with 576 tokens.

Only experts that a token is routed to, and shared experts, count; Llama 4 in
transformers sends every token through every expert, mostly as zeros, which is not counted. Layers
of Gemma 4 that share another layer's keys count for all tokens, as they run in a patched model;
unpatched, transformers runs their prefill only for tokens whose logits are requested.

Norms, activations, softmax and rotary embeddings are not counted: they are not matrix products.
`selector_flops` gives the cost of a method's selection, `token_schedule` the tokens it leaves to
each layer.

In a cross-attention layer (Mllama) a length is the number of vision states, including [CLS] of each
tile and padding; in other layers it is the number of tokens. Keys of the states are computed only
in the prefill, and a layer without states does not run.

A part without a formula is `nan`, never a guess: linear attention, Gemma 3n, convolutional
towers and SAM, perceivers and Q-Formers, and any type that is not in the tables of this package.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from vtc.core.errors import ArgumentError
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
    """FLOPs (2 per multiply-add) of one sample's prefill; `nan` without a formula.

    Attributes:
        vision: the vision tower, over all tiles of all images.
        projector: from the tower's features to the language model's width.
        lm: the decoder layers at the given lengths, and the output head.
        layers: part of `lm`, each decoder layer; empty if unknown.
        head: part of `lm`, the output head and everything else outside the layers.
    """

    vision: float
    projector: float
    lm: float
    layers: tuple[float, ...] = ()
    head: float = math.nan

    @property
    def total(self) -> float:
        """Sum of vision, projector and language model; `nan` if one of them is unknown."""
        return self.vision + self.projector + self.lm

    def to_dict(self) -> dict[str, float]:
        """`{"vision": ..., "projector": ..., "lm": ...}`."""
        return {"vision": self.vision, "projector": self.projector, "lm": self.lm}


_Given = int | Sequence[int] | Sequence[Sequence[int] | Sequence[Sequence[int]] | None] | None


# ---- checks -------------------------------------------------------------------------------------
def _lengths(config: Any, lengths: Sequence[int]) -> list[int]:
    layers = get(text_of(config), "num_hidden_layers")
    if layers is not None and len(lengths) != layers:
        raise ArgumentError(
            "lengths",
            f"expected one length for each of the {layers} decoder layers, got {len(lengths)}",
        )
    if any(n < 0 for n in lengths):
        raise ArgumentError("lengths", f"expected lengths of at least 0, got {min(lengths)}")
    return list(lengths)


def _images(
    config: Any,
    images: int | Sequence[int],
    tiles: Sequence[int] | None,
    grids: Sequence[Grid | None] | None,
    patches: _Given,
) -> Images | None:
    """The checked images, or `None` for a number of images of unknown size."""
    count = images if isinstance(images, int) else len(images)
    if tiles is not None and len(tiles) != count:
        raise ArgumentError(
            "tiles", f"expected one number for each of the {count} images, got {len(tiles)}"
        )
    if grids is not None and len(grids) != count:
        raise ArgumentError(
            "grids",
            f"expected (frames, rows, columns) for each of the {count} images, got {len(grids)}",
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
                raise ArgumentError(
                    "grids",
                    f"expected frames, rows and columns that make the image's {tokens} "
                    f"tokens, got {tuple(grid)}",
                )
    return Images(images, tiles, grids, _each(patches, count))


def _each(patches: _Given, count: int) -> list[Patches | tuple[Patches, ...] | None] | None:
    """`patches` for each of `count` images."""
    if patches is None:
        return None
    if isinstance(patches, int):
        patches = [patches]
    if patches and all(isinstance(n, int) for n in patches):
        same: Any = tuple(patches)
        return [same] * count
    if len(patches) != count or any(isinstance(own, int) or own == () for own in patches):
        raise ArgumentError(
            "patches",
            "expected a whole number, whole numbers by layer, or a sequence of such (or "
            f"None) for each of the {count} images, got {patches}",
        )
    each: list[Any] = [None if own is None else tuple(own) for own in patches]  # type: ignore[arg-type]
    return each


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
    patches: _Given = None,
    logits: int = 1,
) -> Flops:
    """FLOPs of one sample's prefill, 2 per multiply-add.

    Args:
        config: a vision-language configuration of transformers (or a dictionary of one), or that of
            a language model. A dictionary of sizes without a `model_type` counts as a Llama.
        lengths: for each decoder layer, the tokens it processes (text and vision); for a
            cross-attention layer the vision states.
        images: for each image of the sample, its vision tokens *before* compression; or the
            number of images if each is one tile of the tower's fixed size.
        tiles: for each image, the tiles (or frames) that its vision tower ran on, including
            padding. By default as few as hold the image's tokens, which is exact except for
            families that crop padding from tiles or pool a clip's frames (LLaVA-NeXT and its video
            model, LLaVA-OneVision) or average them (Kimi K2.5): there it is a lower bound. For
            Mllama, the most that its processor makes.
        grids: for each image, the (frames, rows, columns) of its vision tokens, or `None` if
            they do not fill a block. For towers that take images of any size (such as Qwen-VL),
            and clips of LLaVA-NeXT-Video. By default one frame is assumed; in Qwen2.5-VL all
            attention windows are full, an upper bound as windows at borders are smaller, and
            LLaVA-NeXT-Video pools a clip's frames after its projector, not before.
            Padding to equal sizes (Pixtral) is not counted.
        patches: patches per tile, if the tower ran on another number than its configuration says; a
            sequence if patches are merged in the tower: those that enter each layer, and those
            that leave the last. If images differ, one such sequence, or `None`, for each; if tiles
            differ, for each image one such sequence per tile. For
            Gemma 4, the patches that its processor pads images to, without which its tower is
            unknown.
        logits: positions for which the output head runs; `generate` requests one.

    Returns:
        FLOPs of the vision tower, the projector and the language model.

    Raises:
        ArgumentError: `lengths` does not have one entry for each decoder layer, or `tiles`, `grids`
            or `patches` not one for each image, or a grid does not hold its image's tokens.
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
    """FLOPs of each decoder layer, without the output head; 2 per multiply-add.

    Args:
        config: as in `prefill_flops`.
        lengths: for each layer, the tokens it processes in a prefill; in decoding, those that
            its cache holds. For a cross-attention layer, vision states.
        decoding: count one new token, which sees itself and the cached tokens (within a sliding
            window), instead of a prefill.

    Returns:
        One number for each layer, all `nan` for a type without a formula.

    Raises:
        ArgumentError: `lengths` does not have one entry for each decoder layer, or a negative one.
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
    """FLOPs of generating one token, 2 per multiply-add, including the output head.

    Args:
        config: as in `prefill_flops`.
        lengths: for each layer, the tokens that its cache holds; the new token sees these and
            itself.

    Returns:
        FLOPs, or `nan` for a type without a formula.

    Raises:
        ArgumentError: as in `flops_per_layer`.
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
    """Bytes that each layer's cache holds after a prefill; `kv_bytes` is their sum.

    Layers that share another layer's keys hold none, cross-attention layers those of `lengths[i]`
    vision states.

    Args:
        config, lengths, bytes_per_value: as in `kv_bytes`.

    Returns:
        One number for each layer, all `nan` for a type without a formula.

    Raises:
        ArgumentError: as in `kv_bytes`.
    """
    lengths = _lengths(config, lengths)
    decoder = _decoder(config, len(lengths))
    if decoder is None:
        return [math.nan] * len(lengths)
    size = bytes_per_value if bytes_per_value is not None else _bytes_per_value(config)
    pairs = zip(decoder.layers, lengths, strict=True)
    return [float(layer.cached * layer.held(n) * size) for layer, n in pairs]


def kv_bytes(config: Any, lengths: Sequence[int], bytes_per_value: int | None = None) -> float:
    """Bytes of keys and values (or of the latents behind them) after a prefill; `nan` for language
    models without a formula.

    Args:
        config: as in `prefill_flops`.
        lengths: tokens of each layer; one with a sliding window holds less than the window.
        bytes_per_value: 2 for bfloat16 and float16, 4 for float32; by default that of the
            configuration's dtype (float32 if it has none).

    Returns:
        Bytes, or `nan` for a type without a formula.

    Raises:
        ArgumentError: `lengths` does not have one entry for each decoder layer, or a negative one.
    """
    return float(sum(kv_bytes_per_layer(config, lengths, bytes_per_value)))


def equivalent_tokens(per_layer: Sequence[int]) -> float:
    """Vision tokens averaged over the decoder layers: the one number to compare budgets by.

    Args:
        per_layer: vision tokens of each layer.

    Returns:
        Tokens, on average.

    Raises:
        ArgumentError: no layers.
    """
    if not per_layer:
        raise ArgumentError("per_layer", "expected at least one layer, got none")
    return sum(per_layer) / len(per_layer)


def visual_flops(per_layer: Sequence[int], d: int, m: int) -> float:
    """The literature's FLOPs of the vision tokens in the language model's prefill.

    `sum over layers of 4 n d^2 + 2 n^2 d + 3 n d m` (as in TransPrune, arXiv 2507.20630). It counts
    a multiply-add once, full multi-head attention, and no text.

    Args:
        per_layer: vision tokens n of each layer.
        d: width of the language model.
        m: feed-forward width.

    Returns:
        FLOPs, 1 per multiply-add.
    """
    return float(sum(4 * n * d * d + 2 * n * n * d + 3 * n * d * m for n in per_layer))
