"""Benchmarks during training: a slice of each at every evaluation."""

import contextlib
import json
import logging
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from accelerate.utils import broadcast_object_list, gather_object
from transformers import TrainerCallback

from ..inference import LlavaPredictor
from .benchmark import Benchmark


logger = logging.getLogger(__name__)

LOG_NAME = "benchmarks.jsonl"


class EvaluationCallback(TrainerCallback):
    """
    Answers and scores slices of benchmarks at every evaluation of a training run.

    Scores become metrics of the evaluation (`eval_scienceqa_accuracy`, in percent) on every process, so that
    `metric_for_best_model` can choose by them; they are written to the run's log history and, with the answers of this step, to
    `benchmarks.jsonl`. Training itself is not changed: nothing is drawn, and modes are restored. Each process answers its share of
    the samples; with weights that are sharded over processes (FSDP, ZeRO-3) none can, and an error says so before the first step.

    Args:
        benchmarks (`Sequence[Benchmark]`): Slices: [`Benchmark.first`]`(200)`.
        batch_size (`int`, *optional*): As in [`LlavaPredictor.answer_many`].
        max_new_tokens (`int`, *optional*): Of an answer; each benchmark's own by default.

    In a recipe: `benchmarks: ["pope --questions coco_pope_random.json --images val2014 --limit 200"]`. In Python:

    ```python
    >>> from modeling_llava.evaluation import pope
    >>> from modeling_llava.evaluation.callback import EvaluationCallback
    >>> from modeling_llava.training import train

    >>> questions = pope.read_questions(["coco_pope_random.json"])
    >>> slices = [pope.make_benchmark(questions, "val2014").first(200)]
    >>> train("finetune.yaml", callbacks=[EvaluationCallback(slices)])
    ```"""

    def __init__(
        self, benchmarks: Sequence[Benchmark], batch_size: int | None = None, max_new_tokens: int | None = None
    ):
        self.benchmarks = list(benchmarks)
        self.batch_size = batch_size
        self.decoding = {} if max_new_tokens is None else {"max_new_tokens": max_new_tokens}

    def on_train_begin(self, args, state, control, **kwargs):
        if getattr(args, "is_sharded", False):
            raise ValueError(
                "EvaluationCallback: no process has all weights (FSDP, ZeRO-3), so none can answer during training. Train "
                "without it and evaluate the finished model with llava eval."
            )

    def on_evaluate(self, args, state, control, metrics=None, model=None, processing_class=None, **kwargs):
        if model is None:
            return
        found, answers = {}, {}
        modes = {module: module.training for module in model.modules()}
        try:
            for benchmark in self.benchmarks:
                begun = time.perf_counter()
                name, texts = benchmark.name.replace("-", "_"), self._answer(benchmark, args, model, processing_class)
                scores = None
                if state.is_world_process_zero:  # a judge should be asked once
                    scored = benchmark.score(texts)
                    answers[benchmark.name] = {row["id"]: row["answer"] for row in scored.rows}
                    values = {score: entry["value"] for score, entry in scored.scores.items()}
                    primary = values[scored.primary]
                    logger.info(
                        "step %d: %s %s %.2f %% on %d of %d samples",
                        state.global_step,
                        benchmark.name,
                        scored.primary,
                        float("nan") if primary is None else primary,
                        len(benchmark.samples),
                        benchmark.whole,
                    )
                    scores = {
                        f"eval_{name}_{score}": v for score, v in values.items() if v is not None and "/" not in score
                    }
                    scores[f"eval_{name}_runtime"] = round(time.perf_counter() - begun, 2)
                found |= broadcast_object_list([scores])[0]
        finally:
            for module, training in modes.items():
                module.training = training
        if metrics is not None:
            metrics.update(found)
        state.log_history.append({**found, "step": state.global_step, "epoch": state.epoch})
        if state.is_world_process_zero:
            line = {"step": state.global_step, "scores": found, "answers": answers}
            folder = Path(args.output_dir)
            folder.mkdir(parents=True, exist_ok=True)
            with open(folder / LOG_NAME, "a", encoding="utf-8") as file:
                file.write(json.dumps(line, ensure_ascii=False) + "\n")

    def _answer(self, benchmark: Benchmark, args, model, processor) -> dict[str, str]:
        """Answers to all samples by their ids; every process answers its share."""
        share = benchmark.samples[args.process_index :: args.world_size]
        with running_arithmetic(args):
            decoding = {"max_new_tokens": benchmark.max_new_tokens, **self.decoding}
            answered = LlavaPredictor(unwrap(model), processor).answer_many(
                share, batch_size=self.batch_size, image_folder=benchmark.image_folder, **decoding
            )
        return dict(gather_object([(answer.id, answer.text) for answer in answered]))


def unwrap(model):
    """The model inside of DistributedDataParallel and `torch.compile`."""
    for name in ("module", "_orig_mod"):
        model = getattr(model, name, model)
    return model


def running_arithmetic(args):
    """The arithmetic that the run trains in."""
    dtype = torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else None
    return contextlib.nullcontext() if dtype is None else torch.autocast(args.device.type, dtype)


__all__ = ["EvaluationCallback", "running_arithmetic", "unwrap"]
