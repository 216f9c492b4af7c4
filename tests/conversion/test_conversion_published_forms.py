"""Conversion of what is published: the original's folders, and llava-hf's in the other directions."""

import pytest
import torch
from published import CONVERSATION, FORMS, QUESTION, build, build_original, every_original
from transformers import AutoProcessor
from transformers.models.llava.modeling_llava import LlavaForConditionalGeneration as StockLlava
from transformers.utils.chat_template_utils import render_jinja_template

from modeling_llava.conversion import convert_hf_to_gguf, convert_hf_to_original, convert_original_to_hf
from modeling_llava.data import encode_conversation
from modeling_llava.text.stops import missing_stop


@every_original
def test_a_converted_original_ends_its_answers_in_stock_transformers(original, tmp_path):
    options = {"base": original.base, "chat_template": original.template}
    convert_original_to_hf(build_original(original), tmp_path / "hf", **options)
    model, info = StockLlava.from_pretrained(tmp_path / "hf", output_loading_info=True)
    assert not any(info.values())
    processor = AutoProcessor.from_pretrained(tmp_path / "hf")
    labels = encode_conversation(CONVERSATION, processor)["labels"].tolist()
    taught = processor.tokenizer.decode([label for label in labels if label != -100])
    assert taught.endswith(original.stop)
    stop = processor.tokenizer.get_added_vocab().get(original.stop)
    ends = model.generation_config.eos_token_id
    if stop is None:  # a text: stock transformers takes it from the call alone
        assert missing_stop(model.generation_config, processor) == {"stop_strings": ["###"]}
    else:
        assert stop in (ends if isinstance(ends, list) else [ends])


@pytest.mark.parametrize("form", ["llava-hf", "llava-hf-resaved", "bakllava", "llava-hf-2024"])
def test_a_published_checkpoint_goes_to_the_original_and_comes_back(form, tmp_path):
    source = build(form)
    convert_hf_to_original(source, tmp_path / "original")
    convert_original_to_hf(tmp_path / "original", tmp_path / "back")
    folders = source, tmp_path / "back"
    before, after = (StockLlava.from_pretrained(folder, dtype="auto").state_dict() for folder in folders)
    assert before.keys() == after.keys()
    for name, value in before.items():  # the rows of <image> and <pad>, which the original does not have, may differ
        rows = 700 if name in ("model.language_model.embed_tokens.weight", "lm_head.weight") else None
        assert torch.equal(value[:rows], after[name][:rows]), name
    processors = map(AutoProcessor.from_pretrained, folders)
    first, second = (p.apply_chat_template(CONVERSATION[:1], add_generation_prompt=True) for p in processors)
    assert first == second


@pytest.mark.parametrize("form", ["llava-hf", "llava-hf-resaved", "bakllava"])
def test_a_published_checkpoint_becomes_gguf_with_its_template_and_stop(form, tmp_path):
    gguf = pytest.importorskip("gguf")
    convert_hf_to_gguf(build(form), tmp_path / "out", dtype="f16")
    reader = gguf.GGUFReader(tmp_path / "out/model-f16.gguf")
    fields = {name: field.contents() for name, field in reader.fields.items()}
    assert fields["tokenizer.ggml.eos_token_id"] == 2 and fields["tokenizer.ggml.bos_token_id"] == 1
    messages = [{"role": "user", "content": f"<__media__>{QUESTION}"}]
    template = fields["tokenizer.chat_template"]
    text = render_jinja_template([messages], chat_template=template, add_generation_prompt=True)[0][0]
    assert text == FORMS[form].prompt.replace("<image>\n", "<__media__>\n")
