"""
Answers of a whole benchmark into a folder that can be killed and gone on with, by one process or by several.

    out/evaluation.json      what is being evaluated; a folder never mixes two runs
    out/answers.jsonl        one line per answer, as they come; `answers.2-of-4.jsonl` of a shard
    out/results.json         written when every sample has its answer
"""

import contextlib
import json
import logging
import os
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from ..data.images import image_key
from ..io.locks import lock
from .results import hash_json, write_text


logger = logging.getLogger(__name__)

RUN_NAME = "evaluation.json"
_ANSWER_FILES = re.compile(r"answers(\.\d+-of-\d+)?\.jsonl")


class Shard:
    """
    A part of the samples. Samples with the same images are in the same part, so that each image is encoded once.

    Args:
        index (`int`): From 0.
        count (`int`): Parts in all.
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
        """The samples of this part, those with the same images next to each other."""
        groups: dict[tuple, list[dict]] = {}
        for sample in samples:
            groups.setdefault(tuple(map(image_key, sample["images"])) or (sample["id"],), []).append(sample)
        return [sample for group in list(groups.values())[self.index :: self.count] for sample in group]


class AnswerFolder:
    """
    The folder of one run.

    Args:
        folder (`str` or `os.PathLike`)
        identity (`dict`): What the answers depend on: benchmark, model, data, settings. JSON.

    Raises:
        ValueError: the folder holds answers of another run, or a process is at one; the message names what is different.
    """

    def __init__(self, folder: str | os.PathLike, identity: dict):
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        self.identity = json.loads(json.dumps(identity))  # as it will be read again
        self._claim()

    def _claim(self) -> None:
        """The folder is this run's if it is nobody's: without an answer, and no process is at it."""
        run_file = self.folder / RUN_NAME
        with _locked(self.folder / f".{RUN_NAME}.lock", wait=True):
            if not run_file.is_file() or not self._is_begun():
                write_text(run_file, json.dumps(self.identity, indent=2, ensure_ascii=False) + "\n")
            before = json.loads(run_file.read_text("utf-8"))
        if different := _differences(before, self.identity):
            raise ValueError(
                f"{self.folder} holds answers of another run: {'; '.join(different[:4])}. Give another --out, or remove "
                "the folder."
            )

    def _is_begun(self) -> bool:
        for path in self.folder.iterdir():
            if _ANSWER_FILES.fullmatch(path.name) and path.stat().st_size:
                return True
            if _ANSWER_FILES.fullmatch(path.name[1:].removesuffix(".lock")):
                with _locked(path) as is_free:
                    if not is_free:
                        return True
        return False

    def answers(self) -> dict[str, dict]:
        """All answers so far, of every shard, by id. A line that a kill cut off is left out."""
        found: dict[str, dict] = {}
        for path in sorted(self.folder.iterdir()):
            if not _ANSWER_FILES.fullmatch(path.name):
                continue
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
            logger.warning(
                "%s has %d of %d answers already; going on with the other ones.", self.folder, len(done), len(samples)
            )
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
                file.flush()  # what is written now survives a kill of this process
                bar.update()
            os.fsync(file.fileno())

    @contextlib.contextmanager
    def hold(self, shard: Shard) -> Iterator[None]:
        """
        Keeps this shard of the run for this process.

        Raises:
            OSError: another process is at it.
        """
        with _locked(self.folder / f".{shard.file_name}.lock") as is_mine:
            if not is_mine:
                part = "this run" if shard.count == 1 else f"shard {shard.index + 1} of {shard.count} of this run"
                raise OSError(
                    f"{self.folder}: another process is at {part} now. Wait for it, stop it, or give another --out. "
                    "Processes share a run with --shard 1/2 and --shard 2/2."
                )
            self._claim()  # before this lock, a run with other settings may have found nobody here
            yield

    def scoring(self) -> contextlib.AbstractContextManager[bool]:
        """`True` for the process that may score; `False` while another one is at it (shards that end together)."""
        return _locked(self.folder / ".scoring")


@contextlib.contextmanager
def _locked(path: Path, wait: bool = False) -> Iterator[bool]:
    """A lock that ends with the process, however it dies; `False` if another process has it (and `wait` is off)."""
    with open(path, "ab") as file:
        yield lock(file.fileno(), wait)


def check_samples(samples: list[dict]) -> None:
    """
    Raises:
        ValueError: there are no samples, two have the same id, or one has text that is no text.
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
                f"sample {sample['id']!r} has half a character in its text (a lone surrogate, as where a text was cut in "
                "the middle of an emoji). Mend the text."
            ) from None


def check_images(samples: list[dict], folder: str | os.PathLike | None) -> None:
    """
    Looks for every image file before a model is loaded.

    Raises:
        FileNotFoundError: how many of how many images are missing, and the first few.
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
    """What the run's data is: hashes of its files, and of the samples made of them."""
    prompts = [
        [
            sample["id"],
            sample["messages"],
            [str(image) for image in sample["images"] if isinstance(image, (str, Path))],
        ]
        for sample in samples
    ]
    return {"files": files, "samples": len(samples), "prompts": hash_json(prompts)}


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
    """The whole lines of a file to which another process may be writing."""
    text = path.read_bytes()
    lines = text[: text.rfind(b"\n") + 1].split(b"\n")  # not splitlines(): an answer may hold U+2028
    try:
        return [json.loads(line) for line in lines if line]
    except ValueError as error:
        raise ValueError(f"{path} has a line that is not JSON ({error}). Remove that line, or the file.") from None


def _drop_torn_line(path: Path) -> None:
    """Cuts off the last line if it has no end: this shard's process died while it was writing it."""
    if not path.is_file():
        return
    text = path.read_bytes()
    whole = text.rfind(b"\n") + 1
    if whole < len(text):
        logger.warning("%s ends in the middle of a line; that answer is asked for again.", path)
        os.truncate(path, whole)


__all__ = ["AnswerFolder", "Shard", "check_images", "check_samples", "data_identity"]
