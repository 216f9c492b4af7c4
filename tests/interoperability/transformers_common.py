"""transformers' own common tests over a LLaVA class: run by test_interop_transformers_common.py, once for ours and once for stock."""

# ruff: noqa: E402  (what the source package lacks is put in place before its tests are imported)

import os
import sys
import types
import unittest


for name, mixin in (
    ("exporters.test_export", "ExportTesterMixin"),
    ("generation.test_utils", "GenerationTesterMixin"),
):
    module = types.ModuleType(f"tests.{name}")  # not in the source package: generation has tests of ours
    setattr(module, mixin, type(mixin, (), {}))
    sys.modules[f"tests.{name.split('.')[0]}"] = types.ModuleType(f"tests.{name.split('.')[0]}")
    sys.modules[f"tests.{name}"] = module

hub_objects = sys.modules["fetch_hub_objects_for_ci"] = types.ModuleType("fetch_hub_objects_for_ci")
hub_objects.url_to_local_path = lambda url: os.environ["LLAVA_IMAGE"]

from tests.test_modeling_common import ModelTesterMixin, floats_tensor, ids_tensor
from tests.test_processing_common import ProcessorTesterMixin
from transformers import CLIPVisionConfig, LlamaConfig


IS_OURS = os.environ["LLAVA_UNDER_TEST"] == "ours"
if IS_OURS:
    from modeling_llava import LlavaConfig, LlavaForConditionalGeneration, LlavaModel, LlavaProcessor
else:
    from transformers import LlavaConfig, LlavaForConditionalGeneration, LlavaModel, LlavaProcessor

IMAGE_TOKEN, PATCHES = 1, 16


class LlavaTester:
    """A LLaVA of 2 layers each: 8×8 pixels in patches of 2, 16 image tokens in front of 7 of text."""

    batch_size, seq_length, is_training = 3, 7 + PATCHES, True
    hidden_size, num_hidden_layers, num_attention_heads = 32, 2, 4

    def __init__(self, parent):
        self.parent = parent

    def get_config(self):
        sizes = {"hidden_size": 32, "intermediate_size": 37, "num_hidden_layers": 2, "num_attention_heads": 4}
        return LlavaConfig(
            text_config=LlamaConfig(vocab_size=99, max_position_embeddings=580, pad_token_id=0, **sizes),
            vision_config=CLIPVisionConfig(image_size=8, patch_size=2, projection_dim=32, **sizes),
            image_token_index=IMAGE_TOKEN,
            vision_feature_select_strategy="default",
            vision_feature_layer=-1,
            image_seq_length=PATCHES,
        )

    def prepare_config_and_inputs_for_common(self):
        config = self.get_config()
        input_ids = ids_tensor([self.batch_size, self.seq_length], config.text_config.vocab_size - 2) + 2
        input_ids[:, :PATCHES] = IMAGE_TOKEN
        inputs = {
            "pixel_values": floats_tensor([self.batch_size, 3, 8, 8]),
            "input_ids": input_ids,
            "attention_mask": input_ids.ne(0),
        }
        return config, inputs


class ModelTest(ModelTesterMixin, unittest.TestCase):
    all_model_classes = (LlavaModel, LlavaForConditionalGeneration)
    _is_composite = True

    def setUp(self):
        self.model_tester = LlavaTester(self)


class ProcessorTest(ProcessorTesterMixin, unittest.TestCase):
    processor_class = LlavaProcessor
    model_id = os.environ["LLAVA_FOLDER"]
    images_text_kwargs_max_length, images_text_kwargs_override_max_length = 700, 690
    images_unstructured_max_length, chat_template_max_length = 700, 700

    @staticmethod
    def prepare_processor_dict():
        return {}
