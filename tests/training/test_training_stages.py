"""What each stage trains, in which dtype, with which learning rate."""

import pytest
import torch
import transformers
from rich.console import Console
from tiny import tiny_batch, tiny_config, tiny_vision_config

from modeling_llava import LlavaForConditionalGeneration
from modeling_llava.io.checkpoints import component_of
from modeling_llava.training import LlavaTrainer, LlavaTrainingArguments
from modeling_llava.training.callbacks import component_table
from modeling_llava.training.setup import cast_weights, set_dtypes, set_trainable, unused_tower_parameters


MODELS = {"ours": LlavaForConditionalGeneration, "stock": transformers.LlavaForConditionalGeneration}


def arguments(tmp_path, **settings):
    return LlavaTrainingArguments(str(tmp_path), report_to="none", **settings)


@pytest.fixture(params=MODELS)
def model(request):
    torch.manual_seed(0)
    return MODELS[request.param](tiny_config())


def trained_components(model):
    return {component_of(name) for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"stage": "pretrain"}, {"multi_modal_projector"}),
        ({"stage": "finetune"}, {"multi_modal_projector", "language_model"}),
        ({"stage": "pretrain", "train_vision_tower": True}, {"multi_modal_projector", "vision_tower"}),
        ({"train_vision_tower": True}, {"multi_modal_projector", "language_model", "vision_tower"}),
    ],
)
def test_stage_decides_what_is_trained(model, tmp_path, settings, expected):
    set_trainable(model, arguments(tmp_path, **settings))
    assert trained_components(model) == expected
    if "language_model" in expected:
        assert model.lm_head.weight.requires_grad and model.get_input_embeddings().weight.requires_grad


@pytest.mark.parametrize("vision", ["clip_vision_model", "siglip_vision_model"])
@pytest.mark.parametrize("feature_layer", [-2, -1, 1, [-3, -2]])
def test_exactly_the_tower_parameters_without_gradient_count_as_unused(vision, feature_layer):
    strategy = "default" if vision.startswith("clip") else "full"
    model = LlavaForConditionalGeneration(
        tiny_config(
            vision=tiny_vision_config(vision),
            vision_feature_layer=feature_layer,
            vision_feature_select_strategy=strategy,
        )
    )
    model(**tiny_batch()).loss.backward()
    without_gradient = {name for name, p in model.model.vision_tower.named_parameters() if p.grad is None}
    unused = {id(p) for p in unused_tower_parameters(model)}
    assert {name for name, p in model.model.vision_tower.named_parameters() if id(p) in unused} == without_gradient


def test_trained_weights_are_float32_and_frozen_ones_16_bit(model, tmp_path):
    model.to(torch.float16)
    rotary = [b for name, b in model.named_buffers() if "inv_freq" in name]
    rotary[0].data = rotary[0].data.float()
    args = arguments(tmp_path, stage="pretrain", precision="bf16")
    set_trainable(model, args)
    before = model.model.multi_modal_projector.linear_1.weight.clone()
    set_dtypes(model, args)
    for name, parameter in model.named_parameters():
        expected = torch.float32 if component_of(name) == "multi_modal_projector" else torch.bfloat16
        assert parameter.dtype == expected, name
    # float16 → float32 directly: by way of bfloat16 it would lose three bits
    assert torch.equal(model.model.multi_modal_projector.linear_1.weight, before.float())
    assert rotary[0].dtype == torch.float32


def test_cast_weights_leaves_buffers_that_are_not_saved(model):
    rotary = next(b for name, b in model.named_buffers() if "inv_freq" in name)
    cast_weights(model, torch.bfloat16)
    assert rotary.dtype == torch.float32
    assert {t.dtype for t in model.state_dict().values() if t.is_floating_point()} == {torch.bfloat16}


def test_optimizer_has_a_group_per_component_and_no_decay_on_norms_and_biases(model, tmp_path):
    args = arguments(
        tmp_path,
        learning_rate=1e-5,
        projector_learning_rate=1e-3,
        vision_tower_learning_rate=2e-6,
        train_vision_tower=True,
        weight_decay=0.1,
        optim="adamw_torch",
    )
    trainer = LlavaTrainer(model, args, train_dataset=[0])
    optimizer = trainer.create_optimizer()
    names = {id(p): name for name, p in trainer.model.named_parameters()}
    rates = {"language_model": 1e-5, "multi_modal_projector": 1e-3, "vision_tower": 2e-6}
    seen = []
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            name = names[id(parameter)]
            seen.append(name)
            assert group["lr"] == rates[component_of(name)], name
            plain_matrix = name.endswith("weight") and "norm" not in name
            if plain_matrix or name.endswith("class_embedding"):
                assert group["weight_decay"] == 0.1, name
            else:
                assert group["weight_decay"] == 0.0, name
    assert sorted(seen) == sorted(n for n, p in trainer.model.named_parameters() if p.requires_grad)
    trainer.create_scheduler(10)
    assert trainer._get_learning_rate() == 0  # warm-up; of the first group:
    assert trainer.lr_scheduler.base_lrs[0] == 1e-5


def test_adapter_defaults_give_the_projector_its_own_rate(model, tmp_path):
    trainer = LlavaTrainer(model, arguments(tmp_path, adapter="lora", lora_r=2), train_dataset=[0])
    groups = {group["component"]: group["lr"] for group in trainer.create_optimizer().param_groups}
    assert groups == {"language_model": 2e-4, "multi_modal_projector": 2e-5}  # DESIGN §6, v1.5 LoRA


def test_table_counts_by_component(tmp_path):
    model = LlavaForConditionalGeneration(tiny_config())
    args = arguments(tmp_path, stage="pretrain")
    set_trainable(model, args)
    console = Console(record=True, width=120, file=open(tmp_path / "out", "w"))
    console.print(component_table(model, args))
    rows = {line.split()[1]: line for line in console.export_text().splitlines() if len(line.split()) > 5}
    # linear_1: 32 × 64 + 64, linear_2: 64 × 64 + 64
    assert "6,272" in rows["multi_modal_projector"] and "0.001" in rows["multi_modal_projector"]
    assert "frozen" in rows["vision_tower"] and "frozen" in rows["language_model"]
    assert f"{model.num_parameters():,}" in rows["all"]
