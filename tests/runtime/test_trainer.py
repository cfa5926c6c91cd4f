# SPDX-License-Identifier: Apache-2.0
"""A patched model under what trains models: accelerate's precision, wrappers for several devices,
and transformers' Trainer, which may keep the labels to itself."""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Callable, Iterator
from pathlib import Path
from types import MethodType
from typing import Any

import accelerate
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from torch.nn.parallel import DistributedDataParallel
from transformers import Trainer, TrainingArguments

import vtc
from tests.reference.masked import decoder_of
from tests.reference.models import build_model, collate, samples
from tests.reference.probes import Ragged
from tests.runtime.test_exactness import difference
from vtc.core import Method

pytestmark = pytest.mark.usefixtures("fresh_accelerate")

METHODS: dict[str, Callable[[], Method]] = {
    "ragged": Ragged,
    "fastv": lambda: vtc.FastV(keep=0.3, layer=2),
}


def logits_of(model: Any, **given: Any) -> Tensor:
    with torch.no_grad():
        return model(**collate(samples("one", "clip")), **given).logits


def compressed(method: str) -> Tensor:
    with vtc.patch(build_model(), METHODS[method]()) as patch:
        return logits_of(patch.model)


# ---- what binds a forward anew ------------------------------------------------------------------
def bind_the_function(model: Any) -> None:
    model.forward = MethodType(model.forward.__func__, model)


def wrap_the_function(model: Any) -> None:
    function = model.forward.__func__

    @functools.wraps(function)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        return function(self, *args, **kwargs)

    model.forward = MethodType(forward, model)


def wrap_and_unwrap(model: Any) -> None:
    """As accelerate does with what has no function."""
    forward = functools.wraps(model.forward)(lambda *args, **kwargs: None)
    while hasattr(forward, "__wrapped__"):
        forward = forward.__wrapped__
    model.forward = MethodType(forward, model)


@pytest.mark.parametrize("how", [bind_the_function, wrap_the_function, wrap_and_unwrap])
@pytest.mark.parametrize("method", METHODS)
def test_a_patched_forward_binds_as_a_method(method: str, how: Callable[[Any], None]) -> None:
    model = build_model()
    names = list(inspect.signature(model.forward).parameters)
    plain, expected = logits_of(model), compressed(method)
    patch = vtc.patch(model, METHODS[method]())
    assert model.forward.__self__ is model
    how(model)
    assert torch.equal(logits_of(model), expected)
    assert list(inspect.signature(model.forward).parameters) == names
    count = len(patch.report.prefills)
    other = copy.deepcopy(model)
    assert torch.equal(logits_of(other), expected)
    assert len(patch.report.prefills) == count  # the copy went its own way
    vtc.unpatch(model)
    assert torch.equal(logits_of(model), plain)
    assert torch.equal(logits_of(copy.deepcopy(model)), plain)
    assert torch.equal(logits_of(other), expected)
    vtc.unpatch(other)
    assert torch.equal(logits_of(other), plain)


@pytest.mark.parametrize("how", [bind_the_function, wrap_the_function, wrap_and_unwrap])
def test_what_was_bound_anew_goes_with_the_patch(how: Callable[[Any], None]) -> None:
    """From the model and from its base, which a wrapper that stays then calls as they were; a copy
    keeps a patch of its own, which is told the labels that it is given."""
    model, batch = build_model(), collate(samples("one", "clip"))
    shown = labels_of()
    plain = logits_of(model)
    with vtc.patch(build_model(), METHODS["fastv"]()) as patch, torch.no_grad():
        expected = patch.model(**shown).logits
        assert not torch.equal(expected, patch.model(**batch).logits)
    vtc.patch(model, METHODS["fastv"]())
    for part in (model, model.model):
        how(part)
    other = copy.deepcopy(model)
    vtc.unpatch(model)
    assert torch.equal(logits_of(model), plain)
    if how is not wrap_the_function:
        assert "forward" not in {**vars(model), **vars(model.model)}
    with torch.no_grad():
        assert torch.equal(other(**shown).logits, expected)
    vtc.unpatch(other)
    assert torch.equal(logits_of(other), plain)


@pytest.mark.parametrize("first", ["patch", "prepare"])
@pytest.mark.parametrize("method", METHODS)
def test_accelerate_prepares_and_gives_back(method: str, first: str) -> None:
    model = build_model()
    plain, expected = logits_of(model), compressed(method)
    accelerator = accelerate.Accelerator(mixed_precision="bf16", cpu=True)
    if first == "patch":
        vtc.patch(model, METHODS[method]())
        prepared = accelerator.prepare(model)
    else:
        prepared = accelerator.prepare(model)
        vtc.patch(prepared, METHODS[method]())
    rounded = logits_of(prepared)
    assert rounded.dtype == torch.float32
    assert not torch.equal(rounded, expected)
    assert torch.equal(logits_of(copy.deepcopy(prepared)), rounded)
    bare = accelerator.unwrap_model(prepared, keep_fp32_wrapper=False)
    # What was wrapped before the patch stays below it.
    assert torch.equal(logits_of(bare), expected if first == "patch" else rounded)
    vtc.unpatch(bare)
    assert difference(logits_of(bare), plain) < (1e-6 if first == "patch" else 0.2)
    assert "_vtc_overrides" not in vars(bare)


