# SPDX-License-Identifier: Apache-2.0
"""`vtc eval`'s runner: what is run, what is reused, what is written, what is said when it fails."""

from __future__ import annotations

import csv
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

import vtc
from tests.eval.evalkit import TOKENS, save_model, write_rows

pytest.importorskip("lmms_eval")

from vtc.eval.analysis import stats
from vtc.eval.harness import run as runner
from vtc.eval.harness.identity import fingerprint
from vtc.eval.harness.loading import write_task
from vtc.eval.harness.plan import BadInput, Cell, Observer, Settings, plan
from vtc.eval.harness.quiet import offline
from vtc.eval.harness.results import compare, of_this_run
from vtc.eval.harness.run import run
from vtc.eval.harness.scoring import samples_of, scores_of
from vtc.eval.report.table import runs, table

ROWS = 6
KEEPS = (0.5, 4)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return save_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(autouse=True)
def _small_suite(monkeypatch, folder):
    """`vtc_scenes` as six rows, of which the model without compression answers four right."""
    answers = _right_answers(folder)
    given = [a if i in (0, 1, 2, 5) else "never" for i, a in enumerate(answers)]

    def build_task(name, out_dir, limit=None, seed=0):
        return write_rows(Path(out_dir) / "built.parquet", given[: limit or ROWS])

    monkeypatch.setattr("vtc.eval.tasks.parquet.build_task", build_task)
    monkeypatch.setattr(runner, "hub_answers", lambda: False)


@pytest.fixture
def _indexed_once(monkeypatch):
    """lmms-eval reads its thousands of task files once for all tests, not once for each."""
    from lmms_eval.tasks import TaskManager

    original = TaskManager.initialize_tasks

    def initialize(self, include_path=None, include_defaults=True):
        name = str(include_defaults)
        if name not in _INDEX:
            _INDEX[name] = original(self, include_path, include_defaults)
        return _INDEX[name]

    monkeypatch.setattr(TaskManager, "initialize_tasks", initialize)


_INDEX: dict[str, Any] = {}
_ANSWERS: list[str] = []


def _right_answers(folder: Path) -> list[str]:
    if not _ANSWERS:
        from transformers import AutoProcessor, LlavaForConditionalGeneration

        from tests.eval.evalkit import QUESTION, picture

        model = LlavaForConditionalGeneration.from_pretrained(folder).eval()
        processor = AutoProcessor.from_pretrained(folder)
        hint = "Answer the question using a single word or phrase."
        for number in range(ROWS):
            prompt = f"<image> {QUESTION}\n{hint} answer "
            inputs = processor(images=[picture(number)], text=[prompt], return_tensors="pt")
            out = model.generate(
                **inputs, max_new_tokens=16, do_sample=False, pad_token_id=3, eos_token_id=3
            )
            new = out[0, inputs["input_ids"].shape[1] :]
            _ANSWERS.append(processor.decode(new, skip_special_tokens=True).strip())
    return _ANSWERS


class Log(Observer):
    """Writes down what it is told."""

    def __init__(self) -> None:
        self.plans: list[tuple[int, int, int]] = []
        self.cells: list[str] = []
        self.samples = 0

    def planned(self, total: int, cells: int, finished: int) -> None:
        self.plans.append((total, cells, finished))

    def advanced(self, samples: int) -> None:
        self.samples += samples

    def finished(self, cell: Any) -> None:
        self.cells.append(cell["label"])


@pytest.fixture(scope="module")
def shared(tmp_path_factory) -> dict[str, Any]:
    """A place for one finished run that several tests read."""
    return {"out": tmp_path_factory.mktemp("out")}


@pytest.fixture
def done(shared, folder):
    """(results, observer, folder) of a run with a baseline, a method and a broken method."""
    if "results" not in shared:
        log = Log()
        settings = Settings(
            out=shared["out"], model=str(folder), methods=("full", "blind", "random", "fastv"),
            keeps=KEEPS, baselines=False,
        )  # fmt: skip
        shared["results"] = run(settings, log)
        shared["log"], shared["settings"] = log, settings
    return shared


def _cell(results: dict[str, Any], label: str, keep: Any = None) -> dict[str, Any]:
    return next(c for c in results["cells"] if (c["label"], c["keep"]) == (label, keep))


