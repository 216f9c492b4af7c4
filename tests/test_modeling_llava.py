"""Our model against stock transformers' on tiny random models: the same keys, logits, losses, gradients, answers."""

import copy
import dataclasses
import pickle
from types import MethodType

import pytest
import torch
from golden_text import tiny_processor
from peft import LoraConfig, get_peft_model
from PIL import Image
from safetensors.torch import load_file
from tiny import IMAGE_TOKENS, tiny_batch, tiny_config, tiny_text_config, tiny_vision_config
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException, FakeTensorMode
from transformers import LlavaConfig as StockConfig
from transformers import LlavaForConditionalGeneration as StockModel
from transformers import StaticCache

from modeling_llava import LlavaForConditionalGeneration
from modeling_llava.data import LlavaDataCollator
from modeling_llava.kernels import apply_kernels
from modeling_llava.kernels.packed_attention import use_varlen_attention


def same_pair(tmp_path, **config):
    """A stock model with random weights and ours, loaded from what it saved."""
    torch.manual_seed(0)
    stock = StockModel(tiny_config(StockConfig, **config)).eval()
    stock.save_pretrained(tmp_path / "stock")
    ours, info = LlavaForConditionalGeneration.from_pretrained(tmp_path / "stock", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    return stock, ours.eval()


def without_labels(batch):
    return {name: value for name, value in batch.items() if name != "labels"}


@pytest.fixture
def model():
    return LlavaForConditionalGeneration(tiny_config()).eval()


@pytest.fixture
def batch():
    return tiny_batch()


TOWERS_AND_LANGUAGE_MODELS = {
    "clip-llama": {},
    "several-layers": {"vision_feature_layer": [-1, -2]},
    "with-class-token": {"vision_feature_select_strategy": "full", "image_seq_length": 5},
    "siglip": {"vision": lambda: tiny_vision_config("siglip_vision_model"), "vision_feature_select_strategy": "full"},
    "tied": {"text": lambda: tiny_text_config(tie_word_embeddings=True)},
    "mistral": {"text": lambda: tiny_text_config("mistral", sliding_window=7)},
    "qwen2": {"text": lambda: tiny_text_config("qwen2")},
    "linear": {"projector_hidden_act": "linear", "multimodal_projector_bias": False},
}


@pytest.fixture(params=TOWERS_AND_LANGUAGE_MODELS)
def pair(request, tmp_path):
    config = {k: v() if callable(v) else v for k, v in TOWERS_AND_LANGUAGE_MODELS[request.param].items()}
    return same_pair(tmp_path, **config)


def batch_for(model, **kwargs):
    if model.config.image_seq_length == IMAGE_TOKENS:
        return tiny_batch(**kwargs)
    batch = tiny_batch((0, 0))
    batch["input_ids"][:, 1:6] = 299  # one image of five tokens in each
    return {**batch, "pixel_values": torch.randn(2, 3, 28, 28)}


def test_logits_and_loss_equal_stock(pair):
    stock, ours = pair
    batch = batch_for(ours)
    with torch.no_grad():
        expected, actual = stock(**batch), ours(**batch)
    torch.testing.assert_close(actual.logits, expected.logits, rtol=0, atol=1e-5)
    torch.testing.assert_close(actual.loss, expected.loss, rtol=0, atol=1e-5)
    features = expected.image_hidden_states  # a list of images since transformers 5.24
    features = torch.cat(list(features)) if isinstance(features, list | tuple) else features
    torch.testing.assert_close(actual.image_hidden_states, features)


@pytest.mark.parametrize("num_items_in_batch", [None, torch.tensor(41)])
def test_gradients_of_every_parameter_equal_stock(pair, num_items_in_batch):
    stock, ours = pair
    batch = batch_for(ours)
    for model in pair:
        model.train()
        model(**batch, num_items_in_batch=num_items_in_batch).loss.backward()
    expected = dict(stock.named_parameters())
    assert {name for name, _ in ours.named_parameters()} == set(expected)
    trained = 0
    for name, parameter in ours.named_parameters():
        if expected[name].grad is None:
            assert parameter.grad is None
            continue
        trained += 1
        torch.testing.assert_close(parameter.grad, expected[name].grad, rtol=1e-4, atol=1e-6)
    assert trained > 30


def test_greedy_and_beam_answers_equal_stock(pair):
    stock, ours = pair
    inputs = without_labels(batch_for(ours))
    inputs["attention_mask"] = torch.ones_like(inputs["attention_mask"])
    for options in ({}, {"num_beams": 3}, {"num_return_sequences": 2, "num_beams": 2}):
        settings = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, **options}
        assert torch.equal(ours.generate(**inputs, **settings), stock.generate(**inputs, **settings))


