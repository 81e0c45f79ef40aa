"""`minipeft compare` on a tiny model: what the table says is true, and the same seed says it again."""

from __future__ import annotations

import json
from itertools import combinations, pairwise

import pytest
from cli_helpers import jsonl, refused, run, tiny

import minipeft as mp
from minipeft.cli.compare import Questions
from minipeft.cli.data import TaskOptions, encode, longest, split_off
from minipeft.cli.plots import name_points, plot_learning, plot_trade, styled
from minipeft.hub.base import load_base
from minipeft.peft.methods import METHODS
from minipeft.text.datasets import Completion, Document
from minipeft.train.metrics import panels, png


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny(tmp_path_factory.mktemp("models") / "tiny", num_hidden_layers=1)


@pytest.fixture(scope="module")
def comparison(model, tmp_path_factory):
    """(directory, content of compare.json, printed text) of a reduced comparison."""
    output = tmp_path_factory.mktemp("compare")
    with pytest.MonkeyPatch.context() as patch:
        lines: list[str] = []
        patch.setattr("minipeft.train.metrics.png", png)
        patch.setattr("sys.stdout.write", lambda text: lines.append(text) or len(text))
        assert run("compare", "--reduced", "--model", model, "--output", output, "--lr", "0.01") == 0
    return output, json.loads((output / "compare.json").read_text()), "".join(lines)


def without_timings(content):
    measured = ("seconds_per_step", "memory_measured", "latency", "latency_merged")
    rows = [{k: v for k, v in row.items() if k not in measured} for row in content["methods"]]
    for row in rows:
        row["seeds"] = [{k: v for k, v in run.items() if k not in measured} for run in row.get("seeds", [])]
    return rows


def test_every_method_has_a_row_after_the_frozen_base(comparison):
    _, content, printed = comparison
    rows = content["methods"]
    assert [row["method"] for row in rows] == ["frozen", *(key for key in METHODS if key != "bitfit")]
    why = "BitFit trains biases, and this model has none; take LN tuning (ln), or a model with biases, such as GPT-2"
    assert content["settings"]["left_out"] == {"bitfit": why} and f"left out: BitFit: {why}" in printed
    for row in rows:
        assert row["title"] in printed and f"{row['trainable']:,}" in printed and f"{row['task_loss']:.3f}" in printed
    assert "reference" in printed


def test_parameters_and_storage_are_those_of_the_formula(comparison, model):
    _, content, _ = comparison
    config = mp.from_pretrained(model)[0].config
    arch = mp.accounting.architecture(config)
    for row in content["methods"]:
        count = mp.accounting.count_parameters(arch, METHODS[row["method"]].config() if row["trainable"] else "frozen")
        assert (row["trainable"], row["parameters"]) == (count.trainable, count.total)
        if row["method"] == "adalora":  # pruned triplets are not kept
            assert 4 * count.stored / 2 < row["storage"] < 4 * count.stored
        else:
            assert row["storage"] == 4 * count.stored


def test_the_ledger_predicts_the_measured_memory(comparison):
    for row in comparison[1]["methods"]:
        assert row["memory_predicted"] == pytest.approx(row["memory_measured"], rel=0.1), row["title"]


def test_training_lowers_the_loss_on_the_task_and_tells_what_was_forgotten(comparison):
    frozen, *trained = comparison[1]["methods"]
    for row in trained:
        assert row["task_loss"] < frozen["task_loss"] and row["seconds_per_step"] > 0
        assert row["forgotten"] == pytest.approx(row["general_loss"] - frozen["general_loss"], abs=1e-6)
        assert [step for step, _ in row["curve"]] == list(range(1, 13))
        assert row["held_out_curve"][-1] == [12, row["task_loss"]]


def test_the_answers_to_held_out_questions_are_judged(comparison):
    content = comparison[1]
    assert content["settings"]["answers"] == 24 and {row["scored"] for row in content["methods"]} == {"right, %"}
    shares = [row["score"] * 24 / 100 for row in content["methods"]]
    assert all(0 <= share <= 24 and share == pytest.approx(round(share)) for share in shares)


def test_answers_of_several_words_are_compared_by_chrf(model, tmp_path, capsys):
    rows = ({"prompt": f"Say: number {i} is good\nAgain:", "completion": f" number {i} is good"} for i in range(30))
    argv = ["compare", "--reduced", "--model", model, "--data", jsonl(tmp_path / "mine.jsonl", rows), "--methods", "prompt"]
    assert run(*argv, "--output", tmp_path / "o") == 0
    assert "3 answers are compared with the expected ones; to copy the question has chrF 100.0" in capsys.readouterr().err
    content = json.loads((tmp_path / "o" / "compare.json").read_text())
    assert all(row["scored"] == "chrF" and 0 <= row["score"] <= 100 for row in content["methods"])


