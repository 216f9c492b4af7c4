import json

import pytest
from golden_text import GOLDEN
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from modeling_llava.text.control_tokens import ControlTokens
from modeling_llava.text.tokenization import add_image_token, load_tokenizer


LITERALS = ["<unk>", "<s>", "</s>", "<image>", "<pad>"]
FRAGMENTS = [*LITERALS, "<", ">", "</", "s>", "<ima", "ge>", "image", "a", " ", "\n", "é", "\U000f0000", "\U000f0405"]


@pytest.fixture(scope="module")
def tokenizer():
    tokenizer = load_tokenizer(GOLDEN / "tiny_spm.model")
    add_image_token(tokenizer)
    return tokenizer


def test_control_tokens_are_the_special_ones_and_the_image_token(tokenizer):
    tokenizer.add_tokens(["<tool>"])
    control = ControlTokens.of(tokenizer)
    assert control.ids == {"<unk>": 0, "<s>": 1, "</s>": 2, "<image>": 700, "<pad>": 701}
    assert (control.prefix, control.suffix, control.image_token_id) == ([1], [], 700)
    assert ControlTokens.of(tokenizer) is control


@settings(max_examples=300, deadline=None)
@given(parts=st.lists(st.lists(st.sampled_from(FRAGMENTS), max_size=6).map("".join), max_size=4))
def test_marked_texts_hold_no_control_token_however_they_are_joined(tokenizer, parts):
    # What a template may put between two texts: nothing, a piece of a control token, or a whole one.
    control = ControlTokens.of(tokenizer)
    messages = [{"role": "user", "content": part} for part in parts]
    (marked,), marks = control.mark(messages)
    texts = [message["content"] for message in marked]
    if marks is None:
        assert marked is messages
    else:
        assert [marks.unmark(text) for text in texts] == parts
        assert [len(text) for text in texts] == [len(part) for part in parts]
    for strip in (str, str.strip):
        assert not any(literal in "".join(map(strip, texts)) for literal in LITERALS)
        for before, after in [("<", ">"), ("</", ">"), ("<s", "s>"), ("<ima", "ge>"), ("</s", ">")]:
            for text in map(strip, texts):
                joined = before + text + after
                found = [literal for literal in LITERALS if literal in joined]
                assert not found or not text  # the template's own pieces meet where the text is empty


@settings(max_examples=300, deadline=None)
@given(text=st.lists(st.sampled_from(FRAGMENTS), max_size=8).map("".join))
def test_the_twin_reads_typed_literals_as_text_and_the_templates_as_control_tokens(tokenizer, text):
    control = ControlTokens.of(tokenizer)
    (marked,), marks = control.mark(text)
    if marks is None:
        assert not any(literal in text for literal in LITERALS)
        return
    rendered = f"<s>{marked}</s><image>{marked}<pad>"
    twin = marks.tokenizer(tokenizer)
    output = twin(marks.rename(rendered), add_special_tokens=False, return_offsets_mapping=True)
    ids, offsets = output["input_ids"], output["offset_mapping"]
    assert [i for i in ids if i in control.ids.values()] == [1, 2, 700, 701]
    # Spans are those of the rendered text.
    spans = dict(zip(ids, offsets))
    assert rendered[slice(*spans[700])] == "<image>" and rendered[slice(*spans[701])] == "<pad>"
    assert (twin.pad_token_id, twin.eos_token_id, len(twin)) == (701, 2, len(tokenizer))


def test_locations_of_images_are_not_marked(tokenizer):
    item = {"type": "image", "path": "a<s>.png", "url": "http://x/</s>"}
    messages = [{"role": "user", "content": [item, {"type": "text", "text": "a</s>"}]}]
    (marked,), _ = ControlTokens.of(tokenizer).mark(messages)
    assert marked[0]["content"][0] == item
    assert marked[0]["content"][1]["text"] != "a</s>"
    assert messages[0]["content"][1]["text"] == "a</s>"


def test_a_text_that_uses_up_the_private_planes_is_refused(tokenizer):
    text = "</s>" + "".join(chr(block << 12) for block in range(0xF0, 0x110))
    with pytest.raises(ValueError, match="private-use"):
        ControlTokens.of(tokenizer).mark(text)


def test_tokenizers_that_cannot_be_read_are_refused():
    tokenizer = load_tokenizer(GOLDEN / "tiny_spm.model")
    with pytest.raises(ValueError, match="no image token '<image>'.*add_image_token"):
        ControlTokens.of(tokenizer)
    add_image_token(tokenizer)
    tokenizer.add_tokens([f"<{i}>" for i in range(3100)], special_tokens=True)
    with pytest.raises(ValueError, match="3105 control tokens"):
        ControlTokens.of(tokenizer)
    with pytest.raises(TypeError, match="AutoTokenizer"):
        ControlTokens(object(), "<image>")


WORDS = ["[UNK]", "</s>", "▁a", "a", "b", "<", "/", "s", ">", "##a", "##b", "##/", "##s", "##>"]
OTHER_MODELS = {
    "unigram": models.Unigram([(word, -float(i)) for i, word in enumerate(WORDS)], unk_id=0),
    "wordpiece": models.WordPiece({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]"),
    "wordlevel": models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]"),
}


@pytest.mark.parametrize("name", OTHER_MODELS)
def test_every_kind_of_model_has_a_twin(name):
    backend = Tokenizer(OTHER_MODELS[name])
    backend.normalizer = normalizers.Lowercase()
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="[UNK]", eos_token="</s>")
    tokenizer.add_special_tokens({"extra_special_tokens": [AddedToken("<B>", special=True, normalized=True)]})
    add_image_token(tokenizer)
    control = ControlTokens.of(tokenizer)
    (marked,), marks = control.mark("A </s> b <B> <image>")
    ids = marks.tokenizer(tokenizer)(marks.rename(f"{marked}</s><image>"), add_special_tokens=False)["input_ids"]
    eos, image = tokenizer.eos_token_id, tokenizer.image_token_id
    assert ids[-2:] == [eos, image]
    assert not {eos, image, tokenizer.convert_tokens_to_ids("<B>")} & set(ids[:-2])
    assert ids[0] == tokenizer("A", add_special_tokens=False)["input_ids"][0]


def test_a_twin_keeps_what_the_tokenizer_puts_around_a_text(tmp_path):
    (tmp_path / "tokenizer.model").write_bytes((GOLDEN / "tiny_spm.model").read_bytes())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"add_bos_token": True, "add_eos_token": True}))
    tokenizer = load_tokenizer(tmp_path)
    add_image_token(tokenizer)
    control = ControlTokens.of(tokenizer)
    assert (control.prefix, control.suffix) == ([1], [2])
    (marked,), marks = control.mark("a</s>")
    ids = marks.tokenizer(tokenizer)(marks.rename(marked))["input_ids"]
    assert ids[0] == 1 and ids[-1] == 2 and 2 not in ids[1:-1]
