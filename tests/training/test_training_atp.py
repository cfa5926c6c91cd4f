# SPDX-License-Identifier: Apache-2.0
"""Training of ATP: the soft mask, the losses, resuming, and heads that really learn."""

from __future__ import annotations

import dataclasses
import json
import math
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import vtc
from tests.reference.models import build_model, collate, samples
from vtc.core import ArgumentError, ArgumentTypeError
from vtc.methods import atp
from vtc.methods.atp import ATP, ATPHeads
from vtc.training.atp import (
    Config,
    SoftPruning,
    atp_loss,
    average_count,
    calibrate,
    command,
    new_heads,
    target_loss,
    train,
)
from vtc.training.data import find_data

pytestmark = pytest.mark.usefixtures("fresh_accelerate")

TOTAL, LAYERS = 36, (1, 4, 6)


@pytest.fixture(scope="module")
def frozen() -> Iterator[Any]:
    """A tiny model that no test may change."""
    model = build_model()
    before = {name: t.clone() for name, t in model.state_dict().items()}
    yield model.requires_grad_(False)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name])


def config_of(out: Path | str = "unused", **more: Any) -> Config:
    fields: dict[str, Any] = {
        "out": out,
        "target": 18.0,
        "steps": 6,
        "rate": 1e-2,
        "width": 8,
        "start_r": 0.2,
        "start_s": 0.8,
        "standardise": 1,
        "save_every": 2,
    }
    return Config(**{**fields, **more})


def varied_heads(seed: int = 0, **more: Any) -> ATPHeads:
    heads = new_heads(3, config_of(seed=seed, **more))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for head in [*heads.head_r, *heads.head_s]:
            head.weight.copy_(0.3 * torch.randn(head.weight.shape, generator=generator))
    return heads


def batch_of(kind: str = "ragged", answer: int = 2, side: str = "left") -> dict[str, Tensor]:
    batch = collate(samples(kind, "clip"), side)
    labels = torch.full_like(batch["input_ids"], -100)
    if answer:
        for row, mask in enumerate(batch["attention_mask"]):
            last = mask.nonzero().squeeze(1)[-answer:]
            labels[row, last] = batch["input_ids"][row, last]
    return {**batch, "labels": labels}


def state_of(module: nn.Module) -> tuple[Any, ...]:
    """All that hooks and taps could leave behind."""
    return tuple(
        (
            name,
            len(m._forward_pre_hooks),
            len(m._forward_hooks),
            len(m._forward_pre_hooks_with_kwargs),
            sorted(k for k in vars(m) if k not in ("_parameters", "_buffers", "_modules")),
            id(getattr(m, "config", None)),
        )
        for name, m in module.named_modules()
    )


