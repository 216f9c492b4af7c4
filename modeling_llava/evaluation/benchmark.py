"""
Runs a benchmark: samples → answers in a folder → scores → `results.json`. A run can be killed and resumed, and sharded over
processes.

    out/evaluation.json      what is evaluated; a folder never mixes two runs
    out/answers.jsonl        one line per answer, as they are made; `answers.2-of-4.jsonl` of a shard
    out/results.json         written when every sample has an answer

To add a benchmark:

1. A file next to this one; `pope.py` is a short example: `read_questions` reads its files, `score` makes a [`Scored`] from
   questions and answers, `make_benchmark` puts both into a [`Benchmark`]. Questions with short answers use
   [`question_benchmark`], others [`question_sample`].
2. Its command in `cli/eval.py`: a line in `SUBCOMMANDS`, and in `BENCHMARKS` the two functions that add its arguments and
   make the benchmark from them. That gives `llava eval NAME` (answers, shards, resuming, tables, a plot) and `benchmarks` of
   a training recipe.
3. Published scores to show in tables: a line in `PUBLISHED` of `report.py`, under the benchmark's `name` (optional).
"""

import contextlib
import json
import logging
import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from ..data.schema import image_key
from ..io.files import locked_file, write_atomic
from .results import RUN_NAME, Scored, hash_files, hash_json, read_json, write_results


logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Benchmark:
    """
    A benchmark that is ready to be answered.

    Raises:
        ValueError: there are no samples, two have the same id, or a text has a lone surrogate.
    """

    name: str  # as in `results.json`
    samples: list[dict]  # as `LlavaPredictor.answer_many` takes them; ids are strings
    score: Callable[[dict[str, str]], Scored]  # scores answers, given by sample id; some may be missing
    data: dict = field(default_factory=dict)  # hashes of the files, the split
    settings: dict = field(default_factory=dict)  # how the questions are asked and scored
    image_folder: str | None = None  # what the samples' paths are relative to
    follow_symlinks: bool = False  # links inside the folder may lead out of it
    max_new_tokens: int = 512  # of an answer
    total: int | None = None  # samples of the whole benchmark, where `samples` are only some of them

    def __post_init__(self):
        if not self.samples:
            raise ValueError("There is no sample to evaluate.")
        seen = set()
        for sample in self.samples:
            if sample["id"] in seen:
                raise ValueError(f"Two samples have the id {sample['id']!r}.")
            seen.add(sample["id"])
            try:
                json.dumps([sample["id"], sample["messages"]], ensure_ascii=False).encode()
            except UnicodeEncodeError:
                raise ValueError(f"The text of sample {sample['id']!r} has a lone surrogate. Fix the text.") from None

    @property
    def whole(self) -> int:
        return self.total or len(self.samples)

    def first(self, limit: int | None) -> "Benchmark":
        """The benchmark's first `limit` samples; the results say of how many."""
        if limit is None or limit >= len(self.samples):
            return self
        if limit < 1:
            raise ValueError(f"--limit must be at least 1, got {limit}.")
        settings = {**self.settings, "limit": limit}
        return replace(self, samples=self.samples[:limit], total=self.whole, settings=settings)

    def check_images(self) -> None:
        """A `FileNotFoundError` says how many image files are missing."""
        images = [image for sample in self.samples for image in sample["images"]]
        paths = dict.fromkeys(os.fspath(image) for image in images if isinstance(image, (str, os.PathLike)))
        missing = [path for path in paths if not os.path.isfile(os.path.join(self.image_folder or "", path))]
        if missing:
            where = f" in {self.image_folder}" if self.image_folder else ""
            names = ", ".join(missing[:3]) + (", …" if len(missing) > 3 else "")
            raise FileNotFoundError(
                f"{len(missing)} of {len(paths)} images do not exist{where}: {names}. Is it the right folder, completely unpacked?"
            )

    def data_identity(self) -> dict:
        """`data`, and a hash of the samples that were made of it."""
        prompts = [
            [sample["id"], sample["messages"], [str(i) for i in sample["images"] if isinstance(i, (str, Path))]]
            for sample in self.samples
        ]
        return {"files": {}, **self.data, "samples": len(self.samples), "prompts": hash_json(prompts)}


