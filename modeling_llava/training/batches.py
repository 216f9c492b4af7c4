"""The data of a run, and how its samples become batches: padded or packed, grouped by length, sharded over processes."""

import itertools
import logging
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, Subset, get_worker_info
from tqdm import tqdm

from ..data.collator import LlavaDataCollator
from ..data.packing import PackedDataset, PackedStream, best_fit_packs
from ..data.sampling import GroupedSampler, TypeMixtureSampler
from ..data.schema import (
    PLACEHOLDER_SAMPLE,
    TOO_LONG,
    BadSampleError,
    read_image_size,
    require_image_folder,
    summarize_drops,
)
from ..data.sources import ConversationStream, load_conversations
from ..kernels.packed_attention import packed_attention_error, use_varlen_attention
from ..modeling_llava import LlavaForConditionalGeneration
from .arguments import LlavaTrainingArguments


logger = logging.getLogger(__name__)


def load_datasets(args: LlavaTrainingArguments) -> tuple[Any, Any]:
    """Training and evaluation data of a run, selected and split by its settings; `eval_size=auto` becomes a number."""
    if args.data is None:
        raise ValueError("data is not set. Give a LLaVA JSON file, or a dataset with `messages` and `images`.")
    require_image_folder(args.image_folder)
    seed = args.sampling_seed
    reading = {"image_folder": args.image_folder, "on_bad_sample": args.on_bad_sample}
    train_dataset = load_conversations(
        args.data,
        split=args.data_split,
        types=args.only_types,
        streaming=args.streaming,
        shuffle_buffer=args.shuffle_buffer if args.streaming else 0,
        seed=seed,
        **reading,
    )
    if args.only_types is not None and not args.streaming:
        if absent := sorted(set(args.only_types) - set(train_dataset.types)):
            raise ValueError(f"only_types names {', '.join(absent)}, but no sample of {args.data} has that type.")
    if args.max_samples is not None and args.max_samples < len(train_dataset):
        train_dataset = train_dataset.select(_shuffled(len(train_dataset), seed)[: args.max_samples])
    if args.on_bad_sample == "raise" and not args.streaming:
        samples = (train_dataset[index] for index in range(min(len(train_dataset), 100)))
        if first := next((sample for sample in samples if sample["images"]), None):  # a wrong folder is wrong for all
            where = {"image_folder": args.image_folder, "follow_symlinks": args.follow_symlinks}
            read_image_size(first["images"][0], sample_id=first["id"], **where)
    eval_dataset = None
    if args.eval_data is not None:
        eval_dataset = load_conversations(args.eval_data, split=args.data_split, types=args.only_types, **reading)
    elif args.eval_size == "auto" and not 50 <= len(train_dataset) <= 5_000:
        args.eval_size = None
        for name in ("eval_strategy", "sample_answers", "benchmarks"):
            if (value := getattr(args, name)) not in (None, 0, "no"):
                used = f"{name}={getattr(value, 'value', value)} evaluates"
                total = f"{len(train_dataset):,} samples"
                raise ValueError(f"{used}, but nothing is held out of {total} by default. Set eval_size or eval_data.")
    elif args.eval_size:
        total, size = len(train_dataset), args.eval_size
        held_out = max(round(total / 20), 4) if size == "auto" else round(size * total) if size < 1 else int(size)
        if not 0 < held_out < total:
            raise ValueError(f"eval_size={size} holds out {held_out} of {total} samples. Choose another.")
        if size == "auto":
            args.eval_size = held_out
            if args.process_index == 0:
                logger.warning("%d of %d samples are held out for evaluation (eval_size=0: none).", held_out, total)
        order = _shuffled(total, seed)
        eval_dataset = train_dataset.select(sorted(order[:held_out]))
        train_dataset = train_dataset.select(sorted(order[held_out:]))
    return train_dataset, eval_dataset


def _shuffled(total: int, seed: int) -> list[int]:
    return torch.randperm(total, generator=torch.Generator().manual_seed(seed)).tolist()


