# SPDX-License-Identifier: Apache-2.0
"""Fine-tuning for `vtc.training.loop`."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vtc.core import Method, make
from vtc.core.errors import ArgumentError
from vtc.models import find
from vtc.patching import patch
from vtc.training.finetune.config import Config
from vtc.training.finetune.parts import ADAPTERS, WEIGHTS, parameters, save, with_adapters
from vtc.training.loop import Batch, Batches, Group, Loop, Loss, Trained, fit


@dataclass(frozen=True)
class Finetuned:
    """What `finetune` made.

    Attributes:
        model: the tuned model, unpatched unless it was patched before; with "lora" the `PeftModel`
            around it.
        folder: `Config.out`.
        log: by step: the loss (without label smoothing), the gradient's norm.
    """

    model: Any
    folder: Path
    log: list[dict[str, float]]


def finetune(
    model: nn.Module, method: str | Method | None, batches: Batches, config: Config
) -> Finetuned:
    """Tune a model under compression, resuming from a checkpoint in `config.out` if there is one.

    The parameters of the model change in place; with "lora" adapters are added to it, and taken off
    again if training fails. All others stay frozen, bit for bit. A resumed run ends as one that was
    never interrupted.

    Args:
        model: a vision-language model of transformers, without wrappers; unpatched, or patched with
            `method`.
        method: what compresses during training, as for `vtc.patch`; `None` for nothing.
        batches: batches with the model's inputs and `labels`, -100 where nothing is learnt: a
            `Conversations`, a function of the step, or an iterable.
        config: the settings.

    Returns:
        The tuned model and the log.

    Raises:
        ArgumentError: settings or batches that do not fit, a model that is patched with something
            else, packed documents, or a checkpoint made with other settings.
        FloatingPointError: the loss is not finite.
    """
    chosen = None if method is None else make(method)
    adapter = find(model)
    on = vars(adapter.base).get("_vtc_patch")
    if on is not None and on.method != chosen:
        raise ArgumentError(
            "model",
            f"it is patched with {on.method}, and method is {chosen}; give the same, or call "
            "vtc.unpatch(model) first",
        )
    _check_checkpointing(chosen, config)
    lora = config.tune == "lora"
    with nullcontext() if chosen is None or on is not None else patch(model, chosen):
        pass  # refuses what the model does not take, before anything changes
    tuned = {} if lora else parameters(adapter, config.tune)
    small = sorted({str(p.dtype) for p in tuned.values() if p.dtype != torch.float32})
    if small and config.precision == "no":
        raise ArgumentError(
            "precision",
            f"what is tuned has dtype {', '.join(small)}, in which small updates are lost; load "
            "the model in float32, or use precision='bf16'",
        )
    asked = [(p, p.requires_grad) for p in model.parameters()]
    outer: Any = with_adapters(adapter, config) if lora else model
    if lora:
        tuned = {name: p for name, p in outer.named_parameters() if "lora_" in name}
    dtypes = {name: p.dtype for name, p in tuned.items()}
    trained = Tuned(outer, None if on is not None else chosen, chosen, tuned, config)
    loop = Loop(
        out=Path(config.out),
        steps=config.steps,
        clip=config.clip,
        precision=config.precision,
        save_every=config.save_every,
        made_with={**config.described, "method": str(chosen)},
        minutes=config.minutes,
        accumulate=config.accumulate,
    )
    try:
        fit(outer, trained, batches, loop)
    except BaseException:
        if lora:
            outer.unload()
            for parameter, wanted in asked:
                parameter.requires_grad_(wanted)
        raise
    finally:
        for name, parameter in tuned.items():
            parameter.data = parameter.data.to(dtypes[name])
    lines = (loop.out / "log.jsonl").read_text("utf-8").splitlines()
    return Finetuned(outer, loop.out, [json.loads(line) for line in lines])


def _check_checkpointing(method: Method | None, config: Config) -> None:
    """Gradient checkpointing replays a layer with the inputs that it had; what happens between
    layers it does not replay."""
    if not config.gradient_checkpointing or method is None:
        return
    if "layers" in method.stages:
        raise ArgumentError(
            "gradient_checkpointing",
            f"{method} acts in the stage 'layers' and changes lengths between layers, which a "
            "checkpoint cannot replay; switch it off, or use a method of the sequence stage",
        )


class Tuned(Trained):
    """Parameters of a model that learn its answers under compression.

    Args:
        model: the model, or peft's wrapper of it.
        method: to patch the model with during training; `None` if nothing is to be done.
        compressed: the method under which the model runs, or `None`.
        tuned: the parameters, by name.
        config: all settings; `finetune` reads those of the loop.
    """

    name = "finetune"

    def __init__(
        self,
        model: Any,
        method: Method | None,
        compressed: Method | None,
        tuned: dict[str, nn.Parameter],
        config: Config,
    ) -> None:
        self.model, self.method, self.compressed = model, method, compressed
        self.tuned, self.config = tuned, config
        own = model.get_base_model() if hasattr(model, "peft_config") else model
        self.image = getattr(own.config, "image_token_id", None)

    def start(self, accelerator: Any) -> list[Group]:
        """The tuned parameters, in float32."""
        self.accelerator = accelerator
        for parameter in self.tuned.values():
            parameter.data = parameter.data.float()
        return [Group(list(self.tuned.values()), self.config.rate)]

    @contextmanager
    def active(self) -> Iterator[None]:
        """A context in which the model is patched, in training mode, and checkpoints gradients."""
        model = self.model
        before = _checkpoints(model)
        with nullcontext() if self.method is None else patch(model, self.method):
            try:
                if self.config.gradient_checkpointing and not before:
                    model.gradient_checkpointing_enable({"use_reentrant": False})
                model.train()
                yield
            finally:
                if self.config.gradient_checkpointing and not before:
                    model.gradient_checkpointing_disable()

    def weight(self, batch: Batch) -> float:
        """The number of labels that are learnt."""
        return float((self._labels(batch)[:, 1:] != -100).sum())

    def _labels(self, batch: Batch) -> Tensor:
        labels = batch.get("labels")
        if labels is None or not bool((labels[:, 1:] != -100).any()):
            got = "none" if labels is None else "only -100"
            raise ArgumentError("batches", f"expected labels on the answers, got {got}")
        if self.image is not None and bool((labels == self.image).any()):
            raise ArgumentError(
                "batches", "expected labels on text only, got some on vision tokens; use -100 there"
            )
        return labels

    def loss(self, batch: Batch, step: int) -> Loss:
        """Mean cross-entropy of the labels, which the model itself is not given."""
        labels = self._labels(batch)
        given = {name: value for name, value in batch.items() if name != "labels"}
        if self.compressed is not None:
            given["prompt_labels"] = labels
        # Dropout of a step depends on its number only, so that resuming does not change it.
        devices = [labels.device] if labels.is_cuda else []
        with torch.random.fork_rng(devices=devices), self.accelerator.autocast():
            torch.manual_seed(1_000_003 * self.config.seed + step)
            logits = self.model(**given, use_cache=False).logits[:, :-1]
        wanted = labels[:, 1:].to(logits.device)
        learnt = wanted != -100
        chosen, target = logits[learnt].float(), wanted[learnt]
        if not chosen.requires_grad:
            raise ArgumentError(
                "batches",
                "expected inputs on which what is tuned has an effect, got a batch in which none "
                "of it takes part, such as one without images for the projector",
            )
        plain = F.cross_entropy(chosen, target)
        figures = {"loss": float(plain.detach())}
        if not self.config.label_smoothing:
            return Loss(plain, figures)
        smooth = F.cross_entropy(chosen, target, label_smoothing=self.config.label_smoothing)
        return Loss(smooth, figures)

    def state(self) -> dict[str, Any]:
        """The tuned parameters."""
        return {"tuned": {name: p.detach() for name, p in self.tuned.items()}}

    def restore(self, state: dict[str, Any]) -> None:
        """Restore what `state` returned."""
        with torch.no_grad():
            for name, parameter in self.tuned.items():
                parameter.copy_(state["tuned"][name])

    def saved(self, out: Path) -> bool:
        """Whether the weights are saved."""
        return (out / (ADAPTERS if self.config.tune == "lora" else WEIGHTS)).is_file()

    def save(self, out: Path) -> None:
        """Save the weights for `load`."""
        method = None if self.compressed is None else self.compressed.to_dict()
        save(self.model, self.tuned, out, {"method": method, **self.config.described})


def _checkpoints(model: nn.Module) -> bool:
    """Whether a layer checkpoints gradients already."""
    return any(getattr(module, "gradient_checkpointing", False) for module in model.modules())
