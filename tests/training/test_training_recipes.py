"""Recipes: bases, overrides, two rules of YAML 1.1, and errors that suggest the nearest name."""

import dataclasses
import re

import pytest
import yaml

from modeling_llava.training import LlavaTrainingArguments, parse_recipe, preset_names, read_recipe
from modeling_llava.training.arguments import describe_settings
from modeling_llava.training.recipes import write_recipe


@pytest.fixture
def recipe(tmp_path):
    def write(name="recipe.yaml", **settings):
        (tmp_path / name).write_text(yaml.safe_dump(settings))
        return str(tmp_path / name)

    return write


def test_numbers_without_a_dot_are_numbers(recipe, tmp_path):
    path = tmp_path / "r.yaml"
    path.write_text("learning_rate: 2e-5\nmax_steps: 3\nweight_decay: 0\n")
    assert yaml.safe_load(path.read_text())["learning_rate"] == "2e-5"  # YAML 1.1
    assert read_recipe(path, ["adam_epsilon=1e-6"]) == {
        "learning_rate": 2e-5,
        "max_steps": 3,
        "weight_decay": 0.0,
        "adam_epsilon": 1e-6,
    }


def test_no_is_text_where_text_is_expected(tmp_path):
    path = tmp_path / "r.yaml"
    path.write_text("eval_strategy: no\nsave_strategy: no\nbf16: no\n")
    assert read_recipe(path) == {"eval_strategy": "no", "save_strategy": "no", "bf16": False}


def test_later_wins_base_recipe_command_line(recipe):
    base = recipe("base.yaml", lora_r=8, lora_alpha=16, seed=1)
    child = recipe("child.yaml", base="base.yaml", lora_r=32, seed=2)
    assert read_recipe(child, ["seed=3"]) == {"lora_r": 32, "lora_alpha": 16, "seed": 3}
    assert read_recipe(base)["lora_r"] == 8


def test_a_base_may_be_a_preset_of_the_package(recipe):
    settings = read_recipe(recipe(base="qlora", lora_r=16))
    assert (settings["adapter"], settings["lora_r"], settings["stage"]) == ("qlora", 16, "finetune")
    assert {"pretrain", "finetune", "lora", "qlora"} <= set(preset_names())


def test_circular_bases_are_an_error(recipe):
    recipe("a.yaml", base="b.yaml")
    with pytest.raises(ValueError, match="its own base"):
        read_recipe(recipe("b.yaml", base="a.yaml"))


@pytest.mark.parametrize("where", ["recipe", "command line"])
def test_unknown_key_proposes_the_nearest(recipe, where):
    with pytest.raises(ValueError, match="no setting 'learning_rte'. Did you mean 'learning_rate'"):
        if where == "recipe":
            read_recipe(recipe(learning_rte=1e-4))
        else:
            read_recipe(recipe(), ["learning_rte=1e-4"])


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("learning_rate", "fast", "should be a number or nothing"),
        ("lora_r", 2.5, "should be a whole number"),
        ("train_vision_tower", "maybe", "should be true or false"),
        ("stage", 3, "should be text"),
        ("packing", True, "should be text: one of auto, none, batch, full"),
        ("max_length", None, "should be a whole number"),
        ("only_types", 3, "should be a list or nothing"),
    ],
)
def test_wrong_type_is_named(recipe, key, value, message):
    with pytest.raises(TypeError, match=message):
        read_recipe(recipe(**{key: value}))


def test_lists_and_entries_of_mappings_from_the_command_line(recipe):
    path = recipe(type_weights={"conversation": 1, "detail": 1})
    settings = read_recipe(path, ["only_types=conversation,detail", "type_weights.detail=2"])
    assert settings["only_types"] == ["conversation", "detail"]
    assert settings["type_weights"] == {"conversation": 1, "detail": 2}


