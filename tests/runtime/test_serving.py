# SPDX-License-Identifier: Apache-2.0
"""A patched model where models are served: pipelines, adapters, offload, replicas, compilers, flash
attention; what is the same for every family; and what methods are shown of vision towers."""

from __future__ import annotations

import copy
import importlib.util
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import accelerate
import peft
import pytest
import torch
from torch import Tensor, nn
from transformers import AttentionInterface, pipeline
from transformers.masking_utils import AttentionMaskInterface, flash_attention_mask
from vtc.eval.embedded.score import prompt_of
from vtc.eval.embedded.vlm import load
from vtc.eval.tasks.parquet import scene_questions

import vtc
from tests.reference.families import FAMILIES, Row
from tests.reference.masked import decoder_of, images_of
from tests.reference.probes import Fixed, Probe, Ragged
from tests.runtime.test_exactness import (
    TOLERANCE,
    assert_bitwise,
    difference,
    fingerprint,
    generate,
    plain_outputs,
    steps_of,
)
from tests.runtime.test_families import REFUSED, first_cut, shared
from vtc.core import Method, Selection, VisionTokens
from vtc.models import families

SERVED = ("llava_onevision", "qwen2_5_vl", "gemma3", "internvl", "idefics3")
METHODS: dict[str, Callable[[], Method]] = {
    "ragged": lambda: Ragged(),
    "fastv": lambda: vtc.FastV(keep=0.5, layer=2),
}
HOW = [
    pytest.param(name, method, id=f"{name}-{method}")
    for i, name in enumerate(SERVED)
    for method in METHODS
    if method == "fastv" or i % 2 == 0
]
EVERY = [name for name, family in FAMILIES.items() if family.model_type not in REFUSED]


def batch_of(name: str, kind: str = "ragged", side: str = "left") -> dict[str, Tensor]:
    return FAMILIES[name].collate(FAMILIES[name].rows(kind), side)


def labels_of(batch: dict[str, Tensor]) -> Tensor:
    """The last two tokens of each row of a batch padded on the right are an answer."""
    from_end = batch["attention_mask"].flip(1).cumsum(1).flip(1)
    answer = (from_end <= 2) & batch["attention_mask"].bool()
    return batch["input_ids"].masked_fill(~answer, -100)


def expected_of(name: str, method: str, batch: dict[str, Tensor]) -> tuple[Tensor, ...]:
    """What the patched model gives where nothing is around it; it differs from the plain model."""
    with torch.no_grad():
        plain = shared(name, "sdpa")(**batch).logits
    with vtc.patch(shared(name, "sdpa"), METHODS[method]()) as patch:
        found = plain_outputs(patch.model, batch)
    assert difference(found[0][:, -1], plain[:, -1]) > 1e-2
    return found


def traces(model: nn.Module) -> dict[str, Any]:
    """`fingerprint` without what differs between two models that were made alike."""
    return {name: (*seen[:3], *seen[4:]) for name, seen in fingerprint(model).items()}


# ---- pipeline -----------------------------------------------------------------------------------
@pytest.mark.parametrize("method", [vtc.ToDRE(keep=0.3), vtc.FastV(keep=0.2)], ids=str)
def test_a_pipeline_answers_as_generate_does(method: Method) -> None:
    model, processor = load(torch.float32)
    asked, photos = zip(*scene_questions(2, seed=7), strict=True)
    questions = [question.question for question in asked]
    prompts = [prompt_of(processor, question) for question in questions]
    settings: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False}
    with vtc.patch(model, method) as patch:
        expected = []
        for image, prompt in zip(photos, prompts, strict=True):
            inputs = processor(images=image, text=prompt, return_tensors="pt")
            tokens = model.generate(**inputs, **settings)[0, inputs["input_ids"].shape[1] :]
            expected.append(processor.decode(tokens, skip_special_tokens=True))
        batch = processor(images=list(photos), text=prompts, return_tensors="pt", padding=True)
        width = batch["input_ids"].shape[1]
        together = model.generate(**batch, **settings)[:, width:]
        assert processor.batch_decode(together, skip_special_tokens=True) == expected
        before = len(patch.report.prefills)
        ask: Any = pipeline("image-text-to-text", model=model, processor=processor)
        assert ask.model is model
        found = ask(
            images=list(photos), text=prompts, generate_kwargs=settings, return_full_text=False
        )
        assert [answer["generated_text"] for answer in found] == expected
        chat: Any = [
            {
                "role": "user",
                "content": [
                    {"type": "image", "image": photos[0]},
                    {"type": "text", "text": questions[0]},
                ],
            }
        ]
        (answer,) = ask(text=chat, generate_kwargs=settings, return_full_text=False)
        assert answer["generated_text"] == expected[0]
        assert len(patch.report.prefills) == before + 2
        assert all(
            image.per_layer[-1] < image.original
            for prefill in patch.report.prefills
            for sample in prefill.samples
            for image in sample.images
        )


