# SPDX-License-Identifier: Apache-2.0
"""Fine-tuning under compression: gradients against the masked reference, what changes and what
does not, resuming, saving, and what is refused."""

from __future__ import annotations

import inspect
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from PIL import Image
from torch import Tensor
from transformers import Trainer, TrainingArguments
from transformers.trainer_pt_utils import LabelSmoother
from vtc.eval.embedded.training import finetune as recipe
from vtc.eval.embedded.vlm import embedded_path
from vtc.eval.embedded.vlm import load as embedded

import vtc
from tests.imports import ROOT
from tests.reference import reference
from tests.reference.models import IMAGE, build_model, collate, samples
from tests.reference.reference import Truth
from vtc.core import Method
from vtc.training.finetune import Config, Conversations, finetune, load
from vtc.training.finetune.command import main
from vtc.training.finetune.trainer import Tuned

pytestmark = pytest.mark.usefixtures("fresh_accelerate")

METHODS: dict[str, Callable[[], Method]] = {
    "divprune": lambda: vtc.DivPrune(keep=0.2),
    "visionzip": lambda: vtc.VisionZip(keep=0.3),
}
ANSWER = 2


def batch_of(kind: str = "ragged", rows: slice = slice(None), side: str = "left") -> dict[str, Any]:
    batch = collate(samples(kind, "clip")[rows], side)
    labels = torch.full_like(batch["input_ids"], -100)
    for row, mask in enumerate(batch["attention_mask"]):
        last = mask.nonzero().squeeze(1)[-ANSWER:]
        labels[row, last] = batch["input_ids"][row, last]
    return {**batch, "labels": labels}


def stream(step: int) -> dict[str, Any]:
    return batch_of(rows=slice(step % 3, step % 3 + 1))


def config_of(out: Path, **more: Any) -> Config:
    return Config(**({"out": out, "steps": 4, "rate": 1e-2, "save_every": 2} | more))


def copied(model: Any) -> dict[str, Tensor]:
    return {name: t.clone() for name, t in model.state_dict().items()}


def logits_of(model: Any, method: Method | None = None) -> Tensor:
    batch = batch_of()
    del batch["labels"]
    with torch.no_grad():
        if method is None:
            return model(**batch).logits
        with vtc.patch(model, method):
            return model(**batch).logits


def state_of(model: Any) -> tuple[Any, ...]:
    """What training could leave behind."""
    return (
        model.training,
        [p.requires_grad for p in model.parameters()],
        [
            (name, len(m._forward_pre_hooks), getattr(m, "gradient_checkpointing", None))
            for name, m in model.named_modules()
        ],
        "_vtc_patch" in vars(model.model),
    )


# ---- gradients ----------------------------------------------------------------------------------
@pytest.fixture
def differentiable(monkeypatch: pytest.MonkeyPatch) -> None:
    """The reference takes no gradients by itself."""
    monkeypatch.setattr(reference, "encode", inspect.unwrap(reference.encode))
    for name in ("__init__", "_logits", "_project"):
        monkeypatch.setattr(Truth, name, inspect.unwrap(getattr(Truth, name)))


def reference_loss(model: Any, method: Method, smoothing: float = 0.0) -> Tensor:
    """Of the answers, in rows of their own in which nothing is removed."""
    rows = samples("ragged", "clip")
    truths = [Truth(model, method, row, len(row.input_ids) - ANSWER) for row in rows]
    chosen = torch.cat([truth.logits()[0, -ANSWER - 1 : -1] for truth in truths])
    target = torch.cat([row.input_ids[-ANSWER:] for row in rows])
    plain = F.cross_entropy(chosen, target)
    return (1 - smoothing) * plain - smoothing * chosen.log_softmax(-1).mean()


