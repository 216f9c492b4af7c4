import copy
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import sentencepiece
import torch
from golden_text import (
    GOLDEN,
    GOLDEN_CASES,
    MODELS,
    STOPS,
    TEMPLATES,
    decode,
    golden_messages,
    golden_rows,
    tiny_processor,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from modeling_llava.data import labels
from modeling_llava.data.labels import conversation_length, encode_conversation
from modeling_llava.data.schema import NOTHING_SUPERVISED, TOO_LONG, BadSampleError
from modeling_llava.text.chat_templates import CHAT_TEMPLATES, insert_image_token
from modeling_llava.text.stops import answer_stop
from modeling_llava.text.tokenization import add_image_token


PIECES = sentencepiece.SentencePieceProcessor(model_file=str(GOLDEN / "tiny_spm.model"))
CONTROL = {0: "<unk>", 1: "<s>", 2: "</s>", 700: "<image>", 701: "<pad>"}


def user(*content):
    items = [{"type": "text", "text": item} if isinstance(item, str) else item for item in content]
    return {"role": "user", "content": items}


def assistant(text):
    return {"role": "assistant", "content": [{"type": "text", "text": text}]}


IMAGE = {"type": "image"}
SAMPLE = [user(IMAGE, "What is this?"), assistant("A cat.")]


def supervised_runs(encoded):
    """Ids of every stretch of supervised positions."""
    runs, before = [], False
    for i, label in zip(encoded["input_ids"].tolist(), encoded["labels"].tolist()):
        if label != -100:
            assert label == i
            runs = [*runs[:-1], [*runs[-1], i]] if before else [*runs, [i]]
        before = label != -100
    return runs


@pytest.fixture(scope="module")
def processors():
    return {name: tiny_processor(template=name, patches=2) for name in CHAT_TEMPLATES}


@pytest.mark.parametrize("file, version", GOLDEN_CASES)
def test_ids_and_labels_are_the_original_codes(file, version):
    processor = tiny_processor(MODELS[file], TEMPLATES[version])
    for row in golden_rows(file, version):
        encoded = encode_conversation(golden_messages(row), processor, sample_id=row["id"])
        image = processor.image_token_id
        assert [-200 if i == image else i for i in encoded["input_ids"].tolist()] == row["input_ids"], row["id"]
        if not version.startswith("v0"):
            assert encoded["labels"].tolist() == row["labels"], row["id"]


FRAGMENTS = [
    *("the kettle", "a", " ", "   ", "\n", "\t", "é", "이", "🐈", "###", "Human:", "USER:", "image", "s>", ">", "<"),
    *("</s>", "<s>", "<image>", "<unk>", "<pad>", "<<s>s>", "</", "<ima", "ge>", "[INST]", "<|im_end|>", "\U000f0000"),
]
TEXTS = st.lists(st.sampled_from(FRAGMENTS), min_size=1, max_size=8).map("".join)
USER_TURNS = st.lists(st.one_of(st.just(IMAGE), TEXTS), min_size=1, max_size=4)
TURNS = st.lists(st.tuples(USER_TURNS, TEXTS), min_size=1, max_size=3)


@pytest.mark.parametrize("name", CHAT_TEMPLATES)
@settings(max_examples=60, deadline=None)
@given(turns=TURNS, system=st.one_of(st.none(), TEXTS), keep_image_order=st.booleans())
def test_random_conversations_keep_the_invariants(processors, name, turns, system, keep_image_order):
    turns = turns[:1] if name == "plain" else turns
    messages = [message for content, answer in turns for message in (user(*content), assistant(answer))]
    if system is not None:
        messages = [{"role": "system", "content": system}, *messages]
    before = copy.deepcopy(messages)
    processor = processors[name]
    encoded = encode_conversation(messages, processor, keep_image_order=keep_image_order)
    assert messages == before

    ids = encoded["input_ids"].tolist()
    num_images = sum(item is IMAGE for content, _ in turns for item in content)
    assert ids.count(processor.image_token_id) == num_images * processor.num_image_tokens
    assert len(ids) == conversation_length(messages, processor, keep_image_order=keep_image_order)

    # Control tokens are those that the template writes, whatever was typed.
    ends = len(turns) if STOPS[name].strip() == "</s>" else 0
    starts = len(turns) if name == "llama_2" else 1
    assert [ids.count(i) for i in (0, 1, 2, 701)] == [0, starts, ends, 0]

    # Supervised text is exactly the answers and their stops. (After an image there is SentencePiece's space.)
    texts = [decode(PIECES, run, CONTROL) for run in supervised_runs(encoded)]
    space = "" if name == "chatml" else " "
    assert texts == [f"{space}{answer}{STOPS[name]}" for _, answer in turns]


@pytest.fixture(scope="module")
def byte_level():
    """A GPT-2-like tokenizer with ChatML's control tokens."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    text = "the kettle is on the table <|im_end> <|im_start <image> assistant user\n"
    backend.train_from_iterator([text] * 3, trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|im_end|>")
    add_image_token(tokenizer)
    return tokenizer


@settings(max_examples=100, deadline=None)
@given(turns=st.lists(st.tuples(USER_TURNS, TEXTS), min_size=1, max_size=3))
def test_random_conversations_with_a_byte_level_tokenizer(byte_level, turns):
    processor = tiny_processor(tokenizer=byte_level, template="chatml", patches=2)
    messages = [message for content, answer in turns for message in (user(*content), assistant(answer))]
    encoded = encode_conversation(messages, processor)
    ids = encoded["input_ids"].tolist()
    num_images = sum(item is IMAGE for content, _ in turns for item in content)
    start, end = byte_level.convert_tokens_to_ids(["<|im_start|>", "<|im_end|>"])
    assert ids.count(processor.image_token_id) == 4 * num_images
    assert (ids.count(start), ids.count(end), ids.count(byte_level.pad_token_id)) == (2 * len(turns),) * 2 + (0,)
    texts = [byte_level.decode(run) for run in supervised_runs(encoded)]
    # The line break of the header is in the answer's first token where the two were merged.
    assert [text.removeprefix("\n") for text in texts] == [f"{a.removeprefix(chr(10))}<|im_end|>" for _, a in turns]


def test_a_longer_conversation_raises_is_dropped_or_loses_its_end(processors):
    processor = processors["vicuna_v1"]
    messages = [*SAMPLE, user("Why?"), assistant("It has pointed ears, whiskers and a tail.")]
    whole = encode_conversation(messages, processor)
    length = len(whole["input_ids"])
    exact = encode_conversation(messages, processor, max_length=length)
    assert len(exact["input_ids"]) == len(exact["labels"]) == length == conversation_length(messages, processor)
    assert exact["input_ids"].dtype == exact["labels"].dtype == torch.int64
    with pytest.raises(BadSampleError, match=rf"'ins-17' has {length} tokens \(4 of them for its 1 images\)") as e:
        encode_conversation(messages, processor, max_length=length - 5, sample_id="ins-17")
    assert e.value.reason == TOO_LONG
    with pytest.raises(ValueError, match="overflow must be"):
        encode_conversation(messages, processor, overflow="truncate")
    assert encode_conversation(messages, processor, max_length=length - 5, overflow="drop") is None
    cut = encode_conversation(messages, processor, max_length=length - 5, overflow="truncate_text")
    assert torch.equal(cut["input_ids"], whole["input_ids"][:-5])
    assert torch.equal(cut["labels"], whole["labels"][:-5])


def test_a_cut_within_an_answer_is_said(processors, caplog):
    processor = processors["vicuna_v1"]
    length = conversation_length(SAMPLE, processor)
    messages = [*SAMPLE, user("Why?"), assistant("So.")]
    for max_length, is_said in ((length - 1, True), (length, False)):
        labels.logger.warning_once.cache_clear()
        caplog.clear()
        encode_conversation(messages, processor, max_length=max_length, overflow="truncate_text")
        assert ("without its stop" in caplog.text) == is_said


def test_an_answer_that_is_not_to_be_learned_is_not_supervised(processors):
    own = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + eos_token }}{% endfor %}"
    llava_hf = tiny_processor(patches=2)
    llava_hf.chat_template = (
        "{% for m in messages %}{{ m.role }}: {% for c in m.content %}{% if c.type == 'image' %}<image>{% elif m.role == "
        "'assistant' %}{% generation %}{{ c.text }}{% endgeneration %}{% else %}{{ c.text }}{% endif %}{% endfor %}"
        "{{ eos_token }}{% endfor %}"
    )
    unmarked = tiny_processor(patches=2)
    unmarked.chat_template = insert_image_token(own)
    two_texts = {"role": "assistant", "content": [{"type": "text", "text": "WRO"}, {"type": "text", "text": "NG."}]}
    marked = [processors[name] for name in CHAT_TEMPLATES if name != "plain"]  # its answers follow one another
    messages = [user(IMAGE, "Hello?"), two_texts, user("No."), assistant("right.")]
    for processor in (*marked, llava_hf, unmarked):
        whole = encode_conversation(messages, processor)
        for flag in ({"weight": 0}, {"loss": False}, {"train": False}):
            encoded = encode_conversation([messages[0], {**two_texts, **flag}, *messages[2:]], processor)
            assert torch.equal(encoded["input_ids"], whole["input_ids"])
            assert supervised_runs(encoded) == supervised_runs(whole)[-1:]
    last = "{% for m in messages %}{% if loop.last %}{% generation %}x{% endgeneration %}{% endif %}{% endfor %}"
    once = tiny_processor(template=last)
    with pytest.raises(ValueError, match="marks 1 spans for its 2 answers"):
        encode_conversation([user("Hello?"), {**two_texts, "weight": 0}, *messages[2:]], once)
    with pytest.raises(ValueError, match="excludes all its answers"):
        encode_conversation([messages[0], {**two_texts, "weight": 0}], processor)


def test_special_tokens_that_were_added_are_tokens_in_answers_alone():
    processor = tiny_processor(patches=2)
    processor.tokenizer.add_special_tokens({"additional_special_tokens": ["<seg>", "<box>"]})
    seg, box = processor.tokenizer.convert_tokens_to_ids(["<seg>", "<box>"])
    for answer in ("Sure, <seg> and <box>.", "<seg><box>", "</s> <seg>, <image> <box>"):
        encoded = encode_conversation([user(IMAGE, "Where is <seg>?"), assistant(answer)], processor)
        ids, learned = encoded["input_ids"].tolist(), encoded["labels"].tolist()
        assert [ids.count(i) for i in (seg, box, 2)] == [1, 1, 1] == [learned.count(i) for i in (seg, box, 2)]
        assert ids.count(processor.image_token_id) == 4


def test_nothing_supervised_names_the_sample_and_the_cause(processors):
    processor = processors["vicuna_v1"]
    with pytest.raises(BadSampleError, match="sample 7 has nothing to learn from: it has no answer") as e:
        encode_conversation(SAMPLE[:1], processor, sample_id=7)
    assert e.value.reason == NOTHING_SUPERVISED
    length = conversation_length(SAMPLE[:1], processor)
    with pytest.raises(ValueError, match=f"its answers lie beyond max_length={length} and were cut off"):
        encode_conversation(SAMPLE, processor, max_length=length, overflow="truncate_text")
    with pytest.raises(ValueError, match="the conversation has nothing to learn from"):
        encode_conversation(SAMPLE[:1], processor)


def test_images_of_different_lengths(processors):
    processor = processors["vicuna_v1"]
    messages = [user(IMAGE, IMAGE, "Compare."), assistant("Equal.")]
    ids = encode_conversation(messages, processor, num_image_tokens=[3, 5])["input_ids"].tolist()
    first = ids.index(700)
    assert ids[first : first + 3] == [700] * 3 and ids[first + 3] != 700
    assert ids.count(700) == 8
    assert conversation_length(messages, processor, num_image_tokens=[3, 5]) == len(ids)
    with pytest.raises(ValueError, match="has 2 images but num_image_tokens tells of 1"):
        encode_conversation(messages, processor, num_image_tokens=[3])


OWN_TEMPLATES = {  # written for this test, without {% generation %}
    "chatml": "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}",
    "trimmed": "{% for m in messages %}{{ m['role'] + ': ' + m['content'] | trim + eos_token }}{% endfor %}",
    "with bos": "{{ bos_token }}{% for m in messages %}{{ m['role'] + ':' + m['content'] + ' ' + eos_token }}{% endfor %}",
}


def test_answers_are_found_in_a_template_without_generation_marks(processors, byte_level):
    turns = [("a", "b"), ("what </s>", "  the kettle <image>\n"), ("b", "b"), ("", "<|im_end|>")]
    messages = [message for question, answer in turns for message in (user(question), assistant(answer))]
    messages[0] = user(IMAGE, "a")
    tokenizer = processors["vicuna_v1"].tokenizer
    expected = {
        "trimmed": [" b</s>", " the kettle <image></s>", " b</s>", " <|im_end|></s>"],
        "with bos": ["b </s>", "  the kettle <image>\n </s>", "b </s>", "<|im_end|> </s>"],
    }
    for name, texts in expected.items():
        processor = tiny_processor(tokenizer=tokenizer, template=insert_image_token(OWN_TEMPLATES[name]))
        encoded = encode_conversation(messages, processor)
        assert [decode(PIECES, run, CONTROL) for run in supervised_runs(encoded)] == texts
        assert encoded["input_ids"].tolist().count(1) == 1  # the template's <s>, or the tokenizer's
        assert answer_stop(processor) == "</s>"
    processor = tiny_processor(tokenizer=byte_level, template=insert_image_token(OWN_TEMPLATES["chatml"]))
    marked = tiny_processor(tokenizer=byte_level, template="chatml")
    for name in ("input_ids", "labels"):
        assert torch.equal(encode_conversation(messages, processor)[name], encode_conversation(messages, marked)[name])


@pytest.mark.parametrize(
    "template, supervised",
    [
        # LLaMA-2's and Mistral's way: no generation prompt, and a space after the instruction
        (
            "{% for m in messages %}{{ bos_token + '[INST] ' + m['content'].strip() + ' [/INST]' if m['role'] == 'user' "
            "else ' ' + m['content'].strip() + ' ' + eos_token }}{% endfor %}",
            [" 9 </s>", " b </s>"],
        ),
        # the generation prompt ends before a line break
        (
            "{% for m in messages %}{{ '<' + m['role'] + '>\n' + m['content'] + eos_token }}{% endfor %}"
            "{{ '<assistant>' if add_generation_prompt }}",
            ["\n9</s>", "\n\n b</s>"],
        ),
        # Qwen3's way: the last answer comes with an empty thought, which the generation prompt does not have
        (
            "{% for m in messages %}{{ '<' + m['role'] + '>' + ('<think></think>' if loop.last and m['role'] == 'assistant' else '') "
            "+ m['content'] + eos_token }}{% endfor %}{{ '<assistant>' if add_generation_prompt }}",
            ["9</s>", "<think></think>\n b</s>"],
        ),
        # DeepSeek-R1's way: the generation prompt has more than the header of an answer
        (
            "{% for m in messages %}{{ '<' + m['role'] + '>' + m['content'] + eos_token }}{% endfor %}"
            "{{ '<assistant><think>' if add_generation_prompt }}",
            ["9</s>", "\n b</s>"],
        ),
    ],
)
def test_what_follows_the_generation_prompt_of_a_template_without_marks_is_learned(byte_level, template, supervised):
    tokenizer = copy.deepcopy(byte_level)
    tokenizer.add_special_tokens({"eos_token": "</s>", "bos_token": "<s>"})
    processor = tiny_processor(tokenizer=tokenizer, template=insert_image_token(template))
    private = "".join(map(chr, range(0xE000, 0xE004)))  # the characters with which answers would be framed
    messages = [user(IMAGE, f"a{private}"), assistant("9"), user("c"), assistant("\n b")]
    encoded = encode_conversation(messages, processor)
    assert [tokenizer.decode(run) for run in supervised_runs(encoded)] == supervised


@pytest.mark.parametrize(
    "template, error",
    [
        (
            "{% for m in messages %}{{ m['role'] + m['content'] + '\n' }}{% endfor %}",
            "no special token after an answer",
        ),
        ("{% for m in messages %}{{ m['content'][:3] + eos_token }}{% endfor %}", "changes the answers"),
        ("{% for m in messages %}{{ m['content'] * 2 + eos_token }}{% endfor %}", "changes the answers"),
    ],
)
def test_a_template_whose_answers_cannot_be_found_is_refused_with_the_fix(template, error):
    processor = tiny_processor(template=template)
    with pytest.raises(ValueError, match="does not know content lists"):
        encode_conversation([user("question"), assistant("answer")], processor)
    messages = [{"role": "user", "content": "question"}, {"role": "assistant", "content": "answer"}]
    with pytest.raises(BadSampleError, match=rf"(?s)sample 'x' does .*{error}.*Give the template {{% generation %}}"):
        encode_conversation(messages, processor, sample_id="x")


def test_a_template_that_knows_no_images_is_refused_with_the_fix():
    template = "{% for m in messages %}{% generation %}{{ m['content'][0]['text'] }}{% endgeneration %}{% endfor %}"
    processor = tiny_processor(template=template)
    with pytest.raises(ValueError, match="has 1 images but the chat template wrote 0 <image>"):
        encode_conversation([user("What?", IMAGE), assistant("x")], processor)
    processor.chat_template = None
    with pytest.raises(ValueError, match="no chat template. Set one: .*load_chat_template"):
        encode_conversation(SAMPLE, processor)


@pytest.mark.parametrize(
    ("messages", "error"),
    [
        ([{"role": "tool", "content": "x"}], "does not fit the chat template: Message role"),
        ([user("Hi \ud83d"), assistant("A.")], "contains a lone surrogate"),
        ([], "has no messages"),
    ],
)
def test_what_cannot_be_rendered_names_the_sample(processors, messages, error):
    with pytest.raises(BadSampleError, match=f"sample 'x' {error}"):
        encode_conversation(messages, processors["vicuna_v1"], sample_id="x")


def test_a_template_that_teaches_no_stop_is_warned_of_once(monkeypatch):
    warnings = []
    monkeypatch.setattr("modeling_llava.data.labels.logger.warning", warnings.append)
    template = (
        "{% for m in messages %}{{ m['role'] + ': ' }}{% for c in m['content'] %}{% if c['type'] == 'image' %}<image>"
        "{% elif m['role'] == 'assistant' %}{% generation %}{{ c['text'] + ' ' }}{% endgeneration %}"
        "{% else %}{{ c['text'] + ' ' }}{% endif %}{% endfor %}{% endfor %}"
    )
    processor = tiny_processor(template=template)
    for _ in range(2):
        encoded = encode_conversation(SAMPLE, processor)
        assert [decode(PIECES, run, CONTROL) for run in supervised_runs(encoded)] == [" A cat. "]
    assert len(warnings) == 1 and "does not learn to stop" in warnings[0]


def test_labels_do_not_depend_on_what_the_tokenizer_was_used_for(processors):
    processor = processors["vicuna_v1"]
    expected = encode_conversation(SAMPLE, processor)
    processor.tokenizer(["a", "b c d"], padding="max_length", max_length=3, truncation=True)
    again = encode_conversation(SAMPLE, processor)
    assert torch.equal(expected["input_ids"], again["input_ids"]) and torch.equal(expected["labels"], again["labels"])


def test_threads_do_not_share_the_spans_of_a_rendering(processors):
    processor, switching = processors["vicuna_v1"], sys.getswitchinterval()
    conversations = [[user("What is it? " * i), assistant("A cat. " * (i + 1))] for i in range(8)]
    expected = [encode_conversation(messages, processor)["labels"].tolist() for messages in conversations]

    def work(messages):
        processor.apply_chat_template(messages)
        return encode_conversation(messages, processor)["labels"].tolist()

    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(8) as threads:
            assert list(threads.map(work, conversations * 20)) == expected * 20
    finally:
        sys.setswitchinterval(switching)


def test_an_added_word_is_one_until_it_becomes_a_control_token():
    processor = tiny_processor()
    typed = [user("<word>"), assistant("x")]
    encode_conversation(typed, processor)  # what was seen of the tokenizer then does not stay
    processor.tokenizer.add_tokens(["<word>"])
    word = processor.tokenizer.convert_tokens_to_ids("<word>")
    assert word in encode_conversation(typed, processor)["input_ids"]
    processor.tokenizer.add_special_tokens({"extra_special_tokens": ["<word>"]})
    assert word not in encode_conversation(typed, processor)["input_ids"]  # typed by a user, so text


@pytest.mark.parametrize("setting, value", [("add_bos_token", False), ("add_eos_token", True)])
def test_what_the_tokenizer_adds_is_followed_when_it_is_changed(setting, value):
    processor = tiny_processor(template="vicuna_v0")  # ends with no token of its own
    conversations = [[user(question), assistant("x")] for question in ("a", "a </s>")]
    for messages in conversations:
        assert encode_conversation(messages, processor)["input_ids"][0] == 1
        processor.apply_chat_template(messages, tokenize=True)
    setattr(processor.tokenizer, setting, value)
    for messages in conversations:
        ids = encode_conversation(messages, processor)["input_ids"].tolist()
        assert ids == processor.apply_chat_template(messages, tokenize=True, return_dict=True)["input_ids"][0]
        assert [ids[0] == 1, ids[-1] == 2] == [False, value]  # transformers gives up one for the other
