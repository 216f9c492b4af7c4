"""`generate` as people call it: kept caches, drafts, continuous batching. The answer is always that of plain greedy `generate`."""

import pytest
import torch
from test_modeling_llava import without_labels
from tiny import IMAGE_TOKENS, tiny_batch, tiny_config, tiny_text_config
from transformers import ContinuousBatchingConfig, DynamicCache, GenerationConfig, StaticCache

from modeling_llava import LlavaForConditionalGeneration


GREEDY = {"do_sample": False, "max_new_tokens": 6, "pad_token_id": 0, "eos_token_id": None}


@pytest.fixture
def model():
    """Weights so large that the images decide the answers."""
    torch.manual_seed(0)
    model = LlavaForConditionalGeneration(tiny_config()).eval()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.3)
    with torch.no_grad():
        model.lm_head.weight[299] = 0.0  # never the image token
    return model


@pytest.mark.parametrize(
    "images_per_sample, new_image, options, static",
    [
        ((1,), False, {}, False),
        ((1,), False, {}, True),
        ((2,), True, {}, False),
        ((1, 1), True, {}, False),
        ((1,), True, {"num_beams": 2}, False),
        ((1,), True, {"prefill_chunk_size": 5}, False),
        ((2,), False, {"prompt_lookup_num_tokens": 2}, False),
        ((1,), True, {"prompt_lookup_num_tokens": 2}, False),
        ((1,), True, {"assistant_model": "itself"}, False),
    ],
)
def test_a_kept_cache_takes_the_whole_conversation_again(model, images_per_sample, new_image, options, static):
    batch = without_labels(tiny_batch(images_per_sample))
    batch["attention_mask"] = torch.ones_like(batch["input_ids"])
    size, text_config = len(images_per_sample), model.config.text_config
    cache = StaticCache(config=text_config, max_cache_len=64) if static else DynamicCache(config=text_config)
    first = model.generate(**batch, past_key_values=cache, **GREEDY)
    turn = torch.randint(3, 290, (size, 9), generator=torch.Generator().manual_seed(2))
    pixel_values = batch["pixel_values"]
    if new_image:
        turn[:, 1 : 1 + IMAGE_TOKENS] = 299
        old = pixel_values.split(len(pixel_values) // size)
        new = torch.randn(size, 1, 3, 28, 28, generator=torch.Generator().manual_seed(3))
        pixel_values = torch.cat([images for pair in zip(old, new) for images in pair])
    ids = torch.cat([first, turn], dim=1)
    whole = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixel_values}
    options = {name: model if value == "itself" else value for name, value in options.items()}
    expected = model.generate(**whole, **GREEDY, **options)
    if "num_beams" in options:
        cache.batch_repeat_interleave(options["num_beams"])
    assert torch.equal(model.generate(**whole, past_key_values=cache, **GREEDY, **options), expected)


def test_a_kept_cache_still_takes_the_new_tokens_alone(model):
    batch = without_labels(tiny_batch((1,)))
    cache = DynamicCache(config=model.config.text_config)
    first = model.generate(**batch, past_key_values=cache, **GREEDY)
    turn = torch.randint(3, 290, (1, 40), generator=torch.Generator().manual_seed(2))  # longer than all before
    turn[:, 1 : 1 + IMAGE_TOKENS] = 299
    new = torch.randn(1, 3, 28, 28, generator=torch.Generator().manual_seed(3))
    ids = torch.cat([first, turn], dim=1)
    mask = torch.ones_like(ids)
    pixel_values = torch.cat([batch["pixel_values"], new])
    expected = model.generate(input_ids=ids, attention_mask=mask, pixel_values=pixel_values, **GREEDY)
    # the cache has all of the first answer but its last token, which was never an input
    rest = ids[:, cache.get_seq_length() :]
    answer = model.generate(input_ids=rest, attention_mask=mask, pixel_values=new, past_key_values=cache, **GREEDY)
    assert torch.equal(answer[:, rest.shape[1] :], expected[:, ids.shape[1] :])
    with pytest.raises(ValueError, match="none is new"):
        model.generate(**batch, past_key_values=cache, **GREEDY)


