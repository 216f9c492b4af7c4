"""HF → GGUF: what the files hold, and what llama.cpp computes from them."""

import ctypes
import json
import shutil
import sys
import types
from pathlib import Path
from unittest.mock import Mock

import jinja2
import numpy as np
import pytest
import torch
from conversion_cases import GOLDEN, edit_json, random_original, rewrite
from llama_cpp_runs import llava_with_llama_cpp, needs_llama_cpp, run_llama_cpp
from PIL import Image
from published import CONVERSATION, FORMS, build, build_siglip
from sentencepiece import SentencePieceProcessor
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer

from modeling_llava import LlavaForConditionalGeneration, LlavaProcessor
from modeling_llava.conversion import convert_hf_to_gguf, convert_original_to_hf
from modeling_llava.conversion.hf_to_gguf import ARCHITECTURES, rotary_order
from modeling_llava.conversion.vocabularies import gguf_chat_template, vocabulary
from modeling_llava.conversion.writing import OutputFolder
from modeling_llava.text.chat_templates import CHAT_TEMPLATES, load_chat_template


gguf = pytest.importorskip("gguf")

PATCH = 14


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """HF folders: the golden LLaVA-1.5, the golden linear one with `<im_start>`, and a Mistral with grouped queries."""
    folder = tmp_path_factory.mktemp("hf")
    for name in ("llava_v15_tiny", "llava_v1_tiny"):
        convert_original_to_hf(GOLDEN / name, folder / name, check=False)
    random_original(folder / "original", model_type="mistral")
    convert_original_to_hf(folder / "original", folder / "mistral", check=False)
    return folder


def read(path: Path) -> tuple[dict, dict[str, torch.Tensor], dict[str, str]]:
    """Fields, tensors (dequantised) and their types of a GGUF file, by the gguf package's reader."""
    reader = gguf.GGUFReader(path)
    fields = {name: field.contents() for name, field in reader.fields.items()}
    tensors, kinds = {}, {}
    for tensor in reader.tensors:
        shape = [int(n) for n in reversed(tensor.shape)]
        tensors[tensor.name] = torch.from_numpy(gguf.dequantize(tensor.data, tensor.tensor_type).reshape(shape).copy())
        kinds[tensor.name] = tensor.tensor_type.name
    return fields, tensors, kinds


def test_language_file_holds_what_llama_cpp_asks_for(folders, tmp_path):
    conversion = convert_hf_to_gguf(folders / "mistral", tmp_path / "out", dtype="f32")
    assert conversion.check.is_sound
    fields, tensors, _ = read(tmp_path / "out/model-f32.gguf")
    model = LlavaForConditionalGeneration.from_pretrained(folders / "mistral")
    processor = LlavaProcessor.from_pretrained(folders / "mistral")
    expected = {
        "general.architecture": "llama",
        "llama.block_count": 2,
        "llama.context_length": 512,
        "llama.embedding_length": 64,
        "llama.feed_forward_length": 96,
        "llama.attention.head_count": 4,
        "llama.attention.head_count_kv": 2,
        "llama.rope.dimension_count": 16,
        "llama.rope.freq_base": 10000.0,
        "llama.vocab_size": 704,
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.add_bos_token": True,
        "tokenizer.ggml.add_eos_token": False,
        "tokenizer.chat_template": gguf_chat_template(processor.chat_template),
    }
    assert {key: fields[key] for key in expected} == expected
    assert fields["llama.attention.layer_norm_rms_epsilon"] == pytest.approx(1e-5)
    weights = model.model.language_model.state_dict()
    assert torch.equal(tensors["token_embd.weight"], weights["embed_tokens.weight"])
    assert torch.equal(tensors["blk.1.ffn_down.weight"], weights["layers.1.mlp.down_proj.weight"])
    assert torch.equal(tensors["blk.0.attn_norm.weight"], weights["layers.0.input_layernorm.weight"])
    assert torch.equal(tensors["output.weight"], model.lm_head.weight)
    assert len(tensors) == len(weights) + 1


