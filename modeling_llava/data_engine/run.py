"""The folder of a run of `llava data generate`, and the settings that stay the same when it is resumed.

```
OUT/
  run.json        settings, name of the run, where the contexts came from
  contexts.jsonl  the contexts, as read
  prompts.json    the prompts
  ledger.jsonl    every event; the files below are made from those above
  instruct.json   the data in LLaVA's form
  rejected.jsonl  every reply and turn that is not in it, with the reason
  dataset/        the data as a `datasets` folder with its card
  report.html     samples to look at
```
"""

import dataclasses
import hashlib
import itertools
import json
import math
import time
import uuid
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from ..endpoint import Ledger
from ..io.files import atomic_path, write_atomic
from .contexts import Context, ContextCounts
from .prompts import FOLDERS, Prompt, hash_prompts


@dataclasses.dataclass(frozen=True)
class GenerateConfig:
    """What a run makes; the same when the run is resumed."""

    model: str  # its name at the endpoint
    types: tuple[str, ...] = tuple(FOLDERS)
    # Relative numbers of conversation : detail : complex (LLaVA-Instruct: 58 : 23 : 77 thousand); every image gets the largest.
    mix: tuple[float, float, float] = (58, 23, 77)
    seed: int = 0  # of all random choices and, with `send_seed`, of the model's sampling
    temperature: float | None = 0.7  # `None` for the endpoint's default
    max_reply_tokens: int = 1024
    language: str | None = "en"  # of the replies; `None` for any
    send_seed: bool = False  # whether to send a sampling seed with each request
    max_boxes: int | None = None  # per context, the largest; `None` for all

    def __post_init__(self):
        if not self.types or len(set(self.types)) < len(self.types) or not set(self.types) <= set(FOLDERS):
            raise ValueError(f"types must be different ones of {', '.join(FOLDERS)}, got {', '.join(self.types)}.")
        finite = all(0 <= number < math.inf for number in self.mix)
        if len(self.mix) != len(FOLDERS) or not finite or not any(self.fractions.values()):
            raise ValueError(
                f"mix must be three numbers of 0 or more, one of them of the types above 0, got {self.mix}."
            )
        if self.temperature is not None and not 0 <= self.temperature < math.inf:
            raise ValueError(f"temperature must be 0 or more, got {self.temperature}.")
        if self.max_boxes is not None and self.max_boxes < 0:
            raise ValueError(f"max_boxes must be 0 or more, got {self.max_boxes}.")
        if self.max_reply_tokens < 1:
            raise ValueError(f"max_reply_tokens must be 1 or more, got {self.max_reply_tokens}.")

    @property
    def fractions(self) -> dict[str, float]:
        """Fraction of the images for which each type is made, 0..1."""
        mix = {kind: number for kind, number in zip(FOLDERS, self.mix) if kind in self.types}
        most = max(mix.values()) or 1
        return {kind: number / most for kind, number in mix.items()}

    def makes(self, context_id: str, kind: str) -> bool:
        """Whether a type is made for an image; it depends on its id and the seed alone."""
        draw = int.from_bytes(hashlib.sha256(f"{self.seed}:{kind}:{context_id}".encode()).digest()[:7], "big")
        return draw < self.fractions.get(kind, 0.0) * 2**56


