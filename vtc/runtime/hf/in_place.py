# SPDX-License-Identifier: Apache-2.0
"""Refuses modules that were replaced under a patch."""

from __future__ import annotations

from operator import is_
from typing import Any

from vtc.models import Adapter


def check_in_place(adapter: Adapter, layers: list[Any]) -> None:
    """Refuse a model with modules that were replaced under the patch.

    Args:
        adapter: bound to the model when it was patched.
        layers: the decoder layers that were hooked.

    Raises:
        RuntimeError: the base model, the language model or a decoder layer was replaced, or the
            number of layers changed.
    """
    found = adapter.bind(adapter.model)
    same = found.base is adapter.base and found.decoder is adapter.decoder
    if same and len(layers) == len(found.layers) and all(map(is_, layers, found.layers)):
        return
    pairs = [
        ("base model", adapter.base, found.base),
        ("language model", adapter.decoder, found.decoder),
        *(
            (f"decoder layer {i}", was, now)
            for i, (was, now) in enumerate(zip(layers, found.layers, strict=False))
        ),
    ]
    for name, was, now in pairs:
        check_same(name, was, now)
    if len(layers) != len(found.layers):
        raise RuntimeError(REPLACED.format(f"number of decoder layers ({len(found.layers)})"))


def check_same(name: str, was: Any, now: Any) -> None:
    """Refuse a replaced module.

    Args:
        name: of the module, for the error.
        was: the module that was patched.
        now: the module that runs now.

    Raises:
        RuntimeError: they differ; a module compiled by torch counts as the same.
    """
    # A module compiled by torch.compile calls the original one, with its hooks.
    if _uncompiled(was) is not _uncompiled(now):
        raise RuntimeError(REPLACED.format(f"{name}, now a {type(now).__name__},"))


def _uncompiled(module: Any) -> Any:
    return vars(module)["_modules"].get("_orig_mod", module)


REPLACED = (
    "model: its {} is not the one that was patched, and would run without the patch; unpatch "
    "before modules are replaced (adapters that save whole modules do that), and patch afterwards"
)