def resolve_packing(model: nn.Module, args: LlavaTrainingArguments, has_own_collator: bool = False) -> None:
    """
    Resolve `packing=auto` and `auto_full` in place, and set an attention that keeps packed samples apart.

    Raises:
        ValueError: `packing` is set, but samples would attend to each other, or need an attention mask of T × T.
    """
    if args.packing == "none":
        return
    reason = _why_not_packed(model, args)
    if args.packing.startswith("auto"):
        if reason is None and has_own_collator:
            reason = "the run has a data collator of its own"
        fills = args.packing == "auto_full" and args.train_sampling_strategy != "group_by_length"
        args.packing = "none" if reason is not None else "full" if fills else "batch"
        if reason is not None:
            logger.info("Samples are padded, not packed: %s.", reason)
    elif reason is not None:
        raise ValueError(f"packing={args.packing}, but {reason}. Set packing=none.")


def _why_not_packed(model: nn.Module, args: LlavaTrainingArguments) -> str | None:
    if (reason := args.why_not_packed()) is not None:
        return reason
    if not isinstance(model, LlavaForConditionalGeneration):
        return "transformers' own class builds an attention mask of tokens × tokens for a pack"
    language_model = model.model.language_model
    before = language_model.config._attn_implementation
    try:
        if args.attn_implementation is None:
            use_varlen_attention(model)
        if any(p.is_meta or hasattr(p, "ds_id") for p in language_model.parameters()):
            return None  # sharded or offloaded: no probe forward
        if (leak := packed_attention_error(language_model)) <= _LEAK:
            return None
        reason = (
            f"samples of a pack attend to each other in {type(language_model).__name__} (relative error {leak:.2g})"
        )
    except ValueError as error:  # an attention with features that the packed one lacks: Gemma 2, GPT-OSS
        reason = str(error).removesuffix(" Do not pack.").rstrip(".")
    if args.attn_implementation is None:
        model.set_attn_implementation({"text_config": before})
    return reason


_LEAK = 0.1  # relative: rounding to 16 bits gives about 0.01, another sample about 1


@dataclass(eq=False)
class EndlessStream(IterableDataset):
    """
    A stream that starts its next epoch when it ends: shards of processes and workers differ in length, and one that ended would leave
    the others waiting. A resumed run counts batches from the first epoch.
    """

    stream: Iterable
    world_size: int = 1
    _epoch: int = 0

    def set_epoch(self, epoch: int) -> None:
        self._epoch = epoch

    def __iter__(self) -> Iterator:
        worker = get_worker_info()
        num_shards = self.world_size * (worker.num_workers if worker else 1)
        num_empty, held_back = 0, 0
        for epoch in itertools.count(self._epoch):
            _set_epoch(self.stream, epoch)
            num_empty += 1
            for sample in self.stream:
                if sample is PLACEHOLDER_SAMPLE and num_empty:  # perhaps there is nothing else
                    held_back += 1
                    continue
                num_empty = 0
                yield from itertools.repeat(PLACEHOLDER_SAMPLE, held_back)
                held_back = 0
                yield sample
            if num_empty <= 2 * num_shards:  # with fewer rows than shards, each has a row within so many epochs
                continue
            if worker is None or worker.id == 0:
                raise ValueError(
                    "This process's shard of the streamed data holds no usable sample: there are too few rows (use fewer processes or "
                    "workers), or all were dropped (`llava data check` says why)."
                )
            return  # a worker too many: `datasets` divides a stream by its own shards


class SkipBatchesCollator:
    """
    A collator that returns the first `num_batches` batches empty: where a resumed stream is read up to where it stopped, no image is
    opened and nothing tokenized for what `Trainer` skips.
    """

    def __init__(self, collator: Callable[[list], dict]):
        self.collator = collator
        self.skip(0)

    def skip(self, num_batches: int) -> None:
        self.num_batches = num_batches
        self._made = 0  # in this process or worker

    def __call__(self, examples: list) -> dict:
        worker = get_worker_info()
        number = self._made * worker.num_workers + worker.id if worker else self._made  # workers take turns
        self._made += 1
        return self.collator(examples) if number >= self.num_batches else {}