# ---- peft ---------------------------------------------------------------------------------------
def adapted(model: Any, task: str | None) -> Any:
    """`model` with LoRA on the decoder's queries and values, drawn so that it matters."""
    config = peft.LoraConfig(
        r=4,
        target_modules=r".*(language_model|text_model).*\.(q_proj|v_proj)",
        init_lora_weights=False,
        task_type=task,
    )
    torch.manual_seed(0)
    return peft.get_peft_model(model, config)


@pytest.mark.parametrize("first", ["patch", "peft"])
@pytest.mark.parametrize(("name", "method"), HOW)
def test_lora(name: str, method: str, first: str) -> None:
    """As the model into which the adapter was merged, patched; and it learns."""
    task = "CAUSAL_LM" if method == "fastv" else None
    batch = batch_of(name)
    merged = adapted(FAMILIES[name].build(), task).merge_and_unload().eval()
    plain = plain_outputs(merged, batch)
    with vtc.patch(merged, METHODS[method]()):
        expected = plain_outputs(merged, batch)
    assert difference(expected[0][:, -1], plain[0][:, -1]) > 1e-2
    assert difference(expected[0][:, -1], expected_of(name, method, batch)[0][:, -1]) > 1e-2
    model = FAMILIES[name].build()
    if first == "patch":
        vtc.patch(model, METHODS[method]())
        outer = adapted(model, task).eval()
    else:
        outer = adapted(model, task).eval()
        plain_outputs(outer, batch)  # the first forward leaves hooks of transformers' own
        before = fingerprint(outer)
        vtc.patch(outer, METHODS[method]())
    assert peft.get_peft_model_state_dict(outer)
    found = plain_outputs(outer, batch)
    for mine, theirs in zip(found, expected, strict=True):
        assert difference(mine, theirs) < TOLERANCE

    # One step of training: the loss falls as its gradient says.
    scored = batch_of(name, side="right")
    scored["labels"] = labels_of(scored)
    weights = {n: w for n, w in outer.named_parameters() if w.requires_grad}
    assert weights
    assert all("lora_" in n for n in weights)
    loss = outer.train()(**scored).loss
    loss.backward()
    assert all(w.grad is not None and w.grad.any() for w in weights.values())
    assert all(w.grad is None for w in outer.parameters() if not w.requires_grad)
    size = sum(float(w.grad.square().sum()) for w in weights.values()) ** 0.5
    with torch.no_grad():
        kept = {n: w.clone() for n, w in weights.items()}
        for w in weights.values():
            w -= 1e-3 / size * w.grad
        fell = float(loss.detach() - outer(**scored).loss)
        assert fell == pytest.approx(1e-3 * size, rel=0.2)
        for n, w in weights.items():
            w.copy_(kept[n])
            w.grad = None

    vtc.unpatch(outer.eval())
    never = adapted(FAMILIES[name].build(), task).eval()
    assert_bitwise(plain_outputs(outer, batch), plain_outputs(never, batch))
    if first == "peft":
        assert fingerprint(outer) == before
    assert traces(outer) == traces(never)


