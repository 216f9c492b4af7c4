import json
import subprocess
import sys

import pytest
from golden_text import GOLDEN, GOLDEN_CASES, MODELS, TEMPLATES, golden_messages, golden_rows, tiny_processor

from modeling_llava.processing_llava import load_chat_template
from modeling_llava.text.chat_templates import CHAT_TEMPLATES, choose_chat_template, insert_image_token
from modeling_llava.text.tokenization import add_image_token, load_tokenizer


QUESTION = "What is this?"
TEXT = {"type": "text", "text": QUESTION}
IMAGE = {"type": "image"}


def user(*content):
    return {"role": "user", "content": list(content)}


def assistant(text):
    return {"role": "assistant", "content": [{"type": "text", "text": text}]}


def render(template, messages, **variables):
    tokenizer = load_tokenizer(GOLDEN / "tiny_spm.model")
    if template in CHAT_TEMPLATES:
        template = load_chat_template(template)
    return tokenizer.apply_chat_template(messages, chat_template=template, tokenize=False, **variables)


STOCK_ENCODE = """
import json, sys
from PIL import Image
from transformers import AutoProcessor
root, cases = json.loads(sys.stdin.read())
outputs = []
for name, conversations in cases:
    processor = AutoProcessor.from_pretrained(f"{root}/{name}")
    for messages in conversations:
        for message in messages:
            for item in message["content"]:
                if item["type"] == "image":
                    item["image"] = Image.new("RGB", (20, 14))
        output = processor.apply_chat_template(
            messages, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
        )
        outputs.append([output["input_ids"][0], output["assistant_masks"][0]])
assert not any(name.split(".")[0] == "modeling_llava" for name in sys.modules)
print(json.dumps([type(processor).__module__, outputs]))
"""


def test_stock_transformers_gives_the_golden_ids_and_labels_from_saved_files(tmp_path):
    cases, rows = [], []
    for file, version in GOLDEN_CASES:
        name = f"{version}-{MODELS[file]}"
        tiny_processor(MODELS[file], TEMPLATES[version]).save_pretrained(tmp_path / name)
        rows += [(version, row) for row in golden_rows(file, version)]
        cases.append([name, [golden_messages(row) for row in golden_rows(file, version)]])
    result = subprocess.run(
        [sys.executable, "-c", STOCK_ENCODE],
        input=json.dumps([str(tmp_path), cases]),
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    assert result.returncode == 0, result.stderr
    module, outputs = json.loads(result.stdout)
    assert module.startswith("transformers.")
    assert len(outputs) == len(rows) == 162
    for (version, row), (ids, mask) in zip(rows, outputs):
        image_id = max(ids) if row["has_image"] else None
        assert ids == [image_id if i == -200 else i for i in row["input_ids"]], (version, row["id"])
        if version not in ("v0", "v0_mmtag"):  # there the original's spans drift
            assert [i if on else -100 for i, on in zip(ids, mask)] == row["labels"], (version, row["id"])


@pytest.mark.parametrize("name", CHAT_TEMPLATES)
def test_string_content_and_content_lists_render_alike(name):
    lists = [user(TEXT), assistant("A cat."), user({"type": "text", "text": "Why?"}), assistant("Its ears.")]
    strings = [{"role": message["role"], "content": message["content"][0]["text"]} for message in lists]
    assert render(name, strings) == render(name, lists)


@pytest.mark.parametrize("name", sorted({*CHAT_TEMPLATES} - {"plain", "chatml"}))
def test_a_system_message_replaces_the_default_and_an_empty_one_removes_it(name):
    messages = [user(IMAGE, TEXT), assistant("A cat.")]
    default = render(name, messages)
    own = render(name, [{"role": "system", "content": "Be brief."}, *messages])
    listed = render(name, [{"role": "system", "content": [{"type": "text", "text": "Be brief."}]}, *messages])
    none = render(name, [{"role": "system", "content": ""}, *messages])
    assert own == listed
    assert "Be brief." in own and "assistant." in default and "Be brief." not in default + none
    if name == "llama_2":
        assert "<<SYS>>" in own and "<<SYS>>" not in none
    else:
        assert none == own.removeprefix("Be brief.").lstrip()


def test_a_chatml_system_message():
    messages = [{"role": "system", "content": "Be brief."}, user(TEXT)]
    assert render("chatml", messages, add_generation_prompt=True) == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nWhat is this?<|im_end|>\n<|im_start|>assistant\n"
    )
    assert render("chatml", messages[1:]) == "<|im_start|>user\nWhat is this?<|im_end|>\n"


@pytest.mark.parametrize(
    "content, first, kept",
    [
        ([IMAGE, TEXT], "<image>\nWhat is this?", "<image>\nWhat is this?"),
        ([TEXT, IMAGE], "<image>\nWhat is this?", "What is this?\n<image>"),
        ([IMAGE], "<image>", "<image>"),
        ([IMAGE, IMAGE, TEXT], "<image>\n<image>\nWhat is this?", "<image>\n<image>\nWhat is this?"),
        ([IMAGE, TEXT, IMAGE], "<image>\n<image>\nWhat is this?", "<image>\nWhat is this?\n<image>"),
        (
            [{"type": "text", "text": "A:\n"}, IMAGE, {"type": "text", "text": "\nB?"}],
            "<image>\nA:\n\nB?",
            "A:\n<image>\nB?",
        ),
        ([IMAGE, {"type": "text", "text": "  a"}, {"type": "text", "text": "b  "}], "<image>\nab", "<image>\n  ab  "),
        ([{"type": "text", "text": "  no image  "}], "  no image  ", "  no image  "),
        ([IMAGE, {"type": "text", "text": ""}], "<image>", "<image>"),
        ([], "", ""),
    ],
)
def test_where_images_and_line_breaks_go(content, first, kept):
    head = "<|im_start|>user\n"
    assert render("chatml", [user(*content)]) == f"{head}{first}<|im_end|>\n"
    assert render("chatml", [user(*content)], keep_image_order=True) == f"{head}{kept}<|im_end|>\n"