def test_saved_keys_are_the_stock_ones(pair, tmp_path):
    _, ours = pair
    ours.save_pretrained(tmp_path / "ours")
    saved, stock = (load_file(tmp_path / name / "model.safetensors") for name in ("ours", "stock"))
    assert saved.keys() == stock.keys() and "language_model.model.embed_tokens.weight" in saved


@pytest.mark.parametrize("layers", [1, 2, 3])
def test_projectors_of_any_depth_round_trip(tmp_path, layers):
    activation = "linear" if layers == 1 else "gelu"
    model = LlavaForConditionalGeneration(
        tiny_config(projector_num_layers=layers, projector_hidden_act=activation)
    ).eval()
    trainable = [name for name, _ in model.model.multi_modal_projector.named_parameters() if "weight" in name]
    assert trainable == [f"linear_{number}.weight" for number in range(1, layers + 1)]
    model.save_pretrained(tmp_path)
    again = LlavaForConditionalGeneration.from_pretrained(tmp_path).eval()
    batch = without_labels(tiny_batch())
    assert torch.equal(again(**batch).logits, model(**batch).logits)
    if layers < 3:
        stock = StockModel.from_pretrained(tmp_path).eval()
        torch.testing.assert_close(stock(**batch).logits, model(**batch).logits, rtol=0, atol=1e-5)
    if layers == 1:  # the paper's W, which stock finds with an identity after it
        projector, features = model.model.multi_modal_projector, torch.randn(2, 4, 32)
        torch.testing.assert_close(projector(features), projector.linear_1(features))
        saved = load_file(tmp_path / "model.safetensors")
        assert torch.equal(saved["multi_modal_projector.linear_2.weight"], torch.eye(64))
        assert not saved["multi_modal_projector.linear_2.bias"].any()


def test_attention_implementations_agree(tmp_path, batch):
    LlavaForConditionalGeneration(tiny_config()).save_pretrained(tmp_path)
    outputs = {}
    for implementation in ("eager", "sdpa", "flex_attention"):
        model = LlavaForConditionalGeneration.from_pretrained(tmp_path, attn_implementation=implementation).eval()
        with torch.no_grad(), torch.compiler.set_stance("force_eager"):  # compiling flex_attention takes half a minute
            outputs[implementation] = model(**batch).logits[batch["attention_mask"].bool()]
    torch.testing.assert_close(outputs["sdpa"], outputs["eager"], rtol=0, atol=1e-5)
    torch.testing.assert_close(outputs["flex_attention"], outputs["eager"], rtol=0, atol=1e-5)


@pytest.mark.slow
@torch.no_grad()
def test_forward_compiles_without_graph_breaks(model, batch):
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    actual = compiled(**batch)  # first: what transformers sets up in a first eager call must be there already
    expected = model(**batch)
    torch.testing.assert_close([actual.logits, actual.loss], [expected.logits, expected.loss])
    with pytest.raises(RuntimeError, match="Image features and image tokens do not match"):
        compiled(**{**batch, "pixel_values": batch["pixel_values"][:2]})


@pytest.mark.slow
@torch.no_grad()
def test_nothing_is_read_from_the_device_in_a_compiled_step(model, batch):
    # Reading a value is what breaks a graph, where it may break; `generate` compiles its steps with a static cache.
    shared = {"pixel_values": batch["pixel_values"][:2], "image_indices": torch.tensor([0, 1, 0])}
    assert torch._dynamo.explain(model)(**{**batch, **shared}).graph_break_count == 0
    cache = StaticCache(config=model.config.text_config, max_cache_len=32)
    model(**without_labels(batch), past_key_values=cache)
    step = {"input_ids": batch["input_ids"][:, -1:], "position_ids": torch.tensor([[24]]), "past_key_values": cache}
    assert torch._dynamo.explain(model)(**step).graph_break_count == 0
    # a further question
    text = {"input_ids": torch.tensor([[2, 3, 4]] * 2), "position_ids": torch.arange(24, 27)[None]}
    assert torch._dynamo.explain(model)(**text, past_key_values=cache).graph_break_count == 0