@pytest.mark.usefixtures("differentiable")
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("method", METHODS)
def test_gradients_are_those_of_the_masked_reference(method: str, side: str) -> None:
    model, other, plain = build_model(), build_model(attention="eager"), build_model()
    with vtc.patch(model, METHODS[method]()):
        model(**batch_of(side=side)).loss.backward()
    reference_loss(other, METHODS[method]()).backward()
    plain(**batch_of(side=side)).loss.backward()
    expected, uncompressed = (dict(m.named_parameters()) for m in (other, plain))
    compared, apart = 0, 0
    for name, parameter in model.named_parameters():
        theirs, full = expected[name].grad, uncompressed[name].grad
        assert (parameter.grad is None) == (theirs is None), name
        if theirs is not None:
            torch.testing.assert_close(parameter.grad, theirs, atol=2e-5, rtol=2e-4)
            compared += 1
            apart += float((full - theirs).norm()) > 0.05 * float(theirs.norm())
    assert compared > 100
    assert apart > 0.9 * compared


def gradients(model: Any, method: Method, tmp_path: Path, **more: Any) -> dict[str, Tensor]:
    tuned = dict(model.named_parameters())
    trained = Tuned(model, method, method, tuned, config_of(tmp_path, **more))
    import accelerate

    trained.start(accelerate.Accelerator(cpu=True))
    with trained.active():
        trained.loss(batch_of(), 0).value.backward()
    found = {name: p.grad for name, p in tuned.items() if p.grad is not None}
    for p in tuned.values():
        p.grad = None
    return found


