"""
Tiny checkpoints in the form of what is published: every file, key, special token, chat template and generation configuration
that a real repository has, over random weights and a vocabulary of some hundred pieces.

    from published import FORMS, build, copy, every_form

    @every_form                                  # @pytest.mark.parametrize("form", …) over all of FORMS
    def test_…(form, tmp_path):
        folder = build(form)                     # written once per session, of read-only use; `form` or its name
        folder = copy(form, tmp_path / "model")  # a copy of its own

| table | holds | builder |
|---|---|---|
| `FORMS` | stock `llava` checkpoints: llava-hf's revisions, others on the Hub, and language models composed by `llava init` | `build` |
| `LANGUAGES` | language models with their own templates and generation configurations | `build_language` |
| `ORIGINALS` | folders of the original code | `build_original` |

`build_tower()` is a CLIP tower of 28 pixels. A `Form` says what must come out, written by hand.

Sources, read on huggingface.co: llava-hf/llava-1.5-*-hf (with the sizes of its files per revision), llava-interleave-qwen-*-hf,
xtuner/llava-llama-3-8b-v1_1-transformers and -hf, lmsys/vicuna-*-v1.5, mmaaz60/LLaVA-7B-Lightening-v1-1, wojtab/llava-7b-v0-4bit-128g
and JefferyZhan/Griffon (copies of liuhaotian's configurations), google/gemma-2b-it, microsoft/Phi-3-mini-4k-instruct. From memory: the
language models' templates (their behaviour) and tokenizer_config.json, the sampling values of Llama-3's, Qwen's and Mistral's generation
configurations, bakLlava's and xtuner's processor files, v0's tokenizer_config.json, and whether llava-hf's config.json has
`image_seq_length`: both kinds are here.

What differs on purpose: sizes, ids, and shards of a few kilobytes. Forms without `image_seq_length` keep 336 pixels and 576 tokens
per image, its default; the others have 28 pixels and 4 tokens.
"""

import functools
import json
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    CLIPImageProcessor,
    CLIPVisionModel,
    GenerationConfig,
    LlavaConfig,
    SiglipImageProcessorPil,
    SiglipVisionModel,
)
from transformers.models.llava.modeling_llava import LlavaForConditionalGeneration as StockLlava
from transformers.models.llava.processing_llava import LlavaProcessor as StockProcessor

from .vocabularies import HUGE, Vocabulary, write_json


GOLDEN = Path(__file__).parents[1] / "golden"
QUESTION = "What colour is it?"
ANSWERS = ("It is red.", "It is so.")
CONVERSATION = [
    {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": QUESTION}]},
    {"role": "assistant", "content": [{"type": "text", "text": ANSWERS[0]}]},
    {"role": "user", "content": [{"type": "text", "text": "Why?"}]},
    {"role": "assistant", "content": [{"type": "text", "text": ANSWERS[1]}]},
]


def template(name: str) -> str:
    """A chat template of `templates/`: of llava-hf the published bytes, of language models the same behaviour."""
    return (Path(__file__).parent / "templates" / f"{name}.jinja").read_text("utf-8")


@dataclass(frozen=True)
class Form:
    """
    Args:
        name (`str`): Its key in `FORMS`.
        write (`Callable[[Path], None]`): Writes the folder.
        prompt (`str`, *optional*): What the template writes for a question about an image, `<image>` once; `None` where the
            folder has no template that knows images.
        learnt (`tuple[str, str]`): Decoded labels of the two answers of `CONVERSATION`.
        stop (`str`): The token that ends an answer.
        image_tokens (`int`): Per image.
        train (`dict`): Settings that `llava train` needs for it.
    """

    name: str
    write: Callable[[Path], None]
    prompt: str | None
    learnt: tuple[str, str]
    stop: str
    image_tokens: int = 4
    train: dict | None = None


def _ends(stop: str, before: str = "", last: str = "") -> tuple[str, str]:
    return f"{before}{ANSWERS[0]}{stop}", f"{before}{last}{ANSWERS[1]}{stop}"


# Parts

_TEXT = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
_VISION = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4}
_LLAMA = {
    "add_bos_token": True, "add_eos_token": False, "bos_token": "<s>", "clean_up_tokenization_spaces": False,
    "eos_token": "</s>", "legacy": False, "model_max_length": HUGE, "padding_side": "left", "sp_model_kwargs": {},
    "tokenizer_class": "LlamaTokenizer", "unk_token": "<unk>", "use_default_system_prompt": False,
}  # fmt: skip
_LLAVA_HF = {**_LLAMA, "pad_token": "<pad>", "processor_class": "LlavaProcessor"}
_LLAMA3_TOKENS = (
    "<|begin_of_text|>", "<|end_of_text|>", "<|reserved_special_token_0|>", "<|start_header_id|>", "<|end_header_id|>",
    "<|reserved_special_token_1|>", "<|eot_id|>",
)  # fmt: skip
_LLAMA3 = {
    "bos_token": "<|begin_of_text|>", "clean_up_tokenization_spaces": True, "eos_token": "<|eot_id|>",
    "model_input_names": ["input_ids", "attention_mask"], "model_max_length": HUGE,
    "tokenizer_class": "PreTrainedTokenizerFast",
}  # fmt: skip
_QWEN_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
_QWEN = {
    "add_bos_token": False, "add_prefix_space": False, "bos_token": None, "clean_up_tokenization_spaces": False,
    "eos_token": "<|im_end|>", "errors": "replace", "model_max_length": 32768, "pad_token": "<|endoftext|>",
    "split_special_tokens": False, "tokenizer_class": "Qwen2Tokenizer", "unk_token": None,
}  # fmt: skip
_PHI3_TOKENS = (
    "<|endoftext|>", "<|assistant|>", *(f"<|placeholder{i}|>" for i in range(1, 5)), "<|system|>", "<|end|>",
    "<|placeholder5|>", "<|placeholder6|>", "<|user|>",
)  # fmt: skip

