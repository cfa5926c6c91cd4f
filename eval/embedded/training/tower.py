# SPDX-License-Identifier: Apache-2.0
"""Stage 1: the vision tower alone, on dense local labels.

    python -m vtc.eval.embedded.training.tower --minutes 35

Windows of 144 patches are cut from rendered 336-pixel pictures, with the position embeddings of
their true place, so that one rendering serves several windows and attention is cheap. The [CLS]
token learns the window's contents, at the layer that LLaVA reads and at the last one.
"""

from __future__ import annotations

import argparse
import math
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from transformers import CLIPVisionModel

from ...tasks.photos import PhotoLibrary, data_folder
from ..scenes.labels import FIELD_INDEX, FIELDS, GRID, PATCH_SIZE
from ..vlm import build_config
from .common import (
    RUNS,
    DenseHead,
    MasterOptimizer,
    dense_loss,
    rate_at,
    save,
    to_pixels,
    vision_forward,
    with_muon,
)
from .data import Stream, window_of

PRESENCE_FIELDS: tuple[str, ...] = ("shape", "color", "char", "key", "photo")
PRESENCE = sum(FIELDS[name] for name in PRESENCE_FIELDS)


def presence(labels: torch.Tensor) -> torch.Tensor:
    """(b, PRESENCE) of 0 and 1: which classes occur in each picture's labels (b, fields, n)."""
    parts = [
        F.one_hot(labels[:, FIELD_INDEX[name]].long(), FIELDS[name]).amax(dim=1)
        for name in PRESENCE_FIELDS
    ]
    return torch.cat(parts, dim=-1).float()


class TowerHeads(nn.Module):
    """The tower's training heads: dense labels of patches, and presence from [CLS]."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.dense = DenseHead(width)
        self.cls = nn.ModuleList(
            [nn.Sequential(nn.LayerNorm(width), nn.Linear(width, PRESENCE)) for _ in range(2)]
        )


def windows(stream: Stream, pictures: int, each: int) -> tuple[list[Any], ...]:
    """Windows by shape: pixels, labels and places of squares and of strips."""
    found: dict[tuple[int, int], tuple[list[Any], list[Any], list[Any]]] = {}
    for _ in range(pictures):
        picture = stream.draw()
        pixels, labels = picture.pixels(), picture.labels
        boxes = {window_of(picture, stream.rng) for _ in range(each)}
        for top, left, rows, cols in boxes:
            group = found.setdefault((rows, cols), ([], [], []))
            area = (slice(top * PATCH_SIZE, (top + rows) * PATCH_SIZE),)
            area += (slice(left * PATCH_SIZE, (left + cols) * PATCH_SIZE),)
            group[0].append(pixels[area])
            window = labels[:, top : top + rows, left : left + cols]
            group[1].append(window.reshape(len(FIELDS), -1))
            place = np.arange(top, top + rows)[:, None] * GRID + np.arange(left, left + cols)
            group[2].append(place.reshape(-1))
    return tuple(found.values())


def step_loss(
    tower: CLIPVisionModel, heads: TowerHeads, groups: tuple[list[Any], ...], with_cls: bool
) -> tuple[torch.Tensor, list[torch.Tensor], torch.Tensor]:
    """Loss, logits by field, and labels, over all windows of `groups`."""
    features, cls, last_cls, labels = [], [], [], []
    for pixels, window_labels, places in groups:
        x, last = vision_forward(
            tower, to_pixels(np.stack(pixels)), torch.from_numpy(np.stack(places)), last=with_cls
        )
        features.append(x[:, 1:])
        if last is not None:
            cls.append(x[:, 0])
            last_cls.append(last[:, 0])
        labels.append(torch.from_numpy(np.stack(window_labels)))
    target = torch.cat(labels)
    logits = heads.dense(torch.cat(features))
    loss = dense_loss(logits, target)
    if not cls:
        return loss, logits, target
    there = presence(target)
    for head, state in zip(heads.cls, (cls, last_cls), strict=True):
        guess = head(torch.cat(state)).float()
        loss = loss + 3 * F.binary_cross_entropy_with_logits(guess, there)
    return loss, logits, target


NEAR = tuple((dy, dx) for dy in (-1, 0, 1) for dx in (-1, 0, 1))
OFFSETS: tuple[tuple[tuple[int, int], ...], ...] = (
    (*NEAR, (0, -2), (0, 2), (2, 0)),
    (*NEAR, (0, -2), (0, 2), (-2, 0)),
    (*NEAR, (-2, 0), (2, 0), (0, 3)),
    (*((2 * dy, 2 * dx) for dy, dx in NEAR), (0, -1), (0, 1), (0, -3)),
    ((0, 0), (0, -1), (0, -3), (0, -4), (0, -6), (0, 1), (0, 3), (0, 4), (0, 6), (-3, 0), (3, 0),
     (-1, 0)),
)  # fmt: skip
"""Initial neighbours (rows, columns) of the heads in each of the first layers."""

PLACE_WIDTH = 64
"""Number of features that initially hold a patch's place and nothing else."""

