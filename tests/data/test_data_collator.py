import pickle

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader
from transformers import LlavaProcessor as StockProcessor
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from modeling_llava.data import BadSampleError, LlavaDataCollator, encode_conversation, from_llava_row, load_image
from modeling_llava.data.schema import CORRUPT_IMAGE, MISSING_IMAGE, NOTHING_SUPERVISED, TOO_LONG


TOKENS_PER_IMAGE = 9  # (42 // 14)² patches


def conversation(sample_id, *values, image=None):
    turns = [{"from": ("human", "gpt")[i % 2], "value": value} for i, value in enumerate(values)]
    return from_llava_row({"id": sample_id, "image": image, "conversations": turns})


@pytest.fixture
def pictures(tmp_path):
    for number in range(3):
        values = np.random.default_rng(number).integers(0, 256, (30 + number, 40, 3), dtype=np.uint8)
        Image.fromarray(values).save(tmp_path / f"{number}.png")
    (tmp_path / "broken.png").write_bytes(b"not an image")
    return tmp_path


def two_samples():
    first = conversation("a", "<image>\nWhat is it?", "A cat, asleep.", "Where?", "On a mat.", image="0.png")
    return [first, conversation("b", "Hi.", "Hello.")]


def test_batch_is_the_samples_padded_on_the_right(processor, pictures):
    samples = two_samples()
    collator = pickle.loads(pickle.dumps(LlavaDataCollator(processor, image_folder=pictures)))
    batch = collator(samples)
    assert samples == two_samples()  # not changed
    assert set(batch) == {"input_ids", "attention_mask", "labels", "pixel_values"}
    longest = batch["attention_mask"].sum(1).max()
    for row, sample in enumerate(two_samples()):
        expected = encode_conversation(sample["messages"], processor)
        end = len(expected["input_ids"])
        assert torch.equal(batch["input_ids"][row, :end], expected["input_ids"])
        assert torch.equal(batch["labels"][row, :end], expected["labels"])
        assert batch["attention_mask"][row].tolist() == [1] * end + [0] * (longest - end)
        assert (batch["labels"][row, end:] == -100).all()
        assert (batch["input_ids"][row, end:] == processor.tokenizer.pad_token_id).all()
    assert all(batch[name].dtype == torch.int64 for name in ("input_ids", "attention_mask", "labels"))
    image = load_image("0.png", pictures)
    assert torch.equal(batch["pixel_values"], processor.image_processor(image, return_tensors="pt").pixel_values)
    assert (batch["input_ids"] == processor.image_token_id).sum(1).tolist() == [TOKENS_PER_IMAGE, 0]


def test_image_that_occurs_twice_is_given_once(processor, pictures):
    samples = [
        conversation("a", "<image>\nWhat?", "A cat.", image="0.png"),
        conversation("b", "Compare <image> and <image>.", "No.", image=["1.png", "0.png"]),
        conversation("c", "Hi.", "Hello."),
        conversation("d", "<image>", "A dog.", image="./1.png"),
    ]
    batch = LlavaDataCollator(processor, image_folder=pictures)(samples)
    assert batch["pixel_values"].shape == (2, 3, 42, 42) and batch["image_indices"].tolist() == [0, 1, 0, 1]
    places = [load_image(name, pictures) for name in ("0.png", "1.png", "0.png", "1.png")]
    expected = processor.image_processor(places, return_tensors="pt").pixel_values
    assert torch.equal(batch["pixel_values"][batch["image_indices"]], expected)
    stock = LlavaDataCollator(processor, image_folder=pictures, share_images=False)(samples)
    assert torch.equal(stock["pixel_values"], expected) and "image_indices" not in stock
    data = {"bytes": (pictures / "0.png").read_bytes(), "path": None}
    for reference in (data, places[0]):
        batch = LlavaDataCollator(processor)([conversation(i, "<image>", "A cat.", image=reference) for i in "ab"])
        assert torch.equal(batch["pixel_values"], expected[:1]) and batch["image_indices"].tolist() == [0, 0]


def test_padding_options(processor, pictures):
    samples = two_samples()
    padded = LlavaDataCollator(processor, image_folder=pictures, pad_to_multiple_of=64)(samples)
    assert padded["labels"].shape[1] % 64 == 0
    padded = LlavaDataCollator(processor, 300, image_folder=pictures, padding="max_length")(samples)
    assert padded["input_ids"].shape == (2, 300) and (padded["labels"][:, -20:] == -100).all()


