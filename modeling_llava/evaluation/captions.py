"""
Captions against people's captions: CIDEr-D (`pycocoevalcap`, the COCO implementation) and BLEU-4 (`sacrebleu`).

Annotations are COCO's (`{"images": [{"id", "file_name"}], "annotations": [{"image_id", "caption"}]}`) or JSONL rows
`{"image", "captions": […]}`.

Differs from COCO's evaluation: that one tokenizes with a Java program. Here words are cut by [`words_of`], in lower case and
without punctuation; BLEU is sacrebleu's, lower case, tokenization 13a. Compare values among runs of this command only.
"""

import os
import re
from collections.abc import Sequence
from pathlib import Path

from .benchmark import Benchmark, question_sample
from .results import Scored, hash_files, interval_of, read_json, read_jsonl


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
            captions.setdefault(row["image"], []).extend(texts)
    else:
        content, captions = read_json(path), {}
        try:
            names = {image["id"]: os.fspath(image["file_name"]) for image in content["images"]}
            for annotation in content["annotations"]:
                if annotation["image_id"] not in names:
                    raise ValueError(
                        f"{path} is not a COCO captions file: a caption belongs to the image {annotation['image_id']!r}, "
                        f"which is not among its 'images' ({next(iter(names), None)!r}, …)."
                    )
                captions.setdefault(names[annotation["image_id"]], []).append(annotation["caption"])
        except (KeyError, TypeError) as error:
            raise ValueError(f"{path} is not a COCO captions file ({error!r}).") from None
    for image, texts in captions.items():
        for text in texts:
            if not isinstance(text, str) or not words_of(text):
                raise ValueError(
                    f"{path}: the image {image!r} has a caption that is not text, or has no word: {text!r}."
                )
    return [{"id": image, "image": image, "captions": texts} for image, texts in captions.items()]


def make_benchmark(
    images: list[dict],
    image_folder: str | os.PathLike,
    *,
    question: str = QUESTION,
    files: Sequence[str | os.PathLike] = (),
) -> Benchmark:
    """
    Captioning as a [`Benchmark`].

    Raises:
        ImportError: `pycocoevalcap` or `sacrebleu` is not installed; said before hours of answers are made.
    """
    _scorers()
    return Benchmark(
        name="captions",
        samples=[question_sample(image["id"], image["image"], question) for image in images],
        score=lambda answers: score(images, answers),
        data={"files": hash_files(files)},
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
    Cider, sacrebleu = _scorers()
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
    said = [answers[image["id"]] for image in answered]
    bleu = sacrebleu.corpus_bleu(said, columns, lowercase=True).score if said else None
    metrics = {
        # CIDEr weighs words by how rare they are among the images: for a single image it says nothing.
        "cider": interval_of([row["score"] for row in rows if row["score"] is not None], is_share=False),
        "bleu4": {"value": bleu, "interval": None, "count": len(rows)},
    }
    versions = {"sacrebleu": sacrebleu.__version__, "tokenization": "13a, lower case"}
    empty = sum(not words_of(row["answer"]) for row in rows)
    return Scored(rows, metrics, "cider", {"empty": empty}, {"bleu": versions})


def _scorers():
    try:
        import sacrebleu
        from pycocoevalcap.cider.cider import Cider
    except ImportError as error:
        raise ImportError(
            "Captions are scored with pycocoevalcap and sacrebleu: pip install 'modeling-llava[eval]'"
        ) from error
    return Cider, sacrebleu


__all__ = ["QUESTION", "make_benchmark", "read_captions", "score", "words_of"]