@pytest.mark.parametrize("num_tokens", [2, 3, 10])
def test_prompt_lookup_drafts_no_image_token(model, num_tokens):
    batch = without_labels(tiny_batch((2,)))
    ids = batch["input_ids"]
    ids[:, -3:] = ids[:, :3] = torch.tensor([7, 299, 299])  # what follows in the prompt is the image
    ids[:, 1 + 2 * IMAGE_TOKENS : 3 + 2 * IMAGE_TOKENS] = 8
    ids[:, -2:] = 7
    ids[:, 0] = 7
    expected = model.generate(**batch, **GREEDY)
    assert torch.equal(model.generate(**batch, **GREEDY, prompt_lookup_num_tokens=num_tokens), expected)


SMALL = ContinuousBatchingConfig(num_blocks=4, max_batch_tokens=32, page_size=16)
PAGED = GenerationConfig(**{**GREEDY, "eos_token_id": -1})
TEXT = [[1, 5, 9, 30, 31], [1, 77, 78], [1, 4, 4, 4, 4, 100, 200, 3]]
BATCHING = {"generation_config": PAGED, "continuous_batching_config": SMALL}


def test_continuous_batching_answers_text_as_generate_does(model):
    expected = [model.generate(torch.tensor([ids]), **GREEDY)[0, len(ids) :].tolist() for ids in TEXT]
    results = model.generate_batch(TEXT, **BATCHING)
    assert [result.generated_tokens for result in results.values()] == expected
    ids = torch.tensor(TEXT[:1])
    answer = model.generate(ids, cache_implementation="paged", **BATCHING)
    assert answer.flatten().tolist() == TEXT[0] + expected[0]


def test_continuous_batching_refuses_images(model):
    batch = without_labels(tiny_batch((1,)))
    with pytest.raises(ValueError, match="text alone"):
        model.generate_batch([*TEXT, batch["input_ids"][0].tolist()], **BATCHING)
    with pytest.raises(ValueError, match="text alone"):
        model.generate(**batch, cache_implementation="paged", **BATCHING)
    with pytest.raises(ValueError, match="text alone"):
        model.generate_batch(TEXT, pixel_values=batch["pixel_values"], **BATCHING)
    manager = model.init_continuous_batching(**BATCHING)
    with pytest.raises(ValueError, match="text alone"):
        manager.add_request(batch["input_ids"][0].tolist())


def test_continuous_batching_refuses_padding_and_packed_attention(model):
    """The first would be read as text, and in a pack no key before the pass would be seen."""
    ids = torch.tensor([[0, 0, 1, 5], [1, 77, 78, 9]])
    for padded in ({}, {"attention_mask": torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]])}):
        with pytest.raises(ValueError, match="padding"):
            model.generate(ids, cache_implementation="paged", **padded, **BATCHING)
    model.set_attn_implementation({"text_config": "varlen"})
    with pytest.raises(ValueError, match="varlen"):
        model.generate_batch(TEXT, **BATCHING)


@pytest.mark.parametrize("image_token_id", [299, -200])
def test_an_image_token_outside_the_vocabulary_needs_no_embedding(image_token_id):
    text = tiny_text_config(vocab_size=299)
    model = LlavaForConditionalGeneration(tiny_config(text=text, image_token_index=image_token_id)).eval()
    inside = LlavaForConditionalGeneration(tiny_config(text=text, image_token_index=298)).eval()
    inside.load_state_dict(model.state_dict())
    batch = without_labels(tiny_batch())
    is_image = batch["input_ids"] == 299
    expected = inside(**{**batch, "input_ids": batch["input_ids"].masked_fill(is_image, 298)}).logits
    batch["input_ids"] = batch["input_ids"].masked_fill(is_image, image_token_id)
    torch.testing.assert_close(model(**batch).logits, expected)
