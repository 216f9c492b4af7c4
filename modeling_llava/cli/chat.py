"""`llava chat MODEL`: talk to a model about images, in the terminal or from a script."""

import argparse


EPILOG = """\
examples:
  llava chat llava-hf/llava-1.5-7b-hf --load-in-4bit --image street.jpg
  llava chat runs/my-adapter
  echo "What is written on the sign?" | llava chat MODEL --image sign.jpg
Drag an image into the terminal, or paste its path or URL, to talk about it. /help tells the rest.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = EPILOG
    parser.add_argument("model", help="folder or Hub name of a full or merged model, an adapter, or a projector")
    add = parser.add_argument
    add("--image", action="append", metavar="PATH", help="image to begin with: path or URL (repeatable: several)")
    add_loading_arguments(parser)
    add("--system", metavar="TEXT", help="system message in place of the template's own")
    add("--max-new-tokens", type=int, default=512, metavar="N", help="per answer (default: 512)")
    add("--temperature", type=float, default=0.0, metavar="T", help="0: greedy (default); 0.2 to 1: more varied")
    add("--top-p", type=float, metavar="P", help="sample from the most likely tokens of this total probability")
    add("--top-k", type=int, metavar="K", help="sample from the K most likely tokens")
    add("--seed", type=int, metavar="N", help="seed of the sampling, to reproduce answers")
    add("--no-history", action="store_true", help="do not remember questions in ~/.llava_history")


def add_loading_arguments(parser: argparse.ArgumentParser) -> None:
    """What `chat` and `web` need to load a model of any kind."""
    add = parser.add_argument
    add("--adapter", metavar="PATH", help="adapter to put on MODEL")
    add("--base", metavar="PATH", help="base of an adapter, if it is no longer where its folder says")
    add_four_bit_arguments(parser)
    dtypes = ["auto", "float16", "bfloat16", "float32"]
    add("--dtype", default="auto", choices=dtypes, help="dtype of the weights (default: auto)")
    add("--device", metavar="NAME", help="cuda, cuda:1, mps, cpu (default: the accelerator, if any)")
    add("--revision", metavar="NAME", help="branch, tag or commit of MODEL on the Hub")


def add_four_bit_arguments(parser) -> None:
    """`load_in_4bit` is `None` where neither is given: adapters that were trained on 4 bits are loaded on them."""
    add = parser.add_mutually_exclusive_group().add_argument
    add("--load-in-4bit", action="store_true", default=None, help="NF4 language model: 7B in about 5 GB")
    no = {"action": "store_false", "dest": "load_in_4bit", "default": None}
    add("--no-4bit", **no, help="16 bits, also for an adapter that was trained on a 4-bit base")


def load_from_arguments(args: argparse.Namespace):
    """The model and its processor; how long it took is said on stderr."""
    import sys
    import time

    from transformers.utils import logging

    from ..inference import load_model
    from ..io.adapters import is_quantised

    if not sys.stderr.isatty():
        logging.disable_progress_bar()
    print(f"Loading {args.model} …", file=sys.stderr)
    begun = time.perf_counter()
    names = ("dtype", "device", "load_in_4bit", "adapter", "base", "revision")
    model, processor = load_model(args.model, **{name: getattr(args, name) for name in names})
    how = "4-bit" if is_quantised(model) else str(model.dtype).removeprefix("torch.")
    print(f"Ready in {time.perf_counter() - begun:.1f} s ({model.device.type}, {how}).", file=sys.stderr)
    return model, processor


def run(args: argparse.Namespace) -> int:
    from ..inference import DecodingSettings, LlavaPredictor
    from ..inference.chat import Chat, read_named_image
    from .chat_terminal import Terminal

    settings = {"max_new_tokens": args.max_new_tokens}
    if not args.temperature >= 0:
        raise ValueError(f"--temperature must be 0 or more, got {args.temperature}.")
    if args.temperature > 0:
        settings |= {"do_sample": True, "temperature": args.temperature, "top_p": args.top_p, "top_k": args.top_k}
    elif args.top_p is not None or args.top_k is not None:
        raise ValueError("--top-p and --top-k require --temperature above 0, such as 0.7.")
    DecodingSettings(**settings)  # a mistake is found before the model is loaded, and so is a wrong path
    images = [read_named_image(reference) for reference in args.image or []]
    model, processor = load_from_arguments(args)
    chat = Chat(LlavaPredictor(model, processor, system=args.system), seed=args.seed, **settings)
    terminal = Terminal(chat, name=args.model, remember=not args.no_history)
    return terminal.run(images)
