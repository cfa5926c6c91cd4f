# SPDX-License-Identifier: Apache-2.0
"""`vtc bench`: what a method costs and saves, beside the plain model, the short one and arithmetic.

A *row* is one variant at one precision and batch size. Three kinds of variant are run:

- `unpatched`: the plain model with all vision tokens.
- `short`: the plain model that was given the short sequence outright. Its prompt has as many
  placeholders as a method leaves tokens, and the features are cut to as many behind the vision
  tower. Where a method drops tokens between decoder layers, the sequence is cut before the same
  layers, to the same lengths, by a slice. Nothing is chosen, so this is as fast as any method with
  these lengths can be; what a method takes longer is its selection and vtc's own overhead.
- a method, through `vtc.patch`.

One prefill is one call of the model with pixels, a new cache and the logits of the last position.
Its time is split:

    total      the whole call
    vision     tower and projector, without what is read of them for a method
    selector   choosing, and the attention rows computed for it (`Patch.report`)
    lm         what is left: embedding, merging, decoder layers, output head, vtc's bookkeeping
    prefill    selector + lm, that is total less vision

All variants run the tower on all patches (methods of the stages "pixels" and "encoder" save there),
so `total` hides what a method does to the language model behind a cost that is the same for all.
Ratios are therefore of `prefill`, which is what a speed bar is to be put on; those of `total` are
given too. `beyond` is, for methods whose first layers see everything, the ratio of `after`: the
time from the first layer with fewer tokens on, and all of the selector's, the part of it that lies
in that layer's preparation counted twice rather than not at all. `decode` is the median step of
one new token a row on the cache of that prefill, with an attention mask of the full length, as
`generate` makes them.

`ideal` is the time of the unpatched model times the share of FLOPs that `vtc.cost` says are left
(language model only). Short sequences run at fewer FLOPs a second than long ones, and decoding is
bound by reading weights, so that a ratio above 1 to the ideal is no fault of a method: `short` is
the yardstick for overhead, `ideal` that for the hardware.

Variants run in turns in one process (A B C A B C ...), garbage collected before each and not
within. Ratios are formed within a turn, whose runs share the state of the machine, and their
median and quartiles taken over the turns. On a CPU the clock is `time.perf_counter`; on a GPU CUDA
events, the device synchronised after the prefill and after each step of decoding.

Peak memory is taken in a run of its own that is not timed, one prefill and the decoding steps:
bytes beyond what was allocated before, so activations, cache and selection, without weights and
inputs. On a GPU that is the allocator's `torch.cuda.max_memory_allocated`; on a CPU the running sum
of PyTorch's allocations and frees as `torch.profiler` records them. Resident size would not do: the
C library keeps freed memory, so that a variant would show the peak of the largest before it. What
BLAS and oneDNN allocate for themselves is in neither figure.

Weights are random (or those of the checkpoint if asked for), pixels and text are random, and all
rows of a batch have equal length. Speed does not depend on them, except for methods whose number of
tokens does (thresholds); the tokens that were left in each layer are in every row.
"""

from __future__ import annotations

import csv
import gc
import inspect
import io
import json
import os
import platform
import statistics
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import vtc
from vtc.spec import Keep, parse_method, takes_keep

from .report import runs as run_lengths
from .run import DTYPES, BadInput, Observer, _json, _write

if TYPE_CHECKING:
    import torch
    from rich.console import RenderableType
    from torch import Tensor, nn

    from vtc.engine.report import Stopwatch

__all__ = ["PRESETS", "Settings", "plan", "run", "table"]


# ---- sizes --------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Preset:
    """Sizes of a model: keyword arguments of its configurations, and (height, width) in pixels."""

    kind: str
    text: Mapping[str, Any]
    vision: Mapping[str, Any]
    image: tuple[int, int]


def _decoder(kind: str, d: int, wide: int, layers: int, heads: int, kv: int, vocab: int) -> Any:
    return {
        "model_type": kind,
        "hidden_size": d,
        "intermediate_size": wide,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv,
        "vocab_size": vocab,
        "max_position_embeddings": 32768,
        "tie_word_embeddings": False,
    }


def _clip(d: int, layers: int, heads: int, size: int = 336) -> Any:
    return {
        "model_type": "clip_vision_model",
        "hidden_size": d,
        "intermediate_size": 4 * d,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "image_size": size,
        "patch_size": 14,
    }


def _qwen_tower(width: int, depth: int = 32, d: int = 1280, heads: int = 16) -> Any:
    return {"depth": depth, "embed_dim": d, "num_heads": heads, "hidden_size": width}


_VICUNA_7B = _decoder("llama", 4096, 11008, 32, 32, 32, 32064)
_VICUNA_13B = _decoder("llama", 5120, 13824, 40, 40, 40, 32064)
_MISTRAL_7B = _decoder("mistral", 4096, 14336, 32, 32, 8, 32064) | {"sliding_window": None}
_QWEN2_2B = _decoder("qwen2_vl_text", 1536, 8960, 28, 12, 2, 151936)
_QWEN2_7B = _decoder("qwen2_vl_text", 3584, 18944, 28, 28, 4, 152064)
_MROPE = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]}

