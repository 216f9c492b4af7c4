"""Instruction data from contexts by a language-only model (LLaVA §3): conversation, detailed description, reasoning.

The ledger in the run's folder is the run's only state; the same call resumes an interrupted run.
"""

import logging
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..endpoint import (
    BatchSummary,
    Budget,
    ChatModel,
    Ledger,
    OpenAIModel,
    Prices,
    Reply,
    RunSettings,
    RunSummary,
    Task,
    Usage,
    Verdict,
    forget_batch,
    read_batch,
    run_tasks,
    write_batch,
)
from .contexts import Context, ContextCounts, read_contexts
from .output import write_output
from .prompts import Prompt, load_prompts
from .replies import Rejection
from .run import GenerateConfig, RunFolder
from .samples import OutputSettings, OutputSummary, find_image
from .validate import ValidationSettings, validate


logger = logging.getLogger(__name__)


@dataclass
class GenerateSummary:
    """What `generate` did.

    Attributes:
        run: How the requests ended.
        output: What was written; `None` while nothing is accepted or rejected.
        tasks: Tasks of the run, by type.
        missing_images: Images that are not in the image folder; their tasks were skipped.
        ledger: The ledger's counts over all runs.
        cost: Dollars so far.
    """

    run: RunSummary
    output: OutputSummary | None
    tasks: Counter
    missing_images: int
    ledger: Any
    cost: float


@dataclass
class Estimate:
    """Expected usage of a run.

    Attributes:
        tasks: Tasks that are not settled, by type.
        usage: Expected tokens: prompts by characters, replies by the examples' lengths.
        most_usage: The same with every reply at its maximum length.
        samples: The messages of the first task of each type.
        missing_images: Images that are not in the image folder.
    """

    tasks: Counter = field(default_factory=Counter)
    usage: Usage = Usage(0, 0)
    most_usage: Usage = Usage(0, 0)
    samples: dict[str, list[dict[str, str]]] = field(default_factory=dict)
    missing_images: int = 0


class Plan:
    """The open tasks of a run, one by one, without those whose image is missing (`images=None`: no check)."""

    def __init__(self, folder: RunFolder, ledger: Ledger, images: Path | None = None, limit: int | None = None):
        self.folder, self.ledger, self.images, self.limit = folder, ledger, images, limit
        self.tasks: Counter = Counter()
        self.settled = 0
        self.missing: list[str] = []
        self.missing_images = 0
        self.missing_tasks = 0

    def __iter__(self) -> Iterator[Task]:
        absent, present = None, None  # the last image: its types follow one another
        for task_id, context, kind in self.folder.plan(self.limit):
            self.tasks[kind] += 1
            if self.ledger.state(task_id).final:
                self.settled += 1
                continue
            if self.images is not None and context.image != present:
                if context.image != absent and find_image(self.images, context.image) is None:
                    absent = context.image
                    self.missing_images += 1
                    self.missing = [*self.missing, context.image][:3]
                if context.image == absent:
                    self.missing_tasks += 1
                    continue
                present = context.image
            yield make_task(task_id, context.load(), self.folder.prompts[kind], self.folder.config)


def make_task(task_id: str, context: Context, prompt: Prompt, config: GenerateConfig) -> Task:
    """The task of one context and type."""
    seed = (zlib.crc32(task_id.encode()) + config.seed) % 2**31 if config.send_seed else None
    return Task(task_id, prompt.messages(context), config.max_reply_tokens, config.temperature, seed)


def make_judge(settings: ValidationSettings) -> Callable[[Task, Reply], Verdict]:
    """Judges a reply by `validate`; the type is the end of the task's id."""

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
    """The folder of a run with its contexts stored in it, from a list or from files (`read_contexts`).

    Raises:
        ValueError: neither or both are given, or the folder's run has other settings, prompts or contexts.
        OSError: a file is absent.
    """
    if (contexts is None) == (captions is None):
        raise ValueError("Give either contexts or a file of captions.")
    folder = RunFolder(out, config, load_prompts(prompts, config.types))
    if contexts is not None:
        contexts = list(contexts)
        counts = ContextCounts(contexts=len(contexts), boxes=sum(len(context.boxes) for context in contexts))
        folder.store_contexts(contexts, counts, None)
    else:
        sources = [Path(path) for path in (captions, boxes) if path is not None]
        for source in sources:
            if not source.is_file():
                raise OSError(f"{source} is absent.")
        counts = ContextCounts()
        read = read_contexts(captions, boxes, max_boxes=config.max_boxes, counts=counts)
        folder.store_contexts(read, counts, sources)
    return folder


