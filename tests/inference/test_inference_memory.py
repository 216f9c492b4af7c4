"""Rows are answered at a time as far as memory has room for their keys and values; the answers stay the same."""

from types import SimpleNamespace

import pytest
import torch
from tiny_predictor import QUESTIONS, picture, tiny_llava, user_turn

from modeling_llava.inference import decoding, memory
from modeling_llava.inference.decoding import Decoder
from modeling_llava.inference.predictor import LlavaPredictor
from modeling_llava.inference.prefix_cache import RowCache


NEW_TOKENS = 20
BYTES_PER_TOKEN = 2 * 2 * 2 * 8 * 4  # keys and values, 2 layers, 2 heads of 8 numbers in float32


@pytest.fixture(scope="module")
def model(processor):
    return tiny_llava(
        processor, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=8, hidden_size=32
    )


@pytest.fixture
def card(monkeypatch):
    """A device of `card.size` bytes on which nothing but the rows' buffers lies; notes rows and bytes of each step."""
    card = SimpleNamespace(size=0, caches=[], rows=[], used=[])

    class Cache(RowCache):
        def __init__(self, *args):
            super().__init__(*args)
            card.caches = [self]  # of the run that is on

    def used():
        return sum(cache.nbytes for cache in card.caches)

    decode = Decoder._decode

    def noted(self, active, *args):
        decode(self, active, *args)
        card.rows.append(len(active))
        card.used.append(used())

    monkeypatch.setattr(decoding, "RowCache", Cache)
    monkeypatch.setattr(Decoder, "_decode", noted)
    monkeypatch.setattr(decoding, "free_memory", lambda device: card.size - used())
    monkeypatch.setattr(decoding, "MARGIN", 0)
    monkeypatch.setattr(decoding, "pass_bytes", lambda *args: 0)
    return card


def samples(number=12):
    """Questions of other lengths; the images of the first half are each asked about twice."""
    found = []
    for i in range(number):
        messages = [user_turn(QUESTIONS[i % 5] * (1 + i % 3), [None])]
        messages[0]["content"][0] = {"type": "image"}
        found.append({"id": i, "messages": messages, "images": [picture(i // 2 if i < number // 2 else i)]})
    return found


def answers(predictor, card, size, **options):
    card.size, card.rows, card.used = size, [], []
    return {a.id: a.text for a in predictor.answer_many(samples(), max_new_tokens=NEW_TOKENS, **options)}


def test_rows_at_a_time_follow_free_memory_and_answers_do_not(model, processor, card):
    predictor = LlavaPredictor(model, processor)
    expected = answers(predictor, card, 10**12)
    assert max(card.rows) == 8 and len(expected) == 12
    unlimited = max(card.used)
    for size in (unlimited, unlimited // 2):  # a layer's buffers, a half here, are there once more while they grow
        assert answers(predictor, card, size) == expected
        assert 1 < max(card.rows) < 8 and max(card.used) <= size


def test_one_row_always_goes_through(model, processor, card):
    predictor = LlavaPredictor(model, processor)
    expected = answers(predictor, card, 10**12)
    assert answers(predictor, card, 0) == expected
    assert set(card.rows) == {1}


def test_a_given_batch_size_stays_the_limit(model, processor, card):
    predictor = LlavaPredictor(model, processor)
    expected = answers(predictor, card, 10**12, batch_size=3)
    assert max(card.rows) == 3
    assert answers(predictor, card, 10**12, batch_size=12) == expected
    assert max(card.rows) == 12


def test_a_list_of_questions_follows_free_memory(model, processor, card):
    predictor = LlavaPredictor(model, processor)
    predictor.set_image(picture(1))
    card.size = 10**12
    expected = predictor.ask(QUESTIONS, max_new_tokens=NEW_TOKENS)
    assert max(card.rows) == 5
    card.size, card.rows = 0, []
    assert predictor.ask(QUESTIONS, max_new_tokens=NEW_TOKENS) == expected
    assert max(card.rows) == 1


def test_buffers_change_shape_with_the_rows_and_answers_do_not(model, processor, card):
    """Long prompts between short ones: fewer slots and longer ones, and back."""
    generator = torch.Generator().manual_seed(0)
    lengths = [5, 7, 6, 9, 8, 60, 5, 90, 6, 30, 30, 4, 70, 8, 9, 5]
    prompts = [torch.randint(3, 259, (length,), generator=generator).tolist() for length in lengths]
    decoder = Decoder(model, processor.tokenizer)
    settings = decoding.DecodingSettings(max_new_tokens=NEW_TOKENS)

    def tokens(prompts):
        rows = [decoding.Row(i, ids) for i, ids in enumerate(prompts)]
        for _ in decoder.run(rows, settings):
            pass
        return [row.tokens for row in rows]

    card.size = 10**12
    expected = [tokens([prompt])[0] for prompt in prompts]
    card.size, card.rows, card.used = (90 + NEW_TOKENS) * BYTES_PER_TOKEN * 2, [], []
    assert tokens(prompts) == expected
    assert max(card.used) <= card.size
    assert 1 in card.rows and max(card.rows) == 5  # 5 × (9 + 20) tokens, and half of it again, but not 2 × (90 + 20)


def test_bytes_of_a_token_are_those_of_the_buffers(model, processor):
    cache = RowCache(2)
    decoder = Decoder(model, processor.tokenizer)
    settings = decoding.DecodingSettings(max_new_tokens=1)
    cache.fit(1, 11)
    decoder._prefill([decoding.Row(0, list(range(3, 13)))], cache, settings)
    assert cache.capacity == 11 and cache.nbytes == 11 * BYTES_PER_TOKEN
    assert memory.key_value_bytes(model.config.get_text_config(), torch.float32) == BYTES_PER_TOKEN


def test_free_memory_of_a_gpu_heeds_the_process_share_and_what_the_allocator_holds(monkeypatch):
    stats = {"reserved": 600, "active": 400, "inactive_split": 50}
    gpu = SimpleNamespace(
        mem_get_info=lambda device: (300, 1000),
        memory_stats=lambda device: {f"{name}_bytes.all.current": value for name, value in stats.items()},
        get_per_process_memory_fraction=lambda device: 1.0,
    )
    monkeypatch.setattr(memory.torch, "get_device_module", lambda device: gpu)
    assert memory.free_memory("cuda") == 300 + 150
    gpu.get_per_process_memory_fraction = lambda device: 0.8
    assert memory.free_memory("cuda") == 200 + 150


def test_free_memory_of_the_cpu_is_what_is_available(monkeypatch):
    monkeypatch.setattr(memory.psutil, "virtual_memory", lambda: SimpleNamespace(available=123))
    assert memory.free_memory(torch.device("cpu")) == 123