PRESETS: dict[str, Preset] = {
    "tiny": Preset(
        "llava", _decoder("llama", 64, 176, 4, 4, 4, 512), _clip(32, 2, 2, 84), (84, 84)
    ),
    "speed-bar": Preset(
        "llava", _decoder("llama", 1024, 2816, 16, 16, 16, 32000), _clip(256, 4, 4), (672, 840)
    ),
    "llava-1.5-7b": Preset("llava", _VICUNA_7B, _clip(1024, 24, 16), (336, 336)),
    "llava-1.5-13b": Preset("llava", _VICUNA_13B, _clip(1024, 24, 16), (336, 336)),
    "llava-next-vicuna-7b": Preset("llava_next", _VICUNA_7B, _clip(1024, 24, 16), (672, 672)),
    "llava-next-mistral-7b": Preset("llava_next", _MISTRAL_7B, _clip(1024, 24, 16), (672, 672)),
    "qwen2-vl-2b": Preset(
        "qwen2_vl",
        _QWEN2_2B | {"rope_parameters": _MROPE, "tie_word_embeddings": True},
        _qwen_tower(1536),
        (1008, 1008),
    ),
    "qwen2-vl-7b": Preset(
        "qwen2_vl", _QWEN2_7B | {"rope_parameters": _MROPE}, _qwen_tower(3584), (1008, 1008)
    ),
}
"""Sizes by name. "speed-bar" is what vtc's bar for speed is measured on: 48 x 60 = 2880 tokens."""

_PLAIN, _TILED, _NATIVE = ("llava",), ("llava_next",), ("qwen2_vl", "qwen2_5_vl")


@dataclass(frozen=True)
class Settings:
    """What to measure.

    Attributes:
        config: a name out of `PRESETS`, a folder with a config.json, or an id from the hub.
        layers: decoder layers instead of the configuration's.
        pretrained: load the checkpoint's weights; without it they are random.
        methods: as text (`vtc.spec`).
        keeps: for each method that has a `keep` left open.
        batches: rows of a batch, each with one image.
        dtypes: out of float32, bfloat16, float16.
        device: "cpu", "cuda", "cuda:1"; `None` for a GPU if there is one.
        image: (height, width) in pixels; `None` for the preset's, or the tower's own.
        text: tokens of text in the prompt, a quarter of them before the image.
        decode: new tokens after each prefill.
        unpatched: run the plain model with all tokens, which takes longest; without it there are no
            ratios to it and to the ideal.
        warmup, repeats: turns that do not count, and those that do.
        threads: of PyTorch on a CPU; `None` leaves them.
        seed: of weights, inputs and sampling methods.
        out: folder for bench.json and bench.csv; `None` writes nothing.
    """

    config: str = "speed-bar"
    layers: int | None = None
    pretrained: bool = False
    methods: tuple[str, ...] = ("todre", "divprune", "visionzip", "fastv")
    keeps: tuple[Keep, ...] = (0.1,)
    batches: tuple[int, ...] = (1,)
    dtypes: tuple[str, ...] = ("float32",)
    device: str | None = None
    image: tuple[int, int] | None = None
    text: int = 64
    decode: int = 8
    unpatched: bool = True
    warmup: int = 1
    repeats: int = 7
    threads: int | None = None
    seed: int = 0
    out: Path | None = None


@dataclass
class Variant:
    """One thing to time: a method, the plain model (`method` is `None`), or the plain model cut to
    `lengths`, the tokens that each decoder layer is given.

    Attributes:
        seen: the tokens that each layer had of each row, once it ran.
        runs: milliseconds by name, one entry a turn that counts.
    """

    label: str
    keep: Keep | None = None
    method: vtc.Method | None = None
    lengths: tuple[int, ...] | None = None
    seen: list[tuple[int, ...]] = field(default_factory=list)
    runs: dict[str, list[float]] = field(default_factory=dict)
    reference: Variant | None = None
    peak: int | None = None
    error: str | None = None


# ---- planning -----------------------------------------------------------------------------------
def plan(settings: Settings) -> list[Variant]:
    """The methods to measure, in order, without repetition.

    Raises:
        BadInput: something in `settings` does not work, as far as that can be told without a model.
    """
    least = {
        "--layers": (settings.layers, 1),
        "--text": (settings.text, 4),
        "--decode": (settings.decode, 1),
        "--warmup": (settings.warmup, 1),
        "--repeats": (settings.repeats, 2),
        "--threads": (settings.threads, 1),
        "--seed": (settings.seed, 0),
    }
    for option, (value, lowest) in least.items():
        if value is not None and value < lowest:
            raise BadInput(option, f"expected at least {lowest}, got {value}")
    listed = {"methods": settings.methods, "batch": settings.batches, "dtype": settings.dtypes}
    for name, values in listed.items():
        if not values:
            raise BadInput(f"--{name}", "expected at least one, got none")
    for batch in settings.batches:
        if batch < 1:
            raise BadInput("--batch", f"expected at least 1, got {batch}")
    for dtype in settings.dtypes:
        if dtype not in DTYPES:
            raise BadInput("--dtype", f"expected one of {', '.join(DTYPES)}, got {dtype!r}")
    if settings.image is not None and min(settings.image) < 1:
        raise BadInput("--image", f"expected height x width in pixels, got {settings.image}")
    if settings.pretrained and (settings.config in PRESETS or settings.layers is not None):
        raise BadInput(
            "--pretrained", "goes with a checkpoint as it is: a folder or an id, all its layers"
        )
    found: list[Variant] = []
    for label in dict.fromkeys(text.replace(" ", "") for text in settings.methods):
        try:
            if not takes_keep(label):
                found.append(Variant(label, None, parse_method(label, None, settings.seed)))
                continue
            if not settings.keeps:
                raise BadInput("--keep", f"expected a value for {label}, got none")
            for keep in dict.fromkeys(settings.keeps):
                found.append(Variant(label, keep, parse_method(label, keep, settings.seed)))
        except BadInput:
            raise
        except (ValueError, TypeError) as error:
            option = "--keep" if str(error).startswith("keep") else "--methods"
            raise BadInput(option, f"{label}: {error}") from error
    return found


