# SPDX-License-Identifier: Apache-2.0
"""The cost of a vision tower and a projector, from a configuration and each image's tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from vtc.cost.configs import Unknown, get, pair, size, text_of

Grid = tuple[int, int, int]
"""Frames, rows and columns of an image's (or clip's) vision tokens."""
Patches = tuple[int, ...]
"""Patches of a tile that enter each tower layer, and those that leave the last; further layers are
like the last."""


@dataclass(frozen=True)
class Images:
    """The images of a sample.

    Attributes:
        tokens: vision tokens of each image before compression.
        tiles: tiles of each, or `None` if unknown.
        grids: grid of each, or `None` if unknown or not a block.
        patches: patches per tile of each, or for each of its tiles, or `None` if as in the
            configuration.
    """

    tokens: Sequence[int]
    tiles: Sequence[int] | None = None
    grids: Sequence[Grid | None] | None = None
    patches: Sequence[Patches | tuple[Patches, ...] | None] | None = None

    def grid(self, i: int) -> Grid | None:
        """The grid of image `i`, or `None`."""
        return None if self.grids is None else self.grids[i]

    def passed(self, i: int) -> Patches | None:
        """The patches per tile of image `i`, or `None`; of the first if they differ."""
        own: Any = None if self.patches is None else self.patches[i]
        return own[0] if own and isinstance(own[0], tuple) else own

    def by_tile(self, i: int, tiles: int, usual: Patches) -> list[Patches]:
        """The patches of each of the `tiles` tiles of image `i`; `usual` if unknown."""
        own: Any = None if self.patches is None else self.patches[i]
        if own and isinstance(own[0], tuple):
            return list(own)
        return [own or usual] * tiles

    @property
    def merged(self) -> list[Patches] | None:
        """The patches of each tile of all images, if they were merged in all; else `None`."""
        found: list[Patches] = []
        for own in self.patches or ():
            if not own or not isinstance(own[0], tuple):
                return None
            found += own
        return found or None


def vision_flops(config: Any, images: Images) -> float:
    """FLOPs of the vision tower over all images.

    Args:
        config: a vision-language configuration.
        images: the images of a sample.

    Returns:
        FLOPs, 2 per multiply-add.

    Raises:
        Unknown: a tower without a formula.
    """
    vision, family = _vision(config), _family(config)
    kind = get(vision, "model_type", default="")
    every = range(len(images.tokens))
    if kind in _NATIVE and images.merged is not None:
        windowed = None
        if kind == "qwen2_5_vl_vision":
            windowed = _windowed(vision, _segments(images, family.shrink(config), False))
        return _native_merged(vision, *_WIDTHS[kind](vision), images.merged, windowed)
    if kind in _NATIVE:
        averaged = kind == "kimi_k25_vision"
        return _NATIVE[kind](vision, _segments(images, family.shrink(config), averaged))
    if kind in _TILED:
        tower, tiles, usual = _TILED[kind], family.tiles(config, images), (_grid_patches(vision),)
        return sum(tower(vision, own) for i in every for own in images.by_tile(i, tiles[i], usual))
    if kind == "gemma4_vision":
        frames = images.tiles or [1] * len(images.tokens)
        of_images = [images.by_tile(i, frames[i], images.passed(i) or ()) for i in every]
        return sum(_gemma4(vision, own) for of_one in of_images for own in of_one)
    if kind == "mllama_vision_model":
        return sum(_mllama(vision, n) for n in _all_tiles(vision, images))
    raise Unknown(kind)


def projector_flops(config: Any, images: Images) -> float:
    """FLOPs of the projector over all images.

    Args:
        config: a vision-language configuration.
        images: the images of a sample.

    Returns:
        FLOPs, 2 per multiply-add.

    Raises:
        Unknown: a family without a formula.
    """
    vision, family = _vision(config), _family(config)
    shrink, kind = family.shrink(config), get(vision, "model_type", default="")
    tokens = sum(images.tokens)
    patches = round(tokens * shrink)
    if kind in _TILED:
        tiles, patches, usual = family.tiles(config, images), 0, _grid_patches(vision)
        made = 0
        for i, count in enumerate(tiles):
            grid = images.grid(i)
            for passed in images.by_tile(i, count, (usual,)):
                own = passed[0] if family.whole else passed[-1]
                if family.pools_first and grid is not None and grid[1] * grid[2] < usual:
                    own = own * grid[1] * grid[2] // usual
                patches += own
                # [CLS] of a frame is projected even if it does not count as a token.
                made += int(own / shrink) + (family.cls and count > 1)
        tokens = made
    elif (merged := images.merged) is not None and not family.whole:
        patches = sum(own[0] for own in merged)
        # Features of earlier layers have the tokens that were left there.
        read = [*(layer + 1 for layer in get(vision, "deepstack_visual_indexes", default=())), -1]
        left = [own[layer] for own in merged for layer in read]
        return 2.0 * family.macs(config, patches, int(sum(left) / shrink)) / len(read)
    elif kind == "mllama_vision_model":
        patches = tokens = sum(_all_tiles(vision, images)) * (_grid_patches(vision) + 1)
    return 2.0 * family.macs(config, patches, tokens)


def tile_tokens(config: Any) -> int:
    """Vision tokens of one tile at the tower's fixed size.

    Raises:
        Unknown: the tower has no fixed size.
    """
    return int(_grid_patches(_vision(config)) / _family(config).shrink(config))


# ---- towers -------------------------------------------------------------------------------------
def _vision(config: Any) -> Any:
    vision = get(config, "vision_config")
    if vision is None:
        raise Unknown("vision_config")
    return vision


def _grid_patches(vision: Any) -> int:
    (height, width), (ph, pw) = pair(vision, "image_size"), pair(vision, "patch_size")
    return (height // ph) * (width // pw)


def _embedding(vision: Any, d: int) -> int:
    """Multiply-adds of a patch's embedding."""
    height, width = pair(vision, "patch_size")
    frames = size(vision, "temporal_patch_size", default=1)
    return size(vision, "num_channels", "in_channels", default=3) * frames * height * width * d


