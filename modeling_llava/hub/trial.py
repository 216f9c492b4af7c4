"""One question to a gathered model, through the pipeline that its users call."""

import os

from PIL import Image


def ask_once(folder: str | os.PathLike, source: str | os.PathLike | None = None) -> str:
    """
    Load a gathered model with `pipeline("image-text-to-text")` and ask it about a plain image.

    Args:
        folder (`str` or `os.PathLike`): A full model or an adapter, as it would be sent.
        source (`str` or `os.PathLike`, *optional*):
            An adapter's folder as it was trained, which may name its base by a local path.

    Raises:
        ValueError: processor and model differ in the number of image tokens, or an adapter's base is missing.
    """
    from transformers import pipeline

    from ..io.checkpoints import base_model_of, checkpoint_kind, load_processor
    from ..processing_llava import num_image_tokens

    kind = checkpoint_kind(folder)
    if kind == "projector":
        return "(a projector alone is not asked)"
    path = os.fspath(source if kind == "adapter" and source is not None else folder)
    if kind == "adapter":
        try:
            base_model_of(path)
        except ValueError as error:
            raise ValueError(f"{error} Or publish it without asking it a question first (--no-run).") from None
    processor = load_processor(folder)
    pipe = pipeline("image-text-to-text", model=path, processor=processor)
    expected, actual = pipe.model.config.image_seq_length, num_image_tokens(processor)
    if expected != actual:
        raise ValueError(
            f"{folder}: the processor writes {actual} image tokens per image, but config.json says {expected} "
            "(image_seq_length). Save the processor that belongs to this model."
        )
    image = Image.new("RGB", (64, 64), (120, 160, 200))
    messages = [
        {"role": "user", "content": [{"type": "image", "image": image}, {"type": "text", "text": "What is this?"}]}
    ]
    return pipe(text=messages, max_new_tokens=8, return_full_text=False)[0]["generated_text"]


__all__ = ["ask_once"]
