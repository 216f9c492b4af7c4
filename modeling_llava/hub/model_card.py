"""The model card, filled from the records next to the weights."""

import json
import math
import os
import re
from pathlib import Path
from typing import Any

import jinja2
import yaml

from ..io.files import HUB_NAME
from .files import read_record


TEMPLATE = Path(__file__).with_name("model_card_template.md")

FIGURES = {
    "loss_curve*.png": "Loss over the optimizer steps",
    "answers*.png": "Answers to questions about images that were not in the training data",
    "results*.png": "Evaluation",
}
"""Pattern of a file name → its caption."""


def render_model_card(
    folder: str | Path,
    repo: str,
    *,
    kind: str,
    base_models: list[str] | None = None,
    datasets: list[str] | None = None,
    license: str = "other",
    data_license: str | None = None,
    language: str = "en",
    summary: str | None = None,
    generate_kwargs: dict | None = None,
) -> str:
    """
    A model card (Markdown with the Hub's metadata) for the model in `folder`.

    Args:
        folder (`str` or `Path`):
            A full, adapter or projector folder. Its configuration, and where there are any the records of the run,
            `results*.json` and figures are read.
        repo (`str`): Name on the Hub, `owner/name`.
        kind (`str`): `"full"`, `"adapter"` or `"projector"` ([`checkpoint_kind`]).
        base_models, datasets, license, data_license, language, summary:
            The options of `llava publish`; by default what the records say.
        generate_kwargs (`dict`, *optional*):
            What `generate` has to be given to end an answer ([`modeling_llava.text.stops.needed_by_stock`]).
    """
    folder = Path(folder)
    run = read_record(folder / "run.json")
    recipe_file = folder / "recipe.yaml"
    recipe = recipe_file.read_text("utf-8") if recipe_file.is_file() else None
    settings = (yaml.safe_load(recipe) if recipe else None) or {}
    config = read_record(folder / "config.json")
    base_models = base_models or _base_models(config, settings)
    datasets = datasets or [name for name, sha256 in _sources(run) if not sha256 and _is_hub_name(name)]
    evaluation, layers = _evaluation(folder), config.get("projector_num_layers", 2)
    needs_us = f"its projector has {layers} layers, for which they have no form" if layers > 2 else None
    environment = jinja2.Environment(undefined=jinja2.StrictUndefined, keep_trailing_newline=True)
    environment.filters["cell"] = lambda text: str(text).replace("|", "\\|")  # of a table
    environment.filters["quoted"] = lambda text: json.dumps(str(text), ensure_ascii=False)  # a YAML string too
    return environment.from_string(TEMPLATE.read_text("utf-8")).render(
        name=repo.split("/")[-1],
        repo=repo,
        kind=kind,
        generate_kwargs=generate_kwargs,
        needs_us=needs_us,
        runtimes=_runtimes(kind, repo, config, base_models[0] if base_models else "BASE", needs_us),
        base_models=base_models,
        datasets=datasets,
        license=license,
        data_license=data_license,
        language=language,
        summary=summary or _summary(kind, settings, base_models),
        architecture=_architecture(folder, kind),
        recipe=recipe.strip() if settings else None,
        data_line=_data_line(run),
        hardware=_hardware(run, settings),
        duration=_duration(read_record(folder / "trainer_state.json"), read_record(folder / "all_results.json")),
        versions=", ".join(f"{name} {version}" for name, version in (run.get("versions") or {}).items()),
        figures={file.name: text for pattern, text in FIGURES.items() for file in sorted(folder.glob(pattern))},
        evaluation=evaluation,
        model_index=[row for row in evaluation if row["whole"]],
    )


def _base_models(config: dict, settings: dict) -> list[str]:
    """Hub names that the recipe, or else the parts of a composed model, were loaded under."""
    parts = [(config.get(part) or {}).get("_name_or_path") for part in ("text_config", "vision_config")]
    names = [settings.get("model")] if _is_hub_name(settings.get("model")) else parts
    return [name for name in names if _is_hub_name(name)]


def _sources(run: dict) -> list[tuple[str, str | None]]:
    """Name, and SHA-256 of a local file, of each source of the training data."""
    sources = (run.get("data") or {}).get("sources") or []
    return [(str(source.get("name")), source.get("sha256")) for source in sources if isinstance(source, dict)]


