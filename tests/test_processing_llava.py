import base64
import inspect
import io

import numpy as np
import pyarrow as pa
import pytest
import torch
from golden_text import GOLDEN, tiny_processor
from PIL import Image
from published import build_tower
from tiny import tiny_vision_config
from transformers import AutoProcessor, CLIPImageProcessorPil, CLIPVisionModel, SiglipImageProcessorPil
from transformers.models.llava.processing_llava import LlavaProcessor as StockLlavaProcessor

from modeling_llava import LlavaImageProcessor, LlavaProcessor, processing_llava
from modeling_llava.configuration_llava import count_image_tokens
from modeling_llava.processing_llava import image_size, load_chat_template, num_image_tokens
from modeling_llava.text.chat_templates import plain_messages
from modeling_llava.text.tokenization import load_tokenizer


IMAGE_ID, PAD_ID = 700, 701
PICTURE = Image.new("RGB", (40, 30), "teal")


@pytest.fixture(scope="module")
def processor():
    return tiny_processor(patches=2)  # 4 tokens per image


def stock_twin(processor):
    return StockLlavaProcessor(
        processor.image_processor,
        processor.tokenizer,
        patch_size=processor.patch_size,
        vision_feature_select_strategy=processor.vision_feature_select_strategy,
        num_additional_image_tokens=processor.num_additional_image_tokens,
        chat_template=processor.chat_template,
    )


def user(*content):
    items = [{"type": "text", "text": c} if isinstance(c, str) else {"type": "image", "image": c} for c in content]
    return {"role": "user", "content": items}


# --- The same as stock -----------------------------------------------------------------------------------------------


def test_the_constructor_is_the_stock_one():
    ours, stock = (inspect.signature(c.__init__).parameters for c in (LlavaProcessor, StockLlavaProcessor))
    assert [(p.name, p.default) for p in ours.values()] == [(p.name, p.default) for p in stock.values()]
    assert LlavaProcessor.get_attributes() == StockLlavaProcessor.get_attributes()


@pytest.mark.parametrize(
    "images, text",
    [
        ([PICTURE], "USER: <image>\nWhat?"),
        ([PICTURE, PICTURE], "<image> and <image>"),
        ([PICTURE, PICTURE], ["<image> a longer text than the other", "<image> b"]),
        ([[PICTURE, PICTURE], [], [PICTURE]], ["<image><image>", "no image", "one <image>"]),
        (None, ["no image", "none here either"]),
        (PICTURE, "<image>"),
        (PICTURE, None),
        (np.zeros((2, 3, 30, 40), dtype=np.uint8), "<image><image>"),
    ],
)
def test_calls_give_what_the_stock_processor_gives(processor, images, text):
    options = {"padding": True, "return_tensors": "pt", "return_mm_token_type_ids": True}
    ours = processor(images=images, text=text, **options)
    stock = stock_twin(processor)(images=images, text=text, **options)
    assert set(ours) == set(stock)
    for name in ours:
        assert torch.equal(ours[name], stock[name]), name
    if text is not None:
        assert torch.equal(ours["mm_token_type_ids"], (ours["input_ids"] == IMAGE_ID).long())


@pytest.mark.parametrize("sanitize", [True, False])
def test_apply_chat_template_gives_what_stock_gives_for_ordinary_text(processor, sanitize):
    conversations = [
        [user(PICTURE, "What is this?"), {"role": "assistant", "content": "A cat."}, user("Why?")],
        [user("No image.")],
    ]
    options = {"tokenize": True, "return_dict": True, "return_tensors": "pt", "add_generation_prompt": True}
    options["processor_kwargs"] = {"padding": True}
    ours = processor.apply_chat_template(conversations, sanitize_control_tokens=sanitize, **options)
    stock = stock_twin(processor).apply_chat_template(conversations, **options)
    assert set(ours) == set(stock)
    for name in ours:
        assert torch.equal(ours[name], stock[name]), name


