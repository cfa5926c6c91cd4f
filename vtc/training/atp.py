# SPDX-License-Identifier: Apache-2.0
"""Trains the heads of ATP-LLaVA on any Llama-shaped LLaVA of transformers.

    python -m vtc.training.atp --model eval/embedded/weights --out runs/atp --steps 300 --target 288
    python -m vtc.training.atp --model eval/embedded/weights --out runs/atp --measure 320

Nothing is dropped in training. After each cut a token has a soft mask M in (0, 1), and all later
layers attend to it with weight exp(logit) * M, to themselves with weight exp(logit), as
DynamicViT does: a bias of log(M + eps) off the diagonal. Masks of successive cuts multiply: what
is off stays off. Scores and thresholds are the functions that `vtc.methods.atp` prunes with; at
later cuts they are computed, as there, over the tokens that are still on (M > 0.5). They are read
without a gradient: thresholds learn through M.

L = L_ntp + lambda_atp * L_atp + lambda_target * L_target (eq. 14), where L_atp (eq. 12) is the sum
over cuts of the share of tokens left after a cut times the cut's layer, and L_target (eq. 13) the
distance of the average count to its target. The average is over **all** decoder layers, as in the
paper's tables. The command line's data are the generated scenes of `vtc.eval`.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import hashlib
import json
import math
import os
import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from vtc.core import check_choice
from vtc.methods.atp import (
    NORMALISE,
    ATPHeads,
    Normalise,
    atp_layers,
    hard_mask,
    image_scores,
    redundant_score,
    save_heads,
    soft_mask,
    spatial_score,
    statistics,
)
from vtc.models import UnsupportedModelError, find
from vtc.report import Stopwatch
from vtc.runtime.hf import taps

Batch = Mapping[str, Tensor]
Batches = Callable[[int], Batch] | Iterable[Batch]
"""The batch of a step (a pure function of its number), or batches to go through in order, again
and again. A batch is what the model takes, with `labels`; -100 marks the prompt."""

EPSILON = 1e-8
_CHECKPOINT = "checkpoint.pt"


@dataclass(frozen=True)
class Config:
    """How to train.

    Args:
        out: folder for `config.json` and `model.safetensors` of the heads, `log.json`, and
            `checkpoint.pt`, which only resuming needs.
        target: vision tokens of an image, averaged over all decoder layers.
        steps: updates in all.
        rate: learning rate of the heads, warmed up over the first 5 % and then down to a tenth.
        lambda_atp, lambda_target: weights of the losses. The re-implementations have 0.05 or 0.01,
            and 0.2.
        target_over: whether the average count is that of each "image" (as the paper writes) or of
            the "batch", which lets one image have what another saves.
        smoothing: in [0, 1); with "batch", the share of the batches before in the average count.
        temperature: of the mask's sigmoids, 10 or 100 in the re-implementations.
        temperature_end: approached geometrically over the steps; `None` for no change.
        normalise, sampling, layers: as in `vtc.methods.atp.ATP`.
        width: of the heads' hidden layer.
        start_r, start_s: thresholds at the start; low ones keep nearly all.
        standardise: batches from which the scale of the statistics is taken first.
        clip: largest norm of the gradient.
        train_model: train the decoder too, at `model_rate`, and save the model in `out`/model.
        precision: of `accelerate.Accelerator`: "no" or "bf16"; losses are not scaled for fp16.
        save_every: steps between checkpoints.
        seed: of the heads' first weights.
    """

    out: str | Path
    target: float
    steps: int
    rate: float = 1e-4
    lambda_atp: float = 0.05
    lambda_target: float = 0.2
    target_over: Literal["image", "batch"] = "image"
    smoothing: float = 0.0
    temperature: float = 10.0
    temperature_end: float | None = None
    normalise: Normalise = "minmax"
    sampling: float = 3.0
    layers: tuple[int, ...] | None = None
    width: int = 64
    start_r: float = 0.02
    start_s: float = 0.5
    standardise: int = 4
    clip: float = 1.0
    train_model: bool = False
    model_rate: float = 2e-5
    precision: str = "no"
    save_every: int = 100
    seed: int = 0

    def __post_init__(self) -> None:
        positive = ("target", "rate", "temperature", "sampling", "clip", "model_rate")
        for name in positive:
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name}: expected a number above 0, got {getattr(self, name)!r}")
        for name in ("steps", "width", "standardise", "save_every"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name}: expected a whole number of at least 1, got {value!r}")
        for name in ("lambda_atp", "lambda_target"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name}: expected at least 0, got {getattr(self, name)!r}")
        for name in ("start_r", "start_s"):
            if not 0 < getattr(self, name) < 1:
                raise ValueError(
                    f"{name}: expected a number in (0, 1), got {getattr(self, name)!r}"
                )
        if not 0 <= self.smoothing < 1:
            raise ValueError(f"smoothing: expected a number in [0, 1), got {self.smoothing!r}")
        if self.temperature_end is not None and not 0 < self.temperature_end < math.inf:
            raise ValueError(
                f"temperature_end: expected a number above 0, got {self.temperature_end!r}"
            )
        check_choice("target_over", self.target_over, ("image", "batch"))
        check_choice("normalise", self.normalise, NORMALISE)
        check_choice("precision", self.precision, ("no", "bf16"))


# ---- the soft mask -------------------------------------------------------------------------------
@dataclass(frozen=True)
class ImageMask:
    """One image after one cut.

    Attributes:
        sample, image, cut: whose it is.
        mask: (n,) M after this cut, of all the image's tokens, times that of the cuts before.
        theta_r, theta_s: the thresholds.
        numbers: (STATISTICS,) what they were computed from.
    """

    sample: int
    image: int
    cut: int
    mask: Tensor
    theta_r: Tensor
    theta_s: Tensor
    numbers: Tensor


class SoftPruning:
    """Makes a model attend through the masks of ATP while a `with` block runs.

    Call `begin` with each batch before the model; `found` then has its masks. Everything is taken
    off exactly at the end of the block, also after an error.

    Args:
        model: not patched by `vtc.patch`; attends by "eager" or "sdpa", which take a float mask.
        heads: on the model's device.
        layers: 0-based layers before which there is a cut, as many as the heads have.
        hard: masks are 0 or 1, as in inference. For tests, calibration and logs.
    """

    def __init__(
        self,
        model: nn.Module,
        heads: ATPHeads,
        layers: tuple[int, ...] | None = None,
        normalise: Normalise = "minmax",
        sampling: float = 3.0,
        temperature: float = 10.0,
        hard: bool = False,
    ) -> None:
        self.adapter = find(model)
        self.num_layers = len(self.adapter.layers)
        self.cuts = atp_layers(layers, self.num_layers)
        if len(self.cuts) != heads.cuts:
            raise ValueError(f"layers: the heads are for {heads.cuts} cuts, got {self.cuts}")
        attends = getattr(self.adapter.decoder.config, "_attn_implementation", None)
        if attends not in ("eager", "sdpa"):
            raise ValueError(
                "model: a soft mask needs attention that takes a float mask, 'eager' or 'sdpa', "
                f"got {attends!r}; load it with attn_implementation='sdpa'"
            )
        if "_vtc_patch" in vars(model) or "_vtc_patch" in vars(self.adapter.base):
            raise ValueError("model: it is patched; call vtc.unpatch(model) first")
        self.heads, self.normalise, self.sampling = heads, normalise, sampling
        self.temperature, self.hard = temperature, hard
        self._handles: list[Any] = []
        self._taps: dict[int, taps.Tap] = {}
        self._batch: Batch | None = None
        self.found: list[ImageMask] = []
        self.weight: Tensor | None = None
        self._made: tuple[Tensor, Tensor | None, Tensor] | None = None

    def __enter__(self) -> SoftPruning:
        try:
            for layer in self.cuts:
                self._taps[layer - 1] = taps.install(self.adapter.layers[layer - 1].self_attn)
            for index in range(self.cuts[0] - 1, self.num_layers):
                hook = functools.partial(self._before, index)
                layer_module = self.adapter.layers[index]
                self._handles.append(layer_module.register_forward_pre_hook(hook, with_kwargs=True))
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *exc: object) -> None:
        for handle in self._handles:
            handle.remove()
        for tap in self._taps.values():
            tap.remove()
        self._handles, self._taps, self._batch, self._made = [], {}, None, None

    def begin(self, batch: Batch) -> None:
        """Take note of what the model is about to run on: `input_ids`, and, if there are any,
        `attention_mask` and `labels`, each (b, s)."""
        ids = batch["input_ids"]
        token = getattr(self.adapter.model.config, "image_token_id", None)
        if token is None:
            token = self.adapter.model.config.image_token_index
        vision = ids == token
        mask = batch.get("attention_mask")
        self.valid = torch.ones_like(vision) if mask is None else mask.bool()
        self.image, self.grid = torch.full_like(ids, -1), ids.new_full((*ids.shape, 3), -1)
        per_image = self._tokens_of_an_image(batch, int(vision.sum()))
        for b in range(ids.shape[0]):
            places = vision[b].nonzero().squeeze(1)
            if len(places):
                grid = self.adapter.grid(per_image, None).to(ids)
                repeats = len(places) // per_image
                self.image[b, places] = torch.arange(repeats, device=ids.device).repeat_interleave(
                    per_image
                )
                self.grid[b, places] = grid.repeat(repeats, 1)
        place = torch.arange(ids.shape[1], device=ids.device)
        end = torch.full_like(ids[:, 0], ids.shape[1])
        labels = batch.get("labels")
        if labels is not None:
            last = torch.where(vision, place + 1, 0).max(1).values
            answer = (labels != -100) & (place >= last[:, None])
            end = torch.where(answer, place, ids.shape[1]).min(1).values
        started = vision.cumsum(1) > 0
        self.text = ~vision & self.valid & started & (place < end[:, None])
        self.weight, self.found, self._made = None, [], None
        self._batch = batch

    def _tokens_of_an_image(self, batch: Batch, total: int) -> int:
        pixels = batch.get("pixel_values")
        images = 0 if pixels is None else pixels.shape[0]
        if (pixels is not None and pixels.dim() != 4) or (images and total % images):
            raise UnsupportedModelError(
                "batch: training takes pixel_values (images, 3, height, width) with equally many "
                f"tokens an image, got {tuple(pixels.shape) if pixels is not None else None} for "
                f"{total} vision tokens"
            )
        return total // images if images else 0

    def _before(
        self, layer: int, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        if self._batch is None:
            raise RuntimeError("SoftPruning: call begin(batch) before the model")
        hidden = args[0] if args else kwargs["hidden_states"]
        if hidden.shape[1] != self.valid.shape[1]:
            raise RuntimeError(
                f"SoftPruning: begin was called with {self.valid.shape[1]} tokens, the model runs "
                f"on {hidden.shape[1]}"
            )
        if layer in self.cuts:
            self._cut(layer)
        if layer + 1 in self.cuts:
            rows = [self._rows(b) for b in range(hidden.shape[0])]
            wide = nn.utils.rnn.pad_sequence(rows, batch_first=True)
            taps.listen_rows(self._taps[layer], wide, self.valid, 0, Stopwatch())
        if self.weight is None:
            return None
        mask = self._mask(layer, kwargs.get("attention_mask"), hidden)
        return args, {**kwargs, "attention_mask": mask}

    def _rows(self, b: int) -> Tensor:
        return ((self.image[b] >= 0) | self.text[b]).nonzero().squeeze(1)

    def _mask(self, layer: int, given: Tensor | None, hidden: Tensor) -> Tensor:
        """(b, 1, s, s) the model's own mask and the bias of the soft one."""
        s, dtype = hidden.shape[1], hidden.dtype
        assert self.weight is not None
        if self._made is not None and self._made[0] is self.weight and self._made[1] is given:
            return self._made[2]
        made = self._biased(layer, given, s, dtype)
        self._made = (self.weight, given, made)
        return made

    def _biased(self, layer: int, given: Tensor | None, s: int, dtype: torch.dtype) -> Tensor:
        assert self.weight is not None
        bias = (self.weight.float() + EPSILON).log()[:, None, None, :]
        itself = torch.eye(s, dtype=torch.bool, device=bias.device)
        bias = bias.expand(-1, 1, s, -1).masked_fill(itself, 0.0)
        if given is None:
            if self.adapter.layer_type(layer) == "sliding_attention":
                window = getattr(self.adapter.decoder.config, "sliding_window", None)
                if window is not None and window < s:
                    raise UnsupportedModelError("model: a sliding window came without its mask")
            given = torch.ones(1, 1, s, s, dtype=torch.bool, device=bias.device).tril()
        given = given[..., :s]
        if given.dtype == torch.bool:
            return bias.masked_fill(~given, torch.finfo(dtype).min).to(dtype)
        return (bias + given.float()).clamp_min(torch.finfo(dtype).min).to(dtype)

    def _cut(self, layer: int) -> None:
        cut, captured = self.cuts.index(layer), self._taps[layer - 1].captured
        before = self.weight
        size, device = self.valid.shape, self.valid.device
        whole = torch.ones(size, device=device) if before is None else before
        changed = []
        for b in range(size[0]):
            row = whole[b]
            place = self._rows(b)
            for image in range(int(self.image[b].max()) + 1):
                keys = (self.image[b] == image).nonzero().squeeze(1)
                rows = captured[0][b, 0, : len(place)]
                found = self._image(cut, b, image, rows, place, keys, row[keys])
                self.found.append(found)
                row = row.index_put((keys,), found.mask)
            changed.append(row)
        self.weight = torch.stack(changed)

    def _image(
        self,
        cut: int,
        b: int,
        image: int,
        rows: Tensor,
        place: Tensor,
        keys: Tensor,
        before: Tensor,
    ) -> ImageMask:
        held = before.detach() > 0.5
        if not bool(held.any()):  # no token is sure: what inference would keep is the best one
            held = before.detach() == before.detach().max()
        asking = torch.isin(place, keys[held]).nonzero().squeeze(1)
        text = (self.text[b, place] & (place > keys[-1])).nonzero().squeeze(1)
        own, cross = image_scores(rows, asking, text, keys)
        redundant = redundant_score(own, cross, held, self.normalise)
        spatial = spatial_score(self.grid[b, keys], self.sampling)
        numbers = statistics(own[held], cross[held], redundant[held], len(keys))
        theta_r, theta_s = self.heads(cut, numbers)
        if self.hard:
            chosen = torch.zeros_like(held)
            chosen[held] = hard_mask(redundant[held], spatial[held], theta_r, theta_s)
            mask = chosen.float()
        else:
            mask = before * soft_mask(redundant, spatial, theta_r, theta_s, self.temperature)
        return ImageMask(b, image, cut, mask, theta_r, theta_s, numbers)

    @property
    def counts(self) -> Tensor:
        """(images, cuts) tokens left after each cut, sums of the masks."""
        columns = [
            torch.stack([one.mask.sum() for one in self.found if one.cut == cut])
            for cut in range(len(self.cuts))
        ]
        return torch.stack(columns, dim=1)

    @property
    def totals(self) -> Tensor:
        """(images,) tokens of each image before any cut."""
        sizes = [len(one.mask) for one in self.found if one.cut == 0]
        return torch.tensor(sizes, device=self.valid.device).float()