@pytest.mark.parametrize("method", METHODS)
def test_gradient_checkpointing_gives_the_same_gradients(
    method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = build_model()
    calls: list[Any] = []
    function = torch.utils.checkpoint.checkpoint
    before = state_of(model)
    plain = gradients(model, METHODS[method](), tmp_path)
    monkeypatch.setattr(
        "transformers.modeling_utils.checkpoint",
        lambda *a, **k: calls.append(k) or function(*a, **k),
    )
    again = gradients(model, METHODS[method](), tmp_path, gradient_checkpointing=True)
    assert len(calls) >= len(model.model.language_model.layers)
    assert plain.keys() == again.keys()
    for name, tensor in plain.items():
        assert torch.equal(tensor, again[name]), name
    model.eval()
    assert state_of(model) == before


def test_label_smoothing_is_that_of_trainer_on_the_labels_of_text(tmp_path: Path) -> None:
    """And of the reference, whose dropped tokens take no part."""
    model, method = build_model(), METHODS["divprune"]()
    batch = batch_of()
    trained = Tuned(model, method, method, {}, config_of(tmp_path, label_smoothing=0.2))
    import accelerate

    trained.accelerator = accelerate.Accelerator(cpu=True)
    with trained.active():
        found = trained.loss(batch, 0)
        given = {name: value for name, value in batch.items() if name != "labels"}
        output = {"logits": model(**given, prompt_labels=batch["labels"]).logits}
    theirs = LabelSmoother(epsilon=0.2)(output, batch["labels"], shift_labels=True)
    torch.testing.assert_close(found.value, theirs)
    smooth = reference_loss(build_model(), method, 0.2)
    torch.testing.assert_close(found.value, smooth, atol=1e-5, rtol=1e-5)
    plain = reference_loss(build_model(), method)
    assert found.figures["loss"] == pytest.approx(float(plain), rel=1e-5)


def test_batches_of_a_step_weigh_what_they_have_of_labels(tmp_path: Path) -> None:
    def parts(step: int) -> dict[str, Any]:
        batch = batch_of(rows=slice(step % 2, step % 2 + 1))
        if step % 2:
            batch["labels"][:, -1] = -100
        return batch

    def both(step: int) -> dict[str, Any]:
        batch = batch_of(rows=slice(0, 2))
        batch["labels"][1, -1] = -100
        return batch

    found = []
    for name, batches, count in (("one", both, 1), ("two", parts, 2)):
        model = build_model()
        config = config_of(tmp_path / name, steps=1, accumulate=count, clip=1e9)
        made = finetune(model, METHODS["divprune"](), batches, config)
        found.append((made.log[0]["loss"], made.log[0]["norm"]))
    assert found[0] == pytest.approx(found[1], rel=1e-4)


# ---- what is tuned ------------------------------------------------------------------------------
PARTS = {
    "projector": r"multi_modal_projector",
    "decoder": r"language_model|lm_head",
    "full": r".",
    r"layers\.[67]\..*mlp": r"language_model\.layers\.[67]\.mlp",
    "lora": r"lora_",
}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("tune", PARTS)
def test_the_loss_falls_and_only_what_was_chosen_changes(
    tune: str, method: str, tmp_path: Path
) -> None:
    model = build_model()
    before, traces = copied(model), state_of(model)
    config = config_of(tmp_path, tune=tune, steps=12, lora_rank=4)
    made = finetune(model, METHODS[method](), stream, config)
    losses = [line["loss"] for line in made.log]
    assert len(losses) == 12
    assert sum(losses[-3:]) < 0.9 * sum(losses[:3])
    after = {n.replace("base_layer.", ""): t for n, t in model.state_dict().items()}
    changed = {n for n, t in after.items() if n not in before or not torch.equal(t, before[n])}
    wanted = {n for n in after if re.search(PARTS[tune], n)}
    assert changed <= wanted
    assert changed
    # The tower's last layers are not read, and a token that never occurs gets no gradient.
    assert len(changed) > 0.7 * len(wanted)
    if tune != "lora":
        assert made.model is model
        assert state_of(model) == traces
    else:
        assert "lora_B" in " ".join(changed)
        assert not any("lora" in name for name in changed if "language_model" not in name)


@pytest.mark.parametrize("tune", ["projector", "lora"])
def test_what_is_saved_gives_the_same_logits(tune: str, tmp_path: Path) -> None:
    model, method = build_model(), METHODS["visionzip"]()
    made = finetune(model, method, stream, config_of(tmp_path, tune=tune))
    expected = logits_of(made.model, method)
    fresh = build_model()
    assert not torch.equal(logits_of(fresh, method), expected)
    with vtc.patch(fresh, method):  # under a patch as well
        again = load(fresh, tmp_path)
        assert (again is fresh) == (tune == "projector")
    assert torch.equal(logits_of(again, method), expected)
    assert torch.equal(logits_of(again), logits_of(made.model))
    record = json.loads((tmp_path / "finetune.json").read_text())
    assert vtc.patch(build_model(), record["method"]).method == method
    assert record["tune"] == tune


@pytest.mark.parametrize("more", [{}, {"tune": "lora", "lora_dropout": 0.3}], ids=str)
def test_a_resumed_run_ends_bit_for_bit_as_one_without_a_stop(
    more: dict[str, Any], tmp_path: Path
) -> None:
    def stops(step: int) -> dict[str, Any]:
        if step == 5:
            raise KeyboardInterrupt
        return stream(step)

    def run(out: str, batches: Any, model: Any) -> Any:
        config = config_of(tmp_path / out, steps=7, **more)
        return finetune(model, METHODS["divprune"](), batches, config)

    whole = run("whole", stream, build_model())
    model = build_model()
    torch.manual_seed(1)
    before, traces = logits_of(model), state_of(model)
    with pytest.raises(KeyboardInterrupt):
        run("parts", stops, model)
    assert state_of(model) == traces
    if more:  # the adapters are off again
        assert torch.equal(logits_of(model), before)
    resumed = run("parts", stream, model)
    assert resumed.log == whole.log
    assert torch.equal(logits_of(resumed.model), logits_of(whole.model))
    with pytest.raises(ValueError, match="rate: the checkpoint in out was made with"):
        finetune(
            build_model(),
            METHODS["divprune"](),
            stream,
            config_of(tmp_path / "parts", steps=7, rate=0.5, **more),
        )
    with pytest.raises(ValueError, match="method: the checkpoint in out was made with"):
        finetune(build_model(), "random", stream, config_of(tmp_path / "parts", steps=7, **more))


def test_minutes_end_a_run_and_count_what_was_run_before(tmp_path: Path) -> None:
    config = config_of(tmp_path, steps=None, minutes=0.003)
    made = finetune(build_model(), "random", stream, config)
    assert len(made.log) >= 1
    saved = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    assert saved["seconds"] >= 0.18
    again = finetune(build_model(), "random", stream, config)  # it is done
    assert again.log == made.log
    assert torch.equal(logits_of(again.model), logits_of(made.model))


def test_bfloat16_weights_are_tuned_in_float32(tmp_path: Path) -> None:
    model = build_model(dtype=torch.bfloat16)

    def half(step: int) -> dict[str, Any]:
        batch = stream(step)
        return {**batch, "pixel_values": batch["pixel_values"].bfloat16()}

    with pytest.raises(ValueError, match=r"precision: .*bfloat16"):
        finetune(model, "random", half, config_of(tmp_path))
    before = copied(model)
    finetune(model, "random", half, config_of(tmp_path, precision="bf16"))
    changed = {n for n, t in model.state_dict().items() if not torch.equal(t, before[n])}
    assert changed
    assert all("multi_modal_projector" in name for name in changed)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    fresh = load(build_model(dtype=torch.bfloat16), tmp_path)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, fresh.state_dict()[name])


