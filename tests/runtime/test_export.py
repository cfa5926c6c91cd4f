# SPDX-License-Identifier: Apache-2.0
"""What makes one graph of a model: a patched one says why it is none, before anything is traced,
and works again once it is unpatched."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn
from transformers import CompileConfig, GenerationConfig

import vtc
from tests.reference.families import FAMILIES
from tests.reference.models import build_model, collate, make_sample
from tests.runtime.test_families import shared
from vtc.core import Method
from vtc.runtime.forward import Forward
from vtc.runtime.hf.stages import RUNNERS, Runner

METHODS: list[Method] = [vtc.Full(), vtc.FastV(keep=0.3)]
REMEDY = r"vtc\.unpatch\(model\).*model\.model\.language_model"


class Wrapper(nn.Module):
    """A model in a module of the user's, as exporters are often given it."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, attention_mask: Tensor, pixel_values: Tensor) -> Tensor:
        given = {"attention_mask": attention_mask, "pixel_values": pixel_values}
        logits: Tensor = self.model(input_ids=input_ids, **given, use_cache=False).logits
        return logits


def batch() -> dict[str, Tensor]:
    return collate([make_sample("clip", (2, "image", 3), 1)])


def in_order() -> tuple[Tensor, ...]:
    return tuple(batch()[name] for name in ("input_ids", "attention_mask", "pixel_values"))


@pytest.fixture
def model() -> Iterator[Any]:
    torch.compiler.reset()
    yield build_model("clip", "llama")
    torch.compiler.reset()


def whole(called: Any, *args: Any, **kwargs: Any) -> Tensor:
    out = torch.compile(called, backend="eager", fullgraph=True)(*args, **kwargs)
    return out if isinstance(out, Tensor) else out.logits


def compiled_in_place(model: Any) -> Tensor:
    model.compile(backend="eager", fullgraph=True)
    try:
        logits: Tensor = model(**batch(), use_cache=False).logits
        return logits
    finally:
        model._compiled_call_impl = None


def exported(model: nn.Module, strict: bool) -> Tensor:
    if isinstance(model, Wrapper):
        program = torch.export.export(model, in_order(), strict=strict)
        out = program.module()(*in_order())
    else:
        given = {**batch(), "use_cache": False}
        program = torch.export.export(model, (), given, strict=strict)
        out = program.module()(**given).logits
    found: Tensor = out
    return found


def traced(model: nn.Module) -> Tensor:
    found: Tensor = torch.jit.trace(Wrapper(model), in_order(), check_trace=False)(*in_order())
    return found


