"""
Tokenizer files as published repositories hold them: a SentencePiece vocabulary (700 pieces, `golden/tiny_spm.model`) or a
byte-level one trained in a moment, with each family's special tokens behind it in the published order.
"""

import functools
import json
import shutil
from dataclasses import dataclass, field
from pathlib import Path

import sentencepiece
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers


SENTENCEPIECE_MODEL = Path(__file__).parents[1] / "golden" / "tiny_spm.model"
PIECES = 700
HUGE = 1000000000000000019884624838656  # model_max_length of what has none
TEXT = "What colour is it? It is red, quite. green blue white USER: ASSISTANT: Why is that? the picture shows a word. "
SPLIT = (  # Llama-3's and Qwen's
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@dataclass(frozen=True)
class Vocabulary:
    """
    Args:
        kind (`str`): `"sentencepiece"`, `"gemma"` (the same pieces under other control tokens) or `"bytes"`.
        added (`tuple[str, ...]`): Tokens behind the vocabulary, by id.
        rstrip (`tuple[str, ...]`): Those of them that swallow the white space behind them (Phi-3).
        config (`dict`): Fields of `tokenizer_config.json`.
        template (`str`, *optional*): The tokenizer's own chat template.
        model (`bool`): Whether `tokenizer.model` lies next to `tokenizer.json`.
    """

    kind: str
    added: tuple[str, ...] = ()
    rstrip: tuple[str, ...] = ()
    config: dict = field(default_factory=dict)
    template: str | None = None
    model: bool = False

    def ids(self, *tokens: str) -> list[int]:
        base = _base(self.kind)[0]
        return [base[token] if token in base else len(base) + self.added.index(token) for token in tokens]

    def __len__(self) -> int:
        return len(_base(self.kind)[0]) + len(self.added)

    def write(self, folder: Path, **changes) -> None:
        """`tokenizer.json`, `tokenizer_config.json`, `special_tokens_map.json`, `added_tokens.json`."""
        vocabulary, merges = _base(self.kind)
        controls = {"sentencepiece": 3, "gemma": 6, "bytes": 0}[self.kind]
        tokens = [*list(vocabulary)[:controls], *self.added]
        flags = {"single_word": False, "lstrip": False, "normalized": False, "special": True}
        added = [
            {"id": i, "content": token, "rstrip": token in self.rstrip, **flags}
            for i, token in zip(self.ids(*tokens), tokens)
        ]
        config = {**self.config, **changes}
        bos = config.get("bos_token")
        begins = bool(bos) and config.get("add_bos_token", True)
        description = {
            "version": "1.0",
            "truncation": None,
            "padding": None,
            "added_tokens": added,
            **_pipeline(self.kind),
            "post_processor": _begin_with(bos, self.ids(bos)[0]) if begins else None,
            "model": {
                "type": "BPE",
                "unk_token": None if self.kind == "bytes" else "<unk>",
                "fuse_unk": self.kind != "bytes",
                "byte_fallback": self.kind != "bytes",
                "vocab": vocabulary,
                "merges": [" ".join(pair) for pair in merges],  # as files of before 2024-10 hold them
            },
        }
        if self.kind == "bytes" and not begins:
            description["post_processor"] = {
                "type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False,
            }  # fmt: skip
        if self.template is not None:
            config.setdefault("chat_template", self.template)
        config["added_tokens_decoder"] = {
            str(token["id"]): {key: value for key, value in token.items() if key != "id"} for token in added
        }
        named = {key: config[key] for key in ("bos_token", "eos_token", "pad_token", "unk_token") if config.get(key)}
        write_json(folder / "tokenizer.json", description)
        write_json(folder / "tokenizer_config.json", config)
        write_json(folder / "special_tokens_map.json", named)
        if self.added and self.kind != "bytes":
            write_json(folder / "added_tokens.json", dict(zip(self.added, self.ids(*self.added))))
        if self.model:
            shutil.copyfile(SENTENCEPIECE_MODEL, folder / "tokenizer.model")


def write_json(path: Path, content) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False), "utf-8")


@functools.cache
def _base(kind: str) -> tuple[dict[str, int], list[list[str]]]:
    """Ids and merges of a vocabulary without its added tokens."""
    if kind == "bytes":
        core = Tokenizer(models.BPE())
        core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        core.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        core.train_from_iterator(
            [TEXT] * 20, trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, show_progress=False)
        )
        model = json.loads(core.to_str())["model"]
        return dict(sorted(model["vocab"].items(), key=lambda item: item[1])), [list(pair) for pair in model["merges"]]
    reader = sentencepiece.SentencePieceProcessor(model_file=str(SENTENCEPIECE_MODEL))
    pieces = [reader.id_to_piece(i) for i in range(len(reader))]
    ids = {piece: i for i, piece in enumerate(pieces)}
    merges = []  # SentencePiece joins the pair whose piece has the best score
    for piece, i in ids.items():
        if not reader.is_byte(i) and not reader.is_control(i):
            for cut in range(1, len(piece)):
                left, right = piece[:cut], piece[cut:]
                if left in ids and right in ids:
                    merges.append(((-reader.get_score(i), ids[left], ids[right]), [left, right]))
    merges = [pair for _, pair in sorted(merges)]
    if kind == "gemma":
        pieces = ["<pad>", "<eos>", "<bos>", "<unk>", "<start_of_turn>", "<end_of_turn>", *pieces[3:]]
        ids = {piece: i for i, piece in enumerate(pieces)}
    return ids, merges


def _pipeline(kind: str) -> dict:
    if kind == "bytes":
        split = {"type": "Split", "pattern": {"Regex": SPLIT}, "behavior": "Isolated", "invert": False}
        whole = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
        return {
            "normalizer": None,
            "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, whole]},
            "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        }
    spaces = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    decoders = [{"type": "Replace", "pattern": {"String": "▁"}, "content": " "}, {"type": "ByteFallback"}]
    decoders.append({"type": "Fuse"})
    if kind == "gemma":
        split = {"type": "Split", "pattern": {"String": " "}, "behavior": "MergedWithPrevious", "invert": False}
        pipeline = {"normalizer": spaces, "pre_tokenizer": split}
    else:
        normalizers = [{"type": "Prepend", "prepend": "▁"}, spaces]
        pipeline = {"normalizer": {"type": "Sequence", "normalizers": normalizers}, "pre_tokenizer": None}
        decoders.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    return {**pipeline, "decoder": {"type": "Sequence", "decoders": decoders}}


def _begin_with(token: str, i: int) -> dict:
    first = {"SpecialToken": {"id": token, "type_id": 0}}
    single = [first, {"Sequence": {"id": "A", "type_id": 0}}]
    pair = [*single, {"SpecialToken": {"id": token, "type_id": 1}}, {"Sequence": {"id": "B", "type_id": 1}}]
    special = {token: {"id": token, "ids": [i], "tokens": [token]}}
    return {"type": "TemplateProcessing", "single": single, "pair": pair, "special_tokens": special}
