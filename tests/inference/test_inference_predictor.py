"""`LlavaPredictor` against `generate`: the same answers from a prefix that is computed once."""

import contextlib

import numpy
import pytest
import torch
from PIL import Image
from tiny_predictor import QUESTIONS, assistant_turn, generated, picture, tiny_llava, tiny_processor, user_turn

from modeling_llava import LlavaForConditionalGeneration
from modeling_llava.inference import DecodingSettings, LlavaPredictor, decoding, decoding_settings
from modeling_llava.inference.prefix_cache import RowCache, key_value_bytes
from modeling_llava.inference.prompts import encode_prompt


def prompt_lengths(processor, *messages):
    """Tokens of a prompt, and of its beginning, up to the last image token."""
    ids = encode_prompt(list(messages), processor)
    return len(ids), len(ids) - ids[::-1].index(processor.image_token_id)


def test_stock_class_and_stock_processor_give_the_same(model, processor):
    from transformers import LlavaConfig
    from transformers import LlavaForConditionalGeneration as StockModel
    from transformers.models.llava.processing_llava import LlavaProcessor

    stock = StockModel(LlavaConfig(**model.config.to_dict())).eval()
    stock.load_state_dict(model.state_dict())
    stock.generation_config = model.generation_config
    stock_processor = LlavaProcessor(
        image_processor=processor.image_processor,
        tokenizer=processor.tokenizer,
        patch_size=14,
        vision_feature_select_strategy="default",
        chat_template=processor.chat_template,
        num_additional_image_tokens=1,
    )
    ours, theirs = LlavaPredictor(model, processor), LlavaPredictor(stock, stock_processor)
    for predictor in (ours, theirs):
        predictor.set_image(picture(1))
    assert ours.ask(QUESTIONS, max_new_tokens=8) == theirs.ask(QUESTIONS, max_new_tokens=8)


def test_an_image_and_its_prefix_are_computed_once(predictor, processor, passes):
    prompt, prefix = prompt_lengths(processor, user_turn(QUESTIONS[0], [picture(1)]))
    predictor.set_image(picture(1))
    assert passes.images == [1] and passes.tokens == [prefix]
    answers = predictor.ask([QUESTIONS[0]] * 7, max_new_tokens=3)
    # One pass over the seven questions without their prefix, then two tokens for each; and a question alone.
    assert answers == [predictor.ask(QUESTIONS[0], max_new_tokens=3)] * 7
    assert passes.tokens[1:] == [7 * (prompt - prefix), 7, 7, prompt - prefix, 1, 1] and passes.images == [1]


def test_a_batch_does_not_hold_the_prefix_per_question(monkeypatch):
    big = tiny_processor(side=28 * 8)  # 256 image tokens
    model = tiny_llava(big, side=28 * 8)
    predictor = LlavaPredictor(model, big)
    predictor.set_image(picture(1))
    caches = []

    class Cache(RowCache):
        def __init__(self, *args):
            super().__init__(*args)
            caches.append(self)

    monkeypatch.setattr(decoding, "RowCache", Cache)
    predictor.ask(QUESTIONS[:3] * 8, max_new_tokens=2)
    # 24 copies would take 24 times the prefix; the rows' own buffers have room for some 100 tokens each.
    assert 0 < caches[0].nbytes < 12 * 256 * key_value_bytes(model.config.get_text_config(), torch.float32)


def test_conversation_equals_generate_on_the_whole_conversation(predictor, model, processor, passes):
    image = picture(3)
    predictor.set_image(image)
    messages = []
    for number, question in enumerate(QUESTIONS):
        messages.append(user_turn(question, [image] if number == 0 else []))
        expected = generated(model, processor, messages, 10)
        passes.tokens.clear()
        assert predictor.ask(question, keep_history=True, max_new_tokens=10) == expected
        # The answer's text may be cut into other tokens than those that were generated: at most the answer is computed anew.
        whole, prefix = prompt_lengths(processor, *messages)
        assert passes.tokens[0] <= whole - prefix - 10 * (number > 0)
        messages.append(assistant_turn(expected))
    assert [question for question, _ in predictor.history] == QUESTIONS
    alone = generated(model, processor, [user_turn(QUESTIONS[1], [image])], 10)
    assert predictor.ask(QUESTIONS[1], max_new_tokens=10) == alone
    assert len(predictor.history) == len(QUESTIONS)
    predictor.forget_history()
    assert predictor.ask(QUESTIONS[1], keep_history=True, max_new_tokens=10) == alone


