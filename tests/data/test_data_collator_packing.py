"""The packed form of a batch against the padded one: the same samples, tokens, labels and pixels."""

import numpy as np
import pytest
import torch
from PIL import Image

from modeling_llava.data import LlavaDataCollator, from_llava_row


def conversation(sample_id, *values, image=None):
    turns = [{"from": ("human", "gpt")[i % 2], "value": value} for i, value in enumerate(values)]
    return from_llava_row({"id": sample_id, "image": image, "conversations": turns})


@pytest.fixture
def samples(tmp_path):
    for number in range(3):
        pixels = np.random.default_rng(number).integers(0, 256, (42, 42, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{number}.png")
    paths = [str(tmp_path / f"{number}.png") for number in range(3)]
    return [
        conversation("one", "<image>\nWhat is it?", "A cat, asleep.", "Where?", "On a mat.", image=paths[0]),
        conversation("text", "Hi.", "Hello."),
        conversation("two", "<image>\n<image>\nWhich is larger?", "The second.", image=paths[1:]),
        conversation("again", "<image>\nWhat colour?", "Grey.", image=paths[0]),
    ]


def test_a_packed_batch_holds_the_samples_of_the_padded_one(processor, samples):
    padded = LlavaDataCollator(processor)(samples)
    packed = LlavaDataCollator(processor, packing=True)(samples)
    assert "attention_mask" not in packed
    lengths = padded["attention_mask"].sum(1)
    ends = packed["cu_seq_lens_q"].tolist()
    assert ends == [0, *lengths.cumsum(0).tolist()] and packed["max_length_q"] == lengths.max()
    for row, (start, end) in enumerate(zip(ends, ends[1:])):
        assert torch.equal(packed["input_ids"][0, start:end], padded["input_ids"][row, : end - start])
        assert torch.equal(packed["labels"][0, start:end], padded["labels"][row, : end - start])
        assert packed["position_ids"][0, start:end].tolist() == list(range(end - start))
        assert packed["labels"][0, start] == -100
    assert torch.equal(packed["pixel_values"], padded["pixel_values"])
    assert packed["image_indices"].tolist() == padded["image_indices"].tolist() == [0, 1, 2, 0]
    # what Trainer divides the loss by: every label that is not at the start of its row, and none of a pack is lost
    assert (packed["labels"][:, 1:] != -100).sum() == (padded["labels"][:, 1:] != -100).sum()


def test_packs_and_samples_may_be_mixed_and_stay_in_order(processor, samples):
    collator = LlavaDataCollator(processor, packing=True)
    together = collator(samples)
    for examples in ([samples], [samples[:1], samples[1:]], [samples[0], samples[1:3], samples[3]]):
        for name, value in collator(examples).items():
            assert torch.equal(torch.as_tensor(value), torch.as_tensor(together[name])), name


def test_a_pack_without_any_image_has_no_pixels(processor, samples):
    batch = LlavaDataCollator(processor, packing=True)([[samples[1], samples[1]]])
    assert "pixel_values" not in batch and "image_indices" not in batch
    assert batch["cu_seq_lens_q"].tolist() == [0, batch["max_length_q"], 2 * batch["max_length_q"]]


def test_the_length_that_packing_goes_by_is_the_length_in_the_pack(processor, samples):
    collator = LlavaDataCollator(processor, packing=True)
    lengths = [collator.length(sample) for sample in samples]
    assert collator(samples)["cu_seq_lens_q"].tolist() == [0, *np.cumsum(lengths)]


def test_dropped_samples_leave_no_gap(processor, samples, tmp_path):
    missing = conversation("gone", "<image>\nWhat?", "Nothing.", image=str(tmp_path / "gone.png"))
    collator = LlavaDataCollator(processor, packing=True, on_bad_sample="drop")
    with_gap, without = collator([[samples[0], missing, samples[1]]]), collator([[samples[0], samples[1]]])
    assert torch.equal(with_gap["input_ids"], without["input_ids"])
    assert torch.equal(with_gap["cu_seq_lens_q"], without["cu_seq_lens_q"])
    assert sum(collator.dropped.values()) == 1


def test_packing_and_padding_to_a_length_contradict(processor):
    for arguments in ({"padding": "max_length"}, {"pad_to_multiple_of": 8}):
        with pytest.raises(ValueError, match="packing=True leaves no padding"):
            LlavaDataCollator(processor, packing=True, **arguments)
    with pytest.raises(TypeError, match="not a conversation"):
        LlavaDataCollator(processor)([[conversation("text", "Hi.", "Hello.")]])