def _is_hub_name(name: Any) -> bool:
    return isinstance(name, str) and HUB_NAME.fullmatch(name) is not None and not os.path.exists(name)


def _runtimes(kind: str, repo: str, config: dict, base: str, needs_us: str | None) -> dict[str, str]:
    """Runtime → how to run this model with it, or why it does not run."""
    ours = f"`llava chat {repo}`, `llava web {repo}`; `LlavaPredictor` encodes an image once for many questions"
    merged = f"after `llava merge {repo} merged`: as for a full model (`merged` in place of the name)"
    if kind == "projector":
        stage2 = f"`projector: {repo}` in a recipe for stage 2, or `llava merge {repo} merged`, `llava chat merged`"
        return {"modeling_llava": stage2, "transformers, vLLM, SGLang, llama.cpp": merged}
    if kind == "adapter":
        load = f'LlavaForConditionalGeneration.from_pretrained("{base}")'
        return {
            "transformers": f'`AutoModelForImageTextToText.from_pretrained("{repo}")` (with `peft` installed)',
            "modeling_llava": ours,
            "PEFT": f'`PeftModel.from_pretrained({load}, "{repo}")`',
            "vLLM, SGLang, llama.cpp": merged,
        }
    if needs_us:
        return {"modeling_llava": ours, "transformers, vLLM, SGLang, llama.cpp": f"no: {needs_us}"}
    is_linear = config.get("projector_hidden_act") == "linear"
    return {
        "transformers": f'`AutoModelForImageTextToText.from_pretrained("{repo}")`, `transformers serve`, `transformers chat`',
        "modeling_llava": ours,
        "vLLM": "no: it has no linear activation" if is_linear else f"`vllm serve {repo}`",
        "SGLang": f"`python -m sglang.launch_server --model-path {repo}`",
        "llama.cpp": _llama_cpp(repo, config),
    }


def _llama_cpp(repo: str, config: dict) -> str:
    language, vision = ((config.get(part) or {}).get("model_type", "") for part in ("text_config", "vision_config"))
    if config and vision not in ("clip_vision_model", "siglip_vision_model"):
        return f"no: `llava convert` writes its files for CLIP and SigLIP, not for {vision}"
    strategy = "full" if vision.startswith("siglip") else "default"
    if config.get("vision_feature_select_strategy", "default") != strategy:
        return "no: it always drops the class token, which this model keeps"
    convert = f"`llava convert {repo} gguf --to gguf`"
    if config and language not in ("llama", "mistral", "qwen2", "qwen3"):
        return f"{convert}, then llama.cpp's `convert_hf_to_gguf.py gguf/language_model` (not run for {language})"
    files = "gguf/model-f16.gguf", "gguf/mmproj-f16.gguf"
    return (
        f'{convert}, then `llama-mtmd-cli -m {files[0]} --mmproj {files[1]} --image photo.jpg -p "…"`; Ollama: a '
        f"`Modelfile` with `FROM ./{files[0]}` and `FROM ./{files[1]}` (not run)"
    )


def _summary(kind: str, settings: dict, base_models: list[str] | None) -> str:
    what = {
        "full": "A LLaVA: it answers questions about images",
        "adapter": "A LoRA adapter for LLaVA, which answers questions about images",
        "projector": "The projector of a LLaVA after its first stage, which aligns image features with words",
    }[kind]
    how = {"lora": "fine-tuned with LoRA", "qlora": "fine-tuned with QLoRA", "none": "trained"}
    trained = f", {how[settings['adapter']]}" if settings.get("adapter") in how else ""
    start = f" from {', '.join(f'`{name}`' for name in base_models)}" if base_models and trained else ""
    return f"{what}{trained}{start}. Made with `modeling_llava`."


