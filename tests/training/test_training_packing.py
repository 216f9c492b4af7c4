"""Packed training against padded training and against samples one by one: the same losses, gradients and weights."""

import json
import logging

import pytest
import torch
from PIL import Image
from tiny import tiny_config, tiny_text_config
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from modeling_llava import LlavaForConditionalGeneration
from modeling_llava.data import LlavaDataCollator, load_conversations
from modeling_llava.data.packing import PackedDataset
from modeling_llava.kernels.packed_attention import VARLEN, packed_attention_error
from modeling_llava.training import LlavaTrainingArguments, train
from modeling_llava.training.batches import resolve_packing
from modeling_llava.training.setup import core_model, load_model_and_processor, prepare_model


def losses(result):
    return [entry["loss"] for entry in result.log_history if "loss" in entry]


def grad_norms(result):
    return [entry["grad_norm"] for entry in result.log_history if "grad_norm" in entry]


KINDS = {
    "pretrain": {"stage": "pretrain", "chat_template": "plain"},
    "finetune": {},
    "tower": {"train_vision_tower": True},
    "lora": {"adapter": "lora", "lora_dropout": 0.0},
    "qlora": {"adapter": "qlora", "lora_dropout": 0.0},
}


def ready_model(settings, **changes):
    args = LlavaTrainingArguments(**{**settings, **changes})
    if args.adapter == "qlora":
        pytest.importorskip("bitsandbytes")
    model, processor = load_model_and_processor(args)
    torch.manual_seed(0)
    model = prepare_model(model, args)
    if args.adapter != "none":
        for name, parameter in model.named_parameters():  # LoRA starts at zero, where half of its gradients are zero
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.02)
    return model.train(), processor, args


def samples_with_everything(instructions):
    """Three images in one sample, one in several, none in others, an image that occurs twice."""
    dataset = load_conversations(str(instructions), str(instructions.parent))
    several = {**dataset[0], "id": "several", "images": [dataset[i]["images"][0] for i in (0, 1, 2)]}
    question = several["messages"][0]["content"]
    several["messages"] = [{"role": "user", "content": [{"type": "image"}] * 2 + question}, *several["messages"][1:]]
    return [dataset[1], dataset[5], several, dataset[0], dataset[1], dataset[11], dataset[7]]


def gradients(model):
    grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return grads


@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "recomputed"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_pack_gives_the_loss_and_gradients_of_its_samples_one_by_one(settings, instructions, kind, checkpointing):
    model, processor, args = ready_model(settings, **KINDS[kind])
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.enable_input_require_grads()
    samples = samples_with_everything(instructions)
    for chosen in (samples, samples[1:2] + samples[5:6]):  # the second pack has no image at all
        one_by_one = [LlavaDataCollator(processor)([sample]) for sample in chosen]
        num_items = sum(int((batch["labels"][:, 1:] != -100).sum()) for batch in one_by_one)
        expected = sum(model(**batch, num_items_in_batch=num_items).loss for batch in one_by_one)
        expected.backward()
        expected_grads = gradients(model)

        resolve_packing(core_model(model), args)
        assert args.packing == "batch"
        batch = LlavaDataCollator(processor, packing=True)(chosen)
        assert int((batch["labels"] != -100).sum()) == num_items
        for divisor in (num_items, None):  # what Trainer gives, and what the model counts
            loss = model(**batch, num_items_in_batch=divisor).loss
            loss.backward()
            grads = gradients(model)
            torch.testing.assert_close(loss, expected, rtol=0, atol=1e-5)
            for name, grad in expected_grads.items():
                torch.testing.assert_close(grads[name], grad, rtol=0, atol=1e-5, msg=name)
        assert expected_grads  # also where only the projector is trained and there is no image: zeros


