# SPDX-License-Identifier: Apache-2.0
"""The executor for models of transformers."""

from __future__ import annotations

import warnings
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from vtc.core import Method
from vtc.models import Adapter, families, find
from vtc.models.decoder import POINTWISE, RECURRENT
from vtc.runtime.executors import Executor
from vtc.runtime.fitting import fit
from vtc.runtime.hf.cross import CrossEngine
from vtc.runtime.hf.encoder import EncoderEngine
from vtc.runtime.hf.engine import Engine
from vtc.runtime.hf.hooked import Hooked
from vtc.runtime.hf.nested import NestedEncoderEngine, NestedEngine
from vtc.runtime.hf.stages import RUNNERS


class Transformers(Executor):
    """Hooks the modules of a model, bare or in wrappers of compilers, adapters and multi-device
    training."""

    @classmethod
    def stages(cls) -> tuple[str, ...]:
        """Those that have a runner."""
        return tuple(RUNNERS)

    @classmethod
    def accepts(cls, model: Any) -> bool:
        """Whether it is a PyTorch module."""
        return isinstance(model, nn.Module)

    @classmethod
    def supported(cls) -> str:
        """The model types of all families."""
        kinds = ", ".join(kind for family in families() for kind in family.model_types)
        return (
            f"a vision-language model of transformers (supported are {kinds}, and others of the "
            "same shape)"
        )

    @classmethod
    def holders(cls, model: Any) -> tuple[Any, ...]:
        """The part that merges images in, possibly the model itself."""
        inner = _unwrapped(model)
        part = getattr(inner, "model", None)
        return inner, part, getattr(part, "model", None)  # of a classifier around the model

    @classmethod
    def bind(cls, model: Any, method: Method) -> Hooked:
        """Bind a method; see `Executor.bind`."""
        adapter = find(_unwrapped(model))
        fitted = method
        if "layers" in {*method.stages} & {*adapter.stages} and not adapter.crosses:
            kinds = [adapter.layer_type(layer) for layer in range(len(adapter.layers))]
            fitted = fit(method, [kind not in (*RECURRENT, *POINTWISE) for kind in kinds])
        if fitted != method:
            warnings.warn(
                f"{method} reads attention of decoder layers that have none in "
                f"{type(adapter.model).__name__}, most of whose layers are recurrent; the next "
                f"layers that have it are taken: {fitted}",
                stacklevel=3,
            )
        # All checks precede the engine.
        engine = _engine(adapter)
        made: Hooked = engine(adapter, fitted)
        return made


def _engine(adapter: Adapter) -> type[Hooked]:
    """The engine for models of this shape."""
    if adapter.crosses:
        return CrossEngine
    if adapter.seq2seq:
        return NestedEncoderEngine if adapter.nested else EncoderEngine
    return NestedEngine if adapter.nested else Engine


def _unwrapped(model: Any) -> Any:
    """The model inside wrappers."""
    while isinstance(model, nn.Module):
        base: Any = getattr(model, "get_base_model", None)
        inside = [model._modules.get(name) for name in _WRAPPED]
        found = next((part for part in inside if part is not None), None)
        if found is None and base is not None:
            found = base()
        if found is None or isinstance(model, PreTrainedModel):
            break
        model = found
    return model


_WRAPPED = ("_orig_mod", "module", "_fsdp_wrapped_module")
"""Its attribute in torch.compile, DistributedDataParallel (and similar wrappers) and FSDP."""