def test_a_patched_model_keeps_its_patch(tmp_path: Path) -> None:
    method = METHODS["divprune"]()
    whole = finetune(build_model(), method, stream, config_of(tmp_path / "a"))
    model = build_model()
    with vtc.patch(model, METHODS["divprune"]()) as patch:
        made = finetune(model, method, stream, config_of(tmp_path / "b"))
        assert patch.active
    assert made.log == whole.log


def test_without_compression(tmp_path: Path) -> None:
    model = build_model()
    with torch.no_grad():
        expected = float(model(**stream(0)).loss)
    made = finetune(model, None, stream, config_of(tmp_path))
    assert made.log[0]["loss"] == pytest.approx(expected, abs=1e-5)
    compressed = finetune(build_model(), "divprune", stream, config_of(tmp_path / "other"))
    assert compressed.log[0]["loss"] != pytest.approx(expected, abs=1e-3)


# ---- by other means -----------------------------------------------------------------------------
STEPS, RATE = 3, 1e-3


def tuned_by(loop: str, tune: str, folder: Path, **more: Any) -> tuple[list[float], Any]:
    """The losses and gradient norms of some steps on one batch, and the model."""
    model, method = build_model(), METHODS["divprune"]()
    if loop == "finetune":
        config = config_of(folder, tune=tune, steps=1, lora_rank=4, **more)
        made = finetune(model, method, lambda step: batch_of(), config)
        return [made.log[0]["loss"], made.log[0]["norm"]], made.model
    if tune == "lora":
        leaves = "q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj"
        torch.manual_seed(0)
        model = get_peft_model(
            model,
            LoraConfig(r=4, lora_alpha=16, target_modules=rf".*language_model.*\.({leaves})"),
        )
    vtc.patch(model, method)
    if loop == "trainer":
        arguments = TrainingArguments(
            output_dir=str(folder), use_cpu=True, report_to=[], max_steps=STEPS, save_strategy="no",
            learning_rate=RATE, lr_scheduler_type="constant", logging_steps=1, disable_tqdm=True,
            remove_unused_columns=False, **more,
        )  # fmt: skip
        trainer = Trainer(
            model, arguments, train_dataset=[{}] * 8, data_collator=lambda rows: batch_of()
        )
        trainer.train()
        lines = [line for line in trainer.state.log_history if "grad_norm" in line]
        return [line[name] for line in lines for name in ("loss", "grad_norm")], model
    found = []
    model.train()
    learnt = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(learnt, lr=RATE, weight_decay=0.0)
    for _ in range(STEPS):
        loss = model(**batch_of()).loss
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(learnt, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        found += [float(loss), float(norm)]
    return found, model


@pytest.mark.parametrize(
    ("tune", "more"),
    [("full", {}), ("full", {"gradient_checkpointing": True}), ("lora", {})],
    ids=["full", "checkpointed", "lora"],
)
def test_trainer_and_a_plain_loop_learn_what_finetune_learns(
    tune: str, more: dict[str, Any], tmp_path: Path
) -> None:
    plain, by_hand = tuned_by("plain", tune, tmp_path)
    theirs, by_trainer = tuned_by("trainer", tune, tmp_path / "trainer", **more)
    ours, _ = tuned_by("finetune", tune, tmp_path / "finetune", **more)
    assert len(plain) == 2 * STEPS
    assert plain[-2] < plain[0]
    assert theirs == pytest.approx(plain, rel=1e-3)  # the Trainer's log is rounded
    assert ours == pytest.approx(plain[:2], rel=1e-4)
    before = copied(build_model())
    with torch.no_grad():
        expected = by_hand(**batch_of()).logits
        torch.testing.assert_close(by_trainer(**batch_of()).logits, expected, atol=1e-3, rtol=1e-3)
        assert (logits_of(build_model(), METHODS["divprune"]()) - expected).abs().max() > 1e-2
    if tune == "lora":  # the weights below the adapters stay
        left = {n.replace("base_model.model.", "").replace("base_layer.", ""): t
                for n, t in by_trainer.state_dict().items() if "lora_" not in n}  # fmt: skip
        assert left.keys() == before.keys()
        assert all(torch.equal(t, before[n]) for n, t in left.items())


def test_the_guide_runs(file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = (ROOT / "vtc/training/README.md").read_text("utf-8")
    blocks = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert len(blocks) == 4
    names = {"llava-hf/llava-1.5-7b-hf": str(embedded_path()), "steps=500": "steps=1",
             "range(500)": "range(1)", "max_steps=500": "max_steps=1, use_cpu=True",
             "size=8": "size=1", "size=4": "size=1"}  # fmt: skip
    monkeypatch.chdir(tmp_path)
    done: dict[str, Any] = {}
    for block in blocks:
        for name, value in names.items():
            block = block.replace(name, value)
        exec(compile(block, "vtc/training/README.md", "exec"), done)
    assert done["tuned"].log[0]["step"] == 1
    assert done["trainer"].state.global_step == 1


# ---- what is refused ----------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("match", "method", "more"),
    [
        (r"tune: expected 'projector'.*got 'nothing'.*model\.language_model", None,
         {"tune": "nothing"}),
        (r"tune: '\(' is not a regular expression", None, {"tune": "("}),
        ("gradient_checkpointing: fastv.*'layers'.*cannot replay", vtc.FastV(keep=0.5),
         {"gradient_checkpointing": True}),
        ("layer: ", vtc.FastV(keep=0.5, layer=99), {}),
    ],
)  # fmt: skip
def test_settings_that_do_not_fit_are_refused_before_anything_changes(
    match: str, method: Method | None, more: dict[str, Any], tmp_path: Path
) -> None:
    model = build_model()
    before = state_of(model)
    with pytest.raises(ValueError, match=match):
        finetune(model, method, stream, config_of(tmp_path / "out", **more))
    assert state_of(model) == before
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "wrong",
    [
        {"steps": None}, {"steps": 0}, {"minutes": 0.0}, {"rate": 0.0}, {"accumulate": 0},
        {"label_smoothing": 1.0}, {"lora_rank": 0}, {"precision": "fp16"}, {"tune": ""},
        {"gradient_checkpointing": 1}, {"seed": -1},
    ],
    ids=str,
)  # fmt: skip
def test_settings_out_of_range_name_themselves(wrong: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises((ValueError, TypeError), match=f"^{next(iter(wrong))}: "):
        config_of(tmp_path, **wrong)


def test_another_patch_is_refused(tmp_path: Path) -> None:
    model = build_model()
    with vtc.patch(model, "random"):
        for method in (METHODS["divprune"](), None):
            with pytest.raises(ValueError, match=r"model: it is patched with .*unpatch"):
                finetune(model, method, stream, config_of(tmp_path))


def test_batches_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    def without(step: int) -> dict[str, Any]:
        return {name: value for name, value in stream(step).items() if name != "labels"}

    def empty(step: int) -> dict[str, Any]:
        batch = stream(step)
        return {**batch, "labels": torch.full_like(batch["labels"], -100)}

    def on_all(step: int) -> dict[str, Any]:
        batch = stream(step)
        return {**batch, "labels": batch["input_ids"].clone()}

    def packed(step: int) -> dict[str, Any]:
        first, second = (batch_of(rows=slice(i, i + 1)) for i in range(2))
        batch = {n: torch.cat([first[n], second[n]], 1) for n in ("input_ids", "labels")}
        lengths = [b["input_ids"].shape[1] for b in (first, second)]
        batch["position_ids"] = torch.cat([torch.arange(n) for n in lengths])[None]
        batch["pixel_values"] = torch.cat([first["pixel_values"], second["pixel_values"]])
        return batch

    def text(step: int) -> dict[str, Any]:
        batch = stream(step)
        words = batch["input_ids"].masked_fill(batch["input_ids"] == IMAGE, 5)
        return {"input_ids": words, "labels": words.clone()}

    for batches, match in (
        (without, "batches: expected labels .*got none"),
        (empty, "batches: expected labels .*got only -100"),
        (on_all, "batches: expected labels on text only"),
        (packed, "position_ids: .*several documents"),
        (text, "batches: expected inputs on which what is tuned"),
    ):
        model = build_model()
        before = state_of(model)
        with pytest.raises(ValueError, match=match):
            finetune(model, "divprune", batches, config_of(tmp_path, tune="projector"))
        assert state_of(model) == before


def test_lora_without_peft_and_on_adapters(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = build_model()
    config = config_of(tmp_path, tune="lora", steps=1)
    finetune(model, "random", stream, config)
    with pytest.raises(ValueError, match="model: it has adapters"):
        finetune(model, "random", stream, config)
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ValueError, match="tune: 'lora' needs peft"):
        finetune(build_model(), "random", stream, config)


def test_weights_of_another_model_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"folder: expected tuned\.safetensors"):
        load(build_model(), tmp_path)
    finetune(build_model(), "random", stream, config_of(tmp_path, steps=1))
    other, _ = embedded()
    before = copied(other)
    with pytest.raises(ValueError, match=r"folder: .*no parameter model\.multi_modal_projector"):
        load(other, tmp_path)
    assert all(torch.equal(t, before[n]) for n, t in other.state_dict().items())


