"""The whole life of a small LLaVA, phase by phase: draw, write, train, compose, align, instruct, examine, reload.

Each phase writes into a folder of its own and is noted in `progress.json` when it is complete; the same call resumes after
the last one.
"""

import contextlib
import dataclasses
import functools
import io
import json
import os
import shutil
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..data_engine.run import write_json
from .scenes import HELD_OUT
from .world import draw_scenes, write_split


PHASES: dict[str, str] = {
    "world": "draw images, with captions and boxes",
    "data": "turn captions and boxes into instruction data",
    "language": "train a language model on text alone",
    "vision": "train a vision encoder on the boxes",
    "compose": "join both with an untrained projector",
    "pretrain": "stage 1: the projector, on captions",
    "finetune": "stage 2: LoRA and the projector, on instructions",
    "reload": "merge, save, reload through pipeline()",
    "exam": "ask about images never seen in training",
    "figures": "draw the loss curve and the answers",
}
STAGES = ("language", "vision", "pretrain", "finetune")
"""Phases that train; each has a loss curve."""


@dataclass(frozen=True)
class QuickstartSettings:
    """How much of everything. The defaults take about three minutes on two cores."""

    seed: int = 0
    things: int = 1  # at most, in an image, 1 to 3; several take far more than minutes of training to tell apart
    images: int = 3000  # for training
    unseen: int = 120  # images of the exam
    held_out: int = 60  # images of the exam with pairs of colour and category that are nowhere in training
    language_steps: int = 700
    vision_steps: int = 700
    pretrain_steps: int = 160
    finetune_steps: int = 600
    batch_size: int = 8  # few: on a CPU, several short steps are faster than one over thousands of tokens
    vision_batch_size: int = 32

    def scaled(self, scale: float) -> "QuickstartSettings":
        """The same with every number of steps multiplied."""
        steps = {name: value for name, value in dataclasses.asdict(self).items() if name.endswith("_steps")}
        return dataclasses.replace(self, **{name: max(1, round(scale * value)) for name, value in steps.items()})


FAST = QuickstartSettings(
    images=64,
    unseen=8,
    held_out=4,
    language_steps=4,
    vision_steps=4,
    pretrain_steps=2,
    finetune_steps=3,
    vision_batch_size=8,
)
"""Every phase, too short to learn anything: for tests."""


