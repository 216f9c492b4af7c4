"""The tiny world's vision encoder: a CLIP-style transformer that learns what is where.

CLIP learned from 400 million captions. For a few thousand images boxes are the better labels: every patch inside the middle
of a box learns category, colour, size and position of its thing, every patch outside of all boxes learns that there is
nothing, and the class token learns the place. Colours and places come from the captions.
"""

import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F
from transformers import CLIPVisionConfig, CLIPVisionModel

from ..constants import IGNORE_INDEX
from ..data.schema import load_image
from ..data_engine.contexts import read_contexts
from ..image_processing_llava import LlavaImageProcessor
from .responder import read_context
from .scenes import CATEGORIES, COLOURS, COLUMNS, PLACES, ROWS, SIZES


MIDDLE = 0.7
"""Patches are labelled if their centre lies within this fraction of a box's side; a box's corners often show no thing."""

IMAGE_SIZE = 48
PATCH_SIZE = 8
FEATURE_LAYER = -2
"""As in LLaVA: the last layer but one."""


def tiny_vision_config() -> CLIPVisionConfig:
    """Configuration of the tower."""
    return CLIPVisionConfig(
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=4,
        num_attention_heads=4,
        image_size=IMAGE_SIZE,
        patch_size=PATCH_SIZE,
        projection_dim=128,
    )


HEADS: dict[str, tuple[str, ...]] = {
    "category": ("nothing", *CATEGORIES),
    "colour": ("nothing", *COLOURS),
    "size": ("nothing", *SIZES),
    "position": ("nothing", *(f"{row} {column}" for row in ROWS for column in COLUMNS)),
}
"""What a patch learns of the thing that it shows, with the classes."""

HEAD_WEIGHTS = {"category": 1.0, "colour": 1.0, "size": 0.3, "position": 0.3}
"""Weights of the losses; sizes and positions are easy."""


def patch_labels(split: Path) -> tuple[list[Path], dict[str, torch.Tensor], torch.Tensor]:
    """Images of a split and the labels of their patches, from captions and boxes.

    Returns:
        The images' paths; for each of `HEADS` labels `[num_images, num_patches]` (`IGNORE_INDEX`: without a label);
        places `[num_images]`.
    """
    grid = IMAGE_SIZE // PATCH_SIZE
    centres = (np.arange(grid) + 0.5) / grid  # of patches, as fractions of the image's side

    def inside(low: float, high: float, fraction: float) -> np.ndarray:
        return np.abs(centres - (low + high) / 2) <= fraction * (high - low) / 2

    paths, labels, places = [], {head: [] for head in HEADS}, []
    for context in read_contexts(split / "captions.json", split / "instances.json"):
        scene = read_context(f"{context.caption_text}\n\n{context.box_text}")
        patches = {head: np.zeros((grid, grid), np.int64) for head in HEADS}
        for thing, box in zip(scene.things, context.boxes):
            x1, y1, x2, y2 = box.corners
            around = np.outer(inside(y1, y2, 1), inside(x1, x2, 1))  # [row, column]
            middle = np.outer(inside(y1, y2, MIDDLE), inside(x1, x2, MIDDLE))
            shown = {**vars(thing), "position": f"{thing.row} {thing.column}"}
            for head, answers in HEADS.items():
                patches[head][around & (patches[head] == 0)] = IGNORE_INDEX
                patches[head][middle] = answers.index(shown[head])
        paths.append(split / "images" / context.image)
        places.append(list(PLACES).index(scene.place))
        for head in HEADS:
            labels[head].append(patches[head].reshape(-1))
    return paths, {head: torch.from_numpy(np.stack(rows)) for head, rows in labels.items()}, torch.tensor(places)


