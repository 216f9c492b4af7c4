"""Original → HF beyond the golden five: other files, language models, projectors, towers, vocabularies; and bad input."""

import json
import logging
import shutil

import pytest
import torch
from conversion_cases import (
    GOLDEN,
    REMOVED,
    TOWER,
    copy_original,
    edit_json,
    golden_arguments,
    original_tensors,
    random_language_model,
    random_original,
    random_projector,
    rewrite,
    same,
)
from PIL import Image
from safetensors.torch import load_file, save_file
from sentencepiece import SentencePieceProcessor
from transformers import CLIPConfig, CLIPModel, CLIPVisionModel, GenerationConfig
from transformers.models.llava.modeling_llava import LlavaForConditionalGeneration as StockLlava

from modeling_llava import LlavaConfig, LlavaForConditionalGeneration, LlavaProcessor
from modeling_llava.conversion import convert_hf_to_original, convert_original_to_hf
from modeling_llava.conversion.originals import read_original


def question(folder, text="Why?", **options) -> str:
    """The prompt for a question about an image, by the converted checkpoint's template."""
    messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": text}]}]
    return LlavaProcessor.from_pretrained(folder).apply_chat_template(messages, **options)


# Forms


@pytest.mark.parametrize("form", ["bin", "sharded"])
def test_every_kind_of_file_gives_the_same_checkpoint(tmp_path, golden_hf, form):
    """Buffers that old versions of transformers saved are left out."""
    source = copy_original(tmp_path / "source")
    rewrite(source, lambda t: t | {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)}, form)
    convert_original_to_hf(source, tmp_path / "out", check=False)
    assert same(tmp_path / "out", golden_hf)


def test_dtype_rounds_every_tensor_and_stands_in_the_configuration(tmp_path, golden_hf):
    conversion = convert_original_to_hf(GOLDEN / "llava_v15_tiny", tmp_path / "out", dtype=torch.bfloat16)
    assert conversion.check.is_stock_ready
    exact, rounded = original_tensors(golden_hf), original_tensors(tmp_path / "out")
    assert all(torch.equal(rounded[key], value.bfloat16()) for key, value in exact.items())
    assert StockLlava.from_pretrained(tmp_path / "out").dtype == torch.bfloat16


@pytest.mark.parametrize(
    "name, prefix",
    [("projector", ""), ("projector", "model."), ("lora", "model.model."), ("lora", "base_model.model.model.")],
)
def test_projector_is_found_under_every_name_that_the_original_gave_it(tmp_path, name, prefix):
    arguments = golden_arguments(f"llava_v15_tiny_{name}")
    shutil.copytree(arguments["source"], tmp_path / "source")
    file = tmp_path / "source" / {"lora": "non_lora_trainables.bin", "projector": "mm_projector.bin"}[name]
    expected = {"mm_projector." + key.split("mm_projector.")[1]: value for key, value in torch.load(file).items()}
    torch.save({prefix + key: value for key, value in expected.items()}, file)
    original = read_original(tmp_path / "source", arguments["base"], TOWER)
    found = {entry.original: tensor for entry, tensor in original.tensors.items() if entry.part == "projector"}
    assert all(torch.equal(found[f"model.{key}"].tensor(), value) for key, value in expected.items())


# Language models


def test_mistral_is_asked_as_the_original_asks_it(tmp_path):
    """The original's `mistral_instruct`: LLaMA-2's format without a system message."""
    source = random_original(tmp_path / "source", model_type="mistral")
    convert_original_to_hf(source, tmp_path / "out", check=False)
    assert question(tmp_path / "out", add_generation_prompt=True) == "[INST] <image>\nWhy? [/INST]"