def _device(given: str | None) -> torch.device:
    import torch

    try:
        device = torch.device(given or ("cuda" if torch.cuda.is_available() else "cpu"))
    except RuntimeError:
        raise BadInput("--device", f"expected cpu, cuda or cuda:0, got {given!r}") from None
    if device.type not in ("cpu", "cuda"):
        raise BadInput("--device", f"can time cpu and cuda only, got {given!r}")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise BadInput("--device", f"got {given!r}, but PyTorch sees no GPU here")
    return device


# ---- the model ----------------------------------------------------------------------------------
def _config(settings: Settings) -> tuple[Any, tuple[int, int]]:
    """The configuration, and the (height, width) of the image."""
    from transformers import AutoConfig
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    name, image = settings.config, settings.image
    if (preset := PRESETS.get(name)) is not None:
        tiles: dict[str, Any] = {}
        if preset.kind in _TILED:
            tiles = {"image_grid_pinpoints": [[672, 672]]}
        extra: dict[str, Any] = {} if preset.kind in _NATIVE else {"vision_feature_layer": -2}
        kind: Any = CONFIG_MAPPING[preset.kind]
        config = kind(
            text_config=dict(preset.text), vision_config=dict(preset.vision), **tiles, **extra
        )
        image = image or preset.image
    else:
        config = _look_up(AutoConfig, name)
    if config.model_type not in _PLAIN + _TILED + _NATIVE:
        raise BadInput(
            "--config",
            f"{name} is of type {config.model_type!r}; inputs can be made for "
            f"{', '.join(_PLAIN + _TILED + _NATIVE)}",
        )
    text = config.get_text_config()
    if settings.layers is not None:
        text.num_hidden_layers = settings.layers
        if getattr(text, "layer_types", None):
            text.layer_types = text.layer_types[: settings.layers]
            if len(text.layer_types) < settings.layers:
                raise BadInput("--layers", f"{name} names the types of fewer layers")
    # Small vocabularies of presets have no room at the usual place.
    config.image_token_id = min(config.image_token_id, text.vocab_size - 1)
    for part in (text, config):
        # Random tokens may be any token, and none is to end the sequence.
        part.pad_token_id = part.bos_token_id = part.eos_token_id = None
    if config.model_type in _NATIVE:
        vision = config.vision_config
        unit = vision.patch_size * vision.spatial_merge_size
        image = image or (36 * unit, 36 * unit)
    else:
        side, unit = config.vision_config.image_size, config.vision_config.patch_size
        tiles_across = 2 if config.model_type in _TILED else 1
        image = image or (tiles_across * side, tiles_across * side)
    if config.model_type not in _TILED and (image[0] % unit or image[1] % unit):
        raise BadInput("--image", f"expected multiples of {unit} pixels, got {image}")
    return config, image


def _look_up(auto: Any, name: str, **options: Any) -> Any:
    """`from_pretrained` of a folder or of an id from the hub or its cache."""
    from .quiet import hub_answers, offline

    folder = Path(name).expanduser()
    try:
        if folder.is_dir():
            return auto.from_pretrained(folder, **options)
        if name.startswith((".", "/", "~")) or "/" not in name:
            raise BadInput(
                "--config", f"no folder {name}, and no preset: those are {', '.join(PRESETS)}"
            )
        with offline(not hub_answers()):
            return auto.from_pretrained(name, **options)
    except (OSError, ValueError) as error:
        if isinstance(error, BadInput):
            raise
        raise BadInput("--config", f"{name}: {str(error).splitlines()[0]}") from error


def _build(config: Any, settings: Settings, dtype: torch.dtype, device: torch.device) -> Any:
    """The model in evaluation mode, in `dtype` on `device`, and never in another precision."""
    import torch
    from transformers import AutoModelForImageTextToText
    from transformers.initialization import no_init_weights

    if settings.pretrained:
        model = _look_up(AutoModelForImageTextToText, settings.config, dtype=dtype)
        return model.to(device).eval()
    with torch.device(device), no_init_weights():
        model = AutoModelForImageTextToText.from_config(config, dtype=dtype)
    model.tie_weights()
    _fill(model, settings.seed)
    return model.eval()