def question_sample(sample_id: str, image: str, text: str, instruction: str | None = None) -> dict:
    """
    A question about one image as [`LlavaPredictor.answer_many`] takes it. The instruction is added on a line of its own unless
    the question contains it: published files of questions do.
    """
    if instruction and not text.endswith(f"\n{instruction}"):
        text = re.sub(rf"\s*{re.escape(instruction.rstrip('.'))}\.?\s*\Z", "", text, flags=re.IGNORECASE)
        text = text if instruction.lower() in text.lower() else f"{text}\n{instruction}"
    content = [{"type": "image"}, {"type": "text", "text": text}]
    return {"id": sample_id, "messages": [{"role": "user", "content": content}], "images": [image]}


def question_benchmark(
    name: str,
    questions: list[dict],
    image_folder: str | os.PathLike,
    score: Callable[[list[dict], dict[str, str]], Scored],
    *,
    instruction: str | None,
    files: Sequence[str | os.PathLike] = (),
    **settings,
) -> Benchmark:
    """A [`Benchmark`] of questions `{"id", "image", "text"}` with short answers; `files` are those of the questions."""
    return Benchmark(
        name=name,
        samples=[question_sample(row["id"], row["image"], row["text"], instruction) for row in questions],
        score=lambda answers: score([row for row in questions if row["id"] in answers], answers),
        data={"files": hash_files(files)},
        settings={"instruction": instruction, **settings},
        image_folder=os.fspath(image_folder),
        max_new_tokens=16,
    )


@dataclass(frozen=True)
class Shard:
    """One of `count` shards of the samples. Samples with the same images are in the same shard: each image is encoded once."""

    index: int = 0  # from 0
    count: int = 1

    @classmethod
    def parse(cls, text: str | None) -> "Shard":
        """`"2/4"` → the second of four. `None`: the rank of this process under `accelerate launch` or `torchrun`."""
        if text is None:
            return cls(int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1)))
        match = re.fullmatch(r"(\d+)/(\d+)", text)
        if match is None or not 1 <= int(match[1]) <= int(match[2]):
            raise ValueError(f"--shard is {text!r}; it must be like 1/4, 2/4, 3/4 or 4/4.")
        return cls(int(match[1]) - 1, int(match[2]))

    @property
    def file_name(self) -> str:
        return "answers.jsonl" if self.count == 1 else f"answers.{self.index + 1}-of-{self.count}.jsonl"

    def select(self, samples: list[dict]) -> list[dict]:
        """The samples of this shard, those with the same images next to each other."""
        groups: dict[tuple, list[dict]] = {}
        for sample in samples:
            groups.setdefault(tuple(map(image_key, sample["images"])) or (sample["id"],), []).append(sample)
        return [sample for group in list(groups.values())[self.index :: self.count] for sample in group]


