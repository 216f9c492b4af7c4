"""
Captions against people's captions: CIDEr-D (`pycocoevalcap`, the COCO implementation) and BLEU-4 (`sacrebleu`).

Annotations are COCO's (`{"images": [{"id", "file_name"}], "annotations": [{"image_id", "caption"}]}`) or JSONL rows
`{"image", "captions": […]}`.

Differs from COCO's evaluation: that one tokenizes with a Java program. Here words are cut by [`words_of`], in lower case and
without punctuation; BLEU is sacrebleu's, lower case, tokenization 13a. Compare values among runs of this command only.
"""

import json
import os
import re
from collections.abc import Sequence
from pathlib import Path

from .benchmark import Benchmark
from .results import Scored, hash_file, interval_of, read_jsonl


QUESTION = "Describe the picture in one short sentence."


def read_captions(annotations: str | os.PathLike) -> list[dict]:
    """
    `{"id", "image", "captions"}` of every image that has captions.

    Raises:
        ValueError: the file has none of the two forms.
    """
    path = Path(annotations)
    if path.suffix == ".jsonl":
        captions = {}
        for number, row in enumerate(read_jsonl(path), 1):
            texts = row.get("captions")
            if not isinstance(row.get("image"), str) or not isinstance(texts, list) or not texts:
                raise ValueError(f"{path}, row {number}, is not {{'image', 'captions': […]}}: {', '.join(row)}.")
            captions[row["image"]] = texts
    else:
        try:
            content = json.loads(path.read_text("utf-8"))
            names = {image["id"]: image["file_name"] for image in content["images"]}
            captions = {}
            for annotation in content["annotations"]:
                captions.setdefault(names[annotation["image_id"]], []).append(annotation["caption"])
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path} is not a COCO captions file ({error!r}).") from None
    if not all(isinstance(text, str) and text.strip() for texts in captions.values() for text in texts):
        raise ValueError(f"{path} has a caption that is empty or not text.")
    return [{"id": image, "image": image, "captions": texts} for image, texts in captions.items()]


def make_benchmark(
    images: list[dict],
    image_folder: str | os.PathLike,
    *,
    question: str = QUESTION,
    files: Sequence[str | os.PathLike] = (),
) -> Benchmark:
    """Captioning as a [`Benchmark`]."""
    samples = [
        {
            "id": image["id"],
            "messages": [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}],
            "images": [image["image"]],
        }
        for image in images
    ]
    return Benchmark(
        name="captions",
        samples=samples,
        score=lambda answers: score(images, answers),
        data={"files": {Path(file).name: hash_file(file) for file in files}},
        settings={"question": question},
        image_folder=os.fspath(image_folder),
        max_new_tokens=64,
    )


def words_of(caption: str) -> str:
    """Lower-case words, one blank between them; punctuation is gone, apart from hyphens and apostrophes inside words."""
    return " ".join(re.findall(r"\w+(?:['-]\w+)*", caption.lower().replace("\u2019", "'")))


def score(images: list[dict], answers: dict[str, str]) -> Scored:
    """
    CIDEr-D and BLEU-4, both times 100.

    Raises:
        ImportError: `pycocoevalcap` or `sacrebleu` is not installed.
    """
    try:
        import sacrebleu
        from pycocoevalcap.cider.cider import Cider
    except ImportError as error:
        raise ImportError(
            "Captions are scored with pycocoevalcap and sacrebleu: pip install 'modeling-llava[eval]'"
        ) from error
    answered = [image for image in images if image["id"] in answers]
    references = {image["id"]: [words_of(caption) for caption in image["captions"]] for image in answered}
    candidates = {image["id"]: [words_of(answers[image["id"]])] for image in answered}
    _, per_image = Cider().compute_score(references, candidates) if len(answered) > 1 else (None, [None])
    rows = [
        {
            "id": image["id"],
            "question": "",
            "answer": answers[image["id"]],
            "expected": image["captions"][0],
            "score": None if value is None else float(value),
            "groups": ["all"],
        }
        for image, value in zip(answered, per_image)
    ]
    most = max((len(image["captions"]) for image in answered), default=0)
    # sacrebleu takes the first references of all, then the second, …; None where an image has fewer.
    columns = [[dict(enumerate(image["captions"])).get(number) for image in answered] for number in range(most)]
    bleu = sacrebleu.corpus_bleu([answers[image["id"]] for image in answered], columns, lowercase=True)
    metrics = {
        # CIDEr weighs words by how rare they are among the images: for a single image it says nothing.
        "cider": interval_of([row["score"] for row in rows if row["score"] is not None]),
        "bleu4": {"value": bleu.score, "interval": None, "count": len(rows)},
    }
    versions = {"sacrebleu": sacrebleu.__version__, "tokenization": "13a, lower case"}
    empty = sum(not words_of(row["answer"]) for row in rows)
    return Scored(rows, metrics, "cider", {"empty": empty}, {"bleu": versions})


__all__ = ["QUESTION", "make_benchmark", "read_captions", "score", "words_of"]
