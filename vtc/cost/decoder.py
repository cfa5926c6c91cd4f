# SPDX-License-Identifier: Apache-2.0
"""The cost of a decoder layer, from the configuration."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from vtc.cost.configs import Unknown, get, of_layer, size, text_of

GATED = frozenset({
    "chameleon", "cohere", "cohere2", "emu3_text_model", "ernie4_5", "exaone4", "gemma", "gemma2",
    "gemma3_text", "gemma4_text", "glm", "glm4", "glm4v_text", "granite", "helium", "llama",
    "ministral", "ministral3", "mistral", "mllama_text_model", "olmo", "olmo2", "olmo3", "phi3",
    "qwen2", "qwen2_5_vl_text", "qwen2_vl_text", "qwen3", "qwen3_vl_text", "seed_oss", "smollm3",
    "stablelm",
})  # fmt: skip
"""Types with query, key, value and output matrices and a feed-forward of three."""
UNGATED = frozenset({"arcee", "nemotron", "opt", "phi", "starcoder2"})
"""The same with a feed-forward of two matrices."""
_CROSSED = "mllama_text_model"
"""The type with cross-attention layers, which attend to vision states instead of tokens."""
_DEEPSEEK = frozenset({"deepseek_v3", "glm4_moe", "glm4v_moe_text"})
_QWEN = frozenset({"qwen2_moe", "qwen3_moe", "qwen3_vl_moe_text"})
EXPERTS = _DEEPSEEK | _QWEN | {"llama4_text", "mixtral"}
"""Types in which some layers have experts instead of the feed-forward."""


@dataclass(frozen=True)
class Layer:
    """Sizes of a decoder layer that determine its cost.

    Attributes:
        linear: multiply-adds of its matrices for each new token.
        expand: further multiply-adds per key: latent attention rebuilds all visible keys from
            the cache, a cross-attention layer computes those of the vision states once.
        attention: multiply-adds for each pair of a new token and a key.
        cached: values cached per token; 0 if it shares another layer's keys.
        window: maximum number of keys that a token sees, or `None`.
        crosses: whether keys and values come from vision states instead of tokens.
    """

    linear: int
    expand: int
    attention: int
    cached: int
    window: int | None
    crosses: bool = False

    def prefill(self, length: int, tokens: int) -> int:
        """FLOPs of a prefill, 2 per multiply-add.

        Args:
            length: its tokens; for a cross-attention layer the vision states.
            tokens: the tokens of a cross-attention layer.
        """
        if not self.crosses:
            return self.flops(length, length)
        return self.flops(tokens, length) if length else 0  # it does not run without states

    def step(self, length: int) -> int:
        """FLOPs of one new token after `length` tokens (or states)."""
        if not self.crosses:
            return self.flops(1, self.held(length) + 1)
        return 2 * (self.linear + length * self.attention) if length else 0

    def flops(self, queries: int, keys: int) -> int:
        """FLOPs of `queries` new tokens that see `keys` keys, 2 per multiply-add."""
        pairs = queries * keys
        return 2 * (queries * self.linear + keys * self.expand + pairs * self.attention)

    def held(self, tokens: int) -> int:
        """Tokens out of `tokens` that its cache holds."""
        # transformers' sliding cache keeps one token less than the window; the next fills it.
        return min(tokens, self.window - 1) if self.window else tokens


@dataclass(frozen=True)
class Decoder:
    """The layers of a language model.

    Attributes:
        layers: the layers in order.
        head: multiply-adds of the output head per position.
        entry: multiply-adds outside the layers for each token that enters.
    """

    layers: tuple[Layer, ...]
    head: int
    entry: int

    def tokens(self, lengths: Sequence[int]) -> int:
        """Tokens that enter: the length of the first layer that is not a cross-attention layer."""
        own = (n for layer, n in zip(self.layers, lengths, strict=True) if not layer.crosses)
        return next(own, 0)


def decoder_of(config: Any, count: int) -> Decoder:
    """The decoder of `config` with `count` layers.

    Raises:
        Unknown: a type without a formula.
    """
    text = text_of(config)
    kind = get(text, "model_type", default="llama")
    if kind not in GATED | UNGATED | EXPERTS or get(text, "is_encoder_decoder", default=False):
        raise Unknown(kind)
    d = size(text, "hidden_size")
    windows = _windows(text, count)
    shared_from = count - size(text, "num_kv_shared_layers", default=0)
    feed_forward = _feed_forward(text, kind, d, count, shared_from)
    own = size(text, "hidden_size_per_layer_input", default=0)  # Gemma 4 for devices
    crossing = get(text, "cross_attention_layers", default=()) if kind == _CROSSED else ()
    if count and set(range(count)) <= set(crossing):
        raise Unknown("cross_attention_layers")  # no layer gives the number of tokens
    layers = []
    for i in range(count):
        rest = feed_forward[i] + 2 * d * own
        if kind == "deepseek_v3":
            layers.append(_latent(text, d, rest))
        elif i in crossing:
            layers.append(_cross(text, d, rest))
        else:
            equal = bool(get(text, "attention_k_eq_v", default=False)) and windows[i] is None
            layers.append(_plain(of_layer(text, i), d, rest, windows[i], equal, i >= shared_from))
    return Decoder(tuple(layers), d * size(text, "vocab_size", default=0), d * own * count)


def _windows(text: Any, count: int) -> list[int | None]:
    window = get(text, "sliding_window")
    # Without layer types (Mistral), a window applies to every layer.
    usual = "full_attention" if window is None else "sliding_attention"
    lengths = {
        "full_attention": None,
        "sliding_attention": window,
        "chunked_attention": get(text, "attention_chunk_size"),
    }
    types = get(text, "layer_types", default=[usual] * count)
    if len(types) < count or any(t not in lengths for t in types):
        raise Unknown("layer_types")  # linear attention, say
    return [lengths[t] for t in types[:count]]


def _plain(text: Any, d: int, rest: int, window: int | None, equal: bool, shared: bool) -> Layer:
    """`equal`: keys also serve as values. `shared`: they are another layer's."""
    heads = size(text, "num_attention_heads")
    # GLM-4V's attention ignores head_dim.
    own = get(text, "head_dim") if get(text, "model_type") != "glm4v_text" else None
    head = own or d // heads
    kv = size(text, "num_key_value_heads", default=heads) * head
    made = 0 if shared else 1 if equal else 2
    linear = 2 * d * heads * head + made * d * kv + rest
    return Layer(linear, 0, 2 * heads * head, 0 if shared else 2 * kv, window)


