"""Errors of other packages as one line for the user."""

import argparse
import difflib
import os
import re


OUT_OF_MEMORY = {
    "train": "Use a smaller per_device_train_batch_size (global_batch_size stays as it is), a smaller max_length, or a "
    "qlora preset: `llava estimate RECIPE --gpu GIB` says what fits. The same command resumes from the last checkpoint.",
    "eval": "Use a smaller --batch-size, or --load-in-4bit. The same command resumes.",
}
LESS_MEMORY = "Use --load-in-4bit if the command has it, or a smaller model, or stop other programs that use memory."
NO_HUB = "There is nothing of that name here ({}) or in the Hub's cache, and the Hub does not answer: check name and network."
OFFLINE = " HF_HUB_OFFLINE is set, so the Hub was not asked."
KINDS = {"ImageTextToText": "a LLaVA", "CausalLM": "a language model"}
"""What transformers' Auto classes load, in words."""
NO_GPU = "torch finds no usable GPU: see `llava doctor`. On the CPU: --device cpu."
NO_KERNELS = "This build of torch, or of bitsandbytes, has no kernels for this GPU's architecture: `llava doctor` says what to install."


def one_line(error: Exception, command: str) -> str | None:
    """The message for the user, or `None` for a bug, whose traceback is shown."""
    kinds = {f"{kind.__module__.partition('.')[0]}.{kind.__name__}" for kind in type(error).__mro__}
    modules = {kind.partition(".")[0] for kind in kinds}
    text = " ".join(str(error).split())
    no_memory = ("can't allocate memory", "CUBLAS_STATUS_ALLOC_FAILED", "CUDNN_STATUS_ALLOC_FAILED")
    if kinds & {"builtins.MemoryError", "torch.OutOfMemoryError"} or any(sign in text for sign in no_memory):
        first = text.partition(". ")[0].removesuffix(".")
        return f"Out of memory{f' ({first})' if first else ''}. {OUT_OF_MEMORY.get(command, LESS_MEMORY)}"
    if "couldn't connect to 'http" in text:
        return NO_HUB.format(os.getcwd()) + (OFFLINE if os.environ.get("HF_HUB_OFFLINE", "0") not in ("0", "") else "")
    if found := re.match(r"Unrecognized configuration class <class '[\w.]*?(\w+)Config'>.*AutoModelFor(\w+)\.", text):
        return f"{found[1]} is the wrong kind of model here: {KINDS.get(found[2], found[2])} is required (config.json, model_type)."
    if "jinja2" in modules:
        return f"The chat template cannot be used ({text}): fix chat_template.jinja in the model's folder."
    if "Torch not compiled with CUDA" in text or "Found no NVIDIA driver" in text or "invalid device ordinal" in text:
        return NO_GPU
    if "no kernel image is available" in text:
        return NO_KERNELS
    if type(error).__name__ == "SafetensorError":
        return f"A weight file is damaged or incomplete ({text}): copy or download the model again."
    if isinstance(error, OSError) and error.filename is not None and error.strerror:
        return f"{error.filename}: {error.strerror}."
    if isinstance(error, OSError):  # transformers' have many lines
        return text
    if isinstance(error, (ValueError, TypeError, ImportError)):
        # A DataLoader raises a worker's error again, after the worker's traceback
        in_worker = str(error).startswith("Caught ") and "Original Traceback" in text
        return str(error).strip().rpartition(f"\n{type(error).__name__}: ")[2] if in_worker else str(error)
    if modules & {"httpx", "httpx2", "httpcore", "httpcore2", "requests", "urllib3", "aiohttp"}:
        return f"The server does not answer ({text}). Is this machine on the network? HF_HUB_OFFLINE=1 uses the local cache."
    return None


def unknown_words(unknown: list[str], parser: argparse.ArgumentParser, argv: list[str]) -> str:
    """The message for unknown words, with the option that was probably meant."""
    for word in argv:  # down to the parser of `llava data check`, say
        parser = getattr(parser, "commands", {}).get(word, parser)
    options = sorted(set(re.findall(r"(?<!\S)--?\w[\w-]*", parser.format_help())))
    word = unknown[0].partition("=")[0]
    if not word.startswith("-"):
        return f"{unknown[0]!r} is one word too many. Put a path with spaces in quotes; see {parser.prog} --help."
    close = difflib.get_close_matches(word, options, 1)
    mean = f" Did you mean {close[0]}?" if close else f" {parser.prog} --help lists them."
    if "=" not in word and "key=value" in parser.format_usage():
        mean = f" Settings are given as key=value: {word.lstrip('-').replace('-', '_')}=…"
    return f"there is no option {word}.{mean}"