# ---- the soft mask ------------------------------------------------------------------------------
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("kind", ["one", "ragged", "images", "image_last"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_masks_of_0_and_1_compute_what_dropping_computes(
    attention: str, kind: str, side: str, tmp_path: Path
) -> None:
    """Every surviving row, through the engine, which really drops tokens."""
    model, heads = build_model(attention=attention), varied_heads(start_r=0.4)
    atp.save_heads(heads, tmp_path, {"normalise": "minmax", "sampling": 3.0})
    batch = batch_of(kind, answer=0 if kind == "image_last" else 2, side=side)
    soft = SoftPruning(model, heads, hard=True)
    with torch.no_grad():
        with soft:
            soft.begin(batch)
            mine = model(**batch, use_cache=False).logits
        with vtc.patch(model, ATP.from_pretrained(tmp_path)) as patch:
            theirs = model(**batch, use_cache=False).logits
            left = [image.per_layer for image in patch.report.images]
        plain = model(**batch, use_cache=False).logits
    counts = [[int(n) for n in row] for row in soft.counts]
    assert counts == [[image[1], image[4], image[6]] for image in left]
    assert all(0 < n < TOTAL for row in counts for n in row)
    text = batch["attention_mask"].bool() & (batch["input_ids"] != model.config.image_token_index)
    torch.testing.assert_close(mine[text], theirs[text], atol=1e-4, rtol=1e-4)
    assert float((mine - plain)[text].abs().max()) > 1e-2


def test_masked_attention_is_that_of_the_paper(frozen: Any) -> None:
    """exp(P_ij) G_ij / sum_k exp(P_ik) G_ik, with G 1 on the diagonal, M_j elsewhere."""
    generator = torch.Generator().manual_seed(0)
    mask, logits = torch.rand(1, 7, generator=generator), torch.randn(7, 7, generator=generator)
    soft = SoftPruning(frozen, varied_heads())
    soft.weight = mask
    for given in (None, torch.ones(1, 1, 7, 7).tril().bool()):
        bias = soft._mask(2, given, torch.zeros(1, 7, 4))
        found = (logits + bias[0, 0]).softmax(1)
        for i in range(7):
            weights = [
                math.exp(logits[i, j]) * (1.0 if i == j else float(mask[0, j]))
                for j in range(i + 1)
            ]
            wanted = [w / sum(weights) for w in weights] + [0.0] * (6 - i)
            torch.testing.assert_close(found[i], torch.tensor(wanted), atol=1e-5, rtol=1e-5)
        soft._made = None


def test_masks_of_successive_cuts_multiply_and_text_is_not_masked(frozen: Any) -> None:
    batch = batch_of("images")
    soft = SoftPruning(frozen, varied_heads(), temperature=5.0)
    with torch.no_grad(), soft:
        soft.begin(batch)
        frozen(**batch, use_cache=False)
    assert soft.weight is not None
    assert bool((soft.weight[soft.image < 0] == 1).all())
    by_cut: dict[int, list[Tensor]] = {}
    for one in soft.found:
        by_cut.setdefault(one.cut, []).append(one.mask)
    assert sorted(by_cut) == [0, 1, 2]
    assert len(by_cut[0]) == 4
    for cut in (1, 2):
        for before, after in zip(by_cut[cut - 1], by_cut[cut], strict=True):
            assert bool((after <= before).all())
            assert bool((after < before).any())
    assert soft.totals.tolist() == [TOTAL] * 4
    torch.testing.assert_close(soft.counts[0, 0], by_cut[0][0].sum())


def test_a_sharp_soft_mask_counts_as_the_hard_one(frozen: Any) -> None:
    batch, heads = batch_of(), varied_heads(start_r=0.3)
    found = []
    for hard in (False, True):
        soft = SoftPruning(frozen, heads, temperature=1e6, hard=hard)
        with torch.no_grad(), soft:
            soft.begin(batch)
            frozen(**batch, use_cache=False)
        found.append(soft.counts)
    torch.testing.assert_close(found[0], found[1], atol=0.02, rtol=0)


def test_everything_is_taken_off_also_after_an_error(frozen: Any) -> None:
    batch, before = batch_of(), state_of(frozen)
    with torch.no_grad():
        plain = frozen(**batch, use_cache=False).logits
        soft = SoftPruning(frozen, varied_heads())
        with soft:
            assert state_of(frozen) != before
            soft.begin(batch)
            assert not torch.equal(frozen(**batch, use_cache=False).logits, plain)
        assert state_of(frozen) == before
        other = batch_of("one")

        def fails_inside() -> None:
            with soft:
                soft.begin(batch)
                raise ZeroDivisionError

        def begins_with_another() -> None:
            with soft:
                soft.begin(other)
                frozen(**batch, use_cache=False)

        with pytest.raises(ZeroDivisionError):
            fails_inside()
        assert state_of(frozen) == before
        with pytest.raises(RuntimeError, match="begin"), soft:
            frozen(**batch, use_cache=False)
        with pytest.raises(RuntimeError, match="begin was called with"):
            begins_with_another()
        assert state_of(frozen) == before
        assert torch.equal(frozen(**batch, use_cache=False).logits, plain)


def test_what_cannot_be_masked_is_refused(frozen: Any) -> None:
    with pytest.raises(ValueError, match="layers: the heads are for 2 cuts"):
        SoftPruning(frozen, new_heads(2, config_of()))
    with (
        vtc.patch(frozen, "full"),
        pytest.raises(ValueError, match="patched"),
    ):
        SoftPruning(frozen, varied_heads())
    model = build_model()
    model.model.language_model.config._attn_implementation_internal = "flash_attention_2"
    with pytest.raises(ValueError, match="'eager' or 'sdpa', got 'flash_attention_2'"):
        SoftPruning(model, varied_heads())


# ---- losses and gradients -----------------------------------------------------------------------
def test_the_average_is_over_all_layers() -> None:
    counts, totals = torch.tensor([[20.0, 10.0, 4.0]]), torch.tensor([36.0])
    per_layer = [36, 20, 20, 20, 10, 10, 4, 4]
    found = average_count(counts, totals, LAYERS, 8)
    torch.testing.assert_close(found, torch.tensor([sum(per_layer) / 8]))


def test_the_early_loss_grows_with_the_layer_of_a_cut() -> None:
    counts, totals = torch.tensor([[18.0, 9.0], [36.0, 0.0]]), torch.tensor([36.0, 36.0])
    found = float(atp_loss(counts, totals, (2, 5)))
    assert found == pytest.approx(((0.5 * 2 + 0.25 * 5) + (1.0 * 2 + 0.0)) / 2)
    assert float(atp_loss(counts, totals, (4, 10))) == pytest.approx(2 * found)
    deeper = float(atp_loss(counts, totals, (2, 6)))
    assert deeper - found == pytest.approx(0.25 / 2)


def test_the_target_loss_is_0_at_the_target_only() -> None:
    average = torch.tensor([10.0, 20.0], requires_grad=True)
    assert target_loss(average, 15.0, "batch").item() == 0
    assert target_loss(average, 15.0, "image").item() == 5
    assert target_loss(average, 12.0, "batch").item() == 3
    assert float(target_loss(torch.tensor([12.0, 12.0]), 12.0)) == 0
    # the running average says how far off, this batch gets the whole gradient
    loss = target_loss(average, 12.0, "batch", past=13.0, share=0.75)
    assert loss.item() == pytest.approx(0.75 * 13 + 0.25 * 15 - 12)
    assert torch.autograd.grad(loss, average)[0].tolist() == [0.5, 0.5]
    below = target_loss(average, 30.0, "batch", past=11.0, share=0.75)
    assert torch.autograd.grad(below, average)[0].tolist() == [-0.5, -0.5]


@pytest.mark.parametrize("which", ["ntp", "atp", "target"])
def test_every_loss_reaches_every_head(which: str, frozen: Any) -> None:
    heads, batch = varied_heads(), batch_of()
    soft = SoftPruning(frozen, heads, temperature=5.0)
    with soft:
        soft.begin(batch)
        ntp = frozen(**batch, use_cache=False).loss
    average = average_count(soft.counts, soft.totals, LAYERS, 8)
    loss = {
        "ntp": ntp,
        "atp": atp_loss(soft.counts, soft.totals, LAYERS),
        "target": target_loss(average, 1.0),
    }[which]
    loss.backward()
    for head in [*heads.head_r, *heads.head_s]:
        assert float(head.bias.grad.abs()) > 0  # type: ignore[operator,union-attr]
    for hidden in heads.hidden:
        assert float(hidden.weight.grad.abs().max()) > 0  # type: ignore[operator,union-attr]


def test_the_gradient_of_the_budget_is_that_of_small_steps(frozen: Any) -> None:
    batch = batch_of("one")

    def budget(heads: ATPHeads) -> Tensor:
        soft = SoftPruning(frozen, heads, temperature=5.0)
        with soft:
            soft.begin(batch)
            frozen(**batch, use_cache=False)
        # the last cut: thresholds of earlier ones change its scores, which carry no gradient
        return soft.counts[:, 2].sum()

    heads = varied_heads()
    budget(heads).backward()
    for head in (heads.head_r[2], heads.head_s[2]):
        bias: Any = head.bias
        with torch.no_grad():
            bias += 1e-2
            up = float(budget(heads))
            bias -= 2e-2
            down = float(budget(heads))
            bias += 1e-2
        assert float(bias.grad) == pytest.approx((up - down) / 2e-2, rel=0.05, abs=1e-3)


# ---- the loop -----------------------------------------------------------------------------------
class Stops(Exception):
    pass


def stream(step: int) -> dict[str, Tensor]:
    return batch_of(("one", "ragged", "images")[step % 3])


@pytest.mark.parametrize("iterable", [False, True])
def test_a_resumed_run_equals_one_without_a_stop(
    iterable: bool, frozen: Any, tmp_path: Path
) -> None:
    batches: Any = [stream(k) for k in range(3)] if iterable else stream
    options: dict[str, Any] = {
        "target_over": "batch",
        "smoothing": 0.5,
        "temperature_end": 40.0,
    }
    whole = train(frozen, batches, config_of(tmp_path / "whole", **options))

    def failing(step: int) -> dict[str, Tensor]:
        if step == 5:
            raise Stops
        return stream(step)

    def failing_list() -> Iterator[dict[str, Tensor]]:
        for step in range(7):
            if step == 5:
                raise Stops
            yield stream(step)

    class Failing:
        def __iter__(self) -> Iterator[dict[str, Tensor]]:
            return failing_list()

    before = state_of(frozen)
    config = config_of(tmp_path / "parts", **options)
    with pytest.raises(Stops):
        train(frozen, Failing() if iterable else failing, config)
    assert state_of(frozen) == before
    assert len((tmp_path / "parts/log.jsonl").read_text().splitlines()) == 4
    assert not (tmp_path / "parts/model.safetensors").exists()
    parts = train(frozen, batches, config)
    for name, tensor in load_file(whole / "model.safetensors").items():
        assert torch.equal(tensor, load_file(parts / "model.safetensors")[name])
    assert (whole / "log.jsonl").read_text() == (parts / "log.jsonl").read_text()
    lines = [json.loads(line) for line in (whole / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, 7))
    assert not list(tmp_path.rglob("*.tmp"))
    with pytest.raises(ValueError, match="rate: the checkpoint"):
        train(frozen, batches, dataclasses.replace(config, rate=1.0))


def test_training_meets_the_budget_and_leaves_the_model_alone(frozen: Any, tmp_path: Path) -> None:
    flags = [p.requires_grad for p in frozen.parameters()]
    target = 14.0
    config = config_of(
        tmp_path, target=target, steps=40, rate=5e-2, lambda_target=1.0, temperature=20.0
    )
    start = SoftPruning(frozen, new_heads(3, config), hard=True)
    batch = batch_of("images")
    with torch.no_grad(), start:
        start.begin(batch)
        frozen(**batch, use_cache=False)
    before = float(average_count(start.counts, start.totals, LAYERS, 8).mean())
    folder = train(frozen, lambda step: batch, config)
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    assert abs(before - target) > 2
    assert abs(lines[-1]["tokens"] - target) < 1.5
    assert lines[-1]["target"] < lines[0]["target"]
    assert [p.requires_grad for p in frozen.parameters()] == flags
    reached = calibrate(frozen, folder, [batch], target)
    with torch.no_grad(), vtc.patch(frozen, ATP.from_pretrained(folder)) as patch:
        frozen(**batch)
        assert patch.report.equivalent_tokens == pytest.approx(reached)
    assert abs(reached - target) < 1.5


def test_the_same_seed_gives_the_same_heads_and_the_statistics_are_standardised(
    frozen: Any, tmp_path: Path
) -> None:
    torch.manual_seed(1)
    one = train(frozen, stream, config_of(tmp_path / "one", steps=1))
    torch.manual_seed(2)
    two = train(frozen, stream, config_of(tmp_path / "two", steps=1))
    first, second = (load_file(f / "model.safetensors") for f in (one, two))
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name])
    other = load_file(
        train(frozen, stream, config_of(tmp_path / "x", steps=1, seed=1)) / "model.safetensors"
    )
    assert not torch.equal(other["hidden.0.weight"], first["hidden.0.weight"])
    heads = new_heads(3, config_of())
    soft = SoftPruning(frozen, heads)
    with torch.no_grad(), soft:
        soft.begin(stream(0))
        frozen(**stream(0), use_cache=False)
    numbers = torch.stack([one.numbers for one in soft.found if one.cut == 1])
    torch.testing.assert_close(first["centre"][1], numbers.mean(0))