VICUNA = Vocabulary("sentencepiece", config={**_LLAMA, "padding_side": "right", "pad_token": "<unk>"}, model=True)
LLAVA_HF = Vocabulary(
    "sentencepiece", ("<image>", "<pad>"), config={**_LLAVA_HF, "add_prefix_space": None}, model=True
)
LLAMA3 = Vocabulary("bytes", _LLAMA3_TOKENS, config=_LLAMA3, template=template("llama3"))


# Language models


@dataclass(frozen=True)
class Language:
    """A language model's vocabulary, configuration fields and generation configuration (token texts in place of ids)."""

    vocabulary: Vocabulary
    model_type: str
    config: dict
    generation: dict
    padded: int | None = None  # the embedding's rows are a multiple of it


_QWEN_SAMPLING = {
    "bos_token_id": "<|endoftext|>", "do_sample": True, "eos_token_id": ["<|im_end|>", "<|endoftext|>"],
    "pad_token_id": "<|endoftext|>", "repetition_penalty": 1.05, "temperature": 0.7, "top_k": 20, "top_p": 0.8,
}  # fmt: skip

LANGUAGES: dict[str, Language] = {
    "vicuna": Language(
        VICUNA,
        "llama",
        {"bos_token_id": "<s>", "eos_token_id": "</s>", "pad_token_id": "<unk>", "rms_norm_eps": 1e-5},
        {
            "bos_token_id": "<s>", "eos_token_id": "</s>", "max_length": 4096, "pad_token_id": "<unk>", "temperature": 0.9,
            "top_p": 0.6, "transformers_version": "4.31.0",
        },
    ),
    "llama3": Language(
        LLAMA3,
        "llama",
        {"bos_token_id": "<|begin_of_text|>", "eos_token_id": "<|eot_id|>", "num_key_value_heads": 2},
        {
            "bos_token_id": "<|begin_of_text|>", "eos_token_id": ["<|end_of_text|>", "<|eot_id|>"], "do_sample": True,
            "temperature": 0.6, "max_length": 4096, "top_p": 0.9, "transformers_version": "4.40.0.dev0",
        },
    ),
    "qwen2.5": Language(
        Vocabulary("bytes", _QWEN_TOKENS, config=_QWEN, template=template("qwen2.5")),
        "qwen2",
        {"bos_token_id": "<|endoftext|>", "eos_token_id": "<|im_end|>", "num_key_value_heads": 2},
        _QWEN_SAMPLING,
        padded=128,
    ),
    "qwen3": Language(
        Vocabulary(
            "bytes", (*_QWEN_TOKENS, "<think>", "</think>"), config={**_QWEN, "model_max_length": 131072},
            template=template("qwen3"),
        ),
        "qwen3",
        {"bos_token_id": "<|endoftext|>", "eos_token_id": "<|im_end|>", "num_key_value_heads": 2, "head_dim": 16,
         "tie_word_embeddings": True},
        {**_QWEN_SAMPLING, "temperature": 0.6, "top_p": 0.95, "repetition_penalty": 1.0},
        padded=128,
    ),
    "mistral": Language(
        Vocabulary(
            "sentencepiece", config={**_LLAMA, "padding_side": "right", "pad_token": None}, template=template("mistral"),
            model=True,
        ),
        "mistral",
        {"bos_token_id": "<s>", "eos_token_id": "</s>", "num_key_value_heads": 2, "sliding_window": None},
        {"bos_token_id": "<s>", "eos_token_id": "</s>", "_from_model_config": True, "transformers_version": "4.36.0"},
    ),
    "phi3": Language(
        Vocabulary(
            "sentencepiece", _PHI3_TOKENS, _PHI3_TOKENS[1:],
            {**_LLAMA, "add_bos_token": False, "eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>",
             "model_max_length": 4096},
            template("phi3"), model=True,
        ),
        "phi3",
        {"bos_token_id": "<s>", "eos_token_id": "<|endoftext|>", "pad_token_id": "<|endoftext|>"},
        {
            "_from_model_config": True, "bos_token_id": "<s>", "eos_token_id": ["<|endoftext|>", "<|assistant|>", "<|end|>"],
            "pad_token_id": "<|endoftext|>", "transformers_version": "4.39.3",
        },
        padded=64,
    ),
    "gemma": Language(
        Vocabulary(
            "gemma",
            config={
                "add_bos_token": True, "add_eos_token": False, "bos_token": "<bos>", "eos_token": "<eos>",
                "pad_token": "<pad>", "unk_token": "<unk>", "additional_special_tokens": ["<start_of_turn>", "<end_of_turn>"],
                "clean_up_tokenization_spaces": False, "legacy": None, "model_max_length": HUGE, "sp_model_kwargs": {},
                "spaces_between_special_tokens": False, "tokenizer_class": "GemmaTokenizer",
                "use_default_system_prompt": False,
            },
            template=template("gemma"),
        ),
        "gemma",
        {"bos_token_id": "<bos>", "eos_token_id": "<eos>", "pad_token_id": "<pad>", "head_dim": 16,
         "num_key_value_heads": 1, "tie_word_embeddings": True},
        {"_from_model_config": True, "bos_token_id": "<bos>", "eos_token_id": "<eos>", "pad_token_id": "<pad>"},
    ),
}  # fmt: skip