def _architecture(folder: Path, kind: str) -> dict[str, str]:
    """Parts of the model, one line each."""
    config = read_record(folder / "config.json")
    parts = {}
    if config:
        vision, text = (config.get(part) or {} for part in ("vision_config", "text_config"))
        parts["vision tower"] = (
            f"{vision.get('model_type')}, {vision.get('num_hidden_layers')} layers × {vision.get('hidden_size')}, "
            f"{vision.get('image_size')} pixels in patches of {vision.get('patch_size')}, "
            f"features of layer {config.get('vision_feature_layer')}"
        )
        layers = config.get("projector_num_layers", 2)
        activation = "" if layers == 1 else f", {config.get('projector_hidden_act')}"
        parts["projector"] = f"{layers} linear layer{'s' if layers > 1 else ''}{activation}"
        parts["language model"] = (
            f"{text.get('model_type')}, {text.get('num_hidden_layers')} layers × {text.get('hidden_size')}, "
            f"vocabulary {text.get('vocab_size')}"
        )
        parts["image tokens"] = f"{config.get('image_seq_length')} per image"
    if kind == "adapter":
        adapter = read_record(folder / "adapter_config.json")
        parts["adapter"] = (
            f"LoRA, rank {adapter.get('r')}, alpha {adapter.get('lora_alpha')}"
            f"{', DoRA' if adapter.get('use_dora') else ''}{', rsLoRA' if adapter.get('use_rslora') else ''}"
        )
        whole = adapter.get("modules_to_save") or []
        if whole:
            parts["trained in full"] = ", ".join(name.split(".")[-1] for name in whole)
    size = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    parts["files"] = f"{size / 2**20:,.1f} MiB of safetensors"
    return parts


def _data_line(run: dict) -> str:
    data = run.get("data") or {}
    sources = ", ".join(
        f"`{Path(name).name if sha256 else name}`" + (f" (SHA-256 {sha256[:12]}…)" if sha256 else "")
        for name, sha256 in _sources(run)
    )
    count = f", {data['num_samples']:,} samples" if "num_samples" in data else ""
    return f"{sources or 'not recorded'}{count}."


def _hardware(run: dict, settings: dict) -> str:
    if not run:
        return ""
    devices = run.get("devices", 1)
    processes = f"{devices} process{'es' if devices > 1 else ''}"
    where = f"{devices} × {run['accelerator']}" if run.get("accelerator") else processes
    return f"{where}, {run.get('machine', 'unknown machine')}, {settings.get('precision', 'unknown')} arithmetic"


def _duration(state: dict, results: dict) -> str:
    logged = [entry["train_runtime"] for entry in state.get("log_history", []) if "train_runtime" in entry]
    seconds, steps = results.get("train_runtime", logged[-1] if logged else None), state.get("global_step")
    if seconds is None or not steps:
        return ""
    hours, minutes = divmod(round(seconds / 60), 60)
    duration = f"{hours} h {minutes} min" if hours else f"{minutes} min" if minutes else f"{seconds:.0f} s"
    return f"{steps:,} optimizer steps in {duration} (the last uninterrupted stretch)."


def _evaluation(folder: Path) -> list[dict[str, Any]]:
    """Rows of the evaluation table: the overall scores of every `results*.json`. `whole`: of the whole benchmark, and so
    part of the Hub's index."""
    rows = []
    for file in sorted(folder.glob("results*.json")):
        results = read_record(file)
        benchmark, samples = results.get("benchmark"), results.get("samples") or {}
        whole = results.get("complete", True)
        if not isinstance(benchmark, str) or not isinstance(results.get("scores"), dict):  # not of `llava eval`
            continue
        for metric, score in results["scores"].items():
            score = score if isinstance(score, dict) else {"value": score}
            value, interval, count = score.get("value", score.get("mean")), score.get("interval"), score.get("count")
            if not _is_number(value):
                continue
            has_interval = isinstance(interval, list) and len(interval) == 2 and all(map(_is_number, interval))
            rows.append(
                {
                    "dataset": benchmark,
                    "dataset_type": re.sub(r"\W+", "-", benchmark.lower()).strip("-") or "benchmark",
                    "metric": metric,
                    "metric_type": re.sub(r"\W+", "_", metric.lower()).strip("_") or "metric",
                    "value": round(value, 4),
                    "interval": f"{interval[0]:.2f} – {interval[1]:.2f}" if has_interval else "",
                    "count": f"{count:,}" if _is_number(count) else "",
                    "part": "" if whole else f" ({samples.get('scored', 0):,} of {samples.get('total', 0):,} samples)",
                    "whole": whole,
                }
            )
    return rows


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
