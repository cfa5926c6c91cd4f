# SPDX-License-Identifier: Apache-2.0
"""Errors name their argument, and what is at fault is told from that and not from the text."""

from __future__ import annotations

import dataclasses
import pickle
from collections.abc import Callable

import pytest
from vtc.eval.harness.plan import BadInput, of_method
from vtc.eval.harness.suites import expand

import vtc
from vtc.core import (
    ArgumentError,
    ArgumentTypeError,
    check_choice,
    check_layer,
    check_number,
    scale_layers,
)
from vtc.core.errors import argument_of, message_of, within
from vtc.core.plugins import import_modules
from vtc.core.registry import wrappers
from vtc.core.spec import keep_is_at_fault, parse_keep, parse_method, split_list


@pytest.mark.parametrize(
    ("call", "argument"),
    [
        (lambda: vtc.make("random", keep=0), "keep"),
        (lambda: vtc.make("random", keep="half"), "keep"),
        (lambda: vtc.make("transprune", keep=64), "keep"),
        (lambda: vtc.make("nothing"), "method"),
        (lambda: vtc.make(7), "method"),
        (lambda: vtc.make("fastv", layer=-1), "layer"),
        (lambda: vtc.make("todre", kep=0.1), "kep"),
        (lambda: parse_method("todre:kep=0.1"), "kep"),
        (lambda: vtc.make(vtc.Full(), keep=0.1), "keep"),
        (lambda: split_list("a,,b"), "text"),
        (lambda: parse_method("fastv:layer=(3"), "method"),
        (lambda: check_choice("how", "x", ("a", "b")), "how"),
        (lambda: check_layer("layer", "two"), "layer"),
        (lambda: scale_layers(9, (0.5,), 4), "layer"),
        (lambda: scale_layers((3, 2), (0.5,), 4), "layers"),
        (lambda: parse_keep("many"), "keep"),
        (lambda: parse_method("full", keep=0.5), "keep"),
        (lambda: parse_method("fastv:layer"), "method"),
        (lambda: parse_method("fastv:layer=2:layer=3"), "layer"),
        (lambda: parse_method("divprune@tile:keep=0"), "keep"),
        (lambda: vtc.PerTile(vtc.DivPrune(), thumbnail=0), "thumbnail"),
        (lambda: parse_method("divprune@tile:thumbnail=0"), "thumbnail"),
        (lambda: parse_method("fastv@tile"), "method"),
        (lambda: vtc.FastV(layer=9).prune_layers(4), "layer"),
        (lambda: vtc.CATP().prune_layers(2), "layer"),
        (lambda: vtc.SparseVLM(keep=(9, 5), layers=(1, 2, 3)).prune_layers(8), "keep"),
        (lambda: type("A", (vtc.Method,), {"name": "A B"}), "name"),
        (lambda: type("B", (vtc.Method,), {"name": "b", "needs": frozenset({"c"})}), "needs"),
        (lambda: vtc.presets("nothing"), "method"),
        (lambda: vtc.preset("fastv", "nowhere", 64), "target"),
        (lambda: vtc.preset("fastv", "llava-1.5", 7), "tokens"),
        (lambda: vtc.preset("fastv", "llava-1.5", 64, keep=0.5), "keep"),
        (lambda: expand("nothing"), "suite"),
        (lambda: import_modules(["no_such_module"]), "import"),
    ],
)
def test_errors_name_their_argument(call: Callable[[], object], argument: str) -> None:
    with pytest.raises((ArgumentError, ArgumentTypeError)) as caught:
        call()
    error = caught.value
    assert argument_of(error) == argument
    assert str(error) == f"{argument}: {error.message}"
    assert isinstance(error, (ValueError, TypeError))


SETTINGS = [
    (cls, field.name)
    for cls in (*vtc.methods().values(), *wrappers().values())
    if cls.__module__.startswith("vtc.methods.")
    for field in dataclasses.fields(cls)
]
BASE = {"per_tile": {"inner": "divprune"}, "per_frame": {"inner": "divprune"}}
WRONG = [{}, object(), "no such value", -7.5, float("nan"), -7]