@pytest.mark.parametrize("tower", ["clip_vision_model", "siglip_vision_model"])
def test_a_whole_model_can_be_pickled_and_copied_fresh_and_used(tower):
    strategy = "default" if tower.startswith("clip") else "full"
    model = LlavaForConditionalGeneration(
        tiny_config(vision=tiny_vision_config(tower), vision_feature_select_strategy=strategy)
    ).eval()
    hooks = len(pickle.loads(pickle.dumps(model)).model.vision_tower._forward_hooks)
    batch = {**without_labels(tiny_batch()), "output_hidden_states": True}
    fresh = [pickle.loads(pickle.dumps(model)), copy.deepcopy(model)]
    with torch.no_grad():
        expected = model(**batch)
        used = [pickle.loads(pickle.dumps(model)), copy.deepcopy(model)]
        for copied in fresh + used:
            actual = copied(**batch)
            torch.testing.assert_close(actual.logits, expected.logits, rtol=0, atol=0)
            assert len(actual.hidden_states) == len(expected.hidden_states) == 3
            assert len(copied.model.vision_tower._forward_hooks) == hooks
            for parameter in copied.model.vision_tower.parameters():
                parameter.zero_()  # nothing is shared
        torch.testing.assert_close(model(**batch).logits, expected.logits, rtol=0, atol=0)


@pytest.mark.parametrize("with_ids", [False, True])
def test_embeddings_in_place_of_ids_are_answered_as_stock_answers(tmp_path, with_ids):
    stock, ours = same_pair(tmp_path)
    batch = without_labels(tiny_batch((1, 1)))
    ids = batch.pop("input_ids")
    batch["attention_mask"] = torch.ones_like(ids)
    if with_ids:
        batch["input_ids"] = ids
    settings = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    answers = [
        model.generate(inputs_embeds=model.get_input_embeddings()(ids), **batch, **settings) for model in (ours, stock)
    ]
    assert torch.equal(*answers) and answers[0].shape[1] == 6 + with_ids * ids.shape[1]


def test_images_encoded_beforehand_give_the_same_and_stay_as_they_are(model):
    batch = without_labels(tiny_batch((1, 1)))
    batch["attention_mask"] = torch.ones_like(batch["attention_mask"])
    options = {"max_new_tokens": 3, "do_sample": False, "pad_token_id": 0}
    logits = model(**batch).logits
    expected = [model.generate(**batch, num_beams=beams, **options) for beams in (3, 1)]
    with torch.no_grad():
        given = {"image": model.get_image_features(batch.pop("pixel_values"), return_dict=True)}
    torch.testing.assert_close(model(mm_encoder_outputs=given, **batch).logits, logits)
    for beams, answers in zip((3, 1), expected):  # transformers repeats the features for the beams
        assert torch.equal(model.generate(**batch, mm_encoder_outputs=given, num_beams=beams, **options), answers)
    assert list(given) == ["image"] and len(given["image"].pooler_output) == 2
    with pytest.raises(ValueError, match="not both"):
        model(mm_encoder_outputs=given, pixel_values=torch.zeros(2, 3, 28, 28), **batch)


def test_image_features_take_layer_and_strategy_by_position_as_stock_does(tmp_path):
    stock, ours = same_pair(tmp_path)
    pixels = torch.randn(2, 3, 28, 28)
    for layer, strategy in ((-1, "full"), ([-1, -3], "default")):
        if isinstance(layer, list):
            stock, ours = same_pair(tmp_path, vision_feature_layer=[-2, -1])
        expected = stock.get_image_features(pixels, layer, strategy).pooler_output
        actual = ours.get_image_features(pixels, layer, strategy).pooler_output
        torch.testing.assert_close(list(actual), list(expected))


