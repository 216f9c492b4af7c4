"""Results and reports: one schema, comparisons, paired differences, plots, the model card."""

import json

import pytest
from PIL import Image, ImageColor

from modeling_llava.cli.main import main
from modeling_llava.evaluation.report import COLOURS, PUBLISHED_COLOUR, attach, compare, markdown, plot, read_runs
from modeling_llava.evaluation.results import (
    Scored,
    describe_model,
    fingerprint,
    read_results,
    score_of,
    write_results,
)


def write_run(folder, scores, benchmark="vqa", total=None, data=None, model=None, out_of=None, **more):
    """A run whose samples have these scores."""
    rows = [{"id": str(n), "score": score, "answer": "x"} for n, score in enumerate(scores)]
    for row, part in zip(rows, out_of or []):
        row["out_of"] = part
    counted = [score for score in scores if score is not None]
    primary = {"vqa": "accuracy", "scienceqa": "accuracy", "llava-bench-coco": "relative"}[benchmark]
    scores = {primary: score_of(counted, out_of), f"{primary}/one": score_of(counted[:2])}
    scored = Scored(rows, scores, primary, {"unparsed": 2, "other": 0}, more)
    about = {"model": model or {"name": folder.name}, "data": data or {"prompts": "p"}, "settings": {}}
    write_results(folder, benchmark, scored, total=total or len(rows), answered=len(rows), **about)
    return folder


def test_results_follow_the_schema_and_are_read_again(tmp_path):
    write_run(tmp_path / "a", [1.0, 0.0, None, 1.0])
    results, rows = read_results(tmp_path / "a")
    assert results["schema_version"] == 1
    assert results["samples"] == {"file": "samples.jsonl", "total": 4, "answered": 4, "scored": 3}
    assert results["complete"] is False and len(rows) == 4
    assert results["scores"]["accuracy"]["value"] == pytest.approx(200 / 3)
    assert {"modeling_llava", "torch", "transformers", "python"} <= set(results["versions"])
    assert read_results(tmp_path / "a/results.json") == (results, rows)


def test_results_that_cannot_be_read_say_why(tmp_path):
    folder = write_run(tmp_path / "new", [1.0])
    content = json.loads((folder / "results.json").read_text())
    for text, message in (("{}", "not a result of an evaluation"), ({**content, "schema_version": 2}, "version 2")):
        (folder / "results.json").write_text(text if isinstance(text, str) else json.dumps(text))
        with pytest.raises(ValueError, match=message):
            read_results(folder)
    (folder / "results.json").write_text(json.dumps(content))
    (folder / "samples.jsonl").unlink()
    with pytest.raises(FileNotFoundError, match="samples.jsonl, which"):
        read_results(folder)
    (folder / "results.json").rename(folder / "evaluation.json")
    with pytest.raises(FileNotFoundError, match="results.json .*A run was started there"):
        read_results(folder)


def test_fingerprint_tells_weights_apart_and_names_no_path(tmp_path):
    for name, content in (("a", b"1" * 3000), ("b", b"2" * 3000)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "model.safetensors").write_bytes(content)
        (tmp_path / name / "config.json").write_text("{}")
    described = describe_model(str(tmp_path / "a"))
    assert described["name"] == "a" and str(tmp_path) not in json.dumps(described)
    assert fingerprint(tmp_path / "a") == described["fingerprint"] != fingerprint(tmp_path / "b")
    (tmp_path / "a" / "README.md").write_text("words")
    assert fingerprint(tmp_path / "a") == described["fingerprint"]
    assert describe_model("owner/name", "main") == {"name": "owner/name", "revision": "main", "adapter": None}


