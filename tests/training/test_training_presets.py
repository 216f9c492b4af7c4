"""Presets for GPUs of 8 to 24 GB: what they say fits is estimated to fit."""

import pytest

from modeling_llava.training import preset_names, read_recipe
from modeling_llava.training.estimate import GIB, Settings, estimate, load_config, sizes_of
from modeling_llava.training.recipes import PRESETS, parse_recipe


FITTING = [(8, "7b"), (12, "7b"), (12, "13b"), (16, "7b"), (16, "13b"), (24, "7b"), (24, "13b")]


def estimated_gib(gpu, size, checkpointing=True):
    settings = Settings(**read_recipe(f"qlora-{gpu}gb") | {"activation_checkpointing": checkpointing})
    return estimate(sizes_of(load_config(f"llava-hf/llava-1.5-{size}-hf")), settings).total / GIB


@pytest.mark.parametrize("gpu, size", FITTING)
def test_preset_fits_its_gpu_with_room_and_says_how_much_it_takes(gpu, size):
    total = estimated_gib(gpu, size)
    assert total < 0.95 * gpu
    assert f"{total:.1f} GiB" in (PRESETS / f"qlora-{gpu}gb.yaml").read_text()


@pytest.mark.parametrize("gpu, fits", [(8, False), (12, True)])
def test_13b_offloads_on_12_gb_and_does_not_fit_8_and_the_presets_say_so(gpu, fits):
    total, words = estimated_gib(gpu, "13b", "offload"), (PRESETS / f"qlora-{gpu}gb.yaml").read_text()
    assert (total < 0.9 * gpu) == fits != ("13B does not fit" in words)
    assert f"{total:.1f} GiB" in words


@pytest.mark.parametrize("name", preset_names())
def test_presets_leave_the_speed_to_the_memory_and_the_papers_numbers_alone(name):
    recipe = read_recipe(name)
    assert recipe["activation_checkpointing"] == "auto"
    for_one_gpu = name.startswith("qlora")
    assert recipe.get("packing", "auto") == ("auto_full" if for_one_gpu else "auto")
    assert recipe.get("lora_dropout", 0.05) == (0 if for_one_gpu else 0.05)


@pytest.mark.parametrize("projector, rate", [("full", 2e-5), ("lora", 2e-4), ("frozen", 2e-4)])
def test_preset_leaves_the_projector_to_train_projector(projector, rate, tmp_path):
    args = parse_recipe("lora", ["model=m", "data=d", f"output_dir={tmp_path}", f"train_projector={projector}"])
    assert args.learning_rates()["multi_modal_projector"] == rate
