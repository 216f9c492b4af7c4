"""Instruction data from contexts by a language-only model (LLaVA §3): conversation, detailed description, reasoning.

The ledger in the run's folder is the run's only state; the same call resumes an interrupted run.
"""

import logging
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from ..endpoint import (
    BatchSummary,
    Budget,
    ChatModel,
    Ledger,
    Prices,
    Reply,
    RunSettings,
    RunSummary,
    Task,
    Usage,
    Verdict,
    read_batch,
    run_tasks,
)
from ..endpoint.chat import Message
from ..endpoint.ledger import LedgerCounts
from .contexts import Context, ContextCounts, read_contexts
from .output import write_output
from .prompts import load_prompts
from .replies import Rejection
from .run import GenerateConfig, RunFolder
from .samples import OutputSettings, OutputSummary, find_image
from .validate import ValidationSettings, validate


logger = logging.getLogger(__name__)


@dataclass
class GenerateSummary:
    """What `generate` did."""

    run: RunSummary
    output: OutputSummary | None  # `None` while nothing is accepted or rejected
    missing_images: int  # images that are not in the image folder; their tasks were skipped
    ledger: LedgerCounts  # over all calls
    cost: float  # dollars over all calls


@dataclass
class Estimate:
    """Expected usage of the tasks that are not settled."""

    tasks: Counter = field(default_factory=Counter)  # by type
    usage: Usage = Usage(0, 0)  # prompts by characters, replies by the examples' lengths
    most_usage: Usage = Usage(0, 0)  # with every reply at its maximum length
    samples: dict[str, list[Message]] = field(default_factory=dict)  # the first prompt of each type
    missing_images: int = 0


class Plan:
    """The tasks of a run that are not settled, without those whose image is missing (`images=None`: no check)."""

    def __init__(self, folder: RunFolder, ledger: Ledger, images: Path | None = None, limit: int | None = None):
        self.folder, self.ledger, self.images, self.limit = folder, ledger, images, limit
        self.settled, self.missing = 0, []  # tasks that were settled before; names of images that are not there

    def __iter__(self) -> Iterator[Task]:
        config, name, is_missing = self.folder.config, None, False
        for task_id, row, kind in self.folder.plan(self.limit):
            if self.ledger.state(task_id).final:
                self.settled += 1
                continue
            if (
                self.images is not None and row["image"] != name
            ):  # looked for once: the types of an image are consecutive
                name = row["image"]
                is_missing = find_image(self.images, name) is None
                if is_missing:
                    self.missing.append(name)
            if is_missing:
                continue
            seed = (zlib.crc32(task_id.encode()) + config.seed) % 2**31 if config.send_seed else None
            messages = self.folder.prompts[kind].messages(Context.from_dict(row))
            yield Task(task_id, messages, config.max_reply_tokens, config.temperature, seed)


def make_judge(settings: ValidationSettings) -> Callable[[Task, Reply], Verdict]:
    """A function that judges a reply by `validate`; the type is the end of the task's id."""

    def judge(task: Task, reply: Reply) -> Verdict:
        try:
            validate(reply.text, task.id.rpartition(":")[2], settings, reply.finish_reason)
        except Rejection as rejection:
            return Verdict(rejection.reason, rejection.detail, rejection.retry_prompt)
        return Verdict()

    return judge


def open_folder(
    out: str | Path,
    config: GenerateConfig,
    *,
    contexts: Iterable[Context] | None = None,
    captions: str | Path | None = None,
    boxes: str | Path | None = None,
    prompts: str | Path | None = None,
) -> RunFolder:
    """The folder of a run, with its contexts from a list or from files (`read_contexts`) and its prompts (`load_prompts`)."""
    if (contexts is None) == (captions is None):
        raise ValueError("Give either contexts or a file of captions.")
    folder = RunFolder(out, config, load_prompts(prompts, config.types))
    sources = None
    if contexts is not None:
        contexts = list(contexts)
        counts = ContextCounts(contexts=len(contexts), boxes=sum(len(context.boxes) for context in contexts))
    else:
        sources = [Path(path) for path in (captions, boxes) if path is not None]
        for source in sources:
            if not source.is_file():
                raise OSError(f"{source} does not exist.")
        counts = ContextCounts()
        contexts = read_contexts(captions, boxes, max_boxes=config.max_boxes, counts=counts)
    folder.store_contexts(contexts, counts, sources)
    return folder


def open_ledger(folder: RunFolder, write: bool = True) -> Ledger:
    """The ledger of a run; an `OSError` says that another process writes to it."""
    return Ledger(folder.path / "ledger.jsonl", write=write)


def estimate(folder: RunFolder, *, images: Path | None = None, limit: int | None = None) -> Estimate:
    """Expected usage of the rest of a run, without a request."""
    found, budget, most = Estimate(), Budget(), folder.config.max_reply_tokens
    expected, prompt_tokens = {}, 0
    for kind, prompt in folder.prompts.items():
        lengths = [len(answered) for _, answered in prompt.examples]
        tokens = round(Budget.TOKENS_PER_CHARACTER * sum(lengths) / len(lengths)) if lengths else most
        expected[kind] = min(most, tokens)
    with open_ledger(folder, write=False) as ledger:
        plan = Plan(folder, ledger, images, limit)
        for task in plan:
            kind = task.id.rpartition(":")[2]
            found.tasks[kind] += 1
            found.samples.setdefault(kind, task.messages)
            prompt_tokens += budget.estimate(task.messages, 0).prompt_tokens
    found.usage = Usage(prompt_tokens, sum(number * expected[kind] for kind, number in found.tasks.items()))
    found.most_usage = Usage(prompt_tokens, most * found.tasks.total())
    found.missing_images = len(plan.missing)
    return found


