"""LoRA, DoRA, rsLoRA, QLoRA: what they touch, and folders that plain PEFT and plain transformers load back."""

import re
import shutil
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from tiny import tiny_batch, tiny_config, tiny_text_config
from torch import nn

from modeling_llava import LlavaForConditionalGeneration
from modeling_llava.io.adapters import (
    UNQUANTISED_MODULES,
    find_base,
    forbid_inference_packing,
    four_bit_config,
    is_quantised,
    load_adapter_for_inference,
)
from modeling_llava.io.checkpoints import COMPONENTS, component_of
from modeling_llava.training import LlavaTrainer, LlavaTrainingArguments, merge_adapter
from modeling_llava.training import train as run
from modeling_llava.training.setup import (
    add_adapter,
    base_and_adapter,
    initial_lora,
    load_adapter,
    load_model_and_processor,
    lora_target_pattern,
)


LANGUAGE_MODELS = {
    "llama": tiny_text_config("llama"),
    "mistral": tiny_text_config("mistral"),
    "qwen2": tiny_text_config("qwen2"),
    "phi": tiny_text_config("phi"),  # dense, fc1, fc2
    "phi3": tiny_text_config("phi3", pad_token_id=0),  # qkv_proj, gate_up_proj
    "gpt_neox": tiny_text_config("gpt_neox"),  # query_key_value
}


def arguments(folder, **settings):
    common = {
        "lora_r": 4, "lora_alpha": 8, "lora_dropout": 0.0, "report_to": "none", "learning_rate": 1e-2,
        "per_device_train_batch_size": 2, "disable_tqdm": True,
        "projector_learning_rate": None if settings.get("train_projector") == "frozen" else 1e-2,
    }  # fmt: skip
    return LlavaTrainingArguments(str(folder), **{**common, **settings})


class Batches(torch.utils.data.Dataset):
    """Samples of one image each."""

    def __init__(self, number=8):
        self.batch = tiny_batch(images_per_sample=(1,) * number)
        self.batch["attention_mask"] = torch.ones_like(self.batch["input_ids"])

    def __len__(self):
        return len(self.batch["input_ids"])

    def __getitem__(self, index):
        return {name: tensor[index] for name, tensor in self.batch.items()}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("base")
    LlavaForConditionalGeneration(tiny_config()).save_pretrained(folder)
    return str(folder)


def load(base, cls=LlavaForConditionalGeneration, **settings):
    return cls.from_pretrained(base, **settings)


def train(base, folder, steps=3, cls=LlavaForConditionalGeneration, **settings):
    """A few steps; returns the trainer. The adapter lies in `folder`."""
    args = arguments(folder, adapter=settings.pop("adapter", "lora"), max_steps=steps, save_strategy="no", **settings)
    four_bits = four_bit_config(torch.float32, args.quant_type, args.double_quant) if args.adapter == "qlora" else None
    quantised = {} if four_bits is None else {"quantization_config": four_bits}
    transformers.set_seed(0)
    trainer = LlavaTrainer(load(base, cls, **quantised), args, train_dataset=Batches())
    trainer.train()
    trainer.save_model()
    return trainer


@torch.no_grad()
def logits(model):
    batch = tiny_batch()
    batch.pop("labels")
    return model.eval()(**batch).logits


@pytest.mark.parametrize("name", LANGUAGE_MODELS)
def test_lora_is_on_every_linear_layer_of_the_language_model_and_no_other(tmp_path, name):
    from peft.tuners.lora import LoraLayer

    model = LlavaForConditionalGeneration(tiny_config(text=LANGUAGE_MODELS[name]))
    expected = {
        f"model.language_model.{n}" for n, m in model.model.language_model.named_modules() if isinstance(m, nn.Linear)
    }
    peft_model = add_adapter(model, arguments(tmp_path, adapter="lora"))
    adapted = {n for n, m in peft_model.get_base_model().named_modules() if isinstance(m, LoraLayer)}
    assert adapted == expected and len(adapted) >= 8
    assert not isinstance(peft_model.get_base_model().lm_head, LoraLayer)


@pytest.mark.parametrize("target", [r".*q_proj", r"model\.language_model\.nothing"])
def test_a_target_outside_the_language_model_is_refused_before_a_model_is_loaded(base, tmp_path, target):
    with pytest.raises(ValueError, match="outside of the language model|matches no module"):
        base_and_adapter(arguments(tmp_path, adapter="lora", lora_target=target, model=base))


