# SPDX-License-Identifier: Apache-2.0
"""What a forward costs, computed from a configuration and the lengths per layer. Nothing is run.

Two conventions are in use, and numbers of one must not be compared with numbers of the other:

- `prefill_flops` and `decode_flops` count a multiply and an add as **2 FLOPs**, over everything
  that is a matrix product: the vision tower, the projector, the language model's layers, and the
  output head. Attention is counted as the full square of the length (no saving for causality), as
  PyTorch's own counter does. They agree with `torch.utils.flop_counter.FlopCounterMode`.
- `visual_flops` is the **literature's** formula, which counts a multiply-add once and the vision
  tokens alone. It reproduces the published 3.82 T of LLaVA-1.5-7B with 576 tokens.

Norms, activations, softmax, rotary embeddings and the selector itself are not counted: they are
not matrix products, and the selector's time is measured, not estimated.

A part that has no formula here (an unknown projector, say) is `nan`, never a guess.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

__all__ = [
    "Flops",
    "decode_flops",
    "equivalent_tokens",
    "kv_bytes",
    "prefill_flops",
    "visual_flops",
]


@dataclass(frozen=True)
class Flops:
    """FLOPs (2 per multiply-add) of one sample's prefill; `nan` where there is no formula.

    Attributes:
        vision: the vision tower, over all tiles of all images.
        projector: from the tower's features to the language model's width.
        lm: the decoder layers at the lengths given, and the output head.
    """

    vision: float
    projector: float
    lm: float

    @property
    def total(self) -> float:
        """Sum of the three parts, `nan` if one of them is not known."""
        return self.vision + self.projector + self.lm

    def to_dict(self) -> dict[str, float]:
        """`{"vision": ..., "projector": ..., "lm": ...}`."""
        return asdict(self)


# ---- reading configurations ---------------------------------------------------------------------
def _get(config: Any, *names: str, default: Any = None) -> Any:
    """First of `names` that `config` (an object or a mapping) has and that is not `None`."""
    for name in names:
        value = config.get(name) if isinstance(config, Mapping) else getattr(config, name, None)
        if value is not None:
            return value
    return default


def _text(config: Any) -> Any:
    """The language model's part of a vision-language configuration, or the whole of it."""
    return _get(config, "text_config", "llm_config", "language_config", default=config)


def _lengths(config: Any, lengths: Sequence[int]) -> list[int]:
    layers = _get(_text(config), "num_hidden_layers")
    if layers is not None and len(lengths) != layers:
        raise ValueError(
            f"lengths: expected one length for each of the {layers} decoder layers, "
            f"got {len(lengths)}"
        )
    if any(n < 0 for n in lengths):
        raise ValueError(f"lengths: expected lengths of at least 0, got {min(lengths)}")
    return list(lengths)