def _to_ids(fields: dict, vocabulary: Vocabulary) -> dict:
    """Ids for the token texts in fields that are called `…_token_id`."""
    ids = {}
    for name, value in fields.items():
        if name.endswith("_token_id") and isinstance(value, list):
            value = vocabulary.ids(*value)
        elif name.endswith("_token_id") and isinstance(value, str):
            (value,) = vocabulary.ids(value)
        ids[name] = value
    return ids


def _lively(model):
    """Weights with which the image and the prompt decide the next token, as in a trained model, and an adapter can learn."""
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1:
            scale = 0.3 if "embed_tokens" in name or "lm_head" in name else parameter[0].numel() ** -0.5
            torch.nn.init.normal_(parameter, std=scale, generator=generator)
    if model.can_generate():
        model.generation_config = GenerationConfig()  # the published one, written by hand, need not be valid today
    return model


_WIDE = {"hidden_size": 256, "intermediate_size": 512, "head_dim": 64}
_LLAMA31_ROPE = {
    "rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}  # fmt: skip


def _write_language(folder: Path, name: str, wide: bool = False) -> None:
    language = LANGUAGES[name]
    rows = len(language.vocabulary)
    if language.padded:
        rows = -(-rows // language.padded) * language.padded
    fields = {**_TEXT, "max_position_embeddings": 1024, "vocab_size": rows, "pad_token_id": None}
    fields |= _to_ids(language.config, language.vocabulary)
    if wide:
        fields |= _WIDE | ({"rope_parameters": _LLAMA31_ROPE} if name == "llama3" else {})
    config = AutoConfig.for_model(language.model_type, **fields)
    _lively(AutoModelForCausalLM.from_config(config)).save_pretrained(folder)
    write_json(folder / "generation_config.json", _to_ids(language.generation, language.vocabulary))
    language.vocabulary.write(folder)


def _write_tower(folder: Path) -> None:
    torch.manual_seed(0)
    CLIPVisionModel(
        AutoConfig.for_model("clip_vision_model", **_VISION, image_size=28, patch_size=14)
    ).save_pretrained(folder)
    CLIPImageProcessor(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28}).save_pretrained(folder)


def _write_siglip_tower(folder: Path) -> None:
    torch.manual_seed(0)
    config = AutoConfig.for_model("siglip_vision_model", **_VISION, image_size=28, patch_size=14)
    _lively(SiglipVisionModel(config)).save_pretrained(folder)
    SiglipImageProcessorPil(size={"height": 28, "width": 28}).save_pretrained(folder)


# Stock llava checkpoints


def _write_weights(folder: Path, dtype: torch.dtype) -> None:
    """Random weights of the written configuration, by the stock class, in shards; the configuration stays as it is."""
    written = (folder / "config.json").read_bytes()
    model = _lively(StockLlava(LlavaConfig.from_pretrained(folder))).to(dtype)
    model.save_pretrained(folder, max_shard_size="200KB")
    (folder / "config.json").write_bytes(written)


def _write_llava_hf(
    folder: Path,
    *,
    chat_template: str | None,
    processor: dict | None,
    vocabulary: Vocabulary = LLAVA_HF,
    text: dict | None = None,
    generation: dict | None = None,
    side: int = 336,
    **tokenizer,
) -> None:
    """What llava-hf publishes, and what others publish in its form; `image_seq_length` where it is not the default."""
    image, pad = vocabulary.ids("<image>", "<pad>")
    rows = -(-len(vocabulary) // 64) * 64
    text_config = {
        "_name_or_path": "lmsys/vicuna-7b-v1.5", "architectures": ["LlamaForCausalLM"], **_TEXT,
        "max_position_embeddings": 4096, "model_type": "llama", "rms_norm_eps": 1e-05, "torch_dtype": "float16",
        "vocab_size": rows, **_to_ids(text or {}, vocabulary),
    }  # fmt: skip
    vision_config = {
        **_VISION, "image_size": side, "model_type": "clip_vision_model", "patch_size": 14, "projection_dim": 768,
        "vocab_size": 32000,
    }  # fmt: skip
    config = {
        "architectures": ["LlavaForConditionalGeneration"], "ignore_index": -100, "image_token_index": image,
        "model_type": "llava", "pad_token_id": pad, "projector_hidden_act": "gelu", "text_config": text_config,
        "tie_word_embeddings": False, "torch_dtype": "float16", "transformers_version": "4.36.0.dev0",
        "vision_config": vision_config, "vision_feature_layer": -2, "vision_feature_select_strategy": "default",
        "vocab_size": rows,
    }  # fmt: skip
    if side != 336:
        config["image_seq_length"] = (side // 14) ** 2
    write_json(folder / "config.json", config)
    _write_weights(folder, torch.float16)
    generation = generation or {"bos_token_id": "<s>", "eos_token_id": "</s>", "pad_token_id": "<pad>"}
    fields = {"_from_model_config": True, **_to_ids(generation, vocabulary), "transformers_version": "4.36.0.dev0"}
    write_json(folder / "generation_config.json", fields)
    preprocessor = {
        "crop_size": {"height": side, "width": side}, "do_center_crop": True, "do_convert_rgb": True, "do_normalize": True,
        "do_rescale": True, "do_resize": True, "image_mean": [0.48145466, 0.4578275, 0.40821073],
        "image_processor_type": "CLIPImageProcessor", "image_std": [0.26862954, 0.26130258, 0.27577711],
        "processor_class": "LlavaProcessor", "resample": 3, "rescale_factor": 0.00392156862745098,
        "size": {"shortest_edge": side},
    }  # fmt: skip
    write_json(folder / "preprocessor_config.json", preprocessor)
    vocabulary.write(folder, **tokenizer)
    if processor is not None:
        write_json(folder / "processor_config.json", {**processor, "processor_class": "LlavaProcessor"})
    if chat_template is not None:
        write_json(folder / "chat_template.json", {"chat_template": chat_template})


_PROCESSOR = {
    "image_token": "<image>", "num_additional_image_tokens": 1, "patch_size": 14, "vision_feature_select_strategy": "default",
}  # fmt: skip


def _write_resaved(folder: Path) -> None:
    """The newest llava-hf form, loaded and saved by the stock classes of the installed transformers."""
    source = build("llava-hf")
    StockLlava.from_pretrained(source, dtype="auto").save_pretrained(folder)
    parts = CLIPImageProcessor.from_pretrained(source), AutoTokenizer.from_pretrained(source)
    StockProcessor(*parts, chat_template=template("llava-hf"), **_PROCESSOR).save_pretrained(folder)


def _write_interleave(folder: Path) -> None:
    vocabulary = Vocabulary("bytes", (*_QWEN_TOKENS, "<image>"), config=_QWEN)
    (image,) = vocabulary.ids("<image>")
    text = {
        **_TEXT, "num_key_value_heads": 4, "_name_or_path": "Qwen/Qwen1.5-0.5B-Chat", "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2",
        "max_position_embeddings": 1024, "tie_word_embeddings": True, "torch_dtype": "float16", "vocab_size": 512,
        **_to_ids({"bos_token_id": "<|endoftext|>", "eos_token_id": "<|im_end|>"}, vocabulary),
    }  # fmt: skip
    config = {
        "architectures": ["LlavaForConditionalGeneration"], "ignore_index": -100, "image_seq_length": 4,
        "image_token_index": image, "model_type": "llava", "projector_hidden_act": "gelu", "text_config": text,
        "torch_dtype": "float16", "transformers_version": "4.43.0.dev0",
        "vision_config": {**_VISION, "image_size": 28, "model_type": "siglip_vision_model", "patch_size": 14,
                          "vision_use_head": False},
        "vision_feature_layer": -1, "vision_feature_select_strategy": "full",
    }  # fmt: skip
    write_json(folder / "config.json", config)
    _write_weights(folder, torch.float16)
    generation = _to_ids({"bos_token_id": "<|endoftext|>", "eos_token_id": "<|im_end|>"}, vocabulary)
    write_json(folder / "generation_config.json", {"_from_model_config": True, **generation})
    preprocessor = {
        "do_convert_rgb": None, "do_normalize": True, "do_rescale": True, "do_resize": True, "image_mean": [0.5] * 3,
        "image_processor_type": "SiglipImageProcessor", "image_std": [0.5] * 3, "processor_class": "LlavaProcessor",
        "resample": 3, "rescale_factor": 0.00392156862745098, "size": {"height": 28, "width": 28},
    }  # fmt: skip
    write_json(folder / "preprocessor_config.json", preprocessor)
    vocabulary.write(folder, processor_class="LlavaProcessor", padding_side="left")
    processor = {**_PROCESSOR, "num_additional_image_tokens": 0, "vision_feature_select_strategy": "full"}
    write_json(folder / "processor_config.json", {**processor, "processor_class": "LlavaProcessor"})
    write_json(folder / "chat_template.json", {"chat_template": template("interleave-qwen")})


def _compose(folder: Path, language: str, chat_template: str, tower: str = "clip", wide: bool = False) -> None:
    """What `llava init` makes of a language model and a tower."""
    from modeling_llava import LlavaForConditionalGeneration, LlavaProcessor

    parts = str(build_tower(tower)), str(build_language(language, wide))
    torch.manual_seed(0)
    LlavaForConditionalGeneration.from_vision_language_pretrained(*parts).save_pretrained(folder)
    LlavaProcessor.from_vision_language_pretrained(*parts, chat_template).save_pretrained(folder)


def _composed(language: str, prompt: str, stop: str, learnt=None, chat_template="own") -> Form:
    def write(folder: Path) -> None:
        _compose(folder, language, chat_template)

    return Form(language, write, prompt, learnt or _ends(stop), stop)


_XTUNER = Vocabulary(
    "bytes", (*_LLAMA3_TOKENS, "<image>", "<pad>"), template=template("llama3"),
    config={**_LLAMA3, "eos_token": "<|end_of_text|>", "pad_token": "<pad>", "processor_class": "LlavaProcessor"},
)  # fmt: skip
_VICUNA_PROMPT = f"USER: <image>\n{QUESTION} ASSISTANT:"
_LLAMA3_PROMPT = (
    f"<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\n<image>\n{QUESTION}<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\n"
)
_CHATML_PROMPT = f"<|im_start|>user\n<image>\n{QUESTION}<|im_end|>\n<|im_start|>assistant\n"


def _llava_hf(name: str, prompt: str | None = _VICUNA_PROMPT, train: dict | None = None, **fields) -> Form:
    def write(folder: Path) -> None:
        _write_llava_hf(folder, **fields)

    image_tokens = (fields.get("side", 336) // 14) ** 2
    return Form(name, write, prompt, _ends("</s>"), "</s>", image_tokens=image_tokens, train=train)


def _write_xtuner(folder: Path) -> None:
    ids = {"bos_token_id": "<|begin_of_text|>", "eos_token_id": "<|end_of_text|>"}
    text = {**ids, "num_key_value_heads": 2, "rope_theta": 500000.0}
    _write_llava_hf(folder, chat_template=None, processor=None, vocabulary=_XTUNER, text=text, generation=ids, side=28)


FORMS: dict[str, Form] = {
    form.name: form
    for form in [
        # llava-hf/llava-1.5-*-hf: since December 2024, in July 2024, as it was in December 2023, and saved again today
        _llava_hf(
            "llava-hf", chat_template=template("llava-hf"), processor=_PROCESSOR, image_token="<image>",
            extra_special_tokens={"image_token": "<image>"}, side=28,
        ),
        _llava_hf("llava-hf-2024", chat_template=template("llava-hf-unmarked"), processor=None),
        _llava_hf("llava-hf-2023", None, {"chat_template": "vicuna_v1"}, chat_template=None, processor=None),
        Form("llava-hf-resaved", _write_resaved, _VICUNA_PROMPT, _ends("</s>"), "</s>"),
        # llava-hf/bakLlava-v1-hf: Mistral behind the same files
        _llava_hf(
            "bakllava", chat_template=template("llava-hf"), processor=_PROCESSOR,
            text={"architectures": ["MistralForCausalLM"], "model_type": "mistral", "num_key_value_heads": 2,
                  "sliding_window": None, "_name_or_path": "mistralai/Mistral-7B-v0.1"},
        ),
        # xtuner/llava-llama-3-8b-v1_1-transformers: a template of strings; generation ends at <|end_of_text|> alone
        Form("xtuner-llama3", _write_xtuner, None, _ends("<|eot_id|>"), "<|eot_id|>"),
        # llava-hf/llava-interleave-qwen-*-hf: the stop stands behind what the template marks
        Form(
            "interleave-qwen", _write_interleave, _CHATML_PROMPT, _ends("<|im_end|>", before="\n"), "<|im_end|>",
        ),
        _composed(
            "vicuna",
            "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, detailed, "
            f"and polite answers to the user's questions. {_VICUNA_PROMPT}",
            "</s>", chat_template="vicuna_v1",
        ),
        _composed("llama3", _LLAMA3_PROMPT, "<|eot_id|>"),
        _composed(
            "qwen2.5",
            "<|im_start|>system\nYou are Qwen, created by Alibaba Cloud. You are a helpful assistant.<|im_end|>\n"
            f"{_CHATML_PROMPT}",
            "<|im_end|>",
        ),
        _composed(
            "qwen3", _CHATML_PROMPT, "<|im_end|>", _ends("<|im_end|>", last="<think>\n\n</think>\n\n"),
        ),
        _composed("mistral", f"<s>[INST] <image>\n{QUESTION} [/INST]", "</s>"),
        _composed("phi3", f"<|user|>\n<image>\n{QUESTION}<|end|>\n<|assistant|>\n", "<|end|>"),
        _composed(
            "gemma", f"<bos><start_of_turn>user\n<image>\n{QUESTION}<end_of_turn>\n<start_of_turn>model\n", "<end_of_turn>",
        ),
    ]
}  # fmt: skip


# The original's folders


@dataclass(frozen=True)
class Original:
    """
    Args:
        write (`Callable[[Path], None]`): Writes the folder; its tower lies inside as `vision_tower`.
        template (`str`, *optional*): The chat template that `convert_original_to_hf` is told; by default it chooses.
        stop (`str`): With what an answer ends.
        base (`Path`, *optional*): What a delta is added to.
    """

    name: str
    write: Callable[[Path], None]
    stop: str
    template: str | None = None
    base: Path | None = None


def _edit(path: Path, remove: tuple[str, ...] = (), **fields) -> None:
    content = {**json.loads(path.read_text("utf-8")), **fields}
    write_json(path, {name: value for name, value in content.items() if name not in remove})


def _golden(
    name: str, generation: dict | None = None, remove: tuple[str, ...] = (), **config
) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        shutil.copytree(
            GOLDEN / name, folder, ignore=shutil.ignore_patterns("expected.*", "images"), dirs_exist_ok=True
        )
        _edit(folder / "config.json", remove, **config)
        if generation is not None:
            write_json(folder / "generation_config.json", {"_from_model_config": True, **generation})

    return write


_2023 = ("attention_bias", "attention_dropout", "rope_theta", "tokenizer_model_max_length", "tokenizer_padding_side")
_LATER = (
    *_2023, "mm_projector_type", "mm_vision_select_feature", "image_aspect_ratio", "num_key_value_heads",
    "mm_use_im_patch_token",
)  # fmt: skip
_FIRST = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": -1}  # LLaMA's first conversion, April 2023


def _write_projector_file(folder: Path, tensors: dict[str, torch.Tensor]) -> None:
    """`mm_projector.bin` next to the whole model, as the uploads of 2023 have it."""
    projector = {name: value for name, value in tensors.items() if "mm_projector" in name}
    torch.save(projector, folder / "mm_projector.bin")


def _write_llama2_chat(folder: Path) -> None:
    """liuhaotian/llava-llama-2-13b-chat-lightning-preview."""
    generation = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    fields = {"model_type": "llava", "image_aspect_ratio": "square", "mm_resampler_type": None}
    _golden("llava_v15_tiny", generation, _2023, transformers_version="4.31.0", **fields)(folder)
    _write_projector_file(folder, load_file(folder / "model.safetensors"))


def _write_v0_delta(folder: Path) -> None:
    """liuhaotian/LLaVA-7b-delta-v0: `model_type` llama, the projector once more in a file, `[PAD]` before the image's tokens."""
    delta = GOLDEN / "llava_v1_tiny_delta"
    shutil.copytree(delta / "delta", folder, dirs_exist_ok=True)
    shutil.copytree(delta / "vision_tower", folder / "vision_tower")
    tensors = torch.load(folder / "pytorch_model.bin", weights_only=True)
    _write_projector_file(folder, tensors)
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        value = tensors[name]
        tensors[name] = torch.cat([value[:700], torch.zeros(1, value.shape[1], dtype=value.dtype), value[700:]])
    torch.save(tensors, folder / "pytorch_model.bin")
    added = {"<im_end>": 703, "<im_patch>": 701, "<im_start>": 702, "[PAD]": 700}
    write_json(folder / "added_tokens.json", added)
    fields = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "max_sequence_length": 2048}
    fields |= {"vocab_size": 704, "transformers_version": "4.28.0.dev0"}
    later = (*_LATER, "max_position_embeddings", "rope_scaling", "pretraining_tp", "image_grid_pinpoints")
    _edit(folder / "config.json", later, **fields, **_FIRST)
    write_json(folder / "generation_config.json", {"_from_model_config": True, **_FIRST})
    _edit(folder / "tokenizer_config.json", ("added_tokens_decoder", "additional_special_tokens", "legacy"))
    write_json(folder / "special_tokens_map.json", {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "[PAD]",
                                                    "unk_token": "<unk>"})  # fmt: skip


def _write_original_llama3(folder: Path) -> None:
    """xtuner/llava-llama-3-8b-v1_1-hf: the original's format over Llama-3."""
    ids = _to_ids({"bos_token_id": "<|begin_of_text|>", "eos_token_id": "<|end_of_text|>"}, LLAMA3)
    fields = {**_TEXT, "num_key_value_heads": 2, "vocab_size": len(LLAMA3), "max_position_embeddings": 1024,
              "rms_norm_eps": 1e-5, "rope_theta": 500000.0, **ids}  # fmt: skip
    golden = GOLDEN / "llava_v15_tiny"
    shutil.copytree(golden / "vision_tower", folder / "vision_tower")
    torch.manual_seed(0)
    model = _lively(AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **fields)))
    projector = {}
    for i, width in ((0, 32), (2, 64)):
        projector[f"model.mm_projector.{i}.weight"] = torch.randn(64, width) * 0.1
        projector[f"model.mm_projector.{i}.bias"] = torch.zeros(64)
    weights = {name: value.contiguous() for name, value in model.state_dict().items()}
    save_file({**weights, **projector}, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((golden / "config.json").read_text("utf-8"))
    write_json(folder / "config.json", {**config, **fields, "pad_token_id": None, "torch_dtype": "float16"})
    write_json(folder / "generation_config.json", {"_from_model_config": True, **ids})
    LLAMA3.write(folder, eos_token="<|end_of_text|>")


ORIGINALS: dict[str, Original] = {
    original.name: original
    for original in [
        # liuhaotian/llava-v1.5-* in 2023: `model_type` is llava, llava_llama today (as in the golden checkpoints)
        Original(
            "v1.5-2023",
            _golden(
                "llava_v15_tiny", {"bos_token_id": 1, "eos_token_id": 2, "max_length": 4096, "pad_token_id": 0}, _2023,
                model_type="llava", transformers_version="4.31.0", torch_dtype="float16",
            ),
            "</s>",
        ),
        # liuhaotian/LLaVA-Lightning-7B-delta-v1-1 after its delta was added
        Original(
            "v1-2023",
            _golden(
                "llava_v1_tiny", _FIRST, _LATER, model_type="llava", transformers_version="4.28.0.dev0",
                max_sequence_length=2048, **_FIRST,
            ),
            "</s>",
        ),
        Original("llama-2-chat", _write_llama2_chat, "</s>", "llama_2"),
        Original("llama-3", _write_original_llama3, "<|eot_id|>"),
        Original(
            "v0-delta", _write_v0_delta, "\n###", "vicuna_v0", GOLDEN / "llava_v1_tiny_delta" / "language_model",
        ),
    ]
}  # fmt: skip


# Folders, each written once


@functools.cache
def _session() -> tempfile.TemporaryDirectory:
    return tempfile.TemporaryDirectory(prefix="published-", ignore_cleanup_errors=True)


def _once(kind: str, name: str, write: Callable[[Path], None]) -> Path:
    folder = Path(_session().name) / kind / name
    if not folder.exists():
        with torch.random.fork_rng():
            unfinished = folder.with_name(f"{name}.unfinished")
            shutil.rmtree(unfinished, ignore_errors=True)
            unfinished.mkdir(parents=True)
            write(unfinished)
            unfinished.rename(folder)
    return folder


def build(form: Form | str) -> Path:
    """The folder of a form of `FORMS`, for reading."""
    form = FORMS[form] if isinstance(form, str) else form
    return _once("llava", form.name, form.write)


def copy(form: Form | str, folder: Path) -> Path:
    """A copy of a form's folder, to be changed."""
    return Path(shutil.copytree(build(form), folder))


def build_original(original: Original | str) -> Path:
    original = ORIGINALS[original] if isinstance(original, str) else original
    return _once("original", original.name, original.write)


def build_language(name: str, wide: bool = False) -> Path:
    """`wide`: rows that are multiples of 256, as llama.cpp's quantiser needs them; of Llama-3, the positions of 3.1."""
    kind = "wide" if wide else "language"
    return _once(kind, name, functools.partial(_write_language, name=name, wide=wide))


def build_tower(kind: str = "clip") -> Path:
    return _once("tower", kind, {"clip": _write_tower, "siglip": _write_siglip_tower}[kind])


def build_siglip(language: str, wide: bool = False) -> Path:
    """A LLaVA of a SigLIP tower and a language model of `LANGUAGES` ([`build_language`]), as JoyCaption is."""
    write = functools.partial(_compose, language=language, chat_template="own", tower="siglip", wide=wide)
    return _once("siglip-wide" if wide else "siglip", language, write)


every_form = pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
every_original = pytest.mark.parametrize("original", ORIGINALS.values(), ids=ORIGINALS)


__all__ = [
    "ANSWERS", "CONVERSATION", "FORMS", "LANGUAGES", "ORIGINALS", "QUESTION", "Form", "Language", "Original", "build",
    "build_language", "build_original", "build_siglip", "build_tower", "copy", "every_form", "every_original", "template",
]  # fmt: skip
