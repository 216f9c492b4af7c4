"""A sample as text for the terminal, as the model sees it."""

from transformers import ProcessorMixin

from ..constants import IGNORE_INDEX


def render_sample(processor: ProcessorMixin, input_ids: list[int], labels: list[int]):
    """
    A sample as `rich.text.Text`, to the letter: what is supervised bold green, the rest dim, special tokens that are not
    supervised cyan, and each run of image tokens as `<image> × 576`.

    Args:
        processor ([`~transformers.ProcessorMixin`]): A LLaVA processor.
        input_ids (`list[int]`): Token ids, image tokens expanded.
        labels (`list[int]`): As long; `IGNORE_INDEX` where nothing is learnt.
    """
    from rich.text import Text

    tokenizer = processor.tokenizer
    special = set(tokenizer.all_special_ids) | {processor.image_token_id}
    text = Text()
    position = 0
    while position < len(input_ids):
        token, learnt = input_ids[position], labels[position] != IGNORE_INDEX
        end = position + 1
        while end < len(input_ids) and (labels[end] != IGNORE_INDEX) == learnt:
            if token in special and input_ids[end] != token or token not in special and input_ids[end] in special:
                break
            end += 1
        if token == processor.image_token_id:
            text.append(f"{processor.image_token} × {end - position}", "cyan")
        elif token in special:
            text.append(tokenizer.convert_ids_to_tokens(token) * (end - position), "bold green" if learnt else "cyan")
        else:
            # Decoded behind what stands before it: a SentencePiece decoder drops the space at the start of a text.
            start = position
            while start > 0 and input_ids[start - 1] not in special and position - start < 8:
                start -= 1
            before = _decode(tokenizer, input_ids[start:position])
            piece = _decode(tokenizer, input_ids[start:end])
            piece = piece[len(before) :] if piece.startswith(before) else _decode(tokenizer, input_ids[position:end])
            text.append(piece, "bold green" if learnt else "dim")
        position = end
    return text


def _decode(tokenizer, ids: list[int]) -> str:
    return tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False) if ids else ""
