"""Answers that survive a kill, shards, folders that never mix two runs; and what a run costs in memory."""

import json
import signal
import subprocess
import sys
import time

import pytest
from tiny_predictor import picture, user_turn

from modeling_llava.evaluation.benchmark import AnswerFolder, Benchmark, Shard, evaluate
from modeling_llava.evaluation.results import Scored, score_of
from modeling_llava.inference.predictor import Answer


def samples_of(number, images=0):
    paths = [f"{n % images}.png" if images else None for n in range(number)]
    return [
        {"id": str(n), "messages": [user_turn(f"Question {n}?")], "images": [path] if path else []}
        for n, path in enumerate(paths)
    ]


TEXT = "answer {}: a\u2028b\u2029c\x85d\x0be\r\nf"  # every kind of line break


def answer_all(samples):
    for sample in samples:
        yield Answer(sample["id"], TEXT.format(sample["id"]), 3, "stop")


def test_answers_are_resumed(tmp_path):
    folder, asked = AnswerFolder(tmp_path, {"benchmark": "x"}), []

    def until_killed(samples):
        for answer in answer_all(samples):
            if len(asked) == 4:
                raise KeyboardInterrupt
            asked.append(answer.id)
            yield answer

    with pytest.raises(KeyboardInterrupt):
        folder.run(samples_of(10), Shard(), until_killed)
    assert set(folder.answers()) == {"0", "1", "2", "3"}
    again = AnswerFolder(tmp_path, {"benchmark": "x"})
    again.run(samples_of(10), Shard(), lambda samples: answer_all(asked.append(samples) or samples))
    assert [sample["id"] for sample in asked[-1]] == [str(n) for n in range(4, 10)]
    assert {i: row["text"] for i, row in again.answers().items()} == {str(n): TEXT.format(n) for n in range(10)}
    again.run(samples_of(10), Shard(), lambda samples: pytest.fail("everything is answered"))


def test_an_incomplete_line_is_asked_again(tmp_path):
    folder = AnswerFolder(tmp_path, {})
    folder.run(samples_of(3), Shard(), answer_all)
    whole = (tmp_path / "answers.jsonl").read_bytes()
    (tmp_path / "answers.jsonl").write_bytes(whole[:-9])
    assert set(folder.answers()) == {"0", "1"}
    assert (tmp_path / "answers.jsonl").read_bytes() == whole[
        :-9
    ]  # another process may write: reading changes nothing
    folder.run(samples_of(3), Shard(), answer_all)
    assert (tmp_path / "answers.jsonl").read_bytes() == whole
    (tmp_path / "answers.jsonl").write_bytes(b"{broken}\n" + whole)
    with pytest.raises(ValueError, match="answers.jsonl has a line that is not JSON"):
        folder.answers()
    (tmp_path / "evaluation.json").write_bytes(b"{")
    with pytest.raises(ValueError, match="evaluation.json is not JSON"):
        AnswerFolder(tmp_path, {})


def test_folder_keeps_to_one_run(tmp_path):
    one = {"model": {"name": "a", "fingerprint": "1"}, "settings": {"limit": 3}}
    other = {"model": {"name": "b", "fingerprint": "1"}, "settings": {}}
    first, second = AnswerFolder(tmp_path, one), AnswerFolder(tmp_path, other)  # nothing was answered yet
    second.run(samples_of(2), Shard(1, 2), answer_all)
    refused = 'another run: model.name was "b", is "a"; settings.limit was null, is 3'
    with pytest.raises(ValueError, match=refused):
        AnswerFolder(tmp_path, one)
    with pytest.raises(ValueError, match=refused):  # it was loading its model meanwhile
        first.run(samples_of(2), Shard(0, 2), answer_all)
    assert not first.answers().keys() - second.answers().keys()


def test_shards_divide_the_samples_and_keep_images_together():
    samples = samples_of(20, images=7)
    parts = [Shard(i, 3).select(samples) for i in range(3)]
    assert sorted(int(sample["id"]) for part in parts for sample in part) == list(range(20))
    images = [{sample["images"][0] for sample in part} for part in parts]
    assert not (images[0] & images[1] or images[1] & images[2] or images[0] & images[2])
    order = [sample["images"][0] for sample in parts[0]]
    assert order == sorted(order, key=order.index)  # the same ones next to each other
    assert max(map(len, parts)) - min(map(len, parts)) <= 3