class AnswerFolder:
    """
    The folder of one run. `identity` is what the answers depend on (benchmark, model, data, settings); a `ValueError` lists the
    differences if the folder has answers of another run.
    """

    def __init__(self, folder: str | os.PathLike, identity: dict):
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        self.identity = json.loads(json.dumps(identity))  # as it is read back
        self._claim()

    def _claim(self) -> None:
        """Takes the folder if no run has answers in it."""
        run_file = self.folder / RUN_NAME
        with locked_file(self.folder / f".{RUN_NAME}.lock", wait=True):
            if not run_file.is_file() or not any(path.stat().st_size for path in self.folder.glob("answers*.jsonl")):
                write_atomic(run_file, json.dumps(self.identity, indent=2, ensure_ascii=False) + "\n", sync=True)
            before = read_json(run_file)
        if different := _differences(before, self.identity):
            raise ValueError(
                f"{self.folder} contains answers of another run: {'; '.join(different[:4])}. Give another --out, or remove "
                "the folder."
            )

    def answers(self) -> dict[str, dict]:
        """All answers so far, of every shard, by id."""
        found: dict[str, dict] = {}
        for path in sorted(self.folder.glob("answers*.jsonl")):
            for row in _whole_lines(path):
                found.setdefault(row["id"], row)
        return found

    def run(self, samples: list[dict], shard: Shard, answer_many: Callable[[list[dict]], Iterable]) -> None:
        """
        Answers the samples of this shard that have no answer yet. `answer_many` yields an [`Answer`] for each, in any
        order; it is called only if there is work.
        """
        from tqdm import tqdm

        done = self.answers()
        todo = [sample for sample in shard.select(samples) if sample["id"] not in done]
        if not todo:
            return
        if done:
            logger.warning("%s has %d of %d answers; resuming.", self.folder, len(done), len(samples))
        path = self.folder / shard.file_name
        bar = tqdm(total=len(todo), desc="answers", unit="", disable=None)
        with open(path, "ab") as file, bar:
            text = path.read_bytes()
            if not text.endswith(b"\n"):  # the process died while it wrote; that sample is answered again
                file.truncate(text.rfind(b"\n") + 1)
            for number, answer in enumerate(answer_many(todo)):
                if number == 0:
                    self._claim()  # a run with other settings may have answered while this one loaded its model
                row = {name: getattr(answer, name) for name in ("id", "text", "num_tokens", "finish_reason")}
                file.write(json.dumps(row, ensure_ascii=False).encode() + b"\n")
                file.flush()  # survives a kill of this process
                bar.update()
            os.fsync(file.fileno())

    @contextlib.contextmanager
    def lock_shard(self, shard: Shard) -> Iterator[None]:
        """Locks this shard of the run; an `OSError` says that another process works on it."""
        with locked_file(self.folder / f".{shard.file_name}.lock") as is_mine:
            if not is_mine:
                part = "this run" if shard.count == 1 else f"shard {shard.index + 1} of {shard.count}"
                raise OSError(
                    f"{self.folder}: another process works on {part}. Wait for it, stop it, or give another --out; --shard 1/2 "
                    "and --shard 2/2 divide a run over processes."
                )
            yield


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
) -> dict | None:
    """
    Answers a benchmark and scores it; resumes a run in the same folder.

    Args:
        make_predictor (`Callable[[], LlavaPredictor]`): Loads the model; called only if samples are left to answer.
        model (`dict`): From [`describe_model`].
        shard ([`Shard`], *optional*): What this process answers. The process that finishes last scores all.
        decoding (`dict`, *optional*): Fields of [`DecodingSettings`].
        partial (`bool`, defaults to `False`): Score although some samples have no answer.

    Returns:
        `dict | None`: the results; `None` if another shard is unfinished (and `partial` is off) or is scoring.

    Raises:
        OSError: another process works on this shard of the run, or images are missing.
        ValueError: the folder contains another run.
    """
    benchmark.check_images()
    decoding = {"max_new_tokens": benchmark.max_new_tokens, **(decoding or {})}
    settings, data = {**benchmark.settings, **decoding}, benchmark.data_identity()
    folder = AnswerFolder(out, {"benchmark": benchmark.name, "model": model, "data": data, "settings": settings})

    def answer_many(samples):
        return make_predictor().answer_many(
            samples,
            batch_size=batch_size,
            image_folder=benchmark.image_folder,
            follow_symlinks=benchmark.follow_symlinks,
            **decoding,
        )

    shard = shard or Shard()
    with folder.lock_shard(shard):
        folder.run(benchmark.samples, shard, answer_many)
        answers = folder.answers()
        answered = [sample["id"] for sample in benchmark.samples if sample["id"] in answers]
        if len(answered) < len(benchmark.samples) and not partial:
            logger.warning("%d of %d samples have an answer; not scored yet.", len(answered), len(benchmark.samples))
            return None
        with locked_file(folder.folder / ".scoring") as is_mine:  # shards may end together
            if not is_mine:
                logger.warning("All samples have an answer; another process scores them.")
                return None
            scored = benchmark.score({sample_id: answers[sample_id]["text"] for sample_id in answered})
            scored.counts["cut_at_max_new_tokens"] = sum(answers[i]["finish_reason"] == "length" for i in answered)
            about = {"total": benchmark.whole, "answered": len(answered), "model": model, "data": data}
            return write_results(out, benchmark.name, scored, settings=settings, **about)


def _whole_lines(path: Path) -> list[dict]:
    """The rows of a file, except a last line that is incomplete: a process may be writing it."""
    text = path.read_bytes()
    lines = text[: text.rfind(b"\n") + 1].split(b"\n")  # not splitlines(): an answer may contain U+2028
    try:
        return [json.loads(line) for line in lines if line]
    except ValueError as error:
        raise ValueError(f"{path} has a line that is not JSON ({error}). Remove that line, or the file.") from None


def _differences(before: dict, now: dict, path: str = "") -> list[str]:
    found = []
    for key in sorted({*before, *now}):
        old, new = before.get(key), now.get(key)
        if isinstance(old, dict) and isinstance(new, dict):
            found += _differences(old, new, f"{path}{key}.")
        elif old != new:
            was, is_now = (json.dumps(value, ensure_ascii=False)[:60] for value in (old, new))
            found.append(f"{path}{key} was {was}, is {is_now}")
    return found