def test_the_embeddings_of_the_patches_can_be_projected():
    model = LlavaForConditionalGeneration(tiny_config(vision_feature_layer=0)).eval()
    pixels = torch.randn(1, 3, 28, 28)
    states = model.model.vision_tower(pixels, output_hidden_states=True).hidden_states[0]
    expected = model.model.multi_modal_projector(states[:, 1:])
    torch.testing.assert_close(model.get_image_features(pixels).pooler_output[0], expected[0])


@pytest.mark.parametrize("hidden_size", [64, 32])
def test_assisted_generation_gives_the_same_answer_and_the_assistant_sees_the_image(hidden_size, model):
    torch.manual_seed(0)
    assistant = copy.deepcopy(model)
    if hidden_size != 64:  # its language model cannot read the larger one's image features
        assistant = LlavaForConditionalGeneration(tiny_config(text=tiny_text_config(hidden_size=hidden_size))).eval()
    assistant.generation_config.assistant_confidence_threshold = 0.0  # random weights are never sure
    inputs = without_labels(tiny_batch((2,)))
    options = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    expected = model.generate(**inputs, **options)
    lengths = []
    model.lm_head.register_forward_hook(lambda module, inputs, logits: lengths.append(logits.shape[1]))
    assert torch.equal(model.generate(**inputs, **options, assistant_model=assistant), expected)
    if hidden_size == 64:  # its guesses are what the model says itself, so 12 tokens take a few calls
        assert len(lengths) <= 4


def test_an_image_that_fills_two_slots_is_encoded_once(model):
    batch = without_labels(tiny_batch((1, 2)))
    first, second, _ = batch["pixel_values"]
    batch["pixel_values"] = torch.stack([first, second, first])
    expected = model(**batch).logits
    seen = []
    hook = model.model.vision_tower.register_forward_pre_hook(lambda module, args: seen.append(args[0].shape[0]))
    batch["pixel_values"] = torch.stack([first, second])
    actual = model(**batch, image_indices=torch.tensor([0, 1, 0])).logits
    hook.remove()
    assert seen == [2]
    torch.testing.assert_close(actual, expected)
    answers = model.generate(
        **batch, image_indices=torch.tensor([0, 1, 0]), max_new_tokens=3, num_beams=2, pad_token_id=0
    )
    assert answers.shape[1] == batch["input_ids"].shape[1] + 3


def test_logits_to_keep_slices_logits_and_not_the_loss(model, batch):
    whole, last = model(**batch), model(**batch, logits_to_keep=3)
    assert last.logits.shape == (2, 3, 300)
    torch.testing.assert_close(last.logits, whole.logits[:, -3:])
    torch.testing.assert_close(last.loss, whole.loss)
    chosen = model(**batch, logits_to_keep=torch.tensor([0, 5]))
    torch.testing.assert_close(chosen.logits, whole.logits[:, [0, 5]])


def test_logits_are_built_when_asked_for_and_not_in_training(batch):
    model = LlavaForConditionalGeneration(tiny_config())
    for outputs in (model.eval()(**batch, skip_logits=True), model.train()(**batch)):
        assert not hasattr(outputs, "logits")
        with pytest.raises(AttributeError, match="skip_logits=False"):
            outputs.logits  # noqa: B018
        with pytest.raises(AttributeError, match="skip_logits=False"):
            outputs["logits"]
    assert model.eval()(**batch).logits is not None
    assert model.train()(**batch, skip_logits=False).logits is not None
    assert model.train()(**without_labels(batch)).logits is not None


def test_skipped_logits_keep_their_place_in_a_tuple_and_break_nothing_that_reads_every_field(batch):
    model = LlavaForConditionalGeneration(tiny_config()).train()
    whole = model(**batch, skip_logits=False)
    outputs, as_tuple = model(**batch), model(**batch, return_dict=False)
    torch.testing.assert_close([as_tuple[0], as_tuple[2]], [whole[0], whole[2]])  # the last: the image features
    assert as_tuple[1] is outputs[1] is None and len(as_tuple) == len(whole.to_tuple())
    copied = pickle.loads(pickle.dumps(model.eval()(**batch, skip_logits=True)))
    torch.testing.assert_close(copied.loss, model(**batch).loss)
    leaves, structure = torch.utils._pytree.tree_flatten(outputs)
    again = torch.utils._pytree.tree_unflatten(leaves, structure)
    assert type(again) is type(dataclasses.replace(outputs)) is type(outputs)
    assert "loss" in repr(outputs)