def _with(cls: type[vtc.Method], setting: str, value: object) -> dict[str, object]:
    fixed = {} if setting == "weights" else {"theta_r": 0.5, "theta_s": 0.5}
    base = fixed if cls is vtc.ATP else BASE.get(cls.name, {})
    return {**base, setting: value}


@pytest.mark.parametrize(
    ("cls", "setting"), [pytest.param(*one, id=f"{one[0].name}-{one[1]}") for one in SETTINGS]
)
def test_every_setting_is_named_by_the_error_that_refuses_it(
    cls: type[vtc.Method], setting: str
) -> None:
    for value in WRONG:
        if (cls, setting, value) == (vtc.Correlation, "seed", -7):
            continue
        with pytest.raises((ArgumentError, ArgumentTypeError)) as caught:
            cls(**_with(cls, setting, value))
        assert caught.value.argument == setting, value


def test_a_misspelt_setting_is_named_with_the_one_that_was_meant() -> None:
    for call in (lambda: vtc.make("todre", kep=0.1), lambda: parse_method("todre:kep=0.1")):
        with pytest.raises(ArgumentTypeError) as caught:
            call()
        assert str(caught.value).startswith("kep: todre has no such setting (did you mean keep?); ")


@pytest.mark.parametrize(
    ("interval", "good", "outside"),
    [
        ("[0, 1]", [0, 1, 0.5], [-1e-9, 1.001, float("nan")]),
        ("(0, 1)", [0.5], [0, 1]),
        ("[0, 1)", [0, 0.0], [1, 1.0]),
        ("(-1, inf)", [0, 1e300], [-1, float("inf")]),
    ],
)
def test_an_interval_says_which_of_its_ends_it_holds(
    interval: str, good: list[float], outside: list[float]
) -> None:
    for value in good:
        check_number("share", value, interval)
    for value in outside:
        with pytest.raises(ArgumentError) as caught:
            check_number("share", value, interval)
        assert str(caught.value) == f"share: expected a number in {interval}, got {value!r}"
    for wrong in (True, "0.5", None):
        with pytest.raises(ArgumentTypeError, match=r"^share: "):
            check_number("share", wrong, interval)


def test_a_name_that_is_said_already_is_not_said_again() -> None:
    error = ArgumentError("keep", "too little")
    assert message_of(error, "keep", "method") == "too little"
    assert message_of(error, "method") == "keep: too little"
    assert message_of(ValueError("keep: x"), "keep") == "keep: x"
    assert argument_of(ValueError("keep: x")) is None


def test_errors_keep_their_kind_within_another_argument() -> None:
    assert isinstance(within("a", ValueError("b")), ArgumentError)
    found = within("a", ArgumentTypeError("b", "c"))
    assert isinstance(found, ArgumentTypeError)
    assert str(found) == "a: b: c"


@pytest.mark.parametrize(
    "error", [ArgumentError("a", "b"), ArgumentTypeError("a", "b"), BadInput("--a", "b")]
)
def test_errors_pass_from_process_to_process(error: Exception) -> None:
    again = pickle.loads(pickle.dumps(error))
    assert (type(again), str(again), vars(again)) == (type(error), str(error), vars(error))


@pytest.mark.parametrize(
    ("text", "keep", "at_fault"),
    [
        ("transprune", 64, True),
        ("random:keep=5|transprune", 64, True),  # the text has a keep, and a good one
        ("full", 0.5, True),
        ("random:keep=0", None, False),
        ("random:keep=0|fastv", 0.5, False),
        ("fastv:keep=half", None, False),
        ("fastv:layer=-1", 0.5, False),
        ("nothing", 0.5, False),
    ],
)
def test_which_keep_is_at_fault(text: str, keep: int | float | None, at_fault: bool) -> None:
    with pytest.raises((ValueError, TypeError)) as caught:
        parse_method(text, keep)
    assert keep_is_at_fault(caught.value, text) == at_fault
    refused = of_method(caught.value, text)
    assert refused.option == ("--keep" if at_fault else "--methods")
    assert "keep: " not in refused.message or not at_fault