def test_queries_and_keys_are_reordered_for_llama_cpps_rotation():
    """HF rotates values half a head apart, llama.cpp neighbours: after the reordering both give the same products."""
    heads, dim, position = 3, 8, 5
    query, key = torch.randn(heads * dim), torch.randn(heads * dim)
    angles = position * 10000.0 ** (-torch.arange(0, dim, 2) / dim)

    def rotated(first, second):
        return [first * angles.cos() - second * angles.sin(), second * angles.cos() + first * angles.sin()]

    def hf(x):
        return torch.cat(rotated(*x.view(heads, 2, dim // 2).unbind(1)), 1)

    def llama_cpp(x):
        return torch.stack(rotated(*x.view(heads, dim // 2, 2).unbind(2)), dim=2).reshape(heads, dim)

    order = rotary_order(heads, dim)
    assert sorted(order.tolist()) == list(range(heads * dim))
    ours = (hf(query) * hf(key.roll(1))).sum(1)
    theirs = (llama_cpp(query[order]) * llama_cpp(key.roll(1)[order])).sum(1)
    assert torch.allclose(ours, theirs, atol=1e-5)


@pytest.mark.parametrize("tower", ["clip", "siglip"])
def test_mmproj_holds_the_tower_up_to_the_selected_layer(folders, tmp_path, tower):
    folder = folders / "llava_v15_tiny" if tower == "clip" else build_siglip("llama3")
    convert_hf_to_gguf(folder, tmp_path / "out", dtype="f32")
    fields, tensors, _ = read(tmp_path / "out/mmproj-f32.gguf")
    expected = {
        "general.architecture": "clip",
        "general.type": "mmproj",
        "clip.has_vision_encoder": True,
        "clip.projector_type": "mlp",
        "clip.use_gelu": tower == "siglip",  # quick_gelu otherwise
        "clip.vision.image_size": 42 if tower == "clip" else 28,
        "clip.vision.patch_size": PATCH,
        "clip.vision.embedding_length": 32,
        "clip.vision.feed_forward_length": 64,
        "clip.vision.projection_dim": 64,
        "clip.vision.attention.head_count": 4,
        "clip.vision.block_count": 2,  # of 3: hidden state −2 is what the second layer gives
        "clip.vision.feature_layer": [2],
    }
    assert {key: fields[key] for key in expected} == expected
    assert not any(name.startswith(("v.blk.2.", "v.post_ln", "v.head")) for name in tensors)
    model = LlavaForConditionalGeneration.from_pretrained(folder).model
    vision = model.vision_tower
    assert torch.equal(tensors["v.blk.1.ffn_up.weight"], vision.encoder.layers[1].mlp.fc1.weight)
    assert torch.equal(tensors["v.blk.0.attn_out.bias"], vision.encoder.layers[0].self_attn.out_proj.bias)
    assert torch.equal(tensors["v.patch_embd.weight"], vision.embeddings.patch_embedding.weight)
    assert ("v.class_embd" in tensors) == (tower == "clip") == ("v.patch_embd.bias" not in tensors)
    assert torch.equal(tensors["mm.0.weight"], model.multi_modal_projector.linear_1.weight)
    assert torch.equal(tensors["mm.2.bias"], model.multi_modal_projector.linear_2.bias)


def test_linear_projector_survives_llama_cpps_gelu(folders, tmp_path):
    """llama.cpp puts GELU between two layers whatever the checkpoint: [W; −W] and [I, −I] undo it."""
    convert_hf_to_gguf(folders / "llava_v1_tiny", tmp_path / "out", dtype="f32")
    _, tensors, _ = read(tmp_path / "out/mmproj-f32.gguf")
    projector = LlavaForConditionalGeneration.from_pretrained(folders / "llava_v1_tiny").model.multi_modal_projector
    features = torch.randn(20, 32)
    middle = F.gelu(F.linear(features, tensors["mm.0.weight"], tensors["mm.0.bias"]), approximate="tanh")
    result = F.linear(middle, tensors["mm.2.weight"], tensors["mm.2.bias"])
    assert torch.allclose(result, projector(features), atol=1e-5)


# Tokenizer and template


def test_vocabulary_is_sentencepieces_with_the_added_tokens(folders):
    folder = folders / "llava_v1_tiny"
    table = vocabulary(folder, AutoTokenizer.from_pretrained(folder), 704)
    pieces = SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    assert table["tokens"][3:700] == [pieces.id_to_piece(i) for i in range(3, 700)]
    assert table["scores"][3:700] == [pieces.get_score(i) for i in range(3, 700)]
    assert table["tokens"][700:] == ["<im_patch>", "<im_start>", "<im_end>", "<image>"]
    unknown, control, byte = 2, 3, 6
    assert table["types"][:3] == [unknown, control, control] and table["types"][700:] == [control] * 4
    assert table["types"][pieces.piece_to_id("<0x0A>")] == byte


def test_vocabulary_without_a_sentencepiece_file_merges_in_the_same_order(folders, tmp_path):
    """From `tokenizer.json` alone, scores come from the order of merges: every pair of tokens ranks as before."""
    folder = folders / "llava_v15_tiny"
    tokenizer = AutoTokenizer.from_pretrained(folder)
    shutil.copyfile(folder / "tokenizer.json", tmp_path / "tokenizer.json")
    exact, derived = vocabulary(folder, tokenizer, 704), vocabulary(tmp_path, tokenizer, 704)
    assert exact["tokens"] == derived["tokens"] and exact["types"] == derived["types"]
    merged = [i for i in range(700) if derived["scores"][i] > -10000]
    assert len(merged) > 200
    assert sorted(merged, key=lambda i: -exact["scores"][i]) == sorted(merged, key=lambda i: -derived["scores"][i])


@pytest.mark.parametrize("name, pre", [("llama3", "llama-bpe"), ("qwen2.5", "qwen2"), ("qwen3", "qwen2")])
def test_byte_level_vocabulary_has_the_name_of_its_split(name, pre):
    folder = build_siglip(name)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    table = vocabulary(folder, tokenizer, 1024)
    assert (table["model"], table["pre"]) == ("gpt2", pre)
    for token, i in tokenizer.get_vocab().items():
        assert table["tokens"][i] == token
    assert table["merges"][0].count(" ") == 1


@pytest.mark.parametrize(
    "edit, rows, message",
    [
        ({}, 10, "but the embedding has 10 rows"),
        ({"model": {"type": "Unigram"}}, 700, "is a Unigram tokenizer"),
        ({"pre_tokenizer": {"type": "Whitespace"}}, 1024, "splits text in a way that is not known"),
    ],
)
def test_tokenizer_that_llama_cpp_does_not_know_is_named(tmp_path, edit, rows, message):
    tokenizer = AutoTokenizer.from_pretrained(build("qwen2.5"))
    shutil.copyfile(build("qwen2.5") / "tokenizer.json", tmp_path / "tokenizer.json")
    edit_json(tmp_path / "tokenizer.json", **edit)
    with pytest.raises(ValueError, match=message):
        vocabulary(tmp_path, tokenizer, rows)


@pytest.mark.parametrize("wrap", [None, ("<im_start>", "<im_end>"), ("", " ")], ids=str)
@pytest.mark.parametrize("name", [name for name in CHAT_TEMPLATES if name != "plain"])
def test_template_puts_llama_cpps_image_marker_where_training_had_the_image(folders, name, wrap):
    """llama.cpp's programs hand over a string with the marker in front, and render without Jinja extensions."""
    template = jinja2.Environment().from_string(gguf_chat_template(load_chat_template(name, image_wrap=wrap)))
    variables = {"bos_token": "<s>", "eos_token": "</s>", "add_generation_prompt": True}
    processor = LlavaProcessor.from_pretrained(folders / "llava_v15_tiny")
    reference = load_chat_template(name, image_wrap=None if wrap == ("", " ") else wrap)
    for marker, question in (("<__media__>", "What is it?"), ("<__media_a7Kq__>", "Is x < y__> z?\n  - why\n")):
        turns = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}]
        turns += [{"role": "assistant", "content": "A cat."}, {"role": "user", "content": "And <b>now</b>?"}]
        expected = processor.apply_chat_template(turns, chat_template=reference, add_generation_prompt=True)
        given = [{"role": "user", "content": f"{marker}{question}"}, *turns[1:]]
        assert template.render(messages=given, **variables) == expected.replace("<image>", marker)


@pytest.mark.parametrize("template", ["{{ messages[0]['content'] }}", "{{ raise_exception('no') }}", "USER: <image>"])
def test_template_without_images_is_refused(template):
    with pytest.raises(ValueError, match="does not support images"):
        gguf_chat_template(template)


# What cannot be written


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"mm_projector_type": "mlp3x_gelu", "projector_layers": 3}, "projector of 3 layers"),
        ({"mm_vision_select_feature": "cls_patch"}, "vision_feature_select_strategy='full'"),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rope_type 'dynamic'"),
        ({"mm_vision_select_layer": 0}, "begins at 1"),
    ],
)
def test_what_llama_cpp_cannot_express_is_said(tmp_path, fields, message):
    random_original(tmp_path / "original", projector_layers=fields.pop("projector_layers", 2), **fields)
    convert_original_to_hf(tmp_path / "original", tmp_path / "hf", check=False)
    with pytest.raises(ValueError, match=message):
        convert_hf_to_gguf(tmp_path / "hf", tmp_path / "gguf")
    assert not (tmp_path / "gguf").exists()