def test_several_images_and_none(predictor, model, processor):
    images = [picture(4), picture(5, (20, 60)), picture(6)]
    predictor.set_image(images)
    expected = [generated(model, processor, [user_turn(question, images)]) for question in QUESTIONS]
    assert predictor.ask(QUESTIONS, max_new_tokens=12) == expected
    predictor.set_image([numpy.asarray(image) for image in images])
    assert predictor.ask(QUESTIONS, max_new_tokens=12) == expected and len(predictor._cache) == 1
    predictor.set_image(images[::-1])
    assert predictor.ask(QUESTIONS, max_new_tokens=12) != expected
    predictor.set_image(None)
    expected = [generated(model, processor, [user_turn(question)]) for question in QUESTIONS]
    assert predictor.ask(QUESTIONS, max_new_tokens=12) == expected


@pytest.mark.parametrize("template", ["llava_v1", "v1_mmtag", "llama_2", "chatml"])
def test_templates_and_system_messages(template, model):
    processor = tiny_processor(template)
    predictor = LlavaPredictor(model, processor, system="Answer briefly.")
    predictor.set_image(picture(1))
    system = {"role": "system", "content": [{"type": "text", "text": "Answer briefly."}]}
    messages = [system, user_turn(QUESTIONS[1], [picture(1)])]
    assert predictor.ask(QUESTIONS[1], max_new_tokens=8) == generated(model, processor, messages, 8)
    # The system message was changed after the image was set: its prefix no longer fits, and is made anew.
    predictor.system = "Take your time."
    system["content"][0]["text"] = "Take your time."
    assert predictor.ask(QUESTIONS[1:3], max_new_tokens=8)[0] == generated(model, processor, messages, 8)


def test_image_after_the_question(model):
    processor = tiny_processor()
    processor.chat_template = (
        "{{ messages[0].content[-1].text }} <image> {% if add_generation_prompt %}Answer:{% endif %}"
    )
    predictor = LlavaPredictor(model, processor)
    predictor.set_image(picture(1))
    expected = [generated(model, processor, [user_turn(question, [picture(1)])]) for question in QUESTIONS]
    assert predictor.ask(QUESTIONS, max_new_tokens=12) == expected


def test_prompts_are_those_of_the_processor(processor):
    for messages in (
        [user_turn(QUESTIONS[3], [picture(1), picture(2)])],
        [user_turn("<image></s>", [picture(1)]), assistant_turn("a </s>"), user_turn("b")],
        [user_turn("no image")],
    ):
        expected = processor.apply_chat_template(
            messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
        )
        assert encode_prompt(messages, processor) == expected["input_ids"][0].tolist()


def test_answers_end_at_the_end_token_and_at_stop_strings(predictor, model, processor):
    predictor.set_image(picture(1))
    free = predictor.ask(QUESTIONS[0], max_new_tokens=12)
    tokens = processor.tokenizer(free, add_special_tokens=False)["input_ids"]
    expected = generated(model, processor, [user_turn(QUESTIONS[0], [picture(1)])], 12, eos_token_id=tokens[3])
    assert predictor.ask(QUESTIONS[0], max_new_tokens=12, end_token_ids=(tokens[3],)) == expected
    for stop in (free[5:7], free[3:4]):
        assert predictor.ask(QUESTIONS[0], max_new_tokens=12, stop_strings=(stop,)) == free.split(stop)[0].strip()
    assert LlavaPredictor(model, tiny_processor("vicuna_v0")).settings.stop_strings == ("###",)
    assert LlavaPredictor(model, tiny_processor("vicuna_v1")).settings.stop_strings == ()


def test_stream_gives_the_answer_in_pieces(predictor):
    predictor.set_image(picture(2))
    for question in QUESTIONS:
        whole = predictor.ask(question, max_new_tokens=20)
        pieces = list(predictor.stream(question, max_new_tokens=20))
        assert "".join(pieces) == whole and len(pieces) > 5
    broken_off = predictor.stream(QUESTIONS[0], keep_history=True)
    next(broken_off)
    broken_off.close()
    assert predictor.history == []


