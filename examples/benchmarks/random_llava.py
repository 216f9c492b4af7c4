"""A LLaVA of 7B's or 13B's shape with random weights, 16 bits or 4, for benchmarks on a GPU; `tiny` to try them on a CPU."""

import copy


def make_config(size: str, tiny: bool, image_token: int = 32_000):
    from transformers import CLIPVisionConfig, LlamaConfig

    from modeling_llava import LlavaConfig

    names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    vision, text = (1024, 4096, 24, 16), {"7b": (4096, 11008, 32, 32), "13b": (5120, 13824, 40, 40)}[size]
    vision, text = ((32, 64, 2, 2), (64, 128, 3, 2)) if tiny else (vision, text)
    pixels = 56 if tiny else 336
    vision_config = CLIPVisionConfig(**dict(zip(names, vision)), image_size=pixels, patch_size=14)
    text_config = LlamaConfig(**dict(zip(names, text)), vocab_size=32_064, max_position_embeddings=4096)
    tokens = {"image_token_index": image_token, "image_seq_length": (pixels // 14) ** 2}
    return LlavaConfig(vision_config=vision_config.to_dict(), text_config=text_config.to_dict(), **tokens)


def dtype_of(device: str):
    """What the device computes in: bfloat16, float16 on a GPU without it, float32 on the CPU."""
    import torch

    if device == "cpu":
        return torch.float32
    return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16


def make_model(config, side: str, adapter: str, device: str):
    """Random frozen weights on the device, never more than one layer of them in 16 bits next to the 4-bit ones."""
    import torch
    from transformers import LlavaConfig, LlavaForConditionalGeneration

    import modeling_llava

    one_layer = copy.deepcopy(config)
    one_layer.text_config.num_hidden_layers = 1
    model_class = modeling_llava.LlavaForConditionalGeneration
    if side == "stock":
        model_class, one_layer = LlavaForConditionalGeneration, LlavaConfig(**one_layer.to_dict())
    dtype = dtype_of(device)
    torch.manual_seed(0)
    torch.set_default_dtype(dtype)
    with torch.device(device):
        model = model_class(one_layer)
    torch.set_default_dtype(torch.float32)
    language_model = model.model.language_model
    if adapter == "qlora":
        _to_four_bit(language_model.layers, dtype)
        model.is_loaded_in_4bit = True
    for number in range(1, config.text_config.num_hidden_layers):
        # all layers share one configuration, which decides about attention
        layer = copy.deepcopy(language_model.layers[0], {id(language_model.config): language_model.config})
        layer.self_attn.layer_idx = number
        language_model.layers.append(layer)
    language_model.config.num_hidden_layers = config.text_config.num_hidden_layers
    return model.requires_grad_(False)


def _to_four_bit(layers, dtype) -> None:
    import bitsandbytes as bnb
    import torch

    for module in list(layers.modules()):
        for name, linear in list(module.named_children()):
            if isinstance(linear, torch.nn.Linear):
                size = (linear.in_features, linear.out_features)
                quantized = bnb.nn.Linear4bit(*size, bias=False, compute_dtype=dtype, quant_type="nf4")
                quantized.support_avx512bf16_for_cpu = False
                weight = bnb.nn.Params4bit(linear.weight.data, requires_grad=False, quant_type="nf4", module=quantized)
                quantized.weight = weight.to(linear.weight.device)
                setattr(module, name, quantized)


def add_lora(model, rank: int):
    from peft import LoraConfig, get_peft_model

    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.enable_input_require_grads()
    targets, saved = r"model\.language_model\..*_proj", ["multi_modal_projector"]
    peft_model = get_peft_model(
        model, LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=targets, modules_to_save=saved)
    )
    for parameter in peft_model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    return peft_model.train()
