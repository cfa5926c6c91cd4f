# SPDX-License-Identifier: Apache-2.0
"""Methods on models with quantised linear layers, loaded as users load them, held to the masked
reference of the same quantised model.

Three kinds of scheme. Those that quantise only weights are exact as any model is. Those that round
what enters or leaves a linear layer, token by token, are exact where nothing else rounds: a sum in
another order, which a shorter sequence is, may turn such a rounding, in one number of a million.
For them `steady` takes every other rounding away. Those that share a scale between tokens have no
masked reference: what a token is rounded to depends on the tokens that are there.
"""

from __future__ import annotations

import copy
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    LlavaForConditionalGeneration,
    TorchAoConfig,
)
from vtc.eval.embedded.vlm import embedded_path

import vtc
from tests.conftest import Recorder
from tests.reference.families import FAMILIES
from tests.reference.masked import Masked
from tests.reference.models import (
    IMAGE,
    LAYERS,
    Sample,
    _draw_weights,
    build_model,
    collate,
    samples,
)
from tests.reference.reference import Truth
from tests.runtime import test_families as families
from tests.runtime.test_compile import compiled, forget, off
from tests.runtime.test_exactness import (
    CONTROL,
    METHODS,
    TOLERANCE,
    difference,
    positions_of,
    run_generate,
    some_now,
)
from tests.runtime.test_families import PROBES
from tests.runtime.test_pixels import small_picture_logits

WIDTH, HEADS = 64, 4
"""bitsandbytes packs 64 weights of a row into a block."""


# ---- loading ------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Scheme:
    """A way to quantise.

    Attributes:
        package: that it needs.
        load: loads the checkpoint in a folder.
    """

    package: str
    load: Callable[[Path], Any]


def _loader(config: Callable[[], Any]) -> Callable[[Path], Any]:
    return lambda folder: LlavaForConditionalGeneration.from_pretrained(
        folder, dtype=torch.float32, quantization_config=config()
    )


def torchao(name: str, **settings: Callable[[Any], Any]) -> Scheme:
    """The torchao config `name`; `settings` are made from the package."""

    def config() -> Any:
        import torchao.quantization as package

        made = {key: value(package) for key, value in settings.items()}
        # Otherwise the config changes settings of torch.compile for the whole process.
        if "set_inductor_config" in getattr(package, name).__dataclass_fields__:
            made["set_inductor_config"] = False
        return TorchAoConfig(getattr(package, name)(**made))

    return Scheme("torchao", _loader(config))


def bitsandbytes(**settings: Any) -> Scheme:
    return Scheme("bitsandbytes", _loader(lambda: BitsAndBytesConfig(**settings)))


def gguf(kind: str) -> Scheme:
    """transformers reads decoders from GGUF, and dequantises them."""

    def load(folder: Path) -> Any:
        model = LlavaForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)
        _write_gguf(model, folder / f"{kind}.gguf", kind)
        decoder: Any = AutoModelForCausalLM.from_pretrained(folder, gguf_file=f"{kind}.gguf")
        model.model.language_model, model.lm_head = decoder.model, decoder.lm_head
        return model

    return Scheme("gguf", load)