@dataclass(frozen=True)
class _Decoder:
    """The sizes of a decoder-only language model that its cost depends on."""

    d: int
    q: int
    kv: int
    vocab: int
    mlp_macs: tuple[int, ...]
    window: tuple[int | None, ...]

    @classmethod
    def of(cls, config: Any, layers: int) -> _Decoder | None:
        text = _text(config)
        size = _get(text, "sliding_window")
        # Where no layer types are named (Mistral), a window holds for every layer.
        usual = "full_attention" if size is None else "sliding_attention"
        types = _get(text, "layer_types", default=[usual] * layers)
        if any(t not in ("full_attention", "sliding_attention") for t in types):
            return None  # linear or chunked attention: another formula
        d, heads = _get(text, "hidden_size"), _get(text, "num_attention_heads")
        if d is None or heads is None or _get(text, "is_encoder_decoder", default=False):
            return None
        head = _get(text, "head_dim", default=d // heads)
        kv_heads = _get(text, "num_key_value_heads", default=heads)
        mlp = _mlp_macs(text, d, layers)
        if mlp is None:
            return None
        window = tuple(size if t == "sliding_attention" else None for t in types)
        vocab = _get(text, "vocab_size", default=0)
        return cls(d, heads * head, kv_heads * head, vocab, mlp, window)

    def layer(self, index: int, queries: int, keys: int) -> int:
        """FLOPs of decoder layer `index` for `queries` new tokens that see `keys` keys."""
        linear = 2 * self.d * self.q + 2 * self.d * self.kv + self.mlp_macs[index]
        return 2 * queries * linear + 4 * queries * keys * self.q


def _mlp_macs(text: Any, d: int, layers: int) -> tuple[int, ...] | None:
    """Multiply-adds of each layer's feed-forward for one token, experts that are not used left out.

    Gated feed-forwards (three matrices) are what Llama, Qwen, Mistral, Gemma, Phi-3 and their kin
    have; the few ungated families are told by their type.
    """
    wide = _get(text, "intermediate_size", "ffn_dim")
    if wide is None:
        return None
    ungated = {"opt", "phi", "gpt_neox", "starcoder2", "bloom", "falcon"}
    matrices = 2 if _get(text, "model_type") in ungated else 3
    dense = matrices * d * (wide if isinstance(wide, int) else wide[0])
    experts = _get(text, "num_experts", "num_local_experts", "n_routed_experts")
    active = _get(text, "num_experts_per_tok")
    if not experts or not active:
        if isinstance(wide, int):
            return (dense,) * layers
        return tuple(matrices * d * w for w in wide)
    shared = _get(text, "n_shared_experts", "shared_expert_intermediate_size")
    if shared or not isinstance(wide, int):
        return None
    sparse = 3 * d * _get(text, "moe_intermediate_size", default=wide) * active + d * experts
    step = _get(text, "decoder_sparse_step", default=1)
    only_dense = set(_get(text, "mlp_only_layers", default=()))
    return tuple(
        sparse if i not in only_dense and (i + 1) % step == 0 else dense for i in range(layers)
    )


# ---- the vision tower and the projector ---------------------------------------------------------
def _vit(vision: Any, passed: Sequence[int], prefix: int) -> float:
    """FLOPs of a plain ViT over one tile. `passed` are the patches that enter each layer, and those
    that leave the last of these; layers beyond are as the last."""
    d = _get(vision, "hidden_size", "embed_dim")
    m = _get(vision, "intermediate_size", default=4 * d)
    layers = _get(vision, "num_hidden_layers", "depth")
    patch = _get(vision, "patch_size")
    patch = patch if isinstance(patch, int) else patch[0]
    pixels = _get(vision, "num_channels", "in_channels", default=3) * patch * patch
    total = 2.0 * passed[0] * pixels * d
    for i in range(layers):
        n, after = (passed[min(k, len(passed) - 1)] + prefix for k in (i, i + 1))
        total += 8 * n * d * d + 4 * n * n * d + 4 * after * d * m
    return total


def _tile_patches(vision: Any) -> int:
    size, patch = _get(vision, "image_size"), _get(vision, "patch_size")
    height, width = (size, size) if isinstance(size, int) else size
    ph, pw = (patch, patch) if isinstance(patch, int) else patch
    return (height // ph) * (width // pw)


def _siglip_head(vision: Any, n: int) -> float:
    """SigLIP's attention-pooling head, which runs even where its output is not used."""
    if not _get(vision, "vision_use_head", default=True):
        return 0.0
    d, m = _get(vision, "hidden_size"), _get(vision, "intermediate_size")
    return 2 * (2 * d * d + 2 * n * d * d) + 4 * n * d + 4 * d * m


def _vision_tower(
    config: Any, images: Sequence[int], tiles: Sequence[int], patches: Sequence[int] | None
) -> float:
    vision = _get(config, "vision_config")
    kind = _get(vision, "model_type", default="") if vision is not None else ""
    family = _get(config, "model_type", default="")
    if kind in ("clip_vision_model", "siglip_vision_model", "internvl_vision"):
        patches = patches or [_tile_patches(vision)]
        prefix = 0 if kind == "siglip_vision_model" else 1
        one = _vit(vision, patches, prefix)
        # InternVL's tower has no head; SigLIP's runs unless its configuration switches it off.
        if kind == "siglip_vision_model":
            one += _siglip_head(vision, patches[-1])
        return one * sum(tiles)
    if family in ("qwen2_vl",):
        # Full attention over all patches of an image; two frames go into a patch.
        d, depth = _get(vision, "embed_dim"), _get(vision, "depth")
        m = int(d * _get(vision, "mlp_ratio", default=4))
        merge = _get(vision, "spatial_merge_size", default=2) ** 2
        frames = _get(vision, "temporal_patch_size", default=2)
        pixels = 3 * frames * _get(vision, "patch_size") ** 2
        total = 0.0
        for tokens in images:
            n = tokens * merge
            total += 2 * n * pixels * d + depth * (8 * n * d * d + 4 * n * n * d + 4 * n * d * m)
        return total
    return math.nan  # a windowed or unknown tower


def _two_layer(n_in: str, n_out: str) -> Callable[[Any, int], float]:
    """A projector of two linear layers, in -> out -> out, over `tokens`."""

    def flops(config: Any, tokens: int) -> float:
        layers = _get(config, "vision_feature_layer", default=-2)
        stacked = 1 if isinstance(layers, int) else len(layers)
        a = _get(_get(config, "vision_config"), n_in) * stacked
        b = _get(_text(config), n_out)
        return 2.0 * tokens * (a * b + b * b)

    return flops


def _qwen_merger(config: Any, tokens: int) -> float:
    """Qwen2-VL: four patches side by side through a square layer and one to the model's width."""
    vision = _get(config, "vision_config")
    wide = _get(vision, "embed_dim") * _get(vision, "spatial_merge_size", default=2) ** 2
    return 2.0 * tokens * (wide * wide + wide * _get(_text(config), "hidden_size"))


def _internvl(config: Any, tokens: int) -> float:
    """InternVL: pixel-shuffled patches through two layers."""
    ratio = _get(config, "downsample_ratio", default=0.5)
    a = round(_get(_get(config, "vision_config"), "hidden_size") / ratio**2)
    b = _get(_text(config), "hidden_size")
    return 2.0 * tokens * (a * b + b * b)


_PROJECTORS: dict[str, Callable[[Any, int], float]] = {
    "llava": _two_layer("hidden_size", "hidden_size"),
    "llava_next": _two_layer("hidden_size", "hidden_size"),
    "llava_onevision": _two_layer("hidden_size", "hidden_size"),
    "qwen2_vl": _qwen_merger,
    "internvl": _internvl,
}


def _projected(
    config: Any, images: Sequence[int], tiles: Sequence[int], patches: Sequence[int] | None
) -> int:
    """Tokens that go through the projector: every tile's, before anything is cut off."""
    if _get(config, "model_type") in ("llava", "llava_next", "llava_onevision"):
        per_tile = patches[-1] if patches else _tile_patches(_get(config, "vision_config"))
        return per_tile * sum(tiles)
    return sum(images)


def _tile_tokens(config: Any) -> int:
    """Vision tokens of one tile at the tower's fixed size, 0 for towers without a fixed size."""
    vision = _get(config, "vision_config")
    if vision is None or _get(vision, "image_size") is None:
        return 0
    per_tile = _tile_patches(vision)
    if _get(config, "model_type") == "internvl":
        per_tile = round(per_tile * _get(config, "downsample_ratio", default=0.5) ** 2)
    return per_tile


def _tiles(config: Any, images: Sequence[int]) -> list[int]:
    """Tiles of each image, as few as hold its tokens."""
    per_tile = _tile_tokens(config)
    return [max(1, -(-n // per_tile)) if per_tile else 1 for n in images]


# ---- the public functions -----------------------------------------------------------------------
def prefill_flops(
    config: Any,
    lengths: Sequence[int],
    images: int | Sequence[int] = (),
    *,
    tiles: Sequence[int] | None = None,
    patches: int | Sequence[int] | None = None,
    logits: int = 1,
) -> Flops:
    """FLOPs of one sample's prefill, 2 per multiply-add.

    Args:
        config: a vision-language configuration of transformers (or a dictionary of one).
        lengths: for each decoder layer, the tokens it processes (text and vision).
        images: for each image of the sample, its vision tokens *before* compression; or the
            number of images where each is one tile of the tower's fixed size.
        tiles: for each image, the tiles that its vision tower ran on. Without it, as few as hold
            the image's tokens, which is exact for LLaVA-1.5 and InternVL and a lower bound where a
            family cuts padding off its tiles (LLaVA-NeXT, LLaVA-OneVision).
        patches: of each tile, where the tower ran on a smaller one than its configuration says; a
            sequence where patches are merged on the way: those that enter each layer, and those
            that leave the last.
        logits: positions for which the output head runs; `generate` asks for one.

    Raises:
        ValueError: `lengths` does not have one entry for each decoder layer, or `tiles` not one
            for each image.
    """
    lengths = _lengths(config, lengths)
    patches = [patches] if isinstance(patches, int) else patches
    if isinstance(images, int):
        images = [_tile_tokens(config)] * images
    if tiles is not None and len(tiles) != len(images):
        raise ValueError(
            f"tiles: expected one number for each of the {len(images)} images, got {len(tiles)}"
        )
    counts = list(tiles) if tiles is not None else _tiles(config, images)
    decoder = _Decoder.of(config, len(lengths))
    lm = math.nan
    if decoder is not None:
        lm = float(sum(decoder.layer(i, n, n) for i, n in enumerate(lengths)))
        lm += 2.0 * logits * decoder.d * decoder.vocab
    if not images:
        return Flops(0.0, 0.0, lm)
    projector = _PROJECTORS.get(_get(config, "model_type", default=""))
    return Flops(
        vision=_vision_tower(config, images, counts, patches),
        projector=projector(config, _projected(config, images, counts, patches))
        if projector
        else math.nan,
        lm=lm,
    )


def decode_flops(config: Any, lengths: Sequence[int]) -> float:
    """FLOPs of generating one token when the cache holds `lengths[i]` tokens in layer i.

    The new token sees the cached ones and itself. 2 per multiply-add, the output head included.
    """
    lengths = _lengths(config, lengths)
    decoder = _Decoder.of(config, len(lengths))
    if decoder is None:
        return math.nan
    layers = sum(decoder.layer(i, 1, n + 1) for i, n in enumerate(lengths))
    return float(layers + 2 * decoder.d * decoder.vocab)


def _bytes_per_value(config: Any) -> int:
    dtype = _get(config, "dtype", "torch_dtype") or _get(_text(config), "dtype", default="float32")
    if isinstance(dtype, str):
        sizes = {"float32": 4, "bfloat16": 2, "float16": 2, "half": 2, "float64": 8}
        return sizes[dtype.removeprefix("torch.")]
    return int(dtype.itemsize)


def kv_bytes(config: Any, lengths: Sequence[int], bytes_per_value: int | None = None) -> float:
    """Bytes of keys and values after a prefill with `lengths[i]` tokens in layer i.

    A layer with a sliding window holds less than the window. `bytes_per_value` is 2 for bfloat16
    and float16, 4 for float32; without it, the configuration's dtype decides (float32 if it names
    none). `nan` for language models whose layers do not all keep keys and values.
    """
    lengths = _lengths(config, lengths)
    decoder = _Decoder.of(config, len(lengths))
    if decoder is None:
        return math.nan
    size = bytes_per_value if bytes_per_value is not None else _bytes_per_value(config)
    # transformers' sliding cache keeps one token less than the window: the next one fills it.
    held = sum(
        min(n, window - 1) if window else n
        for n, window in zip(lengths, decoder.window, strict=True)
    )
    return float(2 * decoder.kv * held * size)


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