@dataclass(eq=False)
class FilledDataset(Dataset):
    """The samples of a dataset, then placeholders, up to a multiple; accelerate would count the first samples twice."""

    dataset: Any
    multiple: int

    def __len__(self) -> int:
        return -(-len(self.dataset) // self.multiple) * self.multiple

    def __getitem__(self, index: int) -> Any:
        return self.dataset[index] if index < len(self.dataset) else PLACEHOLDER_SAMPLE


@dataclass(eq=False)
class ShardedStream(IterableDataset):
    """
    A process's shard of a stream: each process reads all of it, and takes one sample of each round, or a placeholder where the last
    round has none left, so that all have equally many.
    """

    stream: Iterable
    rank: int
    world_size: int

    def set_epoch(self, epoch: int) -> None:
        _set_epoch(self.stream, epoch)

    def __iter__(self) -> Iterator:
        stream = iter(self.stream)
        while samples := list(itertools.islice(stream, self.world_size)):
            yield samples[self.rank] if self.rank < len(samples) else PLACEHOLDER_SAMPLE


def _set_epoch(stream: Any, epoch: int) -> None:
    if hasattr(stream, "set_epoch"):
        stream.set_epoch(epoch)


def pad_to_world_size(dataset: Any, collator: Any, args: LlavaTrainingArguments) -> Any:
    """Evaluation data with equally many samples on all processes; other collators than ours take it as it is."""
    if not isinstance(collator, LlavaDataCollator):
        return dataset
    if isinstance(dataset, IterableDataset):
        stream = dataset.shared_by(0, 1) if isinstance(dataset, ConversationStream) else dataset
        return ShardedStream(stream, args.process_index, args.world_size)
    return dataset if args.world_size == 1 else FilledDataset(dataset, args.world_size * args.eval_batch_size)


def prepare_train_dataset(dataset: Any, collator: Any, args: LlavaTrainingArguments) -> Any:
    """
    The training data of a run, conversations by index or as a stream: in packs for `packing=full`, a stream sharded and without an
    end. The collator tells the length of a conversation.

    Raises:
        BadSampleError: a sample is longer than `max_length`, and `overflow="error"`.
        ValueError: no sample can be used, or `dataloader_drop_last` leaves out all of them.
    """
    if isinstance(dataset, IterableDataset):
        if isinstance(dataset, ConversationStream):
            dataset = dataset.shared_by(args.process_index, args.world_size, keep_places=True)
        elif not isinstance(collator, LlavaDataCollator):
            return dataset
        elif not isinstance(dataset, PackedStream):
            dataset = ShardedStream(dataset, args.process_index, args.world_size)
        if args.packing == "full" and not isinstance(dataset, PackedStream):
            measure = partial(_length_or_drop, _require_lengths(collator), args)
            dataset = PackedStream(dataset, measure, args.pack_length or args.max_length)
        return EndlessStream(dataset, args.world_size)
    if args.packing == "full" and not isinstance(dataset, PackedDataset):
        dataset = _packed(dataset, collator, args)
    needed = args.train_batch_size * args.world_size
    if args.dataloader_drop_last and len(dataset) < needed:
        what = "packs" if isinstance(dataset, PackedDataset) else "samples"
        raise ValueError(
            f"{len(dataset)} {what} do not fill a batch of {args.train_batch_size} on each of {args.world_size} process(es), "
            "and dataloader_drop_last leaves out what does not. Set it to false, or per_device_train_batch_size lower."
        )
    return dataset


def _packed(dataset: Any, collator: Any, args: LlavaTrainingArguments) -> PackedDataset:
    lengths = usable_lengths(dataset, collator, args)
    chosen = np.flatnonzero(lengths)
    if not len(chosen):
        raise ValueError(
            f"none of the {len(dataset)} samples can be used: there is nothing to pack. The lines above, or "
            "`llava data check`, say why."
        )
    if args.type_weights is not None:
        # The draw of the first epoch; packs keep their samples in the epochs after it.
        drawn = np.array(list(TypeMixtureSampler.from_dataset(dataset, args.type_weights, args.sampling_seed)))
        chosen = drawn[lengths[drawn] > 0]
    plan = best_fit_packs(lengths[chosen], args.pack_length or args.max_length, seed=args.sampling_seed)
    if args.process_index == 0:
        logger.warning("Packing: %s. Batch sizes count packs.", plan.summary())
    return PackedDataset(Subset(dataset, chosen.tolist()), plan)


def grouped_sampler(dataset: Any, collator: Any, args: LlavaTrainingArguments) -> GroupedSampler:
    """The sampler for `train_sampling_strategy=group_by_length`, or by modality as well."""
    lengths = usable_lengths(dataset, collator, args, drop=False)
    has_image = None
    if args.group_by_modality:
        num_images = getattr(dataset, "num_images", None)
        if num_images is None:
            num_images = [len(dataset[i].get("images") or ()) for i in range(len(dataset))]
        has_image = np.asarray(num_images) > 0
    global_batch = args.train_batch_size * args.world_size * args.gradient_accumulation_steps
    return GroupedSampler(lengths, global_batch, has_image, seed=args.sampling_seed)


def usable_lengths(dataset: Any, collator: Any, args: LlavaTrainingArguments, drop: bool = True) -> np.ndarray:
    """
    Lengths of all samples in tokens, int64 `[num_samples]`, 0 where a sample cannot be used; no image is opened. The work is sharded
    over processes and the DataLoader's workers. With `drop` an unusable sample raises BadSampleError if the settings say so, and is
    counted; otherwise that is left to the collator.
    """
    rank, world_size = args.process_index, args.world_size
    own = _Lengths(dataset, _require_lengths(collator), args.max_length, range(rank, len(dataset), world_size))
    workers = args.dataloader_num_workers if len(dataset) > 2_000 else 0
    loader = DataLoader(own, batch_size=256, num_workers=workers, collate_fn=list)
    measured = []
    with tqdm(total=len(own), desc="measuring samples", unit=" samples", delay=3, disable=rank != 0) as progress:
        for results in loader:
            measured.extend(results)
            progress.update(len(results))
    if world_size > 1:
        parts: list = [None] * world_size
        torch.distributed.all_gather_object(parts, measured)
        measured = [None] * len(dataset)
        for number, part in enumerate(parts):
            measured[number::world_size] = part
    dropped = Counter()
    for number, result in enumerate(measured):
        if isinstance(result, BadSampleError):
            if drop and _is_asked_to_raise(result, args):
                raise result
            dropped[result.reason] += 1
            measured[number] = 0
    if dropped and drop and rank == 0:
        logger.warning("Before packing: %s.", summarize_drops(dict(dropped)))
    return np.array(measured, dtype=np.int64)


@dataclass(eq=False)
class _Lengths(Dataset):
    """The length of each sample, or the error in its place."""

    dataset: Any
    collator: Any
    max_length: int
    indices: range

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> int | BadSampleError:
        try:
            return _length(self.collator, self.max_length, self.dataset[self.indices[index]])
        except BadSampleError as error:
            return error


def _require_lengths(collator: Any) -> Any:
    if not hasattr(collator, "length"):
        raise ValueError(
            f"{type(collator).__name__} cannot tell the length of a conversation. Let LlavaTrainer make its own collator, "
            "or set packing=none and train_sampling_strategy=random."
        )
    return collator


def _length(collator: Any, max_length: int, conversation: Any) -> int:
    length = collator.length(conversation)
    if length > max_length:
        raise BadSampleError(
            str(conversation.get("id")),
            TOO_LONG,
            f"has {length} tokens, max_length is {max_length}. Raise max_length, shorten the text, or set "
            'overflow="truncate_text" or "drop".',
        )
    return length


def _length_or_drop(collator: Any, args: LlavaTrainingArguments, conversation: Any) -> int:
    """For a stream: 0 for a sample that is to be dropped, which the collator counts."""
    if conversation is PLACEHOLDER_SAMPLE:
        return 0
    try:
        return _length(collator, args.max_length, conversation)
    except BadSampleError as error:
        if _is_asked_to_raise(error, args):
            raise
        collator.count_dropped(error)
        return 0


def _is_asked_to_raise(error: BadSampleError, args: LlavaTrainingArguments) -> bool:
    if error.reason == TOO_LONG and args.overflow != "truncate_text":
        return args.overflow == "error"
    return args.on_bad_sample == "raise"
