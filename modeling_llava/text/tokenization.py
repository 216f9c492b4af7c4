"""Tokenizers: LLaMA's SentencePiece read exactly as the original's slow tokenizer read it, and the image token."""

import base64
import json
import os
import shutil
import struct
import tempfile
from dataclasses import dataclass
from pathlib import Path

from tokenizers import AddedToken
from transformers import AutoTokenizer, PreTrainedTokenizerBase, TokenizersBackend
from transformers.utils import cached_file, logging

from ..compat import add_named_token
from ..constants import IMAGE_TOKEN


logger = logging.get_logger(__name__)

PAD_TOKEN = "<pad>"
_SPACE = "▁"  # SentencePiece's visible space
_UNIGRAM, _BPE = 1, 2  # TrainerSpec.model_type
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = 1, 2, 3, 4, 5, 6  # SentencePiece.type
_LLAMA_CLASSES = (None, "LlamaTokenizer", "LlamaTokenizerFast")
_HUB_OPTIONS = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "subfolder", "token")


class LegacyLlamaTokenizer(TokenizersBackend):
    """
    A LLaMA tokenizer that keeps its pipeline, `legacy` or not (`init_kwargs["legacy"]`).

    Nothing depends on this class once it is saved: its files say `PreTrainedTokenizerFast`, so every transformers (also 4.x, and
    vLLM on it) takes `tokenizer.json` as it is, whereas `LlamaTokenizer` of transformers 5 would build the pipeline anew and lose
    a space wherever a text, or the text after a special token, begins with one. The SentencePiece model is saved too: the original
    code and llama.cpp read it.
    """

    sentencepiece_model: bytes | None = None

    def _save_pretrained(self, save_directory, file_names, legacy_format=None, filename_prefix=None):
        config_file = next(name for name in file_names if name.endswith("tokenizer_config.json"))
        with open(config_file, encoding="utf-8") as reader:
            config = json.load(reader)
        config["tokenizer_class"] = "PreTrainedTokenizerFast"
        with open(config_file, "w", encoding="utf-8") as writer:
            writer.write(json.dumps(config, indent=2, sort_keys=True, ensure_ascii=False) + "\n")
        if self.sentencepiece_model is not None:
            prefix = f"{filename_prefix}-" if filename_prefix else ""
            model_file = os.path.join(save_directory, f"{prefix}tokenizer.model")
            Path(model_file).write_bytes(self.sentencepiece_model)
            file_names = (*file_names, model_file)
        return super()._save_pretrained(save_directory, file_names, legacy_format, filename_prefix)


def load_tokenizer(path: str | os.PathLike, **kwargs) -> PreTrainedTokenizerBase:
    """
    Load a language model's tokenizer so that its ids are the original's, and stay so after `save_pretrained` and a reload by a
    plain `AutoTokenizer`.

    Where there is only a SentencePiece model of LLaMA's kind (`tokenizer.model`: every original LLaVA and Vicuna), the fast
    tokenizer is built here: merges ordered by score, and, for `legacy` tokenizers (the default, as in the original code), a space
    in front of every stretch of text between special tokens. A `tokenizer.json` of a LLaMA tokenizer is read unchanged; the rest
    is left to `AutoTokenizer`. Differs from the original where `legacy` is false and the prompt begins with a space: one is lost.

    Args:
        path (`str` or `os.PathLike`): A folder, a Hub name, or a `tokenizer.model` file.
        kwargs: For `from_pretrained`, such as `padding_side="left"` or `gguf_file`; they win over the folder's files.

    Raises:
        OSError: there is no tokenizer at `path`.
        ValueError: `tokenizer.model` is not a SentencePiece model, or the folder's added tokens leave gaps in the ids.
    """
    path = os.fspath(path)
    if "gguf_file" in kwargs:
        return AutoTokenizer.from_pretrained(path, **kwargs)
    hub_options = {name: kwargs[name] for name in _HUB_OPTIONS if name in kwargs}
    if os.path.isfile(path) and path.endswith(".model"):
        files = {"tokenizer.model": path}
    else:
        files = _find_files(path, hub_options)
    if "tokenizer.json" not in files and "tokenizer.model" in files:
        config = _read_json(files.get("tokenizer_config.json"))
        if config.get("tokenizer_class") in _LLAMA_CLASSES:
            model = _read_sentencepiece(files["tokenizer.model"])
            if model.model_type == _BPE:
                settings = {name: value for name, value in kwargs.items() if name not in _HUB_OPTIONS}
                return _build_tokenizer(model, config, files, path, settings)
    tokenizer = AutoTokenizer.from_pretrained(path, **kwargs)
    if "tokenizer.json" in files and type(tokenizer).__name__ == "LlamaTokenizer":
        # This class forgets the file's normaliser; a llava checkpoint's tokenizer is reloaded with it.
        tokenizer = LegacyLlamaTokenizer.from_pretrained(path, **kwargs)
        if "tokenizer.model" in files:
            tokenizer.sentencepiece_model = Path(files["tokenizer.model"]).read_bytes()
        after_eos = tokenizer.tokenize(f"{tokenizer.eos_token}a")[1]
        tokenizer.init_kwargs["legacy"] = after_eos.startswith(_SPACE)
    return tokenizer