class PatchTeacher(nn.Module):
    """A tower with linear heads on the hidden state that LLaVA reads."""

    def __init__(self, config: CLIPVisionConfig):
        super().__init__()
        self.tower = CLIPVisionModel(config)
        self.heads = nn.ModuleDict({head: nn.Linear(config.hidden_size, len(HEADS[head])) for head in HEADS})
        self.place = nn.Linear(config.hidden_size, len(PLACES))
        for name, parameter in self.tower.named_parameters():
            # CLIP's initialisation is made for 24 layers; a small tower learns faster from this one.
            if parameter.ndim >= 2 and "position" not in name:
                nn.init.xavier_uniform_(parameter.view(parameter.shape[0], -1))
        positions = sine_positions(config.image_size // config.patch_size, config.hidden_size)
        self.tower.embeddings.position_embedding.weight.data[1:] = positions

    def forward(self, pixel_values: torch.Tensor) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        """`[batch, 3, H, W]` → logits of each head `[batch, num_patches, …]`, and of the place `[batch, …]`."""
        hidden = self.tower.pre_layrnorm(self.tower.embeddings(pixel_values))
        for layer in self.tower.encoder.layers[: FEATURE_LAYER + 1]:  # hidden state −2 is the last layer's input
            hidden = layer(hidden, attention_mask=None)
        return {name: head(hidden[:, 1:]) for name, head in self.heads.items()}, self.place(hidden[:, 0])


def sine_positions(grid: int, hidden_size: int) -> torch.Tensor:
    """Initial position embeddings `[grid², hidden_size]`: sines along rows and columns."""
    waves = 30.0 ** -(torch.arange(hidden_size // 4) / (hidden_size // 4))
    angles = torch.arange(grid)[:, None] * waves  # [grid, hidden/4]
    line = 0.3 * torch.cat([angles.sin(), angles.cos()], dim=-1)  # [grid, hidden/2]
    rows, columns = line[:, None].expand(grid, grid, -1), line[None].expand(grid, grid, -1)
    return torch.cat([rows, columns], dim=-1).reshape(grid * grid, hidden_size)


def train_vision_tower(
    split: Path,
    out: Path,
    *,
    steps: int,
    batch_size: int = 32,
    seed: int = 0,
    log: Callable[[int, float], None] = lambda step, loss: None,
) -> dict[str, Any]:
    """Trains a tower on a split and saves it with its image processor.

    Returns:
        Accuracy of each head over the last tenth of the steps, per labelled patch of a thing, and seconds.
    """
    begun = time.perf_counter()
    torch.manual_seed(seed)
    paths, labels, places = patch_labels(split)
    processor = LlavaImageProcessor(size=IMAGE_SIZE, crop_size=IMAGE_SIZE, do_pad=True)
    chunks = (paths[i : i + 256] for i in range(0, len(paths), 256))
    pixels = [processor([load_image(path) for path in chunk], return_tensors="pt")["pixel_values"] for chunk in chunks]
    images = torch.cat(pixels)
    teacher = PatchTeacher(tiny_vision_config())
    # Most patches show nothing.
    weights = {head: torch.tensor([0.3] + [1.0] * (len(answers) - 1)) for head, answers in HEADS.items()}
    right, order = {head: [] for head in HEADS}, torch.empty(0, dtype=torch.long)

    def loss_of(step: int) -> torch.Tensor:
        nonlocal order
        if len(order) < batch_size:
            order = torch.cat([order, torch.randperm(len(paths))])
        rows, order = order[:batch_size], order[batch_size:]
        logits, place_logits = teacher(images[rows])
        loss = 0.2 * F.cross_entropy(place_logits, places[rows])
        for head in HEADS:
            expected, found = labels[head][rows].flatten(), logits[head].flatten(0, 1)  # [batch · num_patches, …]
            loss = loss + HEAD_WEIGHTS[head] * F.cross_entropy(found, expected, weights[head])
            if step >= steps * 9 // 10:
                right[head].append((found.argmax(-1) == expected)[expected > 0].float().mean().item())
        return loss

    optimize(teacher, loss_of, steps, 3e-3, log)
    teacher.tower.save_pretrained(out)
    processor.save_pretrained(out)
    accuracy = {head: round(float(np.mean(values)), 4) for head, values in right.items()}
    return {"patch_accuracy": accuracy, "seconds": round(time.perf_counter() - begun, 1)}


def optimize(
    model: nn.Module,
    loss_of: Callable[[int], torch.Tensor],
    steps: int,
    learning_rate: float,
    log: Callable[[int, float], None],
) -> list[float]:
    """Trains a model with AdamW on the loss of each step; returns the losses."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, weight_decay=0.01, betas=(0.9, 0.95))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, warmup_and_cosine(steps))
    losses = []
    for step in range(steps):
        loss = loss_of(step)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
        log(step + 1, losses[-1])
    return losses


def warmup_and_cosine(steps: int) -> Callable[[int], float]:
    """Fraction of the learning rate at a step: linear up over 8 % of the steps, then a cosine down to zero."""

    def fraction(step: int) -> float:
        begin = max(1, round(0.08 * steps))
        if step < begin:
            return (step + 1) / begin
        return 0.5 * (1 + math.cos(math.pi * (step - begin) / max(1, steps - begin)))

    return fraction
