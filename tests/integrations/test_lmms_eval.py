# SPDX-License-Identifier: Apache-2.0
"""lmms-eval's built-in classes with a patch on their model, through its registry and evaluator."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from PIL import Image
from transformers import AutoProcessor, LlavaForConditionalGeneration

import vtc
from tests.eval.evalkit import QUESTION, TOKENS, picture, save_model, write_rows
from vtc.core import Method, Selection, VisionTokens

pytest.importorskip("lmms_eval")

from lmms_eval.api.instance import Instance
from lmms_eval.evaluator import simple_evaluate
from lmms_eval.models import (
    AVAILABLE_CHAT_TEMPLATE_MODELS,
    AVAILABLE_SIMPLE_MODELS,
    get_model,
    get_model_manifest,
    list_available_models,
)
from lmms_eval.tasks import TaskManager
from vtc.integrations.lmms_eval import builtin_name, manifests
from vtc.integrations.lmms_eval import models as wrapped
from vtc.integrations.lmms_eval.models import VtcModel, grey

ROWS = 4
GENERATION = {"max_new_tokens": 4, "do_sample": False}


@dataclass(frozen=True)
class Boom(Method):
    """A method with a mistake in it."""

    calls: ClassVar[int] = 0

    def select(self, tokens: VisionTokens) -> Selection:
        type(self).calls += 1
        raise IndexError("a mistake in a method")


Boom.name = "boom"  # set here, where it does not register


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return save_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def task(tmp_path_factory) -> TaskManager:
    """A task `tiny_task` of a few rows, from a YAML file beside its data."""
    place = tmp_path_factory.mktemp("task")
    write_rows(place / "rows.parquet", ["w1"] * ROWS)
    tasks = Path(vtc.__file__).parent.parent / "eval" / "tasks"
    (place / "utils.py").write_text((tasks / "utils.py").read_text())
    shared = (tasks / "_vtc_template_yaml").read_text()
    shared = shared.replace("max_new_tokens: 16", f"max_new_tokens: {GENERATION['max_new_tokens']}")
    shared = shared.replace('"\\nAnswer the question using a single word or phrase."', '""')
    (place / "tiny.yaml").write_text(
        f"task: tiny_task\ndataset_path: parquet\n"
        f"dataset_kwargs:\n  data_files:\n    test: rows.parquet\n{shared}"
    )
    (place / "choice.yaml").write_text(
        "task: tiny_choice\ndataset_path: parquet\n"
        "dataset_kwargs:\n  data_files:\n    test: rows.parquet\n"
        "test_split: test\noutput_type: multiple_choice\n"
        "doc_to_visual: !function utils.doc_to_visual\ndoc_to_text: !function utils.doc_to_text\n"
        'doc_to_target: 1\ndoc_to_choice: ["w1 w2", "w3", "w4"]\n'
        "metric_list:\n  - metric: acc\n    aggregation: mean\n    higher_is_better: true\n"
    )
    return TaskManager(include_path=str(place), include_defaults=False)


@pytest.fixture
def plain(folder):
    """The model and the processor as anyone would load them."""
    model = LlavaForConditionalGeneration.from_pretrained(folder).eval()
    return model, AutoProcessor.from_pretrained(folder)


def _inputs(processor, image: Image.Image, text: str = QUESTION) -> Any:
    prompt = f"<image> {text} answer "
    return processor(images=[image], text=[prompt], return_tensors="pt")


def _answers(plain, images: list[Image.Image]) -> list[str]:
    model, processor = plain
    found = []
    for image in images:
        inputs = _inputs(processor, image)
        out = model.generate(**inputs, **GENERATION, pad_token_id=3, eos_token_id=3)
        new = out[0, inputs["input_ids"].shape[1] :]
        found.append(processor.decode(new, skip_special_tokens=True).strip())
    return found


def _evaluate(model: Any, task: TaskManager, arguments: str = "", name: str = "tiny_task", **more):
    found = simple_evaluate(
        model=model, model_args=arguments, tasks=[name], task_manager=task, bootstrap_iters=0,
        process_docs_parallel=1, **more,
    )  # fmt: skip
    return found["samples"][name], found["results"][name]


def _texts(samples: list[dict[str, Any]]) -> list[str]:
    return [s["filtered_resps"][0] for s in samples]


PICTURES = [picture(i) for i in range(ROWS)]


# ---- registration -------------------------------------------------------------------------------
def test_the_entry_point_brings_every_hugging_face_class():
    names = set(list_available_models())
    assert {"vtc_llava_hf", "vtc_qwen2_5_vl", "vtc_internvl_hf", "vtc_embedded"} <= names
    assert not {"vtc_openai", "vtc_claude", "vtc_vllm", "vtc_sglang"} & names
    known = {*AVAILABLE_SIMPLE_MODELS, *AVAILABLE_CHAT_TEMPLATE_MODELS}
    for manifest in manifests():
        assert builtin_name(manifest.model_id) in known
        if manifest.model_id != "vtc_embedded":
            original = get_model_manifest(builtin_name(manifest.model_id))
            assert (manifest.chat_class_path is None) == (original.chat_class_path is None)
            assert (manifest.simple_class_path is None) == (original.simple_class_path is None)


@pytest.mark.parametrize("simple", [True, False])
@pytest.mark.parametrize("name", ["llava_hf", "qwen2_5_vl", "qwen2_vl", "gemma3"])
def test_classes_are_subclasses_of_the_built_in_ones(name, simple):
    cls = get_model(f"vtc_{name}", force_simple=simple)
    assert issubclass(cls, (VtcModel, get_model(name, force_simple=simple)))
    assert cls.__mro__.index(VtcModel) < cls.__mro__.index(get_model(name, force_simple=simple))
    assert get_model(f"vtc_{name}", force_simple=simple) is cls


def test_unknown_classes_are_attribute_errors():
    for name in ("chat_nothing_like_it", "odd_llava_hf", "chat_", "llava"):
        with pytest.raises(AttributeError):
            getattr(wrapped, name)


# ---- runs ---------------------------------------------------------------------------------------
@pytest.mark.parametrize("simple", [True, False])
def test_a_run_gives_what_the_patched_model_says(folder, task, plain, simple):
    unpatched = _answers(plain, PICTURES)
    with vtc.patch(plain[0], "random", keep=6):
        expected = _answers(plain, PICTURES)
    assert expected != unpatched  # or the comparison would show nothing
    samples, scores = _evaluate(
        "vtc_llava_hf", task, f"pretrained={folder},method=random,keep=6", force_simple=simple
    )
    assert _texts(samples) == expected
    assert scores["exact_match,none"] == sum(a == "w1" for a in expected) / ROWS
    samples, _ = _evaluate("vtc_llava_hf", task, f"pretrained={folder}", force_simple=simple)
    assert _texts(samples) == unpatched


def test_settings_and_report(folder, task, plain, tmp_path):
    report = tmp_path / "report.json"
    settings = '{"layer": 3, "keep": 5}'
    samples, _ = _evaluate(
        "vtc_llava_hf", task,
        f"pretrained={folder},vtc_method=fastv,vtc_settings={settings},vtc_report={report}",
    )  # fmt: skip
    with vtc.patch(plain[0], "fastv", layer=3, keep=5):
        assert _texts(samples) == _answers(plain, PICTURES)
    written = json.loads(report.read_text())
    assert written["method"]["layer"] == 3
    assert written["tokens_per_layer"] == [TOKENS] * 3 + [5] * 5
    assert written["prefills"] == ROWS


def test_a_composition(folder, task):
    lm = get_model("vtc_llava_hf")(
        pretrained=str(folder), method="random:seed=2|fastv:layer=4:keep=3", keep=0.5
    )
    _evaluate(lm, task)
    assert lm.vtc_patch.report.tokens_per_layer == [18] * 4 + [3] * 4


@pytest.mark.parametrize("simple", [True, False])
def test_an_error_in_generate_stops_the_run(folder, task, simple):
    name = "llava_hf"
    lm = get_model(f"vtc_{name}", force_simple=simple)(pretrained=str(folder))
    lm.vtc_apply(Boom())
    Boom.calls = 0
    with pytest.raises(RuntimeError, match="IndexError: a mistake in a method"):
        _evaluate(lm, task)
    assert Boom.calls == 1  # at the first sample, not at the end
    assert "generate" in vars(lm.model)  # the engine's own, which unpatching takes away
    lm.vtc_apply(None)
    assert "generate" not in vars(lm.model)

    # What would happen without: lmms-eval's own class makes an empty answer of it, and goes on.
    builtin = get_model(name, force_simple=simple)(
        pretrained=str(folder), device="cpu", device_map="cpu"
    )
    vtc.patch(builtin.model, Boom())
    samples, scores = _evaluate(builtin, task)
    assert _texts(samples) == [""] * ROWS
    assert scores["exact_match,none"] == 0


def test_an_error_stops_even_a_class_that_catches_everything(folder):
    lm = get_model("vtc_llava_hf")(pretrained=str(folder))

    def broken(**kwargs):
        raise ValueError("out of luck")

    lm.model.generate = broken
    with (
        pytest.raises(RuntimeError, match="out of luck"),
        lm._vtc_guard(),
        contextlib.suppress(BaseException),
    ):
        lm.model.generate(input_ids=None)
    assert lm.model.generate is broken


@pytest.mark.parametrize("simple", [True, False])
def test_blind_shows_grey_pictures(folder, task, plain, simple):
    samples, _ = _evaluate(
        "vtc_llava_hf", task, f"pretrained={folder},blind=true", force_simple=simple
    )
    flat = Image.new("RGB", PICTURES[0].size, (128, 128, 128))
    assert _texts(samples) == _answers(plain, [flat] * ROWS)
    assert _texts(samples) != _answers(plain, PICTURES)


def test_only_pictures_in_memory_can_be_greyed():
    message = {"role": "user", "content": [{"type": "image", "url": picture(0)}, {"type": "text"}]}
    shown = grey([message])[0]["content"][0]["url"]
    assert shown.getcolors() == [(shown.width * shown.height, (128, 128, 128))]
    for part in ({"type": "video", "url": "a.mp4"}, {"type": "image", "url": "a.png"}):
        with pytest.raises(NotImplementedError, match="blind"):
            grey([part])


# ---- log-likelihoods ----------------------------------------------------------------------------
def _loss(plain, image: Image.Image, answer: str) -> tuple[float, bool]:
    """Mean negative log-likelihood of an answer, token by token, as if it were generated."""
    model, processor = plain
    inputs = _inputs(processor, image)
    losses, greedy = [], True
    for word in [*answer.split(), "</s>"]:
        with torch.inference_mode():
            scores = model(**inputs).logits[0, -1].log_softmax(-1)
        token = processor.tokenizer.convert_tokens_to_ids(word)
        losses.append(-scores[token])
        greedy &= int(scores.argmax()) == token
        one = torch.tensor([[token]])
        inputs["input_ids"] = torch.cat([inputs["input_ids"], one], 1)
        inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    return float(sum(losses)) / len(losses), greedy


def test_loglikelihood_is_the_loss_of_the_answer(folder, plain):
    lm = get_model("vtc_llava_hf", force_simple=True)(pretrained=str(folder))
    lm.task_dict = {"t": {"test": [{"n": n} for n in range(ROWS)]}}
    best = _answers(plain, PICTURES[:1])[0].split()[0]
    requests = [
        Instance(
            "loglikelihood",
            (QUESTION, answer, lambda doc: [picture(doc["n"])], number, "t", "test"),
            0,
            {"task": "t", "doc_id": number, "repeats": 1},
        )
        for number, answer in ((0, "w1 w2"), (1, "w3"), (0, best))
    ]
    expected = [_loss(plain, picture(0), "w1 w2"), _loss(plain, picture(1), "w3")]
    found = [result.text for result in lm.loglikelihood(requests)]
    assert [f[0] for f in found[:2]] == pytest.approx([e[0] for e in expected], abs=1e-4)
    assert [f[1] for f in found[:2]] == [e[1] for e in expected] == [False, False]
    # With a method, that of the compressed model; here one that reads nothing of the answer.
    lm.vtc_apply(vtc.make("random", keep=6))
    with vtc.patch(plain[0], "random", keep=6):
        compressed = [_loss(plain, picture(0), "w1 w2"), _loss(plain, picture(1), "w3")]
    found = [result.text for result in lm.loglikelihood(requests)]
    assert [f[0] for f in found[:2]] == pytest.approx([c[0] for c in compressed], abs=1e-4)
    assert compressed[0][0] != pytest.approx(expected[0][0], abs=1e-3)


def test_a_multiple_choice_task(folder, task, plain):
    _, scores = _evaluate(
        "vtc_llava_hf", task, f"pretrained={folder}", name="tiny_choice", force_simple=True
    )
    choices = ["w1 w2", "w3", "w4"]
    best = [min(choices, key=lambda c: _loss(plain, image, c)[0]) for image in PICTURES]
    assert scores["acc,none"] == sum(b == "w3" for b in best) / ROWS
    # This is why there is an own one: the built-in fails on this version of transformers.
    builtin = get_model("llava_hf", force_simple=True)(
        pretrained=str(folder), device="cpu", device_map="cpu"
    )
    with pytest.raises(Exception, match="image"):
        _evaluate(builtin, task, name="tiny_choice")


# ---- bad input ----------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"method": "fastvv"}, "unknown name 'fastvv'"),
        ({"method": "fastv", "keep": 1.5}, "keep"),
        ({"method": "full", "keep": 0.5}, "keep"),
        ({"keep": 0.5}, "need a method"),
        ({"method": "todre|fastv", "settings": {"layer": 3}}, "composition"),
    ],
)
def test_bad_arguments_are_refused_before_the_model_is_loaded(arguments, message):
    with pytest.raises((ValueError, TypeError), match=message):
        get_model("vtc_llava_hf")(pretrained="no/such/model", **arguments)


_WITHOUT_DECORD = """
import importlib.abc, sys

class Absent(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "decord":
            raise ModuleNotFoundError(name)

find = importlib.util.find_spec
importlib.util.find_spec = lambda name, *a: None if name == "decord" else find(name, *a)
sys.meta_path.insert(0, Absent())
from vtc.integrations.lmms_eval import models
print(models.simple_llava_hf.__mro__[-2].__name__, "decord" in sys.modules)
"""


@pytest.mark.slow
def test_the_classes_load_where_there_is_no_decord():
    done = subprocess.run(
        [sys.executable, "-c", "import importlib.util\n" + _WITHOUT_DECORD],
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[-1] == "False"