# ---- data and the command -----------------------------------------------------------------------
@pytest.fixture
def file(tmp_path: Path) -> Path:
    rows = []
    for number, color in enumerate(["red", "blue", "green"]):
        Image.new("RGB", (40, 30), color).save(tmp_path / f"{number}.png")
        rows.append({"image": f"{number}.png", "question": "What color?", "answer": color})
    rows[2]["images"] = [rows[2].pop("image"), "0.png"]
    path = tmp_path / "train.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_labels_are_on_the_answers_and_every_row_comes_once_a_round(file: Path) -> None:
    _, processor = embedded()
    conversations = Conversations.read(processor, file, 2)
    seen = []
    for step in range(3):
        batch = conversations(step)
        assert batch["pixel_values"].shape[0] == int((batch["input_ids"] == 3).sum()) // 576
        for ids, labels in zip(batch["input_ids"], batch["labels"], strict=True):
            learnt = labels != -100
            assert torch.equal(labels[learnt], ids[learnt])
            seen.append(processor.tokenizer.decode(labels[learnt]))
    expected = sorted(f" {color}</s>" for color in ("blue", "green", "red"))
    assert sorted(seen[:3]) == sorted(seen[3:]) == expected
    again = Conversations.read(processor, file, 2)(1)
    assert all(torch.equal(t, again[name]) for name, t in conversations(1).items())


