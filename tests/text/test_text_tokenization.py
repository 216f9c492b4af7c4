import json
import shutil

import pytest
import sentencepiece
from golden_text import GOLDEN, split_at, with_pieces, without_dummy_prefix
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from modeling_llava.text.tokenization import add_image_token, load_tokenizer


# LLaMA's vocabulary has runs of 2 to 16 spaces, all with the score −1e9; the last two are not LLaMA's.
RUNS_OF_SPACES = {"llama": range(3, 17), "powers": (4, 8, 16), "primes": (3, 5, 7)}
MODELS = ["tiny_spm", "tiny_spm_ws", *RUNS_OF_SPACES]
FRAGMENTS = [
    " ", "  ", "    ", "\n", "\t", "the", "a", "e", "he", "t", "ing", "an", ".", "é", "이", "🐈", "▁", "<s", "x",
]  # fmt: skip


@pytest.fixture(scope="module")
def model_files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    for name in ("tiny_spm", "tiny_spm_ws"):
        shutil.copy(GOLDEN / f"{name}.model", folder / f"{name}.model")
    raw = (GOLDEN / "tiny_spm.model").read_bytes()
    for name, sizes in RUNS_OF_SPACES.items():
        (folder / f"{name}.model").write_bytes(with_pieces(raw, {"▁" * n: -1e9 for n in sizes}))
    return {name: str(folder / f"{name}.model") for name in MODELS}


@pytest.fixture(scope="module")
def pairs(model_files):
    return {
        name: (load_tokenizer(file), sentencepiece.SentencePieceProcessor(model_file=file))
        for name, file in model_files.items()
    }


@pytest.mark.parametrize("name", MODELS)
@settings(max_examples=120, deadline=None)
@given(fragments=st.lists(st.sampled_from(FRAGMENTS), max_size=40))
def test_ids_equal_sentencepiece_on_random_white_space(pairs, name, fragments):
    tokenizer, reference = pairs[name]
    text = "".join(fragments)
    assert tokenizer.encode(text, add_special_tokens=False) == reference.encode(text)


@settings(max_examples=120, deadline=None)
@given(text=st.text(st.characters(blacklist_categories=["Cs"], blacklist_characters="\0")))
def test_ids_equal_sentencepiece_on_random_unicode(pairs, text):
    tokenizer, reference = pairs["tiny_spm_ws"]
    assert tokenizer.encode(text, add_special_tokens=False) == reference.encode(text)


def test_without_legacy_only_the_first_stretch_gets_a_space(tmp_path, model_files):
    shutil.copy(model_files["llama"], tmp_path / "tokenizer.model")
    (tmp_path / "tokenizer_config.json").write_text('{"legacy": false, "tokenizer_class": "LlamaTokenizer"}')
    tokenizer = load_tokenizer(tmp_path)
    reference = sentencepiece.SentencePieceProcessor()
    reference.LoadFromSerializedProto(without_dummy_prefix((tmp_path / "tokenizer.model").read_bytes()))
    text = "the cat</s>USER: the</s>  two spaces\n    four</s> one"
    first, *rest = split_at(text, ["</s>"])
    # The slow tokenizer put one space in front of the whole text and turned SentencePiece's own off.
    expected = reference.encode("▁" + first)
    for piece in rest:
        expected += [2] if piece == "</s>" else reference.encode(piece)
    assert tokenizer.encode(text, add_special_tokens=False) == expected
    tokenizer.save_pretrained(tmp_path / "saved")
    assert PreTrainedTokenizerFast.from_pretrained(tmp_path / "saved").encode(text) == [1, *expected]


def test_the_sentencepiece_model_is_saved_too(tmp_path, model_files):
    load_tokenizer(model_files["llama"]).save_pretrained(tmp_path)
    with open(model_files["llama"], "rb") as original:
        assert (tmp_path / "tokenizer.model").read_bytes() == original.read()
    # Every transformers reads this class's tokenizer.json as it is.
    assert json.loads((tmp_path / "tokenizer_config.json").read_text())["tokenizer_class"] == "PreTrainedTokenizerFast"


def test_an_original_folder_keeps_its_added_tokens_and_settings():
    tokenizer = load_tokenizer(GOLDEN / "llava_v1_tiny")
    assert tokenizer.convert_tokens_to_ids(["<im_patch>", "<im_start>", "<im_end>"]) == [700, 701, 702]
    assert (tokenizer.pad_token, tokenizer.model_max_length, tokenizer.padding_side) == ("<unk>", 2048, "right")
    assert tokenizer.init_kwargs["legacy"] is True
    assert all(token.special for token in tokenizer.added_tokens_decoder.values())
    assert load_tokenizer(GOLDEN / "llava_v1_tiny", padding_side="left").padding_side == "left"


def test_a_llama_tokenizer_json_is_taken_as_it_is(tmp_path, pairs):
    tokenizer, reference = pairs["tiny_spm_ws"]
    tokenizer.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({**config, "tokenizer_class": "LlamaTokenizer"}))
    (tmp_path / "tokenizer.model").write_bytes(tokenizer.sentencepiece_model)
    text = "    indented</s>    again"
    expected = [*reference.encode("    indented"), 2, *reference.encode("    again")]
    loaded = load_tokenizer(tmp_path)
    assert loaded.encode(text, add_special_tokens=False) == expected
    assert loaded.init_kwargs["legacy"] is True
    assert loaded.sentencepiece_model == tokenizer.sentencepiece_model


def test_add_image_token_counts_new_tokens_and_keeps_a_pad_token():
    tokenizer = load_tokenizer(GOLDEN / "tiny_spm.model")
    assert add_image_token(tokenizer) == 2  # <image>, <pad>
    assert (tokenizer.image_token, tokenizer.image_token_id, tokenizer.pad_token_id) == ("<image>", 700, 701)
    assert add_image_token(tokenizer) == 0
    original = load_tokenizer(GOLDEN / "llava_v1_tiny")
    assert add_image_token(original) == 1
    assert (original.image_token_id, original.pad_token) == (703, "<unk>")


def test_a_file_that_is_no_sentencepiece_model_is_named(tmp_path):
    for content in (b"", b"hello, not a model", b"\x0a\xff\xff", (GOLDEN / "tiny_spm.model").read_bytes()[:-5]):
        (tmp_path / "tokenizer.model").write_bytes(content)
        with pytest.raises(ValueError, match="is not a SentencePiece model"):
            load_tokenizer(tmp_path / "tokenizer.model")


@pytest.mark.parametrize(
    "added, message",
    [
        ({"<im_patch>": 700, "<im_end>": 702}, "'<im_end>' has id 702 where 701 comes next"),
        ({"<im_patch>": 300}, "belongs to another model"),
    ],
)
def test_added_tokens_that_do_not_fit_are_named(tmp_path, added, message):
    shutil.copy(GOLDEN / "tiny_spm.model", tmp_path / "tokenizer.model")
    (tmp_path / "added_tokens.json").write_text(json.dumps(added))
    with pytest.raises(ValueError, match=message):
        load_tokenizer(tmp_path)