# ---- the losses ----------------------------------------------------------------------------------
def atp_loss(counts: Tensor, totals: Tensor, layers: tuple[int, ...]) -> Tensor:
    """Eq. 12, mean over images: the share of tokens left after each cut times the cut's layer,
    counted from 1 (the layer after which it comes).

    Args:
        counts: (images, cuts). totals: (images,). layers: 0-based layers before which cuts are.
    """
    weights = torch.tensor(layers, device=counts.device, dtype=counts.dtype)
    return ((counts / totals[:, None]) * weights).sum(1).mean()


def average_count(
    counts: Tensor, totals: Tensor, layers: tuple[int, ...], num_layers: int
) -> Tensor:
    """(images,) vision tokens averaged over all decoder layers."""
    ends = [*layers[1:], num_layers]
    lengths = torch.tensor(
        [end - start for start, end in zip(layers, ends, strict=True)],
        device=counts.device,
        dtype=counts.dtype,
    )
    return (totals * layers[0] + (counts * lengths).sum(1)) / num_layers


def target_loss(
    average: Tensor, target: float, over: str = "image", past: float | None = None, share: float = 0
) -> Tensor:
    """Eq. 13: the distance of the average count to its target, in tokens.

    Args:
        average: (images,).
        over: of each "image", then averaged, or of the "batch" average.
        past: with "batch", the average of the batches before, which counts `share`.
    """
    if over == "image":
        return (average - target).abs().mean()
    mean = average.mean()
    if past is not None:
        # The value is that of the running average, the gradient that of this batch.
        running = share * past + (1 - share) * mean.detach()
        mean = running + mean - mean.detach()
    return (mean - target).abs()


