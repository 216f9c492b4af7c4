"""Tiny checkpoints in the form of what is published: see `forms.py`."""

from .forms import (
    ANSWERS,
    CONVERSATION,
    FORMS,
    LANGUAGES,
    ORIGINALS,
    QUESTION,
    Form,
    Language,
    Original,
    build,
    build_language,
    build_original,
    build_siglip,
    build_tower,
    copy,
    each_form,
    every_form,
    every_original,
)


__all__ = [
    "ANSWERS",
    "CONVERSATION",
    "FORMS",
    "LANGUAGES",
    "ORIGINALS",
    "QUESTION",
    "Form",
    "Language",
    "Original",
    "build",
    "build_language",
    "build_original",
    "build_siglip",
    "build_tower",
    "copy",
    "each_form",
    "every_form",
    "every_original",
]