def test_typed_mistakes_are_errors_of_one_line(recipe, tmp_path):
    with pytest.raises(FileNotFoundError, match="Did you mean 'qlora'"):
        read_recipe("qlra")
    with pytest.raises(ValueError, match="not of the form key=value"):
        read_recipe(recipe(), ["--lora_r"])
    (tmp_path / "list.yaml").write_text("- a\n")
    with pytest.raises(ValueError, match="holds a list"):
        read_recipe(tmp_path / "list.yaml")
    (tmp_path / "broken.yaml").write_text("a: [")
    with pytest.raises(ValueError, match="is not YAML") as raised:
        read_recipe(tmp_path / "broken.yaml")
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("lr: 1e-4", "no setting 'lr'. Here it is learning_rate"),  # the nearest by letters is lora_r
        ("lora_enable: true", "Here it is adapter: lora"),
        ("learnig_rate: 1e-4", "Did you mean 'learning_rate'"),
        ("adapter: LoRA", "adapter='LoRA' is not one of none, lora, qlora. Did you mean 'lora'"),
        ("packing: padded", "packing='padded' is not one of auto, none, batch, full"),
        ("lora_r: 4\nlora_r: 8", "the key 'lora_r' occurs twice"),
    ],
)
def test_a_mistake_in_a_recipe_says_what_was_meant(tmp_path, line, message):
    (tmp_path / "recipe.yaml").write_text(line)
    with pytest.raises(ValueError, match=re.escape(message)):
        read_recipe(tmp_path / "recipe.yaml")


def test_a_choice_of_transformers_may_be_left_empty(recipe):
    """`null` is the default of these; their choices stand in the field's metadata, as those of our settings do."""
    assert read_recipe(recipe(), ["ddp_backend=null"]) == {"ddp_backend": None}
    with pytest.raises(ValueError, match="Did you mean 'nccl'"):
        read_recipe(recipe(), ["ddp_backend=ncl"])


def test_fsdp_can_be_switched_on_in_a_recipe(recipe):
    assert read_recipe(recipe(), ["fsdp=true"])["fsdp"] is True