KINDS = {
    "lora": {}, "dora": {"use_dora": True}, "rslora": {"use_rslora": True}, "tower": {"train_vision_tower": True},
    "bias": {"lora_bias": "lora_only"}, "lora_only": {"train_projector": "lora", "lora_vision_tower": True},
    "frozen": {"train_projector": "frozen"}, "qlora": {"adapter": "qlora"},
    "qlora_tower": {"adapter": "qlora", "train_vision_tower": True}, "qlora_dora": {"adapter": "qlora", "use_dora": True},
}  # fmt: skip


@pytest.mark.slow
def test_adapter_folders_load_in_plain_peft_and_in_plain_transformers(base, tmp_path):
    """On the stock class, in a process that never imports us: the same logits as the trained model."""
    for kind, settings in KINDS.items():
        trainer = train(base, tmp_path / kind, **settings)
        torch.save(logits(trainer.model), tmp_path / kind / "expected.pt")
        files = {path.name for path in (tmp_path / kind).iterdir()}
        assert {"adapter_config.json", "adapter_model.safetensors", "recipe.yaml", "run.json"} <= files
        assert "config.json" not in files  # with it, transformers would take the folder for a full model
    torch.save(tiny_batch(), tmp_path / "batch.pt")
    script = f"""
import sys, torch
from peft import PeftModel
from transformers import AutoModelForImageTextToText, BitsAndBytesConfig, LlavaForConditionalGeneration
four_bit = {{"quantization_config": BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4",
    bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=torch.float32,
    llm_int8_skip_modules={UNQUANTISED_MODULES!r})}}
batch = {{k: v for k, v in torch.load("batch.pt").items() if k != "labels"}}
for kind in {list(KINDS)}:
    quantised = four_bit if "qlora" in kind else {{}}
    expected = torch.load(kind + "/expected.pt")
    bare = LlavaForConditionalGeneration.from_pretrained(r"{base}", **quantised)
    native = AutoModelForImageTextToText.from_pretrained(kind, **quantised)
    for module in (*bare.modules(), *native.modules()):  # bitsandbytes cannot repack layers this small (AVX512-BF16)
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    assert type(native).__module__.startswith("transformers.models.llava"), type(native)
    with torch.no_grad():
        assert (bare.eval()(**batch).logits - expected).abs().max().item() > 1e-3, kind
        for model in (PeftModel.from_pretrained(bare, kind), native):
            difference = (model.eval()(**batch).logits - expected).abs().max().item()
            assert difference < 1e-5, (kind, type(model), difference)
assert "modeling_llava" not in [m.split(".")[0] for m in sys.modules]
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]


FORMS = {  # settings → what is trained
    "projector": ({}, {"language_model", "multi_modal_projector"}),
    "lora only": ({"train_projector": "lora", "use_rslora": True}, {"language_model", "multi_modal_projector"}),
    "frozen": ({"train_projector": "frozen"}, {"language_model"}),
    "lora on the tower": ({"lora_vision_tower": True, "train_projector": "lora", "use_dora": True}, set(COMPONENTS)),
    "tower": ({"train_vision_tower": True}, set(COMPONENTS)),
}


@pytest.mark.parametrize("form", FORMS)
def test_each_form_trains_its_parts_and_is_merged_further_trained_and_named(base, tmp_path, form):
    settings, expected = FORMS[form]
    trainer = train(base, tmp_path / "adapter", **settings)
    stock, before = transformers.LlavaForConditionalGeneration, load(base)
    merged = load(merge_adapter(str(tmp_path / "adapter"), str(tmp_path / "merged")), stock)
    changed = [name for name, old in before.named_parameters() if not torch.equal(old, merged.get_parameter(name))]
    assert {component_of(name) for name in changed} == expected
    assert not any("norm" in n or "embed_tokens" in n or "lm_head" in n for n in changed if "vision_tower" not in n)
    assert torch.allclose(logits(merged), logits(trainer.model), atol=1e-5)
    held = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    is_lora_only = all(".lora_" in name for name in held)
    assert is_lora_only == (settings.get("train_projector", "full") != "full")  # servers take LoRA weights alone
    last = before.config.vision_config.num_hidden_layers - 1  # after the features: nothing is trained there
    trained = [n for n, p in trainer.model.named_parameters() if p.requires_grad and ".vision_tower." in n]
    assert not any(f".layers.{last}." in name or "post_layernorm" in name for name in trained)
    groups = {group["component"] for group in trainer.optimizer.param_groups}
    assert groups == expected

    args = arguments(tmp_path, adapter="lora", **settings)
    assert torch.allclose(logits(load_adapter(load(base), str(tmp_path / "adapter"), args)), logits(merged), atol=1e-5)
    other = {"train_projector": "full" if settings.get("train_projector") == "lora" else "lora"}
    with pytest.raises(ValueError, match="Set train_projector="):
        load_adapter(load(base), str(tmp_path / "adapter"), arguments(tmp_path, adapter="lora", **settings | other))


def test_dora_and_rslora_reach_peft(base, tmp_path):
    args = arguments(tmp_path, adapter="lora", use_dora=True, use_rslora=True, lora_r=16)
    layer = add_adapter(load(base), args).get_base_model().model.language_model.layers[0].self_attn.q_proj
    assert layer.scaling["default"] == 8 / 16**0.5  # rsLoRA: alpha / √r
    assert "default" in layer.lora_magnitude_vector  # DoRA


@pytest.mark.parametrize("settings", [{"lora_vision_tower": True}, {"train_vision_tower": True}, {"adapter": "qlora"}])
def test_with_its_adapter_off_a_trained_model_is_its_base(base, tmp_path, settings):
    quantised = {"quantization_config": four_bit_config(torch.float32)} if settings.get("adapter") == "qlora" else {}
    untrained = load(base, **quantised)
    forbid_inference_packing(untrained)
    expected = logits(untrained)
    model = train(base, tmp_path, **settings).model
    assert not torch.allclose(logits(model), expected, atol=1e-3)
    with model.disable_adapter():
        assert torch.allclose(logits(model), expected, atol=1e-5)


@pytest.mark.parametrize(
    "target",
    [["q_proj", "v_proj"], "q_proj,v_proj", " self_attn.q_proj, v_proj", r"model\.language_model\..*\.(q|v)_proj"],
)
def test_lora_target_is_names_or_a_regular_expression(target):
    model = LlavaForConditionalGeneration(tiny_config())
    matched = [n for n, _ in model.named_modules() if re.fullmatch(lora_target_pattern(model, target), n)]
    assert {name.rpartition(".")[2] for name in matched} == {"q_proj", "v_proj"}
    assert len(matched) == 2 * model.config.text_config.num_hidden_layers
    assert all(name.startswith("model.language_model.") for name in matched)


def test_all_linear_is_the_default_target_and_an_unknown_name_is_refused():
    model = LlavaForConditionalGeneration(tiny_config())
    assert lora_target_pattern(model, "all-linear") == lora_target_pattern(model)
    with pytest.raises(ValueError, match="'q_prj'.*regular expression"):
        lora_target_pattern(model, ["v_proj", "q_prj"])


@pytest.mark.parametrize("init, use_rslora", [("pissa", False), ("pissa_niter_4", True), ("olora", False)])
def test_an_initialisation_that_changes_the_base_is_undone_in_what_is_saved(base, tmp_path, init, use_rslora):
    """`pissa_niter` is random: an adapter that takes it out of the base again when loaded meets another base."""
    from peft import LoraConfig, PeftModel, get_peft_model

    def trainer(folder, **settings):
        config = LoraConfig(
            r=4, target_modules=r".*language_model.*q_proj", init_lora_weights=init, use_rslora=use_rslora
        )
        settings = {"adapter": "lora", "max_steps": 2, "logging_steps": 1, "save_steps": 1, **settings}
        return LlavaTrainer(get_peft_model(load(base), config), arguments(folder, **settings), train_dataset=Batches())

    whole = trainer(tmp_path / "a")
    whole.train()
    whole.save_model()
    loaded = PeftModel.from_pretrained(load(base), tmp_path / "a")
    assert torch.allclose(logits(loaded), logits(whole.model), atol=1e-4)

    torch.manual_seed(7)
    resumed = trainer(tmp_path / "b")
    resumed.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-1"))
    assert torch.allclose(logits(resumed.model), logits(whole.model), atol=1e-4)


def test_an_adapter_of_random_pissa_that_peft_saved_is_refused(base, tmp_path):
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=4, target_modules=r".*language_model.*q_proj", init_lora_weights="pissa_niter_4")
    get_peft_model(load(base), config).save_pretrained(tmp_path / "adapter")
    for call in (
        lambda: merge_adapter(str(tmp_path / "adapter"), str(tmp_path / "out")),
        lambda: load(tmp_path / "adapter"),
    ):
        with pytest.raises(ValueError, match="init_lora_weights='pissa_niter_4'"):
            call()


def test_loftq_is_refused(base, tmp_path):
    """It rounds the base, which no adapter can undo."""
    model = load(base)
    model.peft_config, model.active_adapter = {"default": SimpleNamespace(init_lora_weights="loftq")}, "default"
    with pytest.raises(ValueError, match="loftq"):
        initial_lora(model)


@pytest.mark.parametrize(
    "way, kind",
    [
        ("load_model", "modules_to_save"),
        ("merge", "modules_to_save"),
        ("further", "modules_to_save"),
        ("load_model", "lora"),
        ("load_model", "trainable_tokens"),
    ],
)
def test_a_base_gets_the_vocabulary_of_its_adapter(base, tmp_path, way, kind):
    from peft import LoraConfig, get_peft_model

    model = load(base)
    size = model.config.text_config.vocab_size + 6
    model.resize_token_embeddings(size, mean_resizing=False)
    settings = {
        "modules_to_save": {"modules_to_save": ["embed_tokens", "lm_head", "multi_modal_projector"]},
        "lora": {"modules_to_save": ["embed_tokens", "multi_modal_projector"]},
        "trainable_tokens": {"trainable_token_indices": {"embed_tokens": [size - 2, size - 1]}},
    }[kind]
    target = ["q_proj", "lm_head"] if kind == "lora" else r"model\.language_model\..*q_proj"
    model = get_peft_model(model, LoraConfig(r=4, target_modules=target, **settings))
    model.save_pretrained(tmp_path / "adapter")
    if way == "load_model":
        resized = load(base)
        load_adapter_for_inference(resized, tmp_path / "adapter")
    elif way == "merge":
        resized = load(merge_adapter(str(tmp_path / "adapter"), str(tmp_path / "merged")))
    else:
        resized = load_adapter(load(base), str(tmp_path / "adapter"), arguments(tmp_path, adapter="lora"))
    assert resized.get_input_embeddings().weight.shape[0] == size
    assert logits(resized).shape == logits(model).shape
    if kind == "modules_to_save":
        assert torch.allclose(logits(resized), logits(model), atol=1e-5)


def test_new_tokens_whose_rows_the_adapter_would_lose_are_refused(base, tmp_path):
    from peft import LoraConfig, get_peft_model

    def trainer(**kept):
        model = load(base)
        model.resize_token_embeddings(model.config.text_config.vocab_size + 6, mean_resizing=False)
        model = get_peft_model(model, LoraConfig(r=4, target_modules=r".*language_model.*q_proj", **kept))
        return LlavaTrainer(model, arguments(tmp_path, adapter="lora"), train_dataset=Batches())

    for kept, lost in (({}, "embed_tokens and lm_head"), ({"modules_to_save": ["embed_tokens"]}, "lm_head")):
        with pytest.raises(ValueError, match=f"new rows of {lost}.*modules_to_save"):
            trainer(**kept)
    trainer(modules_to_save=["embed_tokens", "lm_head"])


def test_only_the_language_model_is_quantised_and_nothing_is_upcast(base):
    model = load(base, quantization_config=four_bit_config(torch.bfloat16), dtype=torch.bfloat16)
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            in_language_model = name.startswith("model.language_model.")
            assert (type(module).__name__ == "Linear4bit") == in_language_model, name
    trainer_model = LlavaTrainer(
        model, arguments("unused", adapter="qlora", precision="bf16", save_strategy="no"), train_dataset=[0]
    ).model
    for name, parameter in trainer_model.named_parameters():
        if "Params4bit" not in type(parameter).__name__ and ".original_module." not in name:
            assert parameter.dtype == (torch.float32 if parameter.requires_grad else torch.bfloat16), name


def test_qlora_step_after_an_evaluation_equals_the_step_without_one(base, tmp_path):
    """On CPUs with AVX512-BF16, bitsandbytes would repack the weights in evaluation; the flag forbids it everywhere."""

    def losses(**settings):
        trainer = train(base, tmp_path / str(len(settings)), steps=4, adapter="qlora", logging_steps=1)
        assert not any(getattr(m, "support_avx512bf16_for_cpu", False) for m in trainer.model.modules())
        return trainer

    plain = losses()
    args = arguments(
        tmp_path / "evaluated", adapter="qlora", max_steps=4, save_strategy="no", logging_steps=1,
        eval_strategy="steps", eval_steps=1,
    )  # fmt: skip
    transformers.set_seed(0)
    model = load(base, quantization_config=four_bit_config(torch.float32))
    evaluated = LlavaTrainer(model, args, train_dataset=Batches(), eval_dataset=Batches(2))
    evaluated.train()
    for key in ("loss", "grad_norm"):
        first, second = ([entry[key] for entry in t.state.log_history if key in entry] for t in (plain, evaluated))
        assert len(first) == 4 and first == second, key
    for (name, ours), (_, theirs) in zip(plain.model.named_parameters(), evaluated.model.named_parameters()):
        assert torch.equal(ours, theirs), name


def test_gradient_checkpointing_gives_the_same_gradients_for_qlora(base, tmp_path):
    def gradients(**settings):
        transformers.set_seed(0)
        model = load(base, quantization_config=four_bit_config(torch.float32))
        args = arguments(tmp_path, adapter="qlora", max_steps=1, save_strategy="no", logging_steps=1, **settings)
        trainer = LlavaTrainer(model, args, train_dataset=Batches())
        trainer.train()
        return trainer

    plain, checkpointed = gradients(), gradients(activation_checkpointing=True)
    assert checkpointed.model.get_base_model().is_activation_checkpointing
    norms = [t.state.log_history[0]["grad_norm"] for t in (plain, checkpointed)]
    assert norms[0] > 0 and norms[0] == pytest.approx(norms[1], rel=1e-5)
    # text alone: no input of the language model has a gradient, the adapter must be trained all the same
    batch = tiny_batch(images_per_sample=(0, 0))
    model = checkpointed.model.train()
    model.zero_grad()
    model(**batch).loss.backward()
    lora_b = [p for name, p in model.named_parameters() if "lora_B" in name]
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in lora_b)


def test_an_adapter_is_trained_further(settings, tmp_path):
    first = run({**settings, "adapter": "lora"})
    further = {**settings, "model": str(first.output_dir), "output_dir": str(tmp_path / "second"), "adapter": "lora"}
    model, _ = load_model_and_processor(LlavaTrainingArguments(**further))
    assert torch.equal(logits_of(model, settings), logits_of_folder(first.output_dir, settings))
    second = run(further)
    assert second.kind == "adapter"
    assert not torch.equal(logits_of_folder(second.output_dir, settings), logits_of_folder(first.output_dir, settings))
    further["output_dir"] = str(tmp_path / "third")  # without a checkpoint, which would not fit either
    with pytest.raises(ValueError, match="Set adapter=lora"):
        run({**further, "adapter": "none"})


def logits_of_folder(folder, settings):
    return logits_of(transformers.AutoModelForImageTextToText.from_pretrained(folder), settings)


@torch.no_grad()
def logits_of(model, settings):
    processor = transformers.AutoProcessor.from_pretrained(settings["model"])
    batch = processor(
        text="USER: <image>\nWhat is it? ASSISTANT:",
        images=torch.zeros(3, 42, 42, dtype=torch.uint8).numpy(),
        return_tensors="pt",
    )
    return model.eval()(**batch).logits


def test_a_merge_is_written_in_shards_or_not_at_all(base, tmp_path, monkeypatch):
    train(base, tmp_path / "adapter", steps=1)
    expected = load(merge_adapter(str(tmp_path / "adapter"), str(tmp_path / "whole"))).state_dict()
    monkeypatch.setattr("modeling_llava.training.merge.MERGED_SHARD_SIZE", "100KB")
    merged = load(merge_adapter(str(tmp_path / "adapter"), str(tmp_path / "merged"))).state_dict()
    assert len(list((tmp_path / "merged").glob("model-*-of-*.safetensors"))) > 2
    assert all(torch.equal(merged[name], weight) for name, weight in expected.items())
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    broken = {name: tensor * (float("nan") if "layers.1." in name else 1) for name, tensor in load_file(file).items()}
    save_file(broken, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match="is broken.*layers.1.*not finite"):
        merge_adapter(str(tmp_path / "adapter"), str(tmp_path / "out"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "merged", "whole"]


@pytest.mark.parametrize(
    "trained, is_tied",
    [
        ({"modules_to_save": ["embed_tokens", "lm_head"]}, False),
        ({"target_modules": ["lm_head"]}, False),
        ({"target_modules": ["embed_tokens"]}, False),
        ({"trainable_token_indices": [3, 5]}, True),
    ],
)
def test_a_tied_head_that_the_adapter_trains_apart_is_merged_apart(tmp_path, trained, is_tied):
    from peft import LoraConfig, get_peft_model

    config = tiny_config(text=tiny_text_config("llama", tie_word_embeddings=True), tie_word_embeddings=True)
    LlavaForConditionalGeneration(config).save_pretrained(tmp_path / "base")
    model = get_peft_model(load(tmp_path / "base"), LoraConfig(**{"target_modules": ["v_proj"], **trained}))
    for parameter in model.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(tmp_path / "adapter")
    merged = load(merge_adapter(str(tmp_path / "adapter"), str(tmp_path / "merged"), base=str(tmp_path / "base")))
    assert torch.allclose(logits(merged), logits(model), atol=1e-4)
    assert (merged.lm_head.weight is merged.get_input_embeddings().weight) == is_tied


@pytest.mark.parametrize("settings", [{}, {"quant_type": "fp4", "double_quant": False}])
def test_merged_as_trained_gives_the_logits_of_the_run(base, tmp_path, settings):
    trainer = train(base, tmp_path / "adapter", adapter="qlora", **settings)
    merge_adapter(str(tmp_path / "adapter"), str(tmp_path / "plain"))
    merge_adapter(str(tmp_path / "adapter"), str(tmp_path / "merged"), as_trained=True)
    merged = load(tmp_path / "merged")
    assert not is_quantised(merged)
    trained = logits(trainer.model)
    assert torch.allclose(logits(merged), trained, atol=1e-5)
    assert not torch.allclose(logits(load(tmp_path / "plain")), trained, atol=1e-3)

    train(base, tmp_path / "lora")
    with pytest.raises(ValueError, match="not trained on a 4-bit base"):
        merge_adapter(str(tmp_path / "lora"), str(tmp_path / "out"), as_trained=True)
    assert not (tmp_path / "out").exists()


def test_merging_rounds_once_in_16_bit(tmp_path, base):
    train(base, tmp_path / "adapter")
    merge_adapter(str(tmp_path / "adapter"), str(tmp_path / "merged"), dtype="bfloat16")
    merged = load(tmp_path / "merged", dtype="auto")
    assert {p.dtype for p in merged.parameters()} == {torch.bfloat16}
    from peft import PeftModel

    exact = PeftModel.from_pretrained(load(base), tmp_path / "adapter").merge_and_unload()
    for (name, ours), (_, theirs) in zip(merged.named_parameters(), exact.named_parameters()):
        assert torch.equal(ours, theirs.to(torch.bfloat16)), name


def test_merge_refuses_4_bit_bases_full_models_and_full_folders(base, tmp_path):
    train(base, tmp_path / "adapter", steps=1)
    load(base, quantization_config=four_bit_config(torch.float32)).save_pretrained(tmp_path / "base4")
    with pytest.raises(ValueError, match="4-bit weights.*--base"):
        merge_adapter(str(tmp_path / "adapter"), str(tmp_path / "out"), base=str(tmp_path / "base4"))
    with pytest.raises(ValueError, match="nothing to merge"):
        merge_adapter(base, str(tmp_path / "out"))
    with pytest.raises(ValueError, match="not an empty folder"):
        merge_adapter(str(tmp_path / "adapter"), base)
    assert not (tmp_path / "out").exists()


def test_qlora_without_bitsandbytes_says_what_to_install(settings, monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(ImportError, match=r"pip install 'modeling-llava\[qlora\]'.*adapter=lora works without"):
        run({**settings, "adapter": "qlora"})


def test_a_base_that_has_changed_since_is_reported(base, tmp_path, caplog):
    """Its files may have been replaced, or converted to another dtype."""
    shutil.copytree(base, tmp_path / "base")
    train(tmp_path / "base", tmp_path / "adapter")
    for other, expected in ((base, False), (tmp_path / "base", False), (tmp_path / "half", True)):
        if expected:
            load(base, dtype=torch.float16).save_pretrained(other)
        caplog.clear()
        find_base(tmp_path / "adapter", base=str(other))
        assert ("other weights" in caplog.text and "float32" in caplog.text) == expected
    load(base).save_pretrained(tmp_path / "changed")
    weights = load_file(tmp_path / "changed" / "model.safetensors")
    weights = {name: w + 0.01 for name, w in weights.items()}
    save_file(weights, tmp_path / "changed" / "model.safetensors", metadata={"format": "pt"})
    find_base(tmp_path / "adapter", base=str(tmp_path / "changed"))
    assert f"those of {tmp_path / 'changed'}" in caplog.text
