# SPDX-License-Identifier: Apache-2.0
"""Methods for each tile or frame, as text."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

import vtc
from vtc.core.spec import parse_method, split_list, takes_keep
from vtc.methods import Method, methods


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("divprune@tile:keep=64", vtc.PerTile(vtc.DivPrune(keep=64))),
        ("DivPrune @ Tile :keep=64", vtc.PerTile(vtc.DivPrune(keep=64))),
        ("divprune@frame:keep=0.1", vtc.PerFrame(vtc.DivPrune(keep=0.1))),
        (
            "divprune@tile:keep=64:thumbnail=128",
            vtc.PerTile(vtc.DivPrune(keep=64), thumbnail=128),
        ),
        (
            "divprune@tile:thumbnail=none:keep=1",
            vtc.PerTile(vtc.DivPrune(keep=1)),
        ),
        (
            "random@tile:seed=5:thumbnail=pool:keep=3",
            vtc.PerTile(vtc.Random(keep=3, seed=5), thumbnail=vtc.Pool()),
        ),
        (
            "random@tile:keep=3:thumbnail={'method':'pool','keep':9}",
            vtc.PerTile(vtc.Random(keep=3), thumbnail=vtc.Pool(keep=9)),
        ),
        (
            "visionzip@tile:keep=64|fastv:layer=3:keep=9",
            vtc.PerTile(vtc.VisionZip(keep=64)) | vtc.FastV(layer=3, keep=9),
        ),
        ("vscan@tile:keep=0.25:then=0.5", vtc.PerTile(vtc.VScan(keep=0.25, then=0.5))),
    ],
)
def test_each_tile_or_frame_as_text(text: str, expected: Method) -> None:
    assert parse_method(text) == expected


@pytest.mark.parametrize("each", ["tile", "frame"])
def test_keep_and_seed_go_to_the_inner_method(each: str) -> None:
    text, wrap = f"random@{each}", {"tile": vtc.PerTile, "frame": vtc.PerFrame}[each]
    assert takes_keep(text)
    assert parse_method(text, 7, seed=4) == wrap(vtc.Random(keep=7, seed=4))
    assert parse_method(f"{text}:seed=1", 7, seed=4) == wrap(vtc.Random(keep=7, seed=1))
    assert parse_method(f"{text}|fastv", 3) == wrap(vtc.Random(keep=3)) | vtc.FastV()
    assert not takes_keep(f"{text}:keep=0.5")
    assert takes_keep(f"{text}:keep=0.5|fastv")
    assert parse_method(f"{text}:keep=0.5|fastv", 3) == (
        wrap(vtc.Random(keep=0.5)) | vtc.FastV(keep=3)
    )
    with pytest.raises(TypeError, match=f"keep: 'random@{each}:keep=2' has no such setting"):
        parse_method(f"random@{each}:keep=2", keep=0.5)


def test_settings_of_the_wrappers_are_not_settings_of_methods() -> None:
    """They stand side by side in the text."""
    own = {f.name for cls in (vtc.PerTile, vtc.PerFrame) for f in dataclasses.fields(cls)}
    assert own == {"inner", "thumbnail"}
    for name, cls in methods().items():
        assert not own & {f.name for f in dataclasses.fields(cls)}, name  # type: ignore[arg-type]


def test_labels_keep_it_and_lists_do_not_split_it() -> None:
    from vtc.eval.harness.autotune import candidates
    from vtc.eval.harness.run import Settings, plan

    nested = "random@tile:thumbnail={'method':'pool','keep':9}"
    assert split_list(f"{nested}, fastv") == [nested, "fastv"]
    cells = plan(
        Settings(
            out=Path("unused"),
            methods=("random@tile", "random @ frame:keep=3"),
            keeps=(0.5, 4),
            tasks=("vtc_scenes",),
            baselines=False,
            seed=2,
        )
    )
    assert [(cell.label, cell.keep) for cell in cells] == [
        ("random@tile", 0.5),
        ("random@tile", 4),
        ("random@frame:keep=3", None),
    ]
    assert cells[1].method == vtc.PerTile(vtc.Random(keep=4, seed=2))
    assert candidates(["random@tile:thumbnail=9"], [4]) == ["random@tile:thumbnail=9:keep=4"]


@pytest.mark.parametrize(
    ("text", "error", "message"),
    [
        ("random@crop", ValueError, "method: expected @tile or @frame after 'random', got '@crop'"),
        ("random@", ValueError, "method: expected @tile or @frame after 'random', got '@'"),
        ("random@tile@frame", ValueError, "after 'random', got '@tile@frame'"),
        ("nothing@tile", ValueError, "method: unknown name 'nothing'; known are .*visionzip"),
        ("@tile", ValueError, "method: unknown name ''"),
        (":", ValueError, "method: unknown name ''"),
        ("random@tile:64", ValueError, "setting=value after 'random@tile' and a colon, got '64'"),
        ("fastv@tile", ValueError, r"method: fastv@tile: inner: expected .* \(layers\)"),
        ("tome@frame", ValueError, r"method: tome@frame: inner: expected .* \(encoder\)"),
        (
            "vscan@tile:keep=64",
            ValueError,
            "method: vscan@tile: inner: expected a fraction as keep",
        ),
        ("random@tile:thumbnail=0", ValueError, "^thumbnail: keep: .* got 0"),
        ("random@tile:thumbnail=true", TypeError, "^thumbnail: .* got True"),
        ("random@tile:thumbnail=no", ValueError, "^thumbnail: .* unknown name 'no'"),
        ("random@frame:thumbnail=3", TypeError, "^thumbnail: random has no such setting; accepted"),
        ("random:thumbnail=3", TypeError, "^thumbnail: random has no such setting; accepted"),
        ("random@tile:keep=0", ValueError, "^keep: "),
    ],
)
def test_errors_name_what_is_wrong(text: str, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        parse_method(text)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("random:keep=0.5|fastv:keep=0.1", vtc.Random(keep=0.5) | vtc.FastV(keep=0.1)),
        ("random | divprune | fastv", vtc.Random() | vtc.DivPrune() | vtc.FastV()),
        # What was a joint once, inside of values.
        ("catp:context_pool=image+text", vtc.CATP(context_pool="image+text")),
        ("catp:context_pool='image+text'", vtc.CATP(context_pool="image+text")),
        ("todre:tau=1e+0", vtc.ToDRE(tau=1.0)),
        ("sparsevlm:keep=(30, 20, 11)", vtc.SparseVLM(keep=(30, 20, 11))),
    ],
)
def test_a_bar_composes_as_in_python(text: str, expected: Method) -> None:
    assert parse_method(text) == expected
    assert vtc.make(text) == expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("random:keep=0.5:keep=0.1", "^keep: given twice in 'random:keep=0.5:keep=0.1'"),
        ("fastv|random:seed=1:seed=1", "^seed: given twice"),
        ("random@tile:keep=2:thumbnail=3:thumbnail=4", "^thumbnail: given twice"),
        ("random|", "expected a name on both sides of each '|'"),
        ("|random", "expected a name on both sides"),
        ("random||fastv", "expected a name on both sides"),
        ("", "expected a name"),
        ("random:", "setting=value after 'random' and a colon, got ''"),
        ("random::keep=3", "setting=value .* got ''"),
        ("random:=3", "setting=value .* got '=3'"),
        ("random:keep=", "^keep: expected .* got ''"),
        ("random:keep=0.5;", "^keep: expected .* got '0.5;'"),
        ("random:keep=0.5#fastv", "^keep: expected .* got '0.5#fastv'"),
        ("random:keep=(0.5", "brackets do not match"),
        ("random:keep=[0.5)", "brackets do not match"),
        ("random:keep='0.5", "quotes do not match"),
        ("random+fastv", r"unknown name 'random\+fastv'.*; methods are composed with '\|'"),
        ("random:keep=0.5+fastv:keep=0.1", r"^keep: got '0.5\+fastv'; .* composed with '\|'"),
        ("random:seed=2+fastv", r"^seed: got '2\+fastv'; methods are composed with '\|'"),
    ],
)
def test_duplicates_and_stray_characters_are_refused(text: str, message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        parse_method(text)


def test_compact_leaves_what_is_quoted():
    from vtc.core.spec import compact

    assert compact(" todre : keep = 0.1 | fastv ") == "todre:keep=0.1|fastv"
    assert compact("atp:weights='a folder/with  blanks'") == "atp:weights='a folder/with  blanks'"
    assert compact("v2drop:keep=(0.5, 0.25)") == "v2drop:keep=(0.5,0.25)"
    with pytest.raises(ValueError, match="unknown name"):
        parse_method(compact("ran dom"))
