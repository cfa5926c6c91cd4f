# SPDX-License-Identifier: Apache-2.0
"""The parts of a model that are tuned: found by name, saved, and loaded again."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from vtc.core.errors import ArgumentError
from vtc.models import Adapter
from vtc.training.finetune.config import Config

WEIGHTS, ADAPTERS, RECORD = "tuned.safetensors", "adapter_config.json", "finetune.json"


def parameters(adapter: Adapter, tune: str) -> dict[str, nn.Parameter]:
    """The parameters that `tune` names.

    Args:
        adapter: bound to the model.
        tune: as in `Config`, except "lora".

    Returns:
        The parameters by name in the model.

    Raises:
        ArgumentError: the model has no such parameters.
    """
    every = dict(adapter.model.named_parameters())
    if tune == "full":
        return every
    if tune == "projector":
        return _within(every, tune, [adapter.projector()])
    if tune == "decoder":
        return _within(every, tune, [adapter.decoder, getattr(adapter.model, "lm_head", None)])
    try:
        found = {name: p for name, p in every.items() if re.search(tune, name)}
    except re.error as error:
        raise ArgumentError("tune", f"{tune!r} is not a regular expression: {error}") from None
    if not found:
        parts = sorted({".".join(name.split(".")[:2]) for name in every})
        raise ArgumentError(
            "tune",
            "expected 'projector', 'decoder', 'full', 'lora' or a regular expression of "
            f"parameters' names, got {tune!r}, which none matches; they begin with "
            f"{', '.join(parts)}",
        )
    return found


def _within(
    every: dict[str, nn.Parameter], tune: str, modules: list[nn.Module | None]
) -> dict[str, nn.Parameter]:
    own = {id(p) for module in modules if module is not None for p in module.parameters()}
    found = {name: p for name, p in every.items() if id(p) in own}
    if not found:
        raise ArgumentError(
            "tune", f"vtc knows no {tune} with parameters in this model; name its parameters"
        )
    return found


def with_adapters(adapter: Adapter, config: Config) -> Any:
    """The model with new adapters on the linear layers of the decoder, wrapped by peft.

    Raises:
        ArgumentError: peft is not installed, the model has adapters, or no linear layers.
    """
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError:
        raise ArgumentError("tune", "'lora' needs peft; pip install peft") from None
    model = adapter.model
    if hasattr(model, "peft_config"):
        raise ArgumentError("model", "it has adapters; unload or merge them before new ones")
    layers: Any = adapter.layers
    place = next(name for name, module in model.named_modules() if module is layers)
    leaves = sorted(
        {name.split(".")[-1] for name, m in layers.named_modules() if isinstance(m, nn.Linear)}
    )
    if not leaves:
        raise ArgumentError("tune", "'lora': the decoder's layers have no linear layers")
    settings = LoraConfig(
        r=config.lora_rank,
        lora_alpha=config.lora_alpha,  # type: ignore[arg-type]
        lora_dropout=config.lora_dropout,
        target_modules=rf"{re.escape(place)}\.\d+\..*?({'|'.join(leaves)})",
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        return get_peft_model(model, settings).train(model.training)


def save(model: Any, tuned: dict[str, nn.Parameter], out: Path, record: dict[str, Any]) -> None:
    """Write the tuned parameters, or the adapters, and how they were made.

    Args:
        model: the model, or peft's wrapper of it.
        tuned: parameters by name.
        out: folder.
        record: written to finetune.json.
    """
    out.mkdir(parents=True, exist_ok=True)
    if hasattr(model, "peft_config"):
        model.save_pretrained(out)
    else:
        tensors = {name: p.detach().cpu().contiguous() for name, p in tuned.items()}
        save_file(tensors, out / WEIGHTS)
    (out / RECORD).write_text(json.dumps(record, indent=2) + "\n", "utf-8")


def load(model: nn.Module, folder: str | Path) -> Any:
    """Load what `finetune` saved into a model like the one that was tuned.

    Parameters are copied into the model itself; adapters are added to it. The model may be patched
    before or after; nothing is patched here, and `finetune.json` names the method.

    Args:
        model: the model, as it was before tuning, without wrappers.
        folder: `Config.out`.

    Returns:
        `model`, or for adapters the `PeftModel` around it.

    Raises:
        ArgumentError: nothing was saved there, or it does not fit the model.
    """
    out = Path(folder)
    if (out / ADAPTERS).is_file():
        from peft import PeftModel

        return PeftModel.from_pretrained(model, str(out))
    if not (out / WEIGHTS).is_file():
        raise ArgumentError("folder", f"expected {WEIGHTS} or {ADAPTERS} in it, got {str(out)!r}")
    saved, own = load_file(out / WEIGHTS), dict(model.named_parameters())
    wrong = [n for n, t in saved.items() if n not in own or own[n].shape != t.shape]
    if wrong:
        raise ArgumentError(
            "folder",
            f"{out}: the model has no parameter {wrong[0]} of shape {tuple(saved[wrong[0]].shape)}"
            + (f", and {len(wrong) - 1} more do not fit" if len(wrong) > 1 else ""),
        )
    with torch.no_grad():
        for name, tensor in saved.items():
            own[name].copy_(tensor)
    return model
