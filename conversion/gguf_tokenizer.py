"""A tokenizer and its chat template in the form in which llama.cpp keeps them."""

import json
import re
from pathlib import Path

from transformers import PreTrainedTokenizerBase


NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
"""`tokenizer.ggml.token_type`."""

ADDED_SCORE = -1000.0
FILL_SCORE = -10000.0

BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
LLAMA3_SPLIT = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
PRE_TOKENIZERS = {
    "gpt-2": [{**BYTE_LEVEL, "use_regex": True}],
    "smollm": [{"type": "Digits", "individual_digits": True}, {**BYTE_LEVEL, "use_regex": True}],
    "llama-bpe": [
        {"type": "Split", "pattern": {"Regex": LLAMA3_SPLIT}, "behavior": "Isolated", "invert": False},
        BYTE_LEVEL,
    ],
}
"""llama.cpp's name of a way to split text before BPE → `pre_tokenizer` of `tokenizer.json`. It knows no others by rule."""

GENERATION_TAG = re.compile(r"\{%-?\s*(?:end)?generation\s*-?%\}")

MEDIA_TEMPLATE = """\
{#- llama.cpp writes an image as a marker in front of the text; here it gets its place and its line, as in training. -#}
{%- set placed = namespace(messages=[]) -%}
{%- for message in messages -%}
  {%- if message['role'] == 'user' and message['content'] is string and '<__media' in message['content'] -%}
    {%- set turn = namespace(images='', text='') -%}
    {%- for piece in message['content'].split('<__media') -%}
      {%- if loop.first -%}
        {%- set turn.text = piece -%}
      {%- else -%}
        {%- set parts = piece.split('__>') -%}
        {%- set turn.images = turn.images + 'IMAGE_START<__media' + parts[0] + '__>IMAGE_END\\n' -%}
        {%- set turn.text = turn.text + parts[1:] | join('__>') -%}
      {%- endif -%}
    {%- endfor -%}
    {%- set placed.messages = placed.messages + [{'role': 'user', 'content': turn.images + turn.text | trim}] -%}
  {%- else -%}
    {%- set placed.messages = placed.messages + [message] -%}
  {%- endif -%}
{%- endfor -%}
{%- set messages = placed.messages -%}
"""


def gguf_chat_template(template: str) -> str:
    """
    A chat template of ours for llama.cpp.

    llama.cpp's programs hand an image over as a marker (`<__media__>`) before the text of a string; the template puts
    what the training had around it: `<im_start>`, `<im_end>`, the line break. `{% generation %}` goes, since some
    readers (llama-cpp-python) do not know it. llama.cpp tokenizes the text after an image on its own, so the space that
    stands for this (`image_wrap` of `load_chat_template`) goes too.
    """
    start = end = ""
    if match := re.search(r"\{%- set image = '([^']*)<image>([^']*)' -%\}", template):
        start, end = match[1], match[2].removesuffix(" ")
        template = template.replace(match[0], f"{{%- set image = '{start}<image>{end}' -%}}")
    template = GENERATION_TAG.sub("{#- -#}", template)
    return MEDIA_TEMPLATE.replace("IMAGE_START", start).replace("IMAGE_END", end) + template