SHARPNESS = 4.0
"""Initial margin, in logits, of a head's neighbour over distant patches."""


def start_weights(tower: CLIPVisionModel, patches: np.ndarray) -> None:
    """Initialise a small tower so that it learns shapes and characters in minutes.

    From random weights it learns only colours, as no head attends to a particular neighbour. So the
    heads of the first layers start as the taps of a convolution (Cordonnier et al., 2020): the
    first features hold the patch's place as sines of row and column, separate from its contents; a
    query is that place rotated by the head's offset, which the neighbour's key matches best. The
    patch embedding partly whitens `patches` (n, 588), whose mean brightness would dominate strokes
    and edges.
    """
    vision = getattr(tower, "vision_model", tower)
    embeddings = vision.embeddings
    width = embeddings.position_embedding.weight.shape[1]
    contents = width - PLACE_WIDTH
    values, vectors = np.linalg.eigh(np.cov(patches, rowvar=False))
    values, vectors = values[::-1][:contents], vectors[:, ::-1][:, :contents]
    whiten = (vectors / (values + 0.02) ** 0.3).T
    whiten *= 0.66 / (patches[::20] @ whiten.T).std()
    mixing = np.linalg.qr(np.random.default_rng(0).standard_normal((contents, contents)))[0]
    kernel = torch.zeros(width, patches.shape[1])
    kernel[PLACE_WIDTH:] = torch.from_numpy((mixing @ whiten).astype(np.float32))
    quarter, amplitude = PLACE_WIDTH // 4, 1.4
    frequencies = torch.linspace(0.25, 1.6, quarter)
    angles = torch.arange(GRID).float()[:, None] * frequencies
    waves = amplitude * torch.cat([angles.sin(), angles.cos()], dim=1)
    rows = waves[:, None, :].expand(GRID, GRID, -1)
    columns = waves[None, :, :].expand(GRID, GRID, -1)
    heads = tower.config.num_attention_heads
    size = width // heads
    used = torch.linspace(0, quarter - 1, size // 4).round().int().tolist()
    gain = (SHARPNESS * size**0.5) ** 0.5 / amplitude
    with torch.no_grad():
        embeddings.patch_embedding.weight.copy_(kernel.view_as(embeddings.patch_embedding.weight))
        embeddings.position_embedding.weight.zero_()
        grid = torch.cat([rows, columns], dim=-1).reshape(GRID * GRID, PLACE_WIDTH)
        embeddings.position_embedding.weight[1:, :PLACE_WIDTH] = grid
        for depth, layer in enumerate(vision.encoder.layers):
            attention, mlp = layer.self_attn, layer.mlp
            for weight in (attention.v_proj.weight, attention.out_proj.weight, mlp.fc1.weight):
                nn.init.normal_(weight, std=width**-0.5)
            nn.init.normal_(mlp.fc2.weight, std=0.5 * mlp.fc2.weight.shape[1] ** -0.5)
            attention.v_proj.weight[:, :PLACE_WIDTH] = 0
            attention.out_proj.weight[:PLACE_WIDTH] = 0
            mlp.fc2.weight[:PLACE_WIDTH] = 0
            query, key = attention.q_proj.weight, attention.k_proj.weight
            if depth >= len(OFFSETS):
                nn.init.normal_(query, std=0.8 * width**-0.5)
                key.copy_(query)
                continue
            for weight in (query, key):
                nn.init.normal_(weight, std=0.01)
            for head in range(heads):
                row = head * size
                offset = OFFSETS[depth][head % len(OFFSETS[depth])]
                for start, by in ((0, offset[0]), (2 * quarter, offset[1])):
                    for wave in used:
                        turn = float(frequencies[wave]) * by
                        sine, cosine = start + wave, start + quarter + wave
                        key[row, sine] += gain
                        key[row + 1, cosine] += gain
                        query[row, sine] += gain * math.cos(turn)
                        query[row, cosine] += gain * math.sin(turn)
                        query[row + 1, cosine] += gain * math.cos(turn)
                        query[row + 1, sine] -= gain * math.sin(turn)
                        row += 2


def sample_patches(stream: Stream, pictures: int = 150) -> np.ndarray:
    """(n, 588) patches of normalised pixels, in the order of the patch embedding's kernel."""
    images = to_pixels(np.stack([stream.draw().pixels() for _ in range(pictures)])).float()
    patches = F.unfold(images, PATCH_SIZE, stride=PATCH_SIZE).transpose(1, 2).flatten(0, 1)
    return patches.numpy()[::2]


def accuracies(logits: list[torch.Tensor], target: torch.Tensor) -> dict[str, float]:
    """Accuracy of each field over the patches to which it applies."""
    found = {}
    for k, name in enumerate(FIELDS):
        truth = target[:, k].reshape(-1).long()
        applies = truth > 0
        if applies.any():
            guess = logits[k].flatten(0, -2).argmax(-1)
            found[name] = float((guess == truth)[applies].float().mean())
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=35)
    parser.add_argument("--pictures", type=int, default=8, help="pictures per step")
    parser.add_argument("--each", type=int, default=2, help="windows per picture")
    parser.add_argument("--rate", type=float, default=1e-3)
    parser.add_argument("--photo-share", type=float, default=0.35)
    parser.add_argument("--dense", type=float, default=0.75, help="fraction of crowded scenes")
    parser.add_argument("--start", type=Path, default=None, help="tower.pt to continue from")
    parser.add_argument("--out", type=Path, default=RUNS / "tower.pt")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    torch.manual_seed(args.seed)
    torch.set_num_threads(1)
    config = build_config(vocab_size=1024).vision_config
    tower = CLIPVisionModel(config)
    heads = TowerHeads(config.hidden_size).to(torch.bfloat16)
    library = PhotoLibrary(RUNS) if data_folder() else None
    if not args.out.is_file() and args.start is None:
        start_weights(tower, sample_patches(Stream(library, 0.3, start=10**9)))
    tower = tower.to(torch.bfloat16)
    if args.start is not None:
        earlier = torch.load(args.start, weights_only=False)
        tower.load_state_dict(earlier["tower"])
        heads.load_state_dict(earlier["heads"])
    optimizer = MasterOptimizer(with_muon([tower, heads]), average=0.998)
    # g = 2 is frequent, as its tiles fill a window of 12 x 12 patches
    grids, first = (0.2, 0.5, 0.25, 0.05), 0 if args.start is None else 8 * 10**6
    stream = Stream(library, args.photo_share, start=first, grids=grids, dense_share=args.dense)
    used, step = 0.0, 0
    if args.out.is_file():
        state = torch.load(args.out, weights_only=False)
        optimizer.load_state_dict(state["optimizer"])
        used, step, stream.next = state["seconds"], state["step"], state["next"]

    budget, since, saved = args.minutes * 60, time.monotonic(), time.monotonic()
    totals: dict[str, list[float]] = {}
    while used + time.monotonic() - since < budget:
        progress = (used + time.monotonic() - since) / budget
        groups = windows(stream, args.pictures, args.each)
        loss, logits, target = step_loss(tower, heads, groups, with_cls=step % 4 == 0)
        loss.backward()
        norm = optimizer.step(rate_at(progress, args.rate))
        step += 1
        found = {"loss": float(loss.detach()), "norm": norm}
        if step % 10 == 0:
            found |= accuracies(logits, target)
        for name, value in found.items():
            totals.setdefault(name, []).append(value)
        if step % 100 == 0:
            line = " ".join(f"{n}={np.mean(v):.3f}" for n, v in totals.items())
            seconds = used + time.monotonic() - since
            print(f"step={step} s={seconds:.0f} scenes={stream.next} {line}", flush=True)
            totals.clear()
        last_call = used + time.monotonic() - since >= budget
        if time.monotonic() - saved > 180 or last_call:
            saved = time.monotonic()
            optimizer.swap_average()
            weights = {
                "tower": {k: v.clone() for k, v in tower.state_dict().items()},
                "heads": {k: v.clone() for k, v in heads.state_dict().items()},
            }
            optimizer.restore()
            state = {"optimizer": optimizer.state_dict(), "step": step, "next": stream.next}
            save({**weights, **state, "seconds": used + saved - since}, args.out)


if __name__ == "__main__":
    main()