def bad_batch():
    return [
        conversation("gone", "<image>", "A.", image="9.png"),
        conversation("good", "<image>", "B.", image="0.png"),
        conversation("broken", "<image>", "C.", image="broken.png"),
        conversation("gone too", "<image>", "D.", image="9.png"),
    ]


def test_bad_samples_are_dropped_counted_and_said_once(processor, pictures, caplog):
    collator = LlavaDataCollator(processor, image_folder=pictures, on_bad_sample="drop")
    with pytest.raises(BadSampleError, match="sample 'gone' has the image '9.png', which is not there"):
        LlavaDataCollator(processor, image_folder=pictures)(bad_batch())
    half = conversation("half", "<image><image>", "A.", image=["1.png", "9.png"])  # its first image leaves no trace
    batch = collator([half, *bad_batch()])
    alone = LlavaDataCollator(processor, image_folder=pictures)(bad_batch()[1:2])
    assert all(torch.equal(batch[name], alone[name]) for name in alone) and set(batch) == set(alone)
    assert collator.dropped == {MISSING_IMAGE: 3, CORRUPT_IMAGE: 1}
    collator(bad_batch())
    assert collator.dropped == {MISSING_IMAGE: 5, CORRUPT_IMAGE: 2} and len(caplog.records) == 2


@pytest.mark.parametrize("packing", [False, True])
def test_batch_of_dropped_samples_alone_teaches_nothing_and_ends_no_run(processor, pictures, packing):
    collator = LlavaDataCollator(processor, image_folder=pictures, on_bad_sample="drop", packing=packing)
    batch = collator([bad_batch()[0], bad_batch()[2]])
    assert batch["input_ids"].shape == (1, 2) and "pixel_values" not in batch
    assert (batch["labels"] == -100).all()
    assert sum(collator.dropped.values()) == 2


def test_nothing_usable_at_all_is_an_error(processor, pictures):
    collator = LlavaDataCollator(processor, image_folder=pictures, on_bad_sample="drop")
    with pytest.raises(ValueError, match="the first 64 samples were all dropped.*sample 'gone'.*sample 'broken'"):
        for _ in range(32):
            collator([bad_batch()[0], bad_batch()[2]])
    collator(bad_batch())  # one sample can be used
    collator([bad_batch()[0], bad_batch()[2]])


def test_drops_in_workers_are_seen(processor, pictures):
    collator = LlavaDataCollator(processor, image_folder=pictures, on_bad_sample="drop")
    loader = DataLoader(bad_batch() * 3, batch_size=4, num_workers=2, collate_fn=collator)
    assert [len(batch["labels"]) for batch in loader] == [1, 1, 1]
    assert collator.dropped == {MISSING_IMAGE: 6, CORRUPT_IMAGE: 3}


@pytest.mark.parametrize("on_bad_sample", ["raise", "drop"])
def test_overflow(processor, pictures, on_bad_sample):
    samples = [conversation("long", "<image>\nWhat is it?", "A cat. " * 40, image="0.png"), two_samples()[1]]
    options = {"max_length": 90, "image_folder": pictures, "on_bad_sample": on_bad_sample}
    with pytest.raises(BadSampleError, match="sample 'long' has .* max_length is 90"):
        LlavaDataCollator(processor, **options)(samples)
    collator = LlavaDataCollator(processor, overflow="drop", **options)
    assert "pixel_values" not in collator(samples) and collator.dropped == {TOO_LONG: 1}
    cut = LlavaDataCollator(processor, overflow="truncate_text", **options)(samples)
    assert cut["input_ids"].shape == (2, 90)
    assert (cut["input_ids"] == processor.image_token_id).sum() == TOKENS_PER_IMAGE


def test_truncation_that_would_cut_an_image_or_every_answer_is_a_bad_sample(processor, pictures):
    late = conversation("late", "Hi.", "A cat. " * 20, "<image>", "B.", image="0.png")
    dumb = conversation("dumb", "Why? " * 60, "B.")
    collator = LlavaDataCollator(processor, 90, "truncate_text", image_folder=pictures)
    with pytest.raises(BadSampleError, match="sample 'late'") as caught:
        collator([late])
    assert caught.value.reason == TOO_LONG
    with pytest.raises(BadSampleError, match="sample 'dumb'") as caught:
        collator([dumb])
    assert caught.value.reason == NOTHING_SUPERVISED
    collator = LlavaDataCollator(processor, 90, "truncate_text", image_folder=pictures, on_bad_sample="drop")
    assert len(collator([late, dumb, two_samples()[1]])["labels"]) == 1
    assert collator.dropped == {TOO_LONG: 1, NOTHING_SUPERVISED: 1}


