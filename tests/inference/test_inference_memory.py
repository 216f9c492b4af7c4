"""Rows are answered at a time as far as memory has room for their keys and values; the answers stay the same."""

from types import SimpleNamespace
from weakref import WeakSet

import pytest
import torch
from tiny_predictor import QUESTIONS, picture, tiny_llava, user_turn

from modeling_llava.inference import DecodingSettings, LlavaPredictor, decoding, prefix_cache
from modeling_llava.inference.decoding import Decoder, Row
from modeling_llava.inference.prefix_cache import RowCache


NEW_TOKENS = 20
BYTES_PER_TOKEN = 2 * 2 * 2 * 8 * 4  # keys and values, 2 layers, 2 heads of 8 numbers in float32


@pytest.fixture(scope="module")
def model(processor):
    return tiny_llava(
        processor, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=8, hidden_size=32
    )


@pytest.fixture
def card(model, monkeypatch):
    """A device of `card.size` bytes on which nothing but the rows' buffers lies; notes rows and bytes of each pass."""
    card = SimpleNamespace(size=10**12, caches=WeakSet(), rows=[], used=[])

    class Cache(RowCache):
        def __init__(self, *args):
            super().__init__(*args)
            card.caches.add(self)

    def used():
        return sum(cache.nbytes for cache in card.caches)

    def note(_, args):
        card.rows.append(len(args[0]))
        card.used.append(used())

    monkeypatch.setattr(decoding, "RowCache", Cache)
    monkeypatch.setattr(decoding, "free_memory", lambda device: card.size - used())
    monkeypatch.setattr(decoding, "MARGIN", 0)
    monkeypatch.setattr(decoding, "pass_bytes", lambda *args: 0)
    hook = model.lm_head.register_forward_pre_hook(note)
    yield card
    hook.remove()


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
    assert answers(predictor, card, 0) == expected
    assert set(card.rows) == {1}  # one row always goes through
    for batch_size in (3, 12):  # a given batch size is the limit
        assert answers(predictor, card, 10**12, batch_size=batch_size) == expected
        assert max(card.rows) == batch_size


def test_buffers_change_shape_with_the_rows_and_answers_do_not(model, processor, card):
    """Long prompts between short ones: fewer slots and longer ones, and back."""
    generator = torch.Generator().manual_seed(0)
    lengths = [5, 7, 6, 9, 8, 60, 5, 90, 6, 30, 30, 4, 70, 8, 9, 5]
    prompts = [torch.randint(3, 259, (length,), generator=generator).tolist() for length in lengths]
    decoder = Decoder(model, processor.tokenizer)

    def tokens(prompts):
        rows = [Row(i, ids) for i, ids in enumerate(prompts)]
        list(decoder.run(rows, DecodingSettings(max_new_tokens=NEW_TOKENS), decoder.max_rows))
        return [row.tokens for row in rows]

    expected = [tokens([prompt])[0] for prompt in prompts]
    assert max(card.used) == (90 + NEW_TOKENS) * BYTES_PER_TOKEN
    card.size, card.rows, card.used = (90 + NEW_TOKENS) * BYTES_PER_TOKEN * 2, [], []
    assert tokens(prompts) == expected
    assert max(card.used) <= card.size
    assert 1 in card.rows and max(card.rows) == 5  # 5 × (9 + 20) tokens, and half of it again, but not 2 × (90 + 20)


def test_free_memory_of_a_gpu_heeds_the_process_share_and_what_the_allocator_holds(monkeypatch):
    stats = {"reserved": 600, "active": 400, "inactive_split": 50}
    gpu = SimpleNamespace(
        mem_get_info=lambda device: (300, 1000),
        memory_stats=lambda device: {f"{name}_bytes.all.current": value for name, value in stats.items()},
        get_per_process_memory_fraction=lambda device: 1.0,
    )
    monkeypatch.setattr(prefix_cache.torch, "get_device_module", lambda device: gpu)
    assert prefix_cache.free_memory("cuda") == 300 + 150
    gpu.get_per_process_memory_fraction = lambda device: 0.8
    assert prefix_cache.free_memory("cuda") == 200 + 150
