"""
Runs a benchmark: samples → answers in a folder → scores → `results.json`. A run can be killed and resumed, and divided over
processes.

    out/evaluation.json      what is evaluated; a folder never mixes two runs
    out/answers.jsonl        one line per answer, as they come; `answers.2-of-4.jsonl` of a shard
    out/results.json         written when every sample has its answer
"""

import contextlib
import json
import logging
import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from ..data.images import image_key
from ..io.atomic import write_atomic
from ..io.locks import lock
from .results import RUN_NAME, Scored, hash_files, hash_json, make_results, write_results


logger = logging.getLogger(__name__)

_ANSWER_FILES = re.compile(r"answers(\.\d+-of-\d+)?\.jsonl")


@dataclass(frozen=True)
class Benchmark:
    """
    A benchmark that is ready to be answered.

    Attributes:
        name (`str`): As in `results.json`.
        samples (`list[dict]`): As [`LlavaPredictor.answer_many`] takes them; ids are strings.
        score (`Callable[[dict[str, str]], Scored]`): Scores answers, given by sample id; some may be missing.
        data (`dict`): Hashes of the files, the split.
        settings (`dict`): How the questions are asked and scored.
        image_folder (`str`, *optional*): What the samples' paths are relative to.
        max_new_tokens (`int`): Of an answer.
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
        """The benchmark's first `limit` samples; the results say of how many."""
        if limit is None or limit >= len(self.samples):
            return self
        if limit < 1:
            raise ValueError(f"--limit must be at least 1, got {limit}.")
        settings = {**self.settings, "limit": limit}
        return replace(self, samples=self.samples[:limit], total=self.whole, settings=settings)


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
        score=lambda answers: score(questions, answers),
        data={"files": hash_files(files)},
        settings={"instruction": instruction, **settings},
        image_folder=os.fspath(image_folder),
        max_new_tokens=16,
    )