def vocabulary(folder: Path, tokenizer: PreTrainedTokenizerBase, rows: int) -> dict:
    """
    The tokenizer's tables.

    Args:
        folder (`Path`):
            Of the HF checkpoint, with `tokenizer.model` or `tokenizer.json`.
        tokenizer (`PreTrainedTokenizerBase`):
            Loaded from it, for the added tokens.
        rows (`int`):
            Of the embedding; ids without a token become unused ones.

    Returns:
        `dict`: `model` (`"llama"` or `"gpt2"`), `pre`, `tokens`, `scores`, `types`, `merges` (`None` where it has none).

    Raises:
        ValueError: a kind of tokenizer that llama.cpp has no name for.
    """
    if (folder / "tokenizer.model").is_file():
        table = _from_sentencepiece(folder / "tokenizer.model")
    else:
        table = _from_json(folder / "tokenizer.json")
    fill = rows - len(table["tokens"])
    if fill < 0:
        raise ValueError(
            f"The tokenizer of {folder} has {len(table['tokens'])} tokens, but the embedding has {rows} rows."
        )
    table["tokens"] += [f"[PAD{i}]" for i in range(len(table["tokens"]), rows)]
    table["scores"] += [FILL_SCORE] * fill
    table["types"] += [UNUSED] * fill
    for i, token in tokenizer.added_tokens_decoder.items():
        if i >= rows:
            raise ValueError(f"Token {token.content!r} of {folder} has id {i}, but the embedding has {rows} rows.")
        if table["types"][i] == UNKNOWN:
            continue
        table["tokens"][i], table["scores"][i] = token.content, ADDED_SCORE
        table["types"][i] = CONTROL if token.special else USER_DEFINED
    return table


def _from_sentencepiece(path: Path) -> dict:
    from sentencepiece import SentencePieceProcessor

    model = SentencePieceProcessor(model_file=str(path))
    tokens, scores, types = [], [], []
    for i in range(model.get_piece_size()):
        tokens.append(model.id_to_piece(i))
        scores.append(model.get_score(i))
        kinds = (
            (model.is_unknown, UNKNOWN),
            (model.is_control, CONTROL),
            (model.is_unused, UNUSED),
            (model.is_byte, BYTE),
        )
        types.append(next((kind for is_kind, kind in kinds if is_kind(i)), NORMAL))
    return {"model": "llama", "pre": "default", "tokens": tokens, "scores": scores, "types": types, "merges": None}


def _from_json(path: Path) -> dict:
    if not path.is_file():
        raise ValueError(f"{path.parent} has neither tokenizer.model nor tokenizer.json.")
    content = json.loads(path.read_text("utf-8"))
    model = content["model"]
    if model.get("type") != "BPE":
        raise ValueError(f"{path} is a {model.get('type')} tokenizer; llama.cpp's LLaMA knows BPE.")
    ids = model["vocab"]
    size = max([*ids.values(), *(token["id"] for token in content.get("added_tokens", []))]) + 1
    tokens, types = [f"[PAD{i}]" for i in range(size)], [UNUSED] * size
    for token, i in ids.items():
        tokens[i], types[i] = token, NORMAL
    merges = [" ".join(pair) if isinstance(pair, list) else pair for pair in model["merges"]]
    if model.get("byte_fallback"):  # SentencePiece's kind: merging in the order of merges is merging by score
        scores = [FILL_SCORE] * size
        for rank, merge in enumerate(merges):
            i = ids["".join(merge.split(" ", 1))]
            scores[i] = max(scores[i], -float(rank))
        for token, i in ids.items():
            if re.fullmatch(r"<0x[0-9A-F]{2}>", token):
                types[i] = BYTE
        if model.get("unk_token") in ids:
            types[ids[model["unk_token"]]] = UNKNOWN
        return {"model": "llama", "pre": "default", "tokens": tokens, "scores": scores, "types": types, "merges": None}
    return {
        "model": "gpt2",
        "pre": _pre_tokenizer_name(content.get("pre_tokenizer") or {}, path),
        "tokens": tokens,
        "scores": [0.0] * size,
        "types": types,
        "merges": merges,
    }


def _pre_tokenizer_name(pre_tokenizer: dict, path: Path) -> str:
    parts = pre_tokenizer.get("pretokenizers", [pre_tokenizer])
    for name, known in PRE_TOKENIZERS.items():
        if [_without_defaults(part) for part in parts] == [_without_defaults(part) for part in known]:
            return name
    raise ValueError(
        f"{path} splits text in a way for which llama.cpp has no name that we know ({json.dumps(pre_tokenizer)[:200]}); "
        f"known are {', '.join(PRE_TOKENIZERS)}."
    )


def _without_defaults(part: dict) -> dict:
    return {key: value for key, value in part.items() if key != "trim_offsets"}
