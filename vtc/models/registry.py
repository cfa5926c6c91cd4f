# SPDX-License-Identifier: Apache-2.0
"""Selects a model's adapter, among those of vtc and of other packages.

A package provides families through an entry point of the group `vtc.families` that names a module;
importing it registers the adapters that it defines.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from functools import cache
from importlib import import_module

import transformers
from packaging.version import Version
from torch import nn

from vtc.core.plugins import load_group

from .base import ADAPTERS, Adapter, UnsupportedModelError


@dataclass(frozen=True)
class FamilyInfo:
    """A family, as listed by `vtc.models()`.

    Attributes:
        name: name of the family.
        model_types: the `config.model_type` of its models; empty for the generic family.
        stages: stages in which methods can act.
        video: "clips", "frames" (each a separate image) or "none".
        positions: "one axis", on which gaps can close, "places in the picture" (M-RoPE), or "none".
        attention: how the tokens of an image attend to one another.
        tower: what methods can read of the vision tower, or "nothing" and why.
        tested: whether vtc's tests compare it with the reference; the generic family works with a
            warning, and those of other packages are theirs to test.
        about: its particularities, from the class's docstring.
    """

    name: str
    model_types: tuple[str, ...]
    stages: tuple[str, ...]
    video: str
    positions: str
    attention: str
    tower: str
    tested: bool
    about: str


def families() -> list[type[Adapter]]:
    """All registered adapters, sorted by name."""
    _load()
    return sorted(ADAPTERS, key=lambda cls: cls.name)


@cache
def _load() -> None:
    import_module("vtc.models")
    load_group("vtc.families")


def models() -> list[FamilyInfo]:
    """The supported families; "generic" stands for any other model of the common shape."""
    kinds: list[type[Adapter]] = [*families(), Adapter]
    return [
        FamilyInfo(
            name=cls.name,
            model_types=cls.model_types,
            stages=cls.stages,
            video="clips" if cls.video else "frames" if cls.frames else "none",
            positions=cls.positions,
            attention=cls.attention,
            tower=cls.readable(),
            tested=bool(cls.model_types) and cls.__module__.startswith("vtc.models."),
            about=" ".join((cls.__doc__ or "").split("\n\n")[0].split()),
        )
        for cls in kinds
    ]


def find(model: nn.Module) -> Adapter:
    """Find the adapter of a model.

    Args:
        model: the model, without wrappers.

    Returns:
        The adapter, bound to the model.

    Warns:
        UserWarning: the family is unknown but has the common shape; states the assumptions.

    Raises:
        UnsupportedModelError: not a VLM, of a shape that vtc does not cover, or of a family that
            needs a newer transformers.
    """
    supported = ", ".join(kind for cls in families() for kind in cls.model_types)
    config = getattr(model, "config", None)
    if not isinstance(model, nn.Module) or config is None:
        raise UnsupportedModelError(
            f"model: expected a vision-language model of transformers, got {type(model).__name__}; "
            f"supported are {supported}, and others of the same shape"
        )
    kind = getattr(config, "model_type", None)
    family = next((cls for cls in families() if kind in cls.model_types), Adapter)
    sees = hasattr(config, "vision_config") or hasattr(model, "get_image_features")
    if family is Adapter and not sees:
        raise UnsupportedModelError(
            f"model: {type(model).__name__} ({kind}), in which vtc finds no vision encoder. "
            f"Supported are {supported}, and other vision-language models of the same shape"
        )
    needed = family.since.get(str(kind))
    if needed is not None and Version(transformers.__version__) < Version(needed):
        raise UnsupportedModelError(
            f"model: the {type(model).__name__} of transformers {transformers.__version__} lacks "
            f"what vtc hooks; it needs transformers {needed} or newer"
        )
    try:
        adapter = family.bind(model)
        adapter.check()
    except UnsupportedModelError as error:
        raise UnsupportedModelError(f"{error}. Supported are {supported}") from None
    if family is Adapter:
        warnings.warn(
            f"{type(model).__name__} ({kind}) is not a family that vtc is tested on. Assumed: "
            "vision features replace placeholder tokens one by one, a square grid of patches per "
            "image, causal attention and one-dimensional rotary positions. Before you rely on it, "
            "compare its outputs with a run in which the dropped tokens are masked",
            stacklevel=4,
        )
    return adapter
