"""Benchmarks during training: a slice of each at every evaluation."""

import contextlib
import json
import logging
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import TrainerCallback

from ..inference import LlavaPredictor
from .benchmark import Benchmark, evaluate_in_memory


logger = logging.getLogger(__name__)

LOG_NAME = "benchmarks.jsonl"


class EvaluationCallback(TrainerCallback):
    """
    Answers and scores slices of benchmarks at every evaluation of a training run.

    Scores become metrics of the evaluation (`eval_scienceqa_accuracy`, in percent), so that `metric_for_best_model` can
    choose by them; they are written to the run's log history and, with the answers of this step, to `benchmarks.jsonl`.
    Training itself is not changed: nothing is drawn, and modes are set back. The main process answers while the others
    wait; with weights that are sharded over processes (FSDP, ZeRO-3) it cannot, and says so before the first step.

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
        if not state.is_world_process_zero or model is None:
            return
        found, answers = {}, {}
        modes = {module: module.training for module in model.modules()}
        try:
            for benchmark in self.benchmarks:
                begun = time.perf_counter()
                with running_arithmetic(args):
                    predictor = LlavaPredictor(unwrap(model), processing_class)
                    scored = evaluate_in_memory(
                        benchmark, predictor, batch_size=self.batch_size, decoding=self.decoding
                    )
                name = benchmark.name.replace("-", "_")
                for score, value in scored.scores.items():
                    if value["value"] is not None and "/" not in score:
                        found[f"eval_{name}_{score}"] = value["value"]
                found[f"eval_{name}_runtime"] = round(time.perf_counter() - begun, 2)
                answers[benchmark.name] = {row["id"]: row["answer"] for row in scored.rows}
                value = scored.scores[scored.primary]["value"]
                logger.info(
                    "step %d: %s %s %.2f %% on %d of %d samples",
                    state.global_step,
                    benchmark.name,
                    scored.primary,
                    float("nan") if value is None else value,
                    len(benchmark.samples),
                    benchmark.whole,
                )
        finally:
            for module, training in modes.items():
                module.training = training
        if metrics is not None:
            metrics.update(found)
        state.log_history.append({**found, "step": state.global_step, "epoch": state.epoch})
        line = {"step": state.global_step, "scores": found, "answers": answers}
        folder = Path(args.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        with open(folder / LOG_NAME, "a", encoding="utf-8") as file:
            file.write(json.dumps(line, ensure_ascii=False) + "\n")


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
