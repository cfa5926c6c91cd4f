# SPDX-License-Identifier: Apache-2.0
"""`vtc bench`: what is run, in which order, what comes out, and what is refused. No timings."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import platform
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from rich.console import Console
from vtc.eval import bench
from vtc.eval.bench import PRESETS, Settings, plan, run, table
from vtc.eval.bench.model import build, config_of
from vtc.eval.bench.rows import median_interval
from vtc.eval.bench.short import cache_of
from vtc.eval.bench.subject import Subject, clock_of, host_clock
from vtc.eval.harness.run import BadInput, Observer

import vtc
from vtc.core.prefill import Stopwatch
from vtc.core.registry import _REGISTRY
from vtc.cost import decode_flops, prefill_flops

TEXT, TOKENS, LAYERS = 12, 36, 4
SMALL: dict[str, Any] = {
    "config": "tiny",
    "methods": ("divprune", "random", "fastv:layer=2"),
    "keeps": (4,),
    "batches": (1, 2),
    "text": TEXT,
    "decode": 2,
    "warmup": 1,
    "repeats": 2,
}


class Watch(Observer):
    """What a run said while it ran."""

    def __init__(self) -> None:
        self.total = self.done = 0
        self.rows: list[Any] = []

    def planned(self, total: int, cells: int, finished: int) -> None:
        self.total = total

    def advanced(self, samples: int) -> None:
        self.done += samples

    def finished(self, cell: Any) -> None:
        self.rows.append(cell)


@pytest.fixture(scope="module")
def watched(tmp_path_factory) -> tuple[dict[str, Any], Path, list[tuple[int, str]], Watch]:
    """One small run: its results, its folder, its runs as (batch, label) in order, its progress."""
    out, watch = tmp_path_factory.mktemp("bench"), Watch()
    ran: list[tuple[int, str]] = []
    once = Subject.once

    def spy(self, variant):
        ran.append((self.batch, variant.label))
        return once(self, variant)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(Subject, "once", spy)
        results = run(Settings(out=out, **SMALL), watch)
    return results, out, ran, watch


def rows_of(results, batch: int) -> dict[str, Any]:
    """The rows of a batch size by label; "short" has the tokens of its layers behind it."""
    found = {}
    for row in results["rows"]:
        if row["batch"] == batch:
            lengths = "/".join(f"{x:g}" for x in sorted(set(row["tokens"]["per_layer"])))
            found[row["label"] + (f" {lengths}" if row["label"] == "short" else "")] = row
    return found


# ---- what is run --------------------------------------------------------------------------------
def test_variants_take_turns_in_one_order(watched):
    results, _, ran, _ = watched
    # Methods with equal lengths stand beside one short sequence of these lengths.
    turn = ["unpatched", "divprune", "random", "short", "fastv:layer=2", "short"]
    first = ["unpatched", "divprune", "random", "fastv:layer=2", "short", "short"]
    for batch in (1, 2):
        labels = [label for of, label in ran if of == batch]
        # What lengths methods leave is known after the first turn, which warms up; the last
        # is for the memory.
        assert labels == first + turn * 3
        assert [row["label"] for row in results["rows"] if row["batch"] == batch] == turn


def test_turns_that_warm_up_do_not_count(watched):
    for row in watched[0]["rows"]:
        for name in ("total", "vision", "selector", "lm", "prefill", "decode"):
            assert len(row["ms"][name]["runs"]) == SMALL["repeats"]


def test_progress_comes_to_its_end(watched):
    results, _, _, watch = watched
    assert watch.done == watch.total > 0
    assert [row["label"] for row in watch.rows] == [row["label"] for row in results["rows"]]


def test_short_is_given_what_methods_leave(watched):
    for batch in (1, 2):
        rows = rows_of(watched[0], batch)
        assert rows["unpatched"]["tokens"]["per_layer"] == [TOKENS] * LAYERS
        assert rows["divprune"]["tokens"]["per_layer"] == [4] * LAYERS
        assert rows["short 4"]["tokens"]["per_layer"] == [4] * LAYERS
        assert rows["fastv:layer=2"]["tokens"]["per_layer"] == [TOKENS, TOKENS, 4, 4]
        assert rows["short 4/36"]["tokens"]["per_layer"] == [TOKENS, TOKENS, 4, 4]
        assert rows["divprune"]["tokens"]["in"] == TOKENS


@pytest.fixture
def subject():
    settings = Settings(**SMALL)
    config, image = config_of(settings)
    model = build(config, settings, torch.float32, torch.device("cpu"))
    made = Subject(model, image, 2, settings)
    yield made
    made.close()


@pytest.mark.parametrize("lengths", [(16,) * 4, (48, 48, 16, 16), (30, 20, 20, 12)])
def test_short_really_computes_on_so_many_tokens(subject, lengths):
    seen, held = [], []
    layers = subject.adapter.layers
    handles = [
        layer.mlp.register_forward_pre_hook(lambda _, args: seen.append(args[0].shape[:2]))
        for layer in layers
    ]
    handles.append(subject.model.register_forward_hook(lambda *a: held.append(cache_of(a[2]))))
    subject.once(bench.Variant("short", lengths=lengths))
    for handle in handles:
        handle.remove()
    assert seen[: len(layers)] == [(2, n) for n in lengths]
    assert seen[len(layers) :] == [(2, 1)] * (2 * len(layers))
    cached = [layer.get_seq_length() for layer in held[-1].layers]
    assert cached == [n + SMALL["decode"] for n in lengths]
    # It leaves no trace: the plain model sees everything again.
    assert subject.tower.keep is None
    assert not any(layer._forward_pre_hooks for layer in layers)


def test_short_agrees_with_a_method_that_keeps_the_same_tokens(subject):
    """The plain model on the first k features is what vtc makes of them at contiguous positions:
    the yardstick computes the same, so that only overhead is between the two."""

    class First(vtc.Method):
        name, positions = "bench_first", "contiguous"

        def select(self, tokens):
            return vtc.Selection(torch.arange(5))

    outs = []
    keep = subject.model.register_forward_hook(lambda *a: outs.append(a[2].logits[:, -1]))
    try:
        subject.once(bench.Variant("short", lengths=(TEXT + 5,) * LAYERS))
        subject.once(bench.Variant("first", method=dataclasses.dataclass(frozen=True)(First)()))
        subject.once(bench.Variant("unpatched"))
    finally:
        keep.remove()
        del _REGISTRY["bench_first"]  # no other test is to find it
    steps = 1 + SMALL["decode"]
    short, method, plain = outs[:steps], outs[steps : 2 * steps], outs[2 * steps :]
    for mine, theirs, whole in zip(short, method, plain, strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-5, rtol=1e-5)
        assert not torch.allclose(mine, whole, atol=1e-3)


def test_model_is_as_it_was(subject):
    base = subject.adapter.base
    subject.once(bench.Variant("divprune", 4, vtc.make("divprune", keep=4)))
    assert vars(base)["get_image_features"] is subject.tower
    subject.close()
    assert "get_image_features" not in vars(base)
    vars(base)["get_image_features"] = subject.tower  # for the fixture's own close


@pytest.mark.parametrize("kind", ["llava_next", "qwen2_vl"])
def test_other_families(kind, tmp_path):
    preset = next(p for p in PRESETS.values() if p.kind == kind)
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    text = {**preset.text, **{k: v for k, v in PRESETS["tiny"].text.items() if k != "model_type"}}
    vision = dict(PRESETS["tiny"].vision)
    extra: dict[str, Any] = {"image_grid_pinpoints": [[168, 168]], "image_token_index": 500}
    if kind == "qwen2_vl":
        text["rope_parameters"] = {**text["rope_parameters"], "mrope_section": [2, 3, 3]}
        vision = {"depth": 2, "embed_dim": 32, "num_heads": 2, "hidden_size": 64}
        extra = {"image_token_id": 500}
    config: Any = CONFIG_MAPPING[kind]
    config(text_config=text, vision_config=vision, **extra).save_pretrained(tmp_path)
    image = None if kind == "llava_next" else (112, 168)
    given = {**SMALL, "config": str(tmp_path), "batches": (2,), "image": image}
    results = run(Settings(**given))
    assert [row["error"] for row in results["rows"]] == [None] * len(results["rows"])
    rows = rows_of(results, 2)
    # Thumbnail, four tiles and a newline a row; or a quarter of 8 x 12 patches.
    whole = 36 + 4 * 36 + 12 if kind == "llava_next" else 24
    assert rows["unpatched"]["tokens"]["per_layer"] == [whole] * LAYERS
    # A family may keep separators beside the four tokens; `short` is given as many.
    left = rows["divprune"]["tokens"]["per_layer"]
    assert 4 <= left[0] < whole
    assert left in [
        row["tokens"]["per_layer"] for row in results["rows"] if row["label"] == "short"
    ]
    assert results["model"]["id"] == tmp_path.name


# ---- what comes out -----------------------------------------------------------------------------
def test_parts_add_up(watched):
    for row in watched[0]["rows"]:
        ms = {name: figure["runs"] for name, figure in row["ms"].items() if figure}
        for i in range(SMALL["repeats"]):
            assert ms["total"][i] == pytest.approx(ms["vision"][i] + ms["prefill"][i])
            assert ms["prefill"][i] == pytest.approx(ms["selector"][i] + ms["lm"][i])
            assert min(ms[name][i] for name in ("vision", "lm", "decode")) > 0
            assert (ms["selector"][i] > 0) == (row["method"] is not None)
        for figure in filter(None, row["ms"].values()):
            assert figure["q1"] <= figure["median"] <= figure["q3"]


def test_ratios_are_of_runs_in_the_same_turn(watched):
    for batch in (1, 2):
        rows = rows_of(watched[0], batch)
        plain = rows["unpatched"]
        for label, short in (("divprune", "short 4"), ("fastv:layer=2", "short 4/36")):
            for other, name in ((plain, "unpatched"), (rows[short], "short")):
                # Steps of decoding are compared one by one, with those of the short sequence.
                parts = (
                    ("prefill", "total", "decode") if name == "unpatched" else ("prefill", "total")
                )
                for part in parts:
                    mine = rows[label]["ms"][part]["runs"]
                    pairs = zip(mine, other["ms"][part]["runs"], strict=True)
                    want = [a / b for a, b in pairs]
                    assert rows[label]["ratio"][name][part]["runs"] == pytest.approx(want)
        assert rows["divprune"]["ratio"]["short"]["beyond"] is None
        assert rows["divprune"]["ms"]["after"] is None
        after = [rows[label]["ms"]["after"]["runs"] for label in ("fastv:layer=2", "short 4/36")]
        want = [a / b for a, b in zip(*after, strict=True)]
        assert rows["fastv:layer=2"]["ratio"]["short"]["beyond"]["runs"] == pytest.approx(want)
        for label in ("fastv:layer=2", "short 4/36"):
            ms = rows[label]["ms"]
            for i, part in enumerate(ms["after"]["runs"]):
                chosen = ms["selector"]["runs"][i]
                assert chosen < part < ms["prefill"]["runs"][i] + chosen
        assert plain["ratio"]["short"] is None
        assert plain["ratio"]["unpatched"]["prefill"]["median"] == 1


def test_ideal_is_what_the_flops_say(watched):
    config, _ = config_of(Settings(**SMALL))
    for batch in (1, 2):
        rows = rows_of(watched[0], batch)
        for label, tokens in (("divprune", [4] * 4), ("fastv:layer=2", [TOKENS, TOKENS, 4, 4])):
            row, lengths = rows[label], [TEXT + n for n in tokens]
            assert row["flops"]["prefill"] == batch * prefill_flops(config, lengths).lm
            assert row["flops"]["decode"] == batch * decode_flops(config, lengths)
            share = row["flops"]["prefill"] / rows["unpatched"]["flops"]["prefill"]
            for mine, whole, ratio in zip(
                row["ms"]["prefill"]["runs"],
                rows["unpatched"]["ms"]["prefill"]["runs"],
                row["ratio"]["ideal"]["prefill"]["runs"],
                strict=True,
            ):
                assert ratio == pytest.approx(mine / (whole * share))


def test_peak_grows_with_tokens_and_rows(watched):
    one, two = (rows_of(watched[0], batch) for batch in (1, 2))
    assert 0 < one["short 4"]["peak_bytes"] < one["unpatched"]["peak_bytes"]
    assert one["unpatched"]["peak_bytes"] < two["unpatched"]["peak_bytes"]
    # Keys and values of all layers are held at the end, whatever else there was.
    for row in (*one.values(), *two.values()):
        assert row["peak_bytes"] > row["kv_bytes"] > 0


def test_peak_sees_what_is_freed_again(subject, monkeypatch):
    """A buffer that lives for a moment counts, one that was freed before another does not."""

    def once(variant):
        for _ in range(3):
            torch.empty(1 << 20, dtype=torch.uint8).fill_(1)

    monkeypatch.setattr(subject, "once", once)
    assert 1 << 20 <= subject.peak(bench.Variant("buffers")) < 2 << 20


def test_json_says_where_it_was_measured(watched):
    results, out, _, _ = watched
    assert json.loads((out / "bench.json").read_text("utf-8")) == results
    assert results["format"] == 1
    assert set(results) == {
        "format", "complete", "settings", "model", "versions", "warnings", "machine", "rows",
    }  # fmt: skip
    assert results["settings"]["seed"] == 0
    assert results["settings"]["image"] == [84, 84]
    assert "out" not in results["settings"]
    assert results["versions"] == {
        "vtc": vtc.__version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
    }
    assert results["machine"]["threads"] == torch.get_num_threads()
    assert results["machine"]["device"] == "cpu"
    assert results["machine"]["gpu"] is None
    assert set(results["machine"]["load_average"]) == {"before", "after"}
    assert results["model"]["weights"] == "random"
    assert results["model"]["layers"] == LAYERS


def test_csv_has_one_line_a_row(watched):
    results, out, _, _ = watched
    with (out / "bench.csv").open(encoding="utf-8") as file:
        lines = list(csv.DictReader(file))
    assert len(lines) == len(results["rows"])
    for line, row in zip(lines, results["rows"], strict=True):
        assert line["label"] == row["label"]
        assert float(line["prefill_ms"]) == row["ms"]["prefill"]["median"]
        assert float(line["prefill_ms_q1"]) == row["ms"]["prefill"]["q1"]
        assert float(line["tokens"]) == row["tokens"]["equivalent"]
        if row["ratio"]["short"] is None:
            assert line["decode_to_short"] == ""
        else:
            assert float(line["decode_to_short"]) == row["ratio"]["short"]["decode"]["median"]
    assert lines[4]["tokens_per_layer"] == "36×2 4×2"


def test_table_shows_all_rows(watched):
    results = watched[0]
    console = Console(width=120, record=True, file=io.StringIO())
    console.print(table(results))
    text = console.export_text()
    assert max(len(line.rstrip()) for line in text.splitlines()) <= 120
    for title in ("float32, batch 1", "float32, batch 2"):
        assert title in text
    assert text.count("\nshort ") == 4
    assert text.count("MiB") == 2  # the last column is not cut off
    ratio = results["rows"][1]["ratio"]["short"]["prefill"]["median"]
    assert f"{ratio:.3f}" in text


@pytest.mark.parametrize("width", [80, 100])
def test_table_fits_a_narrow_terminal(watched, width):
    results = watched[0]
    console = Console(width=width, record=True, file=io.StringIO())
    console.print(table(results, width))
    text = console.export_text()
    assert max(len(line.rstrip()) for line in text.splitlines()) <= width
    for row in results["rows"]:
        assert (
            f"{row['ratio']['short']['prefill']['median']:.3f}" in text if row["method"] else True
        )
    # The legend is of the columns that are there, and says where the others are.
    tables, _, legend = text.partition("prefill: ")
    shown, _, elsewhere = legend.partition("With --wide: ")
    for word in ("beyond", "ideal"):
        assert word not in tables
        assert word not in shown.replace("beyond weights", "")
        assert word in elsewhere
    assert "quartiles" not in shown
    assert not tables.endswith("\n\n\n")


def test_rows_are_saved_and_told_as_they_come(tmp_path):
    """Stopped in the second batch size, what the first gave is there."""
    seen = []

    class Stopping(Observer):
        def measured(self, results):
            seen.append(results)
            saved = json.loads((tmp_path / "bench.json").read_text())
            assert saved["complete"] is False
            assert [r["label"] for r in results["rows"]] == [r["label"] for r in saved["rows"]]
            raise KeyboardInterrupt

    settings = Settings(
        config="tiny", methods=("random",), keeps=(0.5,), batches=(1, 2), text=8, decode=1,
        repeats=2, device="cpu", out=tmp_path,
    )  # fmt: skip
    with pytest.raises(KeyboardInterrupt):
        run(settings, Stopping())
    saved = json.loads((tmp_path / "bench.json").read_text())
    assert {row["batch"] for row in saved["rows"]} == {1}
    assert (tmp_path / "bench.csv").read_text().count("\n") == 1 + len(saved["rows"])
    assert len(seen) == 1
    assert run(settings)["complete"]


def test_weights_and_inputs_follow_the_seed():
    def drawn(seed: int):
        settings = Settings(**{**SMALL, "seed": seed})
        config, image = config_of(settings)
        model = build(config, settings, torch.bfloat16, torch.device("cpu"))
        made = Subject(model, image, 1, settings)
        made.close()
        return model.state_dict(), made.pixels["pixel_values"], made.words

    one, again, other = drawn(0), drawn(0), drawn(1)
    assert all(torch.equal(value, again[0][name]) for name, value in one[0].items())
    assert torch.equal(one[1], again[1])
    assert torch.equal(one[2], again[2])
    assert not torch.equal(one[1], other[1])
    name = "model.language_model.layers.0.mlp.up_proj.weight"
    assert not torch.equal(one[0][name], other[0][name])
    assert one[0][name].dtype == torch.bfloat16
    # No two rows alike, though one block of numbers is laid over all weights.
    assert len(one[0][name].unique(dim=0)) == len(one[0][name])


def test_without_the_plain_model():
    results = run(Settings(**{**SMALL, "batches": (1,), "unpatched": False}))
    assert "unpatched" not in {row["label"] for row in results["rows"]}
    row = rows_of(results, 1)["divprune"]
    assert row["ratio"]["unpatched"] is None
    assert row["ratio"]["ideal"] is None
    assert row["ratio"]["short"]["prefill"]["median"] > 0


def test_threads_are_set_and_put_back():
    before = torch.get_num_threads()
    given = {**SMALL, "batches": (1,), "methods": ("random",), "threads": before + 1}
    results = run(Settings(**given))
    assert results["machine"]["threads"] == before + 1
    assert torch.get_num_threads() == before


# ---- what fails ---------------------------------------------------------------------------------
def test_a_variant_that_fails_is_marked_and_the_others_go_on(monkeypatch):
    once, calls = Subject.once, []

    def fails(self, variant):
        if variant.label == "random":
            calls.append(1)
            raise MemoryError("no room")
        return once(self, variant)

    monkeypatch.setattr(Subject, "once", fails)
    watch = Watch()
    results = run(Settings(**{**SMALL, "batches": (1,)}), watch)
    rows = rows_of_any(results)
    assert rows["random"]["status"] == "failed"
    assert rows["random"]["error"] == "MemoryError: no room"
    assert rows["random"]["ms"] is None
    assert len(calls) == 1
    assert rows["divprune"]["status"] == rows["fastv:layer=2"]["status"] == "done"
    assert watch.done == watch.total
    console = Console(width=120, record=True, file=io.StringIO())
    console.print(table(results))
    assert "failed: float32, batch 1, random: MemoryError: no room" in console.export_text()


def rows_of_any(results) -> dict[str, Any]:
    return {row["label"]: row for row in results["rows"]}


@pytest.mark.parametrize(
    ("given", "option", "message"),
    [
        ({"methods": ()}, "--methods", "at least one"),
        ({"methods": ("nonesuch",)}, "--methods", "unknown name 'nonesuch'"),
        ({"methods": ("fastv:layer=0",)}, "--methods", "layer: expected"),
        ({"keeps": ()}, "--keep", "expected a value for divprune"),
        ({"keeps": (1.5,)}, "--keep", r"must lie in \(0, 1\]"),
        ({"batches": ()}, "--batch", "at least one"),
        ({"batches": (0,)}, "--batch", "at least 1, got 0"),
        ({"dtypes": ("int8",)}, "--dtype", "float32, bfloat16, float16, got 'int8'"),
        ({"layers": 0}, "--layers", "at least 1, got 0"),
        ({"decode": 0}, "--decode", "at least 1, got 0"),
        ({"warmup": 0}, "--warmup", "at least 1, got 0"),
        ({"repeats": 1}, "--repeats", "at least 2, got 1"),
        ({"threads": 0}, "--threads", "at least 1, got 0"),
        ({"text": 3}, "--text", "at least 4, got 3"),
        ({"seed": -1}, "--seed", "at least 0, got -1"),
        ({"image": (0, 84)}, "--image", "height x width"),
        ({"pretrained": True}, "--pretrained", "needs a checkpoint"),
    ],
)
def test_bad_settings_are_refused(given, option, message):
    with pytest.raises(BadInput, match=message) as error:
        plan(Settings(**{**SMALL, **given}))
    assert error.value.option == option


@pytest.mark.parametrize(
    ("given", "option", "message"),
    [
        ({"config": "nonesuch"}, "--config", "no folder or preset nonesuch; presets are tiny"),
        ({"config": "./nonesuch"}, "--config", "no folder or preset ./nonesuch"),
        ({"device": "nonesuch"}, "--device", "expected cpu, cuda or cuda:0"),
        ({"device": "meta"}, "--device", "expected cpu or cuda"),
        ({"image": (85, 84)}, "--image", "multiples of 14"),
        ({"methods": ("fastv:layer=9",)}, "--methods", "fastv:layer=9: layer: expected a layer"),
    ],
)
def test_bad_input_is_refused_before_anything_is_measured(given, option, message, monkeypatch):
    monkeypatch.setattr(Subject, "once", lambda *_: pytest.fail("measured something"))
    with pytest.raises(BadInput, match=message) as error:
        run(Settings(**{**SMALL, **given}))
    assert error.value.option == option


def test_a_configuration_that_is_no_vlm_is_refused(tmp_path):
    from transformers import LlamaConfig

    LlamaConfig(num_hidden_layers=1).save_pretrained(tmp_path)
    with pytest.raises(BadInput, match="has the type 'llama'; inputs can be made for llava"):
        run(Settings(**{**SMALL, "config": str(tmp_path)}))


def test_out_that_is_a_file_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(BadInput) as error:
        run(Settings(**{**SMALL, "out": tmp_path / "file"}))
    assert error.value.option == "--out"


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_presets_are_of_the_size_they_are_named_for(name):
    config, image = config_of(Settings(config=name))
    from transformers import AutoModelForImageTextToText

    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(config)
    billions = sum(p.numel() for p in model.parameters()) / 1e9
    expected = {
        "tiny": 0.0003, "speed-bar": 0.276, "llava-1.5-7b": 7.06, "llava-1.5-13b": 13.35,
        "llava-next-vicuna-7b": 7.06, "llava-next-mistral-7b": 7.57, "qwen2-vl-2b": 2.21,
        "qwen2-vl-7b": 8.29,
    }  # fmt: skip
    assert billions == pytest.approx(expected[name], rel=0.01, abs=1e-4)
    if name == "speed-bar":
        assert (image[0] // 14) * (image[1] // 14) == 2880


# ---- the clock, and the interval ----------------------------------------------------------------
@pytest.mark.parametrize(
    ("count", "expected"), [(5, None), (6, (0, 5)), (9, (1, 7)), (30, (9, 20)), (56, (20, 35))]
)
def test_the_medians_interval_is_that_of_the_tables(count: int, expected: Any) -> None:
    """Order statistics of the sign test, as printed in tables of them."""
    assert median_interval([float(i) for i in reversed(range(count))]) == expected


def test_one_thread_on_a_cpu_is_timed_by_the_process() -> None:
    threads = torch.get_num_threads()
    clocks = {}
    for count in (1, 2):
        torch.set_num_threads(count)
        try:
            with host_clock(torch.device("cpu")):
                clocks[count] = Stopwatch.host, clock_of(torch.device("cpu"))
        finally:
            torch.set_num_threads(threads)
    assert clocks == {1: (time.process_time, "process"), 2: (time.perf_counter, "wall")}
    assert Stopwatch.host is time.perf_counter
    assert clock_of(torch.device("cuda")) == "wall"


def test_decoding_is_compared_step_by_step(watched: Any) -> None:
    for row in watched[0]["rows"]:
        if row["label"] in ("divprune", "random"):
            steps = row["ratio"]["short"]["decode"]
            assert len(steps["runs"]) == SMALL["repeats"] * SMALL["decode"]
            assert len(row["ratio"]["short"]["prefill"]["runs"]) == SMALL["repeats"]
