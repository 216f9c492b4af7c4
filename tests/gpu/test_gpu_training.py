"""`llava train` on a GPU: every preset from start to end, its memory against the estimate, precision, waits, workers."""

import gc
import json
import math
import warnings

import pytest
import torch
from tiny_predictor import tiny_processor
from transformers import LlamaConfig, TrainerCallback

from modeling_llava import LlavaConfig, LlavaForConditionalGeneration
from modeling_llava.cli.main import main
from modeling_llava.evaluation.callback import SampleAnswersCallback
from modeling_llava.training import preset_names, read_recipe, train
from modeling_llava.training.estimate import (
    CUDA_CONTEXT,
    GIB,
    Settings,
    available_memory,
    estimate,
    load_config,
    sizes_of,
)


def words(settings, preset, **changes):
    fixed = {
        "max_steps": 4, "global_batch_size": 4, "per_device_train_batch_size": 2, "save_steps": 2, "logging_steps": 1,
        "dataloader_num_workers": 0,
    }  # fmt: skip
    kept = {name: value for name, value in settings.items() if name not in ("disable_tqdm", "dataloader_pin_memory")}
    evaluates = {"eval_size": 4, "eval_strategy": "steps", "eval_steps": 2, "sample_answers": 2}
    return ["train", preset, *(f"{name}={value}" for name, value in {**kept, **fixed, **evaluates, **changes}.items())]


class Killed(TrainerCallback):
    """Stands for a run that is killed after its third step."""

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 3:
            raise KeyboardInterrupt


@pytest.mark.parametrize("preset", preset_names())
def test_every_preset_trains_evaluates_and_resumes(preset, settings, monkeypatch, tmp_path, capsys):
    command = words(settings, preset)
    with monkeypatch.context() as patch:
        patch.setattr("modeling_llava.cli.train._callbacks", lambda settings: [Killed()])
        assert main(command) == 130
    assert main(command) == 0
    assert "in 4 steps" in capsys.readouterr().out
    state = json.loads((tmp_path / "run" / "trainer_state.json").read_text())
    losses = [entry[name] for entry in state["log_history"] for name in ("loss", "eval_loss") if name in entry]
    assert len(losses) >= 6 and all(math.isfinite(loss) for loss in losses)
    assert (tmp_path / "run" / "sample_answers" / "step-4.html").is_file()


@pytest.mark.parametrize("adapter", ["none", "lora", "qlora"])
def test_fp16_trains(adapter, settings):
    history = train({**settings, "adapter": adapter, "precision": "fp16", "max_steps": 10}).log_history
    losses = [entry["loss"] for entry in history if "loss" in entry]
    assert math.isfinite(losses[-1]) and losses[-1] < losses[0]


def test_workers_that_are_spawned(settings):
    spawned = {"dataloader_num_workers": 2, "dataloader_multiprocessing_context": "spawn", "eval_size": 4}
    assert "eval_loss" in train({**settings, **spawned}).metrics


class Waits(TrainerCallback):
    """Counts where the host waits for the device, from the third step on."""

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == 2:
            torch.cuda.set_sync_debug_mode("warn")

    def on_train_end(self, args, state, control, **kwargs):
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("adapter", ["lora", "qlora"])
def test_only_optimizer_steps_wait_for_the_device(adapter, settings):
    recipe = {
        **settings,
        "adapter": adapter,
        "max_steps": 4,
        "gradient_accumulation_steps": 4,
        "logging_steps": 100,
        "save_strategy": "no",
    }
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        train({**recipe, "dataloader_pin_memory": True, "per_device_train_batch_size": 1}, callbacks=[Waits()])
    waits = [f"{w.filename}:{w.lineno}" for w in caught if "synchroniz" in str(w.message)]
    assert len(waits) <= 2 * 4, "\n".join(sorted(waits))  # of two optimizer steps with four micro-batches each


LAYERS = 4


@pytest.fixture(scope="module")
def wide_model(tmp_path_factory):
    """As wide as LLaVA-1.5-7B, whose tower is the default, four layers deep, random."""
    folder = tmp_path_factory.mktemp("wide") / "model"
    processor = tiny_processor(side=336)
    text = LlamaConfig(vocab_size=32064, num_hidden_layers=LAYERS)
    config = LlavaConfig(text_config=text, image_token_index=processor.image_token_id)
    with torch.device("cuda"):
        LlavaForConditionalGeneration(config).to(torch.float16).save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


@pytest.fixture
def long_rows(tmp_path, instructions):
    """Rows that fill max_length, with an image each."""
    rows = json.loads(instructions.read_text())
    rows = [row for row in rows if "image" in row]
    for row in rows:
        row["conversations"][1]["value"] = "quite " * 2000
    path = tmp_path / "long.json"
    path.write_text(json.dumps(rows))
    return path


# what `auto` takes for 7B on the card of the preset, and for 13B on one of 12 GB
CHECKPOINTED = [("8gb", "on"), ("12gb", "every_second"), ("12gb", "offload"), ("16gb", "off"), ("24gb", "off")]


@pytest.mark.parametrize("card, checkpointing", CHECKPOINTED)
def test_peak_is_within_10_percent_of_the_estimate(card, checkpointing, wide_model, long_rows, instructions, tmp_path):
    """Under a cap that stands for the card: training, evaluation, answers, saving and resuming."""
    from bitsandbytes.optim import GlobalOptimManager

    recipe = read_recipe(f"qlora-{card}") | {
        "model": str(wide_model), "data": str(long_rows), "image_folder": str(instructions.parent), "eval_size": 2,
        "output_dir": str(tmp_path / "run"), "save_steps": 1, "global_batch_size": None, "sample_answers": 1,
        "gradient_accumulation_steps": 2, "activation_checkpointing": checkpointing, "dataloader_num_workers": 0,
        "report_to": "none", "preview_samples": 0, "eval_strategy": "steps", "eval_steps": 1,
    }  # fmt: skip
    value = {"on": True, "off": False}.get(checkpointing, checkpointing)
    settings = Settings(**recipe | {"activation_checkpointing": value, "supervised": 0.7, "images": 1})
    estimated = estimate(sizes_of(load_config(str(wide_model))), settings).total - CUDA_CONTEXT
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    torch.cuda.set_per_process_memory_fraction(1.1 * estimated / torch.cuda.get_device_properties(0).total_memory)
    for max_steps in (2, 3):  # then it resumes
        train(recipe | {"max_steps": max_steps}, callbacks=[SampleAnswersCallback(1)])
        GlobalOptimManager.get_instance().module_weight_config_triple.clear()  # it keeps the embeddings of every model
        gc.collect()
        torch.cuda.empty_cache()
    reserved = torch.cuda.max_memory_reserved()
    assert reserved == pytest.approx(estimated, rel=0.1), f"{reserved / GIB:.2f} GiB"


def test_memory_is_within_the_share_of_the_process():
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction(0.1)
    assert available_memory(torch.device("cuda", 0)) <= 0.1 * total + 1