def _write_gguf(model: Any, path: Path, kind: str) -> None:
    """The decoder of `model` as llama.cpp's converter writes it."""
    import gguf as package

    writer, config = package.GGUFWriter(path, "llama"), model.config.text_config
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_vocab_size(config.vocab_size)
    names = package.get_tensor_name_map(package.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    weights = {f"model.{k}": v for k, v in model.model.language_model.state_dict().items()}
    weights["lm_head.weight"] = model.lm_head.weight
    for name, weight in weights.items():
        value = weight.detach().numpy()
        for part, heads in (("q_proj", "num_attention_heads"), ("k_proj", "num_key_value_heads")):
            if part in name:  # llama.cpp rotates neighbours, not halves
                pairs = value.reshape(getattr(config, heads), 2, -1, value.shape[1])
                value = pairs.swapaxes(1, 2).reshape(value.shape)
        to = "F32" if value.ndim == 1 else kind
        packed = package.quantize(np.ascontiguousarray(value), package.GGMLQuantizationType[to])
        own = names.get_name(name, try_suffixes=(".weight",))
        writer.add_tensor(own, packed, raw_dtype=package.GGMLQuantizationType[to])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


WEIGHTS: dict[str, Scheme] = {
    "torchao int8": torchao("Int8WeightOnlyConfig"),
    "torchao int4": torchao(
        "IntxWeightOnlyConfig",
        weight_dtype=lambda package: torch.int4,
        granularity=lambda package: package.PerGroup(16),
    ),
    "torchao float8": torchao("Float8WeightOnlyConfig"),
    "gguf Q8_0": gguf("Q8_0"),
    "gguf Q4_0": gguf("Q4_0"),
}
"""Only weights are quantised."""
BY_TOKEN: dict[str, Scheme] = {
    "torchao int8 dynamic": torchao("Int8DynamicActivationInt8WeightConfig"),
    "torchao int8 dynamic, int4": torchao(
        "Int8DynamicActivationIntxWeightConfig",
        weight_dtype=lambda package: torch.int4,
        weight_granularity=lambda package: package.PerGroup(16),
    ),
    "bitsandbytes int8, no outliers": bitsandbytes(load_in_8bit=True, llm_int8_threshold=0.0),
    "bitsandbytes nf4": bitsandbytes(load_in_4bit=True, bnb_4bit_quant_type="nf4"),
    "bitsandbytes fp4": bitsandbytes(load_in_4bit=True, bnb_4bit_quant_type="fp4"),
}
"""What enters or leaves a layer is rounded, each token by itself. (bitsandbytes' 4 bits are weights
only, but some CPUs multiply in bfloat16.)"""
COUPLED: dict[str, Scheme] = {
    "torchao int8 dynamic, per tensor": torchao(
        "Int8DynamicActivationInt8WeightConfig", granularity=lambda package: package.PerTensor()
    ),
    "bitsandbytes int8": bitsandbytes(load_in_8bit=True),
}
"""One scale for all tokens of a call; or columns in which any token has an outlier."""
SCHEMES = {**WEIGHTS, **BY_TOKEN, **COUPLED}
CHOSEN = [
    *("divprune", "visionzip", "flowcut", "tome", "fastv", "todre-maxsum-drops", "dart"),
    *("transprune", "vscan", "sparsevlm", "catp"),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoint of a tiny model."""
    config: Any = copy.deepcopy(build_model().config)
    for part in (config.text_config, config.vision_config):
        part.hidden_size, part.intermediate_size = WIDTH, 2 * WIDTH
    config.text_config.head_dim = WIDTH // HEADS
    model: Any = LlavaForConditionalGeneration._from_config(config)
    _draw_weights(model, 0)
    own = model.generation_config
    own.pad_token_id, own.bos_token_id, own.eos_token_id = 0, 1, None
    path = tmp_path_factory.mktemp("checkpoint")
    model.save_pretrained(path)
    return path


@cache
def loaded(name: str, folder: Path, copy: int = 0) -> Any:
    """The quantised model. The reference reads copy 1, which no test patches."""
    scheme = SCHEMES[name]
    if importlib.util.find_spec(scheme.package) is None:
        pytest.skip(f"needs {scheme.package}: pip install 'vision-token-compression[quantised]'")
    model = scheme.load(folder).eval()
    return steady(model) if name in BY_TOKEN else model


def quantised(model: nn.Module) -> list[nn.Module]:
    """The layers whose weights are not plain tensors."""
    return [
        module
        for module in model.modules()
        if isinstance(module, nn.Linear) and type(module.weight) is not nn.Parameter
    ]


def steady(model: Any, rows: int = 160) -> Any:
    """Round in the quantised layers only: these take fp32 and the same number of tokens at every
    call, and everything else computes in fp64."""
    layers = quantised(model)
    own = {id(weight) for layer in layers for weight in layer.parameters()}
    for layer in layers:

        def forward(x: Tensor, layer: nn.Module = layer, run: Any = layer.forward) -> Tensor:
            flat = x.flatten(0, -2).float()
            assert len(flat) <= rows
            out = run(nn.functional.pad(flat, (0, 0, 0, rows - len(flat))))[: len(flat)]
            return out.double().view(*x.shape[:-1], -1)

        layer.forward = forward  # type: ignore[method-assign]
    for weight in model.parameters():
        if id(weight) not in own:
            weight.data = weight.data.double()
    return model


# ---- exactness ----------------------------------------------------------------------------------
def run_padded(model: Any, rows: tuple[Sample, ...], expected: list[Truth]) -> float:
    """Padded on either side. Each row's positions start at 0, as `generate` has them."""
    worst = 0.0
    for side in ("left", "right"):
        batch = collate(rows, side)
        real = batch["attention_mask"].bool()
        with torch.no_grad():
            logits = model(**batch, position_ids=positions_of(batch["attention_mask"])).logits
        for i, truth in enumerate(expected):
            worst = max(worst, difference(logits[i, real[i]], truth.logits()[0]))
    return worst


def largest(name: str, method: str, kind: str, folder: Path) -> tuple[float, float]:
    """The largest difference from the reference, at prefill and through cached decoding; and the
    least of the unpruned model."""
    rows, made = samples(kind, "clip"), METHODS[method]
    model, pristine = loaded(name, folder), loaded(name, folder, 1)
    expected = [Truth(pristine, made(), row) for row in rows]
    plain = [Truth(pristine, None, row) for row in rows]
    pairs = zip(expected, plain, strict=True)
    control = min(difference(a.logits()[0, -1], b.logits()[0, -1]) for a, b in pairs)
    with vtc.patch(model, made()):
        found = run_padded(model, rows, expected), run_generate(model, rows, expected)
    return max(found), control


@pytest.mark.parametrize(
    ("method", "name", "kind"), some_now(7, CHOSEN, [*WEIGHTS, *BY_TOKEN], ("one", "ragged"))
)
def test_held_to_the_masked_reference(
    method: str, name: str, kind: str, folder: Path, recorder: Recorder
) -> None:
    found, control = largest(name, method, kind, folder)
    recorder.note(f"{name} {method} {kind}", found, control)
    assert control > CONTROL
    # `generate` returns logits in fp32.
    assert found < (1e-6 if name in BY_TOKEN else TOLERANCE)


@pytest.mark.parametrize("name", [*WEIGHTS, "bitsandbytes nf4"])
def test_fewer_pixels_equal_a_smaller_picture(name: str, folder: Path) -> None:
    model, batch = loaded(name, folder), collate(samples("one", "clip"))
    if name not in WEIGHTS:  # the tower takes the pixels as they are
        batch["pixel_values"] = batch["pixel_values"].double()
    with torch.no_grad():
        expected = small_picture_logits(model, batch, 3, contiguous=False)
        with vtc.patch(model, vtc.Downsample(keep=9, how="pixels")):
            found = model(**batch).logits[0, -1]
    assert difference(found, expected) < TOLERANCE


@pytest.mark.parametrize("name", SCHEMES)
def test_the_layers_are_quantised(name: str, folder: Path) -> None:
    """In the tower, in the projector and in the decoder; not the plain model under a name."""
    model, plain = loaded(name, folder), LlavaForConditionalGeneration.from_pretrained(folder)
    batch = collate(samples("one", "clip"))
    with torch.no_grad():
        away = difference(model(**batch).logits.float(), plain(**batch).logits)
    assert 1e-3 < away < 10
    if SCHEMES[name].package == "gguf":  # dequantised, and in the decoder alone
        assert quantised(model) == []
        queries = [m.model.language_model.layers[0].self_attn.q_proj.weight for m in (model, plain)]
        assert 0 < difference(*queries) < 0.1
        return
    parts = model.model.vision_tower, model.model.multi_modal_projector, model.model.language_model
    assert all(quantised(part) for part in parts)
    assert len(quantised(model.model.language_model)) == 7 * LAYERS


@pytest.mark.parametrize("name", SCHEMES)
def test_patching_leaves_the_layers_alone(name: str, folder: Path) -> None:
    """Whole, a picture or none: bit for bit what the plain model says, then and afterwards; copies
    are patched as the model is."""
    model, batch = loaded(name, folder), collate(samples("ragged", "clip"))
    with torch.no_grad():
        plain = model(**batch).logits
        with vtc.patch(model, vtc.FastV(keep=1.0)):
            assert torch.equal(model(**batch).logits, plain)
        with vtc.patch(model, vtc.FastV(keep=0.3)):
            pruned = model(**batch).logits
            text = collate(samples("text", "clip"))
            said = model(**text).logits
            twin = copy.deepcopy(model) if name in WEIGHTS else model
        assert torch.equal(model(**text).logits, said)
        assert torch.equal(model(**batch).logits, plain)
        if twin is not model:
            assert torch.equal(twin(**batch).logits, pruned)
    assert difference(pruned[:, -1], plain[:, -1]) > CONTROL


# ---- schemes whose scales are shared ------------------------------------------------------------
def through_a_layer(name: str, folder: Path) -> tuple[Tensor, Tensor]:
    """What a quantised layer makes of tokens beside one of large features, and of them alone."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randn(20, WIDTH, generator=generator)
    tokens[-1] *= 20
    layer = loaded(name, folder).model.language_model.layers[0].self_attn.q_proj
    with torch.no_grad():
        return layer(tokens)[:-1], layer(tokens[:-1])


@pytest.mark.parametrize("name", SCHEMES)
def test_which_schemes_share_scales_between_tokens(name: str, folder: Path) -> None:
    beside, alone = through_a_layer(name, folder)
    assert (difference(beside, alone) > 1e-3) == (name in COUPLED)


@pytest.mark.parametrize("name", COUPLED)
@pytest.mark.parametrize("method", ["divprune", "visionzip", "tome", "flowcut", "downsample"])
def test_what_holds_where_scales_are_shared(method: str, name: str, folder: Path) -> None:
    """A masked token would have its part in the scales. Of a prompt by itself, the patched model
    says what the decoder says of the tokens that are kept, and so do its steps."""
    model, batch = loaded(name, folder), collate(samples("one", "clip"))
    decoder, entered = model.model.language_model, {}

    def note(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        entered.update({k: kwargs[k].clone() for k in ("inputs_embeds", "position_ids")})

    word = torch.tensor([[7]])
    with torch.no_grad():
        with vtc.patch(model, METHODS[method]()):
            handle = decoder.register_forward_pre_hook(note, with_kwargs=True)
            out = model(**batch, use_cache=True)
            handle.remove()
            step = model(input_ids=word, past_key_values=out.past_key_values).logits
        own = decoder(
            **entered,
            attention_mask=torch.ones(entered["inputs_embeds"].shape[:2], dtype=torch.long),
            use_cache=True,
        )
        assert own.last_hidden_state.shape[1] < batch["input_ids"].shape[1]
        found = model.lm_head(own.last_hidden_state[:, -1])
        assert difference(out.logits[:, -1], found) < TOLERANCE
        last = entered["position_ids"][:, -1:] + 1
        next_state = decoder(
            input_ids=word, position_ids=last, past_key_values=own.past_key_values
        ).last_hidden_state
        assert difference(step, model.lm_head(next_state)) < TOLERANCE


# ---- beside quantised layers --------------------------------------------------------------------
@pytest.mark.parametrize("what", ["embeddings", "lora"])
def test_quantised_embeddings_and_adapters(what: str, folder: Path) -> None:
    """On a static cache, too, whose steps read the type of the embeddings."""
    model, pristine = (copy.deepcopy(loaded("torchao int8", folder)) for _ in range(2))
    for one in (model, pristine):
        if what == "lora":
            torch.manual_seed(0)
            config = peft.LoraConfig(target_modules=["q_proj", "v_proj"], init_lora_weights=False)
            peft.inject_adapter_in_model(config, one.model.language_model)
        else:
            _quantise(one, nn.Embedding)
    rows = samples("ragged", "clip")
    expected = [Truth(pristine, METHODS["fastv"](), row) for row in rows]
    plain = Truth(loaded("torchao int8", folder, 1), METHODS["fastv"](), rows[0])
    assert difference(expected[0].logits()[0, -1], plain.logits()[0, -1]) > 1e-3
    with vtc.patch(model, METHODS["fastv"]()):
        assert run_padded(model, rows, expected) < TOLERANCE
        assert run_generate(model, rows, expected, cache_implementation="static") < TOLERANCE


def _quantise(model: nn.Module, kind: type[nn.Module]) -> None:
    """Quantise the weights of all modules of a kind to int8, in place."""
    import torchao.quantization as package

    config = package.IntxWeightOnlyConfig(weight_dtype=torch.int8)
    package.quantize_(model, config, filter_fn=lambda module, name: isinstance(module, kind))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["torchao int8", "torchao int4", "gguf Q8_0"])
def test_compiled_steps(name: str, folder: Path) -> None:
    model, rows = loaded(name, folder), samples("ragged", "clip")
    batch = collate(rows)
    expected = [Truth(loaded(name, folder, 1), METHODS["fastv"](), row) for row in rows]
    forget()
    with vtc.patch(model, METHODS["fastv"]()):
        out, graphs = compiled(model, batch)
    forget()
    assert graphs == [0, 1, 1, 1]
    assert off(out, batch, expected) < TOLERANCE


# ---- families -----------------------------------------------------------------------------------
QUANTISED = ("qwen2_vl", "qwen2_5_vl", "internvl", "gemma3", "llava_onevision", "qwen3_5")


@pytest.mark.parametrize(
    ("name", "probe"), some_now(5, QUANTISED, ("divprune", "fastv", "ragged|layers"))
)
def test_families(name: str, probe: str, recorder: Recorder) -> None:
    """Their linear layers, those of towers and heads included."""
    if importlib.util.find_spec("torchao") is None:
        pytest.skip("needs torchao: pip install 'vision-token-compression[quantised]'")
    family, rows = FAMILIES[name], FAMILIES[name].rows("ragged")
    model, pristine = family.build("sdpa"), family.build("eager")
    for one in (model, pristine):
        _quantise(one, nn.Linear)
    assert quantised(model)
    method = PROBES[probe](family)
    expected = [Masked(family, pristine, method, row) for row in rows]
    plain = [Masked(family, pristine, None, row) for row in rows]
    pairs = zip(expected, plain, strict=True)
    control = max(difference(a.logits()[0, -1], b.logits()[0, -1]) for a, b in pairs)
    with vtc.patch(model, method):
        found = (
            families.run_forward(family, model, rows, expected),
            families.run_generate(family, model, rows, expected),
        )
    recorder.note(f"torchao int8 {name} {probe}", max(found), control)
    assert control > CONTROL
    assert max(found) < TOLERANCE


# ---- the embedded model -------------------------------------------------------------------------
@pytest.mark.slow
@pytest.mark.parametrize("name", ["torchao int8", "torchao int4", "torchao float8"])
@pytest.mark.parametrize("method", ["visionzip", "fastv", "todre-maxsum-drops"])
def test_the_embedded_model(method: str, name: str) -> None:
    """A trained model, 576 tokens, at prefill."""
    model, pristine = loaded(name, embedded_path()), loaded(name, embedded_path(), 1)
    generator = torch.Generator().manual_seed(0)
    ids = torch.tensor([1, *[model.config.image_token_id] * 576, 40, 41, 42, 43])
    pixels = torch.randn(1, 3, 336, 336, generator=generator)
    with torch.no_grad(), vtc.patch(model, METHODS[method]()):
        found = model(input_ids=ids[None], pixel_values=pixels).logits[0]
    ids = ids.masked_fill(ids == model.config.image_token_id, IMAGE)
    expected = Truth(pristine, METHODS[method](), Sample(ids, pixels)).logits()[0]
    assert difference(found, expected) < TOLERANCE