# --- Images and their tokens -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("patches", [1, 2, 3])
@pytest.mark.parametrize("strategy, additional", [("default", 1), ("full", 1), ("full", 0)])
def test_every_way_to_count_image_tokens_agrees(patches, strategy, additional):
    processor = tiny_processor(patches=patches)
    processor.vision_feature_select_strategy, processor.num_additional_image_tokens = strategy, additional
    expected = patches**2 + additional - (strategy == "default")
    assert processor.num_image_tokens == num_image_tokens(stock_twin(processor)) == expected
    side = 14 * patches + 13  # a remainder of pixels makes no patch
    assert count_image_tokens(side, side, 14, additional, strategy) == expected
    assert processor(images=PICTURE, text="<image>")["input_ids"][0].count(IMAGE_ID) == expected
    data = processor._get_num_multimodal_tokens(image_sizes=[(30, 40), (500, 20)])
    assert data["num_image_tokens"] == [expected] * 2 and data["num_image_patches"] == [1, 1]


@pytest.mark.parametrize(
    "settings, expected",
    [
        ({"size": 32, "crop_size": 28}, (28, 28)),
        ({"size": {"height": 28, "width": 42}, "do_center_crop": False}, (28, 42)),
        ({"size": 56, "do_center_crop": False, "do_pad": True}, (56, 56)),
    ],
)
def test_image_size_is_that_of_the_pixels(settings, expected):
    processor = tiny_processor()
    processor.image_processor = LlavaImageProcessor(**settings)
    assert image_size(processor) == image_size(stock_twin(processor)) == expected
    assert processor(images=PICTURE, return_tensors="pt")["pixel_values"].shape[-2:] == expected


def test_images_of_no_fixed_size_are_refused():
    processor = tiny_processor()
    processor.image_processor = LlavaImageProcessor(do_center_crop=False)
    with pytest.raises(ValueError, match="keeps the proportions .* Set do_center_crop=True"):
        processor.num_image_tokens  # noqa: B018


def test_a_processor_without_patch_size_says_where_it_is_written():
    processor = tiny_processor()
    processor.patch_size = None
    with pytest.raises(ValueError, match="lacks patch_size.*config.vision_config.patch_size"):
        processor.num_image_tokens  # noqa: B018
    with pytest.raises(ValueError, match="lacks patch_size"):
        processor(images=PICTURE, text="<image>")


@pytest.mark.parametrize(
    "images, text, error",
    [
        # The sums agree, so stock lets these pass.
        ([[PICTURE] * 2, [PICTURE] * 2], ["<image>" * 1, "<image>" * 3], "Sample 0 has 1 <image> .* but 2 images"),
        ([[PICTURE], []], ["none", "<image>"], "Sample 0 has 0 <image> in its text but 1 images"),
        ([PICTURE] * 2, ["<image>" * 3, "<image>" * 5], "8 <image> .* 2 images"),
        ([[PICTURE]], ["<image>", "<image>"], "2 texts but 1 lists of images"),
        (None, ["a", "<image>"], "1 <image> .* no images"),
        ([PICTURE, None], ["<image>", "a"], r"images\[1\] is None.*images=\[\[image\], \[\]\]"),
        (None, [1], "string"),
        (None, None, "at least one input"),
    ],
)
def test_images_are_counted_per_sample(processor, images, text, error):
    with pytest.raises(ValueError, match=error):
        processor(images=images, text=text)


def test_lists_of_no_images_give_no_pixels_and_video_is_refused(processor):
    assert "pixel_values" not in processor(images=[[], []], text=["a", "b"])
    with pytest.raises(ValueError, match="no video or audio"):
        processor(text="a", videos=[1])


def test_a_tokenizer_without_the_image_token_is_refused_with_a_hint():
    tokenizer = load_tokenizer(GOLDEN / "tiny_spm.model")
    with pytest.raises(ValueError, match="splits the image token '<image>' into .*add_image_token"):
        LlavaProcessor(LlavaImageProcessor(), tokenizer)


# --- Text that looks like a control token ----------------------------------------------------------------------------

LITERALS = ["<image>", "</s>", "<s>", "<pad>", "<unk>", "a</s>b<image>", "<im", "<"]