class Quickstart:
    """One run of the quickstart; a `ValueError` says that `out` contains something else, or a run with other settings."""

    def __init__(
        self,
        out: str | Path,
        settings: QuickstartSettings | None = None,
        *,
        on_phase: Callable[[str], None] = lambda phase: None,
        on_step: Callable[[int, int, float], None] = lambda step, steps, loss: None,
    ):
        self.out = Path(out)
        self.settings = settings or QuickstartSettings()
        self.on_phase, self.on_step = on_phase, on_step
        self.progress = self._open(dataclasses.asdict(self.settings))

    def _open(self, settings: dict[str, Any]) -> dict[str, Any]:
        file = self.out / "progress.json"
        if not file.is_file():
            if self.out.exists() and (not self.out.is_dir() or any(self.out.iterdir())):
                raise ValueError(f"{self.out} exists and is not a quickstart. Give another --out.")
            self.out.mkdir(parents=True, exist_ok=True)
            write_json(file, {"settings": settings, "phases": {}})
        progress = json.loads(file.read_text("utf-8"))
        before = progress["settings"]
        changed = [key for key, value in settings.items() if before.get(key) != value]
        if changed:
            what = "; ".join(f"{key} was {before.get(key)} and is {settings[key]}" for key in changed)
            raise ValueError(
                f"{self.out} contains a quickstart with other settings: {what}. Give another --out, or delete it."
            )
        return progress

    def run(self) -> dict[str, Any]:
        """Runs every phase that is not complete yet; returns the content of `results.json`: scores, seconds, peak memory."""
        for phase in PHASES:
            if phase not in self.progress["phases"]:
                self.on_phase(phase)
                begun = time.perf_counter()
                self.losses, self.steps = [], getattr(self.settings, f"{phase}_steps", 0)
                facts = getattr(self, f"_{phase}")() or {}
                seconds = round(time.perf_counter() - begun, 1)
                facts = {**facts, "losses": self.losses, "seconds": seconds, "peak_rss": peak_rss()}
                self.progress["phases"][phase] = facts
                write_json(self.out / "progress.json", self.progress)
        results = self.results()
        write_json(self.out / "results.json", results)
        return results

    def results(self) -> dict[str, Any]:
        """Scores, seconds and memory of a finished run."""
        phases = self.progress["phases"]
        return {
            "scores": phases["exam"]["scores"],
            "examples_of_wrong_answers": phases["exam"]["wrong"],
            "pipeline_agrees": phases["reload"]["pipeline_agrees"],
            "held_out_pairs": sorted(" ".join(pair) for pair in HELD_OUT),
            "seconds": {phase: phases[phase]["seconds"] for phase in PHASES},
            "total_seconds": round(sum(phases[phase]["seconds"] for phase in PHASES), 1),
            "peak_rss_bytes": max(phases[phase]["peak_rss"] for phase in PHASES),
            "settings": self.progress["settings"],
        }

    # The phases. Each starts with an empty folder, so that an interrupted one leaves nothing behind.

    def _world(self) -> dict[str, Any]:
        settings, world = self.settings, self._fresh("world")
        splits = {"train": settings.images, "unseen": settings.unseen, "held_out": settings.held_out}
        for split, number in splits.items():
            held_out = split == "held_out"
            scenes = draw_scenes(number, settings.seed, split, held_out=held_out, most_things=settings.things)
            write_split(world / split, scenes, workers=min(2, os.cpu_count() or 1))
        return {"images": splits}

    def _data(self) -> dict[str, Any]:
        from ..data_engine.captions import expand_captions
        from ..data_engine.generate import generate
        from ..data_engine.run import GenerateConfig
        from ..data_engine.samples import OutputSettings
        from ..data_engine.validate import ValidationSettings
        from .responder import PROMPTS, ScriptedResponder

        train, out, seed = self.out / "world" / "train", self._fresh("data"), self.settings.seed
        responder = ScriptedResponder(seed)
        summary = generate(
            out / "instruct",
            responder,
            GenerateConfig(responder.name, mix=(4, 1, 1), seed=seed),
            captions=train / "captions.json",
            boxes=train / "instances.json",
            images=train / "images",
            prompts=PROMPTS,
            # The world is small: its answers are short, and its questions are the same for every image.
            validation=ValidationSettings(
                answer_words={"conversation": (1, 60), "detail": (8, 90), "complex": (6, 60)}
            ),
            output=OutputSettings(question_repeats=None, parquet=False, report_samples=60),
        )
        expand_captions(train / "captions.json", out / "captions.json", style="plain", seed=seed)
        return {"samples": dict(summary.output.samples), "turns": sum(summary.output.turns.values())}

    def _language(self) -> dict[str, Any]:
        from .language import train_language_model

        settings, out = self.settings, self._fresh("parts/language_model")
        options = {"batch_size": settings.batch_size, "most_things": settings.things, "seed": settings.seed}
        return train_language_model(out, steps=settings.language_steps, log=self._log, **options)

    def _vision(self) -> dict[str, Any]:
        from .vision import train_vision_tower

        settings, out = self.settings, self._fresh("parts/vision_encoder")
        options = {"batch_size": settings.vision_batch_size, "seed": settings.seed}
        split = self.out / "world" / "train"
        return train_vision_tower(split, out, steps=settings.vision_steps, log=self._log, **options)

    def _compose(self) -> dict[str, Any]:
        import torch

        from .. import LlavaForConditionalGeneration, LlavaProcessor
        from .vision import FEATURE_LAYER

        out = self._fresh("parts/untrained")
        parts = str(self.out / "parts" / "vision_encoder"), str(self.out / "parts" / "language_model")
        torch.manual_seed(self.settings.seed)
        compose = LlavaForConditionalGeneration.from_vision_language_pretrained
        model = compose(*parts, vision_feature_layer=FEATURE_LAYER)
        processor = LlavaProcessor.from_vision_language_pretrained(*parts, chat_template="own")
        model.save_pretrained(out)
        processor.save_pretrained(out)
        return {"parameters": sum(parameter.numel() for parameter in model.parameters())}

    def _recipe(self, phase: str) -> dict[str, Any]:
        """Settings of a stage, as a recipe file has them."""
        data = "captions.json" if phase == "pretrain" else "instruct/instruct.json"
        settings = {
            "stage": phase,
            "model": str(self.out / "parts" / "untrained"),
            "data": str(self.out / "data" / data),
            "image_folder": str(self.out / "world" / "train" / "images"),
            "output_dir": str(self.out / phase),
            "per_device_train_batch_size": self.settings.batch_size,
            "seed": self.settings.seed,
            "precision": "fp32",
            "use_cpu": True,
            "max_length": 512,
            "logging_steps": 1,
            "logging_nan_inf_filter": False,
            "save_strategy": "no",
            "report_to": "none",
            "disable_tqdm": True,
        }
        if phase == "pretrain":
            steps = self.settings.pretrain_steps
            return {**settings, "chat_template": "plain", "learning_rate": 3e-3, "max_steps": steps}
        return {
            **settings,
            "adapter": "lora",
            "lora_r": 64,
            "lora_alpha": 128,
            "lora_dropout": 0.0,
            "projector": str(self.out / "pretrain"),
            "learning_rate": 2e-3,
            "projector_learning_rate": 2e-3,
            "max_steps": self.settings.finetune_steps,
        }

    def _train(self, phase: str) -> dict[str, Any]:
        from rich.console import Console
        from transformers import TrainerCallback

        from ..training import train
        from ..training.recipes import write_recipe

        self._fresh(phase)
        recipe = self._recipe(phase)
        write_recipe(recipe, self.out / f"{phase}.yaml", f"{PHASES[phase]}: llava train {self.out / phase}.yaml")
        record = self._log

        class LossCallback(TrainerCallback):
            def on_log(self, args, state, control, logs=None, **kwargs):
                if logs and "loss" in logs:
                    record(state.global_step, logs["loss"])

        with open(self.out / f"{phase}.log", "w", encoding="utf-8") as log, contextlib.redirect_stdout(log):
            result = train(recipe, callbacks=[LossCallback()], console=Console(file=log, width=120))
        return {"steps": result.global_step}

    _pretrain = functools.partialmethod(_train, "pretrain")
    _finetune = functools.partialmethod(_train, "finetune")

    def _reload(self) -> dict[str, Any]:
        from transformers import pipeline

        from ..inference import LlavaPredictor
        from ..training import merge_adapter
        from .exam import answer_items, set_exam

        model = self._fresh("model")
        merge_adapter(str(self.out / "finetune"), str(model))
        items = set_exam(self.out / "world" / "unseen", self.settings.seed)[:14]
        answers = answer_items(LlavaPredictor.from_pretrained(str(model)), items, [item.image for item in items])
        with contextlib.redirect_stdout(io.StringIO()):
            pipe = pipeline("image-text-to-text", model=str(model), device="cpu")
        piped = []
        for item in items:
            content = [{"type": "image", "image": str(item.image)}, {"type": "text", "text": item.question}]
            found = pipe(text=[{"role": "user", "content": content}], max_new_tokens=32, return_full_text=False)
            piped.append(found[0]["generated_text"].strip())
        return {"pipeline_agrees": piped == answers, "answer": {"question": items[0].question, "answer": piped[0]}}

    def _exam(self) -> dict[str, Any]:
        from ..inference import LlavaPredictor
        from . import exam

        predictor = LlavaPredictor.from_pretrained(str(self.out / "model"))
        seed = self.settings.seed
        items = exam.set_exam(self.out / "world" / "unseen", seed)
        held_out = exam.set_exam(self.out / "world" / "held_out", seed, held_out=True)
        rows = json.loads((self.out / "data" / "instruct" / "instruct.json").read_text("utf-8"))
        answers = exam.answer_items(predictor, items, [item.image for item in items])
        held_out_answers = exam.answer_items(predictor, held_out, [item.image for item in held_out])
        blank = exam.blank_image(items[0].image)
        answered = {
            "with the image": answers,
            "blank images": exam.answer_items(predictor, items, [blank] * len(items)),
            "shuffled images": exam.answer_items(predictor, items, exam.shuffle_images(items, seed)),
            "majority answer": exam.answer_by_majority(items, exam.read_turns(rows)),
        }
        scores = {name: exam.score(items, texts) for name, texts in answered.items()}
        scores["held-out pairs"] = exam.score(held_out, held_out_answers)
        scores = {name: {kind: round(value, 4) for kind, value in kinds.items()} for name, kinds in scores.items()}
        shown = [
            {
                "image": str(item.image.relative_to(self.out)),
                "kind": item.kind,
                "question": item.question,
                "answer": text,
                "expected": item.answer,
                "right": exam.is_right(item, text),
            }
            for item, text in zip([*items, *held_out], [*answers, *held_out_answers])
        ]
        write_json(self.out / "answers.json", shown)
        wrong = [f"{row['question']} {row['answer']} (right: {row['expected']})" for row in shown if not row["right"]]
        return {"scores": scores, "questions": len(items), "wrong": wrong[:10]}

    def _figures(self) -> None:
        from .figures import plot_answers, plot_losses

        phases = self.progress["phases"]
        plot_losses({PHASES[phase]: phases[phase]["losses"] for phase in STAGES}, self.out / "loss_curve.png")
        answers = json.loads((self.out / "answers.json").read_text("utf-8"))
        plot_answers(answers, phases["exam"]["scores"], self.out, self.out / "answers.png", self.settings.seed)

    def _log(self, step: int, loss: float) -> None:
        self.losses.append(round(loss, 4))
        self.on_step(step, self.steps, loss)

    def _fresh(self, name: str) -> Path:
        """A path in the run's folder where nothing is."""
        shutil.rmtree(self.out / name, ignore_errors=True)
        return self.out / name


def peak_rss() -> int:
    """Peak resident memory of this process, in bytes."""
    if sys.platform == "win32":
        import psutil

        return psutil.Process().memory_info().peak_wset
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
