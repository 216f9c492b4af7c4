"""Benchmarks during training: scores at every evaluation, and a run that is not changed by them."""

import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from tiny_predictor import picture, tiny_llava, tiny_processor
from transformers import Trainer, TrainingArguments

from modeling_llava.evaluation import callback, pope, vqa
from modeling_llava.evaluation.callback import EvaluationCallback


@pytest.fixture
def benchmarks(tmp_path):
    for number in range(2):
        picture(number).save(tmp_path / f"{number}.png")
    of_random = {"label": "no", "category": "random"}
    questions = [{"id": f"r/{n}", "image": f"{n % 2}.png", "text": f"Is there a {n}?", **of_random} for n in range(6)]
    short = [{"id": "1", "image": "0.png", "text": "What?", "answers": ["cat"], "category": None}]
    both = [pope.make_benchmark(questions, tmp_path).first(4), vqa.make_benchmark(short, tmp_path)]
    return [replace(benchmark, max_new_tokens=3) for benchmark in both]


def train(output, processor, callbacks, steps=4):
    torch.manual_seed(1)
    model = tiny_llava(processor).train()
    rows = [processor(text="USER: Hi ASSISTANT: there you are", return_tensors="pt") for _ in range(8)]
    data = [{"input_ids": row["input_ids"][0], "labels": row["input_ids"][0]} for row in rows]
    arguments = TrainingArguments(
        output, max_steps=steps, eval_strategy="steps", eval_steps=2, per_device_train_batch_size=2, report_to=[],
        use_cpu=True, save_strategy="no", logging_steps=1, disable_tqdm=True, seed=3, learning_rate=1e-3,
    )  # fmt: skip
    trainer = Trainer(
        model, arguments, train_dataset=data, eval_dataset=data[:2], processing_class=processor, callbacks=callbacks
    )
    trainer.train()
    return trainer


def test_scores_are_metrics_of_every_evaluation_and_training_is_the_same(tmp_path, benchmarks):
    processor = tiny_processor()
    without = train(str(tmp_path / "without"), processor, [])
    trainer = train(str(tmp_path / "run"), processor, [EvaluationCallback(benchmarks)])
    losses = [[e["loss"] for e in t.state.log_history if "loss" in e] for t in (trainer, without)]
    assert losses[0] == losses[1] and len(losses[0]) == 4
    for first, second in zip(trainer.model.parameters(), without.model.parameters()):
        assert torch.equal(first, second)
    logged = [entry for entry in trainer.state.log_history if "eval_pope_accuracy" in entry]
    assert [entry["step"] for entry in logged] == [2, 4]
    assert all(0 <= entry["eval_pope_accuracy"] <= 100 and "eval_vqa_exact_match" in entry for entry in logged)
    lines = [json.loads(line) for line in (tmp_path / "run/benchmarks.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [2, 4]
    assert set(lines[0]["answers"]["pope"]) == {f"r/{n}" for n in range(4)}
    assert "eval_pope_accuracy" in trainer.evaluate()  # where metric_for_best_model looks


def test_each_process_answers_a_shard_and_all_know_the_scores(tmp_path, benchmarks, monkeypatch):
    processor = tiny_processor()
    model, state = tiny_llava(processor).train(), SimpleNamespace(log_history=[], global_step=1, epoch=1.0)
    model.model.vision_tower.eval()
    metrics, shards, sent = [{}, {}], [], []
    monkeypatch.setattr(callback, "gather_object", lambda found: shards.append(found) or [*shards[0], *shards[-1]])
    monkeypatch.setattr(callback, "broadcast_object_list", lambda one: sent.append(one[0]) or [one[0] or {}])
    for rank in (1, 0):  # the last one has what the others sent
        state.is_world_process_zero = rank == 0
        args = SimpleNamespace(output_dir=str(tmp_path / str(rank)), process_index=rank, world_size=2, bf16=0, fp16=0)
        options = {"model": model, "processing_class": processor}
        EvaluationCallback(benchmarks[:1]).on_evaluate(args, state, None, metrics[rank], **options)
    assert [sorted(name for name, _ in shard) for shard in shards] == [["r/1", "r/3"], ["r/0", "r/2"]]
    assert sent[0] is None and sent[1] == metrics[0] and "eval_pope_accuracy" in metrics[0]
    assert not (tmp_path / "1").exists() and (tmp_path / "0" / "benchmarks.jsonl").exists()
    assert model.training and not model.model.vision_tower.training  # the modes are restored


def test_sharded_weights_are_refused_before_the_first_step(benchmarks):
    with pytest.raises(ValueError, match="no process has all weights"):
        EvaluationCallback(benchmarks).on_train_begin(SimpleNamespace(is_sharded=True), None, None)