@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize(
    "images, message",
    [
        ([], "marks 1 image in its user turns but comes with 0"),
        ((), "has <image> in its text but no image"),
        (None, "marks 1 image in its user turns but comes with 0"),
        ([Image.new("RGB", (42, 42))] * 2, "marks 1 image in its user turns but comes with 2"),
        (Image.new("RGB", (42, 42)), "images that are not a list"),
    ],
)
def test_images_that_do_not_match_their_places_are_a_bad_sample(processor, images, message, packing):
    # Made by hand: load_conversations gives no such sample. Without any image in the batch the model would be the first
    # to say it, and not whose they are.
    wrong = {**conversation("s-1", "<image>", "A.", image="a.jpg"), "images": images}
    if isinstance(images, tuple):
        wrong["messages"][0]["content"] = "<image>"
    with pytest.raises(BadSampleError, match=f"sample 's-1' .*{message}"):
        LlavaDataCollator(processor, packing=packing)([wrong])
    collator = LlavaDataCollator(processor, on_bad_sample="drop", packing=packing)
    collator([wrong, conversation("s-2", "Hi.", "A.")])
    assert sum(collator.dropped.values()) == 1


def test_image_processor_that_disagrees_with_the_settings_is_named(processor, pictures):
    images = CLIPImageProcessorPil(do_resize=False, do_center_crop=False, size={"height": 42, "width": 42})
    wrong = StockProcessor(images, processor.tokenizer, 14, "default", processor.chat_template, "<image>", 1)
    sample = conversation("s-3", "<image>", "A.", image=Image.new("RGB", (56, 42)))
    with pytest.raises(ValueError, match="sample 's-3' has 9 image tokens but its 1 images of 42×56 pixels yield 12"):
        LlavaDataCollator(wrong)([sample])


def test_stock_processor_gives_the_same_batch(processor, pictures):
    images = CLIPImageProcessorPil.from_dict(processor.image_processor.to_dict())
    stock = StockProcessor(images, processor.tokenizer, 14, "default", processor.chat_template, "<image>", 1)
    samples = [conversation("a", "<image>\nWhat?", "A.", image=Image.new("RGB", (42, 42), (9, 8, 7)))]
    ours, theirs = LlavaDataCollator(processor)(samples), LlavaDataCollator(stock)(samples)
    assert set(ours) == set(theirs)
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_wrong_arguments_and_examples(processor, tmp_path):
    for option in ("overflow", "on_bad_sample", "first_turn_order", "padding"):
        with pytest.raises(ValueError, match=f"{option} is 'no'"):
            LlavaDataCollator(processor, **{option: "no"})
    for arguments in ({"padding": "max_length"}, {"pad_to_multiple_of": 8}):
        with pytest.raises(ValueError, match="packing=True leaves no padding"):
            LlavaDataCollator(processor, packing=True, **arguments)
    with pytest.raises(TypeError, match="not a conversation"):
        LlavaDataCollator(processor)([[conversation("text", "Hi.", "Hello.")]])  # a pack
    with pytest.raises(ValueError, match="needs a max_length"):
        LlavaDataCollator(processor, None, padding="max_length")
    with pytest.raises(FileNotFoundError, match="image folder"):
        LlavaDataCollator(processor, image_folder=tmp_path / "no")
    with pytest.raises(TypeError, match="read the data with load_conversations"):
        LlavaDataCollator(processor)([{"conversations": []}])


def text_of(processor, batch, row=0):
    ids = batch["input_ids"][row][batch["attention_mask"][row].bool()]
    text = processor.tokenizer.decode(ids)
    return text.replace("<image>" * TOKENS_PER_IMAGE, "<image>")


