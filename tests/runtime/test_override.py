# SPDX-License-Identifier: Apache-2.0
"""What replaces a method of a model: whatever the class has under that name is found and bound as
Python would."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import vtc
from tests.reference.families import FAMILIES
from tests.runtime.test_families import generate, shared
from tests.runtime.test_serving import EVERY, assert_bitwise, batch_of, steps_of
from vtc.core import Method
from vtc.runtime.hf.override import Override


class Doubled:
    def __call__(self, x: int) -> int:
        return 2 * x


class Has:
    factor = 3
    called = Doubled()

    def method(self, x: int) -> int:
        return self.factor * x

    @staticmethod
    def static(x: int) -> int:
        return 5 * x

    @classmethod
    def of_class(cls, x: int) -> int:
        return cls.factor * x

    @property
    def made(self) -> Any:
        return lambda x: self.factor * x


class Inherits(Has):
    pass


@pytest.mark.parametrize("name", ["method", "static", "of_class", "made", "called"])
@pytest.mark.parametrize("kind", [Has, Inherits])
def test_the_original_is_bound_as_python_binds_it(kind: type, name: str) -> None:
    plain = getattr(kind(), name)(7)
    if name == "made":  # a property without a setter cannot be shadowed
        with pytest.raises(AttributeError):
            Override(kind(), name, lambda original, x: original(x))
        return
    target = kind()
    seen = []

    def replacement(original: Any, x: int) -> Any:
        seen.append(x)
        return original(x)

    override = Override(target, name, replacement)
    assert getattr(target, name)(7) == plain
    override.remove()
    assert getattr(target, name)(7) == plain
    assert seen == [7]
    assert not vars(target)


def masked_by_generate(model: Any, batch: dict[str, Tensor]) -> tuple[Tensor, ...]:
    output = generate(model, batch, max_new_tokens=3, cache_implementation="static")
    return output.sequences, steps_of(output)


@pytest.mark.parametrize("name", EVERY)
def test_a_static_cache_where_nothing_is_compressed(name: str) -> None:
    """`generate` makes the masks then, by a function that is static in some models."""
    family = FAMILIES[name]
    model = shared(name, family.attentions[-1])
    kinds = ("one",) if family.layouts.get("text") == () else ("text", "one")
    try:
        for _ in range(2):  # the first run of a process may round differently, patched or not
            plain = {kind: masked_by_generate(model, batch_of(name, kind)) for kind in kinds}
    except (ValueError, TypeError, RuntimeError, NotImplementedError) as error:
        pytest.skip(f"transformers has no static cache for it: {type(error).__name__}: {error}")
    cases: list[tuple[Method, str]] = [
        (vtc.Random(keep=0.3), "text"),
        (vtc.Full(), "one"),
        (vtc.Random(keep=1.0), "one"),
    ]
    for method, kind in cases[-len(kinds) - 1 :]:
        with vtc.patch(model, method), torch.no_grad():
            assert_bitwise(masked_by_generate(model, batch_of(name, kind)), plain[kind])