def test_label_smoothing_and_shifted_labels_reach_the_loss_within_peft(model, batch):
    logits = model(**batch).logits[:, :-1].flatten(0, 1)
    model = get_peft_model(model, LoraConfig(target_modules=r".*language_model.*\.q_proj"))
    shifted = torch.nn.functional.pad(batch["labels"][:, 1:], (0, 1), value=-100)
    targets = batch["labels"][:, 1:].flatten()
    expected = torch.nn.functional.cross_entropy(logits, targets, label_smoothing=0.2)
    loss = model(**without_labels(batch), shift_labels=shifted, label_smoothing=0.2).loss
    torch.testing.assert_close(loss, expected)


def test_liger_does_not_replace_forward_and_other_libraries_may_wrap_it():
    model = LlavaForConditionalGeneration(tiny_config())
    for replaced, module in ((False, "liger_kernel.transformers.model.llava"), (True, "accelerate.utils.operations")):

        def forward(self, *args, **kwargs):
            return "theirs"

        forward.__module__ = module
        model.forward = MethodType(forward, model)  # as Liger's patch of a "llava" does
        assert (model.forward() == "theirs") is replaced if replaced else "forward" not in vars(model)


@pytest.mark.parametrize("tower", ["clip_vision_model", "siglip_vision_model"])
def test_in_training_the_tower_ends_with_the_selected_layer_unless_someone_takes_part_in_later_ones(tower, batch):
    vision = tiny_vision_config(tower, num_hidden_layers=4)
    strategy = "full" if tower == "siglip_vision_model" else "default"
    torch.manual_seed(0)
    model = LlavaForConditionalGeneration(tiny_config(vision=vision, vision_feature_select_strategy=strategy)).train()
    layers = model.model.vision_tower.encoder.layers
    computed = []
    for number, layer in enumerate(layers):
        forward = layer.mlp.forward
        layer.mlp.forward = lambda x, number=number, forward=forward: (computed.append(number), forward(x))[1]

    def step(feature_layer=None):
        computed.clear()
        model.zero_grad()
        loss = model(**batch, vision_feature_layer=feature_layer).loss
        loss.backward()
        return list(computed), [loss, *(p.grad.clone() for p in model.parameters() if p.grad is not None)]

    assert step()[0] == [0, 1, 2, 3]  # whoever takes part gets what they always got: a trained parameter, a hook
    model.model.vision_tower.requires_grad_(False)
    hook = layers[3].self_attn.register_forward_hook(lambda *_: None)
    ran, expected = step()
    assert ran == [0, 1, 2, 3]
    hook.remove()
    ran, skipped = step()
    assert ran == [0, 1, 2]
    torch.testing.assert_close(skipped, expected, rtol=0, atol=0)
    layers[:3].requires_grad_(True)  # `train_vision_tower` freezes what is behind the features
    assert step()[0] == [0, 1, 2] and layers[0].mlp.fc1.weight.grad is not None

    assert len(model.get_image_features(batch["pixel_values"], output_hidden_states=True).hidden_states) == 5
    assert not any("forward" in vars(layer) for layer in layers)
    model.eval()(**batch)
    assert computed[-4:] == [0, 1, 2, 3]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(tmp_path, dtype):
    LlavaForConditionalGeneration(tiny_config()).to(dtype).save_pretrained(tmp_path)
    model = LlavaForConditionalGeneration.from_pretrained(tmp_path, dtype="auto")
    assert model.dtype == dtype
    outputs = model(**tiny_batch())  # pixel values stay float32: the tower casts them
    assert outputs.logits.dtype == dtype
    assert outputs.loss.dtype == torch.float32 and torch.isfinite(outputs.loss)


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda batch: batch.pop("pixel_values"), "no pixel_values"),
        (
            lambda batch: batch.update(pixel_values=batch["pixel_values"][:2]),
            "Image features and image tokens do not match: .* 12 image tokens .* yield 8",
        ),
        (lambda batch: batch.pop("input_ids"), "exactly one of input_ids and inputs_embeds"),
    ],
)
def test_wrong_inputs_are_one_clear_error(change, message, model, batch):
    change(batch)
    with pytest.raises(ValueError, match=message):
        model(**batch)


