"""Recipes: bases, overrides, two rules of YAML 1.1, and errors that suggest the nearest name."""

import dataclasses
import re

import pytest
import yaml

from modeling_llava.training import LlavaTrainingArguments, parse_recipe, preset_names, read_recipe
from modeling_llava.training.recipes import write_recipe


@pytest.fixture
def recipe(tmp_path):
    def write(name="recipe.yaml", **settings):
        (tmp_path / name).write_text(yaml.safe_dump(settings))
        return str(tmp_path / name)

    return write


def test_numbers_are_those_of_yaml_1_2_and_no_is_text_where_text_is_expected(tmp_path):
    path = tmp_path / "r.yaml"
    path.write_text("learning_rate: 2e-5\nmax_steps: 010\nweight_decay: 0\neval_strategy: no\nbf16: no\nfsdp: true\n")
    assert yaml.safe_load(path.read_text())["learning_rate"] == "2e-5"  # YAML 1.1, in which 010 is 8
    numbers = {"learning_rate": 2e-5, "max_steps": 10, "weight_decay": 0.0, "adam_epsilon": 1e-6}
    expected = {**numbers, "lr_scheduler_kwargs": {"min_lr": 1e-6}, "eval_strategy": "no", "bf16": False, "fsdp": True}
    assert read_recipe(path, ["adam_epsilon=1e-6", "lr_scheduler_kwargs.min_lr=1e-6"]) == expected


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


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("learning_rate", "fast", "should be a number or nothing"),
        ("lora_r", 2.5, "should be a whole number"),
        ("train_vision_tower", "maybe", "should be true or false"),
        ("stage", 3, "should be text"),
        ("packing", True, "should be text: one of auto, auto_full, none, batch, full"),
        ("max_length", None, "should be a whole number"),
        ("only_types", 3, "should be a list of texts or nothing"),
        ("lora_target", [1, 2], "should be a list of texts or nothing or text"),
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
    for override, what in (
        ("--lora_r", "not of the form key=value"), ("lora_rr=3", "Did you mean 'lora_r'"), ("seed=[", "is not YAML"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=what):
            read_recipe(recipe(), [override])
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
        ("packing: padded", "packing='padded' is not one of auto, auto_full, none, batch, full"),
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
