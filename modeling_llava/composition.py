"""Compose a new LLaVA from a pretrained vision tower and a pretrained language model (LLaVA §4.1)."""

import logging
import os
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from .configuration_llava import LlavaConfig, count_additional_image_tokens, count_image_tokens
from .constants import CACHE
from .io.files import explained, is_original, other_than_llava, read_config
from .text.stops import drop_unused_sampling
from .text.tokenization import add_image_token, load_tokenizer


logger = logging.getLogger(__name__)

VOCABULARY_MULTIPLE = 64
"""The vocabulary is padded to a multiple of this many rows, which matrix products on GPUs prefer."""


def vision_tower_config(vision: str, **kwargs) -> PreTrainedConfig:
    """The configuration of a vision tower, given its folder or Hub name; of a CLIP-like pair, the vision half."""
    config = AutoConfig.from_pretrained(vision, **kwargs)
    return getattr(config, "vision_config", config)


def compose(
    model_class: type[PreTrainedModel],
    vision: str,
    language: str,
    *,
    dtype: str | torch.dtype = "auto",
    gguf_file: str | None = None,
    **config_overrides,
) -> PreTrainedModel:
    """
    A new LLaVA: pretrained tower, pretrained language model, an untrained projector between them. The tokenizer's new tokens (the
    image token, a pad token where there is none) get rows in the embedding matrix and the head, which are padded to a multiple of 64;
    a new row is the mean of the old ones.

    Args:
        model_class (`type`): [`LlavaForConditionalGeneration`].
        vision (`str`): Folder or Hub name of a CLIP- or SigLIP-like model (the pair, or the tower alone).
        language (`str`):
            Folder or Hub name of any causal language model of transformers; or a path to a `.gguf` file, whose weights are read
            without its quantization.
        dtype (`str` or `torch.dtype`, *optional*, defaults to `"auto"`):
            Of all weights; `"auto"` takes the language model's.
        gguf_file (`str`, *optional*): Name of the GGUF file inside `language`.
        config_overrides: Fields of [`LlavaConfig`], such as `vision_feature_layer=-1` or `projector_num_layers=1`.

    Raises:
        ValueError: a field that [`LlavaConfig`] does not have; a language model whose head does what a `llava` checkpoint cannot
            hold (a bias, scaled or capped logits); a tower without a fixed square image size.
    """
    unknown = sorted(set(config_overrides) - set(LlavaConfig.__dataclass_fields__))
    if unknown:
        raise ValueError(f"LlavaConfig has no field {', '.join(unknown)}.")

    language, gguf_file = split_gguf_path(language, gguf_file)
    gguf = {"gguf_file": gguf_file} if gguf_file else {}
    causal_lm = _load(AutoModelForCausalLM, language, dtype=dtype, **gguf)
    dtype = causal_lm.dtype
    tower_config = vision_tower_config(vision)
    vision_tower = _load(AutoModel, vision, config=tower_config, dtype=dtype)
    tokenizer = load_tokenizer(language, **gguf)
    num_known_tokens = len(tokenizer)
    add_image_token(tokenizer)

    text_config = causal_lm.config
    if hasattr(text_config, "quantization_config"):
        del text_config.quantization_config  # GGUF: the weights are plain tensors here, only the label says otherwise
    if text_config.tie_word_embeddings and not hasattr(causal_lm.base_model, "embed_tokens"):
        _untie(causal_lm)
    num_additional = count_additional_image_tokens(tower_config)
    config_overrides.setdefault("vision_feature_select_strategy", "default" if num_additional else "full")
    if config_overrides.get("projector_num_layers") == 1:
        config_overrides.setdefault("projector_hidden_act", "linear")
    image_size, patch_size = tower_config.image_size, tower_config.patch_size
    config = LlavaConfig(
        vision_config=tower_config,
        text_config=text_config,
        **{
            "image_token_index": tokenizer.convert_tokens_to_ids(tokenizer.image_token),
            "image_seq_length": count_image_tokens(
                image_size, image_size, patch_size, num_additional, config_overrides["vision_feature_select_strategy"]
            ),
            "tie_word_embeddings": bool(text_config.tie_word_embeddings),
            **config_overrides,
        },
    )
    config.dtype = dtype

    model = _assemble(model_class, config, vision_tower, causal_lm)
    _check_head(model, causal_lm)
    _make_rows(model, num_known_tokens, len(tokenizer))
    model.generation_config = causal_lm.generation_config
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    drop_unused_sampling(model.generation_config)
    return model.eval()


