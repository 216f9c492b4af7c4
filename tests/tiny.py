"""Tiny random models and batches, from configurations."""

import torch
from transformers import AutoConfig

from modeling_llava import LlavaConfig


IMAGE_TOKENS = 4


def tiny_vision_config(model_type="clip_vision_model", **overrides):
    """2×2 patches of 14 pixels; CLIP has a class token, SigLIP has none."""
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4}
    return AutoConfig.for_model(model_type, **{**sizes, "image_size": 28, "patch_size": 14, **overrides})


def tiny_text_config(model_type="llama", **overrides):
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    return AutoConfig.for_model(
        model_type,
        **{**sizes, "num_key_value_heads": 2, "vocab_size": 300, "max_position_embeddings": 256, **overrides},
    )


def tiny_config(config_class=None, vision=None, text=None, **overrides):
    """A LLaVA of some 100,000 parameters: 4 image tokens per image, image token 299."""
    return (config_class or LlavaConfig)(
        **{
            "vision_config": vision or tiny_vision_config(),
            "text_config": text or tiny_text_config(),
            "image_token_index": 299,
            "image_seq_length": 4,
            **overrides,
        }
    )


def tiny_batch(images_per_sample=(1, 2), length=24, vocabulary=290, supervised_from=14):
    """Padded inputs: sample i has `images_per_sample[i]` images at its start. Right padding of 2·i positions."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, vocabulary, (len(images_per_sample), length), generator=generator)
    mask = torch.ones_like(ids)
    for row, num_images in enumerate(images_per_sample):
        ids[row, 1 : 1 + num_images * IMAGE_TOKENS] = 299
        if row:
            mask[row, -2 * row :] = 0
    labels = ids.masked_fill(mask == 0, -100)
    labels[:, :supervised_from] = -100
    batch = {"input_ids": ids, "attention_mask": mask, "labels": labels}
    if sum(images_per_sample):
        batch["pixel_values"] = torch.randn(sum(images_per_sample), 3, 28, 28, generator=generator)
    return batch