def test_first_turn_order_is_drawn_by_seed_and_id_alone(processor, pictures):
    turns = "<image>\nWhat is it?", "A cat.", "Sure?", "Yes."
    samples = [conversation(f"s{i}", *turns, image="0.png") for i in range(60)]

    def behind(seed, samples, order="random"):
        collator = LlavaDataCollator(processor, image_folder=pictures, first_turn_order=order, seed=seed)
        batch = collator(samples)
        texts = [text_of(processor, batch, row) for row in range(len(samples))]
        first = [text[text.index("USER:") : text.index("ASSISTANT:")].replace(" ", "") for text in texts]
        assert {*first} <= {"USER:<image>\nWhatisit?", "USER:Whatisit?\n<image>"}
        # The rest of the conversation follows the same way in both orders.
        assert all(text.count("<image>") == 1 and "Sure? ASSISTANT: Yes." in text for text in texts)
        return [turn.endswith("<image>") for turn in first]

    drawn = behind(0, samples)
    assert 15 < sum(drawn) < 45
    assert behind(0, samples[::-1]) == drawn[::-1]
    assert behind(0, samples[7:8]) == drawn[7:8]
    assert behind(1, samples) != drawn
    assert not any(behind(0, samples, "as_is"))


@pytest.mark.parametrize("order", ["as_is", "random"])
def test_length_is_that_of_the_batch_and_opens_no_image(processor, pictures, order):
    collator = LlavaDataCollator(processor, image_folder=pictures, first_turn_order=order)
    samples = [conversation(f"s{i}", "<image>\nWhat?", "Cat. " * i, image="0.png") for i in range(1, 9)]
    assert [collator.length(sample) for sample in samples] == collator(samples)["attention_mask"].sum(1).tolist()
    assert collator.length({**samples[0], "images": ["9.png"]}) == collator.length(samples[0])
    short = LlavaDataCollator(processor, 40, "truncate_text")
    assert short.length(samples[-1]) == 40


# Packing


@pytest.fixture
def samples(pictures):
    return [
        *two_samples(),
        conversation("two", "<image>\n<image>\nWhich is larger?", "The second.", image=["1.png", "2.png"]),
        conversation("again", "<image>\nWhat colour?", "Grey.", image="0.png"),
    ]


def test_a_packed_batch_holds_the_samples_of_the_padded_one(processor, pictures, samples):
    padded = LlavaDataCollator(processor, image_folder=pictures)(samples)
    collator = LlavaDataCollator(processor, image_folder=pictures, packing=True)
    packed = collator(samples)
    assert "attention_mask" not in packed
    lengths = padded["attention_mask"].sum(1)
    ends = packed["cu_seq_lens_q"].tolist()
    assert ends == [0, *lengths.cumsum(0).tolist()] and packed["max_length_q"] == lengths.max()
    assert [collator.length(sample) for sample in samples] == lengths.tolist()
    for row, (start, end) in enumerate(zip(ends, ends[1:])):
        assert torch.equal(packed["input_ids"][0, start:end], padded["input_ids"][row, : end - start])
        assert torch.equal(packed["labels"][0, start:end], padded["labels"][row, : end - start])
        assert packed["position_ids"][0, start:end].tolist() == list(range(end - start))
        assert packed["labels"][0, start] == -100
    assert torch.equal(packed["pixel_values"], padded["pixel_values"])
    assert packed["image_indices"].tolist() == padded["image_indices"].tolist() == [0, 1, 2, 0]
    # what Trainer divides the loss by: every label that is not at the start of its row, and none of a pack is lost
    assert (packed["labels"][:, 1:] != -100).sum() == (padded["labels"][:, 1:] != -100).sum()


def test_packs_and_samples_may_be_mixed_stay_in_order_and_leave_no_gap(processor, pictures, samples):
    collator = LlavaDataCollator(processor, image_folder=pictures, packing=True, on_bad_sample="drop")
    together, gone = collator(samples), bad_batch()[0]
    first, rest = samples[:1], samples[1:]
    for examples in ([samples], [first, rest], [*first, samples[1:3], samples[3]], [[*first, gone], rest]):
        for name, value in collator(examples).items():
            assert torch.equal(torch.as_tensor(value), torch.as_tensor(together[name])), name
    assert sum(collator.dropped.values()) == 1
    batch = collator([[samples[1], samples[1]]])
    assert "pixel_values" not in batch and "image_indices" not in batch
    assert batch["cu_seq_lens_q"].tolist() == [0, batch["max_length_q"], 2 * batch["max_length_q"]]