def _cross(text: Any, d: int, rest: int) -> Layer:
    """Queries of the tokens, keys and values of the vision states."""
    heads = size(text, "num_attention_heads")
    query = heads * (d // heads)
    kv = size(text, "num_key_value_heads", default=heads) * (d // heads)
    return Layer(2 * d * query + rest, 2 * d * kv, 2 * query, 2 * kv, None, crosses=True)


def _latent(text: Any, d: int, rest: int) -> Layer:
    """Multi-head latent attention; the cache holds latents, expanded in every forward."""
    heads, rank = size(text, "num_attention_heads"), size(text, "kv_lora_rank")
    rotary, value = size(text, "qk_rope_head_dim"), size(text, "v_head_dim")
    plain = size(text, "qk_nope_head_dim")
    query = heads * (plain + rotary)
    low = get(text, "q_lora_rank")
    linear = d * query if low is None else low * (d + query)
    linear += d * (rank + rotary) + heads * value * d + rest
    expand = rank * heads * (plain + value)
    return Layer(linear, expand, query + heads * value, rank + rotary, None)


# ---- feed-forwards ------------------------------------------------------------------------------
def _feed_forward(text: Any, kind: str, d: int, count: int, shared_from: int) -> list[int]:
    """Multiply-adds of each layer's feed-forward for one token, without unrouted experts."""
    matrices = 2 if kind in UNGATED else 3
    dense_name = {"llama4_text": "intermediate_size_mlp", "opt": "ffn_dim"}
    wide = get(text, dense_name.get(kind, "intermediate_size"))
    widths: Sequence[Any] = [wide] * count if isinstance(wide, int) else list(wide or ())
    if len(widths) < count or not all(isinstance(w, int) for w in widths):
        raise Unknown("intermediate_size")
    dense = [matrices * d * w for w in widths[:count]]
    if get(text, "use_double_wide_mlp", default=False):
        dense = [n * 2 if i >= shared_from else n for i, n in enumerate(dense)]
    if kind == "gemma4_text":
        beside = _experts(text, kind, d) if get(text, "enable_moe_block", default=False) else 0
        return [n + beside for n in dense]
    if kind not in EXPERTS:
        return dense
    sparse, chosen = _experts(text, kind, d), _sparse_layers(text, kind, count)
    return [sparse if i in chosen else n for i, n in enumerate(dense)]


def _experts(text: Any, kind: str, d: int) -> int:
    """Multiply-adds of the router, the routed experts and the shared experts."""
    experts = size(text, "num_experts", "num_local_experts", "n_routed_experts")
    active = size(text, "num_experts_per_tok", "top_k_experts")
    own = "intermediate_size" if kind in ("llama4_text", "mixtral") else "moe_intermediate_size"
    width = size(text, own)
    shared = 0
    if kind in _DEEPSEEK:
        shared = 3 * d * width * size(text, "n_shared_experts")
    elif kind == "llama4_text":
        shared = 3 * d * width
    elif kind == "qwen2_moe":
        shared = 3 * d * size(text, "shared_expert_intermediate_size") + d
    return d * experts + 3 * d * width * active + shared


def _sparse_layers(text: Any, kind: str, count: int) -> set[int]:
    if kind == "llama4_text":
        return set(get(text, "moe_layers", default=()))
    if kind in _DEEPSEEK:
        return set(range(size(text, "first_k_dense_replace"), count))
    if kind in _QWEN:
        step = size(text, "decoder_sparse_step")
        dense = get(text, "mlp_only_layers", default=())
        return {i for i in range(count) if i not in dense and (i + 1) % step == 0}
    return set(range(count))
