"""A canary for each private name of another package: where a new version changes one, its line here says which."""

import datasets
import pytest
import torch
from accelerate import PartialState
from tiny import tiny_config
from torch import nn
from transformers import AutoModel

from modeling_llava import compat


def test_torch_assert_in_graph():
    compat.assert_in_graph(torch.tensor(True), "holds")
    with pytest.raises(RuntimeError, match="does not"):
        compat.assert_in_graph(torch.tensor(False), "does not hold")


def test_torch_functorch_is_seen():
    seen = []
    torch.func.grad(lambda x: (seen.append(compat.is_under_functorch()), x)[1])(torch.tensor(1.0))
    assert seen == [True] and not compat.is_under_functorch()


def test_torch_says_whether_the_graph_is_kept():
    seen, x = [], torch.ones(1, requires_grad=True)
    x.register_hook(lambda grad: seen.append(compat.keeps_graph()))
    y = x * x
    y.backward(retain_graph=True)
    y.backward()
    assert seen == [True, False]


def test_torch_has_one_kernel_for_rms_norm():
    assert compat.fuses_rms_norm()


def test_torch_forward_hooks():
    module = nn.Linear(1, 1)
    module.register_forward_pre_hook(print)
    module.register_forward_hook(repr)
    assert compat.forward_hooks(module) == [print, repr]


def test_torch_scheduler_says_the_rate_that_was_set():
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    compat.set_last_learning_rate(scheduler, 0, 0.25)
    assert scheduler.get_last_lr() == [0.25]


def test_transformers_can_set_attention():
    assert compat.can_set_attention(AutoModel.from_config(tiny_config().text_config))


def test_transformers_tokenizer_gets_a_named_token_and_a_renamed_twin(golden):
    from modeling_llava.text.tokenization import load_tokenizer

    tokenizer = load_tokenizer(golden / "tiny_spm.model")
    tokenizer.add_tokens(["<image>"], special_tokens=True)
    compat.add_named_token(tokenizer, {"image_token": "<image>"})
    assert tokenizer.image_token == "<image>"
    twin = compat.renamed_tokenizer(tokenizer, tokenizer.backend_tokenizer, {"</s>": "\U000f0000"})
    assert (twin.eos_token, tokenizer.eos_token) == ("\U000f0000", "</s>")
    assert twin.backend_tokenizer is tokenizer.backend_tokenizer


def test_transformers_capturing_hooks_are_installed_once_and_left_out():
    tower = AutoModel.from_config(tiny_config().vision_config)
    holder = nn.Module()
    holder.vision_tower = tower
    compat.install_capturing_hooks(holder)

    def hooked(module):
        return sum(compat.is_capturing(hook) for part in module.modules() for hook in compat.forward_hooks(part))

    number = hooked(tower)
    assert number > 0
    compat.install_capturing_hooks(holder)
    assert hooked(tower) == number
    bare = compat.without_capturing_hooks(tower)
    assert hooked(bare) == 0 and hooked(tower) == number
    assert {p.data_ptr() for p in bare.parameters()} == {p.data_ptr() for p in tower.parameters()}


def test_accelerate_lets_the_cpu_shard(monkeypatch):
    from accelerate.utils import DistributedType

    monkeypatch.setattr(PartialState(), "distributed_type", None)
    compat.let_cpu_shard()
    assert PartialState().distributed_type == DistributedType.MULTI_GPU


def test_datasets_tell_tables_apart():
    tables = [datasets.Dataset.from_dict({"a": [number]}) for number in (1, 2)]
    assert len({compat.dataset_fingerprint(table) for table in tables}) == 2