def test_a_bare_forward_without_the_images_warns_and_is_stocks(monkeypatch, model):
    warnings = []
    monkeypatch.setattr("modeling_llava.modeling_llava.logger.warning_once", warnings.append)
    stock = StockModel(tiny_config(StockConfig)).eval()
    stock.load_state_dict(model.state_dict())
    batch = {name: tensor for name, tensor in tiny_batch().items() if name in ("input_ids", "attention_mask")}
    with torch.no_grad():
        torch.testing.assert_close(model(**batch).logits, stock(**batch).logits)
    assert len(warnings) == 1 and "no pixel_values" in warnings[0]


def test_nothing_is_generated_blind(model):
    with pytest.raises(ValueError, match="no pixel_values"):
        model.generate(tiny_batch()["input_ids"], max_new_tokens=2)
    words = torch.randint(3, 200, (1, 6))
    assert model.generate(words, max_new_tokens=2, do_sample=False).shape[1] >= 7


@pytest.mark.parametrize("attention, warned", [("sdpa", True), ("varlen", False)])
def test_a_pack_under_an_attention_that_needs_a_mask_is_warned_of(attention, warned, monkeypatch, model):
    warnings = []
    monkeypatch.setattr("modeling_llava.kernels.packed_attention.logger.warning_once", warnings.append)
    model.set_attn_implementation({"text_config": attention})
    lens = torch.tensor([0, 4, 9], dtype=torch.int32)
    pack = {"cu_seq_lens_q": lens, "cu_seq_lens_k": lens, "max_length_q": 5, "max_length_k": 5}
    position_ids = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4]])
    model(input_ids=torch.randint(3, 200, (1, 9)), position_ids=position_ids, **pack)
    assert any("mask of all tokens" in warning for warning in warnings) == warned


def test_a_training_step_on_a_pack_of_the_collator_reads_nothing_from_the_device():
    """Tensors without values, which raise where one is read, run to the end; without what the collator counted they do not."""
    torch.manual_seed(0)
    text = tiny_text_config(vocab_size=704)
    model = LlavaForConditionalGeneration(tiny_config(text=text, image_token_index=700)).train()
    use_varlen_attention(model)
    image = Image.new("RGB", (40, 30), "teal")
    messages = [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is this?"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "A cat."}]},
    ]
    text_only = [{"role": "user", "content": "Why?"}, messages[1]]
    conversations = [{"id": "a", "messages": messages, "images": [image]}, {"id": "b", "messages": text_only}]
    batch = LlavaDataCollator(tiny_processor(patches=2), packing=True)(conversations)
    counted = ("image_token_indices", "supervised_indices", "segment_lengths")
    bare = {name: value for name, value in batch.items() if name not in counted}
    steps = []
    for inputs in (batch, bare):
        model.zero_grad()
        loss = model(**inputs).loss
        loss.backward()
        steps.append([loss, *(p.grad.clone() for p in model.parameters() if p.grad is not None)])
    torch.testing.assert_close(*steps)
    for change, message in (
        ({"pixel_values": None}, "no pixel_values"),
        ({"image_token_indices": torch.arange(3)}, "3 image tokens"),
    ):
        with pytest.raises(ValueError, match=f"Image features and image tokens do not match.*{message}"):
            model(**{**batch, **change})

    apply_kernels(model)
    with FakeTensorMode(allow_non_fake_inputs=True) as fake:
        batch = {name: fake.from_tensor(v) if isinstance(v, torch.Tensor) else v for name, v in batch.items()}
        torch.autograd.grad(model(**batch).loss, [p for p in model.parameters() if p.requires_grad], allow_unused=True)
        for name in counted:
            with pytest.raises((DataDependentOutputException, DynamicOutputShapeException)):
                model(**{**batch, name: None})