@pytest.mark.parametrize("kind", KINDS)
def test_a_packed_run_is_the_padded_run(settings, kind, tmp_path):
    if kind == "qlora":
        pytest.importorskip("bitsandbytes")
    common = {
        **settings, **KINDS[kind], "max_steps": 4, "per_device_train_batch_size": 3, "gradient_accumulation_steps": 2,
        "eval_size": 6, "eval_strategy": "steps", "eval_steps": 2, "lr_scheduler_type": "constant",
    }  # fmt: skip
    padded = train({**common, "packing": "none", "output_dir": str(tmp_path / "padded")})
    packed = train({**common, "output_dir": str(tmp_path / "packed")})
    recipe = (packed.output_dir / "recipe.yaml").read_text()
    assert "packing: batch" in recipe  # what auto became is on record
    assert losses(packed) == pytest.approx(losses(padded), abs=1e-4) and len(losses(packed)) == 4
    assert grad_norms(packed) == pytest.approx(grad_norms(padded), rel=1e-3)
    evaluated = [[e["eval_loss"] for e in r.log_history if "eval_loss" in e] for r in (padded, packed)]
    assert evaluated[0] == pytest.approx(evaluated[1], abs=1e-4)


def test_full_packs_are_filled_and_hold_every_sample_once(make_trainer, caplog):
    with caplog.at_level(logging.WARNING):
        trainer = make_trainer(packing="full", pack_length=300, num_train_epochs=1, max_steps=-1)
    assert "24 samples in" in caplog.text and "% filled" in caplog.text
    assert isinstance(trainer.train_dataset, PackedDataset)
    collator, seen = trainer.data_collator, []
    for i in range(len(trainer.train_dataset)):
        pack = trainer.train_dataset[i]
        seen += [sample["id"] for sample in pack]
        assert collator([pack])["input_ids"].shape[1] == sum(collator.length(s) for s in pack) <= 300
    assert sorted(seen) == sorted(f"s{i}" for i in range(24))
    assert trainer.train_dataset.plan.utilization > 0.8
    assert trainer.train().global_step == -(-len(trainer.train_dataset) // 2)


def test_full_packs_resume_where_they_stopped(settings, tmp_path):
    common = {**settings, "packing": "full", "pack_length": 300, "max_steps": 6, "save_steps": 3, "report_to": "none"}
    whole = train({**common, "output_dir": str(tmp_path / "whole")})
    assert (tmp_path / "whole" / "checkpoint-3").is_dir()
    again = train({**common, "resume": str(tmp_path / "whole/checkpoint-3"), "output_dir": str(tmp_path / "again")})  # fmt: skip
    assert losses(again) == losses(whole)


def test_full_packs_take_the_weights_of_types(make_trainer):
    trainer = make_trainer(packing="full", type_weights={"conversation": 0, "detail": 1, "complex": 0})
    drawn = [sample for i in range(len(trainer.train_dataset)) for sample in trainer.train_dataset[i]]
    assert {sample["type"] for sample in drawn} == {"detail"} and len(drawn) == 8


def test_samples_that_are_too_long_are_said_before_training(settings, caplog):
    settings = {**settings, "packing": "full", "max_length": 60}
    with pytest.raises(ValueError, match="max_length is 60"):
        train(settings)
    with caplog.at_level(logging.WARNING), pytest.raises(ValueError, match="none of the 24 samples can be used"):
        train({**settings, "overflow": "drop", "max_length": 5})
    with caplog.at_level(logging.WARNING):
        train({**settings, "overflow": "drop", "output_dir": settings["output_dir"] + "2"})
    assert "too long" in caplog.text


# What auto decides


def test_auto_packs_where_the_language_model_allows_it(make_trainer):
    trainer = make_trainer()
    core = core_model(trainer.model)
    assert trainer.args.packing == "batch" and trainer.data_collator.packing
    assert core.model.language_model.config._attn_implementation == VARLEN
    assert core.model.vision_tower.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("change", [{"attn_implementation": "sdpa"}, {"neftune_noise_alpha": 5.0}])
def test_auto_pads_where_packs_need_a_dense_mask_or_get_other_noise(make_trainer, change):
    trainer = make_trainer(**change)
    assert trainer.args.packing == "none" and not trainer.data_collator.packing
    with pytest.raises(ValueError, match="attn_implementation=eager would build an attention mask.*Set packing=none"):
        make_trainer(attn_implementation="eager", packing="batch")


@pytest.fixture
def leaky():
    """An attention that ignores where samples begin, as one outside of transformers' interface would."""
    AttentionInterface.register(
        "leaky", lambda *a, **k: sdpa_attention_forward(*a[:4], None, **{**k, "is_causal": True})
    )
    AttentionMaskInterface.register("leaky", sdpa_mask)
    return "leaky"


def test_a_language_model_in_which_samples_see_each_other_is_found_out(settings, base_model, leaky, monkeypatch):
    model, _, args = ready_model(settings)
    language_model = model.model.language_model
    model.set_attn_implementation({"text_config": VARLEN})
    assert packed_attention_error(language_model) < 1e-5
    model.set_attn_implementation({"text_config": leaky})
    assert packed_attention_error(language_model) > 0.1
    assert language_model.training
    monkeypatch.setattr("modeling_llava.training.batches.use_varlen_attention", lambda model: None)
    args.packing = "batch"
    with pytest.raises(ValueError, match="samples of a pack attend to each other in LlamaModel"):
        resolve_packing(model, args)
    args.packing = "auto"
    resolve_packing(model, args)
    assert args.packing == "none" and language_model.config._attn_implementation == leaky


def test_a_language_model_whose_attention_packs_do_not_know_is_padded(settings):
    """Gemma 2 caps its scores: `auto` must pad, not stop."""
    model = LlavaForConditionalGeneration(tiny_config(text=tiny_text_config("gemma2", head_dim=16)))
    before = model.model.language_model.config._attn_implementation
    args = LlavaTrainingArguments(**settings)
    resolve_packing(model, args)
    assert args.packing == "none" and model.model.language_model.config._attn_implementation == before
    args.packing = "full"
    with pytest.raises(ValueError, match="softcap, which Gemma2Attention requires. Set packing=none"):
        resolve_packing(model, args)


@pytest.mark.parametrize(
    "family, reason",
    [
        ("stablelm", "does not hand cu_seq_lens_q to its attention layers"),  # right, by a mask of the whole row
        ("xglm", "XGLMModel does not use transformers' AttentionInterface"),
    ],
)
def test_a_language_model_that_cannot_attend_within_samples_is_padded(settings, family, reason):
    sizes = {"d_model": 64, "ffn_dim": 64, "num_layers": 2, "attention_heads": 4} if family == "xglm" else {}
    model = LlavaForConditionalGeneration(tiny_config(text=tiny_text_config(family, **sizes)))
    args = LlavaTrainingArguments(**settings)
    resolve_packing(model, args)
    assert args.packing == "none"
    args.packing = "batch"
    with pytest.raises(ValueError, match=f"{reason}.* Set packing=none"):
        resolve_packing(model, args)


# Grouping


def test_grouped_batches_are_of_one_modality_and_come_back_after_a_resume(
    settings, make_trainer, instructions, tmp_path
):
    grouped = {
        **settings, "train_sampling_strategy": "group_by_length", "group_by_modality": True, "packing": "none",
        "per_device_train_batch_size": 4, "max_steps": 9, "save_steps": 4, "save_total_limit": None,
    }  # fmt: skip
    evaluated = {"eval_data": str(instructions), "eval_strategy": "steps", "eval_steps": 5}
    trainer = make_trainer(**grouped)
    has_image = {row["id"]: "image" in row for row in json.loads(instructions.read_text())}
    order = list(trainer._get_train_sampler())
    batches = [[trainer.train_dataset[i]["id"] for i in order[s : s + 4]] for s in range(0, 24, 4)]
    assert sorted(i for batch in batches for i in batch) == sorted(has_image)
    assert sum(len({has_image[i] for i in batch}) == 1 for batch in batches) >= 5  # 20 with an image, 4 without

    whole = train({**grouped, **evaluated, "output_dir": str(tmp_path / "whole")})
    for checkpoint in ("checkpoint-4", "checkpoint-8"):  # within the first epoch (6 steps) and the second
        again = train(
            {**grouped, "resume": str(tmp_path / "whole" / checkpoint), "output_dir": str(tmp_path / checkpoint)}
        )
        assert losses(again) == losses(whole)


def test_an_image_that_occurs_twice_in_a_pack_is_encoded_once(settings, instructions):
    model, processor, args = ready_model(settings)
    resolve_packing(core_model(model), args)
    samples = samples_with_everything(instructions)
    batch = LlavaDataCollator(processor, packing=True)(samples)
    seen = []
    model.model.vision_tower.register_forward_hook(lambda module, inputs, output: seen.append(output[0].shape[0]))
    model(**batch)
    distinct = {image for sample in samples for image in sample["images"]}
    assert seen == [len(distinct)] and len(batch["image_indices"]) > len(distinct)
    assert Image.open(next(iter(distinct))).size  # they are files, and none was decoded twice
