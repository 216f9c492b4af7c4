"""
Captions compared with people's captions: CIDEr-D (`pycocoevalcap`, the COCO implementation) and BLEU-4 (`sacrebleu`).

Differs from COCO's evaluation, which tokenizes with a Java program: words are split by [`words_of`], in lower case and without
punctuation; BLEU is sacrebleu's, lower case, tokenization 13a. Compare values among runs of this command only.
"""

import os
import re
from collections.abc import Sequence
from itertools import zip_longest

from ..data_engine.captions import read_captions as read_caption_rows
from .benchmark import Benchmark, question_sample
from .results import Scored, hash_files, score_of


QUESTION = "Describe the picture in one short sentence."


def read_captions(annotations: str | os.PathLike) -> list[dict]:
    """`{"id", "image", "captions"}` of every image of a file of captions (`data_engine.captions.read_captions`)."""
    captions: dict[str, list[str]] = {}
    for row in read_caption_rows(annotations):
        captions.setdefault(row.image, []).extend(row.captions or [""])
    for image, texts in captions.items():
        for text in texts:
            if not words_of(text):
                raise ValueError(f"{annotations}: the image {image!r} has a caption without a word: {text!r}.")
    return [{"id": image, "image": image, "captions": texts} for image, texts in captions.items()]


def make_benchmark(
    images: list[dict],
    image_folder: str | os.PathLike,
    *,
    question: str = QUESTION,
    files: Sequence[str | os.PathLike] = (),
) -> Benchmark:
    """Captioning as a [`Benchmark`]."""
    _scorers()  # raises before hours of answers are made
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
    """Lower-case words separated by spaces, without punctuation except hyphens and apostrophes inside words."""
    return " ".join(re.findall(r"\w+(?:['-]\w+)*", caption.lower().replace("\u2019", "'")))


def score(images: list[dict], answers: dict[str, str]) -> Scored:
    """CIDEr-D and BLEU-4, both times 100."""
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
    # sacrebleu expects the first reference of all images, then the second, …; None where an image has fewer.
    columns = list(zip_longest(*(image["captions"] for image in answered)))
    said = [answers[image["id"]] for image in answered]
    bleu = sacrebleu.corpus_bleu(said, columns, lowercase=True).score if said else None
    cider = [row["score"] for row in rows if row["score"] is not None]  # no shares: they can be above 1
    scores = {
        # CIDEr weighs words by how rare they are among the images: it is undefined for a single image.
        "cider": score_of(cider, [1.0] * len(cider)),
        "bleu4": {"value": bleu, "interval": None, "count": len(rows)},
    }
    versions = {"sacrebleu": sacrebleu.__version__, "tokenization": "13a, lower case"}
    empty = sum(not words_of(row["answer"]) for row in rows)
    return Scored(rows, scores, "cider", {"empty": empty}, {"bleu": versions})


def _scorers():
    try:
        import sacrebleu
        from pycocoevalcap.cider.cider import Cider
    except ImportError as error:
        raise ImportError(
            "Captions are scored with pycocoevalcap and sacrebleu: pip install 'modeling-llava[eval]'"
        ) from error
    return Cider, sacrebleu