# ---- wrappers for several devices ---------------------------------------------------------------
@pytest.fixture
def group(tmp_path: Path) -> Iterator[None]:
    """A group of one process."""
    dist.init_process_group(
        "gloo", init_method=f"file://{tmp_path / 'group'}", rank=0, world_size=1
    )
    yield
    dist.destroy_process_group()


def in_fsdp(model: nn.Module) -> nn.Module:
    policy = ModuleWrapPolicy({type(decoder_of(model).layers[0])})
    return FullyShardedDataParallel(
        model, auto_wrap_policy=policy, device_id=torch.device("cpu"), use_orig_params=True
    )


def sharded(model: nn.Module) -> nn.Module:
    mesh = init_device_mesh("cpu", (1,))
    for layer in decoder_of(model).layers:
        fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


WRAPPERS: dict[str, Callable[[nn.Module], Any]] = {
    "ddp": DistributedDataParallel,
    "ddp of a compiled one": lambda model: DistributedDataParallel(
        torch.compile(model, backend="eager", disable=True)
    ),
    "fsdp": in_fsdp,
    "fully_shard": sharded,
}


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
@pytest.mark.parametrize("how", WRAPPERS)
@pytest.mark.parametrize("method", METHODS)
def test_models_in_wrappers(method: str, how: str, group: None) -> None:
    expected = compressed(method)
    inner = build_model()
    outer = WRAPPERS[how](inner)
    plain = logits_of(outer)
    with vtc.patch(outer, METHODS[method]()) as patch:
        assert patch.model is inner
        assert torch.equal(logits_of(outer), expected)
        labelled = outer(**collate(samples("one", "clip")), labels=labels_of()["labels"])
        labelled.loss.backward()
        # Which replaces the one before, and is found from outside.
        vtc.patch(outer, METHODS[method]())
        assert not patch.active
        vtc.unpatch(outer)
        assert torch.equal(logits_of(outer), plain)
    assert any(w.grad is not None for w in outer.parameters())


def labels_of() -> dict[str, Tensor]:
    """A batch whose last tokens are an answer."""
    batch = collate(samples("one", "clip"))
    labels = torch.full_like(batch["input_ids"], -100)
    labels[:, -4:] = batch["input_ids"][:, -4:]
    return {**batch, "labels": labels}


# ---- labels that do not reach the model ---------------------------------------------------------
READERS: dict[str, Callable[[], Method]] = {
    "fastv": METHODS["fastv"],
    "cdpruner": lambda: vtc.CDPruner(keep=0.3),
}


@pytest.mark.parametrize("method", READERS)
def test_prompt_labels_end_the_prompt_as_labels_do(method: str) -> None:
    batch = labels_of()
    labels = batch.pop("labels")
    model = build_model()
    with vtc.patch(model, READERS[method]()), torch.no_grad():
        expected = model(**batch, labels=labels).logits
        found = model(**batch, prompt_labels=labels)
        assert torch.equal(found.logits, expected)
        assert found.loss is None
        assert difference(model(**batch).logits, expected) > 1e-2  # the answer is looked at


def smoothed(model: Any, folder: Path, named: bool, how: str, **settings: Any) -> Trainer:
    row = {name: value[0] for name, value in labels_of().items() if name != "pixel_values"}
    row["pixel_values"] = labels_of()["pixel_values"][0]

    def collated(rows: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        batch = {name: torch.stack([r[name] for r in rows]) for name in rows[0]}
        return {**batch, "prompt_labels": batch["labels"].clone()} if named else batch

    def loss(outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
        return model.loss_function(outputs.logits, labels, vocab_size=outputs.logits.shape[-1])

    arguments = TrainingArguments(
        output_dir=str(folder), use_cpu=True, report_to=[], max_steps=1, save_strategy="no",
        per_device_train_batch_size=1, remove_unused_columns=False, disable_tqdm=True,
        label_smoothing_factor=0.1 if how == "smoothing" else 0.0, **settings,
    )  # fmt: skip
    return Trainer(
        model, arguments, train_dataset=[row], eval_dataset=[row], data_collator=collated,
        compute_loss_func=loss if how == "function" else None,
    )  # fmt: skip


@pytest.mark.parametrize("how", ["smoothing", "function"])
def test_a_trainer_that_keeps_the_labels(how: str, tmp_path: Path) -> None:
    model = build_model()
    batch = labels_of()
    with vtc.patch(model, METHODS["fastv"]()) as patch:
        with torch.no_grad():
            kept = float(model(**batch).loss)
        for act in ("train", "evaluate"):
            with pytest.raises(ValueError, match="prompt_labels"):
                getattr(smoothed(model, tmp_path, False, how), act)()
        count = len(patch.report.prefills)
        found = smoothed(model, tmp_path, True, how).evaluate()["eval_loss"]
        assert len(patch.report.prefills) == count + 1
        if how == "function":
            assert found == pytest.approx(kept, rel=1e-4)
        smoothed(model, tmp_path, True, how).train()
    with vtc.patch(model, Ragged()):  # reads no text: nothing to refuse
        smoothed(model, tmp_path, False, how).train()


def test_a_trainer_in_bfloat16(tmp_path: Path) -> None:
    model = build_model()
    with vtc.patch(model, METHODS["fastv"]()):
        trainer = smoothed(model, tmp_path, False, "labels", bf16=True)
        trainer.train()
        trainer.accelerator.unwrap_model(trainer.model_wrapped, keep_fp32_wrapper=False)
        patched = logits_of(model.eval())
    plain = logits_of(model)
    assert torch.isfinite(plain).all()
    assert difference(plain, patched) > 1e-2
