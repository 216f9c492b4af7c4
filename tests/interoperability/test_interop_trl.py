"""TRL over our model and our processor as they are, and its examples: packing, loss on answers alone, preferences."""

import json
import runpy
from pathlib import Path

import pytest
import torch
from published import build
from tiny_predictor import assistant_turn, picture, tiny_llava, tiny_processor, user_turn
from transformers import AutoModelForImageTextToText, AutoProcessor
from transformers import LlavaForConditionalGeneration as StockLlava
from transformers import LlavaProcessor as StockProcessor

from modeling_llava.constants import IGNORE_INDEX
from modeling_llava.data import LlavaDataCollator, encode_conversation


pytestmark = pytest.mark.slow
trl = pytest.importorskip("trl", reason="TRL is not installed: pip install trl")

EXAMPLES = Path(__file__).parents[2] / "examples" / "trl"
QUESTIONS = ["What is it?", "Which colour has it?", "Is it far away?", "Why?"]
ANSWERS = ["It is noise.", "It has all of them.", "No, it is near.", "Because it was drawn so."]


@pytest.fixture
def processor():
    return tiny_processor()


@pytest.fixture
def model(processor):
    return tiny_llava(processor)


@pytest.fixture(scope="module")
def rows():
    """Four conversations in the form of TRL's and ours: `messages` and `images`; the last one has two turns."""
    rows = []
    for number, (question, answer) in enumerate(zip(QUESTIONS, ANSWERS)):
        messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        if number == 3:
            messages += [{"role": "user", "content": "Sure?"}, {"role": "assistant", "content": "Yes."}]
        rows.append({"messages": messages, "images": [picture(number)]})
    return rows


@pytest.fixture(scope="module")
def dataset(rows):
    import datasets

    table = datasets.Dataset.from_list([{"messages": row["messages"]} for row in rows])
    images = datasets.Dataset.from_dict({"images": [row["images"] for row in rows]}, features=datasets.Features({"images": datasets.List(datasets.Image())}))  # fmt: skip
    return datasets.concatenate_datasets([table, images], axis=1)


def trainer(model, processor, dataset, folder, **settings):
    options = {name: settings.pop(name) for name in ("peft_config", "data_collator") if name in settings}
    arguments = trl.SFTConfig(
        str(folder),
        **{
            "max_steps": 2,
            "per_device_train_batch_size": 2,
            "learning_rate": 1e-2,
            "logging_steps": 1,
            "save_strategy": "no",
            "report_to": "none",
            "use_cpu": True,
            "bf16": False,
            "max_length": None,
            "assistant_only_loss": True,
            "disable_tqdm": True,
            **settings,
        },
    )
    return trl.SFTTrainer(model, arguments, train_dataset=dataset, processing_class=processor, **options)


def test_sft_trainer_trains_model_and_processor_as_they_are(model, processor, dataset, tmp_path):
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    training = trainer(model, processor, dataset, tmp_path, eval_strategy="no")
    training.train()
    losses = [entry["loss"] for entry in training.state.log_history if "loss" in entry]
    assert len(losses) == 2 and losses[1] < losses[0]
    assert all("mean_token_accuracy" in entry for entry in training.state.log_history if "loss" in entry)
    for part in ("language_model", "multi_modal_projector", "vision_tower"):
        assert any(part in name and not torch.equal(p, before[name]) for name, p in model.named_parameters()), part
    assert training.evaluate(eval_dataset=dataset)["eval_loss"] > 0
    training.save_model(tmp_path / "out")
    stock, info = StockLlava.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    ours = dict(model.named_parameters())
    assert all(torch.equal(parameter, ours[name]) for name, parameter in stock.named_parameters())
    assert (tmp_path / "out" / "processor_config.json").exists()


def test_its_loss_on_its_batch_is_our_loss(model, processor, dataset, tmp_path):
    training = trainer(model, processor, dataset, tmp_path, gradient_checkpointing=False)
    batch = next(iter(training.get_train_dataloader()))
    model.train()
    theirs = training.compute_loss(model, dict(batch))
    ours = model(**batch)
    assert not hasattr(ours, "logits")  # none are built, and TRL needs none
    assert float(theirs) == pytest.approx(float(ours.loss), rel=1e-5)
    gradients = []
    for loss in (theirs, ours.loss):
        model.zero_grad()
        loss.backward()
        gradients.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    assert all(torch.allclose(a, b, rtol=1e-3, atol=1e-6) for a, b in zip(*gradients))


def test_lora_through_sft_trainer(model, processor, dataset, tmp_path):
    from peft import LoraConfig

    from modeling_llava.training.setup import lora_target_pattern

    config = LoraConfig(r=4, target_modules=lora_target_pattern(model))
    training = trainer(model, processor, dataset, tmp_path, peft_config=config)
    training.train()
    trained = [name for name, parameter in training.model.named_parameters() if parameter.requires_grad]
    assert trained and all("lora_" in name and "language_model" in name for name in trained)
    training.save_model(tmp_path / "adapter")
    assert (tmp_path / "adapter" / "adapter_model.safetensors").exists()


@pytest.mark.parametrize(
    "settings",
    [{"label_smoothing_factor": 0.1}, {"loss_type": "dft"}, {"gradient_accumulation_steps": 2}],
    ids=lambda settings: next(iter(settings)),
)
def test_its_other_losses_find_the_logits_that_they_need(model, processor, dataset, tmp_path, settings):
    training = trainer(model, processor, dataset, tmp_path, max_steps=1, **settings)
    training.train()
    losses = [entry["loss"] for entry in training.state.log_history if "loss" in entry]
    assert len(losses) == 1 and 0 < losses[0] < 100