@pytest.mark.parametrize("literal", LITERALS)
@pytest.mark.parametrize("options", [{}, {"return_tensors": "pt", "processor_kwargs": {"padding": True}}])
def test_typed_control_tokens_are_text(processor, literal, options):
    conversations = [[user(PICTURE, f"What is {literal}?")], [user(literal)]]
    outputs = processor.apply_chat_template(
        conversations, tokenize=True, return_dict=True, add_generation_prompt=True, **options
    )
    rows = [
        [i for i, on in zip(ids, mask) if on] for ids, mask in zip(outputs["input_ids"], outputs["attention_mask"])
    ]
    assert [[row.count(i) for i in (0, 1, 2, IMAGE_ID, PAD_ID)] for row in rows] == [[0, 1, 0, 4, 0], [0, 1, 0, 0, 0]]
    assert literal in processor.tokenizer.decode(list(map(int, rows[1])), skip_special_tokens=True)
    if options:
        padded = outputs["input_ids"][1][outputs["attention_mask"][1] == 0]
        assert len(padded) and set(padded.tolist()) == {PAD_ID}


def test_the_assistant_mask_of_typed_control_tokens(processor):
    messages = [user(PICTURE, "a</s>"), {"role": "assistant", "content": "b<image></s>"}]
    output = processor.apply_chat_template(
        messages, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
    )
    ids = [i for i, on in zip(output["input_ids"][0], output["assistant_masks"][0]) if on]
    assert processor.tokenizer.decode(ids) == "b<image></s></s>"
    assert ids.count(2) == 1 and ids[-1] == 2


def test_a_prefilled_answer_with_a_typed_control_token(processor):
    messages = [user("a"), {"role": "assistant", "content": [{"type": "text", "text": "So </s> it"}]}]
    output = processor.apply_chat_template(messages, tokenize=True, return_dict=True, continue_final_message=True)
    assert output["input_ids"][0].count(2) == 0
    assert processor.tokenizer.decode(output["input_ids"][0]).endswith("ASSISTANT: So </s> it")


def test_control_tokens_in_a_prompt_are_the_callers_own(processor):
    assert processor(text="a</s>")["input_ids"][0][-1] == 2
    messages = [user("a</s>")]
    output = processor.apply_chat_template(messages, tokenize=True, return_dict=True, sanitize_control_tokens=False)
    assert output["input_ids"][0].count(2) == 1
    assert "a</s>" in processor.apply_chat_template(messages)


def test_template_variables_are_the_callers_own(processor):
    def ids(image_text, stop_text, **variables):
        template = (
            "{% for m in messages %}{% for c in m['content'] %}{{ IMAGE if c['type'] == 'image' else c['text'] }}"
            "{% endfor %}{{ STOP }}{% endfor %}"
        ).replace("IMAGE", image_text)
        options = {"tokenize": True, "return_dict": True, "chat_template": template.replace("STOP", stop_text)}
        return processor.apply_chat_template([user(PICTURE, "a</s>")], **options, **variables)["input_ids"][0]

    expected = ids("'<image>'", "'</s>'")
    assert expected.count(2) == 1 and expected.count(IMAGE_ID) == 4
    assert ids("picture", "stop", picture="<image>", stop="</s>") == expected


def test_an_empty_conversation_is_refused_in_one_line(processor):
    for conversation in ([], [[]], [[user("Hi.")], []], None):
        with pytest.raises(ValueError, match="list of messages"):
            processor.apply_chat_template(conversation)


def test_texts_joined_across_an_image_are_told(processor, caplog):
    for parts, said in ((("Look at", "and tell."), True), (("Look at ", "and tell."), False)):
        processing_llava.warn_of_joined_texts.__globals__["logger"].warning_once.cache_clear()
        caplog.clear()
        processor.apply_chat_template([user(parts[0], PICTURE, parts[1])], keep_image_order=True)
        assert not caplog.text
        processor.apply_chat_template([user(parts[0], PICTURE, parts[1])])
        assert ("without a space" in caplog.text) == said