class Shard:
    """
    One of `count` shards of the samples. Samples with the same images are in the same shard: each image is encoded once.

    Args:
        index (`int`): From 0.
        count (`int`): Number of shards.
    """

    def __init__(self, index: int = 0, count: int = 1):
        if count < 1 or not 0 <= index < count:
            raise ValueError(f"There is no shard {index + 1} of {count}: give --shard 1/4 to --shard 4/4.")
        self.index, self.count = index, count

    @classmethod
    def parse(cls, text: str | None) -> "Shard":
        """`"2/4"` → the second of four. `None`: the rank of this process under `accelerate launch` or `torchrun`."""
        if text is None:
            return cls(int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1)))
        match = re.fullmatch(r"(\d+)/(\d+)", text)
        if match is None:
            raise ValueError(f"--shard is {text!r}; give it as number/count, from 1: --shard 1/4.")
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
    The folder of one run.

    Args:
        folder (`str` or `os.PathLike`)
        identity (`dict`): What the answers depend on (benchmark, model, data, settings), as JSON.

    Raises:
        ValueError: the folder belongs to another run, which has answers or is running; the differences are named.
    """

    def __init__(self, folder: str | os.PathLike, identity: dict):
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        self.identity = json.loads(json.dumps(identity))  # as it is read back
        self._claim()

    def _claim(self) -> None:
        """Take the folder if it belongs to no run with answers or with a running process."""
        run_file = self.folder / RUN_NAME
        with _locked(self.folder / f".{RUN_NAME}.lock", wait=True):
            if not run_file.is_file() or not self._is_in_use():
                write_atomic(run_file, json.dumps(self.identity, indent=2, ensure_ascii=False) + "\n", sync=True)
            before = json.loads(run_file.read_text("utf-8"))
        if different := _differences(before, self.identity):
            raise ValueError(
                f"{self.folder} holds answers of another run: {'; '.join(different[:4])}. Give another --out, or remove "
                "the folder."
            )

    def _is_in_use(self) -> bool:
        for path in self.folder.iterdir():
            if _ANSWER_FILES.fullmatch(path.name) and path.stat().st_size:
                return True
            if _ANSWER_FILES.fullmatch(path.name[1:].removesuffix(".lock")):
                with _locked(path) as is_free:
                    if not is_free:
                        return True
        return False

    def answers(self) -> dict[str, dict]:
        """All answers so far, of every shard, by id. An incomplete last line is ignored."""
        found: dict[str, dict] = {}
        for path in sorted(self.folder.iterdir()):
            if _ANSWER_FILES.fullmatch(path.name):
                for row in _read_answers(path):
                    found.setdefault(row["id"], row)
        return found

    def run(
        self, samples: list[dict], shard: Shard, answer_many: Callable[[list[dict]], Iterable], progress: bool = True
    ) -> None:
        """
        Answers what this shard has not answered yet.

        Args:
            samples (`list[dict]`): All samples, as [`LlavaPredictor.answer_many`] takes them; ids are strings.
            shard ([`Shard`])
            answer_many: Gives an [`Answer`] for each of the samples, in any order. Called only if there is work.
            progress (`bool`): Show a bar.
        """
        from tqdm import tqdm

        done = self.answers()
        todo = [sample for sample in shard.select(samples) if sample["id"] not in done]
        if not todo:
            return
        if done:
            logger.warning("%s has %d of %d answers; resuming.", self.folder, len(done), len(samples))
        _drop_torn_line(self.folder / shard.file_name)
        bar = tqdm(total=len(todo), desc="answers", unit="", disable=not progress or None)
        with open(self.folder / shard.file_name, "a", encoding="utf-8") as file, bar:
            for answer in answer_many(todo):
                row = {
                    "id": answer.id,
                    "text": answer.text,
                    "num_tokens": answer.num_tokens,
                    "finish_reason": answer.finish_reason,
                }
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
                file.flush()  # survives a kill of this process
                bar.update()
            os.fsync(file.fileno())

    @contextlib.contextmanager
    def hold(self, shard: Shard) -> Iterator[None]:
        """
        Locks this shard of the run.

        Raises:
            OSError: another process works on it.
        """
        with _locked(self.folder / f".{shard.file_name}.lock") as is_mine:
            if not is_mine:
                part = "this run" if shard.count == 1 else f"shard {shard.index + 1} of {shard.count} of this run"
                raise OSError(
                    f"{self.folder}: another process is at {part} now. Wait for it, stop it, or give another --out. "
                    "Processes divide a run by --shard 1/2 and --shard 2/2."
                )
            self._claim()  # a run with other settings may have taken the folder before this lock
            yield

    def scoring(self) -> contextlib.AbstractContextManager[bool]:
        """`True` for the process that scores; `False` while another one does (shards that end together)."""
        return _locked(self.folder / ".scoring")


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
    Answers a benchmark and scores it; resumes a run in the same folder.

    Args:
        benchmark ([`Benchmark`])
        make_predictor (`Callable[[], LlavaPredictor]`): Loads the model; called only if samples are left to answer.
        out (`str` or `Path`): The run's folder.
        model (`dict`): From [`describe_model`].
        shard ([`Shard`], *optional*): What this process answers. The process that finishes last scores all.
        batch_size (`int`, *optional*): As in [`LlavaPredictor.answer_many`]; does not change answers.
        decoding (`dict`, *optional*): Fields of [`DecodingSettings`].
        partial (`bool`, defaults to `False`): Score although some samples have no answer.

    Returns:
        `dict | None`: the results; `None` if another shard is unfinished (and `partial` is off) or is scoring.

    Raises:
        OSError: another process works on this run, or on this shard of it.
        FileNotFoundError: images are missing.
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
                logger.warning("All samples have an answer; another process scores them.")
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


def check_samples(samples: list[dict]) -> None:
    """
    Raises:
        ValueError: there are no samples, two have the same id, or a text has a lone surrogate.
    """
    if not samples:
        raise ValueError("There is no sample to evaluate.")
    seen = set()
    for sample in samples:
        if sample["id"] in seen:
            raise ValueError(f"Two samples have the id {sample['id']!r}.")
        seen.add(sample["id"])
        try:
            json.dumps([sample["id"], sample.get("messages")], ensure_ascii=False).encode()
        except UnicodeEncodeError:
            raise ValueError(
                f"sample {sample['id']!r} has a lone surrogate in its text, half of a character such as an emoji. Fix the "
                "text."
            ) from None


def check_images(samples: list[dict], folder: str | os.PathLike | None) -> None:
    """
    Raises:
        FileNotFoundError: image files are missing: how many of how many, and the first three.
    """
    wanted = dict.fromkeys(
        os.fspath(image) for sample in samples for image in sample["images"] if isinstance(image, (str, os.PathLike))
    )
    missing = [path for path in wanted if not os.path.isfile(os.path.join(folder or "", path))]
    if missing:
        where = f" in {os.fspath(folder)}" if folder else ""
        raise FileNotFoundError(
            f"{len(missing)} of {len(wanted)} images are not there{where}: {', '.join(missing[:3])}"
            f"{', …' if len(missing) > 3 else ''}. Is it the right folder, and is everything unpacked?"
        )


def data_identity(samples: list[dict], files: dict[str, str]) -> dict:
    """Hashes of the data's files, and of the samples made of them."""
    prompts = [
        [
            sample["id"],
            sample["messages"],
            [str(image) for image in sample["images"] if isinstance(image, (str, Path))],
        ]
        for sample in samples
    ]
    return {"files": files, "samples": len(samples), "prompts": hash_json(prompts)}


@contextlib.contextmanager
def _locked(path: Path, wait: bool = False) -> Iterator[bool]:
    """A lock that ends with the process; `False` if another process has it (and `wait` is off)."""
    with open(path, "ab") as file:
        yield lock(file.fileno(), wait)


def _differences(before: dict, now: dict, path: str = "") -> list[str]:
    found = []
    for key in sorted({*before, *now}):
        old, new = before.get(key), now.get(key)
        if isinstance(old, dict) and isinstance(new, dict):
            found += _differences(old, new, f"{path}{key}.")
        elif old != new:
            found.append(f"{path}{key} was {_short(old)}, is {_short(new)}")
    return found


def _short(value) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else f"{text[:57]}…"


def _read_answers(path: Path) -> list[dict]:
    """The complete lines of a file to which another process may be writing."""
    text = path.read_bytes()
    lines = text[: text.rfind(b"\n") + 1].split(b"\n")  # not splitlines(): an answer may hold U+2028
    try:
        return [json.loads(line) for line in lines if line]
    except ValueError as error:
        raise ValueError(f"{path} has a line that is not JSON ({error}). Remove that line, or the file.") from None


def _drop_torn_line(path: Path) -> None:
    """Cuts off an incomplete last line: the process died while it wrote."""
    if not path.is_file():
        return
    text = path.read_bytes()
    whole = text.rfind(b"\n") + 1
    if whole < len(text):
        logger.warning("%s ends in an incomplete line; that sample is answered again.", path)
        os.truncate(path, whole)


__all__ = [
    "AnswerFolder",
    "Benchmark",
    "Shard",
    "check_images",
    "check_samples",
    "data_identity",
    "evaluate",
    "question_benchmark",
    "question_sample",
]