WAYS: dict[str, Callable[[Any], Tensor]] = {
    "export": lambda model: exported(model, strict=False),
    "export, strict": lambda model: exported(model, strict=True),
    "export, inside another": lambda model: exported(Wrapper(model), strict=False),
    "export, inside another, strict": lambda model: exported(Wrapper(model), strict=True),
    "jit.trace": traced,
    "compile": lambda model: whole(model, **batch(), use_cache=False),
    "compile, inside another": lambda model: whole(Wrapper(model), *in_order()),
    "compile, in place": compiled_in_place,
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("method", METHODS, ids=lambda method: type(method).__name__)
def test_one_graph_is_refused(model: Any, method: Method, way: str) -> None:
    entered: list[bool] = []
    handle = model.model.vision_tower.register_forward_pre_hook(lambda *_: entered.append(True))
    with vtc.patch(model, method), torch.no_grad():
        with pytest.raises(RuntimeError, match=f"(?s){REMEDY}"):
            WAYS[way](model)
        assert not entered
        handle.remove()
        model(**batch())


@pytest.mark.parametrize(
    "way", ["export, inside another", "jit.trace", pytest.param("compile", marks=pytest.mark.slow)]
)
def test_one_graph_of_a_model_that_was_patched(model: Any, way: str) -> None:
    with torch.no_grad():
        plain = model(**batch()).logits
        with vtc.patch(model, vtc.FastV(keep=0.3)), pytest.raises(RuntimeError):
            WAYS[way](model)
        assert torch.allclose(WAYS[way](model), plain, atol=1e-4)


# ---- generate -----------------------------------------------------------------------------------
def settings(**more: Any) -> Any:
    config: Any = CompileConfig(backend="eager", mode=None, **more)  # type: ignore[arg-type]
    config._compile_all_devices = True
    return config


def asked_by(model: Any, given: dict[str, Tensor], where: str, **more: Any) -> Any:
    given = dict(given)
    more = {"max_new_tokens": 2, "cache_implementation": "static", **more}
    if where == "argument":
        return model.generate(**given, **more)
    if where == "position":
        return model.generate(given.pop("input_ids"), GenerationConfig(**more), **given)
    own, compiled = model.generation_config, more.pop("compile_config")
    try:
        model.generation_config = copy.deepcopy(own)
        model.generation_config.compile_config = compiled
        return model.generate(**given, **more)
    finally:
        model.generation_config = own


@dataclass(frozen=True)
class Evicts(Method):
    """Lets go of one more vision token after each forward."""

    def evict(self, seen: Tensor) -> int:
        """The place of the first of those that are seen, (n,) bool."""
        return int(seen.long().argmax())


Evicts.name = "evicts"


class Evictor(Runner):
    """Hides what is evicted from the first group."""

    stage: ClassVar[str] = "cache"

    def leave(self, forward: Forward, cache: Any) -> None:
        (group,), ((_, method),) = forward.ledger.groups, self.parts
        group.diverged = True
        if forward.phase == "prefill":
            group.valid = forward.layout.valid.clone()
            forward.ledger.rows["vision"] = forward.prompt.image >= 0
        for valid, seen in zip(group.valid, forward.ledger.rows["vision"], strict=True):
            place = method.evict(seen)
            valid[place] = seen[place] = False


@pytest.mark.parametrize("where", ["argument", "position", "own"])
def test_generate_in_one_graph_is_refused_where_steps_leave_it(
    model: Any, where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Such as those after which a method changes the cache; see `test_compile` for all others."""
    monkeypatch.setitem(RUNNERS, "cache", Evictor)
    with vtc.patch(model, Evicts()) as patch:
        with pytest.raises(ValueError, match=r"(?s)compile_config: .*fullgraph=False.*may change"):
            asked_by(model, batch(), where, compile_config=settings(fullgraph=True))
        assert patch.report.prefills == []
        off = {"compile_config": settings(fullgraph=True), "disable_compile": True}
        if where != "own":  # nothing is compiled then
            asked_by(model, batch(), where, **off)


def test_steps_after_which_a_method_changes_the_cache(
    model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They run as they are, on a static cache as on any other."""
    monkeypatch.setitem(RUNNERS, "cache", Evictor)
    more: Any = {"max_new_tokens": 5, "return_dict_in_generate": True, "output_logits": True}
    found = []
    with vtc.patch(model, Evicts()):
        for kind in (None, "static"):
            out = model.generate(**batch(), cache_implementation=kind, **more)
            hidden = ~out.past_key_values.vtc_ledger.groups[0].valid
            assert int(hidden.sum()) == 5  # after the prompt, and after each of four steps
            found.append(torch.stack(out.logits))
    plain = torch.stack(model.generate(**batch(), **more).logits)
    assert (found[0] - found[1]).abs().max() < 1e-4
    assert torch.allclose(found[0][0], plain[0], atol=1e-4)
    assert (found[0][1] - plain[1]).abs().max() > 1e-2


def test_generate_of_mllama_in_one_graph_is_refused() -> None:
    family = FAMILIES["mllama"]
    given = family.collate(family.rows("one"))
    model: Any = shared("mllama", "sdpa")
    with vtc.patch(model, vtc.Random(keep=0.3)), pytest.raises(ValueError, match="compile_config"):
        asked_by(model, given, "argument", compile_config=settings(fullgraph=True))
