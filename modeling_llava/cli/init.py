"""`llava init VISION LANGUAGE OUT`: compose a new LLaVA from a vision encoder and a language model."""

import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("vision", help="CLIP- or SigLIP-like model: folder or Hub name")
    add("language", help="causal language model: folder or Hub name, or a .gguf file")
    add("out", help="folder to write; new or empty")
    template = "vicuna_v1 (LLaVA-1.5's, the default), another of this package's, or own: the language model's"
    add("--chat-template", default="vicuna_v1", metavar="NAME", help=template)
    add("--projector-layers", type=int, default=2, help="1: the paper's matrix W; 2: LLaVA-1.5's (default: 2)")
    add("--feature-layer", type=int, default=-2, help="hidden state of the tower to project (default: -2)")
    add("--crop", action="store_true", help="crop images to a square (LLaVA v1) instead of padding them")
    add("--dtype", default="auto", help="float32, bfloat16, float16, or auto: the language model's")
    add("--seed", type=int, default=42, help="of the projector's random weights (default: 42)")


def run(args: argparse.Namespace) -> int:
    import os
    import shutil
    from pathlib import Path

    from rich.console import Console
    from transformers import set_seed

    from .. import LlavaForConditionalGeneration, LlavaProcessor

    console = Console()
    out = Path(os.path.abspath(args.out))
    if out == Path.cwd():
        raise ValueError("OUT cannot be the current folder: give a new folder.")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{out} exists and is not empty. Choose another folder.")
    set_seed(args.seed)
    console.print(f"Composing {args.vision} and {args.language} …")
    processor = LlavaProcessor.from_vision_language_pretrained(
        args.vision, args.language, chat_template=args.chat_template, do_pad=not args.crop
    )
    model = LlavaForConditionalGeneration.from_vision_language_pretrained(
        args.vision,
        args.language,
        dtype=args.dtype,
        projector_num_layers=args.projector_layers,
        vision_feature_layer=args.feature_layer,
    )
    _try_one_image(model, processor)
    partial = out.with_name(f".{out.name}.unfinished")
    shutil.rmtree(partial, ignore_errors=True)
    model.save_pretrained(partial)
    processor.save_pretrained(partial)
    if out.is_dir():
        out.rmdir()
    os.replace(partial, out)

    for name in ("vision_tower", "multi_modal_projector", "language_model"):
        module = getattr(model.model, name)
        console.print(f"{name}: {type(module).__name__}, {sum(p.numel() for p in module.parameters()):,} parameters")
    console.print(f"tokens per image: {model.config.image_seq_length} (layer {args.feature_layer})")
    console.print(f"vocabulary: {model.lm_head.weight.shape[0]:,} rows, <image> is {model.config.image_token_id}")
    console.print(
        f"{out} is written, its projector not trained yet. Next: llava train pretrain model={args.out} data=captions.json "
        "image_folder=images output_dir=pretrain",
        soft_wrap=True,
    )
    return 0


def _try_one_image(model, processor) -> None:
    """A probe forward, before anything is written: the model counts the processor's image tokens."""
    import torch
    from PIL import Image

    content = [{"type": "image", "image": Image.new("RGB", (32, 24))}, {"type": "text", "text": "What is this?"}]
    messages = [{"role": "user", "content": content}]
    inputs = processor.apply_chat_template(messages, tokenize=True, return_dict=True, return_tensors="pt")
    with torch.no_grad():
        model(**inputs, logits_to_keep=1)