@pytest.mark.parametrize("begin_anew", ["set_image", "forget_history", "reset"])
def test_stream_that_ends_after_a_new_conversation_was_begun_is_no_part_of_it(begin_anew, predictor, model, processor):
    predictor.set_image(picture(1))
    outlived = predictor.stream(QUESTIONS[0], keep_history=True, max_new_tokens=6)
    first = next(outlived)
    getattr(predictor, begin_anew)(*[picture(2)] * (begin_anew == "set_image"))
    assert first + "".join(outlived) == generated(model, processor, [user_turn(QUESTIONS[0], [picture(1)])], 6)
    assert predictor.history == []
    predictor.set_image(picture(2))
    expected = generated(model, processor, [user_turn(QUESTIONS[2], [picture(2)])], 8)
    assert predictor.ask(QUESTIONS[2], keep_history=True, max_new_tokens=8) == expected


def test_stream_never_shows_a_stop_string_or_half_a_character(predictor, model):
    predictor.set_image(picture(2))
    whole = predictor.ask(QUESTIONS[0], max_new_tokens=20)
    stop = whole[7:11]
    pieces = list(predictor.stream(QUESTIONS[0], max_new_tokens=20, stop_strings=(stop,)))
    assert "".join(pieces) == whole.split(stop)[0].strip()
    emoji = predictor.processor.tokenizer("\N{CAT FACE}\N{CAT FACE}", add_special_tokens=False)["input_ids"]
    assert len(emoji) > 4  # bytes
    with says(model, emoji):
        pieces = list(predictor.stream(QUESTIONS[0], max_new_tokens=len(emoji)))
    assert pieces == ["\N{CAT FACE}", "\N{CAT FACE}"]


@contextlib.contextmanager
def says(model, tokens):
    """The model gives these tokens, one after the other."""
    rest = iter(tokens)
    hook = model.lm_head.register_forward_hook(
        lambda module, args, output: torch.nn.functional.one_hot(torch.tensor([next(rest)]), output.shape[-1]).float()
    )
    yield
    hook.remove()


def test_special_tokens_that_a_user_added_stay_in_answers():
    """A model for masks says `<seg>`; the tokens that end an answer and those that stand for images are no text of it."""
    processor = tiny_processor()
    processor.tokenizer.add_special_tokens({"additional_special_tokens": ["<seg>"]})
    model = tiny_llava(processor, vocab_size=720)
    predictor = LlavaPredictor(model, processor)
    predictor.set_image(picture(1))
    ids = {name: processor.tokenizer.convert_tokens_to_ids(name) for name in ("<seg>", "<image>", "</s>")}
    said = [
        *processor.tokenizer("It is", add_special_tokens=False)["input_ids"],
        ids["<image>"],
        ids["<seg>"],
        ids["</s>"],
    ]
    with says(model, said):
        answer = predictor.ask("Where is it?", keep_history=True)
    assert answer.replace(" ", "") == "Itis<seg>"
    turns = [user_turn("Where is it?", [None]), assistant_turn(answer), user_turn("Why?")]
    assert ids["<seg>"] in encode_prompt(turns, processor)


def test_images_set_again_are_found_and_the_oldest_are_dropped(model, processor, passes, tmp_path):
    def encoded(predictor, *images):
        before = len(passes.images)
        for image in images:
            predictor.set_image(picture(image) if isinstance(image, int) else image)
        return len(passes.images) - before

    predictor = LlavaPredictor(model, processor, max_cached_images=2)
    assert encoded(predictor, 1, 2, 1, 2, 3, 2, 1) == 4  # 1, 2, 3, and 1 again
    picture(1).save(tmp_path / "a.png")
    references = [tmp_path / "a.png", str(tmp_path / "a.png"), {"path": str(tmp_path / "a.png")}]
    assert encoded(predictor, *references) == 1
    picture(9).save(tmp_path / "a.png", compress_level=0)
    assert encoded(predictor, *reversed(references)) == 1  # the file has changed
    _, prefix = prompt_lengths(processor, user_turn("What?", [picture(1)]))
    of_one = prefix * key_value_bytes(model.config.get_text_config(), torch.float32)
    predictor = LlavaPredictor(model, processor, max_cached_bytes=3 * of_one)
    assert encoded(predictor, 1, 2, 1, 2) == 2 and encoded(predictor, 3, 4, 5, 1) == 4
    predictor.reset()
    assert encoded(predictor, 1) == 1
    predictor.reset()
    with pytest.raises(ValueError, match="set_image"):
        predictor.ask("What?")


