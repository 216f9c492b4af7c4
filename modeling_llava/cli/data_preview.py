"""`llava data preview SOURCE`: samples as the model sees them."""

import argparse
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Show samples as the model sees them: the text of the chat template, each image as <image> × 576, supervised tokens "
        "in green, special tokens in cyan. Nothing is trained."
    )
    add = parser.add_argument
    add("source", nargs="+", help="as in `llava data check`")
    add("--processor", required=True, metavar="P", help="model folder or Hub name")
    add("--image-folder", "--images", metavar="DIR", help="folder of relative image paths")
    add("--chat-template", metavar="NAME", help="one of this package's templates in place of the processor's")
    add("-n", "--number", type=int, default=3, help="how many samples (default: 3)")
    add("--start", type=int, default=0, help="index of the first one, from 0 (default: 0)")
    add("--random", action="store_true", help="draw them at random")
    add("--id", action="append", metavar="ID", help="show the sample of this id (repeatable)")
    add("--type", action="append", metavar="TYPE", help="only samples of this type (repeatable)")
    add("--max-length", type=int, default=2048, metavar="N", help="tokens per sample (default: 2048)")
    overflow = {"choices": ("error", "drop", "truncate_text"), "default": "truncate_text"}
    add("--overflow", **overflow, help="what to do with samples over --max-length (default: %(default)s)")
    order = {"choices": ("as_is", "random"), "default": "as_is"}
    add("--first-turn-order", **order, help="of image and question; random as in the paper (default: %(default)s)")
    add("--seed", type=int, default=0, help="seed of --random and --first-turn-order (default: 0)")
    add("--split", default="train", help="split of a dataset that has several (default: train)")
    add("--save-images", metavar="DIR", help="write each image there as the vision tower sees it")
    add("--follow-symlinks", action="store_true", help="allow links that lead out of the image folder")


def run(args: argparse.Namespace) -> int:
    import random

    from rich.console import Console
    from rich.text import Text

    from ..constants import IGNORE_INDEX
    from ..data import LlavaDataCollator, load_conversations
    from ..data.labels import render_sample
    from ..data.schema import summarize_drops
    from ..io.checkpoints import load_processor

    for name, value, least in (
        ("-n", args.number, 1),
        ("--start", args.start, 0),
        ("--max-length", args.max_length, 1),
    ):
        if value < least:
            raise ValueError(f"{name} must be at least {least}, got {value}.")
    processor = load_processor(args.processor)
    if args.chat_template is not None:
        from ..text.chat_templates import load_chat_template

        processor.chat_template = load_chat_template(args.chat_template, image_token=processor.image_token)
    source = args.source if len(args.source) > 1 else args.source[0]
    dataset = load_conversations(source, split=args.split, types=args.type, on_bad_sample="drop")
    names = ("max_length", "overflow", "image_folder", "first_turn_order", "seed", "follow_symlinks")
    collator = LlavaDataCollator(processor, **{name: getattr(args, name) for name in names})
    console = Console(highlight=False, soft_wrap=True)
    dropped = f"{summarize_drops(dataset.dropped)}: `llava data check` lists them" if dataset.dropped else ""
    if args.id is not None:
        names = [sample["id"] for sample in dataset]
        missing = ", ".join(sorted({*args.id} - {*names}))
        if missing:
            raise ValueError(f"There is no usable sample with the id {missing}. {dropped}".strip())
        indices = [index for index, name in enumerate(names) if name in args.id]
    elif args.random:
        indices = random.Random(args.seed).sample(range(len(dataset)), min(args.number, len(dataset)))
    else:
        indices = range(len(dataset))[args.start : args.start + args.number]
        if not indices:
            raise ValueError(f"--start is {args.start} but there are {len(dataset)} samples, numbered from 0.")

    bad = 0
    for index in indices:
        conversation = dataset[index]
        try:
            batch = collator([conversation])
        except ValueError as error:
            bad += 1
            console.print(Text(f"\n{error}", "red"))
            continue
        ids, labels = batch["input_ids"][0], batch["labels"][0]
        images = conversation["images"]
        facts = [
            f"sample {conversation['id']!r}",
            *([conversation["type"]] if conversation["type"] else []),
            f"{len(ids):,} tokens",
            f"{int((labels != IGNORE_INDEX).sum()):,} supervised",
            f"{len(images)} image{'' if len(images) == 1 else 's'}",
            *(image for image in images if isinstance(image, str)),
        ]
        console.print()
        console.rule(Text(", ".join(facts), "bold"), align="left")
        console.print(render_sample(processor, ids.tolist(), labels.tolist()))
        if args.save_images and images:
            for path in _save(batch, processor, Path(args.save_images), conversation["id"]):
                console.print(f"written: {path}")
    console.print(f"\n{len(dataset):,} samples; [green]green[/]: supervised, [cyan]cyan[/]: special tokens, images")
    console.print(dropped)
    return 1 if bad else 0


def _save(batch: dict, processor, folder: Path, sample_id: str) -> list[Path]:
    """The pixels of a batch of one sample as PNG files."""
    import re

    import numpy as np
    from PIL import Image

    folder.mkdir(parents=True, exist_ok=True)
    images = processor.image_processor
    paths = []
    for number, pixels in enumerate(batch["pixel_values"].numpy()):
        values = pixels.transpose(1, 2, 0) * np.asarray(images.image_std) + np.asarray(images.image_mean)
        name = re.sub(r"[^\w.-]", "_", sample_id)
        paths.append(folder / f"{name}-{number}.png")
        Image.fromarray(np.rint(values.clip(0, 1) * 255).astype(np.uint8)).save(paths[-1])
    return paths