def test_the_old_order_of_prompt_and_image_is_read(processor):
    prompt = "USER: <image>\nWhat? ASSISTANT:"
    expected = processor(images=PICTURE, text=prompt)["input_ids"]
    for swapped in ((prompt, PICTURE), ([prompt], [PICTURE]), ([prompt], [[PICTURE]])):
        assert processor(*swapped)["input_ids"] == expected
    with pytest.raises(ValueError, match="Images come first, then text"):
        processor("Why?")


def test_a_loaded_template_of_strings_gets_the_image_token(processor, tmp_path):
    own = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] | trim + eos_token }}{% endfor %}"
    tokenizer = tiny_processor(patches=2).tokenizer
    tokenizer.chat_template = own
    LlavaProcessor(processor.image_processor, tokenizer, 14, "default", num_additional_image_tokens=1).save_pretrained(
        tmp_path
    )
    loaded = LlavaProcessor.from_pretrained(tmp_path)
    assert loaded.apply_chat_template([user(PICTURE, "What?")]) == "user: <image>\nWhat?</s>"


def array(items):
    values = np.empty(len(items), dtype=object)
    values[:] = items
    return values


CONTAINERS = {"list": list, "tuple": tuple, "NumPy": array}


@pytest.mark.parametrize("container", CONTAINERS)
@pytest.mark.parametrize("filled", [False, True])
@pytest.mark.parametrize("number", [0, 1, 2])
def test_messages_of_any_loader_are_the_plain_ones(processor, container, filled, number):
    paint = [Image.new("RGB", (40, 30), colour) for colour in ("red", "blue")][:number]
    plain = [user(*paint, "What is this?"), {"role": "assistant", "content": "A lamp."}, user("Sure?")]
    keys = dict.fromkeys(("type", "image", "url", "path", "text", "image_url"))

    def given(message):
        content = message["content"]
        if isinstance(content, list):
            content = CONTAINERS[container]([{**(keys if filled else {}), **item} for item in content])
        return {**({"tool_calls": None} if filled else {}), **message, "content": content}

    messages = CONTAINERS[container](list(map(given, plain)))
    expected = processor.apply_chat_template(plain, tokenize=True, return_dict=True, return_tensors="pt")
    for chat in (messages, CONTAINERS[container]([messages]), [messages]):
        output = processor.apply_chat_template(chat, tokenize=True, return_dict=True, return_tensors="pt")
        assert output.keys() == expected.keys()
        assert all(torch.equal(output[key], expected[key]) for key in expected)
    assert processor.apply_chat_template(messages) == processor.apply_chat_template(plain)


def test_text_that_only_begins_as_json_stays_text():
    assert plain_messages("[sic") == "[sic" and plain_messages('[{"role": "user"}]') == [{"role": "user"}]
    content = plain_messages([{"role": "user", "content": ["{sic", '{"type": "image"}']}])[0]["content"]
    assert content == [{"type": "text", "text": "{sic"}, {"type": "image"}]


def test_messages_of_an_arrow_table_are_the_plain_ones(processor):
    buffer = io.BytesIO()
    PICTURE.save(buffer, "PNG")
    messages = [user({"bytes": buffer.getvalue(), "path": None}, "What is this?"), user("Sure?")]
    expected = processor.apply_chat_template(
        [user(PICTURE, "What is this?"), user("Sure?")], tokenize=True, return_dict=True
    )
    column = pa.table({"messages": [messages]})["messages"]  # every item has every key there
    for chat in (column[0], column[0].values, column.to_pandas()[0], column):
        output = processor.apply_chat_template(chat, tokenize=True, return_dict=True)
        assert output["input_ids"] == expected["input_ids"]
        np.testing.assert_array_equal(output["pixel_values"], expected["pixel_values"])


