"""
The one rule for what ends an answer, used by training, generation, conversion and publishing.

A stop is a special token (`</s>`, `<|im_end|>`) or text (`###` of LLaVA v0). White space is not a stop: the
template of `llava-hf/llava-1.5-7b-hf` ends an answer with a space, though the original was trained with `</s>` there.
"""

import copy
import functools
import os
import re

import jinja2
from transformers import GenerationConfig, ProcessorMixin
from transformers.utils.chat_template_utils import render_jinja_template

from ..io.checkpoints import base_of, load_processor
from .chat_templates import chat_template_of, has_generation_marks, read_template, render_with_spans
from .control_tokens import ControlTokens


_QUESTION, _ANSWER = "The question?", "The answer."
_GENERATION = re.compile(r"(\{%-?\s*generation\s*-?%\})(.*?)(\{%-?\s*endgeneration\s*-?%\})", re.DOTALL)
_LOOPS = re.compile(r"\{%-?\s*(?:for\b(.*?)\bin\b(.*?)-?%\}|endfor\b)", re.DOTALL)


def answer_stop(processor: ProcessorMixin) -> str:
    """
    The stop with which the processor's chat template ends an answer: a special token such as `"</s>"`, or a text such as `"###"`;
    `""` where only white space, or nothing, follows. ValueError if there is no template, or it does not render an answer.
    """
    return _stop_and_marks(processor)[0]


def stop_token_id(processor: ProcessorMixin) -> int | None:
    """The id of [`answer_stop`] where it is one token, else `None`."""
    return processor.tokenizer.get_added_vocab().get(answer_stop(processor))


def stop_is_unmarked(processor: ProcessorMixin) -> bool:
    """Whether the template ends `{% generation %}` before the stop that follows an answer."""
    try:
        return not _stop_and_marks(processor)[1]
    except ValueError:
        return False


def teaches_no_stop(processor: ProcessorMixin) -> bool:
    """Whether only white space follows an answer, in a template of questions and answers (captions need no stop)."""
    try:
        stop, _ = _stop_and_marks(processor)
        return not stop and _QUESTION in _answered(processor)[0]
    except ValueError:
        return False


def end_answers_with_eos(chat_template: str, special_tokens: dict[str, str]) -> str:
    """
    A template whose answers end with white space, made to end them with the EOS token in its place, inside `{% generation %}`.
    Everything else that it writes stays as it is, the generation prompt included.

    Args:
        chat_template (`str`): Jinja text. One without `{% generation %}` gets these marks.
        special_tokens (`dict[str, str]`): `tokenizer.special_tokens_map`.

    Raises:
        ValueError: there is no EOS token, or the template does not let its answers be found.
    """
    text, end = _render_answer(chat_template, _hashable(special_tokens))
    blank = text[text.rindex(_ANSWER) + len(_ANSWER) : end]
    if not special_tokens.get("eos_token"):
        raise ValueError("The tokenizer has no EOS token with which an answer could end.")
    if has_generation_marks(chat_template):
        changed = _GENERATION.sub(lambda block: _end_block(chat_template, block, len(blank)), chat_template)
    else:
        changed = (
            f"{read_template('_marked')}{chat_template.removesuffix(chr(10))}{{% endset %}}"
            "{%- for piece in rendered.split('\\ufdd0') -%}"
            "{%- set parts = piece.split('\\ufdd1') -%}"
            "{%- if loop.first -%}{{ piece }}{%- else -%}"
            "{% generation %}{{ parts[0] ~ eos_token }}{% endgeneration %}"
            f"{{{{ parts[1][{len(blank)}:] if parts[1].startswith({blank!r}) else parts[1] }}}}"
            "{%- endif -%}{%- endfor -%}"
        )
    for messages in _PROBES:
        for prompt in (False, True):
            variables = {**special_tokens, "add_generation_prompt": prompt}
            expected = _render(messages, chat_template, variables)
            for answer in (_ANSWER, "Yes."):
                expected = expected.replace(answer + blank, answer + special_tokens["eos_token"])
            if _render(messages, changed, variables) != expected:
                raise ValueError(
                    f"The chat template ends an answer with {blank!r}, which teaches no stop, and is not of a form in "
                    "which the EOS token can take its place."
                )
    return changed


def add_generation_stop(config: GenerationConfig, processor: ProcessorMixin) -> None:
    """Make `config.eos_token_id` hold the chat template's stop token, so that stock transformers ends where it does."""
    if missing_stop(config, processor) and (token := stop_token_id(processor)) is not None:
        config.eos_token_id = [*_eos_token_ids(config), token] if _eos_token_ids(config) else token
    drop_unused_sampling(config)


def drop_unused_sampling(config: GenerationConfig) -> None:
    """Vicuna's has a temperature and no `do_sample`: transformers 5 refuses to save that once a field was changed."""
    if not config.do_sample:
        for name in ("temperature", "top_p", "top_k", "min_p", "typical_p"):
            setattr(config, name, None)