# ---- a run --------------------------------------------------------------------------------------
def test_scores_tokens_and_loyalty(done):
    results = done["results"]
    assert [(c["label"], c["keep"]) for c in results["cells"]] == [
        ("full", None), ("blind", None), ("random", 0.5), ("random", 4), ("fastv", 0.5),
        ("fastv", 4),
    ]  # fmt: skip
    full = _cell(results, "full")
    assert full["status"] == "done"
    assert full["score"] == pytest.approx(4 / ROWS)
    assert full["interval"] == pytest.approx(stats.wilson(4, ROWS))
    assert full["loyalty"] == 1.0
    assert {k: (v["score"], v["samples"]) for k, v in full["by_type"].items()} == {
        "even": (pytest.approx(2 / 3), 3), "odd": (pytest.approx(2 / 3), 3),
    }  # fmt: skip
    assert full["tokens"] == {
        "in": TOKENS, "out": TOKENS, "equivalent": TOKENS, "per_layer": [TOKENS] * 8,
    }  # fmt: skip
    assert _cell(results, "random", 0.5)["tokens"]["per_layer"] == [18] * 8
    fastv = _cell(results, "fastv", 4)
    assert fastv["tokens"]["per_layer"] == [TOKENS] * 2 + [4] * 6
    assert fastv["tokens"]["equivalent"] == (2 * TOKENS + 6 * 4) / 8
    assert fastv["flops"]["lm"] < full["flops"]["lm"]
    assert fastv["flops"]["vision"] == full["flops"]["vision"]
    assert fastv["kv_bytes"] < full["kv_bytes"]
    assert all(ms > 0 for ms in fastv["ms"].values())
    assert _cell(results, "blind")["loyalty"] < 1.0
    assert results["ran"] == {"device": "cpu", "dtype": "float32", "processes": 1}
    assert done["log"].plans == [(6 * ROWS, 6, 0)]
    assert done["log"].samples == 6 * ROWS


