# SPDX-License-Identifier: Apache-2.0
"""Inputs that a patched model refuses, because the result would be silently wrong."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import transformers
from packaging.version import Version
from torch import Tensor, nn

from vtc.core import Method
from vtc.core.errors import ArgumentError
from vtc.runtime.hf.cache import cache_in
from vtc.runtime.hf.calls import PIXELS

UNHANDLED = (
    "{model} was given images, but none of its vision tokens reached vtc: this way of calling it "
    "is not covered, and its result would have been that of the uncompressed model"
)


HOOKS_INSIDE = Version(transformers.__version__) < Version("5.23")
"""Whether a checkpointed layer of transformers replays its hooks, when the forward is long over."""


def refuse_checkpoint(layer: nn.Module, what: str) -> None:
    """Refuse gradient checkpointing of a layer whose replay would go without what vtc changes.

    Args:
        layer: the layer that runs.
        what: what a checkpoint cannot replay, for the error.

    Raises:
        RuntimeError: the layer is checkpointed.
    """
    # Whether gradients are on does not tell: a reentrant checkpoint runs its layer without.
    if layer.training and getattr(layer, "gradient_checkpointing", False):
        raise RuntimeError(
            f"gradient_checkpointing: {what}, which a checkpoint cannot replay; switch it off for "
            "training under this patch"
        )


def refuse_hidden_answers(model: nn.Module, method: Method, given: Mapping[str, Any]) -> None:
    """Refuse a loss whose labels the model does not see: the answer would count as prompt.

    Args:
        model: the model with its head.
        method: reads the prompt; named in the error.
        given: the arguments of `model`, without labels.

    Raises:
        ArgumentError: `given` contains pixels, the model is training with gradients or
            `num_items_in_batch` is given, and the method reads the prompt.
    """
    training = model.training and torch.is_grad_enabled()
    counted = given.get("num_items_in_batch") is not None  # Trainer counts them from the labels
    images = any(given.get(name) is not None for name in PIXELS)
    if images and (training or counted):
        raise ArgumentError(
            "labels",
            f"{method} may read the prompt, whose end they tell; expected them while "
            "a loss is computed, got none. Where they must not reach the model (label smoothing, "
            "compute_loss_func), give the batch a copy of them named prompt_labels",
        )


def refuse_packed(given: Mapping[str, Any], entering: Mapping[str, Any], flash: bool) -> None:
    """Refuse packed rows, which hold several documents. The selection for one would depend on the
    others, and the masks that transformers derives do not survive compression.

    Args:
        given: the arguments of the base model.
        entering: the arguments of the decoder.
        flash: the decoder uses flash attention.

    Raises:
        ArgumentError: an argument marks packed documents, or positions restart without a mask.
    """
    for name in _PACKING:
        if given.get(name) is not None or entering.get(name) is not None:
            raise ArgumentError(name, _PACKED.format(what="it marks several documents in a row"))
    mask, positions = given.get("attention_mask"), entering.get("position_ids")
    masked = isinstance(mask, Tensor) and not (flash and bool(mask.all()))
    if positions is None or masked or cache_in(given) is not None:
        return
    if positions.dim() == 3:  # M-RoPE: the first of four axes counts text
        if len(positions) < 4:
            return
        positions = positions[0]
    if bool((positions.diff(dim=-1) != 1).any()):
        raise ArgumentError(
            "position_ids",
            _PACKED.format(
                what="without an attention_mask, positions that start anew are those of several "
                "documents in a row",
            ),
        )


_PACKING = ("cu_seq_lens_q", "cu_seq_lens_k", "cu_seqlens", "seq_idx")


_PACKED = (
    "{what}, which a patched model does not compress; give each document a row of its own, "
    "with an attention_mask, or unpatch"
)
