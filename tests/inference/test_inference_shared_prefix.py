"""The parts of attention over a shared prefix."""

import pytest
import torch
from tiny_predictor import picture, tiny_llava, tiny_processor
from torch.nn.functional import scaled_dot_product_attention

from modeling_llava.inference import LlavaPredictor, shared_prefix
from modeling_llava.inference.prefix_cache import Prefix, longest_match
from modeling_llava.inference.shared_prefix import partial_attention


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_in_16_bits_it_is_as_exact_as_sdpa(dtype):
    generator = torch.Generator().manual_seed(0)
    states = [3 * torch.randn(1, 4, length, 64, generator=generator) for length in (16, 700, 700)]  # peaked scores
    query, key, value = (tensor.to(dtype) for tensor in states)
    exact = scaled_dot_product_attention(query.double(), key.double(), value.double())
    first = partial_attention(query, key[:, :, :350], value[:, :, :350], None, 0.125)
    second = partial_attention(query, key[:, :, 350:], value[:, :, 350:], None, 0.125)
    total = torch.logaddexp(first[1], second[1])
    merged = first[0] * (first[1] - total).exp() + second[0] * (second[1] - total).exp()
    error, error_of_sdpa = (
        (output.double() - exact).norm()
        for output in (merged.to(dtype), scaled_dot_product_attention(query, key, value))
    )
    assert error <= 2 * error_of_sdpa


def test_grouped_heads_never_ask_for_the_kernel_that_builds_all_scores(monkeypatch):
    processor = tiny_processor()
    predictor = LlavaPredictor(tiny_llava(processor), processor)
    config = predictor.model.config.get_text_config()
    assert config.num_key_value_heads < config.num_attention_heads
    heads = []

    def sdpa(query, key, value, enable_gqa=False, **kwargs):
        heads.append((query.shape[1] == key.shape[1] == value.shape[1], enable_gqa))
        return scaled_dot_product_attention(query, key, value, **kwargs)

    monkeypatch.setattr(shared_prefix, "scaled_dot_product_attention", sdpa)
    predictor.set_image(picture(1))
    predictor.ask("What is it?", max_new_tokens=2)
    assert set(heads) == {(True, False)}


def test_scores_are_built_in_pieces_of_bounded_size(monkeypatch):
    query, key, value = torch.randn(2, 50, 8), torch.randn(2, 40, 8), torch.randn(2, 40, 8)
    whole = partial_attention(query, key, value, None, 0.3)
    sizes = []
    matmul = torch.matmul
    monkeypatch.setattr(shared_prefix.torch, "matmul", lambda a, b: sizes.append((a @ b).numel()) or matmul(a, b))
    monkeypatch.setattr(shared_prefix, "MAX_SCORES", 800)
    pieces = partial_attention(query, key, value, None, 0.3)
    assert max(sizes) <= 800
    torch.testing.assert_close(pieces, whole)


def test_prefix_is_matched_by_the_ids_of_the_whole_prompt():
    image = Prefix([1, 5, 9, 9, 9], keys=[torch.randn(1, 5, 2)], values=[torch.randn(1, 5, 2)])
    turns = Prefix([*image.ids, 7, 8, 6], [torch.randn(1, 8, 2)], [torch.randn(1, 8, 2)])
    assert longest_match([None, image, turns], [*turns.ids, 2]) is turns
    assert longest_match([turns, image], [*image.ids, 4]).ids == image.ids
    cut = longest_match([turns, image], [*image.ids, 7, 3, 6, 2])  # the second answer is cut into other tokens
    assert cut.ids == [*image.ids, 7] and cut.keys[0].data_ptr() == turns.keys[0].data_ptr()
    assert longest_match([turns], image.ids).ids == image.ids[:-1]  # one token is left over, to ask with
    assert longest_match([turns], [2, 5]) is None and longest_match([None], [1]) is None
