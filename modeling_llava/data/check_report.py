"""What [`check_data`] found, in numbers, examples and one picture."""

import importlib.util
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ..io.files import write_atomic
from .packing import best_fit_packs


_SHOWN = 5  # examples per problem in the report

DUPLICATE_ID = "duplicate id"
DUPLICATE_SAMPLE = "duplicate conversation"


class Found(NamedTuple):
    """What was found about one record; a list in the file of an interrupted check."""

    id: str
    type: str | None = None
    images: int = 0
    length: int = 0  # tokens, images included; 0 where the record could not be encoded
    image_tokens: int = 0
    supervised: int = 0
    hash: str | None = None  # equal for the same images and text
    problems: Sequence[tuple[str, str]] = ()  # (reason, message)
    notices: Sequence[tuple[str, str]] = ()
    cut: tuple[int, int, bool, bool] | None = None
    """Beyond `max_length`: tokens, supervised tokens, whether an image is, and whether every answer is."""


@dataclass
class DataReport:
    """The result of [`check_data`]. Lengths are in tokens, images included; they are 0 where no processor was given."""

    samples: int  # records read
    usable: int  # records without a problem
    images: int
    text_only: int  # samples without an image
    types: dict[str, int]  # samples by conversation type
    problems: dict[str, int]  # samples that cannot be trained on as they are, by reason
    notices: dict[str, int]  # samples that are unusual, by kind
    examples: dict[str, list[str]]  # up to five messages for each problem and notice
    length_mean: float
    length_median: float
    length_95th: float
    length_longest: int
    tokens: int
    image_tokens: int
    supervised_tokens: int
    max_length: int | None
    too_long: dict[str, int]
    """What `overflow="truncate_text"` would cut: `samples`, `tokens`, `supervised_tokens`, and how many of the samples
    it could not save: `images_cut` (an image would be cut), `answers_lost` (no answer would be left)."""
    batch_size: int
    steps: int  # optimizer steps of an epoch, `batch_size` samples each
    packed_steps: int  # the same of `batch_size` packs of `max_length` tokens each
    pack_utilization: float  # fraction of the packs' tokens that is filled, in [0, 1]
    resumed_at: int = 0  # records that an earlier, interrupted check had read
    files: list[str] = field(default_factory=list)  # that were written

    @property
    def ok(self) -> bool:
        return not self.problems

    def to_dict(self) -> dict[str, Any]:
        return {"ok": self.ok, **asdict(self)}


def summarize(found: list[Found], max_length: int | None, batch_size: int) -> tuple[DataReport, list[dict]]:
    """The report, and every problem and notice as `{"id", "kind", "reason", "message"}`."""
    entries = [(r.id, kind, *e) for r in found for kind in ("problem", "notice") for e in getattr(r, f"{kind}s")]
    ids, hashes = set(), {}
    for record in found:
        name = f"sample {record.id!r}"
        if record.id in ids:
            entries.append((record.id, "notice", DUPLICATE_ID, f"{name} has the same id as an earlier one."))
        ids.add(record.id)
        earlier = hashes.setdefault(record.hash, record) if record.hash is not None else record
        if earlier is not record:
            message = f"{name} has the same images and text as {earlier.id!r}."
            entries.append((record.id, "notice", DUPLICATE_SAMPLE, message))

    counts = {"problem": Counter(), "notice": Counter()}
    examples: dict[str, list[str]] = {}
    for _, kind, reason, message in entries:
        counts[kind][reason] += 1
        if counts[kind][reason] <= _SHOWN:
            examples.setdefault(reason, []).append(message)
    lengths = np.array([record.length for record in found if record.length], dtype=np.int64)
    usable = np.array([record.length for record in found if not record.problems], dtype=np.int64)
    cuts = [record.cut for record in found if record.cut]
    plan = best_fit_packs(usable if len(lengths) else [], max_length or int(lengths.max(initial=1)))
    return DataReport(
        samples=len(found),
        usable=len(usable),
        images=sum(record.images for record in found),
        text_only=sum(not record.images for record in found),
        types=dict(Counter(record.type or "without type" for record in found).most_common()),
        problems=dict(counts["problem"].most_common()),
        notices=dict(counts["notice"].most_common()),
        examples=examples,
        length_mean=float(lengths.mean()) if len(lengths) else 0.0,
        length_median=float(np.median(lengths)) if len(lengths) else 0.0,
        length_95th=float(np.percentile(lengths, 95)) if len(lengths) else 0.0,
        length_longest=int(lengths.max(initial=0)),
        tokens=int(lengths.sum()),
        image_tokens=sum(record.image_tokens for record in found),
        supervised_tokens=sum(record.supervised for record in found),
        max_length=max_length,
        too_long={
            "samples": len(cuts),
            "tokens": sum(cut[0] for cut in cuts),
            "supervised_tokens": sum(cut[1] for cut in cuts),
            "images_cut": sum(cut[2] for cut in cuts),
            "answers_lost": sum(cut[3] for cut in cuts),
        },
        batch_size=batch_size,
        steps=-(-len(usable) // batch_size),
        packed_steps=-(-len(plan) // batch_size),
        pack_utilization=plan.utilization,
    ), [dict(zip(("id", "kind", "reason", "message"), entry)) for entry in entries]


def write_report(out: Path, report: DataReport, findings: list[dict], lengths: list[int]) -> None:
    """Write `lengths.png`, `problems.jsonl` and, last, `report.json`; `report.files` names them."""
    plot = plot_lengths(lengths, report.max_length, out / "lengths.png")
    report.files = [str(out / "report.json"), str(out / "problems.jsonl"), *([str(plot)] if plot else [])]
    lines = "".join(json.dumps(finding, ensure_ascii=False) + "\n" for finding in findings)
    write_atomic(out / "problems.jsonl", lines.encode("utf-8", "surrogatepass"))
    write_atomic(out / "report.json", json.dumps(report.to_dict(), indent=2) + "\n")


def plot_lengths(lengths: list[int], max_length: int | None, path: Path) -> Path | None:
    """Draw how many samples have how many tokens, as a PNG; `None` without matplotlib or anything to draw."""
    if not lengths or importlib.util.find_spec("matplotlib") is None:
        return None
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.add_subplot()
    bins = np.histogram_bin_edges(lengths, bins=min(60, max(10, len(set(lengths)))))
    axes.hist(lengths, bins=bins, color="#4c72b0")
    if max_length is not None and max(lengths) > max_length:
        over = sum(length > max_length for length in lengths)
        axes.axvline(max_length, color="#c44e52", linewidth=1.5)
        text, place = f" max_length {max_length:,}\n {over:,} samples beyond", axes.get_xaxis_transform()
        axes.text(max_length, 0.97, text, transform=place, va="top", color="#c44e52")
    axes.set(xlabel="tokens per sample, images included", ylabel="samples", xlim=(0, None))
    axes.set_title(f"{len(lengths):,} samples, median {np.median(lengths):,.0f} tokens, longest {max(lengths):,}")
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=120)
    return path
