"""The loss on two processes with unequal work and a sharded head, against one process; and within PEFT."""

import subprocess
import sys

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny import tiny_batch, tiny_config
from torch import nn

from modeling_llava import LlavaForConditionalGeneration
from modeling_llava.kernels import linear_cross_entropy as loss_module
from modeling_llava.kernels.linear_cross_entropy import causal_language_model_loss


WORKER = """
import sys
import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard

folder, file = sys.argv[1:]
dist.init_process_group("gloo")
rank = dist.get_rank()
saved = torch.load(file, weights_only=False)
from modeling_llava import LlavaForConditionalGeneration
from modeling_llava.kernels import linear_cross_entropy as loss_module
loss_module.CHUNK_ELEMENTS = loss_module.MIN_CHUNK_ROWS = loss_module.MIN_CHUNK_ROWS_TRAINED = 3  # several chunks

model = LlavaForConditionalGeneration(saved["config"]).train()
model.load_state_dict(saved["weights"])
model.model.vision_tower.requires_grad_(False)
batch, num_items = saved["batches"][rank], saved["num_items"]
for part in (*model.model.language_model.layers, model.lm_head):
    fully_shard(part)
step = fully_shard(model)
# Both average the processes' gradients, as Trainer knows: each loss counts double
loss = step(**batch, num_items_in_batch=num_items).loss * 2
loss.backward()
total = loss.detach() / 2
dist.all_reduce(total)
gradients = {name: p.grad.full_tensor() for name, p in model.named_parameters() if p.grad is not None}
if rank == 0:
    torch.save({"loss": total, "gradients": gradients}, f"{folder}/result.pt")
dist.destroy_process_group()
"""


@pytest.mark.slow
def test_two_processes_with_a_sharded_head_give_the_gradients_of_one(tmp_path):
    """Rank 1 has no image and far fewer supervised tokens: another number of chunks, and nothing to project."""
    config = tiny_config()
    model = LlavaForConditionalGeneration(config).train()
    model.model.vision_tower.requires_grad_(False)
    batches = [tiny_batch((1, 2)), tiny_batch((0, 0), supervised_from=20)]
    num_items = sum(int((batch["labels"][:, 1:] != -100).sum()) for batch in batches)
    file = tmp_path / "saved.pt"
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    torch.save({"config": config, "weights": state, "batches": batches, "num_items": num_items}, file)

    loss = sum(model(**batch, num_items_in_batch=num_items).loss for batch in batches)
    loss.backward()
    expected = {name: p.grad for name, p in model.named_parameters() if p.grad is not None and p.requires_grad}
    (tmp_path / "worker.py").write_text(WORKER)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command = [*launcher, tmp_path / "worker.py", tmp_path, file]
    # Processes that wait for each other for ever end here
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    result = torch.load(tmp_path / "result.pt")
    torch.testing.assert_close(result["loss"], loss.detach(), rtol=1e-5, atol=1e-5)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained <= set(result["gradients"])
    for name in trained:
        torch.testing.assert_close(result["gradients"][name], expected[name], rtol=1e-4, atol=1e-6, msg=name)


LINEAR = r"(.*language_model.*(proj))"


@pytest.mark.parametrize(
    "lora, is_fast",
    [
        ({"target_modules": LINEAR + "|lm_head"}, False),  # LoRA on the head
        ({"target_modules": LINEAR, "modules_to_save": ["lm_head"]}, True),
        ({"target_modules": LINEAR}, True),  # a frozen head
    ],
)
def test_a_head_within_peft_equals_logits_of_all_tokens(monkeypatch, lora, is_fast):
    for name in ("CHUNK_ELEMENTS", "MIN_CHUNK_ROWS", "MIN_CHUNK_ROWS_TRAINED"):
        monkeypatch.setattr(loss_module, name, 3)
    fast, linear_loss = [], loss_module._linear_loss
    monkeypatch.setattr(loss_module, "_linear_loss", lambda *args: fast.append(True) or linear_loss(*args))
    torch.manual_seed(0)
    model = LlavaForConditionalGeneration(tiny_config()).train()
    model = get_peft_model(model, LoraConfig(r=4, init_lora_weights=False, **lora))
    batch = tiny_batch()
    ours = model(**batch).loss
    logits = model(**batch, skip_logits=False).logits
    expected = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten())
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-6)
    trained = [p for p in model.parameters() if p.requires_grad]
    for a, b in zip(torch.autograd.grad(ours, trained), torch.autograd.grad(expected, trained)):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
    assert bool(fast) == is_fast


def test_logits_of_all_tokens_are_never_built_for_a_head_trained_by_peft(monkeypatch):
    monkeypatch.setattr(loss_module, "CHUNK_ELEMENTS", 1)
    monkeypatch.setattr(loss_module, "MIN_CHUNK_ROWS_TRAINED", 4)
    hidden, head = torch.randn(30, 8, requires_grad=True), nn.Linear(8, 50, bias=False)
    rows = []
    wrapped_head = nn.Sequential(head)
    head.register_forward_hook(lambda module, inputs, output: rows.append(output.shape[0]))
    causal_language_model_loss(hidden[None], torch.randint(0, 50, (1, 30)), wrapped_head).backward()
    assert max(rows) == 4 and sum(rows) == 2 * 29  # once in the forward pass, once more in the backward pass