def test_every_setting_has_a_help_text():
    for field in dataclasses.fields(LlavaTrainingArguments):
        assert field.metadata.get("help"), field.name
    assert len(describe_settings()) > 30


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"stage": "pretrane"}, "not one of pretrain, finetune"),
        ({"stage": "pretrain", "adapter": "lora"}, "adapter=none"),
        ({"use_dora": True}, "no effect with adapter=none"),
        ({"vision_tower_learning_rate": 1e-6}, "train_vision_tower=true"),
        ({"eval_data": "a.json", "eval_size": 0.1}, "Keep one"),
        ({"streaming": True}, "Set max_steps"),
        ({"streaming": True, "max_steps": 3, "type_weights": {"a": 1}}, "Set streaming=false"),
        ({"type_weights": {"a": -1}}, "at least 0"),
        ({"type_weights": {"a": 0}}, "above 0"),
        ({"type_weights": {"a": 1}, "only_types": ["b"]}, "excludes"),
        ({"remove_unused_columns": True}, "Leave it out"),
        ({"global_batch_size": 8, "gradient_accumulation_steps": 2}, "Keep one"),
        ({"global_batch_size": 9, "per_device_train_batch_size": 2}, "not a multiple of 2 samples"),
        ({"early_stopping_patience": 2}, "eval_strategy=steps"),
        ({"load_best_model_at_end": True, "save_strategy": "no"}, "load_best_model_at_end.*eval_strategy=steps"),
        ({"save_strategy": "best", "metric_for_best_model": "loss"}, "save_strategy=best.*eval_strategy=steps"),
        ({"early_stopping_patience": 2, "eval_size": 0.1}, "early_stopping_patience.*eval_strategy=steps"),
        ({"global_batch_size": 8, "auto_find_batch_size": True}, "auto_find_batch_size.*global_batch_size.*Keep one"),
        ({"precision": "fp32", "bf16": True}, "contradicts bf16"),
        ({"trained_dtype": "bfloat16", "precision": "fp32"}, "trained_dtype=bfloat16 requires precision=bf16"),
        ({"precision": "fp16", "use_cpu": True}, "needs a GPU"),
        (
            {"lr_scheduler_type": "warmup_stable_decay"},
            "num_decay_steps.* lr_scheduler_kwargs can hold: num_decay_steps",
        ),
        ({"lr_scheduler_type": "cosine_with_min_lr"}, "lr_scheduler_kwargs can hold: .*min_lr_rate"),
        ({"lr_scheduler_kwargs": {"cycles": 2}}, "cycles.* lr_scheduler_kwargs can hold: num_cycles"),
        ({"optim": "lomo", "projector_learning_rate": 0.0}, "lomo.*ignores projector_learning_rate=0"),
        ({"optim": "adalomo", "adapter": "lora"}, "adalomo.*ignores projector_learning_rate=2e-05"),
        (
            {"optim": "apollo_adamw", "train_vision_tower": True, "vision_tower_learning_rate": 2e-6},
            "apollo.*ignores vision_tower_learning_rate=2e-06",
        ),
        ({"lora_target": "(", "adapter": "lora"}, "not a regular expression"),
        ({"max_length": 0}, "at least 1"),
        ({"lora_dropout": 1.0}, r"not in \[0, 1\)"),
        ({"overflow": "cut"}, "error, drop, truncate_text"),
        ({"train_sampling_strategy": "grouped"}, "not one of random, sequential, group_by_length"),
        ({"train_sampling_strategy": "batch_rebalance", "data": "a.json"}, "Take group_by_length"),
        ({"per_device_train_batch_size": 0}, "at least 1"),
        ({"global_batch_size": 0}, "global_batch_size=0: at least 1"),
        ({"learning_rate": -1e-4}, "below 0"),
        ({"num_train_epochs": 0}, "above 0"),
        ({"eval_strategy": "steps", "eval_steps": 5, "data": "a.json"}, "Set eval_size or eval_data"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(tmp_path, settings, message):
    with pytest.raises(ValueError, match=message):
        LlavaTrainingArguments(str(tmp_path), **settings)


def test_defaults_follow_stage_and_adapter(tmp_path):
    def rate(**settings):
        return LlavaTrainingArguments(str(tmp_path), **settings).learning_rate

    # DESIGN §6: v1.5 pretrain, finetune and LoRA
    assert (rate(stage="pretrain"), rate(), rate(adapter="lora")) == (1e-3, 2e-5, 2e-4)
    args = LlavaTrainingArguments(str(tmp_path))
    assert (args.lr_scheduler_type, args.warmup_steps, args.weight_decay) == ("cosine", 0.03, 0.0)
    assert args.remove_unused_columns is False


def test_global_batch_size_sets_gradient_accumulation(tmp_path):
    args = LlavaTrainingArguments(str(tmp_path), global_batch_size=12, per_device_train_batch_size=4)
    assert args.gradient_accumulation_steps == 3 // args.world_size


def test_resolved_recipe_gives_the_same_arguments_again(tmp_path):
    args = LlavaTrainingArguments(
        str(tmp_path / "run"),
        data={"conversation": "a.json", "detail": "b.json"},
        type_weights={"conversation": 1, "detail": 2.5},
        lr_scheduler_type="linear",  # transformers' default, but not ours
        eval_strategy="steps",
        eval_size=0.1,
        global_batch_size=16,
        report_to="none",
        optim="adafactor",
        hub_token="secret",
        max_grad_norm=0.5,
        adapter="lora",
        lora_r=7,
    )
    write_recipe(args.to_recipe(), tmp_path / "recipe.yaml")
    again = parse_recipe(tmp_path / "recipe.yaml")
    for field in dataclasses.fields(args):
        if field.name not in ("hub_token", "accelerator_config", "logging_dir"):
            assert getattr(again, field.name) == getattr(args, field.name), field.name
    assert "secret" not in (tmp_path / "recipe.yaml").read_text()
    assert again.to_recipe() == args.to_recipe()


def test_reading_a_recipe_does_not_touch_the_disk_beyond_it(recipe, tmp_path):
    args = parse_recipe(recipe(output_dir=str(tmp_path / "run"), model="no/such-model", data="no.json"))
    assert args.model == "no/such-model"
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("cuda", "bfloat16", "expected"), [(True, True, "bf16"), (True, False, "fp16"), (False, False, "fp32")]
)
def test_precision_follows_the_device(monkeypatch, cuda, bfloat16, expected):
    """A Turing GPU says that it can do bfloat16, by emulation; it gets float16."""
    import torch

    from modeling_llava.training.arguments import best_precision

    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(
        torch.cuda, "is_bf16_supported", lambda including_emulation=True: bfloat16 or including_emulation
    )
    assert best_precision() == expected


def test_precision_sets_transformers_switches(tmp_path):
    def switches(**settings):
        args = LlavaTrainingArguments(str(tmp_path), use_cpu=True, **settings)
        return args.precision, args.bf16, args.fp16, str(args.compute_dtype)

    assert switches() == ("fp32", False, False, "torch.float32")
    assert switches(precision="bf16") == switches(bf16=True) == ("bf16", True, False, "torch.bfloat16")
    with pytest.raises(ValueError, match="precision=fp16 needs a GPU"):
        switches(fp16=True)