# ---- accelerate ---------------------------------------------------------------------------------
def parts_of(model: Any) -> dict[str, str]:
    """A device map: the decoder's layers on disk, all else in memory."""
    found = {name: "cpu" for name, _ in model.named_parameters()}
    for name, part in model.named_modules():
        if any(part is layer for layer in decoder_of(model).layers):
            found = {key: where for key, where in found.items() if not key.startswith(f"{name}.")}
            found[name] = "disk"
    return found


OFFLOADS: dict[str, Callable[[Any, Path], Any]] = {
    "cpu": lambda model, folder: accelerate.cpu_offload(model, torch.device("cpu")),
    "disk": lambda model, folder: accelerate.disk_offload(model, str(folder), torch.device("cpu")),
    # The one way that all models take, unpatched: some base models use parameters of other modules.
    "map": lambda model, folder: accelerate.dispatch_model(
        model,
        parts_of(model),
        main_device="cpu",
        offload_dir=str(folder),
        force_hooks=True,
    ),
}


@pytest.mark.parametrize(
    ("name", "method", "how", "first"),
    [
        ("llava_onevision", "ragged", "map", "patch"),
        ("llava_onevision", "fastv", "map", "accelerate"),
        ("qwen2_5_vl", "fastv", "map", "accelerate"),
        ("gemma3", "ragged", "cpu", "accelerate"),
        ("gemma3", "fastv", "map", "patch"),
        ("internvl", "fastv", "disk", "patch"),
        ("idefics3", "ragged", "map", "patch"),
        ("idefics3", "fastv", "map", "accelerate"),
        ("smolvlm", "fastv", "disk", "accelerate"),
    ],
)
def test_offload(name: str, method: str, how: str, first: str, tmp_path: Path) -> None:
    batch, model = batch_of(name), FAMILIES[name].build()
    plain, expected = plain_outputs(model, batch), expected_of(name, method, batch)
    if first == "patch":
        vtc.patch(model, METHODS[method]())
    OFFLOADS[how](model, tmp_path)
    if how != "cpu":
        assert any(w.is_meta for w in model.parameters())
    if first == "accelerate":
        assert_bitwise(plain_outputs(model, batch), plain)
        hooked = fingerprint(model)
        vtc.patch(model, METHODS[method]())
    assert_bitwise(plain_outputs(model, batch), expected)
    vtc.unpatch(model)
    if first == "accelerate":
        assert fingerprint(model) == hooked
    assert_bitwise(plain_outputs(model, batch), plain)


# ---- replicas -----------------------------------------------------------------------------------
@pytest.mark.parametrize(("name", "method"), HOW)
def test_copies_run_at_the_same_time(name: str, method: str) -> None:
    """As data-parallel replicas do: each thread has a copy and rows of its own."""
    family, original = FAMILIES[name], FAMILIES[name].build()
    rows = [*family.rows("ragged"), *family.rows("one")]
    patch = vtc.patch(original, METHODS[method]())
    models = [original, *(copy.deepcopy(original) for _ in rows[1:])]
    batches = [family.collate([row]) for row in rows]
    alone = [plain_outputs(original, batch) for batch in batches]
    count = len(patch.report.prefills)
    found: list[list[tuple[Tensor, ...]]] = [[] for _ in rows]
    failed: list[BaseException] = []
    start = threading.Barrier(len(rows))

    def serve(i: int) -> None:
        try:
            start.wait(30)
            for _ in range(3):
                found[i].append(plain_outputs(models[i], batches[i]))
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=serve, args=(i,)) for i in range(len(rows))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not failed
    for i, expected in enumerate(alone):
        assert len(found[i]) == 3
        for mine in found[i]:
            assert torch.equal(mine[0], expected[0])
            assert torch.equal(mine[1], expected[1])
    assert len(patch.report.prefills) == count + 6  # nobody counted for another
    for i, model in enumerate(models[1:], 1):
        vtc.unpatch(model)
        assert not torch.equal(plain_outputs(model, batches[i])[0], alone[i][0])
    assert patch.active