class RunFolder:
    """A run's folder; a `ValueError` says that it contains a run with other settings or prompts."""

    def __init__(self, path: str | Path, config: GenerateConfig, prompts: dict[str, Prompt]):
        self.path = Path(path)
        self.config, self.prompts = config, prompts
        self.path.mkdir(parents=True, exist_ok=True)
        identity = json.loads(json.dumps({**dataclasses.asdict(config), "prompts": hash_prompts(prompts)}))
        self.about = read_about(self.path) if (self.path / "run.json").exists() else None
        before = self.about["settings"] if self.about else identity
        changed = [key for key, value in identity.items() if before.get(key) != value]
        if changed or self.about is None:
            if self.is_answered():
                what = "; ".join(f"{key} was {before.get(key)!r} and is {identity[key]!r}" for key in changed)
                raise ValueError(
                    f"{self.path} contains a run with other settings ({what or 'it has no run.json'}). Resume it with the settings "
                    "it began with, or give another --out."
                )
            # The run's name is part of each request's id: two runs with the same prompts differ.
            now = time.strftime("%Y-%m-%d %H:%M:%S %z")
            self.about = {"run": uuid.uuid4().hex, "created": now, "settings": identity, "contexts": None}
            texts = {kind: dataclasses.asdict(prompt) for kind, prompt in prompts.items()}
            write_json(self.path / "prompts.json", texts)
            self.save()

    @property
    def id(self) -> str:
        return self.about["run"]

    def is_answered(self) -> bool:
        """Whether a reply came or a request waits in a batch: from then on settings, prompts and contexts are fixed."""
        if not (self.path / "ledger.jsonl").exists():
            return False
        with Ledger(self.path / "ledger.jsonl") as ledger:
            return bool(ledger.counts.replies) or any(state.batched for state in ledger.tasks.values())

    def save(self) -> None:
        write_json(self.path / "run.json", self.about)

    def store_contexts(self, contexts: Iterable[Context], counts: ContextCounts, sources: list[Path] | None) -> None:
        """Writes the contexts next to the ledger. ValueError if there are none, or if they differ from those that the run began
        with. Unchanged `sources` are not read again."""
        known, marks, target = self.about["contexts"], None, self.path / "contexts.jsonl"
        if sources is not None:
            marks = [[str(path.resolve()), path.stat().st_size, path.stat().st_mtime_ns] for path in sources]
        if known and marks is not None and marks == known["sources"] and target.exists():
            return
        digest, number = hashlib.sha256(), 0
        with atomic_path(target, sync=True) as partial:
            with open(partial, "wb") as file:
                for context in contexts:
                    line = json.dumps(context.to_dict(), ensure_ascii=False, separators=(",", ":")).encode() + b"\n"
                    digest.update(line)
                    file.write(line)
                    number += 1
            if number == 0:
                raise ValueError(f"No context has captions: {counts.summary()}.")
            if known and known["sha256"] != digest.hexdigest() and self.is_answered():
                raise ValueError(
                    f"The captions or boxes are not those with which the run in {self.path} began ({known['number']:,} "
                    f"contexts then, {number:,} now, or other words). Give another --out."
                )
        self.about["contexts"] = {
            "number": number,
            "boxes": counts.boxes,
            "clipped": counts.clipped,
            "dropped": dict(counts.dropped),
            "sha256": digest.hexdigest(),
            "sources": marks,
        }
        self.save()

    def contexts(self, limit: int | None = None) -> Iterator[dict[str, Any]]:
        """The contexts as `Context.to_dict` gives them, one at a time; at most `limit`."""
        with open(self.path / "contexts.jsonl", encoding="utf-8") as file:
            yield from map(json.loads, itertools.islice(file, limit))

    def plan(self, limit: int | None = None) -> Iterator[tuple[str, dict[str, Any], str]]:
        """`(task id, context, type)` of everything that the run makes, in order."""
        for row in self.contexts(limit):
            for kind in self.config.types:
                if self.config.makes(row["id"], kind):
                    yield f"{row['id']}:{kind}", row, kind


def read_about(path: str | Path) -> dict[str, Any]:
    """`run.json` of a run's folder. ValueError if it has another form, OSError if it does not exist."""
    file = Path(path) / "run.json"
    if not file.is_file():
        raise OSError(f"{file} does not exist: {path} is not the folder of a run of `llava data generate`.")
    try:
        about = json.loads(file.read_text("utf-8"))
        about["settings"], about["run"], about["contexts"]
    except (ValueError, KeyError, TypeError):
        raise ValueError(f"{file} is not the file of a run of `llava data generate`.") from None
    return about


def open_run(path: str | Path) -> RunFolder:
    """The run in a folder, with the settings and prompts it began with."""
    about = read_about(path)
    settings = {key: value for key, value in about["settings"].items() if key != "prompts"}
    settings["types"], settings["mix"] = tuple(settings["types"]), tuple(settings["mix"])
    prompts = json.loads((Path(path) / "prompts.json").read_text("utf-8"))
    for kind, text in prompts.items():
        text |= {"examples": tuple(map(tuple, text["examples"])), "questions": tuple(text["questions"])}
        prompts[kind] = Prompt(**text)
    return RunFolder(path, GenerateConfig(**settings), prompts)


def write_json(path: Path, content: Any) -> None:
    write_atomic(path, json.dumps(content, indent=1, ensure_ascii=False), sync=True)