def test_image_items_hold_their_image_under_one_of_several_keys(processor, tmp_path):
    PICTURE.save(tmp_path / "a.png")
    data = base64.b64encode((tmp_path / "a.png").read_bytes()).decode()
    items = [
        {"type": "image", "image": PICTURE, "path": "a.png"},  # as datasets gives both
        {"type": "image", "image": {"bytes": (tmp_path / "a.png").read_bytes(), "path": None}},
        {"type": "image", "path": tmp_path / "a.png", "image": None},
        {"type": "image", "url": f"data:image/png;base64,{data}"},
        {"type": "image", "base64": data},
        {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{data}", "detail": None}},
    ]
    messages = [{"role": "user", "content": [*items, {"type": "text", "text": "What?", "image_url": None}]}]
    output = processor.apply_chat_template(messages, tokenize=True, return_dict=True, return_tensors="pt")
    expected = processor.image_processor(PICTURE, return_tensors="pt").pixel_values
    assert torch.equal(output["pixel_values"], expected.expand(6, -1, -1, -1))


def test_no_second_bos(processor):
    template = "{{ bos_token }}{% for m in messages %}{{ m['content'] }}{% endfor %}"
    ids = processor.apply_chat_template([{"role": "user", "content": "a"}], template, tokenize=True)[0]
    assert ids.count(1) == 1


# --- Composition -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("do_pad", [True, False])
@pytest.mark.parametrize("name, additional, strategy", [("clip", 1, "default"), ("siglip", 0, "full")])
def test_composition_fits_the_tower(tmp_path, name, additional, strategy, do_pad):
    tower = build_tower(name)
    language = GOLDEN / "llava_v15_tiny_lora" / "language_model"
    composed = LlavaProcessor.from_vision_language_pretrained(tower, language, do_pad=do_pad)
    assert (composed.num_additional_image_tokens, composed.vision_feature_select_strategy) == (additional, strategy)
    assert composed.num_image_tokens == 4
    assert composed.image_token_id == 700
    assert composed.chat_template == composed.tokenizer.chat_template == load_chat_template("vicuna_v1")
    assert composed.tokenizer.padding_side == "left"
    assert composed.image_processor.do_pad is do_pad
    composed.save_pretrained(tmp_path)
    output = AutoProcessor.from_pretrained(tmp_path)(images=PICTURE, text="<image>", return_tensors="pt")
    reference = composed.image_processor(PICTURE, return_tensors="pt")["pixel_values"]
    assert torch.equal(output["pixel_values"], reference)
    assert output["pixel_values"].shape == (1, 3, 28, 28)
    if not do_pad:  # the tower's own pixels
        own = {"clip": CLIPImageProcessorPil, "siglip": SiglipImageProcessorPil}[name].from_pretrained(tower)
        assert torch.equal(reference, own(PICTURE, return_tensors="pt")["pixel_values"])


def test_composition_with_a_tower_that_was_saved_alone(tmp_path):
    CLIPVisionModel(tiny_vision_config()).save_pretrained(tmp_path)
    composed = LlavaProcessor.from_vision_language_pretrained(tmp_path, GOLDEN / "llava_v1_tiny", "plain")
    assert image_size(composed) == (28, 28)
    assert composed.image_processor.do_center_crop is True
    assert composed.chat_template == load_chat_template("plain")


def test_composition_with_the_language_models_own_template(tmp_path):
    tokenizer = load_tokenizer(GOLDEN / "tiny_spm.model")
    tokenizer.chat_template = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + eos_token }}{% endfor %}"
    tokenizer.save_pretrained(tmp_path)
    composed = LlavaProcessor.from_vision_language_pretrained(build_tower(), tmp_path, "own")
    assert composed.apply_chat_template([user(PICTURE, "What?")]) == "user: <image>\nWhat?</s>"
    jinja = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    composed = LlavaProcessor.from_vision_language_pretrained(build_tower(), tmp_path, jinja)
    assert composed.chat_template == jinja


def test_composition_refuses_images_of_another_size_than_the_towers(tmp_path):
    CLIPVisionModel(tiny_vision_config()).save_pretrained(tmp_path)
    CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size=32).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="makes images of 32×32 pixels, its vision tower takes 28×28"):
        LlavaProcessor.from_vision_language_pretrained(tmp_path, GOLDEN / "llava_v1_tiny")