def test_mmtag_and_image_wrap_stand_around_the_image_token():
    messages = [user(IMAGE, TEXT)]
    assert "USER: <Image><image></Image>\nWhat" in render("v1_mmtag", messages)
    wrapped = load_chat_template("v0_mmtag", image_wrap=("<im_start>", "<im_end>"))
    assert "Human: <Image><im_start><image><im_end></Image>\nWhat" in render(wrapped, messages)
    quoted = load_chat_template("plain", image_token="<it's>", image_wrap=("\\", "'"))
    assert render(quoted, messages) == "\\<it's>'"


@pytest.mark.parametrize("name", CHAT_TEMPLATES)
@pytest.mark.parametrize(
    "messages, error",
    [
        ([user(TEXT), {"role": "tool", "content": "x"}], 'Message role "tool"'),
        ([user(TEXT), {"role": "system", "content": "x"}], 'Message role "system"'),
        ([{"role": "system", "content": [IMAGE]}, user(TEXT)], "only a user message may hold images"),
        ([user(TEXT), {"role": "assistant", "content": [IMAGE]}], "only a user message may hold images"),
    ],
)
def test_what_a_template_cannot_render_is_refused(name, messages, error):
    with pytest.raises(Exception, match=error):
        render(name, messages)


def test_an_unknown_item_is_refused():
    with pytest.raises(Exception, match='neither "text" nor "image"'):
        render("vicuna_v1", [user({"type": "audio"})])


# Templates of the kinds that language models come with, written for this test.
OWN_TEMPLATES = {
    "chatml": "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}",
    "trimmed, with bos": "{{ bos_token }}{%- for m in messages %}{{ '<|start|>' + m.role + '<|end|>\n\n' + m.content | trim + eos_token }}"
    "{%- endfor %}{% if add_generation_prompt %}<|start|>assistant<|end|>\n\n{% endif %}",
    "system popped": "{% if messages[0]['role'] == 'system' %}{% set loop_messages = messages[1:] %}{% set s = messages[0]['content'] %}"
    "{% else %}{% set loop_messages = messages %}{% set s = 'Default.' %}{% endif %}\n{{ s }}\n"
    "{% for message in loop_messages %}\n{% if message['role'] == 'user' %}[INST] {{ message['content'] }} [/INST]"
    "{% else %} {{ message['content'] }}{{ eos_token }}{% endif %}{% endfor %}",
    "own content lists": "{% for m in messages %}{{ m.role }}: {% if m.content is string %}{{ m.content }}{% else %}"
    "{% for c in m.content %}{{ c.text if c.type == 'text' else '<pic>' }}{% endfor %}{% endif %}{{ eos_token }}{% endfor %}"
    "{{ 'assistant:' if add_generation_prompt }}",
}


@pytest.mark.parametrize("own", OWN_TEMPLATES.values(), ids=OWN_TEMPLATES)
def test_a_language_models_own_template_gets_the_image_token(own):
    changed = insert_image_token(own)
    text_only = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": " What? "},
        {"role": "assistant", "content": "That."},
        {"role": "user", "content": "Why?"},
    ]
    for options in ({}, {"add_generation_prompt": True}):
        for messages in (text_only, text_only[1:], text_only[:3]):
            assert render(changed, messages, **options) == render(own, messages, **options)
    with_image = [text_only[0], user(TEXT, IMAGE), assistant("That."), text_only[3]]
    as_text = [text_only[0], {"role": "user", "content": f"<image>\n{QUESTION}"}, *text_only[2:]]
    assert render(changed, with_image) == render(own, as_text)
    kept = [text_only[0], {"role": "user", "content": f"{QUESTION}\n<image>"}, *text_only[2:]]
    assert render(changed, with_image, keep_image_order=True) == render(own, kept)
    wrapped = insert_image_token(own, image_wrap=("<a>", "<b>"))
    assert f"<a><image><b>\n{QUESTION}" in render(wrapped, with_image)


def test_templates_that_do_not_fit_the_tokenizer_are_refused():
    tokenizer = load_tokenizer(GOLDEN / "tiny_spm.model")
    add_image_token(tokenizer)
    for name, message in (("vicuna", "chatml, llama_2"), ("own", "no chat template of its own")):
        with pytest.raises(ValueError, match=message):
            choose_chat_template(name, tokenizer)
    tokenizer.eos_token = None
    with pytest.raises(ValueError, match="no eos token"):
        choose_chat_template("vicuna_v1", tokenizer)


def test_a_template_that_hides_the_question_is_refused():
    with pytest.raises(ValueError, match="does not write a user's text as it is: 'First question' becomes"):
        insert_image_token("{% for message in messages %}{{ message['content'] | upper }}{% endfor %}")