def test_what_is_written(done):
    out, results = done["out"], done["results"]
    assert json.loads((out / "results.json").read_text()) == results
    with (out / "results.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [float(r["score"]) for r in rows] == [c["score"] for c in results["cells"]]
    assert rows[0]["equivalent_tokens"] == str(float(TOKENS))
    for cell in results["cells"]:
        text = (out / "cells" / f"{cell['key']}.jsonl").read_text()
        samples = [json.loads(line) for line in text.splitlines()]
        assert len(samples) == ROWS
        assert sum(s["score"] for s in samples) == pytest.approx(ROWS * cell["score"])
    assert not list(out.rglob(".*.json*"))  # no temporary file is left
    data = next((out / "data").iterdir())
    assert {p.name for p in data.iterdir()} >= {"vtc_scenes.parquet", "vtc_scenes.yaml", "utils.py"}


def test_the_model_is_patched_with_what_is_written(done, folder):
    """The answers logged for a method are those of `vtc.patch` with the method logged."""
    from transformers import AutoProcessor, LlavaForConditionalGeneration

    from tests.eval.evalkit import QUESTION, picture

    cell = _cell(done["results"], "fastv", 4)
    text = (done["out"] / "cells" / f"{cell['key']}.jsonl").read_text()
    logged = json.loads(text.splitlines()[3])["answer"]
    model = LlavaForConditionalGeneration.from_pretrained(folder).eval()
    processor = AutoProcessor.from_pretrained(folder)
    prompt = f"<image> {QUESTION}\nAnswer the question using a single word or phrase. answer "
    inputs = processor(images=[picture(3)], text=[prompt], return_tensors="pt")
    with vtc.patch(model, cell["method"]):
        out = model.generate(
            **inputs, max_new_tokens=16, do_sample=False, pad_token_id=3, eos_token_id=3
        )
    new = out[0, inputs["input_ids"].shape[1] :]
    assert processor.decode(new, skip_special_tokens=True).strip() == logged
    assert logged != _right_answers(folder)[3]


# ---- resuming -----------------------------------------------------------------------------------
def test_finished_cells_are_not_run_again(done, monkeypatch, tmp_path):
    out = tmp_path / "copy"
    shutil.copytree(done["out"], out)
    settings = Settings(**{**vars(done["settings"]), "out": out})
    log = Log()
    with monkeypatch.context() as patched:
        patched.setattr(runner, "load", lambda *a, **k: pytest.fail("the model was loaded"))
        assert run(settings, log) == done["results"] | {
            "settings": done["results"]["settings"] | {"out": str(out)}
        }
    assert (log.plans, log.cells) == ([(0, 6, 6)], [])
    # One cell without its samples (killed between the two files) is run again, and only that one.
    (out / "cells" / f"{_cell(done['results'], 'random', 4)['key']}.jsonl").unlink()
    again = run(settings, log := Log())
    assert (log.plans, log.cells) == ([(ROWS, 6, 5)], ["random"])
    assert _cell(again, "random", 4)["score"] == _cell(done["results"], "random", 4)["score"]


def test_a_killed_run_goes_on_where_it_was(folder, tmp_path):
    class Killer(Log):
        def advanced(self, samples: int) -> None:
            super().advanced(samples)
            if self.samples == 2 + 1:  # in the middle of the second cell
                raise KeyboardInterrupt

    settings = Settings(
        out=tmp_path, model=str(folder), methods=("full", "random"), keeps=(4,), limit=2,
        baselines=False,
    )  # fmt: skip
    with pytest.raises(KeyboardInterrupt):
        run(settings, Killer())
    assert len(list((tmp_path / "cells").glob("*.json"))) == 1
    results = run(settings, log := Log())
    assert log.plans == [(2, 2, 1)]
    assert log.cells == ["random"]
    assert [c["status"] for c in results["cells"]] == ["done", "done"]


def test_the_key_is_of_all_that_matters():
    cell = Cell("random", 4, "vtc_scenes", vtc.make("random", keep=4))
    context = {"model": "a", "limit": 2, "seed": 0, "dtype": "float32", "data": "d"}
    key = cell.key(context)
    assert key == cell.key(dict(reversed(context.items())))
    others = [cell.key({**context, name: "other"}) for name in context]
    others += [
        Cell("random", 5, "vtc_scenes", vtc.make("random", keep=5)).key(context),
        Cell("random", 4, "vtc_photo", vtc.make("random", keep=4)).key(context),
        Cell("random", 4, "vtc_scenes", vtc.make("random", keep=4), blind=True).key(context),
    ]
    assert len({key, *others}) == 1 + len(others)


def test_a_models_fingerprint_is_of_its_weights(tmp_path):
    first, same = save_model(tmp_path / "a"), save_model(tmp_path / "b")
    other = save_model(tmp_path / "c", seed=1)
    assert fingerprint(first) == fingerprint(same)
    assert fingerprint(first) != fingerprint(other)


# ---- failures -----------------------------------------------------------------------------------
def test_a_failing_cell_is_marked_and_the_others_go_on(folder, tmp_path):
    settings = Settings(
        out=tmp_path, model=str(folder), methods=("fastv:layer=8", "random"), keeps=(4,), limit=2,
        baselines=False,
    )  # fmt: skip
    results = run(settings)
    broken, good = results["cells"]
    assert (broken["status"], good["status"]) == ("failed", "done")
    assert "layer" in broken["error"]
    assert broken["key"] not in {p.stem for p in (tmp_path / "cells").iterdir()}
    shown = _print(table(results))
    assert "failed" in shown
    assert broken["error"][:40] in shown.replace("\n", " ")
    # It is tried again, as it did not finish.
    run(settings, log := Log())
    assert log.plans == [(2, 2, 1)]


@pytest.mark.parametrize(
    ("changes", "option", "message"),
    [
        ({"methods": ("fastvv",)}, "--methods", "unknown name 'fastvv'"),
        ({"methods": ("fastv:depth=3",)}, "--methods", "depth: fastv has no such setting"),
        ({"methods": ("fastv:layer",)}, "--methods", "setting=value"),
        ({"methods": ()}, "--methods", "at least one"),
        ({"keeps": (1.5,)}, "--keep", "fraction"),
        ({"keeps": ()}, "--keep", "random"),
        ({"tasks": ()}, "--tasks", "at least one"),
        ({"limit": 0}, "--limit", "at least 1"),
        ({"batch_size": 0}, "--batch-size", "at least 1"),
        ({"dtype": "int8"}, "--dtype", "bfloat16"),
        ({"seed": -1}, "--seed", "at least 0"),
    ],
)
def test_bad_settings_are_named(changes, option, message, tmp_path):
    given = {"out": tmp_path / "none", "methods": ("random",), **changes}
    with pytest.raises(BadInput, match=message) as error:
        run(Settings(**given))
    assert error.value.option == option
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("./nowhere", "no folder"),
        ("nobody/nothing", "hf download nobody/nothing"),
    ],
)
def test_a_missing_model_is_named(model, message, tmp_path):
    with pytest.raises(BadInput, match=message) as error:
        run(Settings(out=tmp_path, model=model))
    assert error.value.option == "--model"


