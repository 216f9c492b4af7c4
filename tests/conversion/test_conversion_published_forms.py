"""The original's folders as they were published: converted, they answer and end in stock transformers."""

from published import CONVERSATION, build_original, every_original
from transformers import AutoProcessor
from transformers.models.llava.modeling_llava import LlavaForConditionalGeneration as StockLlava

from modeling_llava.conversion import convert_original_to_hf
from modeling_llava.data import encode_conversation
from modeling_llava.stops import missing_stop


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
        assert missing_stop(model.generation_config, processor) == "stop_strings=['###']"
    else:
        assert stop in (ends if isinstance(ends, list) else [ends])