def test_values_beyond_the_type_are_found(folders, tmp_path):
    shutil.copytree(folders / "llava_v15_tiny", tmp_path / "hf")
    key = "language_model.model.layers.1.mlp.up_proj.weight"
    rewrite(tmp_path / "hf", lambda tensors: tensors | {key: tensors[key] * 1e6})
    with pytest.raises(ValueError, match=r"too large for f16 \(bf16 and f32 go further\).*'blk\.1\.ffn_up\.weight'"):
        convert_hf_to_gguf(tmp_path / "hf", tmp_path / "out")
    assert convert_hf_to_gguf(tmp_path / "hf", tmp_path / "out", dtype="bf16").check.is_sound


def test_rerun_with_another_template_starts_again(folders, tmp_path, monkeypatch):
    """Template and tokenizer lie inside the file, so that a file of before is of no use."""
    shutil.copytree(folders / "llava_v15_tiny", tmp_path / "hf")
    monkeypatch.setattr(OutputFolder, "commit", Mock(side_effect=KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        convert_hf_to_gguf(tmp_path / "hf", tmp_path / "out")
    monkeypatch.undo()
    (tmp_path / "hf/chat_template.jinja").write_text(load_chat_template("chatml"))
    convert_hf_to_gguf(tmp_path / "hf", tmp_path / "out")
    fields, _, _ = read(tmp_path / "out/model-f16.gguf")
    assert "<|im_start|>" in fields["tokenizer.chat_template"]


@pytest.mark.parametrize("package, dtype", [("gguf", "f16"), ("llama_cpp", "q4_k_m")])
def test_missing_package_is_named(folders, tmp_path, monkeypatch, package, dtype):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ImportError, match=r"modeling-llava\[gguf\]" if package == "gguf" else "pip install llama-cpp"):
        convert_hf_to_gguf(folders / "mistral", tmp_path / "out", dtype=dtype)


@pytest.mark.parametrize("status, message", [(1, "could not quantise"), (0, "256 does not divide; take q8_0")])
def test_quantiser_that_fails_or_takes_another_type_is_found(folders, tmp_path, monkeypatch, status, message):
    """llama.cpp's falls back in silence where 256 does not divide a row; here one that leaves the types as they are."""

    def quantize(source, target, parameters):
        shutil.copyfile(source, target)
        return status

    fake = types.ModuleType("llama_cpp")
    fake.llama_model_quantize_default_params = lambda: type("Parameters", (ctypes.Structure,), {})()
    fake.llama_model_quantize, fake.LLAMA_FTYPE_MOSTLY_Q6_K = quantize, 18
    monkeypatch.setitem(sys.modules, "llama_cpp", fake)
    with pytest.raises((ValueError, OSError), match=message):
        convert_hf_to_gguf(folders / "mistral", tmp_path / "out", dtype="q6_k")
    assert not (tmp_path / "out").exists()


def test_class_token_last_needs_a_class_token(tmp_path):
    with pytest.raises(ValueError, match="without a class token"):
        convert_hf_to_gguf(build_siglip("qwen3"), tmp_path / "out", class_token_last=True)


def test_another_language_model_is_written_as_a_folder_for_llama_cpps_own_program(tmp_path):
    conversion = convert_hf_to_gguf(build("phi3"), tmp_path / "out")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["language_model", "mmproj-f16.gguf"]
    assert "convert_hf_to_gguf.py" in conversion.notes[0] and conversion.check.is_sound
    folder = tmp_path / "out/language_model"
    text, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values()) and json.loads((folder / "config.json").read_text())["model_type"] == "phi3"
    whole, ids = LlavaForConditionalGeneration.from_pretrained(build("phi3")), torch.arange(20)[None]
    with torch.no_grad():
        assert torch.equal(text(ids).logits, whole(ids).logits)
    turns = [{"role": "user", "content": f"<__media__>{CONVERSATION[0]['content'][1]['text']}"}]
    options = {"tokenize": False, "add_generation_prompt": True}
    prompt = AutoTokenizer.from_pretrained(folder).apply_chat_template(turns, **options)
    assert prompt == FORMS["phi3"].prompt.replace("<image>", "<__media__>")