def add_image_token(tokenizer: PreTrainedTokenizerBase, image_token: str = IMAGE_TOKEN) -> int:
    """
    Give a tokenizer, in place, the image token (`tokenizer.image_token`), and a pad token if it has none; both become special.

    Returns:
        `int`: How many tokens are new, and so how many rows the embedding matrix lacks.
    """
    before = len(tokenizer)
    tokenizer.add_tokens([AddedToken(image_token, special=True, normalized=False)], special_tokens=True)
    if "image_token" not in tokenizer.SPECIAL_TOKENS_ATTRIBUTES:
        add_named_token(tokenizer, {"image_token": image_token})
    tokenizer.image_token = image_token
    if tokenizer.pad_token is None:
        tokenizer.add_special_tokens({"pad_token": PAD_TOKEN})
    return len(tokenizer) - before


# SentencePiece → tokenizer.json


@dataclass
class _SentencePieceModel:
    """The fields of SentencePiece's `ModelProto` that tokenization depends on."""

    raw: bytes
    pieces: list[str]
    scores: list[float]
    types: list[int]
    model_type: int
    byte_fallback: bool
    unk_piece: str
    bos_piece: str
    eos_piece: str
    charsmap: bytes
    add_dummy_prefix: bool
    remove_extra_whitespaces: bool


def _build_tokenizer(
    model: _SentencePieceModel, config: dict, files: dict[str, str], path: str, settings: dict
) -> LegacyLlamaTokenizer:
    config = {**config, **settings}
    # The slow tokenizer's default: what says nothing is legacy.
    legacy = config["legacy"] = config.get("legacy") is not False
    config["tokenizer_class"] = "PreTrainedTokenizerFast"
    for name, token in [("unk", model.unk_piece), ("bos", model.bos_piece), ("eos", model.eos_piece)]:
        config.setdefault(f"{name}_token", token)
    description = _tokenizer_json(model, config, _added_tokens(model, config, files, path), legacy)

    with tempfile.TemporaryDirectory() as folder:
        for name in ("special_tokens_map.json", "chat_template.jinja"):
            if name in files:
                shutil.copy(files[name], os.path.join(folder, name))
        for name, content in [("tokenizer.json", description), ("tokenizer_config.json", config)]:
            Path(folder, name).write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")
        tokenizer = LegacyLlamaTokenizer.from_pretrained(folder, **settings)
    tokenizer.name_or_path = tokenizer.init_kwargs["name_or_path"] = path
    for name in ("tokenizer_file", "vocab_file"):  # they pointed into the temporary folder
        tokenizer.init_kwargs.pop(name, None)
    tokenizer.sentencepiece_model = model.raw
    return tokenizer


