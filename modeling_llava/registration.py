"""
Make transformers' Auto classes, pipelines and checkpoint loading use our classes for `model_type` "llava".

It is done once, when `modeling_llava` is imported. Each step answers one way in which transformers would otherwise go
past our classes, some of them without a word (measured on transformers 5.23).
"""

from transformers import AutoConfig, AutoModel, AutoModelForImageTextToText, AutoModelForPreTraining, AutoProcessor
from transformers.conversion_mapping import get_checkpoint_conversion_mapping, register_checkpoint_conversion_mapping
from transformers.models.auto.image_processing_auto import IMAGE_PROCESSOR_MAPPING
from transformers.models.auto.modeling_auto import AutoModelForMultimodalLM
from transformers.models.auto.processing_auto import PROCESSOR_MAPPING_NAMES

from .configuration_llava import LlavaConfig
from .image_processing_llava import LlavaImageProcessor
from .kernels import packed_attention as attention  # noqa: F401  (registers "varlen", also for `attn_implementation={"text_config": "varlen"}`)
from .modeling_llava import LlavaForConditionalGeneration, LlavaModel
from .processing_llava import LlavaProcessor


def register_auto_classes() -> None:
    """Register our configuration, models, processor and image processor in place of the stock ones. Idempotent."""
    AutoConfig.register("llava", LlavaConfig, exist_ok=True)
    AutoModel.register(LlavaConfig, LlavaModel, exist_ok=True)
    AutoModelForImageTextToText.register(LlavaConfig, LlavaForConditionalGeneration, exist_ok=True)
    AutoModelForPreTraining.register(LlavaConfig, LlavaForConditionalGeneration, exist_ok=True)
    AutoModelForMultimodalLM.register(LlavaConfig, LlavaForConditionalGeneration, exist_ok=True)
    AutoProcessor.register(LlavaConfig, LlavaProcessor, exist_ok=True)
    # Not by AutoImageProcessor.register: it would import the stock class first, which warns that torchvision is absent.
    IMAGE_PROCESSOR_MAPPING.register(
        LlavaConfig, {"torchvision": LlavaImageProcessor, "pil": LlavaImageProcessor}, exist_ok=True
    )
    # AutoProcessor and the pipelines look a class up by its stock name first.
    PROCESSOR_MAPPING_NAMES.pop("llava", None)
    # Saved keys are the stock ones (`language_model.model.…`), but transformers maps them for classes of its own
    # package only: without this a stock checkpoint loads with a random language model, and no exception.
    for name in ("llava", "LlavaModel"):
        mapping = get_checkpoint_conversion_mapping(name)
        if mapping is not None:
            register_checkpoint_conversion_mapping(name, mapping, overwrite=True)


__all__ = ["register_auto_classes"]
