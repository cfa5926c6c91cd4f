# SPDX-License-Identifier: Apache-2.0
"""The part of an adapter that knows the vision tower."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from functools import cache, cached_property
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from vtc.core.errors import UnsupportedModelError
from vtc.core.images import Modality


class TowerPart:
    """Where the tower's attention, [CLS] and patch states are; see `Adapter`."""

    model: Any
    base: Any
    tower: Any
    unread: ClassVar[str] = ""
    unmerged: ClassVar[str] = ""
    shows_states: ClassVar[bool] = False

    def tower_attention(self) -> list[nn.Module]:
        """The attention module of each layer of the vision tower, first to last.

        Raises:
            UnsupportedModelError: the tower's attention cannot be read.
        """
        if self.unread:
            raise UnsupportedModelError(
                f"model: in the vision tower of {type(self.model).__name__} vtc reads no "
                f"attention and no keys: {self.unread}; use a method that needs neither"
            )
        stacks = self._stacks
        if len(stacks) != 1 or not all(hasattr(module, "config") for module in stacks[0]):
            why = (
                "its layers form several stages, whose places differ"
                if stacks
                else "none of its layers attends through the attention functions of transformers"
            )
            raise UnsupportedModelError(
                f"model: cannot read attention in the vision tower {type(self.tower).__name__}: "
                f"{why}"
            )
        return list(stacks[0])

    @cached_property
    def _stacks(self) -> list[list[Any]]:
        # Adapters are bound anew in each call, as modules may be replaced in between.
        return _attention_stacks(self.tower)

    def watch_attention(self, module: Any, heard: Callable[..., None]) -> list[Any] | None:
        """Listen to a tower's attention module that does not attend through the attention functions
        of transformers.

        Args:
            module: one of `tower_attention`.
            heard: to be called with the module's query (b, h, n, d), key and value (b, h_kv, n, d),
                attention mask or `None`, and the options of attention, such as `scaling`.

        Returns:
            The handles of the hooks; `None` if it attends through these functions.
        """
        return None

    def has_cls(self) -> bool:
        """Whether the tower has a [CLS] token."""
        embeddings = getattr(self.tower, "embeddings", None)
        return any(hasattr(embeddings, name) for name in ("class_embedding", "cls_token"))

    def cls_place(self) -> int | None:
        """The place of [CLS] among the tokens of an image in the tower, negative from the end;
        `None` without [CLS]."""
        return 0 if self.has_cls() else None

    def prefix(self, given: Mapping[str, Any]) -> int:
        """The number of tower tokens before an image's patches that yield no vision token.

        Args:
            given: the arguments of `get_image_features`, which override the config.

        Returns:
            0 or 1: the [CLS] token, unless it counts as a vision token.
        """
        full = setting(self, given, "vision_feature_select_strategy", "default") == "full"
        return int(self.has_cls() and not full)

    def suffix(self) -> int:
        """The number of tower tokens after an image's patches that yield no vision token."""
        return 0

    def tower_of(self, modality: Modality) -> Any:
        """The vision encoder of a modality."""
        return self.tower

    def tower_order(self, given: Mapping[str, Any]) -> Tensor | None:
        """The order of patches in the tower, if it differs from that of `ImageMap.patches`.

        Args:
            given: the arguments of `get_image_features` or `get_video_features`.

        Returns:
            (patches,) the tower's place of each patch, or `None` for the same order.
        """
        return None

    def patches_at(self, layer: int, patches: Tensor, given: Mapping[str, Any]) -> Tensor:
        """The patches of each token as a tower layer sees them, of a tower that joins patches
        between its layers.

        Args:
            layer: 0-based tower layer.
            patches: (n, m) as in `ImageMap.patches`, in the tower's order.
            given: the arguments of `get_image_features` or `get_video_features`.

        Returns:
            (n, k), numbered as the layer's sequence; `patches` where nothing is joined later.
        """
        return patches

    def projector(self) -> nn.Module | None:
        """The module that maps patch states to embeddings; `None` if unknown."""
        return getattr(self.base, "multi_modal_projector", None)

    def states_from(self) -> Any:
        """The module that shows the patch states, where the projector joins patches."""
        return self.projector()

    def patch_states(self, given: Tensor, output: Any) -> Tensor:
        """The states of patches, where the projector joins them.

        Args:
            given: the first argument of the module `states_from`.
            output: what it returned.

        Returns:
            (..., d_v), in the order of the tower; or one row for each token, in which the states of
            its patches stand side by side, if `ImageMap.states` says so.
        """
        return given

    def cls_states(self, output: Any, given: Mapping[str, Any]) -> Tensor | None:
        """The [CLS] states of the layers that the projector reads.

        Args:
            output: of the tower, with hidden states.
            given: the arguments of `get_image_features`, which override the config.

        Returns:
            (images, d_v), or `None` without [CLS].
        """
        if not self.has_cls():
            return None
        several = setting(self, given, "vision_feature_layers", -1)
        wanted: Any = setting(self, given, "vision_feature_layer", several)
        layers = [wanted] if isinstance(wanted, int) else wanted
        return torch.cat([output.hidden_states[layer][:, 0] for layer in layers], dim=-1)


def _attention_stacks(tower: Any) -> list[list[Any]]:
    """The attention modules of each stack of layers with one attention, of outermost stacks."""
    stacks: list[list[Any]] = []

    def search(module: Any) -> list[Any]:
        inner = len(stacks)
        by_part = [search(part) for part in _parts(module)]
        found = [attention for of_part in by_part for attention in of_part]
        single = all(len(of_part) == 1 for of_part in by_part)
        if found and single and isinstance(_wrapped(module), nn.ModuleList):
            stacks[inner:] = [found]
        return [module, *found] if _attends(module.__class__) else found

    if tower is not None:
        search(tower)
    return stacks


def _parts(module: nn.Module) -> list[nn.Module]:
    """The child modules; peft's wrapper leads to those of the copy that it runs."""
    found = [getattr(module, name) for name in _wrapped(module)._modules]
    return [part for part in found if part is not None]


def _wrapped(module: nn.Module) -> nn.Module:
    """What peft wraps, or the module itself."""
    inner = module._modules.get("original_module")
    return module if inner is None else inner


@cache
def _attends(kind: Any) -> bool:
    """Whether a class of modules attends through the attention functions of transformers."""
    forwards = [
        inspect.unwrap(vars(cls)["forward"]) for cls in kind.__mro__ if "forward" in vars(cls)
    ]
    return any(
        "ALL_ATTENTION_FUNCTIONS" in code.co_names
        for forward in forwards
        if (code := getattr(forward, "__code__", None)) is not None
    )


def setting(adapter: TowerPart, given: Mapping[str, Any], name: str, default: Any) -> Any:
    """A config setting that an argument of the call overrides.

    Args:
        adapter: bound to the model.
        given: the arguments of the call.
        name: of the setting.
        default: the value if neither has it.

    Returns:
        The argument's value unless it is missing or `None`, otherwise the config's.
    """
    value = given.get(name)
    return getattr(adapter.model.config, name, default) if value is None else value