def note_generation_stop(folder: str | os.PathLike, base: GenerationConfig, processor: ProcessorMixin) -> None:
    """Write `generation_config.json` into an adapter's folder where its base's lacks the stop: whoever loads the adapter gets the
    base's, and gives this one to `generate(generation_config=…)`."""
    if missing_stop(base, processor) is None:
        return
    config = copy.deepcopy(base)
    add_generation_stop(config, processor)
    if stop_token_id(processor) is None:
        config.stop_strings = [answer_stop(processor)]
    config.save_pretrained(folder)


def needed_by_stock(folder: str | os.PathLike, kind: str) -> dict | None:
    """What `generate` of stock transformers has to be given for the full model (`kind="full"`) or adapter in a folder, such as
    `{"eos_token_id": [2, 7]}` or `{"stop_strings": ["###"]}`; `None` where it ends its answers by itself, or it is not known."""
    noted = os.path.isfile(os.path.join(folder, "generation_config.json"))
    if kind == "adapter" and noted:
        config = GenerationConfig.from_pretrained(folder)
        return {"stop_strings": config.stop_strings} if config.stop_strings else {"eos_token_id": config.eos_token_id}
    try:
        processor = load_processor(folder)
        config = GenerationConfig.from_pretrained(base_of(folder)[0] if kind == "adapter" else folder)
    except (OSError, ValueError):  # no processor; a base that is neither here nor in the Hub's cache
        return None
    return missing_stop(config, processor)


def missing_stop(config: GenerationConfig, processor: ProcessorMixin) -> dict | None:
    """What `generate` has to be given to end where the chat template does, such as `{"eos_token_id": [2, 7]}` or
    `{"stop_strings": ["###"]}` (with `tokenizer=…`); `None` where the generation configuration says enough."""
    try:
        stop, token = answer_stop(processor), stop_token_id(processor)
    except ValueError:
        return None
    known = _eos_token_ids(config)
    if token is not None:
        return None if token in known else {"eos_token_id": [*known, token]}
    return {"stop_strings": [stop]} if stop and stop not in (config.stop_strings or ()) else None


def _eos_token_ids(config: GenerationConfig) -> list[int]:
    ids = config.eos_token_id
    return [] if ids is None else list(ids) if isinstance(ids, (list, tuple)) else [ids]


def _conversation(*turns: str) -> list[dict]:
    roles = ("user", "assistant")
    return [{"role": roles[i % 2], "content": [{"type": "text", "text": turn}]} for i, turn in enumerate(turns)]


_PROBES = [
    _conversation(_QUESTION, _ANSWER),
    _conversation(_QUESTION, _ANSWER, "Sure?", "Yes."),
    _conversation(_QUESTION, _ANSWER, "Sure?"),
]


def _stop_and_marks(processor: ProcessorMixin) -> tuple[str, bool]:
    """The stop of an answer, and whether the answer's mark, if there is one, holds it."""
    text, end = _answered(processor)
    start = text.rindex(_ANSWER) + len(_ANSWER)
    token_end = ControlTokens.of(processor.tokenizer, processor.image_token).find_stop(text, start)
    if token_end is None:
        return text[start:end].strip(), True
    return text[start:token_end].strip(), token_end <= end


def _answered(processor: ProcessorMixin) -> tuple[str, int]:
    return _render_answer(chat_template_of(processor), _hashable(processor.tokenizer.special_tokens_map))


def _hashable(special_tokens: dict) -> tuple[tuple[str, str], ...]:
    return tuple((name, token) for name, token in special_tokens.items() if isinstance(token, str))


def _render(messages: list[dict], chat_template: str, variables: dict) -> str:
    return render_jinja_template([messages], chat_template=chat_template, **variables)[0][0]


@functools.lru_cache(maxsize=32)
def _render_answer(chat_template: str, special_tokens: tuple[tuple[str, str], ...]) -> tuple[str, int]:
    """A question and [`_ANSWER`] as text, and where what belongs to the answer ends: its mark, or the text."""
    variables = dict(special_tokens)
    try:
        if not has_generation_marks(chat_template):
            text = _render(_PROBES[0], chat_template, variables)
            end = len(text)
        else:
            text, spans = render_with_spans(_PROBES[0], chat_template, **variables)
            end = spans[-1][1] if spans else 0
    except (jinja2.TemplateError, TypeError) as error:
        raise ValueError(f"The chat template does not render a question and its answer: {error}") from error
    if _ANSWER not in text[:end]:
        raise ValueError("The chat template marks no answer with {% generation %}, or changes it.")
    return text, end


def _end_block(chat_template: str, block: re.Match, num_blanks: int) -> str:
    """A `{% generation %}` block that ends with the EOS token in place of `num_blanks` characters."""
    opening, body, closing = block.groups()
    loops: list[str] = []
    for tag in _LOOPS.finditer(chat_template, 0, block.start()):
        if tag[2] is not None:
            loops.append(tag[2])
        elif loops:  # none is open where a comment of the template names the tag
            loops.pop()
    over_items = bool(loops) and "content" in loops[-1]  # an answer of several texts ends once
    answer = f"answer[:-{num_blanks}]" if num_blanks else "answer"
    return (
        f"{opening}{{% set answer {'-' * opening.endswith('-%}')}%}}{body}{{%{'-' * closing.startswith('{%-')} endset %}}"
        f"{{{{ {answer} ~ eos_token{' if loop.last else answer' * over_items} }}}}{closing}"
    )
