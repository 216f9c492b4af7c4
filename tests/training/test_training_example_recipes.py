"""Every recipe under examples/: parsed, held against the papers' table, and run for two steps on a tiny model."""

from pathlib import Path

import pytest

from modeling_llava.training import read_recipe, train
from modeling_llava.training.recipes import PRESETS


ROOT = Path(__file__).parents[2] / "examples" / "recipes"
RECIPES = sorted(str(path.relative_to(ROOT)) for path in ROOT.rglob("*.yaml"))

# The table of the papers and released scripts: learning rate, global batch, epochs, stage.
PAPERS = {
    "llava-v1-{}/pretrain.yaml": (2e-3, 128, 1, "pretrain"),
    "llava-v1-{}/finetune.yaml": (2e-5, 32, 3, "finetune"),
    "llava-v1-{}/scienceqa.yaml": (2e-5, 128, 12, "finetune"),
    "llava-1.5-{}/pretrain.yaml": (1e-3, 256, 1, "pretrain"),
    "llava-1.5-{}/finetune.yaml": (2e-5, 128, 1, "finetune"),
    "llava-1.5-{}/lora.yaml": (2e-4, 128, 1, "finetune"),
}


@pytest.fixture(scope="module")
def projector(base_model, instructions, tmp_path_factory):
    folder = tmp_path_factory.mktemp("projector") / "run"
    train(
        {
            "model": str(base_model), "data": str(instructions), "image_folder": str(instructions.parent),
            "output_dir": str(folder), "stage": "pretrain", "max_steps": 1, "per_device_train_batch_size": 1,
            "disable_tqdm": True, "save_strategy": "no", "report_to": "none", "preview_samples": 0,
        }
    )  # fmt: skip
    return folder


@pytest.mark.parametrize("size", ["7b", "13b"])
@pytest.mark.parametrize("name", PAPERS)
def test_recipes_have_the_papers_settings(name, size):
    settings = read_recipe(ROOT / name.format(size))
    found = tuple(settings[key] for key in ("learning_rate", "global_batch_size", "num_train_epochs", "stage"))
    assert found == PAPERS[name]
    assert settings["activation_checkpointing"] == "auto" and settings["max_length"] == 2048
    assert size in settings["model"] and size in settings["output_dir"]
    if settings["stage"] == "finetune":
        assert size in settings["projector"]
    if "lora" in name:
        assert (settings["adapter"], settings["lora_r"], settings["lora_alpha"]) == ("lora", 128, 256)
        assert settings["projector_learning_rate"] == 2e-5
    if name.startswith("llava-v1") and "finetune" in name:
        assert settings["type_weights"] == {"conversation": 1, "detail": 1, "complex": 1}
        assert settings["first_turn_order"] == "random"


@pytest.mark.parametrize("name", [*RECIPES, *sorted(path.stem for path in PRESETS.glob("*.yaml"))])
def test_recipe_runs_two_steps_on_a_tiny_model(name, base_model, instructions, projector, tmp_path):
    recipe = str(ROOT / name) if name.endswith(".yaml") else name
    given = read_recipe(recipe)
    overrides = {
        "model": base_model, "data": instructions, "image_folder": instructions.parent, "output_dir": tmp_path / "run",
        "max_steps": 2, "per_device_train_batch_size": 1, "global_batch_size": 2, "dataloader_num_workers": 0,
        "logging_steps": 1, "save_strategy": "no", "disable_tqdm": "true", "preview_samples": 0,
    }  # fmt: skip
    if "projector" in given:
        overrides["projector"] = projector
    if "max_samples" in given:
        overrides["max_samples"] = 8
    if given.get("gradient_accumulation_steps", 1) != 1:
        overrides.pop("global_batch_size")
    result = train(recipe, [f"{key}={value}" for key, value in overrides.items()])
    kind = "projector" if given["stage"] == "pretrain" else "full"
    assert (result.global_step, result.kind) == (2, "adapter" if "adapter" in given else kind)
    assert all(entry["loss"] > 0 for entry in result.log_history if "loss" in entry)