def test_a_model_of_the_hub_is_named_with_its_commit(tmp_path, monkeypatch):
    """The main branch moves; a folder of answers begun before and resumed after would be of two models."""
    from transformers.utils import hub

    monkeypatch.setattr(hub.constants, "HF_HUB_CACHE", str(tmp_path))
    commit = "0123456789" * 4
    for name, file in (("me--base", "config.json"), ("me--lora", "adapter_config.json")):
        folder = tmp_path / f"models--{name}"
        (folder / "snapshots" / commit).mkdir(parents=True)
        (folder / "snapshots" / commit / file).write_text('{"model_type": "llava"}')
        (folder / "refs").mkdir()
        (folder / "refs" / "main").write_text(commit)
    described = {"name": "me/base", "revision": None, "adapter": "me/lora"}
    assert describe_model("me/base", adapter="me/lora") == {**described, "commit": commit, "adapter_commit": commit}


def test_runs_are_compared_with_paired_differences(tmp_path):
    baseline = write_run(tmp_path / "before", [0.0] * 30 + [1.0] * 30)
    better = write_run(tmp_path / "after", [1.0] * 10 + [0.0] * 20 + [1.0] * 30)
    (comparison,) = compare(read_runs([baseline, better]))
    assert [run["label"] for run in comparison["runs"]] == ["before", "after"]
    (difference,) = comparison["differences"]
    assert difference["difference"] == pytest.approx(100 / 6) and difference["samples"] == 60
    assert difference["interval"][0] > 0 and difference["p_value"] < 0.01 and difference["note"] == ""
    text = markdown([comparison])
    assert "| before | 50.00 (" in text and "after less before: +16.67 points" in text
    assert "unparsed: 2" in text and "other" not in text


def test_samples_of_another_data_set_are_not_paired(tmp_path):
    """Two data sets of short answers may both count their questions from 0."""
    other = write_run(tmp_path / "b", [1.0, 1.0, 0.0], data={"prompts": "q"})
    runs = [write_run(tmp_path / "a", [1.0, 0.0, 1.0]), other]
    for folder, questions in zip(runs, ("xyz", "xvw")):
        rows = read_results(folder)[1]
        lines = [json.dumps({**row, "question": question}) for row, question in zip(rows, questions)]
        (folder / "samples.jsonl").write_text("\n".join(lines))
    (difference,) = compare(read_runs(runs))[0]["differences"]
    assert difference["samples"] == 1 and "the data differ" in difference["note"]


def test_benchmarks_are_not_mixed_and_published_rows_are_next_to_them(tmp_path):
    runs = [write_run(tmp_path / "a", [1.0, 0.0], total=500), write_run(tmp_path / "b", [1.0, 1.0], "scienceqa")]
    comparisons = compare(read_runs(runs))
    assert [c["benchmark"] for c in comparisons] == ["vqa", "scienceqa"]
    assert not any(c["differences"] for c in comparisons)
    vqa, science = markdown(comparisons).split("## scienceqa")
    assert "published" not in vqa and "| *LLaVA-13B (published)* |" in science and "*90.92*" in science
    assert "a: 2 of 500 samples scored" in vqa


def test_other_data_and_other_judges_are_noted(tmp_path):
    def judged(name, scores, prompts, **more):
        judge = {"prompt_hash": prompts, "answered_by": ["g"]}
        return write_run(tmp_path / name, scores, "llava-bench-coco", out_of=[8.0, 8.0], judge=judge, **more)

    runs = [judged("a", [4.0, 8.0], "x"), judged("b", [8.0, 8.0], "y", data={"prompts": "q"})]
    (difference,) = compare(read_runs(runs))[0]["differences"]
    assert difference["difference"] == 25.0 and "the judges differ" in difference["note"]
    assert "the data differ" in difference["note"]
    rows = [json.dumps({**row, "id": f"x{row['id']}"}) for row in read_results(runs[1])[1]]
    (runs[1] / "samples.jsonl").write_text("\n".join(rows))
    (comparison,) = compare(read_runs(runs))
    assert comparison["differences"][0]["difference"] is None and "no sample in common" in markdown([comparison])


