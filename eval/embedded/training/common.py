# SPDX-License-Identifier: Apache-2.0
"""Common parts of the training stages: inputs, forward passes, the optimiser and checkpoints.

The forward passes use the modules of transformers but call them layer by layer: on a CPU, attention
by plain matrix products is about 1.6 times as fast as the fused kernel with its backward pass, and
windows of a picture can have the position embeddings of their true place.
`tests/eval/test_embedded.py` compares them with the model's ordinary forward.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from transformers import CLIPVisionModel, LlamaModel

from ..scenes.labels import FIELDS, GRID, PATCH_SIZE

RUNS = Path(__file__).resolve().parent / "runs"
"""Folder for checkpoints and logs; ignored by git."""

MEAN = torch.tensor([0.48145466, 0.4578275, 0.40821073])
STD = torch.tensor([0.26862954, 0.26130258, 0.27577711])


def to_pixels(images: np.ndarray) -> torch.Tensor:
    """Pictures (n, H, W, 3) uint8 as the tower's input: (n, 3, H, W) bf16, normalised."""
    pixels = (torch.from_numpy(images).float() / 255 - MEAN) / STD
    return pixels.permute(0, 3, 1, 2).contiguous().to(torch.bfloat16)


def _vision(tower: CLIPVisionModel) -> Any:
    return getattr(tower, "vision_model", tower)


def attend(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None
) -> torch.Tensor:
    """Attention of (b, heads, n, d) by plain products; `mask` is added to the scores."""
    scores = torch.matmul(q * q.shape[-1] ** -0.5, k.transpose(-1, -2))
    if mask is not None:
        scores = scores + mask
    return torch.matmul(F.softmax(scores, dim=-1), v)