def test_shallow_replicas_are_refused() -> None:
    """What `nn.DataParallel` makes of a model shares its hooks, which lead to the first device."""
    model: Any = FAMILIES["llava_onevision"].build()
    with vtc.patch(model, Ragged()):
        with pytest.raises(RuntimeError, match="DataParallel"):
            model._replicate_for_data_parallel()
        with pytest.raises(RuntimeError, match="DataParallel"):
            model.model._replicate_for_data_parallel()
    assert model._replicate_for_data_parallel()._is_replica


# ---- torch.compile ------------------------------------------------------------------------------
def compiled(model: Any, how: str) -> Any:
    """`model`, or what stands for it, compiled as `how` says; what is to be called from now on."""
    owner = getattr(model, "model", model)
    name = "text_model" if hasattr(owner, "text_model") else "language_model"
    if how == "layers":
        layers = decoder_of(model).layers
        for i, layer in enumerate(layers):
            layers[i] = torch.compile(layer, backend="eager")
    elif how == "decoder":
        setattr(owner, name, torch.compile(getattr(owner, name), backend="eager"))
    elif how == "decoder.compile":
        getattr(owner, name).compile(backend="eager")
    elif how == "model.compile":
        model.compile(backend="eager")
    elif how == "torch.compile":
        return torch.compile(model, backend="eager")
    return model


@pytest.fixture
def dynamo() -> Iterator[None]:
    """Nothing compiled before, nothing kept after."""
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    ("name", "how", "first"),
    [
        ("llava_onevision", "layers", "patch"),
        ("llava_onevision", "layers", "compile"),
        pytest.param("qwen2_5_vl", "layers", "patch", marks=pytest.mark.slow),
        pytest.param("llava_onevision", "decoder", "patch", marks=pytest.mark.slow),
        pytest.param("llava_onevision", "decoder", "compile", marks=pytest.mark.slow),
        pytest.param("gemma3", "decoder", "compile", marks=pytest.mark.slow),
        pytest.param("idefics3", "decoder.compile", "patch", marks=pytest.mark.slow),
        ("llava_onevision", "model.compile", "patch"),
        ("llava_onevision", "model.compile", "compile"),
        ("internvl", "torch.compile", "patch"),
        ("internvl", "torch.compile", "compile"),
    ],
)
def test_compiled(name: str, how: str, method: str, first: str, dynamo: None) -> None:
    batch, model = batch_of(name, "one"), FAMILIES[name].build()
    plain, expected = plain_outputs(model, batch), expected_of(name, method, batch)
    if first == "patch":
        vtc.patch(model, METHODS[method]())
        called = compiled(model, how)
    else:
        called = compiled(model, how)
        vtc.patch(called, METHODS[method]())
    for mine, theirs in zip(plain_outputs(called, batch), expected, strict=True):
        assert difference(mine, theirs) < TOLERANCE
    vtc.unpatch(model)
    if how != "torch.compile":  # compiled anew without the hooks, which takes long for whole models
        with torch.no_grad():
            assert difference(decoder_logits(model, batch, how), plain[0]) < TOLERANCE


def decoder_logits(model: Any, batch: dict[str, Tensor], how: str) -> Tensor:
    if how == "model.compile":
        model._compiled_call_impl = None
    return model(**batch).logits


# ---- decoding that is refused -------------------------------------------------------------------
@pytest.mark.parametrize("kind", ["ragged", "video"])
@pytest.mark.parametrize("name", ["llava_onevision", "qwen2_vl", "video_llava", "gemma4"])
def test_chunks_and_early_exits_are_refused(name: str, kind: str) -> None:
    batch = batch_of(name, kind)
    assert kind != "video" or "pixel_values_videos" in batch
    refused: dict[str, Any] = {"assistant_early_exit": 2, "prefill_chunk_size": 8}
    with vtc.patch(shared(name, "sdpa"), Ragged()) as patch:
        model: Any = patch.model
        for setting, value in refused.items():
            with pytest.raises(ValueError, match=setting):
                model.generate(**batch, max_new_tokens=2, **{setting: value})
        assert patch.report.prefills == []
        out = model.generate(**batch, max_new_tokens=2, do_sample=False)
    assert out.shape[1] == batch["input_ids"].shape[1] + 2


