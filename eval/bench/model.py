# SPDX-License-Identifier: Apache-2.0
"""The measured model: its configuration and weights."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..harness.plan import BadInput
from .settings import NATIVE, PLAIN, PRESETS, TILED, Settings

if TYPE_CHECKING:
    import torch
    from torch import nn


def config_of(settings: Settings) -> tuple[Any, tuple[int, int]]:
    """The configuration, and the image's (height, width) in pixels.

    Raises:
        BadInput: an unknown configuration, or an unsuitable size.
    """
    from transformers import AutoConfig
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    name, image = settings.config, settings.image
    if (preset := PRESETS.get(name)) is not None:
        tiles: dict[str, Any] = {}
        if preset.kind in TILED:
            tiles = {"image_grid_pinpoints": [[672, 672]]}
        extra: dict[str, Any] = {} if preset.kind in NATIVE else {"vision_feature_layer": -2}
        kind: Any = CONFIG_MAPPING[preset.kind]
        config = kind(
            text_config=dict(preset.text), vision_config=dict(preset.vision), **tiles, **extra
        )
        image = image or preset.image
    else:
        config = _look_up(AutoConfig, name)
    if config.model_type not in PLAIN + TILED + NATIVE:
        raise BadInput(
            "--config",
            f"{name} has the type {config.model_type!r}; inputs can be made for "
            f"{', '.join(PLAIN + TILED + NATIVE)}",
        )
    text = config.get_text_config()
    if settings.layers is not None:
        text.num_hidden_layers = settings.layers
        if getattr(text, "layer_types", None):
            text.layer_types = text.layer_types[: settings.layers]
            if len(text.layer_types) < settings.layers:
                raise BadInput("--layers", f"{name} lists the types of fewer layers")
    # The usual id exceeds the presets' small vocabularies.
    config.image_token_id = min(config.image_token_id, text.vocab_size - 1)
    for part in (text, config):
        # Any random token may occur; none must end the sequence.
        part.pad_token_id = part.bos_token_id = part.eos_token_id = None
    if config.model_type in NATIVE:
        vision = config.vision_config
        unit = vision.patch_size * vision.spatial_merge_size
        image = image or (36 * unit, 36 * unit)
    else:
        side, unit = config.vision_config.image_size, config.vision_config.patch_size
        tiles_across = 2 if config.model_type in TILED else 1
        image = image or (tiles_across * side, tiles_across * side)
    if config.model_type not in TILED and (image[0] % unit or image[1] % unit):
        raise BadInput("--image", f"expected multiples of {unit} pixels, got {image}")
    return config, image


def _look_up(auto: Any, name: str, **options: Any) -> Any:
    """`from_pretrained` with a folder, or an id on the hub or in its cache."""
    from ..harness.quiet import hub_answers, offline, without_bars

    folder = Path(name).expanduser()
    try:
        if folder.is_dir():
            with without_bars():
                return auto.from_pretrained(folder, **options)
        if name.startswith((".", "/", "~")) or "/" not in name:
            raise BadInput(
                "--config", f"no folder or preset {name}; presets are {', '.join(PRESETS)}"
            )
        with offline(not hub_answers()), without_bars():
            return auto.from_pretrained(name, **options)
    except (OSError, ValueError) as error:
        if isinstance(error, BadInput):
            raise
        raise BadInput("--config", f"{name}: {str(error).splitlines()[0]}") from error


def build(config: Any, settings: Settings, dtype: torch.dtype, device: torch.device) -> Any:
    """The model in evaluation mode, created directly in `dtype` on `device`."""
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
    """Set random weights, scaled so that activations stay finite in half precision.

    One block of random numbers is repeated: drawing billions would take minutes, and speed depends
    on sizes only. Its length is coprime to usual widths, so no two rows are equal.
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
