"""What a model that is being trained answers at every evaluation: scores of benchmarks, and a page of sample answers."""

import json
import logging
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import broadcast_object_list, gather_object
from transformers import TrainerCallback

from ..data.schema import PLACEHOLDER_SAMPLE
from ..inference import LlavaPredictor
from ..training.batches import FilledDataset
from .benchmark import Benchmark
from .pages import write_sample_page


logger = logging.getLogger(__name__)


class EvaluationCallback(TrainerCallback):
    """
    Answers and scores slices of benchmarks at every evaluation of a training run.

    Scores become metrics of the evaluation (`eval_scienceqa_accuracy`, in percent) on every process, so that
    `metric_for_best_model` can choose by them; they are written to the run's log history and, with the answers of this step,
    to `benchmarks.jsonl`. Training is not changed. Each process answers its shard of the samples; with sharded weights
    (FSDP, ZeRO-3) none can, which raises before the first step.

    In a recipe: `benchmarks: ["pope --questions coco_pope_random.json --images val2014 --limit 200"]`. In Python a slice is
    `pope.make_benchmark(pope.read_questions(["coco_pope_random.json"]), "val2014").first(200)`.
    """

    def __init__(self, benchmarks: Sequence[Benchmark]):
        self.benchmarks = list(benchmarks)

    def on_train_begin(self, args, state, control, **kwargs):
        if getattr(args, "is_sharded", False):
            raise ValueError(
                "EvaluationCallback: no process has all weights (FSDP, ZeRO-3), so none can answer during training. Train "
                "without it and evaluate the finished model with llava eval."
            )

    def on_evaluate(self, args, state, control, metrics=None, model=None, processing_class=None, **kwargs):
        found, answers = {}, {}
        for benchmark in self.benchmarks:
            start = time.perf_counter()
            name, scores = benchmark.name.replace("-", "_"), None
            with predictor_in_training(args, model, processing_class) as predictor:
                answered = predictor.answer_many(
                    benchmark.samples[args.process_index :: args.world_size],
                    image_folder=benchmark.image_folder,
                    follow_symlinks=benchmark.follow_symlinks,
                    max_new_tokens=benchmark.max_new_tokens,
                )
                pairs = [(answer.id, answer.text) for answer in answered]
            texts = dict(gather_object(pairs))
            if state.is_world_process_zero:  # a judge should be asked once
                scored = benchmark.score(texts)
                answers[benchmark.name] = {row["id"]: row["answer"] for row in scored.rows}
                values = {score: entry["value"] for score, entry in scored.scores.items() if "/" not in score}
                scores = {f"eval_{name}_{score}": value for score, value in values.items() if value is not None}
                scores[f"eval_{name}_runtime"] = round(time.perf_counter() - start, 2)
            found |= broadcast_object_list([scores])[0]
        logger.info("step %d: %s", state.global_step, found)
        metrics.update(found)
        state.log_history.append({**found, "step": state.global_step, "epoch": state.epoch})
        if state.is_world_process_zero:
            line = {"step": state.global_step, "scores": found, "answers": answers}
            folder = Path(args.output_dir)
            folder.mkdir(parents=True, exist_ok=True)
            with open(folder / "benchmarks.jsonl", "a", encoding="utf-8") as file:
                file.write(json.dumps(line, ensure_ascii=False) + "\n")


class SampleAnswersCallback(TrainerCallback):
    """
    Answers the first questions of the same few samples at every evaluation, into `sample_answers/step-N.html` in the output
    folder: one file with its images embedded.

    Training is not changed. The main process answers while the others wait; with sharded weights (FSDP, ZeRO-3) no answers
    are written, and a warning says so.
    """

    def __init__(self, num_samples: int = 8):
        self.num_samples = num_samples
        self.answered: dict[int, list[tuple[str, str, str]]] = {}  # step → question, reference, answer

    def on_train_begin(self, args, state, control, **kwargs):
        if getattr(args, "is_sharded", False) and state.is_world_process_zero:
            logger.warning("sample_answers: no process has all weights (FSDP, DeepSpeed); no answers are written.")

    def on_evaluate(self, args, state, control, model=None, processing_class=None, eval_dataloader=None, **kwargs):
        if getattr(args, "is_sharded", False) or not state.is_world_process_zero:
            return
        samples = spread(eval_dataloader.dataset, self.num_samples)
        questions = [_first_question(sample, str(number)) for number, sample in enumerate(samples)]
        with predictor_in_training(args, model, processing_class) as predictor:
            found = predictor.answer_many(questions, do_sample=False, max_new_tokens=128)
            answers = {answer.id: answer.text for answer in found}
        rows = []
        for sample, question in zip(samples, questions):
            asked = question["messages"]
            rows.append((_text(asked[-1]), _text(sample["messages"][len(asked)]), answers[question["id"]]))
        self.answered[state.global_step] = rows
        page = Path(args.output_dir) / "sample_answers" / f"step-{state.global_step}.html"
        page.parent.mkdir(parents=True, exist_ok=True)
        write_sample_page(page, f"Step {state.global_step}", samples, rows)
        logger.info("Sample answers: %s", page)


@contextmanager
def predictor_in_training(args, model, processor) -> Iterator[LlavaPredictor]:
    """A predictor of a model that is being trained, in the run's arithmetic; training modes and random state are restored."""
    for name in ("module", "_orig_mod"):  # DistributedDataParallel, torch.compile
        model = getattr(model, name, model)
    modes = {module: module.training for module in model.modules()}
    random_state = torch.random.get_rng_state()
    dtype = torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else None
    try:
        with nullcontext() if dtype is None else torch.autocast(args.device.type, dtype):
            yield LlavaPredictor(model, processor)
    finally:
        torch.random.set_rng_state(random_state)
        for module, training in modes.items():
            module.training = training


def spread(dataset: Any, number: int) -> list[dict]:
    """`number` samples, evenly spread over the evaluation data; the first ones of a stream."""
    if isinstance(dataset, FilledDataset):  # of several processes
        dataset = dataset.dataset
    if not hasattr(dataset, "__len__"):  # a stream
        return [sample for sample in islice(dataset, number) if sample is not PLACEHOLDER_SAMPLE]
    number = min(number, len(dataset))
    return [dataset[i * len(dataset) // number] for i in range(number)]


def _first_question(sample: dict, sample_id: str) -> dict:
    """What the model is asked: everything before the first answer, with its images."""
    roles = [message["role"] for message in sample["messages"]]
    messages = sample["messages"][: roles.index("assistant")]
    num_images = sum(item["type"] == "image" for message in messages for item in message["content"])
    return {"id": sample_id, "messages": messages, "images": sample["images"][:num_images]}


def _text(message: dict) -> str:
    return "\n".join(item["text"].strip() for item in message["content"] if item["type"] == "text")