def test_an_image_that_cannot_be_read_leaves_the_one_before(predictor, tmp_path):
    with pytest.raises(ValueError, match="No image is set"):
        predictor.ask("What?")
    predictor.set_image(picture(1))
    for image, named in (
        (tmp_path / "nowhere.png", "nowhere.png"),
        ([picture(2), str(tmp_path / "nowhere.png")], "nowhere.png"),
        (numpy.zeros((2, 4, 4, 3), numpy.uint8), "ndarray"),
        (Image.new("RGB", (0, 0)), "0×0 pixels"),
    ):
        with pytest.raises(ValueError, match=named):
            predictor.set_image(image)
    assert predictor.ask("What?", max_new_tokens=2)


@pytest.mark.parametrize(
    "question, options, named",
    [
        (["a", "b"], {"keep_history": True}, "keep_history"),
        (["a", " "], {}, "empty"),
        (None, {}, "NoneType"),
        (["a", 3], {}, "int"),
        (["a", "b"], {"batch_size": 0}, "batch_size"),
        ("a", {"max_tokens": 3}, "max_tokens"),
        ("a", {"max_new_tokens": 0}, "max_new_tokens"),
        ("a", {"max_new_tokens": 2.5}, "max_new_tokens"),
        ("a", {"end_token_ids": 2}, "end_token_ids"),
        ("a", {"stop_strings": "###"}, "stop_strings"),
        ("a", {"min_new_tokens": -1}, "min_new_tokens"),
        ("a", {"do_sample": True, "top_p": 0.0}, "top_p"),
        ("a", {"do_sample": True, "temperature": 0}, "temperature"),
        ("a", {"temperature": 0.7}, "do_sample=True"),
        ("a", {"top_k": 5}, "do_sample=True"),
        ("a", {"top_p": 0.9}, "do_sample=True"),
    ],
)
def test_bad_questions_and_settings_are_named(predictor, question, options, named):
    predictor.set_image(picture(1))
    with pytest.raises((ValueError, TypeError), match=named):
        predictor.ask(question, **options)


def test_a_processor_without_a_chat_template_is_refused(model):
    processor = tiny_processor()
    processor.chat_template = processor.tokenizer.chat_template = None
    with pytest.raises(ValueError, match="chat template"):
        LlavaPredictor(model, processor).set_image(picture(1))


@pytest.mark.parametrize(
    "changes",
    [
        {"repetition_penalty": 1.7},
        {"no_repeat_ngram_size": 1},
        {"min_new_tokens": 9, "eos_token_id": list(range(259, 600))},
        {"min_new_tokens": 5, "no_repeat_ngram_size": 2, "repetition_penalty": 0.6},
    ],
    ids=lambda changes: ", ".join(changes),
)
def test_what_the_generation_configuration_asks_of_greedy_answers_is_kept(changes, processor):
    model = tiny_llava(processor)
    free = [generated(model, processor, [user_turn(question, [picture(1)])]) for question in QUESTIONS]
    model.generation_config.update(**changes)
    predictor = LlavaPredictor(model, processor)
    predictor.set_image(picture(1))
    expected = [generated(model, processor, [user_turn(question, [picture(1)])]) for question in QUESTIONS]
    assert predictor.ask(QUESTIONS, max_new_tokens=12) == expected != free


def test_what_generate_would_do_beyond_the_settings_is_said(processor, monkeypatch):
    model = tiny_llava(processor)
    said = []
    monkeypatch.setattr(decoding_settings.logger, "warning", said.append)
    LlavaPredictor(model, processor)
    model.generation_config.num_beams = 1
    LlavaPredictor(model, processor)
    assert not said
    model.generation_config.num_beams, model.generation_config.suppress_tokens = 4, [2]
    LlavaPredictor(model, processor)
    assert len(said) == 1 and "sets num_beams, suppress_tokens, which LlavaPredictor does not follow" in said[0]