@pytest.mark.parametrize("head", [False, True])  # whether the file has it, as torch.save writes it
def test_tied_head_stays_tied(tmp_path, head):
    source = copy_original(tmp_path / "source", tie_word_embeddings=True)
    rewrite(source, lambda tensors: tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"].clone()})
    rewrite(source, lambda tensors: {k: v for k, v in tensors.items() if head or k != "lm_head.weight"})
    conversion = convert_original_to_hf(source, tmp_path / "out")
    assert conversion.check.is_stock_ready, str(conversion.check)
    model = StockLlava.from_pretrained(tmp_path / "out")
    assert model.lm_head.weight is model.get_input_embeddings().weight


# Projectors


@pytest.mark.parametrize(
    "kind, model_type",
    [("linear", "llama"), ("mlp1x_gelu", "llama"), ("mlp2x_gelu", "mistral"), ("mlp3x_gelu", "llama")],
)
def test_projector_of_any_depth_computes_what_the_originals_did_and_comes_back(tmp_path, kind, model_type):
    """So does `rope_scaling`, into which transformers writes: its versions 4.31 to 4.37 refuse more than these fields."""
    layers = 1 if kind == "linear" else int(kind[3])
    options = {"mm_projector_type": kind, "rope_scaling": {"type": "linear", "factor": 2.0}}
    source = random_original(tmp_path / "source", model_type=model_type, projector_layers=layers, **options)
    tensors = random_projector(layers)
    if kind == "mlp1x_gelu":  # the original's nn.Sequential of one
        rewrite(source, lambda t: {k.replace("mm_projector.", "mm_projector.0."): v for k, v in t.items()})
    conversion = convert_original_to_hf(source, tmp_path / "out")
    assert conversion.check.is_sound

    features = expected = torch.randn(7, 32, generator=torch.Generator().manual_seed(0))
    for i, (weight, bias) in enumerate(zip(*[iter(tensors.values())] * 2, strict=True)):
        expected = torch.nn.functional.linear(torch.nn.functional.gelu(expected) if i else expected, weight, bias)
    model = LlavaForConditionalGeneration.from_pretrained(tmp_path / "out")
    assert torch.allclose(model.model.multi_modal_projector(features), expected, atol=1e-5)
    assert model.config.projector_num_layers == layers
    if layers <= 2:
        assert conversion.check.is_stock_ready
        stock = StockLlava.from_pretrained(tmp_path / "out")
        assert torch.allclose(stock.model.multi_modal_projector(features), expected, atol=1e-5)
    else:
        assert not conversion.check.is_stock_ready
        assert f"{layers} layers" in conversion.check.failures()
        assert any("this package loads, trains and runs" in note for note in conversion.notes)
    convert_hf_to_original(tmp_path / "out", tmp_path / "back")
    assert same(tmp_path / "back", source)
    assert (tmp_path / "back/config.json").read_bytes() == (source / "config.json").read_bytes()


# Vision towers


@pytest.mark.parametrize(
    "layer, feature, tokens", [(-1, "patch", 9), (-3, "patch", 9), (0, "cls_patch", 10), (3, "patch", 9)]
)
def test_selected_features_are_the_originals_and_stay_so_on_the_way_back(tmp_path, layer, feature, tokens):
    source = copy_original(tmp_path / "s", mm_vision_select_layer=layer, mm_vision_select_feature=feature)
    convert_original_to_hf(source, tmp_path / "out", check=False)
    model = StockLlava.from_pretrained(tmp_path / "out")
    processor = LlavaProcessor.from_pretrained(tmp_path / "out")
    assert processor.num_image_tokens == model.config.image_seq_length == tokens
    pixels = processor.image_processor(Image.new("RGB", (50, 30), (200, 30, 90)), return_tensors="pt").pixel_values
    with torch.no_grad():
        states = CLIPVisionModel.from_pretrained(TOWER)(pixels, output_hidden_states=True).hidden_states[layer]
        expected = model.model.multi_modal_projector(states[:, 1:] if feature == "patch" else states)
        assert torch.equal(model.get_image_features(pixels).pooler_output[0], expected[0])
    convert_hf_to_original(tmp_path / "out", tmp_path / "back")
    assert (tmp_path / "back/config.json").read_bytes() == (source / "config.json").read_bytes()


def make_tower(folder, form):
    """The golden tower as CLIP's pair (text side included), with its buffer, or as transformers 5 saves one it made."""
    shutil.copytree(TOWER, folder)
    tensors = load_file(TOWER / "model.safetensors")
    if form == "pair":
        vision = json.loads((TOWER / "config.json").read_text("utf-8"))
        text = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
        text |= {"vocab_size": 9, "eos_token_id": 2}
        config = CLIPConfig(vision_config=vision, text_config=text, projection_dim=16)
        tensors = CLIPModel(config).state_dict() | tensors
        tensors["vision_model.embeddings.position_ids"] = torch.arange(10)[None]
        config.save_pretrained(folder)
    else:
        tensors = {key.removeprefix("vision_model."): value for key, value in tensors.items()}
    save_file(tensors, folder / "model.safetensors")
    return folder


@pytest.mark.parametrize("form", ["pair", "bare"])
def test_tower_of_any_form_is_read(tmp_path, golden_hf, form):
    source = copy_original(tmp_path / "source", mm_vision_tower="openai/clip-vit-large-patch14-336")
    tower = make_tower(tmp_path / "tower", form)
    conversion = convert_original_to_hf(source, tmp_path / "out", vision_tower=tower)
    assert conversion.check.is_stock_ready
    assert same(tmp_path / "out", golden_hf)


def test_tower_that_cannot_be_found_is_one_clear_error(tmp_path):
    source = copy_original(tmp_path / "source", mm_vision_tower="openai/clip-vit-of-nowhere")
    with pytest.raises(OSError, match="vision tower 'openai/clip-vit-of-nowhere' is not a folder.*--vision-tower"):
        convert_original_to_hf(source, tmp_path / "out")
    with pytest.raises(OSError, match="vision tower '/no/such/tower' is not a folder"):
        convert_original_to_hf(source, tmp_path / "out", vision_tower="/no/such/tower")


def test_tower_of_another_width_is_refused(tmp_path):
    source = copy_original(tmp_path / "source")
    config = json.loads((TOWER / "config.json").read_text("utf-8"))
    wide = CLIPVisionModel(CLIPVisionModel.config_class(**{**config, "hidden_size": 48}))
    wide.save_pretrained(tmp_path / "wide")
    with pytest.raises(ValueError, match=r"48 features.*mm_projector\.0\.weight' of .* is \[64, 32\].*--vision-tower"):
        convert_original_to_hf(source, tmp_path / "out", vision_tower=tmp_path / "wide")


@pytest.mark.parametrize(
    "file, fields, message",
    [
        ("config.json", {"image_size": 56}, r"vision_tower.* is \[10, 32\].*asks for \[17, 32\]"),
        ("config.json", {"model_type": "siglip_vision_model"}, "'siglip_vision_model'.*CLIP"),
        ("config.json", {"num_attention_heads": 0}, "not one that CLIPVisionConfig accepts"),
        ("preprocessor_config.json", {"crop_size": {"height": 28, "width": 28}}, "of 42 pixels .* says 28x28"),
    ],
)
def test_tower_that_does_not_fit_its_files_is_refused(tmp_path, file, fields, message):
    source = copy_original(tmp_path / "source")
    edit_json(source / "vision_tower" / file, **fields)
    with pytest.raises(ValueError, match=message):
        convert_original_to_hf(source, tmp_path / "out")


def test_tower_without_weights_or_with_anothers_is_refused(tmp_path):
    source = copy_original(tmp_path / "source")
    weights = source / "vision_tower/model.safetensors"
    save_file({"x": torch.ones(1)}, weights)
    with pytest.raises(ValueError, match="does not hold a CLIP vision tower"):
        convert_original_to_hf(source, tmp_path / "out")
    weights.unlink()
    with pytest.raises(OSError, match="vision_tower holds no weights"):
        convert_original_to_hf(source, tmp_path / "out")


@pytest.mark.parametrize(("ratio", "pads"), [("pad", True), ("square", False), (REMOVED, False)])
def test_image_aspect_ratio_decides_about_padding(tmp_path, ratio, pads):
    source = copy_original(tmp_path / "source", image_aspect_ratio=ratio)
    convert_original_to_hf(source, tmp_path / "out", check=False)
    assert LlavaProcessor.from_pretrained(tmp_path / "out").image_processor.do_pad is pads


# Vocabularies


def test_rows_that_are_there_already_are_not_touched(tmp_path):
    """A vocabulary that is longer than the tokenizer has room for the image token."""
    source = copy_original(tmp_path / "source", vocab_size=768)

    def longer(tensors):
        for key in ("model.embed_tokens.weight", "lm_head.weight"):
            tensors[key] = torch.cat([tensors[key], torch.randn(68, 64)])
        return tensors

    rewrite(source, longer)
    conversion = convert_original_to_hf(source, tmp_path / "out")
    assert conversion.check.is_stock_ready, str(conversion.check)
    for key in ("model.embed_tokens.weight", "lm_head.weight"):
        before, after = original_tensors(source)[key], original_tensors(tmp_path / "out")[f"language_model.{key}"]
        assert torch.equal(before, after)
    config = LlavaConfig.from_pretrained(tmp_path / "out")
    assert config.image_token_id == 700 and config.text_config.vocab_size == 768


@pytest.mark.parametrize("rows, has_patch", [("all", True), ("new", True), ("new", False)])
def test_projector_with_the_rows_of_its_image_tokens(tmp_path, rows, has_patch):
    """`mm_use_im_start_end` in stage 1: the original saves the embedding (or its new rows) with the projector."""
    arguments = golden_arguments("llava_v15_tiny_projector")
    source = tmp_path / "projector"
    shutil.copytree(arguments["source"], source)
    marks = {"mm_use_im_start_end": True, "mm_use_im_patch_token": has_patch}
    edit_json(source / "config.json", mm_vision_tower=str(TOWER), **marks)
    base = original_tensors(arguments["base"])["model.embed_tokens.weight"]
    patch, trained = torch.randn(1, 64), torch.randn(2, 64)
    embedding = torch.cat([base, patch, trained]) if rows == "all" else trained
    file = source / "mm_projector.bin"
    torch.save(torch.load(file, weights_only=True) | {"model.embed_tokens.weight": embedding}, file)
    conversion = convert_original_to_hf(source, tmp_path / "out", base=arguments["base"])
    assert conversion.check.is_stock_ready, str(conversion.check)
    tokenizer = LlavaProcessor.from_pretrained(tmp_path / "out").tokenizer
    added = ["<im_patch>"] * has_patch + ["<im_start>", "<im_end>", "<image>"]
    assert tokenizer.convert_tokens_to_ids(added) == list(range(700, 700 + len(added)))
    new = original_tensors(tmp_path / "out")["language_model.model.embed_tokens.weight"]
    assert torch.equal(new[:700], base) and torch.equal(new[700 + has_patch : 702 + has_patch], trained)
    if has_patch:  # a row that was not trained is the mean of the others
        assert torch.allclose(new[700], patch if rows == "all" else base.mean(0))
    assert "USER: <im_start><image><im_end>\nWhy?" in question(tmp_path / "out")


def test_tokenizer_that_is_not_legacy_gives_the_originals_ids(tmp_path):
    """The original tokenizes the text after an image on its own, with SentencePiece's space in front of it."""
    source = copy_original(tmp_path / "source")
    edit_json(source / "tokenizer_config.json", legacy=False)
    convert_original_to_hf(source, tmp_path / "out", check=False)
    processor = LlavaProcessor.from_pretrained(tmp_path / "out")
    prompt = question(tmp_path / "out", "What colour is the kettle?", add_generation_prompt=True)
    case = json.loads((GOLDEN / "llava_v15_tiny/expected.json").read_text("utf-8"))[0]
    before, after = case["prompt"].split("<image>")
    pieces = SentencePieceProcessor(model_file=str(source / "tokenizer.model"))
    expected = [1, *pieces.encode(before), processor.image_token_id, *pieces.encode(after)]
    assert processor.tokenizer(prompt).input_ids == expected


def test_generation_settings_are_taken_over(tmp_path):
    source = copy_original(tmp_path / "source")
    settings = {"bos_token_id": 1, "eos_token_id": 2, "max_length": 4096, "temperature": 0.9, "top_p": 0.6}
    (source / "generation_config.json").write_text(json.dumps(settings))
    convert_original_to_hf(source, tmp_path / "out", check=False)
    config = GenerationConfig.from_pretrained(tmp_path / "out")
    assert (config.eos_token_id, config.pad_token_id, config.max_length) == (2, 0, 4096)
    assert not config.do_sample and config.temperature in (None, 1.0)


# Bad input


def test_base_is_asked_for(tmp_path):
    lora = r"a LoRA adapter.*--base \(it names 'language_model'\)"
    for name, what in (("lora", lora), ("projector", "a projector alone.*--base")):
        with pytest.raises(ValueError, match=what):
            convert_original_to_hf(golden_arguments(f"llava_v15_tiny_{name}")["source"], tmp_path / "out")


@pytest.mark.parametrize("name", ["llava_v15_tiny_lora", "llava_v15_tiny_projector", "llava_v1_tiny_delta"])
def test_wrong_base_is_one_clear_error_that_names_file_and_tensor(tmp_path, name):
    base = random_language_model(hidden=48)
    base.save_pretrained(tmp_path / "base")
    shutil.copy(GOLDEN / "tiny_spm.model", tmp_path / "base" / "tokenizer.model")  # only the weights are wrong
    arguments = {**golden_arguments(name), "base": tmp_path / "base"}
    with pytest.raises(ValueError, match=r"'model\.\S+weight' of \S+base/model\.safetensors .*Is --base") as error:
        convert_original_to_hf(output=tmp_path / "out", vision_tower=TOWER, **arguments)
    assert "\n" not in str(error.value)
    assert not list(tmp_path.glob("out*"))


def test_base_without_what_is_needed_is_refused(tmp_path, golden_hf):
    arguments = golden_arguments("llava_v15_tiny_lora")
    with pytest.raises(ValueError, match="base .* is in the HF form"):
        convert_original_to_hf(output=tmp_path / "out", **arguments | {"base": golden_hf})
    folder = shutil.copytree(arguments["source"], tmp_path / "lora")
    (folder / "non_lora_trainables.bin").unlink()
    with pytest.raises(ValueError, match="no non_lora_trainables.bin"):
        convert_original_to_hf(folder, tmp_path / "out", base=arguments["base"])
    base = shutil.copytree(arguments["base"], tmp_path / "base")
    (base / "model.safetensors").unlink()
    with pytest.raises(ValueError, match="base .* holds no weights"):
        convert_original_to_hf(folder, tmp_path / "out", base=base)
    (folder / "config.json").unlink()
    with pytest.raises(ValueError, match="adapter in the HF format.*llava merge"):
        convert_original_to_hf(folder, tmp_path / "out")


def test_delta_without_its_base_is_suspected(tmp_path, caplog):
    source = copy_original(tmp_path / "source")
    rewrite(source, lambda tensors: {key: value * 0.01 for key, value in tensors.items()})
    with caplog.at_level(logging.WARNING):
        convert_original_to_hf(source, tmp_path / "out", check=False)
    assert "looks like a delta" in caplog.text and "--base" in caplog.text


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "llava_mpt"}, "model_type 'llava_mpt'.*LLaMA and Mistral"),
        ({"image_aspect_ratio": "anyres"}, "image_aspect_ratio 'anyres'.*LLaVA-NeXT"),
        ({"mm_patch_merge_type": "spatial_unpad"}, "mm_patch_merge_type 'spatial_unpad'.*successors"),
        ({"s2": True}, "s2 True.*successors"),
        ({"mm_vision_select_layer": True}, "mm_vision_select_layer is True"),
        ({"hidden_size": "64"}, "not one that LlamaConfig accepts: .*hidden_size"),
        ({"num_attention_heads": 0}, "not one that LlamaConfig accepts"),
        ({"mm_vision_select_feature": "cls"}, "known are 'patch' and 'cls_patch'"),
        ({"mm_projector_type": "qformer"}, "'qformer' is not known"),
        ({"mm_vision_select_layer": -5}, "mm_vision_select_layer is -5, .* 4 hidden states"),
        ({"mm_vision_tower": REMOVED}, "names no mm_vision_tower.*--vision-tower"),
        ({"num_hidden_layers": 3}, r"9 missing: 'model\.layers\.2\.self_attn\.q_proj\.weight' \[64, 64\]"),
        ({"intermediate_size": 128}, r"gate_proj\.weight' of .* is \[96, 64\], .* asks for \[128, 64\]"),
    ],
)
def test_configuration_that_does_not_fit_is_one_clear_error(tmp_path, change, message):
    source = copy_original(tmp_path / "source", **change)
    with pytest.raises(ValueError, match=message) as error:
        convert_original_to_hf(source, tmp_path / "out")
    assert "\n" not in str(error.value)