def test_the_decoder_can_be_trained_too(tmp_path: Path) -> None:
    model = build_model(seed=3)
    before = {name: t.clone() for name, t in model.state_dict().items()}
    config = config_of(tmp_path, steps=2, train_model=True, model_rate=1e-3)
    folder = train(model, stream, config)
    changed = {n for n, t in model.state_dict().items() if not torch.equal(t, before[n])}
    assert any("language_model.layers.7" in name for name in changed)
    assert not any("vision_tower" in name or "projector" in name for name in changed)
    again = type(model).from_pretrained(folder / "model")
    name = "model.language_model.layers.7.mlp.up_proj.weight"
    assert torch.equal(again.state_dict()[name], model.state_dict()[name])


@pytest.mark.parametrize(
    "wrong",
    [
        {"target": 0},
        {"steps": 0},
        {"steps": 2.5},
        {"smoothing": 1.0},
        {"start_r": 1.0},
        {"lambda_atp": -1},
        {"temperature": float("inf")},
        {"temperature_end": 0},
        {"target_over": "epoch"},
        {"normalise": "sum"},
        {"precision": "fp8"},
    ],
)
def test_settings_out_of_range_are_refused(wrong: dict[str, Any]) -> None:
    (setting,) = wrong
    with pytest.raises((ArgumentError, ArgumentTypeError)) as caught:
        config_of(**wrong)
    assert caught.value.argument == setting


