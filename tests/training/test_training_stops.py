"""`llava train` on a published template: what it teaches as the stop of an answer, and where stock finds it afterwards."""

import json
import logging

from published import FORMS, build, copy
from transformers import AutoProcessor, GenerationConfig

from modeling_llava.text.chat_templates import load_chat_template
from modeling_llava.text.stops import answer_stop
from modeling_llava.training import LlavaTrainingArguments, train
from modeling_llava.training.merge import merge_adapter
from modeling_llava.training.setup import load_model_and_processor


def processor_of_run(settings, form, **changes):
    changed = {**settings, "model": str(build(form)), "max_length": 1024, **changes}
    return load_model_and_processor(LlavaTrainingArguments(**changed))[1]


def question(processor):
    messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is it?"}]}]
    return processor.apply_chat_template(messages, add_generation_prompt=True)


def test_a_published_template_gets_its_stop_and_keeps_its_prompt(settings, caplog):
    published = AutoProcessor.from_pretrained(build("llava-hf"))
    assert answer_stop(published) == ""
    processor = processor_of_run(settings, "llava-hf")
    assert answer_stop(processor) == "</s>"
    prompt = FORMS["llava-hf"].prompt.replace("What colour is it?", "What is it?")
    assert question(processor) == question(published) == prompt
    said = [record.getMessage() for record in caplog.records if "teaches no stop" in record.getMessage()]
    assert len(said) == 1 and "chat_template=keep" in said[0]


def test_keep_and_a_name_are_options(settings):
    published = AutoProcessor.from_pretrained(build("llava-hf"))
    assert processor_of_run(settings, "llava-hf", chat_template="keep").chat_template == published.chat_template
    named = processor_of_run(settings, "llava-hf", chat_template="vicuna_v1")
    assert named.chat_template == load_chat_template("vicuna_v1")


def test_captions_and_templates_with_a_stop_are_left_alone(settings):
    published = AutoProcessor.from_pretrained(build("llava-hf"))
    assert processor_of_run(settings, "llava-hf", stage="pretrain").chat_template == published.chat_template
    own = AutoProcessor.from_pretrained(build("qwen2.5"))
    assert processor_of_run(settings, "qwen2.5").chat_template == own.chat_template


def test_a_result_holds_the_stop_where_stock_reads_it(settings, tmp_path, caplog):
    caplog.set_level(logging.WARNING)
    model = tmp_path / "model"
    copy("llava-hf", model)
    generation = json.loads((model / "generation_config.json").read_text())
    (model / "generation_config.json").write_text(json.dumps({**generation, "eos_token_id": 0}))
    changed = {**settings, "model": str(model), "max_length": 1024, "max_steps": 1, "preview_samples": 0}
    stop = AutoProcessor.from_pretrained(model).tokenizer.eos_token_id

    full = train({**changed, "output_dir": str(tmp_path / "full")})
    assert GenerationConfig.from_pretrained(full.output_dir).eos_token_id == [stop, 0]
    assert answer_stop(AutoProcessor.from_pretrained(full.output_dir)) == "</s>"
    assert "generate_kwargs" not in caplog.text

    adapter = train({**changed, "adapter": "lora", "output_dir": str(tmp_path / "adapter")})
    assert f"'eos_token_id': [0, {stop}]" in caplog.text  # an adapter is loaded with its base's configuration
    assert GenerationConfig.from_pretrained(adapter.output_dir).eos_token_id == [0, stop]
    merged = merge_adapter(str(adapter.output_dir), str(tmp_path / "merged"))
    assert GenerationConfig.from_pretrained(merged).eos_token_id == [0, stop]


def test_a_text_that_ends_answers_is_named_for_stock(settings, caplog):
    changed = {**settings, "chat_template": "vicuna_v0", "max_steps": 1, "preview_samples": 0}
    train(changed)
    assert all(part in caplog.text for part in ("{'stop_strings': ['###']}", "tokenizer=", "generate_kwargs="))
