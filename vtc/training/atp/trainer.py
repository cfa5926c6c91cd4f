# SPDX-License-Identifier: Apache-2.0
"""ATP's heads for `vtc.training.loop`."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vtc.methods.atp import ATPHeads, atp_layers, save_heads
from vtc.models import find
from vtc.training.atp.config import Config
from vtc.training.atp.loss import atp_loss, average_count, target_loss
from vtc.training.atp.mask import SoftPruning
from vtc.training.loop import Batch, Batches, Feed, Group, Loop, Loss, Trained, fit


def train(model: nn.Module, batches: Batches, config: Config) -> Path:
    """Train heads for `model`, resuming from a checkpoint in `config.out` if there is one.

    The model is frozen, in evaluation mode, and unchanged afterwards, unless `config.train_model`.
    With several processes (`accelerate launch`), each has its own batches, and gradients are
    averaged.

    Args:
        model: the model, unpatched.
        batches: batches of all processes.
        config: the settings.

    Returns:
        `config.out`, ready for `ATP.from_pretrained`.

    Raises:
        ArgumentError: invalid settings, or a checkpoint made with others.
        FloatingPointError: the loss is not finite.
    """
    loop = Loop(
        out=Path(config.out),
        steps=config.steps,
        clip=config.clip,
        precision=config.precision,
        save_every=config.save_every,
        made_with=config.described,
    )
    return fit(model, Heads(model, config), batches, loop)


class Heads(Trained):
    """Heads that learn thresholds from soft masks, and optionally the decoder.

    Args:
        model: the model.
        config: all settings; `train` reads those of the loop.
    """

    name = "atp"

    def __init__(self, model: nn.Module, config: Config) -> None:
        self.model: Any = model
        self.config = config
        self.adapter = find(model)
        self.num_layers = len(self.adapter.layers)
        self.layers = atp_layers(config.layers, self.num_layers)
        self.decoder: dict[str, nn.Parameter] = {}
        self.past: float | None = None

    def start(self, accelerator: Any) -> list[Group]:
        """Seeded heads on the device, and the decoder's parameters with `train_model`."""
        config, self.accelerator = self.config, accelerator
        self.heads = new_heads(len(self.layers), config).to(accelerator.device)
        self.soft = SoftPruning(
            self.model,
            self.heads,
            self.layers,
            config.normalise,
            config.sampling,
            config.temperature,
        )
        groups = [Group(list(self.heads.parameters()), config.rate)]
        if config.train_model:
            self.decoder = dict(self.adapter.decoder.named_parameters())
            groups.append(Group(list(self.decoder.values()), config.model_rate))
        return groups

    @contextmanager
    def active(self) -> Iterator[None]:
        """A context in which the model attends through the masks."""
        with self.soft:
            yield

    @torch.no_grad()
    def prepare(self, feed: Feed) -> None:
        """Set the mean and deviation of the statistics from the first batches."""
        seen: list[list[Tensor]] = [[] for _ in self.layers]
        for step in range(self.config.standardise):
            batch = feed(step)
            self.soft.begin(batch)
            self.model(**batch, use_cache=False)
            for one in self.soft.found:
                seen[one.cut].append(one.numbers)
        for cut, numbers in enumerate(seen):
            table = self.accelerator.gather(torch.stack(numbers))
            self.heads.centre[cut] = table.mean(0)
            # A statistic that hardly varies here would explode once it does.
            self.heads.spread[cut] = table.std(0, unbiased=False).clamp_min(0.05)

    def loss(self, batch: Batch, step: int) -> Loss:
        """Eq. 14 on a batch, at this step's temperature."""
        config, soft = self.config, self.soft
        soft.temperature = config.temperature * (
            (config.temperature_end or config.temperature) / config.temperature
        ) ** (step / max(config.steps - 1, 1))
        soft.begin(batch)
        with self.accelerator.autocast():
            ntp = self.model(**batch, use_cache=False).loss
        counts, totals = soft.counts, soft.totals
        average = average_count(counts, totals, self.layers, self.num_layers)
        early = atp_loss(counts, totals, self.layers)
        goal = target_loss(average, config.target, config.target_over, self.past, config.smoothing)
        mean = float(self.accelerator.reduce(average.mean().detach(), "mean"))
        share = config.smoothing
        self.past = mean if self.past is None else share * self.past + (1 - share) * mean
        on = torch.stack([(one.mask > 0.5).sum() for one in soft.found]).float()
        # `found` is ordered by cut, then by image.
        hard = average_count(on.view(len(self.layers), -1).T, totals, self.layers, self.num_layers)
        figures = {
            "ntp": float(ntp.detach()),
            "atp": float(early.detach()),
            "target": float(goal.detach()),
            "tokens": mean,
            "hard": float(hard.mean()),
        }
        return Loss(ntp + config.lambda_atp * early + config.lambda_target * goal, figures)

    def state(self) -> dict[str, Any]:
        """Heads, decoder, and the running average count."""
        return {
            "heads": self.heads.state_dict(),
            "decoder": {name: parameter.detach() for name, parameter in self.decoder.items()},
            "past": self.past,
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Restore what `state` returned."""
        self.heads.load_state_dict(state["heads"])
        with torch.no_grad():
            for name, parameter in self.decoder.items():
                parameter.copy_(state["decoder"][name])
        self.past = state["past"]

    def saved(self, out: Path) -> bool:
        """Whether the heads are saved; they may have been calibrated since."""
        return (out / "model.safetensors").is_file()

    def save(self, out: Path) -> None:
        """Save the heads for `ATP.from_pretrained`, and the model if it was trained."""
        settings = {
            "normalise": self.config.normalise,
            "sampling": self.config.sampling,
            "layers": list(self.layers),
            "num_layers": self.num_layers,
            "target": self.config.target,
        }
        save_heads(self.heads, out, settings)
        if self.config.train_model:
            self.model.save_pretrained(out / "model")


def new_heads(cuts: int, config: Config) -> ATPHeads:
    """Seeded heads whose initial thresholds are `start_r` and `start_s` for all images.

    Args:
        cuts: number of cuts.
        config: the settings.
    """
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
