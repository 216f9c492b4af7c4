"""A tokenizer's tables in other forms: llama.cpp's, with its chat template, and SentencePiece's `tokenizer.model`."""

import json
import re
import struct
from pathlib import Path

from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import render_jinja_template

from modeling_llava.constants import IMAGE_TOKEN


NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
"""Types of tokens, numbered alike by SentencePiece (`SentencePiece.type`) up to 5 and by llama.cpp."""

ADDED_SCORE = -1000.0
FILL_SCORE = -10000.0

BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False}
LLAMA3_SPLIT = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


def _split(pattern: str) -> list[dict]:
    return [{"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}, BYTE_LEVEL]


PRE_TOKENIZERS = {
    "gpt-2": [{**BYTE_LEVEL, "use_regex": True}],
    "smollm": [{"type": "Digits", "individual_digits": True}, {**BYTE_LEVEL, "use_regex": True}],
    "llama-bpe": _split(LLAMA3_SPLIT),
    "qwen2": _split(LLAMA3_SPLIT.replace(r"\p{N}{1,3}", r"\p{N}")),
}
"""llama.cpp's name of a way to split text before BPE → `pre_tokenizer` of `tokenizer.json`. It knows no others by rule."""

CHAT_TEMPLATE = "chat_template.jinja"
GENERATION_TAG = re.compile(r"\{%-?\s*(?:end)?generation\s*-?%\}")

MEDIA_TEMPLATE = """\
{#- llama.cpp writes an image as a marker in front of the text; here it gets its place and its line, as in training. -#}
{%- set placed = namespace(messages=[]) -%}
{%- for message in messages -%}
  {%- set content = message['content'] -%}
  {%- if message['role'] == 'user' and content is string and '<__media' in content -%}
    {%- set turn = namespace(images='', text='') -%}
    {%- for piece in content.split('<__media') -%}
      {%- if loop.first -%}
        {%- set turn.text = piece -%}
      {%- else -%}
        {%- set parts = piece.split('__>') -%}
        {%- set turn.images = turn.images + 'IMAGE_START<__media' + parts[0] + '__>IMAGE_END' -%}
        {%- set turn.text = turn.text + parts[1:] | join('__>') -%}
      {%- endif -%}
    {%- endfor -%}
    {%- set content = (turn.images + turn.text | trim) | trim -%}
  {%- endif -%}
  {%- set placed.messages = placed.messages + [{'role': message['role'], 'content': CONTENT}] -%}
{%- endfor -%}
{%- set messages = placed.messages -%}
"""


def gguf_chat_template(template: str, image_token: str = IMAGE_TOKEN) -> str:
    """
    A LLaVA's chat template for llama.cpp.

    llama.cpp's programs pass an image as a marker (`<__media__>`) before a text; the template puts `<im_start>`, `<im_end>`
    and the line break around it as it does for an image item. `{% generation %}`, which llama-cpp-python does not know, and
    the space after an image (`image_wrap` of `load_chat_template`), which llama.cpp adds itself, are removed.

    Raises:
        ValueError: the template writes no image for an image item, or not the question.
    """
    if match := re.search(r"\{%- set image = '([^']*) ' -%\}", template):
        template = template.replace(match[0], f"{{%- set image = '{match[1]}' -%}}")
    probe = "One question"
    text = {"type": "text", "text": probe}
    content, without = "content", _render(template, probe)
    if probe not in without:  # stock LLaVA's own template reads lists of items only
        content = "[{'type': 'text', 'text': content}] if content is string else content"
        without = _render(template, [text])
    with_image = _render(template, [{"type": "image"}, text])
    before, _, after = without.partition(probe)
    around = with_image.removeprefix(before).removesuffix(probe + after)  # "<im_start><image><im_end>\n"
    if probe not in without or around.count(image_token) != 1:
        made = f"The chat template makes {with_image!r} of an image and the question {probe!r}"
        raise ValueError(f"{made}: it does not support images. Take one of LLaVA's (chat_template.jinja).")
    start, _, end = around.partition(image_token)
    start, end = (text.replace("\\", "\\\\").replace("'", "\\'").replace("\n", "\\n") for text in (start, end))
    template = GENERATION_TAG.sub("{#- -#}", template)
    media = MEDIA_TEMPLATE.replace("IMAGE_START", start).replace("IMAGE_END", end)
    return media.replace("'content': CONTENT", f"'content': {content}") + template


def writes_images(template: str, image_token: str = IMAGE_TOKEN) -> bool:
    """Whether a chat template supports image items; a language model's own does not."""
    text = _render(template, [{"type": "image"}, {"type": "text", "text": "One question"}])
    return text.count(image_token) == 1 and "One question" in text and "'type'" not in text


def _render(template: str, content: str | list[dict]) -> str:
    """One question in a template; an empty text where it fails on it."""
    try:
        return render_jinja_template(
            conversations=[[{"role": "user", "content": content}]],
            chat_template=template,
            bos_token="",
            eos_token="",
            add_generation_prompt=True,
        )[0][0]
    except Exception:  # a template is a program
        return ""


def vocabulary(folder: Path, tokenizer: PreTrainedTokenizerBase, rows: int) -> dict:
    """
    llama.cpp's tables of a folder's tokenizer; ids without a token, up to the embedding's `rows`, become unused ones.

    Returns:
        `dict`: `model` (`"llama"` or `"gpt2"`), `pre`, `tokens`, `scores`, `types`, `merges` (`None` where it has none).

    Raises:
        ValueError: a kind of tokenizer that is not known for llama.cpp.
    """
    if (folder / "tokenizer.model").is_file():
        table = _from_sentencepiece(folder / "tokenizer.model")
    else:
        table = _from_json(folder / "tokenizer.json")
    added = tokenizer.added_tokens_decoder
    size = max([len(table["tokens"]), *(i + 1 for i in added)])
    if size > rows:
        raise ValueError(f"The tokenizer of {folder} has {size} tokens, but the embedding has {rows} rows.")
    fill = range(len(table["tokens"]), rows)
    table["tokens"] += [f"[PAD{i}]" for i in fill]
    table["scores"] += [FILL_SCORE] * len(fill)
    table["types"] += [UNUSED] * len(fill)
    for i, token in added.items():
        if table["types"][i] != UNKNOWN:
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
        kinds = {UNKNOWN: model.is_unknown, CONTROL: model.is_control, UNUSED: model.is_unused, BYTE: model.is_byte}
        types.append(next((kind for kind, is_kind in kinds.items() if is_kind(i)), NORMAL))
    return {"model": "llama", "pre": "default", "tokens": tokens, "scores": scores, "types": types, "merges": None}


def _from_json(path: Path) -> dict:
    content = _read_bpe(path)
    if content["model"].get("byte_fallback"):
        return _table_by_score(content)
    table = _table(content)
    merges = [" ".join(pair) for pair in _merges(content)]
    pre_tokenizer = content.get("pre_tokenizer") or {}
    parts = pre_tokenizer.get("pretokenizers", [pre_tokenizer])
    parts = [{key: value for key, value in part.items() if key != "trim_offsets"} for part in parts]
    pre = next((name for name, known in PRE_TOKENIZERS.items() if parts == known), None)
    if pre is None:
        how = f"{json.dumps(pre_tokenizer)[:200]}; known are {', '.join(PRE_TOKENIZERS)}"
        raise ValueError(f"{path} splits text in a way that is not known for llama.cpp ({how}).")
    return {**table, "model": "gpt2", "pre": pre, "scores": [0.0] * len(table["tokens"]), "merges": merges}


def _read_bpe(path: Path) -> dict:
    content = json.loads(path.read_text("utf-8"))
    if content["model"].get("type") != "BPE":
        raise ValueError(f"{path} is a {content['model'].get('type')} tokenizer; LLaMA's and Mistral's are BPE.")
    return content


def _merges(content: dict) -> list[list[str]]:
    return [pair if isinstance(pair, list) else pair.split(" ", 1) for pair in content["model"]["merges"]]


def _table(content: dict) -> dict:
    ids = content["model"]["vocab"]
    size = max([*ids.values(), *(token["id"] for token in content.get("added_tokens", []))]) + 1
    tokens, types = [f"[PAD{i}]" for i in range(size)], [UNUSED] * size
    for token, i in ids.items():
        tokens[i], types[i] = token, NORMAL
    return {"tokens": tokens, "types": types}


def _table_by_score(content: dict) -> dict:
    """A SentencePiece table: the score of a piece is its first rank among the merges."""
    table, ids = _table(content), content["model"]["vocab"]
    scores = [FILL_SCORE] * len(table["tokens"])
    for rank, (left, right) in enumerate(_merges(content)):
        scores[ids[left + right]] = max(scores[ids[left + right]], -float(rank))
    for token, i in ids.items():
        if re.fullmatch(r"<0x[0-9A-F]{2}>", token):
            table["types"][i] = BYTE
        elif token == content["model"].get("unk_token"):
            table["types"][i] = UNKNOWN
    return {**table, "model": "llama", "pre": "default", "scores": scores, "merges": None}


# SentencePiece


def has_sentencepiece(folder: Path) -> bool:
    """Whether a folder has a SentencePiece model, or one can be made."""
    if (folder / "tokenizer.model").is_file():
        return True
    if not (folder / "tokenizer.json").is_file():
        return False
    model = json.loads((folder / "tokenizer.json").read_text("utf-8"))["model"]
    return model.get("type") == "BPE" and bool(model.get("byte_fallback"))


def sentencepiece_model(tokenizer_json: Path) -> bytes:
    """
    A `tokenizer.model` that gives the ids of a `tokenizer.json` which was made from one.

    transformers drops `tokenizer.model` when a fast tokenizer is loaded and saved again, as after training. Added tokens are
    left out: they are in `tokenizer_config.json`.
    """
    content = _read_bpe(tokenizer_json)
    table = _table_by_score(content)
    special = {token["id"] for token in content.get("added_tokens", []) if token["special"]}
    message = b""
    for i in range(len(content["model"]["vocab"])):
        kind = CONTROL if i in special and table["types"][i] == NORMAL else table["types"][i]
        score = _varint(2 << 3 | 5) + struct.pack("<f", table["scores"][i])
        message += _field(1, _field(1, table["tokens"][i].encode()) + score + _field(3, kind))
    unknown = content["model"].get("unk_token") or "<unk>"
    bpe, adds_prefix = 2, _adds_prefix(content)
    trainer = _field(3, bpe) + _field(35, 1) + _field(45, unknown.encode())  # model_type, byte_fallback, unk_piece
    normalizer = _field(1, b"identity") + _field(3, adds_prefix) + _field(4, 0)  # no extra spaces removed
    return message + _field(2, trainer) + _field(3, normalizer)


def _adds_prefix(content: dict) -> int:
    """Whether a text gets a space in front, by a `Prepend` normaliser or a `Metaspace` pre-tokenizer."""
    normalizer, pre_tokenizer = content.get("normalizer") or {}, content.get("pre_tokenizer") or {}
    parts = normalizer.get("normalizers", [normalizer])
    prepends = any(part.get("type") == "Prepend" for part in parts)
    return int(prepends or pre_tokenizer.get("prepend_scheme", "never") != "never")


def _varint(value: int) -> bytes:
    result = bytearray()
    while value >= 0x80:
        result.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*result, value])


def _field(number: int, value: int | bytes) -> bytes:
    """One field of a protobuf message."""
    if isinstance(value, int):
        return _varint(number << 3) + _varint(value)
    return _varint(number << 3 | 2) + _varint(len(value)) + value