def _tokenizer_json(model: _SentencePieceModel, config: dict, added_tokens: list[dict], legacy: bool) -> dict:
    """The `tokenizer.json` whose ids are SentencePiece's."""
    normalizers = []
    if model.charsmap:
        charsmap = base64.b64encode(model.charsmap).decode("ascii")
        normalizers.append({"type": "Precompiled", "precompiled_charsmap": charsmap})
    if model.remove_extra_whitespaces:
        normalizers.append({"type": "Strip", "strip_left": True, "strip_right": True})
        normalizers.append({"type": "Replace", "pattern": {"Regex": " {2,}"}, "content": " "})
    pre_tokenizer = None
    if model.add_dummy_prefix and not legacy:
        # Only the very first stretch of text gets the prefix, and of the two forms only this one knows its place.
        pre_tokenizer = {"type": "Metaspace", "replacement": _SPACE, "prepend_scheme": "first", "split": False}
    else:
        # `Metaspace` would prepend nothing to a text that begins with a space; SentencePiece does, and so does this.
        if model.add_dummy_prefix:
            normalizers.append({"type": "Prepend", "prepend": _SPACE})
        normalizers.append({"type": "Replace", "pattern": {"String": " "}, "content": _SPACE})

    decoders = [
        {"type": "Replace", "pattern": {"String": _SPACE}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
    ]
    if model.add_dummy_prefix:
        decoders.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})

    vocab = {piece: i for i, piece in enumerate(model.pieces)}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added_tokens,
        "normalizer": {"type": "Sequence", "normalizers": normalizers} if normalizers else None,
        "pre_tokenizer": pre_tokenizer,
        "post_processor": _post_processor(config, {token["content"]: token["id"] for token in added_tokens} | vocab),
        "decoder": {"type": "Sequence", "decoders": decoders},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": model.unk_piece,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": True,
            "byte_fallback": model.byte_fallback,
            "ignore_merges": False,
            "vocab": vocab,
            "merges": _merges(model),
        },
    }


def _merges(model: _SentencePieceModel) -> list[tuple[str, str]]:
    """
    SentencePiece joins the two neighbours whose piece has the best score, of equals the leftmost; a merge table has no equals. Scores
    differ but for pieces added by hand (LLaMA's runs of spaces: −1e9), where joining from the left is to prefer the longest result,
    and of the ways to make one piece the one with the longest left part.
    """
    ids = {
        piece: i for i, (piece, kind) in enumerate(zip(model.pieces, model.types)) if kind in (_NORMAL, _USER_DEFINED)
    }
    merges = []
    for piece, i in ids.items():
        for cut in range(1, len(piece)):
            left, right = piece[:cut], piece[cut:]
            if left in ids and right in ids:
                merges.append(((-model.scores[i], -len(piece), i, -cut), (left, right)))
    return [pair for _, pair in sorted(merges)]


def _added_tokens(model: _SentencePieceModel, config: dict, files: dict[str, str], path: str) -> list[dict]:
    """Entries of `added_tokens`, by id: the model's own control and user-defined pieces, then the folder's additions."""
    tokens: dict[int, dict] = {}

    def add(i: int, content: str, special: bool, **flags):
        tokens[i] = {
            "id": i,
            "content": content,
            **{name: bool(flags.get(name, False)) for name in ("single_word", "lstrip", "rstrip", "normalized")},
            "special": special,
        }

    for i, (piece, kind) in enumerate(zip(model.pieces, model.types)):
        if kind in (_UNKNOWN, _CONTROL):
            add(i, piece, special=True)
        elif kind == _USER_DEFINED:
            add(i, piece, special=False)
    named = {str(value) for name, value in config.items() if name.endswith("_token") and isinstance(value, str)}
    special = _read_json(files.get("special_tokens_map.json"))
    for value in special.values():
        for token in value if isinstance(value, list) else [value]:
            named.add(token["content"] if isinstance(token, dict) else token)
    for content, i in _read_json(files.get("added_tokens.json")).items():
        add(i, content, special=content in named)
    for i, token in config.get("added_tokens_decoder", {}).items():
        add(int(i), **{name: value for name, value in token.items() if name != "__type"})

    additions = [tokens[i] for i in sorted(tokens) if i >= len(model.pieces)]
    for expected, token in enumerate(additions, start=len(model.pieces)):
        if token["id"] != expected:
            raise ValueError(
                f"{path}: the added token {token['content']!r} has id {token['id']} where {expected} comes next (the "
                f"SentencePiece model has {len(model.pieces)} pieces). Give added_tokens.json ids without gaps."
            )
    for i, token in tokens.items():
        if i < len(model.pieces) and model.pieces[i] != token["content"]:
            raise ValueError(
                f"{path}: the added token {token['content']!r} has id {i}, which the SentencePiece model gives to "
                f"{model.pieces[i]!r}. One of the files belongs to another model."
            )
    return [tokens[i] for i in sorted(tokens)]