def _load(auto_class, name: str, **kwargs) -> PreTrainedModel:
    """`from_pretrained`, which would take random weights for those that another model's checkpoint does not hold."""
    if os.path.isdir(name) and is_original(config := read_config(Path(name, "config.json")) or {}):
        raise ValueError(other_than_llava(name, config))
    with explained(name):
        model, info = auto_class.from_pretrained(name, output_loading_info=True, **kwargs)
    if missing := sorted(info["missing_keys"]):
        raise ValueError(
            f"{name} does not hold a whole {type(model).__name__}: {len(missing)} of its weights are missing, such as "
            f"{missing[0]}. A LLaVA is not made of another one: give the model that it was made of."
        )
    return model


def split_gguf_path(language: str, gguf_file: str | None = None) -> tuple[str, str | None]:
    """`folder/file.gguf` → (`folder`, `file.gguf`); anything else is returned as it is."""
    path = Path(language)
    if gguf_file is None and path.suffix == ".gguf":
        if not path.is_file():
            raise FileNotFoundError(
                f"{language} does not exist. Give the path of a .gguf file, a folder or a Hub name."
            )
        return str(path.parent), path.name
    return language, gguf_file


def _untie(causal_lm):
    """Give the head a matrix of its own: a llava checkpoint ties by the name `embed_tokens` only (GPT-2's is `wte`)."""
    head = causal_lm.get_output_embeddings()
    head.weight = torch.nn.Parameter(head.weight.detach().clone())
    causal_lm.config.tie_word_embeddings = False


def _assemble(model_class, config, vision_tower, causal_lm):
    """Put the two loaded models into a LLaVA that was made without memory; only the projector is initialised."""
    with torch.device("meta"):
        model = model_class(config)
    head = causal_lm.get_output_embeddings()
    if head is None or getattr(head, "bias", None) is not None:
        raise ValueError(
            f"The head of {type(causal_lm).__name__} is missing or has a bias, which a llava checkpoint cannot hold."
        )
    model.model.vision_tower = vision_tower
    model.model.prepare_for_compile()
    model.model.language_model = causal_lm.base_model
    model.lm_head = head
    projector = model.model.multi_modal_projector.to_empty(device=causal_lm.device).to(causal_lm.dtype)
    for module in projector.modules():
        model._init_weights(module)
    model.tie_weights()
    return model


@torch.no_grad()
def _check_head(model, causal_lm):
    """The language model alone and inside LLaVA must give the same logits, before its vocabulary grows."""
    # 8 ordinary ids; a head that scales its logits shows on any input, one that caps them on large ones
    ids = torch.arange(8, device=causal_lm.device)[None] % causal_lm.config.vocab_size
    ids[ids == model.config.image_token_id] = 0
    enlarging = model.lm_head.register_forward_hook(lambda head, inputs, logits: logits.float() * 1e3)
    try:
        ours, alone = model(input_ids=ids).logits, causal_lm(input_ids=ids)
        theirs, _ = alone.logits.float(), getattr(alone, CACHE)  # which stock's LLaVA reads, be it None
    except AttributeError as error:  # a state-space model without a cache, a head that cannot be taken off
        raise ValueError(
            f"{type(causal_lm).__name__} cannot be the language model of a llava checkpoint, neither here nor in stock "
            f"transformers ({error}). Choose another language model."
        ) from error
    finally:
        enlarging.remove()
    difference = (ours - theirs).abs().max().item()
    if difference > 1e-2 * max(theirs.abs().max().item(), 1.0):
        raise ValueError(
            f"{type(causal_lm).__name__} scales or caps its logits, which a llava checkpoint cannot hold: inside LLaVA they differ by "
            f"{difference:.3g}. Choose another language model."
        )


@torch.no_grad()
def _make_rows(model, num_known_tokens: int, num_tokens: int):
    """Rows of the embedding matrix and the head for the new tokens, and for padding: the mean of the known rows."""
    old_rows = model.get_input_embeddings().weight.shape[0]
    rows = max(old_rows, num_tokens)
    if rows > old_rows or rows % VOCABULARY_MULTIPLE:
        model.resize_token_embeddings(rows, pad_to_multiple_of=VOCABULARY_MULTIPLE, mean_resizing=False)
    known = min(old_rows, num_known_tokens)
    embedding, head = model.get_input_embeddings().weight, model.lm_head.weight
    for matrix in [embedding] if head is embedding else [embedding, head]:
        matrix[known:] = matrix[:known].float().mean(dim=0).to(matrix.dtype)
    logger.info("The vocabulary has %d rows, %d of them new.", embedding.shape[0], embedding.shape[0] - known)


__all__ = ["compose", "split_gguf_path", "vision_tower_config"]