# llama.cpp itself

FEATURE_TOLERANCE = {"f32": 2e-3, "f16": 3e-3, "bf16": 1.2e-2, "q8_0": 4e-2}
"""Of image features, relative to the largest. GELU comes from a float16 table in llama.cpp, and products of bf16 and q8_0
weights are taken with activations rounded to the same type."""

LOGIT_TOLERANCE = {"f32": 5e-3, "f16": 1e-2, "bf16": 3e-2, "q8_0": 8e-2, "q6_k": 8e-2, "q4_k_m": 8e-2}
"""Of logits, relative to the largest."""


@torch.no_grad()
def defective_features(model, pixel_values: torch.Tensor) -> np.ndarray:
    """
    Image features as builds of llama.cpp with the defect of its issue 25814 compute them: tokens are `[patches, class]`,
    token i has position i, and tokens 1 to n are given on.
    """
    tower = model.model.vision_tower
    patches = tower.embeddings.patch_embedding(pixel_values).flatten(2).transpose(1, 2)
    token = tower.embeddings.class_embedding.expand(1, 1, -1)
    states = torch.cat([patches, token], dim=1) + tower.embeddings.position_embedding.weight
    states = tower.pre_layrnorm(states)
    for layer in tower.encoder.layers[:-1]:  # hidden state −2
        states = layer(states, attention_mask=None)
    return model.model.multi_modal_projector(states[:, 1:])[0].numpy()


