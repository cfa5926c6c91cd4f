# SPDX-License-Identifier: Apache-2.0
"""Stages 3 and 4: the projector is fitted to the symbols, then everything is trained jointly.

    python -m vtc.eval.embedded.training.joint --minutes 55 --worker 0 --workers 2 &
    python -m vtc.eval.embedded.training.joint --minutes 55 --worker 1 --workers 2

Stage 3 maps the tower's features to the expected symbol embeddings. Stage 4 trains tower, projector
and language model on packs of questions; dense labels remain an auxiliary loss, so that information
stays in its patches. Two single-threaded workers that average gradients use two cores better than
one process with two threads.
"""

from __future__ import annotations

import argparse
import os
import time
from collections import defaultdict
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from transformers import AutoProcessor, LlavaForConditionalGeneration

from ...tasks.photos import PhotoLibrary, data_folder
from ..scenes.labels import FIELD_INDEX, FIELDS
from ..vlm import IMAGE_TOKENS, build_model
from .common import (
    RUNS,
    MasterOptimizer,
    dense_loss,
    flat,
    language_forward,
    rate_at,
    save,
    to_pixels,
    vision_forward,
    with_muon,
)
from .data import Stream, caption_of, triples_of
from .lm import Symbols
from .packs import Packer, answer_loss, choose, embed, evidence_loss, keep_patches
from .tower import TowerHeads, accuracies, presence


def load_stages(model: LlavaForConditionalGeneration, heads: TowerHeads, symbols: Symbols) -> None:
    """Load the weights of stages 1 and 2."""
    first = torch.load(RUNS / "tower.pt", weights_only=False)
    second = torch.load(RUNS / "lm.pt", weights_only=False)
    model.model.vision_tower.load_state_dict(first["tower"])
    heads.load_state_dict(first["heads"])
    model.model.language_model.load_state_dict(second["language"])
    model.lm_head.load_state_dict(second["head"])
    symbols.load_state_dict(second["symbols"])


def average_gradients(parameters: list[nn.Parameter], workers: int) -> None:
    """Average gradients over all workers, in one message."""
    if workers == 1:
        return
    grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
    flat_grad = torch.cat([g.reshape(-1) for g in grads]).float()
    dist.all_reduce(flat_grad)
    flat_grad /= workers
    offset = 0
    for parameter in parameters:
        size = parameter.numel()
        parameter.grad = flat_grad[offset : offset + size].view_as(parameter).to(parameter.dtype)
        offset += size


def project(model: LlavaForConditionalGeneration, features: torch.Tensor) -> torch.Tensor:
    """The two-layer projector on (b, n, d)."""
    projector = model.model.multi_modal_projector
    return projector.linear_2(projector.act(projector.linear_1(features)))