# ---- training ------------------------------------------------------------------------------------
def train(model: nn.Module, batches: Batches, config: Config) -> Path:
    """Train heads for `model`, and go on from a checkpoint in `config.out` if there is one.

    The model is frozen, in evaluation mode and left as it was, unless `config.train_model`. With
    several processes (`accelerate launch`) each takes its own batches, and gradients are averaged.

    Returns:
        `config.out`, ready for `ATP.from_pretrained`.

    Raises:
        ValueError: settings, or a checkpoint that was made with others.
        FloatingPointError: a loss that is not a number.
    """
    from accelerate import Accelerator

    accelerator = Accelerator(mixed_precision=config.precision)
    device, out = accelerator.device, Path(config.out)
    was_training = model.training
    asked = [p.requires_grad for p in model.parameters()]
    model.to(device).eval().requires_grad_(False)
    try:
        return _train(model, batches, config, accelerator, out)
    finally:
        model.train(was_training)
        for parameter, wanted in zip(model.parameters(), asked, strict=True):
            parameter.requires_grad_(wanted)


def _train(model: Any, batches: Batches, config: Config, accelerator: Any, out: Path) -> Path:
    adapter = find(model)
    num_layers = len(adapter.layers)
    layers = atp_layers(config.layers, num_layers)
    heads = new_heads(len(layers), config).to(accelerator.device)
    settings = {
        "normalise": config.normalise,
        "sampling": config.sampling,
        "layers": list(layers),
        "num_layers": num_layers,
        "target": config.target,
    }
    groups: list[dict[str, Any]] = [{"params": list(heads.parameters()), "scale": config.rate}]
    decoder: dict[str, nn.Parameter] = {}
    if config.train_model:
        decoder = dict(adapter.decoder.named_parameters())
        for parameter in decoder.values():
            parameter.requires_grad_(True)
        groups.append({"params": list(decoder.values()), "scale": config.model_rate})
    trained = [p for group in groups for p in group["params"]]
    optimizer = torch.optim.AdamW(groups, lr=config.rate, weight_decay=0.0)
    feed = _Feed(batches, accelerator)
    step, past, log = 0, None, []
    path = out / _CHECKPOINT
    described = _described(config)
    if path.is_file():
        state = torch.load(path, map_location=accelerator.device, weights_only=True)
        for name, value in described.items():
            if state["config"].get(name) != value:
                raise ValueError(
                    f"{name}: the checkpoint in out was made with {state['config'].get(name)!r}, "
                    f"got {value!r}; give another out, or delete {_CHECKPOINT}"
                )
        heads.load_state_dict(state["heads"])
        optimizer.load_state_dict(state["optimizer"])
        with torch.no_grad():
            for name, parameter in decoder.items():
                parameter.copy_(state["decoder"][name])
        step, past, log = state["step"], state["past"], state["log"]
        if step >= config.steps and (out / "model.safetensors").is_file():
            return out  # done, and perhaps calibrated since

    soft = SoftPruning(model, heads, layers, config.normalise, config.sampling, config.temperature)

    def save() -> None:
        if not accelerator.is_main_process:
            return
        state = {
            "config": described,
            "heads": heads.state_dict(),
            "decoder": {name: p.detach() for name, p in decoder.items()},
            "optimizer": optimizer.state_dict(),
            "step": step,
            "past": past,
            "log": log,
        }
        out.mkdir(parents=True, exist_ok=True)
        _write(path, lambda file: torch.save(state, file))
        text = "".join(json.dumps(line) + "\n" for line in log)
        _write(out / "log.jsonl", lambda file: file.write_text(text))

    with soft:
        if step == 0 and not log:
            _standardise(model, soft, feed, config.standardise)
        bar = tqdm(
            total=config.steps,
            initial=step,
            desc="atp",
            disable=not accelerator.is_main_process,
        )
        while step < config.steps:
            progress = step / config.steps
            soft.temperature = config.temperature * (
                (config.temperature_end or config.temperature) / config.temperature
            ) ** (step / max(config.steps - 1, 1))
            for group in optimizer.param_groups:
                group["lr"] = group["scale"] * _schedule(progress)
            batch = feed(step)
            soft.begin(batch)
            with accelerator.autocast():
                ntp = model(**batch, use_cache=False).loss
            counts, totals = soft.counts, soft.totals
            average = average_count(counts, totals, layers, num_layers)
            early = atp_loss(counts, totals, layers)
            goal = target_loss(average, config.target, config.target_over, past, config.smoothing)
            loss = ntp + config.lambda_atp * early + config.lambda_target * goal
            if not bool(torch.isfinite(loss)):
                raise FloatingPointError(f"loss: {float(loss)} at step {step}")
            accelerator.backward(loss)
            for parameter in trained:
                if accelerator.num_processes > 1 and parameter.grad is not None:
                    parameter.grad = accelerator.reduce(parameter.grad, "mean")
            norm = accelerator.clip_grad_norm_(trained, config.clip)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            mean = float(accelerator.reduce(average.mean().detach(), "mean"))
            past = mean if past is None else config.smoothing * past + (1 - config.smoothing) * mean
            step += 1
            on = torch.stack([(one.mask > 0.5).sum() for one in soft.found]).float()
            # `found` has all images of one cut after the other.
            hard = average_count(on.view(len(layers), -1).T, totals, layers, num_layers)
            line = {
                "step": step,
                "ntp": float(ntp.detach()),
                "atp": float(early.detach()),
                "target": float(goal.detach()),
                "tokens": mean,
                "hard": float(hard.mean()),
                "norm": float(norm),
            }
            log.append({name: round(value, 5) for name, value in line.items()})
            bar.set_postfix(ntp=f"{line['ntp']:.3f}", tokens=f"{mean:.0f}", refresh=False)
            bar.update()
            if step % config.save_every == 0:
                save()
        bar.close()
    save()
    if accelerator.is_main_process:
        save_heads(heads, out, settings)
        if config.train_model:
            model.save_pretrained(out / "model")
    accelerator.wait_for_everyone()
    return out