def _fixed(prefix: int, matrices: int = 2, head: bool = False) -> Callable[..., float]:
    """A ViT over tiles of one size.

    Args:
        prefix: tokens in addition to the patches.
        matrices: matrices of the feed-forward.
        head: whether it may have SigLIP's head, which runs even if nothing reads it.
    """

    def flops(vision: Any, passed: Sequence[int]) -> float:
        d = size(vision, "hidden_size")
        m = size(vision, "intermediate_size", default=4 * d)
        total = 2.0 * passed[0] * _embedding(vision, d)
        for i in range(size(vision, "num_hidden_layers")):
            n, after = (passed[min(k, len(passed) - 1)] + prefix for k in (i, i + 1))
            total += 8 * n * d * d + 4 * n * n * d + 2 * matrices * after * d * m
        if head and get(vision, "vision_use_head", default=True):
            n = passed[-1]
            total += 2 * (2 * d * d + 2 * n * d * d) + 4 * n * d + 4 * d * m
        return total

    return flops


Segments = list[list[tuple[int, int, int]]]


def _segments(images: Images, shrink: float, averaged: bool) -> Segments:
    """For each image, its frames as (patches, rows of tokens, columns of tokens); 0 x 0 if
    unknown. Frames that are averaged later attend to one another, as one frame."""
    found = []
    for i, tokens in enumerate(images.tokens):
        frames, rows, columns = images.grid(i) or (1, 0, 0)
        times = images.tiles[i] if averaged and images.tiles is not None else 1
        found.append([(round(tokens * shrink) // frames * times, rows, columns)] * frames)
    return found


def _native_total(
    vision: Any, d: int, n: int, layer_macs: int, pairs: Sequence[int], embedding: int
) -> float:
    """A tower over `n` patches whose layer i attends between `pairs[i]` pairs of patches."""
    linear = n * (4 * d * d + layer_macs)
    return 2.0 * (n * embedding + sum(linear + 2 * p * d for p in pairs))


def _native_merged(
    vision: Any,
    d: int,
    layer_macs: int,
    depth: int,
    tiles: Sequence[Patches],
    windowed: Sequence[int] | None,
) -> float:
    """A tower in which each image or frame runs on its own and patches are merged; `windowed` are
    the pairs of each within its windows before that, of which the same share is taken to be left in
    each window."""
    total, embedding = 0.0, _embedding(vision, d)
    full = get(vision, "fullatt_block_indexes", default=())
    for number, passed in enumerate(tiles):
        total += passed[0] * embedding
        for i in range(depth):
            n, after = (passed[min(k, len(passed) - 1)] for k in (i, i + 1))
            pairs: float = n * n
            if windowed is not None and i not in full:
                pairs = windowed[number] * (n / passed[0]) ** 2
            total += n * 4 * d * d + 2 * pairs * d + after * layer_macs
    return 2.0 * total


def _patches(images: Segments) -> list[int]:
    return [n for frames in images for n, _, _ in frames]


def _gated_widths(vision: Any) -> tuple[int, int, int]:
    d = size(vision, "hidden_size")
    return d, 3 * d * size(vision, "intermediate_size"), size(vision, "depth", "num_hidden_layers")


def _qwen2_widths(vision: Any) -> tuple[int, int, int]:
    d = size(vision, "embed_dim")
    return d, 2 * d * int(d * get(vision, "mlp_ratio", default=4)), size(vision, "depth")


def _qwen3_widths(vision: Any) -> tuple[int, int, int]:
    d = size(vision, "hidden_size")
    return d, 2 * d * size(vision, "intermediate_size"), size(vision, "depth", "num_hidden_layers")


def _glm4v_widths(vision: Any) -> tuple[int, int, int]:
    d = size(vision, "hidden_size")
    return d, 3 * d * size(vision, "out_hidden_size"), size(vision, "depth")


def _pixtral(vision: Any, images: Segments) -> float:
    """Images are packed into one sequence with a block mask."""
    d, n = size(vision, "hidden_size"), sum(_patches(images))
    depth = size(vision, "num_hidden_layers")
    macs = 3 * d * size(vision, "intermediate_size")
    return _native_total(vision, d, n, macs, [n * n] * depth, _embedding(vision, d))


def _qwen2(vision: Any, images: Segments) -> float:
    """Full attention within a frame."""
    d, own = size(vision, "embed_dim"), _patches(images)
    macs = 2 * d * int(d * get(vision, "mlp_ratio", default=4))
    pairs = [sum(n * n for n in own)] * size(vision, "depth")
    return _native_total(vision, d, sum(own), macs, pairs, _embedding(vision, d))


def _windowed(vision: Any, images: Segments) -> list[int]:
    """For each frame of all images, the pairs of patches within a window."""
    merge, found = size(vision, "spatial_merge_size"), []
    side = size(vision, "window_size") // merge // size(vision, "patch_size")
    for frames in images:
        for n, rows, columns in frames:
            if rows:
                squares = [
                    sum(min(side, length - at) ** 2 for at in range(0, length, side))
                    for length in (rows, columns)
                ]
                found.append(squares[0] * squares[1] * merge**4)
            else:
                found.append(n * min(n, side**2 * merge**2))
    return found


def _qwen2_5(vision: Any, images: Segments) -> float:
    """Most layers attend within windows, smaller at a frame's borders."""
    d, own = size(vision, "hidden_size"), _patches(images)
    full, windowed = sum(n * n for n in own), sum(_windowed(vision, images))
    chosen = get(vision, "fullatt_block_indexes", default=())
    pairs = [full if i in chosen else windowed for i in range(size(vision, "depth"))]
    macs = 3 * d * size(vision, "intermediate_size")
    return _native_total(vision, d, sum(own), macs, pairs, _embedding(vision, d))


def _qwen3(vision: Any, images: Segments) -> float:
    d, own = size(vision, "hidden_size"), _patches(images)
    macs = 2 * d * size(vision, "intermediate_size")
    pairs = [sum(n * n for n in own)] * size(vision, "depth", "num_hidden_layers")
    return _native_total(vision, d, sum(own), macs, pairs, _embedding(vision, d))


def _glm4v(vision: Any, images: Segments) -> float:
    """The feed-forward has the language model's width, not `intermediate_size`."""
    d, own = size(vision, "hidden_size"), _patches(images)
    macs = 3 * d * size(vision, "out_hidden_size")
    pairs = [sum(n * n for n in own)] * size(vision, "depth")
    return _native_total(vision, d, sum(own), macs, pairs, _embedding(vision, d))


def _gemma4(vision: Any, passed: Sequence[int]) -> float:
    """Images are padded to a number of patches that only the processor knows."""
    if not passed:
        raise Unknown("patches")
    d = size(vision, "hidden_size")
    heads = size(vision, "num_attention_heads")
    head = size(vision, "head_dim", default=d // heads)
    kv = size(vision, "num_key_value_heads", default=heads)
    projections, feed = 2 * d * head * (heads + kv), 3 * d * size(vision, "intermediate_size")
    total = passed[0] * (
        _embedding(vision, d) + d * (passed[0] // size(vision, "pooling_kernel_size") ** 2)
    )
    for i in range(size(vision, "num_hidden_layers")):
        n, after = (passed[min(k, len(passed) - 1)] for k in (i, i + 1))
        total += n * projections + 2 * n * n * heads * head + after * feed
    return 2.0 * total


def _all_tiles(vision: Any, images: Images) -> Sequence[int]:
    """Tiles of each image, including padding, which runs as well."""
    if images.tiles is not None:
        return images.tiles
    return [size(vision, "max_num_tiles")] * len(images.tokens)


def _mllama(vision: Any, tiles: int) -> float:
    """All tiles of an image attend to one another; [CLS] and patches are padded to eights."""
    d, own = size(vision, "hidden_size"), _grid_patches(vision)
    depth = size(vision, "num_hidden_layers") + size(vision, "num_global_layers")
    n = -(-(own + 1) // 8) * 8 * tiles
    layer = n * (4 * d * d + 2 * d * size(vision, "intermediate_size")) + 2 * n * n * d
    return 2.0 * (own * tiles * _embedding(vision, d) + depth * layer)


_TILED: dict[str, Callable[[Any, Sequence[int]], float]] = {
    "clip_vision_model": _fixed(1),
    "idefics3_vision": _fixed(0),
    "internvl_vision": _fixed(1),
    "llama4_vision_model": _fixed(1),
    "ovis2_vision": _fixed(0, matrices=3),
    "siglip_vision_model": _fixed(0, head=True),
    "smolvlm_vision": _fixed(0),
}
_WIDTHS: dict[str, Callable[[Any], tuple[int, int, int]]] = {
    "glm4v_moe_vision": _glm4v_widths,
    "glm4v_vision": _glm4v_widths,
    "kimi_k25_vision": _qwen3_widths,
    "pixtral": _gated_widths,
    "qwen2_vl_vision": _qwen2_widths,
    "qwen2_5_vl_vision": _gated_widths,
    "qwen3_5_moe_vision": _qwen3_widths,
    "qwen3_5_vision": _qwen3_widths,
    "qwen3_vl_moe_vision": _qwen3_widths,
    "qwen3_vl_vision": _qwen3_widths,
}
"""By tower in which patches can be merged: width, multiply-adds per patch of a layer's
feed-forward, and layers."""
_NATIVE: dict[str, Callable[[Any, Segments], float]] = {
    "glm4v_moe_vision": _glm4v,
    "glm4v_vision": _glm4v,
    "kimi_k25_vision": _qwen3,
    "pixtral": _pixtral,
    "qwen2_5_vl_vision": _qwen2_5,
    "qwen2_vl_vision": _qwen2,
    "qwen3_5_moe_vision": _qwen3,
    "qwen3_5_vision": _qwen3,
    "qwen3_vl_moe_vision": _qwen3,
    "qwen3_vl_vision": _qwen3,
}


# ---- projectors ---------------------------------------------------------------------------------
# Each takes the configuration, patches (of all tiles) and vision tokens, and returns multiply-adds.
def _widths(config: Any) -> tuple[int, int]:
    """Widths of the tower, times the number of layers read, and of the language model."""
    layers = get(config, "vision_feature_layers", "vision_feature_layer", default=-2)
    stacked = 1 if isinstance(layers, int) else len(layers)
    return size(_vision(config), "hidden_size") * stacked, size(text_of(config), "hidden_size")


def _llava(config: Any, patches: int, tokens: int) -> int:
    a, b = _widths(config)
    return patches * (a * b + b * b)


def _video_llava(config: Any, patches: int, tokens: int) -> int:
    """[CLS] of each frame of a clip is projected, too."""
    a, b = _widths(config)
    return tokens * (a * b + b * b)


def _paligemma(config: Any, patches: int, tokens: int) -> int:
    vision = _vision(config)
    return patches * size(vision, "hidden_size") * size(vision, "projection_dim")


def _gemma(config: Any, patches: int, tokens: int) -> int:
    """Gemma 3 and 4: pooled, then one matrix."""
    width = size(_vision(config), "output_proj_dims", "hidden_size")
    return tokens * width * size(text_of(config), "hidden_size")


def _swiglu(config: Any, patches: int, tokens: int) -> int:
    """Aya Vision and Cohere 2 Vision: half of the hidden layer gates the other half."""
    a = size(_vision(config), "hidden_size") * size(config, "downsample_factor") ** 2
    b = size(text_of(config), "hidden_size")
    m = size(config, "alignment_intermediate_size", default=b)
    return tokens * (a * m + m // 2 * b)


def _internvl(config: Any, patches: int, tokens: int) -> int:
    a = round(size(_vision(config), "hidden_size") * _shuffled(config))
    b = size(text_of(config), "hidden_size")
    return tokens * (a * b + b * b)


def _idefics3(config: Any, patches: int, tokens: int) -> int:
    a = size(_vision(config), "hidden_size") * size(config, "scale_factor") ** 2
    return tokens * a * size(text_of(config), "hidden_size")


def _llama4(config: Any, patches: int, tokens: int) -> int:
    """The adapter in the tower, and a matrix."""
    vision = _vision(config)
    adapter = size(vision, "intermediate_size") * size(vision, "projector_input_dim")
    adapter += size(vision, "projector_output_dim") ** 2
    last = size(vision, "vision_output_dim") * size(text_of(config), "hidden_size")
    return tokens * (adapter + last)


def _mistral3(config: Any, patches: int, tokens: int) -> int:
    """Squares of patches are merged, then two layers."""
    d = size(_vision(config), "hidden_size")
    a, b = _widths(config)
    return tokens * (size(config, "spatial_merge_size") ** 2 * d * d + a * b + b * b)


def _mllama_projector(config: Any, patches: int, tokens: int) -> int:
    """One matrix, from all tower layers read."""
    return (
        tokens * size(_vision(config), "vision_output_dim") * size(text_of(config), "hidden_size")
    )


def _ovis2(config: Any, patches: int, tokens: int) -> int:
    """To the visual vocabulary, whose embeddings are then mixed."""
    vision = _vision(config)
    wide = size(vision, "hidden_size") * size(vision, "hidden_stride") ** 2
    words = size(vision, "vocab_size")
    real = words - size(vision, "num_visual_indicator_tokens")
    return tokens * (wide * real + words * size(text_of(config), "hidden_size"))


def _qwen(config: Any, patches: int, tokens: int) -> int:
    """Concatenated patches through a square and an output layer; once more per deepstack layer."""
    vision = _vision(config)
    wide = size(vision, "embed_dim", "hidden_size") * round(_merged(config))
    times = 1 + len(get(vision, "deepstack_visual_indexes", default=()))
    return times * tokens * (wide * wide + wide * size(text_of(config), "hidden_size"))


def _glm4v_merger(config: Any, patches: int, tokens: int) -> int:
    """A merging convolution, a square layer, and a gated feed-forward."""
    vision = _vision(config)
    d, out = size(vision, "hidden_size"), size(vision, "out_hidden_size")
    m = size(vision, "intermediate_size")
    return patches * d * out + tokens * (out * out + 3 * out * m)


def _kimi(config: Any, patches: int, tokens: int) -> int:
    wide = size(_vision(config), "hidden_size") * round(_kernel(config))
    return tokens * (wide * wide + wide * size(text_of(config), "hidden_size"))


# ---- families -----------------------------------------------------------------------------------
# Patches per vision token.
def _one(config: Any) -> float:
    return 1.0


def _shuffled(config: Any) -> float:
    return 1 / get(config, "downsample_ratio", default=0.5) ** 2


def _llama4_shuffled(config: Any) -> float:
    return 1 / get(_vision(config), "pixel_shuffle_ratio", default=0.5) ** 2


def _factor(config: Any) -> float:
    return size(config, "downsample_factor", "scale_factor") ** 2


def _pooled(config: Any) -> float:
    return _grid_patches(_vision(config)) / size(config, "mm_tokens_per_image")


def _gemma4_pooled(config: Any) -> float:
    return size(_vision(config), "pooling_kernel_size") ** 2


def _merged(config: Any) -> float:
    where = config if get(config, "spatial_merge_size") is not None else _vision(config)
    return size(where, "spatial_merge_size", default=2) ** 2


def _kernel(config: Any) -> float:
    height, width = pair(_vision(config), "merge_kernel_size")
    return height * width


def _stride(config: Any) -> float:
    return size(_vision(config), "hidden_stride") ** 2


@dataclass(frozen=True)
class _Family:
    """How a family makes vision tokens from patches.

    Attributes:
        macs: multiply-adds of its projector.
        shrink: patches per vision token.
        cls: whether clips keep [CLS] of each frame.
        pools_first: whether frames of clips are pooled before the projector.
        whole: whether the projector runs on all places, also of merged patches.
    """

    macs: Callable[[Any, int, int], int]
    shrink: Callable[[Any], float] = _one
    cls: bool = False
    pools_first: bool = False
    whole: bool = False

    def tiles(self, config: Any, images: Images) -> Sequence[int]:
        """Tiles of each image; if unknown, as few as hold its tokens."""
        if images.tiles is not None:
            return images.tiles
        per_tile = tile_tokens(config)
        if self.cls:  # an image is one tile
            return [1 if n == per_tile else -(-n // (per_tile + 1)) for n in images.tokens]
        return [max(1, -(-n // per_tile)) for n in images.tokens]


def _family(config: Any) -> _Family:
    name = get(config, "model_type", default="")
    if name not in _FAMILIES:
        raise Unknown(name)
    return _FAMILIES[name]


_FAMILIES = {
    "aya_vision": _Family(_swiglu, _factor, whole=True),
    "cohere2_vision": _Family(_swiglu, _factor, whole=True),
    "deepseek_vl": _Family(_llava),
    "gemma3": _Family(_gemma, _pooled, whole=True),
    "gemma4": _Family(_gemma, _gemma4_pooled),
    "glm46v": _Family(_glm4v_merger, _merged),
    "glm4v": _Family(_glm4v_merger, _merged),
    "glm4v_moe": _Family(_glm4v_merger, _merged),
    "idefics3": _Family(_idefics3, _factor),
    "internvl": _Family(_internvl, _shuffled),
    "kimi_k25": _Family(_kimi, _kernel, whole=True),
    "llama4": _Family(_llama4, _llama4_shuffled, whole=True),
    "llava": _Family(_llava),
    "llava_next": _Family(_llava),
    "llava_next_video": _Family(_llava, pools_first=True),
    "llava_onevision": _Family(_llava),
    "mistral3": _Family(_mistral3, _merged, whole=True),
    "mllama": _Family(_mllama_projector),
    "ovis2": _Family(_ovis2, _stride),
    "paligemma": _Family(_paligemma),
    "qwen2_5_vl": _Family(_qwen, _merged),
    "qwen2_vl": _Family(_qwen, _merged),
    "qwen3_5": _Family(_qwen, _merged),
    "qwen3_5_moe": _Family(_qwen, _merged),
    "qwen3_vl": _Family(_qwen, _merged),
    "qwen3_vl_moe": _Family(_qwen, _merged),
    "smolvlm": _Family(_idefics3, _factor),
    "video_llava": _Family(_video_llava, cls=True),
    "vipllava": _Family(_llava),
}