def test_batches_that_do_not_work_are_refused(frozen: Any, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="batches: expected at least one"):
        train(frozen, [], config_of(tmp_path))
    tiles = batch_of("one")
    tiles["pixel_values"] = tiles["pixel_values"][None]
    soft = SoftPruning(frozen, varied_heads())
    with pytest.raises(TypeError, match="pixel_values"):
        soft.begin(tiles)


# ---- the command line ---------------------------------------------------------------------------
DATA = """
import pickle
from pathlib import Path

def load(folder):
    return pickle.loads((Path(folder) / "model.pickle").read_bytes()), "processor"

def batches(processor, split, size, first, steps):
    assert (processor, size) == ("processor", 2)
    assert (split, first) in (("train", 5_000_000), ("val", 0))
    from tests.training.test_training_atp import stream
    return [stream(k) for k in range(steps)]

def measure(model, processor, folder, count, first):
    return {"count": count, "first": first}
"""


def test_the_command_trains_on_the_data_of_any_module(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "data_of_a_test.py").write_text(DATA)
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "model.pickle").write_bytes(pickle.dumps(build_model()))
    out = tmp_path / "heads"
    common = ["atp", "--model", str(tmp_path), "--out", str(out), "--data", "data_of_a_test"]
    options = "--batch 2 --steps 2 --target 24 --width 8 --standardise 1 --calibrate 1"
    monkeypatch.setattr("sys.argv", [*common, *options.split()])
    command.main()
    assert "calibrated: " in capsys.readouterr().out
    assert len((out / "log.jsonl").read_text().splitlines()) == 2
    monkeypatch.setattr("sys.argv", [*common, "--measure", "5", "--first", "3"])
    command.main()
    found = json.loads((out / "figures.json").read_text())
    assert (found["count"], found["first"]) == (5, 3)
    for wrong in (["--steps", "2"], ["--data", "no_such_data"]):
        monkeypatch.setattr("sys.argv", [*common, *wrong])
        with pytest.raises(SystemExit):
            command.main()


def test_the_scenes_of_the_embedded_model_are_data() -> None:
    data = find_data(command.DATA)
    from vtc.eval.embedded.vlm import embedded_path

    _, processor = data.load(embedded_path())
    (batch,) = data.batches(processor, "val", 2, 0, 1)
    assert batch["input_ids"].shape == batch["labels"].shape
    assert bool((batch["labels"] != -100).any(1).all())
