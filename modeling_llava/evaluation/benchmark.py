"""One way to run every benchmark: samples → answers in a folder → scores → `results.json`."""

import logging
import re
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

from .answering import AnswerFolder, Shard, check_images, check_samples, data_identity
from .results import Scored, make_results, write_results


logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Benchmark:
    """
    A benchmark that is ready to be answered.

    Attributes:
        name (`str`): As in `results.json`.
        samples (`list[dict]`): As [`LlavaPredictor.answer_many`] takes them; ids are strings.
        score (`Callable[[dict[str, str]], Scored]`): From the answers' texts by id; not all need be there.
        data (`dict`): Hashes of the files, the split.
        settings (`dict`): How the questions are put and scored.
        image_folder (`str`, *optional*): What the samples' paths are relative to.
        max_new_tokens (`int`): Of an answer, unless told otherwise.
        total (`int`, *optional*): Samples of the whole benchmark, where `samples` are only some of them.
    """

    name: str
    samples: list[dict]
    score: Callable[[dict[str, str]], Scored]
    data: dict = field(default_factory=dict)
    settings: dict = field(default_factory=dict)
    image_folder: str | None = None
    max_new_tokens: int = 512
    total: int | None = None

    def __post_init__(self):
        check_samples(self.samples)

    @property
    def whole(self) -> int:
        return self.total or len(self.samples)

    def first(self, limit: int | None) -> "Benchmark":
        """The benchmark's first `limit` samples; what is reported says of how many."""
        if limit is None or limit >= len(self.samples):
            return self
        if limit < 1:
            raise ValueError(f"--limit must be at least 1, got {limit}.")
        settings = {**self.settings, "limit": limit}
        return replace(self, samples=self.samples[:limit], total=self.whole, settings=settings)


def question_sample(sample_id: str, image: str, text: str, instruction: str | None = None) -> dict:
    """A question about one image as [`LlavaPredictor.answer_many`] takes it; an instruction stands on a line of its own, once:
    published files of questions have it in them, and are asked to the letter."""
    if instruction and not text.endswith(f"\n{instruction}"):
        text = re.sub(rf"\s*{re.escape(instruction.rstrip('.'))}\.?\s*\Z", "", text, flags=re.IGNORECASE)
        text = text if instruction.lower() in text.lower() else f"{text}\n{instruction}"
    content = [{"type": "image"}, {"type": "text", "text": text}]
    return {"id": sample_id, "messages": [{"role": "user", "content": content}], "images": [image]}


def evaluate(
    benchmark: Benchmark,
    make_predictor: Callable[[], object],
    out: str | Path,
    *,
    model: dict,
    shard: Shard | None = None,
    batch_size: int | None = None,
    decoding: dict | None = None,
    partial: bool = False,
    progress: bool = True,
) -> dict | None:
    """
    Answers a benchmark and scores it. Called again on the same folder it goes on where it was killed.

    Args:
        benchmark ([`Benchmark`])
        make_predictor (`Callable[[], LlavaPredictor]`): Loads the model; called only if something is left to answer.
        out (`str` or `Path`): The run's folder.
        model (`dict`): From [`describe_model`].
        shard ([`Shard`], *optional*): The part of this process. Whoever finishes last scores the whole.
        batch_size (`int`, *optional*): As in [`LlavaPredictor.answer_many`]; no influence on the answers.
        decoding (`dict`, *optional*): Fields of [`DecodingSettings`].
        partial (`bool`, defaults to `False`): Score what is there, though samples are without an answer.

    Returns:
        `dict | None`: the results; `None` if other shards have answers left to give and `partial` is off, or are scoring.

    Raises:
        OSError: another process is at this run, or at this shard of it.
        FileNotFoundError: missing images, all named before the model is loaded.
        ValueError: the folder holds another run.
    """
    check_images(benchmark.samples, benchmark.image_folder)
    decoding = {"max_new_tokens": benchmark.max_new_tokens, **(decoding or {})}
    settings = {**benchmark.settings, **decoding}
    data = {**benchmark.data, **data_identity(benchmark.samples, benchmark.data.get("files", {}))}
    folder = AnswerFolder(out, {"benchmark": benchmark.name, "model": model, "data": data, "settings": settings})

    def answer_many(samples):
        return make_predictor().answer_many(
            samples, batch_size=batch_size, image_folder=benchmark.image_folder, **decoding
        )

    shard = shard or Shard()
    with folder.hold(shard):
        folder.run(benchmark.samples, shard, answer_many, progress)
        answers = folder.answers()
        answered = [sample["id"] for sample in benchmark.samples if sample["id"] in answers]
        if len(answered) < len(benchmark.samples) and not partial:
            logger.warning("%d of %d samples have an answer; not scored yet.", len(answered), len(benchmark.samples))
            return None
        with folder.scoring() as is_mine:
            if not is_mine:
                logger.warning("All samples have an answer; another process is scoring them.")
                return None
            scored = benchmark.score({sample_id: answers[sample_id]["text"] for sample_id in answered})
            scored.counts["cut_at_max_new_tokens"] = sum(answers[i]["finish_reason"] == "length" for i in answered)
            results = make_results(
                benchmark.name,
                scored,
                model=model,
                data=data,
                settings=settings,
                total=benchmark.whole,
                answered=len(answered),
            )
            write_results(folder.folder, results, scored.rows)
            return results


def evaluate_in_memory(
    benchmark: Benchmark, predictor, *, batch_size: int | None = None, decoding: dict | None = None
) -> Scored:
    """Answers and scores without a folder: for a slice, during training."""
    decoding = {"max_new_tokens": benchmark.max_new_tokens, **(decoding or {})}
    answers = predictor.answer_many(
        benchmark.samples, batch_size=batch_size, image_folder=benchmark.image_folder, **decoding
    )
    return benchmark.score({answer.id: answer.text for answer in answers})


__all__ = ["Benchmark", "evaluate", "evaluate_in_memory", "question_sample"]
