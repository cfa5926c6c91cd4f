# SPDX-License-Identifier: Apache-2.0
"""`vtc show`: the picture, the answers, and how it refuses; the trace that it draws."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
from PIL import Image

import vtc
from tests.eval.evalkit import QUESTION, SIDE, TOKENS, picture
from vtc.viz.trace import trace


def test_show_draws_and_answers(cli, folder, tmp_path):
    picture(0).save(tmp_path / "image.png")
    out = tmp_path / "kept.png"
    result = cli(
        "show", tmp_path / "image.png", "--question", QUESTION, "--method", "random|fastv:keep=4",
        "--keep", "0.5", "--model", folder, "--out", out,
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    assert f"into the language model: {TOKENS // 2} of {TOKENS} tokens" in result.output
    assert f"before layer 2: 4 of {TOKENS} tokens" in result.output
    assert "Loading" not in result.output  # a bar of transformers
    assert Image.open(out).width > 500


@pytest.mark.parametrize("method", ["tome", "flowcut|fastv:keep=3"])
def test_show_draws_what_the_tower_left(cli, folder, tmp_path, method):
    picture(0).save(tmp_path / "image.png")
    result = cli(
        "show", tmp_path / "image.png", "--question", QUESTION, "--method", method,
        "--keep", "0.5", "--model", folder, "--out", tmp_path / "kept.png",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    assert f"into the language model: {TOKENS // 2} of {TOKENS} tokens" in result.output


@pytest.mark.parametrize(
    ("arguments", "option"),
    [
        (("--method", "nothing"), "--method"),
        (("--keep", "0"), "--keep"),
        (("--method", "full", "--keep", "0.5"), "--keep"),
        (("--model", "./nowhere"), "--model"),
        (("--method", "fastv:layer=9"), "--method"),
        (("--method", "downsample:how=pixels"), "--method"),
        (("--device", "cuda:7"), "--device"),
        (("--device", "nonsense"), "--device"),
    ],
)
def test_show_refuses_bad_input_by_name(cli, tmp_path, arguments, option):
    picture(0).save(tmp_path / "image.png")
    result = cli("show", tmp_path / "image.png", "--question", "why", *arguments)
    assert result.exit_code == 2
    assert f"Invalid value for {option}" in result.output


def test_show_refuses_what_is_no_picture(cli, tmp_path):
    (tmp_path / "image.png").write_text("text")
    for name in ("image.png", "absent.png"):
        result = cli("show", tmp_path / name, "--question", "why")
        assert result.exit_code == 2
        assert "IMAGE" in result.output


def test_show_refuses_damaged_and_oversized_pictures(cli, tmp_path, monkeypatch):
    picture(0).save(tmp_path / "whole.png")
    whole = (tmp_path / "whole.png").read_bytes()
    (tmp_path / "cut.png").write_bytes(whole[: len(whole) // 2])
    result = cli("show", tmp_path / "cut.png", "--question", "why")
    assert result.exit_code == 2
    assert "Invalid value for IMAGE" in result.output
    assert "cut.png: damaged" in result.output
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    result = cli("show", tmp_path / "whole.png", "--question", "why")
    assert result.exit_code == 2
    assert "whole.png: too large, with more than 1,000 pixels" in result.output


@pytest.mark.parametrize(
    ("out", "message"),
    [
        ("kept.docx", "expected a file with one of the suffixes"),
        ("kept", "expected a file with one of the suffixes"),
        ("missing/kept.png", "no folder"),
        ("folder.png", "is a folder"),
    ],
)
def test_show_refuses_out_before_the_model_runs(cli, tmp_path, monkeypatch, out, message):
    picture(0).save(tmp_path / "image.png")
    (tmp_path / "folder.png").mkdir()
    monkeypatch.setattr("vtc.viz.trace.trace", lambda *_: pytest.fail("the model ran"))
    result = cli(
        "show", tmp_path / "image.png", "--question", "why", "--out", tmp_path / out,
    )  # fmt: skip
    assert result.exit_code == 2
    assert "Invalid value for --out" in result.output
    assert message in result.output


def test_show_opens_pictures_as_transformers_does(cli, folder, tmp_path, monkeypatch):
    """Turned by EXIF, the drawing and the answer are those of the upright picture."""
    from transformers.image_utils import load_image

    exif = Image.Exif()
    exif[0x0112] = 6
    picture(0).save(tmp_path / "turned.png", exif=exif)
    seen = []
    monkeypatch.setattr("vtc.viz.trace.trace", lambda model, found, *_: seen.append(found) or 1 / 0)
    result = cli("show", tmp_path / "turned.png", "--question", "q")
    assert isinstance(result.exception, ZeroDivisionError)
    upright = np.asarray(load_image(str(tmp_path / "turned.png")))
    assert np.array_equal(np.asarray(seen[0]), upright)
    assert not np.array_equal(upright, np.asarray(picture(0)))


def test_show_says_what_the_processor_crops_and_warns_of_nothing(cli, folder, tmp_path):
    wide = Image.new("RGB", (4 * SIDE, SIDE))
    wide.paste(picture(0), (int(1.5 * SIDE), 0))
    wide.save(tmp_path / "wide.png")
    import matplotlib.pyplot  # noqa: F401  # old releases warn while they are imported

    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        result = cli(
            "show", tmp_path / "wide.png", "--question", QUESTION, "--method", "todre",
            "--model", folder, "--out", tmp_path / "kept.png",
        )  # fmt: skip
    assert result.exit_code == 0, result.output
    assert "the model sees the middle 25% of its width" in result.output
    found = trace(str(folder), wide, QUESTION, vtc.make("todre"), "cpu", 2)
    shown = np.asarray(found.image, dtype=int)
    assert np.abs(shown - np.asarray(picture(0), dtype=int)).max() <= 1


def test_a_trace_is_of_the_tokens_the_method_chose(folder):
    method = vtc.make("random", keep=10, seed=3)
    found = trace(str(folder), picture(1), QUESTION, method, "cpu", 4)
    drawn = _random_places(10, seed=3)
    assert found.grid == (6, 6)
    assert found.kept == {"into the language model": drawn}
    assert found.answer != found.answer_full
    # The picture that is drawn on is what the tower was shown: here the whole picture.
    shown = np.asarray(found.image, dtype=int)
    assert found.image.size == (SIDE, SIDE)
    assert np.abs(shown - np.asarray(picture(1), dtype=int)).max() <= 1


def _random_places(keep: int, seed: int) -> list[int]:
    """What `Random` keeps of an image's tokens, asked directly."""
    import torch

    from vtc.core import VisionTokens

    rows, columns = torch.meshgrid(torch.arange(6), torch.arange(6), indexing="ij")
    grid = torch.stack([torch.zeros(36, dtype=torch.long), rows.flatten(), columns.flatten()], 1)
    tokens = VisionTokens(features=torch.zeros(36, 4), grid=grid)
    return vtc.make("random", keep=keep, seed=seed).select(tokens).indices.tolist()


def test_a_trace_follows_a_composition(folder):
    method = vtc.make("random", keep=12) | vtc.make("random", keep=5) | vtc.make("fastv", keep=2)
    found = trace(str(folder), picture(1), QUESTION, method, "cpu", 4)
    first, last = found.kept.values()
    assert list(found.kept) == ["into the language model", "before layer 2"]
    assert (len(first), len(last)) == (5, 2)
    assert set(last) < set(first) < set(_random_places(12, seed=0))