@torch.no_grad()
def check_language_model(model, ids: list[int], features: np.ndarray, got: dict, tolerance: float) -> None:
    """Our language model on the given image features must choose llama.cpp's tokens, but for ties within the rounding."""
    mark = ids.index(-200)
    embed = model.get_input_embeddings()
    text = [embed(torch.tensor(part, dtype=torch.long)) for part in (ids[:mark], ids[mark + 1 :])]
    tokens = [int(token) for token in got["greedy"]]
    embeddings = torch.cat([text[0], torch.from_numpy(features), text[1], embed(torch.tensor(tokens))])[None]
    logits = model(inputs_embeds=embeddings).logits[0, -len(tokens) - 1 : -1].numpy()
    scale = tolerance * np.abs(logits).max()
    assert np.abs(logits[0] - got["logits"]).max() <= scale
    for position, token in enumerate(tokens):
        assert logits[position, token] >= logits[position].max() - 2 * scale


def questions(processor, side: int) -> tuple[list[np.ndarray], list[str], list[list[int]], list[torch.Tensor]]:
    """Three images whose first patch is padding's colour, prompts for llama.cpp, and our ids and pixels for them."""
    rng = np.random.default_rng(0)
    images, prompts, ids, pixels = [], [], [], []
    for i in range(3):
        image = rng.integers(0, 256, (side, side, 3), dtype=np.uint8)
        image[:PATCH, :PATCH] = [int(mean * 255) for mean in processor.image_processor.image_mean]
        content = [{"type": "image"}, {"type": "text", "text": f"What is in image {i}?"}]
        prompt = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
        images.append(image)
        prompts.append(prompt.replace("<image>", "<__media__>"))
        tokens = processor.tokenizer(prompt).input_ids
        ids.append([-200 if token == processor.image_token_id else token for token in tokens])
        pixels.append(processor.image_processor(Image.fromarray(image), return_tensors="pt").pixel_values)
    return images, prompts, ids, pixels