def new_heads(cuts: int, config: Config) -> ATPHeads:
    """Seeded heads that begin with the thresholds `start_r` and `start_s` everywhere."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        heads = ATPHeads(cuts, config.width)
    with torch.no_grad():
        for cut in range(cuts):
            for head, start in (
                (heads.head_r[cut], config.start_r),
                (heads.head_s[cut], config.start_s),
            ):
                assert isinstance(head, nn.Linear)
                head.weight.mul_(0.1)
                head.bias.fill_(math.log(start / (1 - start)))
    return heads


class _Feed:
    """The batches of this process, by step."""

    def __init__(self, batches: Batches, accelerator: Any) -> None:
        self.batches, self.accelerator = batches, accelerator
        self.iterator: Any = None
        self.at = 0

    def __call__(self, step: int) -> dict[str, Tensor]:
        wanted = step * self.accelerator.num_processes + self.accelerator.process_index
        if callable(self.batches):
            batch = self.batches(wanted)
        else:
            if self.iterator is None or wanted < self.at:
                self.iterator, self.at = self._around(self.batches), 0
            batch = next(islice(self.iterator, wanted - self.at, None))
            self.at = wanted + 1
        return {name: tensor.to(self.accelerator.device) for name, tensor in batch.items()}

    @staticmethod
    def _around(batches: Iterable[Batch]) -> Iterable[Batch]:
        while True:
            found = False
            for batch in batches:
                found = True
                yield batch
            if not found:
                raise ValueError("batches: expected at least one, got none")


def _described(config: Config) -> dict[str, Any]:
    """What a checkpoint must have been made with: all settings but where and how often to save."""
    found = dataclasses.asdict(config)
    for name in ("out", "save_every"):
        del found[name]
    if found["layers"] is not None:
        found["layers"] = list(found["layers"])
    return found


def _schedule(progress: float) -> float:
    if progress < 0.05:
        return max(progress, 1e-3) / 0.05
    return 0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * (progress - 0.05) / 0.95))


def _write(path: Path, write: Callable[[Path], Any]) -> None:
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    write(temporary)
    temporary.replace(path)


@torch.no_grad()
def _standardise(model: nn.Module, soft: SoftPruning, feed: _Feed, count: int) -> None:
    """Set the scale of the statistics from the first batches, with the thresholds at the start."""
    seen: list[list[Tensor]] = [[] for _ in soft.cuts]
    for step in range(count):
        batch = feed(step)
        soft.begin(batch)
        model(**batch, use_cache=False)
        for one in soft.found:
            seen[one.cut].append(one.numbers)
    for cut, numbers in enumerate(seen):
        table = feed.accelerator.gather(torch.stack(numbers))
        soft.heads.centre[cut] = table.mean(0)
        # What hardly varies in these batches would blow up the first time that it does.
        soft.heads.spread[cut] = table.std(0, unbiased=False).clamp_min(0.05)


@torch.no_grad()
def calibrate(
    model: nn.Module, folder: str | Path, batches: Iterable[Batch], target: float, rounds: int = 10
) -> float:
    """Shift all theta_r alike until hard pruning meets the target, and write the heads anew.

    The soft count is not the hard one. One number, added to the logit of every theta_r, is found by
    bisection on data that were not trained on; what images get relative to each other is
    kept as it was learnt.

    Returns:
        The average count, over layers and images, that was reached.

    Raises:
        RuntimeError: no shift brings it within a tenth of the target; nothing is written then.
    """
    from vtc.methods.atp import load_heads

    shared, settings = load_heads(str(folder))
    device = next(model.parameters()).device
    heads = ATPHeads(shared.cuts, shared.width).to(device)
    heads.load_state_dict(shared.state_dict())
    layers = atp_layers(tuple(settings["layers"]), len(find(model).layers))
    biases: list[Any] = [head.bias for head in heads.head_r]
    start = [bias.clone() for bias in biases]
    held = [{name: t.to(device) for name, t in batch.items()} for batch in batches]
    soft = SoftPruning(model, heads, layers, settings["normalise"], settings["sampling"], hard=True)

    def reached(shift: float) -> float:
        for bias, first in zip(biases, start, strict=True):
            bias.copy_(first + shift)
        averages = []
        for batch in held:
            soft.begin(batch)
            model(**batch, use_cache=False)
            averages.append(average_count(soft.counts, soft.totals, layers, soft.num_layers))
        return float(torch.cat(averages).mean())

    low, high, best = -2.0, 2.0, (math.inf, 0.0, 0.0)
    with soft:
        for _ in range(rounds):
            middle = (low + high) / 2
            count = reached(middle)
            best = min(best, (abs(count - target), middle, count))
            low, high = (middle, high) if count > target else (low, middle)
    if best[0] > 0.1 * target:
        raise RuntimeError(
            f"target: no shift of theta_r reaches {target:g} tokens, the nearest is {best[2]:.1f}; "
            "what is kept for its place alone may be more, or the heads need more training"
        )
    for bias, first in zip(biases, start, strict=True):
        bias.copy_(first + best[1])
    save_heads(
        heads,
        folder,
        {k: v for k, v in settings.items() if k not in ("method", "cuts", "width")},
    )
    return best[2]


# ---- the command line: the embedded VLM on generated scenes --------------------------------------
@dataclass(frozen=True)
class SceneBatches:
    """Batches of generated scenes with one question each, evenly over the types of question that
    a scene allows; a pure function of the step.

    Args:
        split: "train", "val" or "test" of `vtc.eval.embedded.scenes.scenes`.
        first: number of the first scene. `steps`: batches when iterated over.
    """

    processor: Any
    split: str
    size: int
    first: int
    steps: int = 0

    def __call__(self, step: int) -> dict[str, Tensor]:
        return self.batch(
            [self.sample(self.first + step * self.size + i) for i in range(self.size)]
        )

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        return (self(step) for step in range(self.steps))

    def sample(self, number: int) -> tuple[Any, Any]:
        """A scene and one of its questions."""
        from vtc.eval.embedded.scenes.scenes import generate

        scene = generate(number, self.split)
        kinds = sorted({question.type for question in scene.questions})
        draw = random.Random(number)
        kind = draw.choice(kinds)
        return scene, draw.choice([q for q in scene.questions if q.type == kind])

    def batch(self, samples: Sequence[tuple[Any, Any]]) -> dict[str, Tensor]:
        """What the model takes, left-padded, with labels on the answers."""
        from vtc.eval.embedded.score import prompt_of

        tokenizer = self.processor.tokenizer
        texts = [
            f"{prompt_of(self.processor, question.question)} {question.answer}{tokenizer.eos_token}"
            for _, question in samples
        ]
        batch = dict(
            self.processor(
                images=[scene.image for scene, _ in samples],
                text=texts,
                return_tensors="pt",
                padding=True,
            )
        )
        labels = torch.full_like(batch["input_ids"], -100)
        for row, (_, question) in enumerate(samples):
            reply = tokenizer.encode(f" {question.answer}", add_special_tokens=False)
            labels[row, -len(reply) - 1 :] = batch["input_ids"][row, -len(reply) - 1 :]
        return {**batch, "labels": labels}


def judge(model: Any, processor: Any, samples: Sequence[tuple[Any, Any]]) -> list[bool]:
    """Whether the model answers each question on its scene right: greedy, exact match."""
    from vtc.eval.embedded.score import answers, is_right

    found: list[bool] = []
    for start in tqdm(range(0, len(samples), 16), desc="measure"):
        chunk = [(question, scene.image) for scene, question in samples[start : start + 16]]
        given = answers(model, processor, chunk)
        found += [is_right(a, q.answer) for a, (q, _) in zip(given, chunk, strict=True)]
    return found


def measure(
    model: Any, processor: Any, folder: str | Path, scenes: int, first: int = 0, seeds: int = 3
) -> dict[str, Any]:
    """Hard pruning through `vtc.patch` on scenes of the test split from number `first` on, each
    with one question.

    Returns:
        Target and mean equivalent tokens; accuracy of the full model, with the heads, and of
        Random with as many tokens; and correlations of the tokens kept of an image with what its
        scene shows.
    """
    import vtc
    from vtc.methods.atp import ATP, load_heads

    source = SceneBatches(processor, "test", 1, 0)
    samples = [source.sample(number) for number in range(first, first + scenes)]
    full = judge(model, processor, samples)
    with vtc.patch(model, ATP.from_pretrained(folder)) as patch:
        mine = judge(model, processor, samples)
        per_image = [image.per_layer for image in patch.report.images]
    mean = sum(sum(counts) / len(counts) for counts in per_image) / scenes
    drawn = []
    for seed in range(seeds):
        with vtc.patch(model, "random", keep=round(mean), seed=seed):
            drawn.append(judge(model, processor, samples))
    target = load_heads(str(folder))[1]["target"]
    return {"target": target, "first": first, **summarise(samples, per_image, full, mine, drawn)}


def summarise(
    samples: Sequence[tuple[Any, Any]],
    per_image: Sequence[Sequence[int]],
    full: Sequence[bool],
    mine: Sequence[bool],
    drawn: Sequence[Sequence[bool]],
) -> dict[str, Any]:
    """The figures of `measure` from tokens per layer and right answers, one entry a scene each."""
    import numpy as np
    from scipy.stats import pearsonr, spearmanr

    from vtc.eval.embedded.scenes.labels import FIELD_INDEX

    kept = [sum(counts) / len(counts) for counts in per_image]
    columns = {
        "objects": [len(scene.objects) for scene, _ in samples],
        "objects and characters": [
            len(scene.objects) + sum(len(text.glyphs) for text in scene.prints)
            for scene, _ in samples
        ],
        "patches that show something": [
            int((scene.labels[FIELD_INDEX["role"]] > 0).sum()) for scene, _ in samples
        ],
    }
    groups = {
        "all scenes": [True for _ in samples],
        "scenes with objects": [bool(scene.objects) for scene, _ in samples],
        "scenes of objects only": [scene.kind == "objects" for scene, _ in samples],
    }
    correlation: dict[str, Any] = {}
    for group, chosen in groups.items():
        x = np.array(kept)[chosen]
        correlation[group] = {"scenes": len(x)}
        for name, values in columns.items():
            y = np.array(values)[chosen]
            found = {"pearson": pearsonr(x, y), "spearman": spearmanr(x, y)}
            correlation[group][name] = {
                kind: {"r": round(float(r.statistic), 3), "p": float(f"{r.pvalue:.1g}")}
                for kind, r in found.items()
            }
    places: dict[str, dict[str, list[int]]] = {"kind": {}, "type": {}}
    for k, (scene, question) in enumerate(samples):
        places["kind"].setdefault(scene.kind, []).append(k)
        places["type"].setdefault(question.type, []).append(k)

    def line(where: Sequence[int]) -> dict[str, float]:
        def share(right: Sequence[bool]) -> float:
            return 100 * sum(right[k] for k in where) / len(where)

        found = {
            "tokens": sum(kept[k] for k in where) / len(where),
            "full": share(full),
            "atp": share(mine),
            "random": sum(share(right) for right in drawn) / max(len(drawn), 1),
        }
        return {"questions": len(where), **{k: round(v, 1) for k, v in found.items()}}

    by_layer = np.array(per_image).mean(0)
    return {
        "split": "test",
        "scenes": len(samples),
        "tokens": round(float(np.mean(kept)), 1),
        "tokens_deviation": round(float(np.std(kept)), 1),
        "tokens_per_layer": [round(float(n), 1) for n in by_layer],
        "all": line(range(len(samples))),
        **{f"by_{what}": {n: line(w) for n, w in sorted(p.items())} for what, p in places.items()},
        "correlation of tokens kept with": correlation,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="Heads of ATP-LLaVA for the embedded VLM.")
    parser.add_argument("--model", type=Path, required=True, help="folder of the model")
    parser.add_argument("--out", type=Path, required=True, help="folder of the heads")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--calibrate", type=int, default=0, help="held-out batches to calibrate on")
    parser.add_argument("--measure", type=int, default=0, help="test scenes; no training then")
    parser.add_argument("--first", type=int, default=0, help="number of the first of these")
    for field in dataclasses.fields(Config):
        if field.name in ("out", "layers", "train_model"):
            continue
        kind = type(field.default) if field.default not in (None, dataclasses.MISSING) else float
        if field.name == "steps":
            kind = int
        name = "--" + field.name.replace("_", "-")
        fallback = None if field.default is dataclasses.MISSING else field.default
        parser.add_argument(name, dest=field.name, type=kind, default=fallback)
    args = vars(parser.parse_args())

    from vtc.eval.embedded.vlm import load

    torch.set_num_threads(args.pop("threads"))
    folder, size = args.pop("model"), args.pop("batch")
    held, scenes, first = args.pop("calibrate"), args.pop("measure"), args.pop("first")
    model, processor = load(torch.float32, folder)
    if scenes:
        weights = hashlib.sha256((args["out"] / "model.safetensors").read_bytes()).hexdigest()
        figures = {"weights": weights, **measure(model, processor, args["out"], scenes, first)}
        (args["out"] / "figures.json").write_text(json.dumps(figures, indent=2) + "\n")
        print(json.dumps(figures, indent=2))
        return
    for name in ("steps", "target"):
        if args[name] is None:
            parser.error(f"--{name} is needed for training")
    config = Config(**args)
    train(model, SceneBatches(processor, "train", size, 5_000_000), config)
    if held:
        count = calibrate(
            model, config.out, SceneBatches(processor, "val", size, 0, held), config.target
        )
        print(f"calibrated: {count:.1f} tokens on {held * size} scenes of the split val")


if __name__ == "__main__":
    main()
