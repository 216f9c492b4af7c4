"""From messages to the ids of a prompt, exactly those that the processor gives, without touching the images."""

from ..processing_llava import num_image_tokens
from ..text.control_tokens import ControlTokens


def encode_prompt(messages: list[dict], processor, **template_variables) -> list[int]:
    """
    The ids of a prompt that asks for an answer.

    The whole prompt is rendered once and tokenized once; then each image token is repeated. What a user typed that looks
    like a control token (`<image>`, `</s>`) is ordinary text.

    Args:
        messages (`list[dict]`):
            `{"role", "content": [{"type": "image"} | {"type": "text", "text": …}]}`, a user's turn last.
        processor: Ours or stock's.
        template_variables: For the chat template, such as `keep_image_order=True`.

    Returns:
        `list[int]`: ids, `num_image_tokens` image tokens per image.

    Raises:
        ValueError: the processor has no chat template.
    """
    template = processor.chat_template or processor.tokenizer.chat_template
    if template is None:
        raise ValueError(
            "The processor has no chat template, so a question cannot be put. Give one: processor.chat_template = "
            'load_chat_template("vicuna_v1") (modeling_llava.text.chat_templates), by the format that the model was trained in.'
        )
    tokenizer = processor.tokenizer
    control = ControlTokens.of(tokenizer, processor.image_token)
    (messages,), marks = control.mark(messages, template=template)
    text = processor.apply_chat_template(
        messages, chat_template=template, tokenize=False, add_generation_prompt=True, **template_variables
    )
    begins_itself = tokenizer.bos_token is not None and text.startswith(tokenizer.bos_token)
    if marks is not None:
        text, tokenizer = marks.rename(text), marks.tokenizer(tokenizer)
    ids = []
    for token in tokenizer(text, add_special_tokens=not begins_itself)["input_ids"]:
        ids += [token] * (num_image_tokens(processor) if token == processor.image_token_id else 1)
    return ids


__all__ = ["encode_prompt"]