def test_without_sacrebleu_it_is_said_that_no_answers_are_scored(monkeypatch, capsys):
    monkeypatch.setattr("minipeft.cli.compare.find_spec", lambda name: None)
    records = [Completion("Again:", " word")]
    data = encode(records, records, load_base()[1], 80, on_overflow="drop")
    assert Questions.of(TaskOptions(data="mine.jsonl"), data, load_base()[1], 24, 80) is None
    assert "no answers are scored: chrF needs sacreBLEU (pip install 'minipeft[hub]')" in capsys.readouterr().err
    assert Questions.of(TaskOptions(task="source"), data, load_base()[1], 24, 80), "of a choice the share of right ones needs nothing"


def test_what_a_constant_answer_scores():
    asked = [Completion("Again:", word) for word in (" a", " b", " b", " c")]
    assert Questions(asked, None, 1, True).baseline() == "to answer 'b' always is right in 50 %"


def test_what_is_asked_was_held_out_and_fits_with_an_answer():
    _, tokenizer = load_base()
    short, dropped, long = (Completion("word " * n + "again:", " word") for n in (1, 300, 70))
    wordy = Completion("Again:", " word" * 20)
    data = encode([short], [short, dropped, long, wordy], tokenizer, 80, on_overflow="drop")
    assert data.held_out_records == [short, long, wordy] and len(data.held_out) == 3
    mine = TaskOptions(data="mine.jsonl")
    assert Questions.of(mine, data, tokenizer, 24, 100).records == [short, long, wordy]
    assert Questions.of(mine, data, tokenizer, 24, 80).records == [short, wordy], "no room for the longest answer"
    assert Questions.of(mine, data, tokenizer, 1, 80).records == [short]
    assert Questions.of(mine, data, tokenizer, 24, 20) is None


def test_running_text_asks_nothing(model, tmp_path):
    (tmp_path / "book.txt").write_text("It was a very good year. " * 200, encoding="utf-8")
    argv = ["compare", "--reduced", "--model", model, "--data", tmp_path / "book.txt", "--methods", "prompt", "--steps", 1]
    assert run(*argv, "--output", tmp_path / "o") == 0
    content = json.loads((tmp_path / "o" / "compare.json").read_text())
    assert content["settings"]["answers"] == 0 and [row["scored"] for row in content["methods"]] == [None, None]


@pytest.mark.parametrize("command", ["compare", "sweep"])
def test_the_help_says_how_long_a_record_may_be(command, capsys):
    assert run(command, "--help") == 0
    assert f"longer than {longest(load_base()[0])} tokens" in capsys.readouterr().out


def test_the_picture_is_saved(comparison):
    assert (comparison[0] / "compare.png").read_bytes().startswith(b"\x89PNG")
    assert {path.name for path in comparison[0].iterdir()} == {"compare.json", "compare.png"}


def test_each_line_of_the_picture_has_its_name_and_its_look(comparison):
    from matplotlib.colors import to_rgba

    rows = comparison[1]["methods"]
    _, (axes,) = panels(1, 6, 4)
    plot_learning(axes, rows)
    names = {text.get_text(): (text.xy, text.xyann[1], text.arrow_patch.get_edgecolor()) for text in axes.texts}
    looks = [(to_rgba(color), marker) for _, color, marker in styled(rows)]
    assert len(set(looks)) == len(rows) and len({color for color, _ in looks[:13]}) == len({marker for _, marker in looks[:13]}) == 13
    assert list(names) == [row["title"] for row in sorted(rows[1:], key=lambda row: row["task_loss"])]
    for row, (color, _) in list(zip(rows, looks))[1:]:
        assert names[row["title"]][::2] == ((12, row["task_loss"]), color)
    heights = [height for _, height, _ in names.values()]
    assert min(b - a for a, b in pairwise(heights)) > 0.05, "a name stands on another"


def test_each_point_of_the_picture_has_its_name_and_none_hides_another():
    """Where points meet, a line of its color leads from each name to its point, and no two of these lines cross."""
    from matplotlib.colors import to_rgba
    from matplotlib.path import Path
    from matplotlib.text import Text

    places = {"frozen": (0, 0), "full": (90, 0.9), "LoRA": (92, 0.50), "DoRA": (92, 0.51), "QLoRA": (91, 0.505), "IA3": (30, 0.4), "LoHa": (93, 4.2)}
    rows = [{"title": title, "score": x, "forgotten": y, "scored": "right, %"} for title, (x, y) in places.items()]
    figure, (axes,) = panels(1, 6, 4)
    plot_trade(axes, rows)
    name_points(axes, rows)
    figure.draw_without_rendering()
    assert {text.get_text(): text.xy for text in axes.texts} == places and len(axes.texts) == len(rows)
    boxes = [Text.get_window_extent(text) for text in axes.texts]  # without their lines
    assert all(box.count_overlaps(boxes) == 1 for box in boxes), "a name stands on another"
    far = {text.get_text(): text for text in axes.texts if text.arrow_patch}
    colors = {row["title"]: to_rgba(color) for row, color, _ in styled(rows)}
    assert far.keys() == {"LoRA", "DoRA", "QLoRA"}, "the others have room"
    assert all(text.arrow_patch.get_edgecolor() == colors[title] for title, text in far.items())
    lines = [Path([axes.transData.transform(text.xy), axes.transAxes.transform(text.xyann)]) for text in far.values()]
    assert not any(a.intersects_path(b) for a, b in combinations(lines, 2))