def generate(
    out: str | Path,
    model: ChatModel,
    config: GenerateConfig,
    *,
    contexts: Iterable[Context] | None = None,
    captions: str | Path | None = None,
    boxes: str | Path | None = None,
    images: str | Path | None = None,
    prompts: str | Path | None = None,
    limit: int | None = None,
    settings: RunSettings | None = None,
    max_tokens: int | None = None,
    max_cost: float | None = None,
    prices: Prices | None = None,
    validation: ValidationSettings | None = None,
    output: OutputSettings | None = None,
    progress: bool = False,
    handle_interrupt: bool = False,
) -> GenerateSummary:
    """Makes instruction data; the same call resumes an interrupted run.

    Args:
        out: The run's folder (see `run.py`).
        contexts, captions, boxes, prompts: As in `open_folder`.
        images: Image folder; contexts without their image are skipped. `None`: no check, and no `datasets` folder.
        limit: Maximum number of contexts; a later call may raise it.
        max_tokens, max_cost: Budget in tokens and dollars over all calls on this folder; `max_cost` requires `prices`.
        handle_interrupt: Whether the first Ctrl-C finishes the requests in flight.

    Raises:
        ValueError: settings differ from those the run began with, no context, no image found, a budget without prices.
        OSError: a file does not exist, or another process uses this folder.
    """
    from tqdm import tqdm

    folder = open_folder(out, config, contexts=contexts, captions=captions, boxes=boxes, prompts=prompts)
    images = check_images(folder, images, limit)
    budget = Budget(max_tokens, max_cost, prices)
    judge = make_judge(validation or ValidationSettings(language=config.language))
    with open_ledger(folder) as ledger:
        plan = Plan(folder, ledger, images, limit)
        settled = [ledger.state(task_id).final for task_id, _, _ in folder.plan(limit)] if progress else []
        counts: Counter = Counter()
        look = {"unit": "reply", "dynamic_ncols": True, "smoothing": 0.05, "disable": not progress}
        with tqdm(total=len(settled), initial=sum(settled), **look) as bar:

            def on_settled(task: Task, accepted: bool) -> None:
                counts["accepted" if accepted else "rejected"] += 1
                bar.set_postfix(accepted=counts["accepted"], rejected=counts["rejected"], refresh=False)
                bar.update(1)

            summary = run_tasks(
                plan,
                model,
                ledger,
                run_id=folder.id,
                judge=judge,
                settings=settings,
                budget=budget,
                on_settled=on_settled,
                handle_interrupt=handle_interrupt,
            )
        summary.skipped = plan.settled
        if plan.missing:
            names = ", ".join(plan.missing[:3])
            logger.warning("%d images are not in %s (%s …); they were skipped.", len(plan.missing), images, names)
        return finish(folder, ledger, summary, plan, limit, prices, output)


def finish(
    folder: RunFolder,
    ledger: Ledger,
    summary: RunSummary,
    plan: Plan,
    limit: int | None,
    prices: Prices | None,
    output: OutputSettings | None,
) -> GenerateSummary:
    """Writes the data so far and sums up."""
    budget = Budget(prices=prices or Prices())
    ledger.charge(budget)
    if prices not in (None, Prices()):
        folder.about["prices"] = [prices.prompt, prices.completion]
    if plan.images is not None:
        folder.about["images"] = str(plan.images)
    folder.save()
    written = None
    if ledger.counts.accepted or ledger.counts.rejected:
        written = write_output(folder, ledger, images=plan.images, limit=limit, settings=output)
    return GenerateSummary(summary, written, len(plan.missing), ledger.counts, budget.cost)


def check_images(folder: RunFolder, images: str | Path | None, limit: int | None) -> Path | None:
    """The image folder. ValueError if no image of the run is in it, OSError if it does not exist."""
    if images is None:
        return None
    images = Path(images)
    if not images.is_dir():
        raise OSError(f"The image folder {images} does not exist.")
    for row in folder.contexts(limit):
        if find_image(images, row["image"]):
            return images
    raise ValueError(
        f"None of the images is in {images}: '{images / row['image']}' does not exist. Is --images the folder to which the "
        "file names in the captions are relative?"
    )


def batch_in(
    folder: RunFolder,
    results: Iterable[str | Path],
    *,
    images: Path | None = None,
    limit: int | None = None,
    prices: Prices | None = None,
    validation: ValidationSettings | None = None,
    output: OutputSettings | None = None,
) -> tuple[BatchSummary, GenerateSummary]:
    """Reads results of OpenAI's Batch API (`read_batch`) and writes the data so far."""
    judge = make_judge(validation or ValidationSettings(language=folder.config.language))
    with open_ledger(folder) as ledger:
        read = read_batch(Plan(folder, ledger), results, ledger, judge=judge)
        summary = RunSummary(accepted=read.accepted, rejected=read.rejected + read.refused, batched=read.waiting)
        return read, finish(folder, ledger, summary, Plan(folder, ledger, images), limit, prices, output)