# ---- flash attention ----------------------------------------------------------------------------
FLASH = "flash_attention_test"


def _attend_as_flash_does(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Causal attention with the mask (b, k) that flash attention takes. Positions that it would
    take for packed sequences, those of real tokens with gaps between, fail here."""
    positions, q = kwargs.get("position_ids"), query.shape[2]
    SEEN.append("none" if positions is None else "contiguous")
    if positions is not None:
        assert positions.dim() == 2
        for i, row in enumerate(positions):
            real = row if attention_mask is None else row[attention_mask[i, -q:].bool()]
            assert (real.diff() == 1).all(), row.tolist()
    assert attention_mask is None or attention_mask.dim() == 2
    k = key.shape[2]
    lengths = torch.arange(k)
    seen = lengths[None] <= torch.arange(q)[:, None] + k - q
    if (window := kwargs.get("sliding_window")) is not None:
        seen &= lengths[None] > torch.arange(q)[:, None] + k - q - window
    seen = seen[None, None]
    if attention_mask is not None:
        seen = seen & attention_mask[:, None, None].bool()
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    scaling = kwargs.get("scaling") or query.shape[-1] ** -0.5
    logits = (query @ key.transpose(-1, -2) * scaling).masked_fill(~seen, -1e30)
    return (logits.softmax(-1) @ value).transpose(1, 2), None


SEEN: list[str] = []


@pytest.fixture
def flash() -> Iterator[list[str]]:
    """A flash attention for the CPU, registered for one test; what positions it was given."""
    AttentionInterface.register(FLASH, _attend_as_flash_does)
    AttentionMaskInterface.register(FLASH, flash_attention_mask)
    SEEN.clear()
    yield SEEN
    del AttentionInterface._global_mapping[FLASH]
    del AttentionMaskInterface._global_mapping[FLASH]


PRUNED: dict[str, Callable[[], Method]] = {
    **METHODS,
    "contiguous": lambda: Fixed(stride=3, positions="contiguous"),
    "layers": lambda: Fixed(layer=3, stride=2) | vtc.FastV(keep=2, layer=4),
}


@pytest.mark.parametrize("method", PRUNED)
@pytest.mark.parametrize("kind", ["one", "images"])
@pytest.mark.parametrize("name", ["llava_onevision", "qwen2_vl", "qwen2_5_vl", "internvl"])
@pytest.mark.filterwarnings("ignore:.*positions='contiguous' has no meaning")
def test_flash_attention_gets_no_gaps(name: str, kind: str, method: str, flash: list[str]) -> None:
    batch = batch_of(name, kind)
    with vtc.patch(shared(name, "sdpa"), PRUNED[method]()) as patch:
        expected = plain_outputs(patch.model, batch)
    model: Any = FAMILIES[name].build()
    model.set_attn_implementation({"text_config": FLASH})
    assert decoder_of(model).config._attn_implementation == FLASH
    with vtc.patch(model, PRUNED[method]()):
        found = plain_outputs(model, batch)
    assert "none" in flash
    real = batch["attention_mask"].bool()
    assert difference(found[0][real], expected[0][real]) < TOLERANCE
    assert difference(found[2], expected[2]) < TOLERANCE


@pytest.mark.skipif(
    not torch.cuda.is_available() or importlib.util.find_spec("flash_attn") is None,
    reason="flash attention needs a GPU and the package flash_attn",
)
@pytest.mark.parametrize("method", PRUNED)
@pytest.mark.parametrize("name", ["llava_onevision", "qwen2_5_vl"])
def test_flash_attention_2(name: str, method: str) -> None:
    """As sdpa on the same device, within the rounding of bfloat16."""
    batch = {key: value.cuda() for key, value in batch_of(name).items()}
    for key, value in batch.items():
        batch[key] = value.bfloat16() if value.is_floating_point() else value
    found = []
    for attention in ("sdpa", "flash_attention_2"):
        model: Any = FAMILIES[name].build(dtype=torch.bfloat16).cuda()
        model.set_attn_implementation({"text_config": attention})
        with vtc.patch(model, PRUNED[method]()), torch.no_grad():
            found.append(model(**batch).logits[batch["attention_mask"].bool()].float())
    assert (found[0] - found[1]).norm() < 5e-2 * found[0].norm()


# ---- every family -------------------------------------------------------------------------------
def outputs(model: Any, batch: dict[str, Tensor]) -> tuple[Tensor, ...]:
    """Logits of the prompt, and two tokens after it."""
    with torch.no_grad():
        logits = model(**batch).logits
    output = generate(model, batch, max_new_tokens=2)
    return logits, output.sequences, steps_of(output)


@pytest.mark.parametrize("name", EVERY)
def test_text_and_whole_images_are_as_without_a_patch(name: str) -> None:
    family = FAMILIES[name]
    model = shared(name, family.attentions[-1])
    keep_all: Method = vtc.Random(keep=1.0)
    compress: Method = vtc.Random(keep=0.3)
    layer = first_cut(family)
    # Small Gemma 4 runs its last layers on the last token only, but not where tokens may go between
    # layers: that rounds differently.
    keep_all = keep_all if "device" in name else keep_all | vtc.FastV(keep=1.0, layer=layer)
    compress = compress | vtc.FastV(keep=2, layer=layer)
    for method, kind in ((compress, "text"), (keep_all, "mixed")):
        if family.layouts.get(kind) == ():
            continue
        batch = batch_of(name, kind)
        real = batch["attention_mask"].bool()  # what stands at padding means nothing
        plain = outputs(model, batch)
        with vtc.patch(model, method):
            found = outputs(model, batch)
        assert torch.equal(found[0][real], plain[0][real])
        assert_bitwise(found[1:], plain[1:])


@pytest.mark.parametrize("name", EVERY)
def test_unpatching_restores_every_family(name: str) -> None:
    family = FAMILIES[name]
    model, batch = shared(name, family.attentions[-1]), batch_of(name)
    before = outputs(model, batch)
    seen, weights = fingerprint(model), {k: v.clone() for k, v in model.state_dict().items()}
    chosen: Method = Ragged() | vtc.FastV(keep=2, layer=first_cut(family))
    with vtc.patch(model, chosen):
        during = outputs(model, batch)
    assert difference(during[0][:, -1], before[0][:, -1]) > 1e-2
    assert fingerprint(model) == seen
    assert list(model.state_dict()) == list(weights)
    assert all(torch.equal(value, weights[key]) for key, value in model.state_dict().items())
    assert_bitwise(outputs(model, batch), before)


@pytest.mark.parametrize("method", [Ragged(), vtc.FastV(keep=0.5)], ids=str)
@pytest.mark.parametrize("name", ["blip_2", "instructblip"])
def test_models_that_generate_in_their_own_way_are_refused(name: str, method: Method) -> None:
    model: Any = FAMILIES[name].build()
    model.config.model_type = "unknown"
    batch, seen = batch_of(name), fingerprint(model)
    plain = model.generate(**batch, max_new_tokens=2, do_sample=False)
    with pytest.raises(vtc.UnsupportedModelError) as caught:
        vtc.patch(model, method)
    assert type(model).__name__ in str(caught.value)
    assert "generate of its own" in str(caught.value)
    assert fingerprint(model) == seen
    assert torch.equal(model.generate(**batch, max_new_tokens=2, do_sample=False), plain)


# ---- signals of towers --------------------------------------------------------------------------
@dataclass(frozen=True)
class Looks(Probe):
    """Keeps all, and writes down what it was shown of the tower."""

    notes: list[VisionTokens] = field(default_factory=list, compare=False)
    needs = frozenset({"cls_attention", "keys"})

    def select(self, tokens: VisionTokens) -> Selection:
        self.notes.append(tokens)
        return Selection(torch.arange(len(tokens)))


TOWERS: dict[str, tuple[str, ...]] = {
    "llava_next": ("model.vision_tower", "encoder.layers", "self_attn"),
    "llava_next_video": ("model.vision_tower", "encoder.layers", "self_attn"),
    "llava_onevision": ("model.vision_tower", "encoder.layers", "self_attn"),
    "vipllava": ("model.vision_tower", "encoder.layers", "self_attn"),
    "paligemma": ("model.vision_tower", "encoder.layers", "self_attn"),
    "gemma3": ("model.vision_tower", "encoder.layers", "self_attn"),
    "aya_vision": ("model.vision_tower", "encoder.layers", "self_attn"),
    "cohere2_vision": ("model.vision_tower", "encoder.layers", "self_attn"),
    "video_llava": ("model.image_tower", "encoder.layers", "self_attn"),
    "deepseek_vl": ("model.vision_model", "encoder.layers", "self_attn"),
    "deepseek_vl_hybrid": ("model.vision_model", "encoder.layers", "self_attn"),
    "idefics3": ("model.vision_model", "encoder.layers", "self_attn"),
    "smolvlm": ("model.vision_model", "encoder.layers", "self_attn"),
    "internvl": ("model.vision_tower", "encoder.layer", "attention"),
    "mistral3": ("model.vision_tower", "transformer.layers", "attention"),
    "qwen2_vl": ("model.visual", "blocks", "attn"),
    "qwen2_5_vl": ("model.visual", "blocks", "attn"),
    "qwen3_vl": ("model.visual", "blocks", "attn"),
    "qwen3_vl_moe": ("model.visual", "blocks", "attn"),
    "qwen3_5": ("model.visual", "blocks", "attn"),
    "glm4v": ("model.visual", "blocks", "attn"),
    "glm4v_moe": ("model.visual", "blocks", "attn"),
    "glm46v": ("model.visual", "blocks", "attn"),
    "qwen3_5_moe": ("model.visual", "blocks", "attn"),
    "glm_ocr": ("model.visual", "blocks", "attn"),
    "qwen2_5_omni_thinker": ("model.visual", "blocks", "attn"),
    "qwen3_omni_moe_thinker": ("model.visual", "blocks", "attn"),
    "exaone4_5": ("model.visual", "blocks", "attn"),
    "hyperclovax_vision_v2": ("model.vision_model", "blocks", "attn"),
    "video_llama_3": ("model.vision_model", "encoder.layers", "self_attn"),
    "paddleocr_vl": ("model.visual.vision_model", "encoder.layers", "self_attn"),
    "ernie4_5_vl_moe": ("model.vision_tower", "blocks", "attn"),
    "lighton_ocr": ("model.vision_encoder", "transformer.layers", "attention"),
    "qianfan_ocr": ("model.vision_tower", "layers", "attention"),
    "glmga": ("model.visual", "blocks", "attn"),
    "nemotron_h_omni": ("vision_model", "encoder.layer", "attention"),
}
"""Where the towers are that can be read: the tower, its layers, the attention of a layer."""
HAS_CLS = (
    *("llava_next", "llava_next_video", "vipllava", "video_llava", "internvl", "qianfan_ocr"),
)


class Truth:
    """What the last layer of a tower shows, taken from a plain eager run.

    Attention is what the family's own eager function returns. Which patches a token is made of is
    found by gradients: after the layer that features are taken from, towers and projectors only
    look at single patches, or at those that they join.
    """

    def __init__(self, name: str, rows: tuple[Row, ...]) -> None:
        self.model: Any = FAMILIES[name].build("eager")
        self.name, self.batch = name, FAMILIES[name].collate(rows)
        tower, layers, part = TOWERS[name]
        found: Any = self.model.get_submodule(f"{tower}.{layers}")
        self.layers = list(found)
        self.attention = getattr(self.layers[-1], part)
        self.states: list[Tensor] = []
        received, keys = [], []
        module: Any = sys.modules[type(self.attention).__module__]
        own = module.eager_attention_forward

        def note(attention: Any, query: Tensor, key: Tensor, *args: Any, **kwargs: Any) -> Any:
            output, weights = own(attention, query, key, *args, **kwargs)
            if attention is self.attention:
                mean = weights.detach().mean(1)  # (b, q, k)
                if name in HAS_CLS:
                    received.append(mean[:, 0].flatten())
                else:  # images that are packed together do not see one another
                    received.append((mean.sum(1) / (mean > 0).sum(1)).flatten())
                keys.append(key.detach().transpose(1, 2).flatten(2).flatten(0, 1))
            return output, weights

        handles = [layer.register_forward_hook(self._leave) for layer in self.layers]
        decoder = decoder_of(self.model)
        handles.append(decoder.register_forward_pre_hook(self._enter, with_kwargs=True))
        module.eager_attention_forward = note
        try:
            self.model(**self.batch)
        finally:
            module.eager_attention_forward = own
            for handle in handles:
                handle.remove()
        self.received, self.keys = torch.cat(received), torch.cat(keys)

    def _leave(self, module: Any, args: Any, output: Any) -> None:
        self.states.append(output[0] if isinstance(output, tuple) else output)

    def _enter(self, module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        self.embeds: Tensor = kwargs["inputs_embeds"]

    def patches(self, row: int, place: int) -> Tensor:
        """(m,) the patches that the token at `place` is made of, counted through the tower."""
        value = self.embeds[row, place]
        weights = torch.linspace(1, 2, len(value))  # sums of normed rows may be constant
        found = torch.autograd.grad(
            (value * weights).sum(), self.states, retain_graph=True, allow_unused=True
        )
        last = [gradient for gradient in found if gradient is not None][-1]
        energy = last.abs().sum(-1).flatten()
        return (energy > 1e-6 * energy.max()).nonzero()[:, 0]

    def of(self, row: int, places: list[int]) -> tuple[Tensor, Tensor]:
        """(n,) attention and (n, d) keys of the tokens at `places`."""
        patches = [self.patches(row, place) for place in places]
        return (
            torch.stack([self.received[found].mean() for found in patches]),
            torch.stack([self.keys[found].mean(0) for found in patches]),
        )


FRAMES_TOO = ("internvl", "smolvlm", "qwen2_vl", "qwen2_5_vl", "qwen3_vl", "glm4v")


@pytest.mark.parametrize(
    ("name", "kind"),
    [(name, kind) for name in TOWERS for kind in ("ragged", "images")]
    + [(name, "video") for name in FRAMES_TOO if name in TOWERS],
)
def test_methods_are_shown_the_tower(name: str, kind: str) -> None:
    family = FAMILIES[name]
    rows = family.rows(kind)
    if kind == "video":  # clips and images in one batch are encoded by two calls
        rows = rows[:2]
    truth, looks = Truth(name, rows), Looks()
    for attention in family.attentions:
        looks.notes.clear()
        with vtc.patch(shared(name, attention), looks) as patch, torch.no_grad():
            patch.model(**truth.batch)
        shown = iter(looks.notes)
        width = truth.batch["input_ids"].shape[1]
        for i, row in enumerate(rows):
            for image in images_of(family, row):
                tokens = next(shown)
                offset = width - len(row.input_ids)
                expected, keys = truth.of(i, [offset + place for place in image.index])
                assert tokens.cls_attention is not None
                assert tokens.keys is not None
                assert tokens.heads == (2 if name == "exaone4_5" else 4)  # of keys
                assert difference(tokens.cls_attention, expected) < 1e-5
                assert difference(tokens.keys, keys) < TOLERANCE
                assert expected.std() > 1e-3 * expected.mean()
        assert next(shown, None) is None


UNREAD = [
    name
    for name in EVERY
    if any(cls.unread for cls in families() if FAMILIES[name].model_type in cls.model_types)
]


@pytest.mark.parametrize("name", UNREAD)
def test_towers_that_cannot_be_read_are_refused(name: str) -> None:
    model = shared(name, FAMILIES[name].attentions[-1])
    seen = fingerprint(model)
    with pytest.raises(vtc.UnsupportedModelError, match="vision tower"):
        vtc.patch(model, Looks())
    assert fingerprint(model) == seen