def estimate(folder: RunFolder, *, images: Path | None = None, limit: int | None = None) -> Estimate:
    """Expected usage of the rest of a run, without a request."""
    found = Estimate()
    budget = Budget()
    examples = {kind: [len(answered) for _, answered in prompt.examples] for kind, prompt in folder.prompts.items()}
    most = folder.config.max_reply_tokens
    expected = {
        kind: min(most, round(Budget.TOKENS_PER_CHARACTER * sum(lengths) / len(lengths))) if lengths else most
        for kind, lengths in examples.items()
    }
    with Ledger(folder.path / "ledger.jsonl", write=False) as ledger:
        plan = Plan(folder, ledger, images, limit)
        prompt_tokens = completion_tokens = 0
        for task in plan:
            kind = task.id.rpartition(":")[2]
            found.tasks[kind] += 1
            found.samples.setdefault(kind, task.messages)
            prompt_tokens += budget.estimate(task.messages, 0).prompt_tokens
            completion_tokens += expected[kind]
    found.usage = Usage(prompt_tokens, completion_tokens)
    found.most_usage = Usage(prompt_tokens, most * found.tasks.total())
    found.missing_images = plan.missing_images
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
        model: The language model.
        config: What is made.
        contexts: The contexts, or instead of them:
        captions: File of captions (`read_contexts`).
        boxes: File of boxes.
        images: Image folder; contexts without their image are skipped. `None`: no check, and no `datasets` folder.
        prompts: Folder of prompts; `None` for the package's own.
        limit: Maximum number of contexts; a later call may raise it.
        settings: Concurrency, limits, back-off.
        max_tokens, max_cost: Budget in tokens and dollars over all calls on this folder; `max_cost` requires `prices`.
        prices: Of the model.
        validation: Rules for a reply.
        output: How the data is written.
        progress: Whether to show a progress bar.
        handle_interrupt: Whether the first Ctrl-C finishes what is in flight.

    Raises:
        ValueError: settings differ from those the run began with, no context, no image found, a budget without prices.
        OSError: a file is absent, or another process runs in this folder.
    """
    folder = open_folder(out, config, contexts=contexts, captions=captions, boxes=boxes, prompts=prompts)
    images = check_images(folder, images, limit)
    budget = Budget(max_tokens, max_cost, prices)
    judge = make_judge(validation or ValidationSettings(language=config.language))
    with Ledger(folder.path / "ledger.jsonl") as ledger:
        plan = Plan(folder, ledger, images, limit)
        bar = _Bar(plan) if progress else None
        try:
            summary = run_tasks(
                plan,
                model,
                ledger,
                run_id=folder.id,
                judge=judge,
                settings=settings,
                budget=budget,
                on_settled=bar.settled if bar else None,
                handle_interrupt=handle_interrupt,
            )
        finally:
            if bar:
                bar.close()
        summary.skipped = plan.settled
        if plan.missing_images:
            logger.warning(
                "%s images are not in %s (%s …); they were skipped.",
                f"{plan.missing_images:,}",
                images,
                ", ".join(plan.missing),
            )
        return finish(folder, ledger, summary, plan, images, limit, prices, output)


def finish(
    folder: RunFolder,
    ledger: Ledger,
    summary: RunSummary,
    plan: Plan,
    images: Path | None,
    limit: int | None,
    prices: Prices | None,
    output: OutputSettings | None,
) -> GenerateSummary:
    """Writes the data so far and sums up."""
    prices = prices or Prices()
    cost = total_cost(ledger, prices)
    if prices != Prices():
        folder.about["prices"] = [prices.prompt, prices.completion]
    if images is not None:
        folder.about["images"] = str(images)
    folder.save()
    written = None
    if ledger.counts.accepted or ledger.counts.rejected:
        written = write_output(folder, ledger, images=images, limit=limit, settings=output)
    return GenerateSummary(summary, written, plan.tasks, plan.missing_images, ledger.counts, cost)


def total_cost(ledger: Ledger, prices: Prices) -> float:
    """Dollars for all replies and for what may have been billed without one."""
    budget = Budget(prices=prices)
    ledger.charge(budget)
    return budget.cost


def check_images(folder: RunFolder, images: str | Path | None, limit: int | None) -> Path | None:
    """The image folder, if it has at least one image of the run. ValueError without any, OSError without the folder."""
    if images is None:
        return None
    images = Path(images)
    if not images.is_dir():
        raise OSError(f"The image folder {images} is absent.")
    first, number = "", 0
    for context in folder.contexts(limit):
        if find_image(images, context.image):
            return images
        first = first or context.image
        number += 1
    raise ValueError(
        f"None of the {number:,} images is in {images}: '{images / first}' does not exist. Is --images the folder to which "
        "the file names in the captions are relative?"
    )


class _Bar:
    """A progress bar over the tasks of a plan, with the share of accepted replies."""

    def __init__(self, plan: Plan):
        from tqdm import tqdm

        settled = [plan.ledger.state(task_id).final for task_id, _, _ in plan.folder.plan(plan.limit)]
        self.plan, self.total = plan, len(settled)
        self.bar = tqdm(total=self.total, initial=sum(settled), unit="reply", dynamic_ncols=True, smoothing=0.05)
        self.counts = [0, 0]

    def settled(self, task: Task, accepted: bool) -> None:
        self.counts[accepted] += 1
        self.bar.total = self.total - self.plan.missing_tasks  # missing images are found on the way
        self.bar.update(1)
        self.bar.set_postfix(accepted=self.counts[1], rejected=self.counts[0], refresh=False)

    def close(self) -> None:
        self.bar.close()


def batch_out(
    folder: RunFolder,
    model: OpenAIModel,
    files: str | Path,
    *,
    images: Path | None = None,
    limit: int | None = None,
    budget: Budget | None = None,
) -> BatchSummary:
    """Writes what is not settled into files for OpenAI's Batch API (`write_batch`)."""
    with Ledger(folder.path / "ledger.jsonl") as ledger:
        plan = Plan(folder, ledger, images, limit)
        return write_batch(plan, model, ledger, files, run_id=folder.id, budget=budget)


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
    with Ledger(folder.path / "ledger.jsonl") as ledger:
        plan = Plan(folder, ledger)
        read = read_batch(plan, results, ledger, judge=judge)
        summary = RunSummary(accepted=read.accepted, rejected=read.rejected + read.refused, batched=read.waiting)
        return read, finish(folder, ledger, summary, plan, images, limit, prices, output)


def batch_forget(folder: RunFolder) -> int:
    """Frees tasks that wait in batch files (`forget_batch`)."""
    with Ledger(folder.path / "ledger.jsonl") as ledger:
        return forget_batch(Plan(folder, ledger), ledger)