def test_sampling_depends_on_seed_and_row_only(predictor):
    predictor.set_image(picture(1))
    settings = {"do_sample": True, "temperature": 2.0, "top_k": 50, "top_p": 0.95, "max_new_tokens": 8}
    first = predictor.ask(QUESTIONS, seed=1, **settings)
    assert predictor.ask(QUESTIONS, seed=1, batch_size=2, **settings) == first
    assert predictor.ask(QUESTIONS[:2], seed=1, **settings) == first[:2]
    assert predictor.ask(QUESTIONS, seed=2, **settings) != first
    greedy = predictor.ask(QUESTIONS, max_new_tokens=8)
    assert predictor.ask(QUESTIONS, max_new_tokens=8, do_sample=True, top_k=1) == greedy
    assert predictor.ask(QUESTIONS, max_new_tokens=8, temperature=0) == greedy
    predictor.settings = DecodingSettings(max_new_tokens=8, do_sample=True, temperature=30.0, top_k=50)
    assert predictor.ask(QUESTIONS, do_sample=False) == greedy


def test_model_and_processor_that_do_not_belong_together(model):
    with pytest.raises(ValueError, match="max_cached_images"):
        LlavaPredictor(model, tiny_processor(), max_cached_images=-1)
    other = tiny_processor()
    other.vision_feature_select_strategy = "full"
    with pytest.raises(ValueError, match="5 image tokens but its images yield 4"):
        LlavaPredictor(model, other).set_image(picture(1))


LANGUAGE_MODEL_PARTS = ["embed_tokens", "layers.0", "layers.1", "norm", "rotary_emb"]


@pytest.mark.parametrize("away", ["language_model.embed_tokens", "vision_tower", "language_model.layers.1"])
def test_parts_of_the_model_may_lie_on_the_disk(away, model, processor, tmp_path):
    model.save_pretrained(tmp_path / "model")
    parts = ("vision_tower", "multi_modal_projector", *(f"language_model.{part}" for part in LANGUAGE_MODEL_PARTS))
    places = {**{f"model.{part}": "cpu" for part in parts}, "lm_head": "cpu", f"model.{away}": "disk"}
    offloaded = LlavaForConditionalGeneration.from_pretrained(
        tmp_path / "model", device_map=places, offload_folder=tmp_path / "offload"
    )
    predictor = LlavaPredictor(offloaded, processor)
    predictor.set_image(picture(3))
    expected = [generated(model, processor, [user_turn(question, [picture(3)])], 4) for question in QUESTIONS[:2]]
    assert predictor.ask(QUESTIONS[:2], max_new_tokens=4) == expected


def test_an_image_token_outside_the_vocabulary_needs_no_embedding(processor):
    model = tiny_llava(processor, vocab_size=processor.image_token_id)
    predictor = LlavaPredictor(model, processor)
    predictor.set_image(picture(3))
    expected = generated(model, processor, [user_turn("What?", [picture(3)])], 4)
    assert predictor.ask("What?", max_new_tokens=4) == expected


def test_the_same_values_under_another_palette_or_orientation_are_another_picture(model, processor, tmp_path):
    first = Image.new("P", (40, 30))
    first.putdata(list(range(40)) * 30)
    first.putpalette([i % 256 for i in range(768)])
    second = first.copy()
    second.putpalette([(255 - i) % 256 for i in range(768)])
    upright = picture(3, (60, 30))
    exif = Image.Exif()
    exif[0x0112] = 6
    upright.save(tmp_path / "turned.png", exif=exif)
    with Image.open(tmp_path / "turned.png") as turned:
        turned.load()
    predictor, fresh = LlavaPredictor(model, processor), LlavaPredictor(model, processor)
    for before, after in ((first, second), (upright, turned)):
        predictor.set_image(before)
        predictor.set_image(after)
        fresh.reset()
        fresh.set_image(after)
        assert predictor.ask(QUESTIONS[0], max_new_tokens=8) == fresh.ask(QUESTIONS[0], max_new_tokens=8)