def vision_layer(layer: Any, x: torch.Tensor, heads: int) -> torch.Tensor:
    """One encoder layer of CLIP on (b, n, d)."""
    b, n, d = x.shape
    h = layer.layer_norm1(x)
    attention = layer.self_attn
    q, k, v = (
        projection(h).view(b, n, heads, d // heads).transpose(1, 2).contiguous()
        for projection in (attention.q_proj, attention.k_proj, attention.v_proj)
    )
    x = x + attention.out_proj(attend(q, k, v, None).transpose(1, 2).reshape(b, n, d))
    h = layer.mlp.fc1(layer.layer_norm2(x))
    return x + layer.mlp.fc2(layer.mlp.activation_fn(h))


def vision_forward(
    tower: CLIPVisionModel, pixels: torch.Tensor, places: torch.Tensor | None, last: bool
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Run the tower.

    Args:
        tower: the tower.
        pixels: (b, 3, H, W).
        places: (b, n) the patches' places in the 24 x 24 grid; `None` for whole pictures.
        last: whether to run the last layer.

    Returns:
        (b, 1 + n, d) states that LLaVA reads (of the penultimate layer), and those of the last
        layer or `None`.
    """
    vision = _vision(tower)
    embeddings = vision.embeddings
    kernel = embeddings.patch_embedding.weight.flatten(1)
    b, _, height, width = pixels.shape
    rows, cols = height // PATCH_SIZE, width // PATCH_SIZE
    # the convolution as a matrix product, as its stride equals its size
    patches = pixels.view(b, 3, rows, PATCH_SIZE, cols, PATCH_SIZE).permute(0, 2, 4, 1, 3, 5)
    x = patches.reshape(b, rows * cols, -1) @ kernel.T
    positions = embeddings.position_embedding.weight
    x = x + (positions[1:] if places is None else positions[1:][places])
    cls = (embeddings.class_embedding + positions[0]).expand(b, 1, -1)
    x = vision.pre_layrnorm(torch.cat([cls, x], dim=1))
    heads = tower.config.num_attention_heads
    layers = vision.encoder.layers
    for layer in layers[:-1]:
        x = vision_layer(layer, x, heads)
    return x, vision_layer(layers[-1], x, heads) if last else None


def rotary(model: LlamaModel, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(b, 1, n, d) cosine and sine of the rotary embedding at `positions` (b, n)."""
    frequencies = model.rotary_emb.inv_freq.float()
    angles = positions[..., None].float() * frequencies
    angles = torch.cat([angles, angles], dim=-1)[:, None]
    return angles.cos().to(torch.bfloat16), angles.sin().to(torch.bfloat16)


def _rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    half = x.shape[-1] // 2
    return x * cos + torch.cat([-x[..., half:], x[..., :half]], dim=-1) * sin


LOOKING_LAYERS, LOOKING_HEADS = (3, 5), (0, 2)
"""Decoder layers and heads whose attention `packs.evidence_loss` supervises."""


def language_forward(
    model: LlamaModel,
    x: torch.Tensor,
    positions: torch.Tensor,
    mask: torch.Tensor,
    where: torch.Tensor | None = None,
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Run the language model.

    Args:
        model: the language model.
        x: (b, n, d) embeddings.
        positions: (b, n).
        mask: (b, 1, n, n), added to the attention scores.
        where: (m, 2) batch rows and places whose attention is returned, or `None`.

    Returns:
        (b, n, d) final states, and for each of `LOOKING_LAYERS` the (m, heads, n) attention
        log-probabilities of `LOOKING_HEADS`.
    """
    looks: list[torch.Tensor] = []
    b, n, d = x.shape
    config = model.config
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    eps, size = config.rms_norm_eps, d // heads
    cos, sin = rotary(model, positions)

    def norm(module: nn.Module, h: torch.Tensor) -> torch.Tensor:
        return F.rms_norm(h, (d,), module.weight, eps)

    for depth, layer in enumerate(model.layers):
        h = norm(layer.input_layernorm, x)
        attention = layer.self_attn
        q = attention.q_proj(h).view(b, n, heads, size).transpose(1, 2)
        k = attention.k_proj(h).view(b, n, kv_heads, size).transpose(1, 2)
        v = attention.v_proj(h).view(b, n, kv_heads, size).transpose(1, 2)
        q, k = _rotate(q, cos, sin), _rotate(k, cos, sin)
        k, v = (t.repeat_interleave(heads // kv_heads, dim=1).contiguous() for t in (k, v))
        if where is not None and depth in LOOKING_LAYERS:
            row, place = where.T
            heard = [
                (q[row, head, place][:, None] * k[row, head]).sum(-1) for head in LOOKING_HEADS
            ]
            scores = torch.stack(heard, dim=1).float() * size**-0.5
            looks.append(F.log_softmax(scores + mask[row, :, place].float(), dim=-1))
        x = x + attention.o_proj(attend(q, k, v, mask).transpose(1, 2).reshape(b, n, d))
        h = norm(layer.post_attention_layernorm, x)
        mlp = layer.mlp
        x = x + mlp.down_proj(F.silu(mlp.gate_proj(h)) * mlp.up_proj(h))
    return norm(model.norm, x), looks


class DenseHead(nn.Module):
    """Predicts dense labels from patch features (b, n, d); logits are split by field."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.linear = nn.Linear(width, sum(FIELDS.values()))

    def forward(self, features: torch.Tensor) -> list[torch.Tensor]:
        return list(self.linear(self.norm(features)).split(list(FIELDS.values()), dim=-1))


def dense_loss(logits: list[torch.Tensor], labels: torch.Tensor) -> torch.Tensor:
    """Weighted cross-entropy; `labels` (b, fields, n).

    Patches to which a label does not apply, which are the majority, have a weight of an eighth.
    """
    total = torch.zeros(())
    for k, field_logits in enumerate(logits):
        target = labels[:, k].reshape(-1).long()
        loss = F.cross_entropy(field_logits.flatten(0, -2).float(), target, reduction="none")
        weight = torch.where(target > 0, 1.0, 0.125)
        total = total + (loss * weight).sum() / weight.sum()
    return total


class MasterOptimizer:
    """Muon and AdamW on fp32 copies of bf16 parameters, with a moving average of the weights.

    Muon (Jordan et al., 2024) updates the matrices of groups whose third entry is true, in about
    half of AdamW's steps on these small transformers; AdamW updates the rest.
    """

    def __init__(
        self,
        groups: Iterable[tuple[list[nn.Parameter], float, bool]],
        weight_decay: float = 0.02,
        average: float = 0.0,
    ) -> None:
        self.parameters: list[nn.Parameter] = []
        self.masters: list[torch.Tensor] = []
        self.average = average
        self.averages: list[torch.Tensor] = []
        settings, orthogonal = [], []
        for parameters, scale, muon in groups:
            masters = [p.detach().float().clone() for p in parameters]
            self.parameters += parameters
            self.masters += masters
            if muon:
                matrices = [m for m in masters if m.ndim == 2]
                orthogonal.append({"params": matrices, "scale": scale})
                masters = [m for m in masters if m.ndim != 2]
            for decay, chosen in (
                (weight_decay, [m for m in masters if m.ndim > 1]),
                (0.0, [m for m in masters if m.ndim <= 1]),
            ):
                if chosen:
                    settings.append({"params": chosen, "weight_decay": decay, "scale": scale})
        self.optimizers: list[torch.optim.Optimizer] = [
            torch.optim.AdamW(settings, lr=1e-3, betas=(0.9, 0.98), fused=True)
        ]
        if orthogonal:
            self.optimizers.append(
                torch.optim.Muon(
                    orthogonal, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw"
                )
            )
        if average:
            self.averages = [m.clone() for m in self.masters]
        self.steps = 0

    def step(self, rate: float, clip: float = 1.0) -> float:
        """One update at learning rate `rate`; returns the gradient norm."""
        for master, parameter in zip(self.masters, self.parameters, strict=True):
            master.grad = None if parameter.grad is None else parameter.grad.float()
            parameter.grad = None
        norm = torch.nn.utils.clip_grad_norm_(self.masters, clip)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = rate * group["scale"]
            if math.isfinite(float(norm)):
                optimizer.step()
        self.steps += 1
        with torch.no_grad():
            for master, parameter in zip(self.masters, self.parameters, strict=True):
                parameter.copy_(master)
            if self.averages:
                decay = min(self.average, (1 + self.steps) / (10 + self.steps))
                torch._foreach_lerp_(self.averages, self.masters, 1 - decay)
        return float(norm)

    def swap_average(self) -> None:
        """Write the averaged weights into the parameters, until `restore`."""
        with torch.no_grad():
            for average, parameter in zip(self.averages, self.parameters, strict=True):
                parameter.copy_(average)

    def restore(self) -> None:
        """Write the current weights into the parameters."""
        with torch.no_grad():
            for master, parameter in zip(self.masters, self.parameters, strict=True):
                parameter.copy_(master)

    def state_dict(self) -> dict[str, Any]:
        return {
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "masters": self.masters,
            "averages": self.averages,
            "steps": self.steps,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        with torch.no_grad():
            for mine, saved in zip(self.masters, state["masters"], strict=True):
                mine.copy_(saved)
            for mine, saved in zip(self.averages, state["averages"], strict=True):
                mine.copy_(saved)
        self.steps = state["steps"]
        self.restore()


def with_muon(
    modules: Iterable[nn.Module], scale: float = 1.0
) -> list[tuple[list[nn.Parameter], float, bool]]:
    """Groups for `MasterOptimizer`, with Muon for matrices inside transformer layers."""
    matrices: list[nn.Parameter] = []
    others: list[nn.Parameter] = []
    for module in modules:
        for name, parameter in module.named_parameters():
            inner = ".layers." in f".{name}" and parameter.ndim == 2
            (matrices if inner else others).append(parameter)
    return [(matrices, scale, True), (others, scale, False)]


def rate_at(progress: float, peak: float, warmup: float = 0.02, floor: float = 0.02) -> float:
    """Learning rate at `progress` in [0, 1]: linear warm-up, then a cosine to `floor`."""
    if progress < warmup:
        return peak * (progress + 1e-4) / warmup
    along = min((progress - warmup) / (1 - warmup), 1.0)
    return peak * (floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * along)))


def save(state: dict[str, Any], path: Path) -> None:
    """Write a checkpoint atomically."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(f".{os.getpid()}.tmp")
    torch.save(state, temporary)
    temporary.replace(path)


def flat(labels: np.ndarray) -> np.ndarray:
    """Labels (..., 24, 24) as (..., 576)."""
    return labels.reshape(*labels.shape[:-2], GRID * GRID)