def _post_processor(config: dict, vocab: dict[str, int]) -> dict:
    """`<s>` in front (LLaMA's default) and `</s>` behind (not its default), as the configuration says."""
    single, pair, special = [{"Sequence": {"id": "A", "type_id": 0}}], [{"Sequence": {"id": "B", "type_id": 1}}], {}
    for key, default in (("bos", True), ("eos", False)):
        if config.get(f"add_{key}_token", default):
            token = config[f"{key}_token"]
            token = token["content"] if isinstance(token, dict) else token
            special[token] = {"id": token, "ids": [vocab[token]], "tokens": [token]}
            for sequence, type_id in ((single, 0), (pair, 1)):
                at = 0 if key == "bos" else len(sequence)
                sequence.insert(at, {"SpecialToken": {"id": token, "type_id": type_id}})
    return {"type": "TemplateProcessing", "single": single, "pair": single + pair, "special_tokens": special}


def _read_sentencepiece(path: str) -> _SentencePieceModel:
    """
    Read a SentencePiece `ModelProto`: the library does not give its settings without the protobuf runtime, and generated readers
    take only the protobuf that they were generated by.
    """
    raw = Path(path).read_bytes()
    try:
        message = _fields(raw)
        pieces = [_fields(piece) for piece in message[1]]
        # merged, as protobuf does
        trainer, normalizer = (_fields(b"".join(message.get(number, []))) for number in (2, 3))
        model = _SentencePieceModel(
            raw,
            pieces=[piece[1][-1].decode("utf-8") for piece in pieces],
            scores=[struct.unpack("<f", _last(piece, 2, bytes(4)))[0] for piece in pieces],
            types=[_last(piece, 3, _NORMAL) for piece in pieces],
            model_type=_last(trainer, 3, _UNIGRAM),
            byte_fallback=bool(_last(trainer, 35, False)),
            unk_piece=_last(trainer, 45, b"<unk>").decode(),
            bos_piece=_last(trainer, 46, b"<s>").decode(),
            eos_piece=_last(trainer, 47, b"</s>").decode(),
            charsmap=_last(normalizer, 2, b""),
            add_dummy_prefix=bool(_last(normalizer, 3, True)),
            remove_extra_whitespaces=bool(_last(normalizer, 4, True)),
        )
    except (IndexError, KeyError, AttributeError, TypeError, UnicodeDecodeError, struct.error) as error:
        raise ValueError(f"{path} is not a SentencePiece model ({type(error).__name__}: {error}).") from error
    if model.add_dummy_prefix and _USER_DEFINED in model.types:
        logger.warning(
            f"{path} has user-defined pieces. Text after one of them gets a leading space that SentencePiece does not add."
        )
    return model


def _last(message: dict[int, list], number: int, default):
    return message.get(number, [default])[-1]


def _fields(message: bytes) -> dict[int, list]:
    """The values of a protobuf message by field number: an `int` for a varint, `bytes` for everything else."""
    fields, at = {}, 0

    def varint() -> int:
        nonlocal at
        value, shift = 0, 0
        while True:
            byte = message[at]
            at += 1
            value |= (byte & 0x7F) << shift
            if byte < 0x80:
                return value
            shift += 7

    while at < len(message):
        key = varint()
        kind = key & 7
        if kind == 0:
            value = varint()
        elif kind in (1, 2, 5):
            size = {1: 8, 5: 4}.get(kind) or varint()
            if at + size > len(message):
                raise IndexError("the file ends inside a field")
            value = message[at : at + size]
            at += size
        else:
            raise KeyError(f"wire type {kind}")
        fields.setdefault(key >> 3, []).append(value)
    return fields


def _find_files(path: str, hub_options: dict) -> dict[str, str]:
    """Local paths of the tokenizer files of a folder or a Hub repository, by name."""
    names = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json")
    files = {}
    # Whether there is anything at all is left to AutoTokenizer to say.
    quiet = {f"_raise_exceptions_for_{what}": False for what in ("missing_entries", "gated_repo", "connection_errors")}
    for name in (*names, "added_tokens.json", "chat_template.jinja"):
        file = cached_file(path, name, **quiet, **hub_options)
        if file is not None:
            files[name] = file
    return files


def _read_json(path: str | None) -> dict:
    if path is None:
        return {}
    with open(path, encoding="utf-8") as reader:
        return json.load(reader)