@needs_llama_cpp
@pytest.mark.slow
@pytest.mark.parametrize("class_token_last", [False, True], ids=["standard", "class_token_last"])
@pytest.mark.parametrize(
    "name, dtype",
    [*[("llava_v15_tiny", dtype) for dtype in FEATURE_TOLERANCE], ("llava_v1_tiny", "f32"), ("mistral", "f16")],
)
def test_llama_cpp_computes_what_we_do(folders, tmp_path, record_property, name, dtype, class_token_last):
    convert_hf_to_gguf(folders / name, tmp_path / "out", dtype=dtype, class_token_last=class_token_last)
    processor = LlavaProcessor.from_pretrained(folders / name)
    model = LlavaForConditionalGeneration.from_pretrained(folders / name).eval()
    images, prompts, expected_ids, pixels = questions(processor, 42)
    results = run_llama_cpp(tmp_path / "out", images, prompts, tmp_path / "work")
    builds = set()
    for image, ids, got in zip(pixels, expected_ids, results, strict=True):
        assert got["ids"].tolist() == ids
        exact = model.get_image_features(image).pooler_output[0].detach().numpy()
        tolerance = FEATURE_TOLERANCE[dtype] * np.abs(exact).max()
        if class_token_last:  # what builds with the defect give: all features, the first one last
            candidates = {"defect 25814": np.roll(exact, -1, axis=0)}
        else:
            candidates = {"fixed": exact, "defect 25814": defective_features(model, image)}
        errors = {build: np.abs(got["features"] - features).max() for build, features in candidates.items()}
        build = min(errors, key=errors.get)
        builds.add(build)
        assert errors[build] <= tolerance, errors
        check_language_model(model, ids, got["features"], got, LOGIT_TOLERANCE[dtype])
    assert len(builds) == 1
    record_property("llama.cpp", builds.pop())


@needs_llama_cpp
@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["f16", "q8_0", "q6_k", "q4_k_m"])
@pytest.mark.parametrize("name", ["llama3", "qwen2.5", "qwen3"])
def test_llama_cpp_computes_what_we_do_for_siglip_with_llama_and_qwen(tmp_path, name, dtype):
    """Image features of `mmproj`, and greedy tokens of the language model with the weights that the file holds."""
    folder = build_siglip(name, wide=True)
    words = ["convert", folder, tmp_path / "out", "--to", "gguf", "--dtype", dtype]
    llava_with_llama_cpp(*words)
    _, stored, kinds = read(tmp_path / f"out/model-{dtype}.gguf")
    matrices = {kinds[key] for key, value in stored.items() if value.dim() > 1}
    assert matrices == {"q4_k_m": {"Q4_K", "Q6_K"}}.get(dtype, {dtype.upper()})  # a fallback would be Q5_0 or Q8_0

    model = LlavaForConditionalGeneration.from_pretrained(folder).eval()
    processor = LlavaProcessor.from_pretrained(folder)
    images, prompts, expected_ids, pixels = questions(processor, 28)
    results = run_llama_cpp(tmp_path / "out", images, prompts, tmp_path / "work")
    exact = [model.get_image_features(image).pooler_output[0].detach().numpy() for image in pixels]
    put_stored_weights(model, stored)
    image_type = "q8_0" if dtype == "q8_0" else "f16"
    for features, ids, got in zip(exact, expected_ids, results, strict=True):
        assert got["ids"].tolist() == ids
        assert np.abs(got["features"] - features).max() <= FEATURE_TOLERANCE[image_type] * np.abs(features).max()
        check_language_model(model, ids, features, got, LOGIT_TOLERANCE[dtype])


@torch.no_grad()
def put_stored_weights(model, stored: dict[str, torch.Tensor]) -> None:
    """Give our language model the weights that a GGUF file holds."""
    text = model.config.text_config
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH[ARCHITECTURES[text.model_type]], text.num_hidden_layers)
    heads = {".attn_q.": text.num_attention_heads, ".attn_k.": text.num_key_value_heads}
    parameters = {f"model.{name}": value for name, value in model.model.language_model.named_parameters()}
    for key, parameter in {**parameters, "lm_head.weight": model.lm_head.weight}.items():
        name = names.get_name(key, try_suffixes=(".weight", ".bias"))
        if name not in stored:  # a tied head
            continue
        value = stored[name]
        for part, count in heads.items() if text.model_type == "llama" else ():
            if part in name:
                value = value[rotary_order(count, value.shape[0] // count).argsort()]
        parameter.copy_(value)