def test_rows_that_lack_something_are_refused(tmp_path: Path, file: Path) -> None:
    _, processor = embedded()
    with pytest.raises(ValueError, match="rows: number 0 lacks answer, image"):
        Conversations(processor, [{"question": "?"}], 1)
    with pytest.raises(ValueError, match="rows: expected at least one"):
        Conversations(processor, [], 1)
    with pytest.raises(ValueError, match="file: no such file"):
        Conversations.read(processor, tmp_path / "none.jsonl", 1)
    file.write_text("{\n")
    with pytest.raises(ValueError, match=r"file: .*line 1"):
        Conversations.read(processor, file, 1)


def test_the_command(file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    common = [str(embedded_path()), "--data", str(file), "--out", str(out), "--batch", "1"]
    main([*common, "--method", "divprune", "--keep", "0.1", "--steps", "1"])
    assert "1 steps, loss" in capsys.readouterr().out
    model, _ = embedded()
    before = copied(model)
    load(model, out)
    changed = {n for n, t in model.state_dict().items() if not torch.equal(t, before[n])}
    assert changed
    assert all("multi_modal_projector" in name for name in changed)
    for wrong, match in (
        (["--steps", "1", "--keep", "0.1"], "method: expected one"),
        (["--steps", "1", "--method", "no_such"], "no_such"),
        ([], "steps: expected steps, minutes or both"),
        (["--steps", "1", "--tune", "nothing"], "tune: "),
    ):
        with pytest.raises(SystemExit):
            main([*common, *wrong])
        assert match in capsys.readouterr().err


def test_the_page_of_a_recipe_gives_the_points_regained(tmp_path: Path) -> None:
    def cell(name: str, right: dict[str, list[int]], **more: Any) -> None:
        (tmp_path / name).mkdir()
        text = json.dumps({"keep": 0.1, "steps": 2, "size": 4, "seconds": 90,
                           "types": ["count", "digits"] * 50, "right": right, **more})  # fmt: skip
        (tmp_path / name / "scores.json").write_text(text)
        lines = [{"step": step, "loss": 1.0 / step} for step in (1, 2)]
        (tmp_path / name / "log.jsonl").write_text("\n".join(map(json.dumps, lines)))

    half, most = [1, 0] * 50, [1, 0] * 40 + [1] * 20
    cell("none", {"full": most, "divprune": half, "visionzip": half}, steps=0)
    cell("divprune-lora", {"divprune": most})
    page = recipe.page(tmp_path)
    assert "All tokens, untuned: 60.0 [" in page
    # Ten of a hundred answers turned right: the standard error is sqrt(0.1 x 0.9 / 99).
    assert "| divprune | divprune-lora | 60.0 (4.9) | +10.0 (3.0) |" in page
    assert "| divprune | divprune-lora | 100.0 | 20.0 |" in page  # by type
    assert "--steps 2 \\\n    --batch 4 --questions 100 --cells none divprune-lora" in page
    assert "over plain" not in page  # it was not run
    cell("plain-lora", {"divprune": half, "visionzip": half})
    assert "| divprune | lora | +10.0 |" in recipe.page(tmp_path)
    cell("visionzip-lora", {"visionzip": most}, steps=3)
    with pytest.raises(ValueError, match=r"out: .*different settings"):
        recipe.page(tmp_path)
