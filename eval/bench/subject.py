# SPDX-License-Identifier: Apache-2.0
"""The measured model with its inputs, and one timed run of a variant."""

from __future__ import annotations

import gc
import inspect
import json
import os
import statistics
import tempfile
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import vtc

from .settings import NATIVE, TILED, Settings, Variant
from .short import Cut, Tower, cache_of, first_cut, longest

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from vtc.core.prefill import Stopwatch


def clock_of(device: torch.device) -> str:
    """ "process", the CPU time of this process, if it runs one thread on a CPU; otherwise
    "wall"."""
    import torch

    return "process" if device.type == "cpu" and torch.get_num_threads() == 1 else "wall"


@contextmanager
def host_clock(device: torch.device) -> Iterator[None]:
    """Make stopwatches use `clock_of` within the block, so that other load counts less."""
    from vtc.core.prefill import Stopwatch

    before = Stopwatch.host
    if clock_of(device) == "process":
        Stopwatch.host = staticmethod(time.process_time)
    try:
        yield
    finally:
        Stopwatch.host = staticmethod(before)


class Subject:
    """A model on its device, with its inputs.

    Args:
        model: the model, unpatched.
        image: (height, width) in pixels.
        batch: batch size, with one image per row.
        settings: settings of the run.
    """

    def __init__(self, model: Any, image: tuple[int, int], batch: int, settings: Settings) -> None:
        import torch

        from vtc.models import find

        self.model, self.config, self.settings = model, model.config, settings
        self.batch, self.image = batch, image
        weight = next(model.parameters())
        self.device, self.dtype = weight.device, weight.dtype
        self.adapter = find(model)
        self.generator = torch.Generator().manual_seed(settings.seed)
        pixels, always = self._pixels()
        self.pixels = pixels
        self.words = self._words(batch, settings.text)
        self.next = self._words(batch, 1)
        self.tower = Tower(self.adapter.base, self.device, always)
        with torch.no_grad():
            found = self.tower(**pixels, return_dict=True).pooler_output
        sizes = {len(features) for features in found}
        if len(sizes) != 1:
            raise RuntimeError(f"images of one size gave {sorted(sizes)} vision tokens")
        self.tokens = sizes.pop()
        vars(self.adapter.base)["get_image_features"] = self.tower

    def close(self) -> None:
        del vars(self.adapter.base)["get_image_features"]

    @property
    def layers(self) -> int:
        return len(self.adapter.layers)

    @property
    def whole(self) -> tuple[int, ...]:
        """Tokens of each layer without compression."""
        return (self.settings.text + self.tokens,) * self.layers

    def _words(self, *shape: int) -> Tensor:
        import torch

        # Below the special tokens, which are at the end of the vocabulary.
        highest = min(self.config.get_text_config().vocab_size, self.config.image_token_id)
        words = torch.randint(3, max(highest, 4), shape, generator=self.generator)
        return words.to(self.device)

    def _pixels(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """The model's image arguments, and arguments that its tower always receives in addition to,
        or instead of, those passed on by the model."""
        import torch

        (height, width), vision = self.image, self.config.vision_config
        kind, always = self.config.model_type, {}

        def draw(*shape: int) -> Tensor:
            return torch.randn(shape, generator=self.generator).to(self.device, self.dtype)

        if kind in NATIVE:
            patch, frames = vision.patch_size, vision.temporal_patch_size
            grid = torch.tensor([[1, height // patch, width // patch]] * self.batch)
            grid = grid.to(self.device)
            count = int(grid.prod(1).sum())
            pixels = {
                "pixel_values": draw(count, 3 * frames * patch * patch),
                "image_grid_thw": grid,
            }
            return pixels, {"image_grid_thw": grid}
        side = vision.image_size
        if kind in TILED:
            from transformers.models.llava_next.modeling_llava_next import (
                image_size_to_num_patches,
            )

            points = self.config.image_grid_pinpoints
            tiles = int(image_size_to_num_patches(self.image, points, side))
            sizes = torch.tensor([self.image] * self.batch)
            return {
                "pixel_values": draw(self.batch, tiles, 3, side, side),
                "image_sizes": sizes.to(self.device),
            }, {}
        if (height, width) != (side, side):
            always = {"interpolate_pos_encoding": True}
        return {"pixel_values": draw(self.batch, 3, height, width)}, always

    def _prompt(self, tokens: int) -> dict[str, Any]:
        """Arguments of a prefill whose images have `tokens` placeholders each."""
        import torch

        split = self.settings.text // 4
        middle = self.words.new_full((self.batch, tokens), self.config.image_token_id)
        ids = torch.cat([self.words[:, :split], middle, self.words[:, split:]], dim=1)
        given = {"input_ids": ids, "attention_mask": torch.ones_like(ids), **self.pixels}
        if self.config.model_type in NATIVE:
            given["mm_token_type_ids"] = (ids == self.config.image_token_id).int()
            if tokens != self.tokens:
                # An image with a single row of tokens has positions for any number.
                side = self.config.vision_config.spatial_merge_size
                grid = given["image_grid_thw"]
                given["image_grid_thw"] = grid.new_tensor([[1, side, side * tokens]] * self.batch)
        return given

    @contextmanager
    def _set_up(self, variant: Variant) -> Iterator[tuple[Any, dict[str, Any]]]:
        """Set the model up for `variant`; yields (patch, arguments of the prefill)."""
        if variant.method is not None:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", UserWarning)  # already shown by the initial check
                patch = vtc.patch(self.model, variant.method)
            with patch, patch.listen(self.tower.hear):
                yield patch, self._prompt(self.tokens)
            return
        lengths = variant.lengths or self.whole
        tokens = lengths[0] - self.settings.text
        cut = Cut(self.adapter.layers, lengths)
        self.tower.keep = None if tokens == self.tokens else tokens
        try:
            yield None, self._prompt(tokens)
        finally:
            self.tower.keep = None
            cut.remove()

    @contextmanager
    def _marked(self, variant: Variant, clock: Stopwatch) -> Iterator[list[Any]]:
        """Stop `clock` before the first layer with fewer tokens, if earlier layers have all. The
        list is for its start."""
        lengths = variant.lengths or longest(variant.seen) or self.whole
        started: list[Any] = []
        first = first_cut(lengths)
        if first is None or lengths[0] != self.whole[0]:
            yield started
            return

        def stop(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if started:
                clock.stop(started.pop(), self.device)

        # Before vtc's hook, which selects tokens.
        layer = self.adapter.layers[first]
        handle = layer.register_forward_pre_hook(stop, prepend=True, with_kwargs=True)
        try:
            yield started
        finally:
            handle.remove()

    def once(self, variant: Variant) -> dict[str, float]:
        """Milliseconds of one prefill by part, and of the median decoding step."""
        import torch

        from vtc.core.prefill import Stopwatch

        def stop(clock: Stopwatch, started: Any) -> None:
            clock.stop(started, self.device)
            if self.device.type == "cuda":
                torch.cuda.synchronize(self.device)

        # transformers up to 5.23 calls it `past_key_values`.
        accepted = inspect.signature(type(self.model).forward).parameters
        name = "cache" if "cache" in accepted else "past_key_values"
        total, until = Stopwatch(), Stopwatch()
        with (
            host_clock(self.device),
            self._set_up(variant) as (patch, given),
            self._marked(variant, until) as mark,
            torch.no_grad(),
        ):
            mask = given["attention_mask"]
            masks = [mask.new_ones(self.batch, mask.shape[1] + 1 + i) for i in range(self.decode)]
            steps = [Stopwatch() for _ in masks]
            self.tower.reset()
            gc.collect()
            gc.disable()
            try:
                mark.append(until.start(self.device))
                started = total.start(self.device)
                out = self.model(**given, use_cache=True, logits_to_keep=1)
                stop(total, started)
                for step, longer in zip(steps, masks, strict=True):
                    started = step.start(self.device)
                    given = {"input_ids": self.next}
                    # Qwen would compute positions from its full length; `generate` passes
                    # positions.
                    if self.config.model_type not in NATIVE:
                        given["attention_mask"] = longer
                    out = self.model(**given, **{name: cache_of(out)}, use_cache=True)
                    stop(step, started)
            finally:
                gc.enable()
            times = {"total": total.ms, "decode": statistics.median(step.ms for step in steps)}
            times |= {f"step {i}": step.ms for i, step in enumerate(steps)}
            if patch is None:
                variant.seen = [variant.lengths or self.whole] * self.batch
                times["selector"] = 0.0
            else:
                (prefill,) = patch.report.prefills
                variant.seen = [sample.lengths for sample in prefill.samples]
                times["selector"] = prefill.selector_ms
            times["vision"] = self.tower.ms
            times["prefill"] = times["total"] - times["vision"]
            times["lm"] = times["prefill"] - times["selector"]
            if until.ms:
                times["after"] = times["total"] - until.ms + times["selector"]
        return times

    @property
    def decode(self) -> int:
        return self.settings.decode

    def peak(self, variant: Variant) -> int:
        """Peak bytes of one run, beyond those allocated before it."""
        import torch

        gc.collect()
        if self.device.type == "cuda":
            before = torch.cuda.memory_allocated(self.device)
            torch.cuda.reset_peak_memory_stats(self.device)
            self.once(variant)
            return torch.cuda.max_memory_allocated(self.device) - before
        os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # else it writes to stderr
        from torch.profiler import ProfilerActivity, profile

        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
            self.once(variant)
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "trace.json"
            profiler.export_chrome_trace(str(file))
            events = json.loads(file.read_text("utf-8", errors="replace"))["traceEvents"]
        changes = [(e["ts"], e["args"]["Bytes"]) for e in events if e.get("name") == "[memory]"]
        held = most = 0
        for _, size in sorted(changes, key=lambda change: change[0]):
            held += size
            most = max(most, held)
        return most
