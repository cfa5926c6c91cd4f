# SPDX-License-Identifier: Apache-2.0
"""Soft pruning for training ATP: layers attend through soft masks, and no token is dropped.

After each cut a token has a soft mask M in (0, 1). All later layers attend to it with weight
exp(logit) * M, and to themselves with weight exp(logit), as in DynamicViT: a bias of log(M + eps)
off the diagonal. Masks of successive cuts multiply, so a token that is off stays off. Scores and
thresholds are those of `vtc.methods.atp`; as there, later cuts compute them over the tokens that
are still on (M > 0.5). Scores have no gradient: thresholds learn through M.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from vtc.core.errors import ArgumentError
from vtc.core.prefill import Stopwatch
from vtc.methods.atp import (
    ATPHeads,
    Normalise,
    atp_layers,
    hard_mask,
    image_scores,
    redundant_score,
    soft_mask,
    spatial_score,
    statistics,
)
from vtc.models import UnsupportedModelError, find
from vtc.runtime.hf import taps
from vtc.training.loop import Batch

EPSILON = 1e-8


@dataclass(frozen=True)
class ImageMask:
    """One image after one cut.

    Attributes:
        sample, image, cut: 0-based batch row, image of the row, and cut.
        mask: (n,) M of all the image's tokens, the product over the cuts so far.
        theta_r, theta_s: scalar thresholds.
        numbers: (STATISTICS,) statistics that they were computed from.
    """

    sample: int
    image: int
    cut: int
    mask: Tensor
    theta_r: Tensor
    theta_s: Tensor
    numbers: Tensor


class SoftPruning:
    """Makes a model attend through ATP's soft masks within a `with` block.

    Call `begin` with each batch before the model; afterwards `found` has its masks. The end of the
    block restores the model, even after an error.

    Args:
        model: unpatched, with "eager" or "sdpa" attention, which take a float mask.
        heads: the heads, on the model's device.
        layers: 0-based layers before which the cuts are, one for each cut of the heads.
        normalise, sampling: as in `vtc.methods.atp.ATP`.
        temperature: temperature of the mask's sigmoids.
        hard: use masks of 0 and 1, as in inference; for tests and calibration.

    Raises:
        ValueError: the number of cuts differs from the heads', the model is patched, or its
            attention does not take a float mask.
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
            raise ArgumentError("layers", f"the heads are for {heads.cuts} cuts, got {self.cuts}")
        attends = getattr(self.adapter.decoder.config, "_attn_implementation", None)
        if attends not in ("eager", "sdpa"):
            raise ArgumentError(
                "model",
                "a soft mask needs attention that takes a float mask, 'eager' or 'sdpa', "
                f"got {attends!r}; load it with attn_implementation='sdpa'",
            )
        if "_vtc_patch" in vars(model) or "_vtc_patch" in vars(self.adapter.base):
            raise ArgumentError("model", "it is patched; call vtc.unpatch(model) first")
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
                self._taps[layer - 1] = taps.install(self.adapter.attention_of(layer - 1))
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
        """Prepare for the next forward.

        Args:
            batch: `input_ids` and optionally `attention_mask` and `labels`, each (b, s), and
                `pixel_values`.

        Raises:
            UnsupportedModelError: images have different numbers of tokens.
        """
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
                f"tokens per image, got {tuple(pixels.shape) if pixels is not None else None} for "
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
        """(b, 1, s, s) the model's mask plus the bias of the soft mask."""
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
        if not bool(held.any()):  # no token is certain: inference would keep the best one
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
        """(images, cuts) tokens left after each cut: sums of the masks."""
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
