"""What ends an answer: found in any template, taught where a template has none, and written where stock reads it."""

import pytest
from golden_text import STOPS, tiny_processor
from tiny import tiny_config
from transformers import GenerationConfig
from transformers.models.llava.processing_llava import LlavaProcessor as StockLlavaProcessor

from modeling_llava import LlavaForConditionalGeneration
from modeling_llava.data import encode_conversation
from modeling_llava.inference.decoding_settings import default_settings
from modeling_llava.text.chat_templates import CHAT_TEMPLATES
from modeling_llava.text.stops import (
    add_generation_stop,
    answer_stop,
    end_answers_with_eos,
    missing_stop,
    note_generation_stop,
    stop_token_id,
    teaches_no_stop,
)


PUBLISHED = (  # the form of llava-hf/llava-1.5-*-hf
    "{% for m in messages %}{{ m['role'].upper() + ': ' }}{% for c in m['content'] | selectattr('type', 'equalto', 'image') %}"
    "{{ '<image>\n' }}{% endfor %}{% if m['role'] != 'assistant' %}{% for c in m['content'] | selectattr('type', 'equalto', "
    "'text') %}{{ c['text'] + ' ' }}{% endfor %}{% else %}{% for c in m['content'] | selectattr('type', 'equalto', 'text') %}"
    "{% generation %}{{ c['text'] + ' ' }}{% endgeneration %}{% endfor %}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
WITHOUT_STOP = {  # name: template, and the white space in which it ends an answer
    "published": (PUBLISHED, " "),
    "without marks": (PUBLISHED.replace("{% generation %}", "").replace("{% endgeneration %}", ""), " "),
    "a line break": (PUBLISHED.replace("c['text'] + ' ' }}{% endg", "c['text'] + '\n' }}{% endg"), "\n"),
    "a tag in a comment": ("{# {% endfor %} #}" + PUBLISHED, " "),
    "two blanks": (PUBLISHED.replace("c['text'] + ' ' }}{% endg", "c['text'] }}  {% endg"), "  "),
    "nothing": (PUBLISHED.replace("c['text'] + ' ' }}{% endg", "c['text'] }}{% endg"), ""),
    "trimmed, without marks": (
        "{% for m in messages %}{{ m.role }}: {% for c in m.content %}{{ '<image>' if c.type == 'image' else c.text | trim }}"
        "{% endfor %}{{ '\n' }}{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}",
        "\n",
    ),
    "white space control": (
        "{% for m in messages %}\n  {%- if m.role == 'user' %}\nUSER: {% for c in m.content %}{{ '<image>\n' if c.type == 'image' "
        "else c.text }}{% endfor %}\n  {%- else %}\nASSISTANT:\n    {%- generation -%}\n  {{ ' ' ~ m.content[0].text ~ ' ' }}\n"
        "    {%- endgeneration -%}\n  {% endif %}\n{% endfor %}\n{% if add_generation_prompt %}ASSISTANT:{% endif %}\n",
        " ",
    ),
}
ANSWERS = ("It is red, quite.", "No.")


def user(*texts, images=0):
    return {"role": "user", "content": [{"type": "image"}] * images + [{"type": "text", "text": t} for t in texts]}


def assistant(*texts):
    return {"role": "assistant", "content": [{"type": "text", "text": text} for text in texts]}


CONVERSATION = [user("What is this?", images=2), assistant(ANSWERS[0]), user("Sure?"), assistant(ANSWERS[1])]


def render(template, messages, prompt=False, processor_class=StockLlavaProcessor):
    """What stock's processor, and so everybody without this package, makes of a template."""
    processor = tiny_processor(template=template)
    stock = processor_class(processor.image_processor, processor.tokenizer, 14, "default", template)
    return stock.apply_chat_template(messages, add_generation_prompt=prompt)


@pytest.mark.parametrize("name", CHAT_TEMPLATES)
def test_the_stop_of_every_template_of_ours(name):
    processor = tiny_processor(template=name)
    assert answer_stop(processor) == STOPS[name].strip()
    assert not teaches_no_stop(processor)  # captions need none


@pytest.mark.parametrize("template, blank", WITHOUT_STOP.values(), ids=WITHOUT_STOP)
class TestATemplateWithoutAStop:
    def test_has_no_stop_and_stops_no_answer_of_the_predictor(self, template, blank):
        processor = tiny_processor(template=template)
        assert answer_stop(processor) == "" and teaches_no_stop(processor)
        assert default_settings(LlavaForConditionalGeneration(tiny_config()), processor).stop_strings == ()

    def test_keeps_all_that_it_writes_but_the_blank_and_the_generation_prompt_byte_for_byte(self, template, blank):
        changed = end_answers_with_eos(template, tiny_processor().tokenizer.special_tokens_map)
        for messages in (CONVERSATION, CONVERSATION[:2]):
            expected = render(template, messages)
            for answer in ANSWERS:
                expected = expected.replace(answer + blank, answer + "</s>")
            assert render(changed, messages) == expected and "</s>" in expected
        for messages in (CONVERSATION[:1], [user("A"), user("B", images=1)]):
            assert render(changed, messages, prompt=True) == render(template, messages, prompt=True)

    def test_teaches_the_answer_and_its_stop_and_nothing_else(self, template, blank):
        changed = end_answers_with_eos(template, tiny_processor().tokenizer.special_tokens_map)
        processor = tiny_processor(template=changed)
        assert answer_stop(processor) == "</s>" and not teaches_no_stop(processor)
        encoded = encode_conversation(CONVERSATION, processor)
        learnt = processor.tokenizer.decode(encoded["labels"][encoded["labels"] != -100])
        assert learnt.replace(" ", "") == "".join(f"{answer}</s>" for answer in ANSWERS).replace(" ", "")


@pytest.mark.parametrize("name", ["published", "without marks"])
def test_an_answer_of_several_texts_ends_once(name):
    changed = end_answers_with_eos(WITHOUT_STOP[name][0], tiny_processor().tokenizer.special_tokens_map)
    assert render(changed, [user("A"), assistant("one, ", "two")]).count("</s>") == 1


def test_a_stop_behind_the_marks_is_taught_too():
    template = PUBLISHED.replace(
        "c['text'] + ' ' }}{% endgeneration %}", "c['text'] }}{% endgeneration %}{{ eos_token }}"
    )
    processor = tiny_processor(template=template)
    assert answer_stop(processor) == "</s>"
    labels = encode_conversation(CONVERSATION, processor)["labels"]
    assert (labels == processor.tokenizer.eos_token_id).sum() == 2


@pytest.mark.parametrize(
    "answer, message",
    [
        ("m.content[-1].text | upper ~ ' '", "changes it"),
        ("m.content[-1].text ~ (' ' if m.content[-1].text.endswith('.') else '!')", "not of a form"),
    ],
)
def test_a_template_whose_answers_cannot_be_found_or_ended_is_refused(answer, message):
    template = f"{{% for m in messages %}}{{{{ m.role }}}}: {{{{ {answer} }}}}{{% endfor %}}"
    with pytest.raises(ValueError, match=message):
        end_answers_with_eos(template, tiny_processor().tokenizer.special_tokens_map)
    with pytest.raises(ValueError, match="no EOS token"):
        end_answers_with_eos(PUBLISHED, {"bos_token": "<s>"})


@pytest.mark.parametrize(
    "eos, template, expected, hint",
    [
        (2, "vicuna_v1", 2, None),
        ([7, 2], "vicuna_v1", [7, 2], None),
        (7, "vicuna_v1", [7, 2], {"eos_token_id": [7, 2]}),
        (None, "vicuna_v1", 2, {"eos_token_id": [2]}),
        (2, "vicuna_v0", 2, {"stop_strings": ["###"]}),
        (2, PUBLISHED, 2, None),
    ],
)
def test_the_generation_configuration_gets_the_stop_token(eos, template, expected, hint):
    processor, config = tiny_processor(template=template), GenerationConfig(eos_token_id=eos)
    assert missing_stop(config, processor) == hint
    add_generation_stop(config, processor)
    assert config.eos_token_id == expected
    assert stop_token_id(processor) == (2 if template == "vicuna_v1" else None)


def test_an_adapter_notes_what_its_base_does_not_say(tmp_path):
    for template, wanted in (("vicuna_v1", ([7, 2], None)), ("vicuna_v0", (7, ["###"]))):
        # as Vicuna's: without do_sample it cannot be saved again
        base = GenerationConfig(eos_token_id=7, temperature=0.9)
        note_generation_stop(tmp_path, base, tiny_processor(template=template))
        noted = GenerationConfig.from_pretrained(tmp_path)
        assert (noted.eos_token_id, noted.stop_strings) == wanted
        assert (base.eos_token_id, base.stop_strings, base.temperature) == (7, None, 0.9)
    note_generation_stop(tmp_path / "enough", GenerationConfig(eos_token_id=2), tiny_processor(template="vicuna_v1"))
    assert not (tmp_path / "enough").exists()