def test_a_batch_that_lmms_eval_cannot_take_is_named(folder, tmp_path):
    with pytest.raises(BadInput, match="llava_hf takes 1 only") as error:
        run(Settings(out=tmp_path, model=str(folder), batch_size=2))
    assert error.value.option == "--batch-size"


@pytest.mark.usefixtures("_indexed_once")
def test_an_unknown_task_is_named(folder, tmp_path):
    with pytest.raises(BadInput, match="did you mean pope") as error:
        run(Settings(out=tmp_path, model=str(folder), tasks=("popee",)))
    assert error.value.option == "--tasks"


@pytest.mark.usefixtures("_indexed_once")
def test_a_task_like_no_other_gets_what_is_known(folder, tmp_path):
    with pytest.raises(BadInput, match=r"no task 'qqqqq'; known are vtc_scenes, .* lmms-eval"):
        run(Settings(out=tmp_path, model=str(folder), tasks=("qqqqq",)))


@pytest.mark.usefixtures("_indexed_once")
def test_missing_data_of_a_task_is_named(folder, tmp_path, monkeypatch):
    monkeypatch.setenv("LMMS_EVAL_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("tenacity.nap.time.sleep", lambda seconds: None)  # between its retries
    with pytest.raises(BadInput, match="hf download --repo-type dataset lmms-lab") as error:
        run(Settings(out=tmp_path, model=str(folder), tasks=("pope",)))
    assert error.value.option == "--tasks"


def test_being_offline_ends_with_the_run(folder, tmp_path):
    import datasets.config
    import huggingface_hub.constants

    before = huggingface_hub.constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE
    with offline(True):
        assert huggingface_hub.constants.HF_HUB_OFFLINE
        assert datasets.config.HF_HUB_OFFLINE
    assert before == (huggingface_hub.constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE)


# ---- planning and parts -------------------------------------------------------------------------
def test_the_plan_has_the_honest_ones_once(tmp_path):
    cells = plan(Settings(out=tmp_path, methods=("todre", "random", "full"), keeps=(0.5, 4)))
    found = [(c.label, c.keep) for c in cells]
    assert found == [
        ("full", None), ("blind", None), ("random", 0.5), ("random", 4), ("pool", 0.5), ("pool", 4),
        ("downsample", 0.5), ("downsample", 4), ("todre", 0.5), ("todre", 4),
    ]  # fmt: skip
    assert [c.blind for c in cells] == [False, True] + [False] * 8


def test_the_seed_reaches_methods_that_sample(tmp_path):
    methods = ("random", "random:seed=9")
    cells = plan(Settings(out=tmp_path, methods=methods, seed=3, baselines=False, keeps=(4,)))
    assert [c.method.to_dict()["seed"] for c in cells] == [3, 9]


def test_a_composition_gives_keep_to_its_first_method(tmp_path):
    settings = Settings(
        out=tmp_path, methods=("todre|fastv:layer=3:keep=7",), keeps=(0.5,), baselines=False
    )
    (cell,) = plan(settings)
    first, second = cell.method.parts
    assert (first.name, first.keep) == ("todre", 0.5)
    assert (second.name, second.keep, second.layer) == ("fastv", 7, 3)


def test_the_written_suite_is_whole_or_absent(tmp_path, monkeypatch):
    first = write_task("vtc_scenes", tmp_path, limit=2).read_bytes()

    def broken(name, out_dir, limit=None, seed=0):
        (Path(out_dir) / "half").write_bytes(b"half")
        raise RuntimeError("out of luck")

    monkeypatch.setattr("vtc.eval.tasks.parquet.build_task", broken)
    assert write_task("vtc_scenes", tmp_path, limit=2).read_bytes() == first  # kept as it is
    with pytest.raises(RuntimeError, match="out of luck"):
        write_task("vtc_photo", tmp_path)
    assert not (tmp_path / "vtc_photo.parquet").exists()
    with pytest.raises(ValueError, match="vtc_scenes"):
        write_task("pope", tmp_path)


# ---- statistics and table -----------------------------------------------------------------------
def test_wilson_against_published_values():
    # Newcombe 1998 (Statistics in Medicine 17), table I, method 3.
    assert stats.wilson(81, 263) == pytest.approx((0.2553, 0.3662), abs=5e-5)
    assert stats.wilson(15, 148) == pytest.approx((0.0624, 0.1605), abs=5e-5)
    assert stats.wilson(0, 20) == pytest.approx((0.0, 0.1611), abs=5e-5)
    assert stats.wilson(1, 29) == pytest.approx((0.0061, 0.1718), abs=5e-5)
    for n in (1, 7, 400):
        assert stats.wilson(0, n)[0] == 0.0
        assert stats.wilson(n, n)[1] == 1.0
    with pytest.raises(ValueError, match="correct"):
        stats.wilson(3, 2)


def test_the_bootstrap_is_that_of_the_mean():
    import numpy as np

    scores = np.random.default_rng(0).random(400)
    low, high = stats.interval(list(scores))
    half = 1.96 * scores.std() / 20
    assert (low, high) == pytest.approx((scores.mean() - half, scores.mean() + half), abs=0.004)
    assert stats.interval([0.0, 1.0, 1.0]) == stats.wilson(2, 3)
    with pytest.raises(ValueError, match="at least one"):
        stats.interval([])


def test_agreement_and_scores_of_samples():
    assert stats.agreement({"1": "Red ", "2": "two"}, {"1": "red", "2": "three"}) == 0.5
    assert stats.agreement({"1": "a"}, {"2": "a"}) is None
    assert stats.sample_score({"question_id": 3, "score": 1.0}) == 1.0
    assert stats.sample_score(True) == 1.0
    assert stats.sample_score("yes") is None
    assert stats.sample_score(float("nan")) is None


def test_hard_samples_are_those_that_need_the_tokens(tmp_path):
    """VTC-Bench: right with all tokens, wrong with a smaller image of the same budget."""
    (tmp_path / "cells").mkdir()
    scores = {
        ("full", None): [1, 1, 1, 1, 0], ("downsample", 4): [0, 0, 0, 1, 0],
        ("downsample", 9): [1, 1, 1, 1, 1], ("todre", 4): [1, 0, 1, 0, 0],
        ("todre", 9): [1, 1, 1, 1, 0],
    }  # fmt: skip
    cells = []
    for (label, keep), values in scores.items():
        key = f"{label}-{keep}"
        lines = [
            json.dumps({"id": f"t/{i}", "answer": "a" if v else f"{label}{i}", "score": v})
            for i, v in enumerate(values)
        ]
        (tmp_path / "cells" / f"{key}.jsonl").write_text("\n".join(lines))
        cells.append({"key": key, "label": label, "keep": keep, "task": "t", "status": "done",
                      "interval": [0, 1]})  # fmt: skip
    compare(tmp_path, cells)
    found = {(c["label"], c["keep"]): (c["hard"], c["loyalty"]) for c in cells}
    assert found["todre", 4] == ({"samples": 3, "score": 2 / 3}, 2 / 5)
    assert found["todre", 9] == ({"samples": 0, "score": None}, 4 / 5)
    assert found["downsample", 4] == ({"samples": 3, "score": 0.0}, 1 / 5)
    assert found["full", None] == (None, 1.0)


def test_a_metric_that_is_no_mean_has_no_interval():
    """MME's score is a sum over categories: the samples' mean says nothing of its interval."""
    config = {"metric_list": [{"metric": "mme_perception_score"}]}
    logged = [
        {"doc_id": i, "doc": {"category": "count"}, "target": "yes", "filtered_resps": ["yes"],
         "mme_perception_score": {"score": 1.0}} for i in range(2)
    ]  # fmt: skip
    found = {
        "configs": {"mme": config},
        "samples": {"mme": logged},
        "results": {"mme": {"mme_perception_score,none": 200.0}},
    }
    samples = list(samples_of(found, "mme"))
    scores = scores_of(found, "mme", samples)
    assert (scores["score"], scores["interval"], scores["by_type"]) == (200.0, None, {})
    assert samples[0]["type"] == "count"


def _print(renderable: Any) -> str:
    console = Console(width=120, highlight=False, file=None, record=True, quiet=False)
    with console.capture() as captured:
        console.print(renderable)
    return captured.get()


def test_the_table_fits_and_names_its_units(done):
    text = _print(table(done["results"]))
    assert max(len(line.rstrip()) for line in text.splitlines()) <= 120
    for wanted in ("GFLOPs", "ms", "%", "66.7", "36×2 4×6", "blind", "100.0"):
        assert wanted in text


@pytest.mark.parametrize("width", [80, 100])
def test_the_table_fits_a_narrow_terminal_without_breaking_numbers(done, width):
    console = Console(width=width, highlight=False)
    long = {
        **_cell(done["results"], "fastv", 4),
        "label": "random:keep=0.5|fastv:layer=3:rank=last",
    }
    results = {**done["results"], "cells": [*done["results"]["cells"], long]}
    with console.capture() as captured:
        console.print(table(results, width))
    lines = captured.get().splitlines()
    assert max(len(line.rstrip()) for line in lines) <= width
    full = next(line.split() for line in lines if line.startswith("full"))
    assert full[:3] == ["full", "–", "66.7"]
    assert full[-3:-1] == ["100.0", "36.0"]
    start = next(i for i, line in enumerate(lines) if line.startswith("random:keep=0.5|"))
    assert lines[start + 1].split() == [":layer=3:rank=last"]
    assert "--wide" in captured.get()


# ---- several runs in one folder -----------------------------------------------------------------
def test_runs_in_one_folder_accumulate(folder, tmp_path):
    def started(*methods: str, **changed: Any) -> dict[str, Any]:
        given = {"out": tmp_path, "model": str(folder), "baselines": False, "limit": 2, **changed}
        return run(Settings(methods=methods, keeps=(4,), **given))

    def named(results: dict[str, Any]) -> list[tuple[str, int]]:
        return [(c["label"], c["setup"]["limit"]) for c in results["cells"]]

    started("full", "random")
    second = started("fastv", "fastv:layer=8")  # one that fails
    assert named(second) == [("fastv", 2), ("fastv:layer=8", 2), ("full", 2), ("random", 2)]
    assert json.loads((tmp_path / "results.json").read_text()) == second
    with (tmp_path / "results.csv").open() as file:
        assert [row["label"] for row in csv.DictReader(file)] == [n for n, _ in named(second)]
    # Compared with the full model of the run before.
    assert _cell(second, "fastv", 4)["loyalty"] is not None
    # Another number of samples stands beside, and is compared with none of them.
    third = started("random", limit=3)
    assert named(third) == [("random", 3), *[n for n in named(third) if n[1] == 2]]
    assert len(named(third)) == 5
    assert third["cells"][0]["loyalty"] is None
    text = _print(table(third))
    assert "vtc_scenes · limit 3 · 3 samples" in text
    assert "4 cells of other tasks and settings" in text
    assert of_this_run(third) == third["cells"][:1]


def test_cells_of_other_code_are_left_out_and_counted(folder, tmp_path, monkeypatch):
    settings = Settings(
        out=tmp_path, model=str(folder), methods=("random",), keeps=(4,), limit=1, baselines=False
    )
    first = run(settings)
    monkeypatch.setattr(runner, "shared_code", lambda: "other")
    second = run(settings)
    assert [c["key"] for c in second["cells"]] != [c["key"] for c in first["cells"]]
    assert (len(second["cells"]), second["superseded"]) == (1, 1)
    assert "1 cells of other code or versions are left out" in _print(table(second))


def test_runs_of_layers():
    assert runs([576, 576, 144.2, 143.8, 10]) == "576×2 144×2 10×1"


# ---- several processes --------------------------------------------------------------------------
@pytest.mark.slow
def test_two_processes_score_what_one_does(tmp_path: Path) -> None:
    """An odd number of samples, so that one process has one more than the other."""
    found = {}
    for processes in (1, 2):
        out = tmp_path / str(processes)
        command = [
            sys.executable, "-m", "vtc.cli", "eval", "--methods", "divprune", "--keep", "0.1",
            "--tasks", "vtc_scenes", "--limit", "5", "--no-baselines", "--no-page",
            "--out", str(out), "--processes", str(processes),
        ]  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=600)
        assert done.returncode == 0, done.stderr[-2000:]
        found[processes] = json.loads((out / "results.json").read_text())["cells"]
    assert len(found[1]) == len(found[2]) == 1
    for one, two in zip(found[1], found[2], strict=True):
        for name in ("label", "score", "interval", "tokens", "flops", "kv_bytes", "samples"):
            assert one[name] == two[name]
