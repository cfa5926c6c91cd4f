# SPDX-License-Identifier: Apache-2.0
"""Methods and budgets as text."""

from __future__ import annotations

import pytest

import vtc
from vtc.core.spec import parse_keep, parse_method, split_list, takes_keep


def test_lists_are_split_outside_of_brackets():
    assert split_list("a:x=[1,2], b ,c:y=(3,4)") == ["a:x=[1,2]", "b", "c:y=(3,4)"]
    assert split_list(" ") == []
    for text in ("a,", ",a", "a, ,b"):
        with pytest.raises(ValueError, match="both sides of each ','"):
            split_list(text)
    for text in ("a[", "a]", "a](["):
        with pytest.raises(ValueError, match="brackets"):
            split_list(text)


def test_keep_is_a_fraction_or_a_number():
    kept = [parse_keep(text) for text in ("0.25", "1.0", "1", "64")]
    assert kept == [0.25, 1.0, 1, 64]
    assert [type(k) for k in kept] == [float, float, int, int]
    for text in ("0", "-3", "0.0", "1.5", "nan", "many", ""):
        with pytest.raises(ValueError, match="keep"):
            parse_keep(text)


def test_methods_as_text():
    method = parse_method("fastv:layer=3:positions=contiguous", 0.3)
    assert method == vtc.make("fastv", layer=3, positions="contiguous", keep=0.3)
    assert parse_method("random:keep=5", seed=4) == vtc.make("random", keep=5, seed=4)
    assert takes_keep("random")
    assert not takes_keep("random:keep=5")
    assert not takes_keep("full")
    assert takes_keep("random:keep=5|fastv")
    with pytest.raises(TypeError, match="keep"):
        parse_method("full", keep=0.5)