def fit_projector(
    model: LlavaForConditionalGeneration,
    heads: TowerHeads,
    symbols: Symbols,
    stream: Stream,
    seconds: float,
    workers: int,
    rate: float,
) -> None:
    """Stage 3: regression of the symbols on the tower's features, at 336 pixels.

    The tower is also trained, including on dense labels: the symbols must be linear enough in its
    features for a two-layer projector.
    """
    tower = model.model.vision_tower
    projector = list(model.model.multi_modal_projector.parameters())
    groups = [(projector, 3.0, False), *with_muon([tower, heads])]
    optimizer = MasterOptimizer(groups, weight_decay=0.0)
    places = torch.arange(IMAGE_TOKENS)[None]
    since, step = time.monotonic(), 0
    losses: list[float] = []
    over = torch.zeros(1)
    while not over:
        progress = min((time.monotonic() - since) / seconds, 1.0)
        pictures = [stream.draw() for _ in range(4)]
        labels = torch.from_numpy(np.stack([flat(p.labels) for p in pictures]))
        with torch.no_grad():
            target = symbols(labels.long(), places).float()
        pixels = to_pixels(np.stack([p.pixels() for p in pictures]))
        x, _ = vision_forward(tower, pixels, None, last=False)
        error = (project(model, x[:, 1:]).float() - target).square().mean(-1)
        shown = labels[:, FIELD_INDEX["role"]] > 0
        weight = torch.where(shown, 1.0, 0.125)
        unexplained = (error * weight).sum() / weight.sum() / target.var()
        loss = 4 * unexplained + 0.5 * dense_loss(heads.dense(x[:, 1:]), labels)
        loss.backward()
        average_gradients(optimizer.parameters, workers)
        optimizer.step(rate_at(progress, rate))
        losses.append(float(unexplained.detach()))
        step += 1
        over = torch.tensor([float(time.monotonic() - since > seconds)])
        if workers > 1:
            dist.all_reduce(over, op=dist.ReduceOp.MAX)
        if step % 20 == 0:
            print(f"projector step={step} unexplained={np.mean(losses[-20:]):.3f}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=55)
    parser.add_argument("--fit-minutes", type=float, default=2.5)
    parser.add_argument("--fit-rate", type=float, default=7e-4)
    parser.add_argument("--crowded", type=float, default=0.5, help="crowded scenes in the fit")
    parser.add_argument("--batch", type=int, default=6, help="pictures per step and worker")
    parser.add_argument("--keep", type=int, default=192, help="vision tokens until --full-after")
    parser.add_argument("--full-after", type=float, default=0.75, help="fraction of the time")
    parser.add_argument("--questions", type=int, default=10)
    parser.add_argument("--without", nargs="*", default=[], help="types of question to leave out")
    parser.add_argument(
        "--captions", type=float, default=0.3, help="fraction of steps with captions"
    )
    parser.add_argument("--rate", type=float, default=8e-4)
    parser.add_argument("--tower-scale", type=float, default=0.8)
    parser.add_argument("--dense", type=float, default=0.25, help="weight of the dense labels")
    parser.add_argument("--evidence", type=float, default=0.1, help="weight of the evidence loss")
    parser.add_argument("--photo-share", type=float, default=0.28)
    parser.add_argument("--worker", type=int, default=0)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--port", type=int, default=29571)
    parser.add_argument("--out", type=Path, default=RUNS / "joint.pt")
    parser.add_argument("--seed", type=int, default=2)
    args = parser.parse_args()

    torch.manual_seed(args.seed)
    torch.set_num_threads(1)
    if args.workers > 1:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
        dist.init_process_group(
            "gloo",
            init_method=f"tcp://127.0.0.1:{args.port}",
            rank=args.worker,
            world_size=args.workers,
            timeout=timedelta(minutes=10),
        )
    processor = AutoProcessor.from_pretrained(RUNS / "processor")
    packer = Packer(processor.tokenizer)
    model = build_model(len(processor.tokenizer)).to(torch.bfloat16)
    width = model.config.vision_config.hidden_size
    heads = TowerHeads(width).to(torch.bfloat16)
    symbols = Symbols(model.config.text_config.hidden_size).to(torch.bfloat16)
    library = PhotoLibrary(RUNS) if data_folder() else None
    # scenes that no other stage uses
    stream = Stream(library, args.photo_share, args.worker, args.workers, start=10**7)
    state = torch.load(args.out, weights_only=False) if args.out.is_file() else None
    if state is None:
        load_stages(model, heads, symbols)
        seconds = args.fit_minutes * 60
        stream.dense_share = args.crowded
        fit_projector(model, heads, symbols, stream, seconds, args.workers, args.fit_rate)
        stream.dense_share = 0.0
    inner = model.model
    groups = with_muon([inner.vision_tower, heads], args.tower_scale)
    groups += with_muon([inner.multi_modal_projector, inner.language_model, model.lm_head])
    optimizer = MasterOptimizer(groups, average=0.998)
    used, step = 0.0, 0
    if state is not None:
        optimizer.load_state_dict(state["optimizer"])
        used, step, stream.next = state["seconds"], state["step"], state["next"]
        stream.rng = np.random.default_rng([step, args.worker])

    language, head, tower = model.model.language_model, model.lm_head, model.model.vision_tower
    budget, since = args.minutes * 60, time.monotonic()
    saved = since
    scores: dict[str, list[bool]] = defaultdict(list)
    dense: dict[str, list[float]] = defaultdict(list)
    losses: list[float] = []
    clock = torch.zeros(1, dtype=torch.float64)
    while True:
        clock.fill_(used + time.monotonic() - since)
        if args.workers > 1:
            dist.broadcast(clock, 0)  # a common clock, so that all workers stop at the same step
        progress = float(clock) / budget
        if progress >= 1:
            break
        pictures = [stream.draw() for _ in range(args.batch)]
        labels = [p.labels for p in pictures]
        keep = args.keep if progress < args.full_after else IMAGE_TOKENS
        kept = [keep_patches(lab, keep, stream.rng) for lab in labels]
        wanted = [[t for t in triples_of(p) if t.type not in args.without] for p in pictures]
        asked = [choose(triples, args.questions) for triples in wanted]
        if stream.rng.random() < args.captions:
            asked = [[caption_of(p), *a] for p, a in zip(pictures, asked, strict=True)]
        pack = packer.pack(list(zip(kept, asked, strict=True)))
        pixels = to_pixels(np.stack([p.pixels() for p in pictures]))
        target = torch.from_numpy(np.stack([flat(lab) for lab in labels]))
        last = step % 4 == 0
        x, after = vision_forward(tower, pixels, None, last=last)
        features = x[:, 1:]
        chosen = features.gather(1, pack.vision[..., None].expand(-1, -1, features.shape[-1]))
        embedded = embed(pack, language.embed_tokens.weight, project(model, chosen))
        states, looks = language_forward(language, embedded, pack.positions, pack.mask, pack.where)
        loss, right = answer_loss(pack, states, head.weight)
        losses.append(float(loss.detach()))
        loss = loss + args.evidence * evidence_loss(pack, looks)
        logits = heads.dense(features)
        loss = loss + args.dense * dense_loss(logits, target)
        if after is not None:
            there = presence(target)
            for cls_head, cls in zip(heads.cls, (x[:, 0], after[:, 0]), strict=True):
                guess = cls_head(cls).float()
                loss = loss + 2 * F.binary_cross_entropy_with_logits(guess, there)
            for name, value in accuracies(logits, target).items():
                dense[name].append(value)
        loss.backward()
        average_gradients(optimizer.parameters, args.workers)
        optimizer.step(rate_at(progress, args.rate))
        step += 1
        for kind, ok in zip(pack.types, right, strict=True):
            scores[kind].append(ok)
        if step % 50 == 0 and args.worker == 0:
            line = " ".join(f"{k}={100 * np.mean(v):.0f}" for k, v in sorted(scores.items()))
            line += " | " + " ".join(f"{k}={100 * np.mean(v):.0f}" for k, v in dense.items())
            n = step * args.batch * args.workers
            print(
                f"step={step} s={float(clock):.0f} n={n} loss={np.mean(losses):.3f} {line}",
                flush=True,
            )
            losses.clear()
            scores.clear()
            dense.clear()
        if args.worker == 0 and time.monotonic() - saved > 240:
            saved = time.monotonic()
            checkpoint(model, heads, optimizer, step, stream.next, float(clock), args.out)
    if args.worker == 0:
        checkpoint(model, heads, optimizer, step, stream.next, float(clock), args.out)
    if args.workers > 1:
        dist.destroy_process_group()


def checkpoint(
    model: LlavaForConditionalGeneration,
    heads: TowerHeads,
    optimizer: MasterOptimizer,
    step: int,
    following: int,
    seconds: float,
    path: Path,
) -> None:
    """Save the averaged weights and everything needed to resume."""
    optimizer.swap_average()
    weights = {
        "model": {k: v.clone() for k, v in model.state_dict().items()},
        "heads": {k: v.clone() for k, v in heads.state_dict().items()},
    }
    optimizer.restore()
    state = {"optimizer": optimizer.state_dict(), "step": step, "next": following}
    save({**weights, **state, "seconds": seconds, "fields": list(FIELDS)}, path)


if __name__ == "__main__":
    main()
