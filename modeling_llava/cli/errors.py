"""What went wrong, in one line for a person: errors of other packages that say it in their own way."""

import argparse
import difflib
import os
import re


OUT_OF_MEMORY = {
    "train": "Take a smaller per_device_train_batch_size (global_batch_size stays as it is), a smaller max_length, or a "
    "qlora preset: `llava estimate RECIPE --gpu GIB` says what fits. The same command goes on from the last checkpoint.",
    "eval": "Take a smaller --batch-size, or --load-in-4bit. The same command goes on where it stopped.",
}
LESS_MEMORY = "Take --load-in-4bit where the command has it, a smaller model, or end what else uses the memory."
NO_HUB = (
    "Nothing of that name lies here ({}) or in the Hub's cache, and the Hub does not answer: check the name, and whether "
    "this machine is on the network."
)
OFFLINE = " HF_HUB_OFFLINE is set, so it was not asked."
KINDS = {"ImageTextToText": "a LLaVA", "CausalLM": "a language model"}
"""What transformers' Auto classes load → what a person calls it."""
NO_GPU = "torch finds no GPU that it can use here: `llava doctor` says what there is. On the CPU: --device cpu."


def one_line(error: Exception, command: str) -> str | None:
    """
    What to tell the user, or `None` for an error that a user cannot mend: a defect, whose traceback is wanted.

    Args:
        error (`Exception`): What ended the command.
        command (`str`): The command's name.
    """
    kinds = {f"{kind.__module__.partition('.')[0]}.{kind.__name__}" for kind in type(error).__mro__}
    modules = {kind.partition(".")[0] for kind in kinds}
    text = " ".join(str(error).split())
    if kinds & {"builtins.MemoryError", "torch.OutOfMemoryError"} or "can't allocate memory" in text:
        first = text.partition(". ")[0].removesuffix(".")
        return f"Out of memory{f' ({first})' if first else ''}. {OUT_OF_MEMORY.get(command, LESS_MEMORY)}"
    if "couldn't connect to 'http" in text:
        return NO_HUB.format(os.getcwd()) + (OFFLINE if os.environ.get("HF_HUB_OFFLINE", "0") not in ("0", "") else "")
    if found := re.match(
        r"Unrecognized configuration class <class '[\w.]*?\.?(\w+)Config'>.*AutoModelFor(\w+)\.", text
    ):
        return f"{found[1]} is the wrong kind of model here: {KINDS.get(found[2], found[2])} is needed (config.json, model_type)."
    if "jinja2" in modules:
        return f"The chat template cannot be used ({text}): mend chat_template.jinja in the model's folder."
    if "Torch not compiled with CUDA" in text or "Found no NVIDIA driver" in text or "invalid device ordinal" in text:
        return NO_GPU
    if type(error).__name__ == "SafetensorError":
        return f"A file of weights is damaged or cut off ({text}): copy or download the model again."
    if isinstance(error, OSError) and error.filename is not None and error.strerror:
        return f"{error.filename}: {error.strerror}."
    if isinstance(error, OSError):  # transformers' are of many lines
        return text
    if isinstance(error, (ValueError, TypeError, ImportError)):
        # A DataLoader makes the error of a worker anew, behind the worker's traceback
        in_worker = str(error).startswith("Caught ") and "Original Traceback" in text
        return str(error).strip().rpartition(f"\n{type(error).__name__}: ")[2] if in_worker else str(error)
    if modules & {"httpx", "httpx2", "httpcore", "httpcore2", "requests", "urllib3", "aiohttp"}:
        return f"No answer from the other side ({text}). Is this machine on the network? HF_HUB_OFFLINE=1 uses what lies here."
    return None


def unknown_words(unknown: list[str], parser: argparse.ArgumentParser, argv: list[str]) -> str:
    """What to tell about words that no option or argument takes: the option that was probably meant."""
    for word in argv:  # down to the parser of `llava data check`, say
        parser = getattr(parser, "commands", {}).get(word, parser)
    options = sorted(set(re.findall(r"(?<!\S)--?\w[\w-]*", parser.format_help())))
    word = unknown[0].partition("=")[0]
    if not word.startswith("-"):
        return f"{unknown[0]!r} is one word too many. A path with spaces stands in quotes; {parser.prog} --help says more."
    close = difflib.get_close_matches(word, options, 1)
    mean = f" Did you mean {close[0]}?" if close else f" {parser.prog} --help lists them."
    if "=" not in word and "key=value" in parser.format_usage():
        mean = f" Settings are given as key=value: {word.lstrip('-').replace('-', '_')}=…"
    return f"there is no option {word}.{mean}"


__all__ = ["one_line", "unknown_words"]
