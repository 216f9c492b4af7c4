"""A page of sample answers at every evaluation of a training run: image, question, answer, reference."""

import html
import logging
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

from ..data.images import load_image
from ..data.schema import NOTHING
from ..inference import LlavaPredictor
from ..io.atomic import write_atomic
from ..training.batches import FilledDataset
from .callback import running_arithmetic, unwrap
from .llava_bench_page import thumbnail_of


logger = logging.getLogger(__name__)

FOLDER = "sample_answers"

_STYLE = """
:root { color-scheme: light dark; }
body { max-width: 60rem; margin: 0 auto; padding: 2rem 1rem; font: 15px/1.5 system-ui, sans-serif; }
article { display: grid; grid-template-columns: minmax(0, 15rem) minmax(0, 1fr); gap: 1.25rem; padding: 1.25rem 0;
  border-top: 1px solid #8884; }
img { max-width: 100%; border-radius: 8px; } p { margin: 0 0 .75rem; white-space: pre-wrap; overflow-wrap: anywhere; }
b { display: block; font-size: .8rem; opacity: .65; }
"""


class SampleAnswersCallback(TrainerCallback):
    """
    Answers the first questions of the same few samples at every evaluation, into `sample_answers/step-N.html` in the output
    folder: one file with its images embedded.

    Training is not changed: answers are greedy, and training modes and random state are restored. The main process answers
    while the others wait; with sharded weights (FSDP, ZeRO-3) no answers are written, and a warning says so.

    Args:
        num_samples (`int`, *optional*, defaults to 8): Samples, spread over the evaluation data; the first ones of a stream.
        max_new_tokens (`int`, *optional*, defaults to 128): Of an answer.
        is_sharded (`bool`, *optional*, defaults to `False`): Whether the weights are sharded over processes.
    """

    def __init__(self, num_samples: int = 8, max_new_tokens: int = 128, is_sharded: bool = False):
        self.num_samples = num_samples
        self.max_new_tokens = max_new_tokens
        self.is_sharded = is_sharded
        self.answered: dict[int, list[tuple[str, str, str]]] = {}  # step → question, reference, answer

    def on_train_begin(self, args, state, control, **kwargs):
        if self.is_sharded and state.is_world_process_zero:
            logger.warning("sample_answers: no process has all weights (FSDP, DeepSpeed); no answers are written.")

    def on_evaluate(self, args, state, control, model=None, processing_class=None, eval_dataloader=None, **kwargs):
        if self.is_sharded or not state.is_world_process_zero or model is None or eval_dataloader is None:
            return
        samples = _spread(eval_dataloader.dataset, self.num_samples)
        modes = {module: module.training for module in model.modules()}
        random_state = torch.random.get_rng_state()
        try:
            with running_arithmetic(args):
                predictor = LlavaPredictor(unwrap(model), processing_class)
                questions = [_asked(sample, str(n)) for n, sample in enumerate(samples)]
                found = predictor.answer_many(questions, do_sample=False, max_new_tokens=self.max_new_tokens)
                answers = {answer.id: answer.text for answer in found}
        finally:
            torch.random.set_rng_state(random_state)
            for module, training in modes.items():
                module.training = training
        asked = [_question(sample) for sample in samples]
        self.answered[state.global_step] = [
            (_text(question[-1]), _text(sample["messages"][len(question)]), answers[str(n)])
            for n, (sample, question) in enumerate(zip(samples, asked))
        ]
        page = Path(args.output_dir) / FOLDER / f"step-{state.global_step}.html"
        page.parent.mkdir(parents=True, exist_ok=True)
        write_page(page, f"Step {state.global_step}", samples, [answers[str(n)] for n in range(len(samples))])
        logger.info("Sample answers: %s", page)


def write_page(path: Path, title: str, samples: Sequence[dict], answers: Sequence[str]) -> None:
    """
    Writes conversations with a model's answers to their first questions as one HTML file.

    Args:
        path (`Path`): The HTML file.
        title (`str`): Its heading.
        samples (`Sequence[Conversation]`): Their first answers are the references.
        answers (`Sequence[str]`): The model's, one per sample.
    """
    cards = []
    for sample, answer in zip(samples, answers):
        asked = _question(sample)
        reference = sample["messages"][len(asked)]
        images = "".join(
            f'<img alt="" src="{thumbnail_of(load_image(image, None, str(sample["id"])))}">'
            for image in sample["images"]
        )
        texts = {"question": _text(asked[-1]), "answer": answer, "reference": _text(reference)}
        lines = "".join(f"<p><b>{name}</b>{html.escape(text)}</p>" for name, text in texts.items())
        cards.append(f'<article id="{html.escape(str(sample["id"]))}"><div>{images}</div><div>{lines}</div></article>')
    write_atomic(
        path,
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{html.escape(title)}</title>'
        f"<style>{_STYLE}</style><h1>{html.escape(title)}</h1>{''.join(cards)}</html>\n",
    )


def _spread(dataset: Any, number: int) -> list[dict]:
    if isinstance(dataset, FilledDataset):  # of several processes
        dataset = dataset.dataset
    if not hasattr(dataset, "__len__"):  # a stream
        return [sample for sample in islice(dataset, number) if sample is not NOTHING]
    number = min(number, len(dataset))
    return [dataset[i * len(dataset) // number] for i in range(number)]


def _asked(sample: dict, sample_id: str) -> dict:
    """What the model is asked: the first question with its images."""
    messages = _question(sample)
    num_images = sum(item["type"] == "image" for message in messages for item in message["content"])
    return {"id": sample_id, "messages": messages, "images": sample["images"][:num_images]}


def _question(sample: dict) -> list[dict]:
    """Everything before the first answer."""
    roles = [message["role"] for message in sample["messages"]]
    return sample["messages"][: roles.index("assistant")]


def _text(message: dict) -> str:
    return "\n".join(item["text"].strip() for item in message["content"] if item["type"] == "text")


__all__ = ["SampleAnswersCallback", "write_page"]