def _fill(model: nn.Module, seed: int) -> None:
    """Random weights of a scale at which activations stay finite in half precision.

    One block of random numbers is laid over the weights again and again: drawing billions takes
    minutes, and time depends on sizes only. Its length shares no factor with usual widths, so no
    two rows are alike.
    """
    import torch

    block = torch.randn((1 << 20) + 7, generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith("bias"):
                weight.zero_()
            elif weight.ndim == 1 and name.endswith("weight"):  # of a norm
                weight.fill_(1.0)
            else:
                fan_in = weight[0].numel() if weight.ndim > 1 else weight.numel()
                scaled = (block * fan_in**-0.5).to(weight)
                flat = weight.view(-1)
                for start in range(0, flat.numel(), len(scaled)):
                    part = flat[start : start + len(scaled)]
                    part.copy_(scaled[: len(part)])


class _Tower:
    """Stands in for `get_image_features` of the plain model: times it, and cuts what it returns."""

    def __init__(self, base: Any, device: torch.device, always: Mapping[str, Any]) -> None:
        from vtc.engine.report import Stopwatch

        self.base, self.device, self.always = base, device, dict(always)
        self.original, self.clock = base.get_image_features, Stopwatch()
        self.keep: int | None = None
        self.patch: vtc.Patch | None = None
        self.heard = Stopwatch()

    def reset(self) -> None:
        self.clock.reset()
        self.heard.reset()

    @property
    def ms(self) -> float:
        """Time of the tower and the projector, without what was read of them meanwhile."""
        return self.clock.ms - self.heard.ms

    @property
    def __signature__(self) -> inspect.Signature:  # vtc looks at it
        return inspect.signature(self.original)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        started = self.clock.start(self.device)
        given = inspect.signature(self.original).bind_partial(*args).arguments
        out = self.original(**{**given, **kwargs, **self.always})
        self.clock.stop(started, self.device)
        if self.patch is not None:
            # What vtc reads afterwards is on the same clock, and no part of this one. A copy of
            # the events, as asking for milliseconds would wait for the device.
            engine: Any = self.patch._engine
            heard = engine.vision.heard
            self.heard._host_ms, self.heard._events = heard._host_ms, list(heard._events)
        if self.keep is not None:
            out.pooler_output = [features[: self.keep] for features in out.pooler_output]
        return out


class _Cut:
    """Cuts the sequence before decoder layers to `lengths`, keeping the last tokens."""

    def __init__(self, layers: Any, lengths: Sequence[int]) -> None:
        self.lengths = lengths
        self.memo: dict[Any, Any] = {}
        self.handles = [
            layers[i].register_forward_pre_hook(self._hook(i), with_kwargs=True)
            for i in range(_first_cut(lengths) or len(lengths), len(lengths))
        ]

    def remove(self) -> None:
        for handle in self.handles:
            handle.remove()

    def _hook(self, layer: int) -> Callable[..., Any]:
        def hook(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            hidden = args[0] if args else kwargs["hidden_states"]
            prefill = hidden.shape[1] > 1
            n = self.lengths[layer] if prefill else 1
            mask: Any = kwargs.get("attention_mask")
            if getattr(mask, "ndim", 0) == 4:
                keys = n if prefill else _cache(kwargs).layers[layer].get_seq_length() + 1
                kwargs["attention_mask"] = mask[..., -n:, -keys:]
            if prefill:
                hidden = hidden[:, -n:]
                if n not in self.memo:
                    place, turns = kwargs.get("position_ids"), kwargs["position_embeddings"]
                    self.memo[n] = (
                        None if place is None else place[..., -n:],
                        tuple(turn[..., -n:, :].contiguous() for turn in turns),
                    )
                kwargs["position_ids"], kwargs["position_embeddings"] = self.memo[n]
            if args:
                return (hidden, *args[1:]), kwargs
            return args, {**kwargs, "hidden_states": hidden}

        return hook


def _first_cut(lengths: Sequence[int]) -> int | None:
    """The first layer that is given fewer tokens than the first of all."""
    return next((i for i, n in enumerate(lengths) if n < lengths[0]), None)


def _cache(given: Mapping[str, Any]) -> Any:
    found = given.get("cache")
    return given.get("past_key_values") if found is None else found


# ---- measuring ----------------------------------------------------------------------------------
class _Subject:
    """A model on its device, its inputs, and one run of a variant on them."""

    def __init__(self, model: Any, image: tuple[int, int], batch: int, settings: Settings) -> None:
        import torch

        from vtc.families import find

        self.model, self.config, self.settings = model, model.config, settings
        self.batch, self.image = batch, image
        weight = next(model.parameters())
        self.device, self.dtype = weight.device, weight.dtype
        self.backbone = find(model)[1]
        self.generator = torch.Generator().manual_seed(settings.seed)
        pixels, always = self._pixels()
        self.pixels = pixels
        self.words = self._words(batch, settings.text)
        self.next = self._words(batch, 1)
        self.tower = _Tower(self.backbone.base, self.device, always)
        with torch.no_grad():
            found = self.tower(**pixels, return_dict=True).pooler_output
        sizes = {len(features) for features in found}
        if len(sizes) != 1:
            raise RuntimeError(f"images of one size gave {sorted(sizes)} vision tokens")
        self.tokens = sizes.pop()
        vars(self.backbone.base)["get_image_features"] = self.tower

    def close(self) -> None:
        del vars(self.backbone.base)["get_image_features"]

    @property
    def layers(self) -> int:
        return len(self.backbone.layers)

    @property
    def whole(self) -> tuple[int, ...]:
        """Tokens of each layer with nothing dropped."""
        return (self.settings.text + self.tokens,) * self.layers

    def _words(self, *shape: int) -> Tensor:
        import torch

        # Below all special tokens, which families put at the end of their vocabulary.
        highest = min(self.config.get_text_config().vocab_size, self.config.image_token_id)
        words = torch.randint(3, max(highest, 4), shape, generator=self.generator)
        return words.to(self.device)

    def _pixels(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Arguments of the model that hold images, and those that its tower is always called with
        beside, or instead of, what the model hands on."""
        import torch

        (height, width), vision = self.image, self.config.vision_config
        kind, always = self.config.model_type, {}

        def draw(*shape: int) -> Tensor:
            return torch.randn(shape, generator=self.generator).to(self.device, self.dtype)

        if kind in _NATIVE:
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
        if kind in _TILED:
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
        if self.config.model_type in _NATIVE:
            given["mm_token_type_ids"] = (ids == self.config.image_token_id).int()
            if tokens != self.tokens:
                # An image of one row of tokens, so that positions come out for any number.
                side = self.config.vision_config.spatial_merge_size
                grid = given["image_grid_thw"]
                given["image_grid_thw"] = grid.new_tensor([[1, side, side * tokens]] * self.batch)
        return given

    @contextmanager
    def _set_up(self, variant: Variant) -> Iterator[tuple[Any, dict[str, Any]]]:
        """The model as `variant` wants it: (patch, arguments of the prefill)."""
        if variant.method is not None:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", UserWarning)  # said once, when all were checked
                patch = vtc.patch(self.model, variant.method)
            self.tower.patch = patch
            try:
                yield patch, self._prompt(self.tokens)
            finally:
                self.tower.patch = None
                patch.unpatch()
            return
        lengths = variant.lengths or self.whole
        tokens = lengths[0] - self.settings.text
        cut = _Cut(self.backbone.layers, lengths)
        self.tower.keep = None if tokens == self.tokens else tokens
        try:
            yield None, self._prompt(tokens)
        finally:
            self.tower.keep = None
            cut.remove()

    @contextmanager
    def _marked(self, variant: Variant, clock: Stopwatch) -> Iterator[list[Any]]:
        """Stop `clock` before the first layer that is given fewer tokens, if those before it are
        given all. The list is for when it was started."""
        lengths = variant.lengths or _longest(variant.seen) or self.whole
        started: list[Any] = []
        first = _first_cut(lengths)
        if first is None or lengths[0] != self.whole[0]:
            yield started
            return

        def stop(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if started:
                clock.stop(started.pop(), self.device)

        # Before vtc's own hook, in which tokens are chosen.
        layer = self.backbone.layers[first]
        handle = layer.register_forward_pre_hook(stop, prepend=True, with_kwargs=True)
        try:
            yield started
        finally:
            handle.remove()

    def once(self, variant: Variant) -> dict[str, float]:
        """Milliseconds of one prefill by part, and of the median step of decoding."""
        import torch

        from vtc.engine.report import Stopwatch

        def stop(clock: Stopwatch, started: Any) -> None:
            clock.stop(started, self.device)
            if self.device.type == "cuda":
                torch.cuda.synchronize(self.device)

        # transformers called it `past_key_values` up to 5.23.
        accepted = inspect.signature(type(self.model).forward).parameters
        name = "cache" if "cache" in accepted else "past_key_values"
        total, until = Stopwatch(), Stopwatch()
        with (
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
                    # Qwen would make positions of the whole length of it; `generate` gives its own.
                    if self.config.model_type not in _NATIVE:
                        given["attention_mask"] = longer
                    out = self.model(**given, **{name: _cache(out)}, use_cache=True)
                    stop(step, started)
            finally:
                gc.enable()
            times = {"total": total.ms, "decode": statistics.median(step.ms for step in steps)}
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
        """Bytes that one run holds at most, beyond those that were held before it."""
        import torch

        gc.collect()
        if self.device.type == "cuda":
            before = torch.cuda.memory_allocated(self.device)
            torch.cuda.reset_peak_memory_stats(self.device)
            self.once(variant)
            return torch.cuda.max_memory_allocated(self.device) - before
        os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # else it talks on the error stream
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


def run(settings: Settings, observer: Observer | None = None) -> dict[str, Any]:
    """Measure all rows, and write bench.json and bench.csv if there is a folder for them.

    A variant that fails, for lack of memory say, is marked so, and the others go on.

    Raises:
        BadInput: something given does not work; nothing was measured then.
    """
    import torch

    observer = observer or Observer()
    wanted = plan(settings)
    device = _device(settings.device)
    if settings.out is not None:
        try:
            settings.out.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise BadInput("--out", f"{settings.out}: {error.strerror}") from error
    config, image = _config(settings)
    before, threads = _load_average(), torch.get_num_threads()
    rows: list[dict[str, Any]] = []
    results: dict[str, Any] = {}
    turns = settings.warmup + settings.repeats + 1  # and one for the memory
    cells = [(dtype, batch) for dtype in settings.dtypes for batch in settings.batches]
    # A method may have a short variant of its own.
    observer.planned(turns * len(cells) * (1 + 2 * len(wanted)), len(cells), 0)
    if settings.threads is not None:
        torch.set_num_threads(settings.threads)
    # What is there already will not be garbage; looking at it before each run takes long.
    gc.collect()
    gc.freeze()
    try:
        for dtype in settings.dtypes:
            observer.stage(f"making the model in {dtype}")
            model = _build(config, settings, getattr(torch, dtype), device)
            checked = _check(model, wanted) if not rows else []
            for batch in settings.batches:
                observer.stage(f"{dtype}, batch {batch}")
                fresh = [Variant(v.label, v.keep, v.method) for v in wanted]
                made = _measure(model, image, batch, fresh, settings, observer)
                rows += made
                for row in made:
                    observer.finished(row)
            if not results:
                results = {"format": 1, "settings": _stated(settings, image)}
                results["model"] = _describe(config, model, settings)
                results["versions"] = _versions()
                results["warnings"] = checked
            del model
            gc.collect()
        machine = _machine(device)
    finally:
        gc.unfreeze()
        torch.set_num_threads(threads)
    results["machine"] = {**machine, "load_average": {"before": before, "after": _load_average()}}
    found: dict[str, Any] = _json({**results, "rows": rows})
    if settings.out is not None:
        _write(settings.out / "bench.json", json.dumps(found, indent=1, ensure_ascii=False))
        _write(settings.out / "bench.csv", _csv(found["rows"]))
    return found


def _check(model: nn.Module, wanted: Sequence[Variant]) -> list[str]:
    """Try every method on the model before anything is timed; the warnings that this gave."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        for variant in wanted:
            assert variant.method is not None
            try:
                vtc.patch(model, variant.method).unpatch()
            except (ValueError, TypeError) as error:
                option = "--config" if str(error).startswith("model:") else "--methods"
                raise BadInput(option, f"{variant.label}: {error}") from error
    return sorted({str(warning.message) for warning in caught})


def _measure(
    model: Any,
    image: tuple[int, int],
    batch: int,
    methods: list[Variant],
    settings: Settings,
    observer: Observer,
) -> list[dict[str, Any]]:
    """The rows of one precision and batch size."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        subject = _Subject(model, image, batch, settings)
    plain = Variant("unpatched")
    if not settings.unpatched:
        plain.error = "left out"
    try:
        for variant in (plain, *methods) if settings.unpatched else methods:
            _attempt(subject, variant, observer, counts=False)
        order = _in_turns(subject, plain, methods)
        for variant in order:
            if variant.label == "short":
                _attempt(subject, variant, observer, counts=False)
        turns = settings.warmup + settings.repeats + 1
        observer.advanced(turns * (1 + 2 * len(methods) - len(order)))
        for turn in range(1, settings.warmup + settings.repeats):
            for variant in order:
                _attempt(subject, variant, observer, counts=turn >= settings.warmup)
        for variant in order:
            if variant.error is None:
                with _noting(variant):
                    variant.peak = subject.peak(variant)
            observer.advanced(1)
    finally:
        subject.close()
    return [_row(subject, variant, plain) for variant in order]


@contextmanager
def _noting(variant: Variant) -> Iterator[None]:
    """An error of `variant` is noted, and is not one of the others."""
    try:
        yield
    except Exception as error:
        variant.error = f"{type(error).__name__}: {error}"
        variant.runs = {}


def _attempt(subject: _Subject, variant: Variant, observer: Observer, counts: bool) -> None:
    if variant.error is None:
        with _noting(variant):
            times = subject.once(variant)
            if counts:
                for name, value in times.items():
                    variant.runs.setdefault(name, []).append(value)
    observer.advanced(1)


def _longest(seen: Sequence[tuple[int, ...]]) -> tuple[int, ...]:
    return tuple(max(column) for column in zip(*seen, strict=True))


def _in_turns(subject: _Subject, plain: Variant, methods: list[Variant]) -> list[Variant]:
    """The order of a turn: the plain model, then methods of equal lengths with their `short`."""
    short: dict[tuple[int, ...], tuple[Variant, list[Variant]]] = {}
    failed = []
    for method in methods:
        if method.error is not None:
            failed.append(method)
            continue
        # A batch is as long as its longest row.
        lengths = _longest(method.seen)
        if lengths == subject.whole and plain.error is None:
            method.reference = plain
            short.setdefault(lengths, (plain, []))[1].append(method)
            continue
        made = Variant("short", method.keep, lengths=lengths)
        method.reference, group = short.setdefault(lengths, (made, []))
        group.append(method)
    order = [plain] if subject.settings.unpatched else []
    for reference, group in short.values():
        order += group if reference is plain else [*group, reference]
    return order + failed


# ---- results ------------------------------------------------------------------------------------
def _spread(values: Sequence[float]) -> dict[str, Any] | None:
    if not values:
        return None
    if len(values) == 1:
        low = middle = high = values[0]
    else:
        low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return {"median": middle, "q1": low, "q3": high, "runs": list(values)}


def _ratio(mine: Sequence[float], other: Sequence[float]) -> dict[str, Any] | None:
    """Median and quartiles of the ratios within each turn."""
    if not mine or len(mine) != len(other) or not all(y > 0 for y in other):
        return None
    return _spread([x / y for x, y in zip(mine, other, strict=True)])


def _flops(config: Any, seen: Sequence[tuple[int, ...]]) -> dict[str, float]:
    """Of the language model for the whole batch, prefill and one step of decoding."""
    from vtc.cost import decode_flops, prefill_flops

    return {
        "prefill": sum(prefill_flops(config, lengths).lm for lengths in seen),
        "decode": sum(decode_flops(config, lengths) for lengths in seen),
    }


_PARTS = ("total", "vision", "selector", "lm", "prefill", "decode")


def _row(subject: _Subject, variant: Variant, plain: Variant) -> dict[str, Any]:
    """One row of the results (see `run`)."""
    from vtc.cost import equivalent_tokens, kv_bytes

    row: dict[str, Any] = {
        "dtype": str(subject.dtype).removeprefix("torch."),
        "batch": subject.batch,
        "label": variant.label,
        "keep": variant.keep if variant.label != "short" else None,
        "method": None if variant.method is None else variant.method.to_dict(),
        "status": "done" if variant.error is None else "failed",
        "error": variant.error,
    }
    row |= dict.fromkeys(("tokens", "ms", "ratio", "flops", "kv_bytes", "peak_bytes"))
    if variant.error is not None:
        return row
    count, text = len(variant.seen), subject.settings.text
    mean = [sum(column) / count - text for column in zip(*variant.seen, strict=True)]
    row["tokens"] = {
        "in": subject.tokens,
        "text": text,
        "per_layer": mean,
        "equivalent": equivalent_tokens(mean),
    }
    row["ms"] = {name: _spread(variant.runs.get(name, [])) for name in (*_PARTS, "after")}
    row["flops"] = _flops(subject.config, variant.seen)
    size = subject.dtype.itemsize
    row["kv_bytes"] = sum(kv_bytes(subject.config, lengths, size) for lengths in variant.seen)
    row["peak_bytes"] = variant.peak
    compared = ("prefill", "total", "decode")
    row["ratio"] = dict.fromkeys(("unpatched", "short", "ideal"))
    if plain.error is None:
        row["ratio"]["unpatched"] = {
            name: _ratio(variant.runs[name], plain.runs[name]) for name in compared
        }
        all_of_it = _flops(subject.config, plain.seen)
        row["ratio"]["ideal"] = {
            name: _ratio(
                variant.runs[name],
                [x * row["flops"][name] / all_of_it[name] for x in plain.runs[name]],
            )
            for name in ("prefill", "decode")
        }
    other = variant.reference
    if other is not None and other.error is None:
        against = {name: _ratio(variant.runs[name], other.runs[name]) for name in compared}
        ends = [each.runs.get("after", []) for each in (variant, other)]
        row["ratio"]["short"] = {**against, "beyond": _ratio(*ends)}
    return row


def _stated(settings: Settings, image: tuple[int, int]) -> dict[str, Any]:
    stated = {**vars(settings), "image": image, "config": _name(settings)}
    del stated["out"]
    return stated


def _name(settings: Settings) -> str:
    """The configuration's name; of a folder only its last part, which names no machine."""
    folder = Path(settings.config).expanduser()
    return folder.resolve().name if folder.is_dir() else settings.config


def _describe(config: Any, model: Any, settings: Settings) -> dict[str, Any]:
    text = config.get_text_config()
    return {
        "id": _name(settings),
        "type": config.model_type,
        "weights": "pretrained" if settings.pretrained else "random",
        "parameters": sum(p.numel() for p in model.parameters()),
        "layers": text.num_hidden_layers,
        "hidden_size": text.hidden_size,
        "attention": text._attn_implementation,
    }


def _versions() -> dict[str, str]:
    import torch
    import transformers

    found = {module.__name__: str(module.__version__) for module in (vtc, torch, transformers)}
    return {**found, "python": platform.python_version()}


def _load_average() -> list[float] | None:
    with suppress(OSError, AttributeError):
        return [round(x, 2) for x in os.getloadavg()]
    return None


def _machine(device: torch.device) -> dict[str, Any]:
    import torch

    cpu = platform.processor() or platform.machine()
    with suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text("utf-8").splitlines()
        cpu = next((x.split(":")[1].strip() for x in lines if x.startswith("model name")), cpu)
    gpu = None
    if device.type == "cuda":
        gpu = {"name": torch.cuda.get_device_name(device), "cuda": torch.version.cuda}
    return {
        "device": str(device),
        "cpu": cpu,
        "capability": torch.backends.cpu.get_cpu_capability(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": gpu,
        "system": f"{platform.system()} {platform.machine()}",
    }


def _at(row: Mapping[str, Any], *path: str) -> Any:
    found: Any = row
    for step in path:
        found = found.get(step) if isinstance(found, Mapping) else None
    return found


def _csv(rows: Sequence[Mapping[str, Any]]) -> str:
    """One line a row; of each figure its median and quartiles."""
    columns: dict[str, tuple[str, ...]] = {
        name: (name,) for name in ("dtype", "batch", "label", "keep", "status", "error")
    }
    columns |= {"tokens": ("tokens", "equivalent"), "first": ("tokens", "per_layer")}
    figures: dict[str, tuple[str, ...]] = {f"{name}_ms": ("ms", name) for name in _PARTS}
    for other, names in {
        "unpatched": ("prefill", "total", "decode"),
        "short": ("prefill", "total", "decode", "beyond"),
        "ideal": ("prefill", "decode"),
    }.items():
        figures |= {f"{name}_to_{other}": ("ratio", other, name) for name in names}
    for name, path in figures.items():
        columns |= {name: (*path, "median"), f"{name}_q1": (*path, "q1")}
        columns |= {f"{name}_q3": (*path, "q3")}
    columns |= {"lm_flops": ("flops", "prefill"), "kv_bytes": ("kv_bytes",)}
    columns |= {"peak_bytes": ("peak_bytes",)}
    text = io.StringIO()
    writer = csv.writer(text)
    writer.writerow([name if name != "first" else "tokens_per_layer" for name in columns])
    for row in rows:
        values = {name: _at(row, *path) for name, path in columns.items()}
        values["first"] = None if values["first"] is None else run_lengths(values["first"])
        writer.writerow(values.values())
    return text.getvalue()


_NOTE = """
prefill: the language model's, selection and vtc's overhead included, tower and projector not; \
medians of {repeats} turns, and half the distance of their quartiles. / all: over the unpatched \
model. / short: over the same model given the short sequence outright. beyond: the same without \
the layers before the first cut. / ideal: over what the FLOPs predict from the unpatched model. \
decode: one token a row. peak: beyond weights and inputs. Ratios are formed turn by turn."""


def table(results: Mapping[str, Any]) -> RenderableType:
    """The rows of `results` (what `run` returned), 120 columns wide at most."""
    from itertools import groupby

    from rich.console import Group
    from rich.text import Text

    machine, model = results["machine"], results["model"]
    where = machine["gpu"]["name"] if machine["gpu"] else machine["cpu"]
    load = machine["load_average"]["before"]
    busy = "" if load is None else f", load {load[0]} before"
    head = (
        f"{model['id']} · {model['layers']} layers, d = {model['hidden_size']}, "
        f"{model['weights']} weights · {where}, {machine['threads']} threads{busy}"
    )
    parts: list[RenderableType] = [Text(head, style="bold")]
    failed = []
    for (dtype, batch), group in groupby(results["rows"], key=lambda r: (r["dtype"], r["batch"])):
        rows = list(group)
        parts.append(_block(f"{dtype}, batch {batch}", rows))
        failed += [
            f"{dtype}, batch {batch}, {row['label']}: {row['error']}"
            for row in rows
            if row["status"] != "done"
        ]
    parts.append(Text(_NOTE.format(repeats=results["settings"]["repeats"]), style="dim"))
    parts += [Text(f"failed: {line}", style="red") for line in failed]
    return Group(*parts)


def _block(title: str, rows: Sequence[Mapping[str, Any]]) -> RenderableType:
    from rich.box import SIMPLE_HEAD
    from rich.table import Table
    from rich.text import Text

    drawn = Table(
        title=title, title_justify="left", title_style="bold", box=SIMPLE_HEAD,
        pad_edge=False, show_edge=False, padding=(0, 1, 0, 0),
    )  # fmt: skip
    drawn.add_column("\nmethod", overflow="fold", min_width=14)
    drawn.add_column("tokens ×\nlayers", overflow="fold", min_width=8)
    headers = "tower,\nms|prefill, ms\n± half IQR|selector,\nms|\n/ all|\n/ short|\nbeyond|"
    headers += "\n/ ideal|decode,\nms|\n/ short|peak,\nMiB"
    for header in headers.split("|"):
        drawn.add_column(header, justify="right", no_wrap=True)

    def ratio(row: Mapping[str, Any], *path: str) -> str:
        value = _at(row, "ratio", *path, "median")
        return "–" if value is None else f"{value:.3f}"

    for row in rows:
        keep = "" if row["keep"] is None else f" {row['keep']:g}"
        if row["status"] != "done":
            drawn.add_row(f"{row['label']}{keep}", "", Text("failed", style="bold red"))
            continue
        ms, peak = row["ms"], row["peak_bytes"]
        middle, half = ms["prefill"]["median"], (ms["prefill"]["q3"] - ms["prefill"]["q1"]) / 2
        drawn.add_row(
            f"{row['label']}{keep}",
            run_lengths(row["tokens"]["per_layer"]),
            _ms(ms["vision"]["median"]),
            f"{_ms(middle)} ± {_ms(half)}",
            "–" if row["method"] is None else _ms(ms["selector"]["median"]),
            ratio(row, "unpatched", "prefill"),
            ratio(row, "short", "prefill"),
            ratio(row, "short", "beyond"),
            ratio(row, "ideal", "prefill"),
            _ms(ms["decode"]["median"]),
            ratio(row, "short", "decode"),
            "–" if peak is None else f"{peak / 2**20:.0f}",
        )
    return drawn


def _ms(value: float) -> str:
    """Milliseconds to about four digits."""
    return f"{value:.{0 if value >= 1000 else 1 if value >= 100 else 2}f}"