def test_the_picture_of_a_short_comparison_has_ticks_at_whole_steps():
    _, (axes,) = panels(1, 6, 4)
    plot_learning(axes, [{"task_loss": 2.0}, {"task_loss": 1.0, "held_out_curve": [(1, 1.5), (2, 1.0)], "title": "LoRA"}])
    assert all(tick.is_integer() for tick in axes.get_xticks().tolist())


def test_the_environment_reduces_and_the_same_seed_gives_the_same_numbers(comparison, model, tmp_path, monkeypatch):
    monkeypatch.setenv("MINIPEFT_REDUCED", "1")
    methods = ("full", "adalora", "qlora", "prefix")
    assert run("compare", "--model", model, "--output", tmp_path, "--lr", "0.01", "--methods", *methods) == 0
    again = without_timings(json.loads((tmp_path / "compare.json").read_text()))
    first = {row["method"]: row for row in without_timings(comparison[1])}
    assert again == [first[method] for method in ("frozen", *methods)]


def test_methods_at_the_same_time_give_the_same_numbers(comparison, model, tmp_path, threads, capsys):
    threads(2)
    methods = ("adalora", "prefix")
    assert run("compare", "--reduced", "--model", model, "--output", tmp_path, "--lr", "0.01", "--methods", *methods) == 0
    assert "2 methods at a time, each on one thread" in capsys.readouterr().err
    content = json.loads((tmp_path / "compare.json").read_text())
    assert (content["settings"]["methods_at_a_time"], content["settings"]["threads_of_each"]) == (2, 1)
    first = {row["method"]: row for row in without_timings(comparison[1])}
    assert without_timings(content) == [first[method] for method in ("frozen", *methods)]


def test_a_method_that_diverges_beside_others_is_an_error(model, tmp_path, threads, capsys):
    threads(2)
    argv = ["compare", "--reduced", "--model", model, "--output", tmp_path / "o", "--lr", "1e30", "--methods", "full"]
    assert run(*argv) == 2
    assert capsys.readouterr().err.endswith("minipeft: error: full diverged at learning rate 1e+30; give a lower one with --lr\n")


def test_a_method_that_the_model_cannot_take_is_an_error_where_it_was_asked_for(model, tmp_path, capsys):
    err = refused(capsys, "compare", "--model", model, "--methods", "ln", "bitfit", "--output", tmp_path / "o")
    assert "--methods bitfit: BitFit trains biases, and this model has none" in err
    assert not (tmp_path / "o").exists()


def test_a_report_on_ones_own_file_over_several_seeds(model, tmp_path, capsys):
    rows = ({"prompt": f"<{i}> is", "completion": f" {i}, [b]truly[/b]"} for i in range(30))
    report = tmp_path / "report"
    data = jsonl(tmp_path / "mine.jsonl", rows)
    argv = ["compare", "--model", model, "--data", data, "--steps", "4", "--methods", "lora", "prompt"]
    assert run(*argv, "--seeds", "2", "--seed", "5", "--lr", "0.01", "--report", report) == 0
    assert {path.name for path in report.iterdir()} == {"index.html", "compare.json", "compare.png"}
    assert "[b]truly[/b]" in capsys.readouterr().out, "a file's text is never markup"
    content = json.loads((report / "compare.json").read_text())
    assert [row["method"] for row in content["methods"]] == ["frozen", "lora", "prompt"]
    assert content["settings"]["held_out_examples"] == 3
    for row in content["methods"][1:]:
        assert [run["seed"] for run in row["seeds"]] == [5, 6]
        assert row["task_loss"] == pytest.approx(sum(run["task_loss"] for run in row["seeds"]) / 2)
        assert row["latency"] > 0 and (row["latency_merged"] is None) == (row["method"] == "prompt")
    page = (report / "index.html").read_text(encoding="utf-8")
    assert "&lt;" in page and "each with 2 seeds" in page and f"{content['methods'][1]['task_loss']:.3f}" in page
    assert f"--report {data} is a file" in refused(capsys, *argv, "--report", data)


def test_what_is_held_out_depends_on_the_records_alone():
    records = [Completion(f"p{i}", f"c{i}") for i in range(40)]
    train, held = split_off(records, 0.1)
    assert len(held) == 4 and sorted(train + held) == sorted(records)
    for other in (records[::-1], records * 2):
        again_train, again_held = split_off(other, 0.1)
        assert set(again_held) == set(held) and not set(again_train) & set(held)
    with pytest.raises(ValueError, match="at least two different"):
        split_off(records[:1] * 5, 0.1)


def test_a_single_text_is_split_by_its_blocks():
    _, tokenizer = load_base()
    data = encode([Document("It was a fine morning. " * 100)], 0.2, tokenizer, 64)
    blocks = len(data.train) + len(data.held_out)
    assert blocks >= 5 and len(data.held_out) == round(0.2 * blocks)
    with pytest.raises(ValueError, match="to hold a block of 64 tokens out it takes two; the text has 1"):
        encode([Document("It was.")], 0.2, tokenizer, 64)