def test_folder_without_a_tokenizer_or_weights_says_what_it_holds(tmp_path):
    source = copy_original(tmp_path / "source")
    (source / "tokenizer.model").unlink()  # of its configuration alone transformers 5 makes a tokenizer without words
    with pytest.raises(OSError, match=r"source has no tokenizer"):
        convert_original_to_hf(source, tmp_path / "out")
    (source / "model.safetensors").unlink()
    with pytest.raises(ValueError, match="holds no weights .*config.json"):
        convert_original_to_hf(source, tmp_path / "out")
    with pytest.raises(OSError, match="not a checkpoint: it has no config.json"):
        convert_original_to_hf(source / "images", tmp_path / "out")
    with pytest.raises(OSError, match="checkpoint 'nowhere' is not a folder"):
        convert_original_to_hf("nowhere", tmp_path / "out")


LLAMA3 = (
    "{% for m in messages %}<|start_header_id|>{{ m['role'] }}<|end_header_id|>\n\n{{ m['content'] | trim }}<|eot_id|>"
    "{% endfor %}{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
INST = "{% for m in messages %}[INST] {{ m['content'] }} [/INST]{% endfor %}"
V0_TURN = "### Human: <image>\nWhy?\n### Assistant:"
V1_TURN = "USER: <image>\nWhy? ASSISTANT:"
PLAIN_MARKS = {"mm_use_im_start_end": False, "mm_use_im_patch_token": False}


@pytest.mark.parametrize(
    "golden, name, own, config, prompt_ends",
    [
        ("llava_v15_tiny", "llava-v1.5-7b", None, {}, V1_TURN),
        ("llava_v15_tiny", "run-v0", None, {}, V1_TURN),  # somebody's own v0: v0's projector was linear
        ("llava_v15_tiny", "llava-v1.5-lora", None, {"_name_or_path": "/data/v0/vicuna-7b-v1.5"}, V1_TURN),
        ("llava_v1_tiny", "LLaVA-7b-v0", None, PLAIN_MARKS, V0_TURN),
        ("llava_v1_tiny", "mine", None, PLAIN_MARKS | {"version": "v0"}, V0_TURN),
        ("llava_v1_tiny", "LLaVA-7b-v1-1", None, PLAIN_MARKS, V1_TURN),
        ("llava_v15_tiny", "llava-llama-2-13b-chat", None, {}, "<</SYS>>\n\n<image>\nWhy? [/INST]"),
        ("llava_v15_tiny", "mine", INST, {}, "<</SYS>>\n\n<image>\nWhy? [/INST]"),
        ("llava_v15_tiny", "llava-v1.5-llama-3", LLAMA3, {}, "<image>\nWhy?<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n"),
        ("llava_v15_tiny", "mine", "{{ raise_exception('no') }}", {}, V1_TURN),
    ],
)  # fmt: skip
def test_the_chat_template_is_that_of_the_checkpoints_version(tmp_path, golden, name, own, config, prompt_ends):
    source = copy_original(tmp_path / name, golden, **config)
    if own is not None:
        edit_json(source / "tokenizer_config.json", chat_template=own)
    conversion = convert_original_to_hf(source, tmp_path / "out", check=False)
    prompt = question(tmp_path / "out", add_generation_prompt=True)
    assert prompt.endswith(prompt_ends)
    assert any("stop_strings=['###']" in note for note in conversion.notes) == (prompt_ends == V0_TURN)
    assert "chat template" in conversion.notes[0] and "--chat-template" in conversion.notes[0]


def test_a_chat_template_can_be_given_as_own_a_name_or_a_file(tmp_path):
    source = copy_original(tmp_path / "source")
    edit_json(source / "tokenizer_config.json", chat_template=LLAMA3)
    (tmp_path / "images.jinja").write_text(V0_TURN.replace("Why?", "{{ messages[0]['content'][1]['text'] }}"))
    (tmp_path / "text.jinja").write_text("{% for m in messages %}<T>{{ m['content'] }}</T>{% endfor %}")
    for given, prompt in {
        "own": "<|start_header_id|>user<|end_header_id|>\n\n<image>\nWhy?<|eot_id|>",
        "chatml": "<|im_start|>user\n<image>\nWhy?<|im_end|>\n",
        str(tmp_path / "images.jinja"): V0_TURN,
        str(tmp_path / "text.jinja"): "<T><image>\nWhy?</T>",  # of a language model: images are put in
    }.items():
        convert_original_to_hf(source, tmp_path / "out", chat_template=given, check=False, overwrite=True)
        assert question(tmp_path / "out").endswith(prompt)
    with pytest.raises(ValueError, match="no chat template 'no.jinja'"):
        convert_original_to_hf(source, tmp_path / "out", chat_template="no.jinja", overwrite=True)


@pytest.mark.parametrize(
    "weight, message",
    [
        (torch.ones(96, 64, dtype=torch.int8), r"quantised weights.*up_proj\.weight' of .* is int8"),
        (torch.empty(0), r"up_proj\.weight is empty .*ZeRO-3"),
    ],
)
def test_weights_of_another_kind_are_refused(tmp_path, weight, message):
    source = copy_original(tmp_path / "source")
    rewrite(source, lambda tensors: tensors | {"model.layers.0.mlp.up_proj.weight": weight})
    with pytest.raises(ValueError, match=message):
        convert_original_to_hf(source, tmp_path / "out")


def test_marks_around_images_without_rows_of_their_own_are_named(tmp_path):
    source = copy_original(tmp_path / "source", mm_use_im_start_end=True)
    with pytest.raises(ValueError, match=r"puts <im_start> around images .* rows, none for it"):
        convert_original_to_hf(source, tmp_path / "hf")
    assert not (tmp_path / "hf").exists()
