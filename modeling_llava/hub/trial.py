"""One question to a gathered model, through the pipeline that its users call."""

import os

from PIL import Image


def ask_once(folder: str | os.PathLike, source: str | os.PathLike) -> str:
    """
    Load a gathered model with `pipeline("image-text-to-text")` and ask it about a plain image.

    Args:
        folder (`str` or `os.PathLike`): A full model or an adapter, as it would be sent.
        source (`str` or `os.PathLike`): The folder that it was gathered from; an adapter may name its base by a local path.

    Raises:
        ValueError: an adapter's base is missing.
    """
    from transformers import pipeline

    from ..io.checkpoints import checkpoint_kind, find_base, load_processor

    path = os.fspath(folder)
    if checkpoint_kind(folder) == "adapter":
        path = os.fspath(source)
        try:
            find_base(path)
        except ValueError as error:
            raise ValueError(f"{error} Or publish it without asking it a question first (--no-run).") from None
    pipe = pipeline("image-text-to-text", model=path, processor=load_processor(folder))
    image = Image.new("RGB", (64, 64), (120, 160, 200))
    content = [{"type": "image", "image": image}, {"type": "text", "text": "What is this?"}]
    messages = [{"role": "user", "content": content}]
    return pipe(text=messages, max_new_tokens=8, return_full_text=False)[0]["generated_text"]