def test_labels(tmp_path):
    runs = [write_run(tmp_path / "x/eval", [1.0]), write_run(tmp_path / "y/eval", [1.0])]
    assert [run.label for run in read_runs(runs)] == ["x/eval", "y/eval"]
    assert [run.label for run in read_runs(runs, ["7B", "13B"])] == ["7B", "13B"]
    with pytest.raises(ValueError, match="2 different names"):
        read_runs(runs, ["7B"])


def test_command_writes_table_json_and_plots(tmp_path, capsys):
    scores = {"before": [0.0, 1.0, 0.0, 1.0], "after": [1.0, 1.0, 0.0, 1.0]}
    runs = [write_run(tmp_path / name, values, "scienceqa") for name, values in scores.items()]
    out = tmp_path / "report"
    assert main(["eval", "report", *map(str, runs), "--out", str(out), "--published", "LLaVA-13B"]) == 0
    assert "after less before: +25.00 points" in capsys.readouterr().out
    assert (out / "report.md").read_text().startswith("# Evaluation")
    content = json.loads((out / "report.json").read_text())
    assert content["comparisons"][0]["runs"][1]["scores"]["accuracy"]["value"] == 75.0
    with Image.open(out / "scienceqa.png") as plot:
        colours = {colour for _, colour in plot.convert("RGB").getcolors(maxcolors=2**24)}
    assert {ImageColor.getrgb(colour) for colour in (*COLOURS[:2], PUBLISHED_COLOUR)} <= colours  # of the bars
    assert main(["eval", "report", *map(str, runs), "--published", "LLaVA-13b"]) == 2
    assert "no row LLaVA-13b; there are GPT-3.5" in capsys.readouterr().err
    assert main(["eval", "report", str(tmp_path / "nowhere")]) == 2
    assert "results.json does not exist" in capsys.readouterr().err


def test_runs_without_any_score_are_drawn_and_counted(tmp_path, recwarn):
    """A judge that answers nonsense to all."""
    (comparison,) = compare(read_runs([write_run(tmp_path / name, [None, None]) for name in "ab"]))
    plot(comparison, tmp_path / "none.png")
    assert not recwarn.list
    assert "a: 0 of 2 samples scored" in markdown([comparison])


def test_results_are_attached_to_their_weights_only(tmp_path, capsys):
    weights = tmp_path / "weights"
    weights.mkdir()
    (weights / "model.safetensors").write_bytes(b"1")
    model, others = describe_model(str(weights)), {"name": "a", "fingerprint": "b"}
    mine = write_run(tmp_path / "mine", [1.0, 1.0], "scienceqa", model=model)
    baseline = write_run(tmp_path / "baseline", [0.0, 1.0], "scienceqa", total=9, model=others)
    hub = write_run(tmp_path / "hub", [0.0, 0.0], "scienceqa", model=describe_model("owner/name"))
    runs = list(map(str, (baseline, mine, hub)))
    assert main(["eval", "report", *runs, "--attach", str(weights)]) == 0
    said = capsys.readouterr()
    assert "mine less baseline: +50.00 points" in said.out
    assert "not attached: 2 of 3 runs, which are of other weights" in said.err
    attached = json.loads((weights / "results-scienceqa.json").read_text())
    assert attached["model"]["fingerprint"] == fingerprint(weights)
    (weights / "results-scienceqa.json").unlink()
    part = write_run(tmp_path / "part", [1.0], "scienceqa", total=9, model=model)
    again = write_run(tmp_path / "again", [1.0], "scienceqa", model=model)
    for paths, message in (
        ([baseline, hub], "is of the weights in"),
        ([mine, part], "is of 1 of 9 samples"),
        ([mine, again], "both of scienceqa"),
    ):
        with pytest.raises(ValueError, match=message):
            attach(paths, weights)
    with pytest.raises(FileNotFoundError, match="is not a folder"):
        attach([mine], tmp_path / "nowhere")
    assert [path.name for path in weights.iterdir()] == ["model.safetensors"]