def test_shard_of_the_command_line_and_of_the_environment(monkeypatch):
    assert Shard.parse("2/4") == Shard(1, 4) and Shard.parse(None) == Shard(0, 1)
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setenv("WORLD_SIZE", "8")
    assert Shard.parse(None) == Shard(3, 8) and Shard(3, 8).file_name == "answers.4-of-8.jsonl"
    for text in ("0/4", "5/4", "1", "a/b"):
        with pytest.raises(ValueError, match=f"--shard is '{text}'"):
            Shard.parse(text)


def test_samples_and_images_are_checked_first(tmp_path):
    for samples, message in (
        ([], "no sample"),
        (samples_of(1) * 2, "Two samples have the id '0'"),
        ([{"id": "1", "messages": [user_turn("cut \ud83d")], "images": []}], "sample '1' has a lone surrogate"),
    ):
        with pytest.raises(ValueError, match=message):
            Benchmark("x", samples, score=None)
    picture(0).save(tmp_path / "0.png")
    with pytest.raises(FileNotFoundError, match=r"4 of 5 images do not exist in .*: 1.png, 2.png, 3.png, …"):
        Benchmark("x", samples_of(20, images=5), score=None, image_folder=str(tmp_path)).check_images()


def test_the_same_command_twice_at_once_is_refused_and_one_process_scores(tmp_path):
    """Before a model is loaded, also during scoring; a shard that ends then leaves the scoring to the first process."""
    entered = []

    def score(answers):
        entered.append(answers)
        with pytest.raises(OSError, match="another process works on this run.*--shard"):
            evaluate(benchmark, lambda: pytest.fail("a model is loaded"), tmp_path, model={})
        assert evaluate(benchmark, Predictor, tmp_path, model={}, shard=Shard(0, 2)) is None
        return Scored([{"id": i, "score": 1.0} for i in answers], {"accuracy": score_of([1.0])}, "accuracy")

    class Predictor:
        def answer_many(self, samples, **settings):
            return answer_all(samples)

    benchmark = Benchmark("x", samples_of(2), score)
    assert evaluate(benchmark, Predictor, tmp_path, model={})["complete"]
    assert evaluate(benchmark, Predictor, tmp_path, model={})["complete"]  # the locks are released
    assert len(entered) == 2


@pytest.mark.slow
@pytest.mark.parametrize("model_folder", ["llava-hf"], indirect=True)
def test_killed_command_resumes_and_gives_the_same(tmp_path, model_folder):
    picture(0).save(tmp_path / "0.png")
    rows = [{"question_id": n, "image": "0.png", "text": f"Is there a {n}?", "label": "yes"} for n in range(60)]
    (tmp_path / "pope_random.jsonl").write_text("\n".join(map(json.dumps, rows)))
    words = f"-m modeling_llava.cli.main eval pope {model_folder} --questions {tmp_path}/pope_random.jsonl --images {tmp_path}"
    command = [sys.executable, *words.split(), *"--device cpu --batch-size 2 --max-new-tokens 40 --out".split()]
    subprocess.run([*command, tmp_path / "whole"], check=True)
    out = tmp_path / "killed"
    answers = out / "answers.jsonl"
    process = subprocess.Popen([*command, out])
    while process.poll() is None and not (answers.is_file() and len(answers.read_bytes()) > 200):
        time.sleep(0.005)
    process.send_signal(signal.SIGSTOP)
    second = subprocess.run([*command, out], stderr=subprocess.PIPE)
    assert second.returncode == 2 and b"another process works on this run" in second.stderr
    process.kill()
    process.wait()
    assert 1 <= len(answers.read_bytes().splitlines()) < 60 and not (out / "results.json").exists()
    subprocess.run([*command, out], check=True)
    assert (out / "samples.jsonl").read_text() == (tmp_path / "whole" / "samples.jsonl").read_text()
    lines = [json.loads(line)["id"] for line in answers.read_text().splitlines()]
    assert len(lines) == len(set(lines)) == 60  # nothing is answered twice