def test_its_collator_leaves_out_the_first_token_and_ours_does_not(model, processor, dataset, rows, tmp_path):
    """
    TRL tokenizes a rendered conversation without the tokenizer's own BOS, since most templates write one; LLaVA's do not,
    stock's neither. Everything after it is equal. With our collator the batch is as in our own training.
    """
    conversations = [
        {"messages": [user_turn(question, row["images"]), assistant_turn(answer)], "images": row["images"]}
        for question, answer, row in zip(QUESTIONS[:2], ANSWERS, rows)
    ]
    expected = [encode_conversation(conversation["messages"], processor) for conversation in conversations]
    assert all(sample["input_ids"][0] == processor.tokenizer.bos_token_id for sample in expected)
    theirs = trainer(model, processor, dataset, tmp_path).data_collator([dict(row) for row in rows[:2]])
    options = {"data_collator": LlavaDataCollator(processor), "remove_unused_columns": False}
    ours = trainer(model, processor, dataset, tmp_path, **options).data_collator(conversations)
    for batch, first in ((theirs, 1), (ours, 0)):
        for number, sample in enumerate(expected):
            length = int(batch["attention_mask"][number].sum())
            assert torch.equal(batch["input_ids"][number, :length], sample["input_ids"][first:])
            assert torch.equal(batch["labels"][number, :length], sample["labels"][first:])
            assert (batch["labels"][number, length:] == IGNORE_INDEX).all()


# The examples


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A folder with images, `sft.json` and `preferences.json`."""
    folder = tmp_path_factory.mktemp("trl")
    rows, pairs = [], []
    for number, (question, answer) in enumerate(zip(QUESTIONS, ANSWERS)):
        picture(number).save(folder / f"{number}.png")
        turns = [{"from": "human", "value": f"<image>\n{question}"}, {"from": "gpt", "value": answer}]
        rows.append({"id": str(number), "image": f"{number}.png", "conversations": turns})
        pairs.append({"image": f"{number}.png", "prompt": question, "chosen": answer, "rejected": "No idea."})
    rows[1]["conversations"] += [{"from": "human", "value": "Sure?"}, {"from": "gpt", "value": "Yes."}]
    rows.append({"id": "text", "image": None, "conversations": [{"from": "human", "value": "Hi."}, turns[1]]})
    (folder / "sft.json").write_text(json.dumps(rows))
    (folder / "preferences.json").write_text(json.dumps(pairs))
    return folder


def example(name):
    return runpy.run_path(str(EXAMPLES / f"{name}.py"))


@pytest.fixture
def words(data, tmp_path):
    """Arguments of an example, but for its data."""
    return ["--model", str(build("llava-hf")), "--images", str(data), "--output", str(tmp_path)]


def test_packed_in_sft_trainer_equals_one_by_one(data, words, tmp_path, capsys):
    words = [*words, "--data", str(data / "sft.json")]
    main = example("sft")["main"]
    assert main([*words, "--parity", "5"]) == 0
    table = {line[:12].strip(): line[12:].split() for line in capsys.readouterr().out.splitlines()[-3:]}
    assert table.keys() == {"one by one", "padded", "packed"}
    assert all(float(number) <= 1e-5 for row in table.values() for number in row[1:])
    assert main([*words, "--max-steps", "2", "--batch-size", "5"]) == 0
    state = json.loads((tmp_path / "checkpoint-2" / "trainer_state.json").read_text())
    losses = [entry["loss"] for entry in state["log_history"] if "loss" in entry]
    assert losses[1] < losses[0]  # the same samples again


def test_samples_that_see_each_other_fail_the_parity_table(data, words):
    run = example("sft")

    class Leaking(run["RowCollator"]):
        def __call__(self, rows):
            batch = super().__call__(rows)
            kept = ("input_ids", "labels", "pixel_values", "attention_mask")
            return {"attention_mask": torch.ones_like(batch["input_ids"]), **{k: batch[k] for k in kept if k in batch}}

    run["main"].__globals__["RowCollator"] = Leaking
    assert run["main"]([*words, "--data", str(data / "sft.json"), "--parity", "5"]) == 1


def test_preference_training_widens_the_margin_and_stock_gives_the_same_numbers(data, tmp_path):
    source, run = build("llava-hf"), example("dpo")
    settings = {"per_device_train_batch_size": 4, "max_steps": 4, "learning_rate": 1e-3, "logging_steps": 1}
    sides = {"ours": (AutoModelForImageTextToText, AutoProcessor), "stock": (StockLlava, StockProcessor)}
    logs = {}
    for side, (model_class, processor_class) in sides.items():
        torch.manual_seed(0)
        parts = model_class.from_pretrained(source, dtype="float32"), processor_class.from_pretrained(source)
        dataset = run["read_preferences"](str(data / "preferences.json"), str(data))
        trained = run["train"](*parts, dataset, output_dir=str(tmp_path / side), save_strategy="no", **settings)
        logs[side] = [entry for entry in trained.state.log_history if "loss" in entry]
    margins = [entry["rewards/margins"] for entry in logs["ours"]]
    assert margins[0] == 0 and margins == sorted(margins) and margins[-1] > 0.1
    for name in ("loss", "rewards/margins", "logps/chosen", "logps/rejected", "grad_norm"):
        ours, stock = ([entry[name] for entry in logs[side]] for side in sides)
        assert ours == pytest.approx(stock, rel=1e-4, abs=1e-5), name
    templates = [AutoProcessor.from_pretrained(folder).chat_template for folder in (source, tmp_path / "ours")]
    assert templates[0] == templates[1]
