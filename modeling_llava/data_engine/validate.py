"""The rules for a reply. Each depends on the reply and the settings alone, so that a verdict never changes."""

import re
import unicodedata
from collections import Counter
from dataclasses import dataclass, field

from ..constants import IMAGE_TOKEN
from .replies import Rejection, Turn, parse_description, parse_turns, unwrap


@dataclass(frozen=True)
class ValidationSettings:
    """What a reply must be like; pairs are minimum and maximum, by type of data."""

    language: str | None = "en"  # out of `LANGUAGES`; `None` for any
    answer_words: dict[str, tuple[int, int]] = field(
        default_factory=lambda: {"conversation": (1, 500), "detail": (20, 500), "complex": (20, 600)}
    )
    turns: dict[str, tuple[int, int]] = field(
        default_factory=lambda: {"conversation": (1, 20), "detail": (1, 1), "complex": (1, 1)}
    )
    question_words: tuple[int, int] = (2, 80)


MARKER = re.compile(
    re.escape(IMAGE_TOKEN) + r"|<im_(?:start|end|patch)>|<[|｜][\w▁]+[|｜]>|</?s>|\[/?INST\]|<(?:start|end)_of_turn>"
    r"|<(?:bos|eos|pad|unk)>|<0x[0-9a-f]{2}>",
    re.IGNORECASE,
)
"""What a tokenizer would take for a token with a meaning of its own."""

SOURCE = re.compile(
    r"""
      \b(?:the|these|those|this|both|given|provided|first|second|third|fourth|fifth|last|five|all|each|every|any|other)\s+
      (?:\w+\s+)?captions?\b(?!\s+(?:on|under|below|beneath|reads?|reading|printed|written|at\s+the|(?:of|in)\s+the\s+(?:sign|poster|photo|comic|strip|newspaper|magazine|book)))
    | \bimage(?:'s)?\s+captions?\b
    | ^captions?\s*:
    | \bcaptions?\s+(?:\d|mentions?|provides?|says?|states?|describes?|suggests?|indicates?|tells?|provided|given|above|does|do)
    | \b(?:in|from|by|per|to|on)\s+(?:the|its|a)\s+captions?\b(?!\s+(?:on|under|below|beneath)\b)
    | \bbounding[\s-]?(?:box(?:es)?|regions?|rectangles?)\b
    | \bbbox(?:es)?\b
    | \b(?:object|detection|annotated|given|provided)\s+box(?:es)?\b
    | \bbox(?:es)?\s+(?:coordinates?|information|data|annotations?|spans?)\b
    | \b[xy][\s-]coordinates?\b
    | \b(?:normali[sz]ed|object|box|pixel|exact|specific|given|provided|with|at|the|its|their|these|those)\s+coordinates\b(?!\s+(?:with|on|their|its|his|her|the))
    | \bobject\s+(?:detections?|locations?|annotations?|information)\b
    | \bdetected\s+objects?\b
    | \bthe\s+list\s+of\s+(?:\w+\s+)?objects\b
    | \bannotations?\s+(?:shows?|suggests?|indicates?|mentions?)\b
    | \bcoordinates\s+(?:shows?|suggests?|indicates?|are|of|given|provided|above)\b
    | \b(?:the|these|those|given|provided|five)\s+(?:given\s+|provided\s+|five\s+)?(?:sentences|descriptions)\b(?!\s+(?:on|written|printed))
    | \b(?:the|this|all|any|your|on|to|from|by|per|in|with)\s+(?:provided|given)\s+(?:\w+\s+)?(?:descriptions?|information|details|text|data|sentences?)\b
    | \bthe\s+(?:information|details|text|context)\s+(?:provided|given)\b(?!\s+(?:by|on|at|in|to|for)\b)
    | \benough\s+(?:information|details|context)\s+(?:is\s+|was\s+)?(?:provided|given)\b
    | \b(?:is|are|was|were)(?:\s+not|n't)\s+(?:\w+\s+)?(?:mentioned|specified)\b(?!\s+on\b)
    | \b(?:mentioned|specified|stated|described)\s+in\s+the\s+(?:\w+\s+)?(?:context|text|information|data)\b(?!\s+(?:on|of)\b)
    | \b(?:on|to|from|with|by|per|in)\s+the\s+(?:\w+\s+)?(?:description|information|details|text|data)\s+(?:that\s+(?:is|was)\s+)?(?:provided|given|above|available)\b
      (?!\s+(?:by|on|at|in\s+the\s+(?:image|photo|picture|scene)))
    | \b(?:according\s+to|based\s+on|from|as\s+per|in)\s+(?:the\s+|your\s+|these\s+)?(?:descriptions?|sentences?|object\s+list)\b(?!\s+(?:on|box|of\s+the\s+(?:product|job|item)))
    | \b(?:image|photo|picture|scene)\s+(?:descriptions?|information)\b
    | \b(?:image|photo|picture|scene)\s+is\s+described\s+(?:as|in|by)\b
    | \bdescriptions?\s+(?:does\s+not|doesn't|do\s+not|don't|mentions?|states?|says?|indicates?|suggests?|provided)\b
    | [\[(]\s*(?:[01](?:\.\d+)?|\.\d+)\s*,\s*[01]?\.\d+
    | [\[(]\s*[01](?:\s*,\s*[01](?:\.\d+)?){3}\s*[\])]
    | [\[(]\s*[01]?\.\d+\s+[01]?\.\d+
    | \b0\.\d{2,3}\s*,\s*0\.\d{2,3}\b
    | \b[xy][12]?\s*=\s*[01]?\.\d+
    | \b[xy][12]\s+(?:is\s+|of\s+)?[01]?\.\d+
    | \(\s*x1\s*,
    """,
    re.IGNORECASE | re.VERBOSE | re.MULTILINE,
)
SOURCE_WORDS = (
    "caption box bounding coordinate sentence description information details text data list [ ( = object annotation "
    "context described mentioned specified 0. x1 x2 y1 y2"
).split()
"""Each alternative of `SOURCE` contains one of these, which are found a hundred times faster."""

REFUSAL = re.compile(
    r"""
      \A\W*(?:answer\W+)?sorry\b(?!-)
    | \bI(?:'m|\s+am)\s+(?:(?:so|very|really)\s+)?sorry\b
    | \bI(?:'m|\s+am)\s+afraid\s*,?\s+(?:but|that|I)\b
    | \bI\s+apologi[sz]e\b
    | \bas\s+an?\s+(?:(?:AI|artificial\s+intelligence)(?=\s*,|\s+I\b|(?:\s+\w+){1,2}\s*(?:,|I\b))|(?:AI\s+)?(?:large\s+)?language\s+model\b|text[- ]based\b)
    | \bI(?:'m|\s+am)\s+(?:just\s+|only\s+)?an?\s+(?:AI|(?:large\s+)?language\s+model|text[- ]based)\b
    | \b(?:I\s+(?:can(?:no|')t|can\s+not|(?:am\s+|was\s+)?(?:unable|not\s+able)\s+to|(?:won't|will\s+not)\s+be\s+able\s+to|(?:do\s+not|don't)\s+have\s+the\s+ability\s+to)|I'm\s+(?:unable|not\s+able)\s+to)\s+
      (?:actually\s+|directly\s+|really\s+)?
      (?: (?:assist|help|provide|answer|fulfill?|comply|analy[sz]e|describe|process|generate|create|continue)\b
        | (?:see|view|access|look\s+at|open)\s+(?:\w+\s+){0,2}(?:images?|photos?|photographs?|pictures?|files?|visuals?|what)\b )
    | \bI\s+(?:do\s+not|don't)\s+(?:have\s+(?:\w+\s+)?access|(?:actually\s+)?see\s+(?:an|any|the)\s+(?:image|photo|picture))
    | \b(?:not\s+|im)possible\s+for\s+me\s+to\b
    | \bplease\s+(?:provide|upload|attach|share)\s+(?:\w+\s+){0,2}(?:image|photo|picture|captions?|description)\b
    | \b(?:can|could)\s+you\s+(?:please\s+)?(?:provide|upload|attach|share)\b
    | \bwithout\s+(?:seeing|access\s+to|being\s+able\s+to\s+(?:see|view))\s+(?:the|an|your)\s+(?:\w+\s+)?(?:image|photo|picture)\b
    | \bI\s+(?:need|would\s+need|require)\s+more\s+(?:information|context|details)\b
    | \bno\s+(?:image|photo|picture)\s+(?:was|has\s+been|is)\s+(?:provided|attached|given|uploaded)\b
    | \b(?:image|photo|picture)\s+(?:was\s+not|wasn't|is\s+not|isn't|has\s+not\s+been)\s+(?:provided|attached|given|uploaded)\b
    """,
    re.IGNORECASE | re.VERBOSE,
)

REFUSAL_WORDS = (
    "sorry|afraid|apolog| ai|artificial|language model|text-based|text based|i can|i am |i'm |i was |i do|i won't|i will |"
    "i need|i would |i require|for me|please|can you|could you|without|unable|not able|provided|attached|given|uploaded"
).split("|")
"""Each alternative of `REFUSAL` contains one of these."""

QUOTED = re.compile(
    r"""(?<=[\w:,]\ )(?: '(?:[^'\n]|(?<=\w)'(?=\w)){1,80}'(?!\w) | ["“][^"”\n]{1,80}["”] )""", re.VERBOSE
)
"""What a sign, a card or a speech bubble says, after the words that introduce it."""


def refusal_in(text: str) -> str | None:
    """The words by which a text refuses to answer, or `None`. What it quotes does not count: a sign may say it."""
    text = QUOTED.sub("", text.replace("’", "'"))
    lower = " ".join(text.lower().split())
    found = REFUSAL.search(text) if any(word in lower for word in REFUSAL_WORDS) else None
    return found[0] if found else None


def mention_of_source(text: str) -> str | None:
    """The words by which a text mentions captions, boxes or coordinates, or `None`. A box may be in the image."""
    lower = text.lower()
    found = SOURCE.search(text.replace("’", "'")) if any(word in lower for word in SOURCE_WORDS) else None
    return " ".join(found[0].split()) if found else None


WORD = re.compile(r"[^\W_]+(?:['’-][^\W_]+)*")
DENSE = re.compile("[\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff\u0e00-\u0e7f]")
"""Scripts that are written without spaces: Japanese, Chinese, Thai."""


def count_words(text: str) -> int:
    """Words of a text; in scripts without spaces, two characters count as one."""
    dense = len(DENSE.findall(text))
    return len(WORD.findall(DENSE.sub(" ", text))) + (dense + 1) // 2


def normalise(text: str) -> str:
    """A text without case, accents, punctuation and runs of space, to compare questions and answers."""
    text = text.casefold()
    if not text.isascii():
        text = "".join(c for c in unicodedata.normalize("NFKD", text) if not unicodedata.combining(c))
    return " ".join(WORD.findall(text))


PLACE_WORDS = frozenset("of in on at to for from by with as".split())
"""What an answer to "Where …?" may consist of."""
WHERE = re.compile(r"\b(?:where|position(?:ed)?|located|location|placed|relation|relative)\b", re.IGNORECASE)
# Words that carry no content of their own when an answer is compared with its question.
FUNCTION_WORDS = frozenset(
    """a an the this that these those it its there here is are was were be been being am do does did has have had can could
    may might must shall should will would what which who whom whose where when why how of in on at to for from by with as and
    but if than then so very just also some any they them their he she his her him we you your i my me us our not image
    photo picture scene shown visible seen see color colour kind type""".split()
)
YES_NO = re.compile(r"^\W*(?:yes|no|not|none|nobody|nothing|it is not|there (?:is|are) no)\b", re.IGNORECASE)
YES_NO_QUESTION = re.compile(
    r"^\W*(?:is|are|was|were|do|does|did|has|have|had|can|could|will|would|should|may|might)\b", re.IGNORECASE
)


def gives_answer_away(question: str, answer: str) -> bool:
    """Whether an answer has no word that is not in its question ("What color is the red hydrant?" – "The hydrant is red.").

    Questions to be answered by yes or no, and those that offer a choice, contain their answer by nature.
    """
    if YES_NO.match(answer) or YES_NO_QUESTION.match(question) or re.search(r"\bor\b", question, re.IGNORECASE):
        return False
    asked = set(normalise(question).replace("in relation to", "").split())
    empty = FUNCTION_WORDS - PLACE_WORDS if WHERE.search(question) else FUNCTION_WORDS
    said = set(normalise(answer).split()) - empty
    return bool(said) and said <= asked


SCRIPTS: dict[str, tuple[str, ...]] = {
    "ar": ("ARABIC",),
    "el": ("GREEK",),
    "he": ("HEBREW",),
    "hi": ("DEVANAGARI",),
    "ja": ("HIRAGANA", "KATAKANA", "CJK"),
    "ko": ("HANGUL",),
    "ru": ("CYRILLIC",),
    "th": ("THAI",),
    "uk": ("CYRILLIC",),
    "zh": ("CJK",),
}
"""First words of the Unicode names of the letters of a language; those not listed are written in Latin letters."""

COMMON_WORDS: dict[str, frozenset[str]] = {
    code: frozenset(words.split())
    for code, words in {
        "de": "der die das und ist in den von zu mit sich auf für nicht ein eine einen einem es im dem auch als an sind wie "
        "dass oder wird aus er sie bei nach um am man was hat",
        "en": "the of and to in is are was a an it that on with as for this at by from be there his her their what which "
        "who how or not have has one two they its can near while into of some other",
        "es": "el la los las de que y en un una es se no por con para su al lo del como más está son qué hay o sobre pero "
        "esta este muy también a mientras entre cuando desde",
        "fr": "le la les de des et est un une dans en du que qui il elle sur pour au avec ce ne pas par son sa ses sont plus "
        "aux cette ou quel quelle être à l d lui leur même comme pendant près entre",
        "it": "il lo la gli le di e che in un una è per con del della dei non si su da al sono come più anche cosa nel nella "
        "questo questa ci",
        "nl": "de het een en van is in op te dat die met voor niet zijn aan er om ook als bij door naar wat maar uit hun zich "
        "deze wordt",
        "pl": "w i na się z do nie jest to że o jak co po dla od za przez ale są oraz czy tym jego jej być który która",
        "pt": "o a os as de que e em um uma é do da no na para com não se por mais dos das ao como são está seu sua ou qual "
        "pelo",
        "sv": "och att det i en på är som för av med den till inte har de ett om vid man kan från också hur vad eller sig",
        "tr": "ve bir bu da de için ile olarak çok daha olan gibi ne var en o mi ise kadar sonra ya",
    }.items()
}

LANGUAGES = tuple(sorted({*SCRIPTS, *COMMON_WORDS}))


def looks_like(text: str, language: str) -> bool:
    """Whether a text may be in a language (a code out of `LANGUAGES`); in doubt, yes. ValueError for another language."""
    if language not in LANGUAGES:
        raise ValueError(
            f"'{language}' cannot be recognised; these languages can: {', '.join(LANGUAGES)}. 'any' accepts all replies."
        )
    letters = Counter(text)
    names = {letter: unicodedata.name(letter, "") for letter in letters if letter.isalpha()}
    total = sum(letters[letter] for letter in names)
    if not total:
        return True
    scripts = SCRIPTS.get(language, ("LATIN",))
    if sum(letters[letter] for letter, name in names.items() if name.startswith(scripts)) < 0.6 * total:
        return False
    kana = any(name.startswith(("HIRAGANA", "KATAKANA")) for name in names.values())
    if language == "zh" and kana:
        return False
    if language == "ja" and total >= 20:
        return kana
    words = Counter(re.findall(r"[^\W\d_]+", text.casefold()))
    if language not in COMMON_WORDS or words.total() < 8:  # the script alone decides
        return True
    shares = {code: sum(words[word] for word in words.keys() & common) for code, common in COMMON_WORDS.items()}
    # Ties and texts of names and nouns only pass: what is to be caught is a reply in another language.
    return shares[language] >= 0.9 * max(shares.values())


def validate(text: str, kind: str, settings: ValidationSettings, finish_reason: str = "stop") -> list[Turn]:
    """The turns of a reply of a type (`kind`); `finish_reason` is the endpoint's, `"length"` for a reply that is cut.

    Raises:
        Rejection: with the first reason, in the order of `REASONS`.
    """
    if finish_reason == "content_filter":
        raise Rejection("filtered")
    bare = unwrap(text)
    if not bare:
        raise Rejection("cut" if finish_reason == "length" else "no_parse" if text.strip() else "empty")
    try:
        turns = parse_description(text) if kind == "detail" else parse_turns(text)
    except Rejection as rejection:
        # A reply that is not in the form because it refuses, or because it was cut, is rejected as that.
        if rejection.reason == "no_parse" and (refused := refusal_in(bare)):
            raise Rejection("refusal", refused) from None
        if finish_reason == "length":
            raise Rejection("cut") from None
        raise
    if finish_reason == "length":
        raise Rejection("cut")
    for turn in turns:
        for part in turn:
            if ("<" in part or "[" in part) and (found := MARKER.search(part)):
                raise Rejection("image_marker", found[0])
            if found := mention_of_source(part):
                raise Rejection("mentions_source", found)
    for _, answer in turns:  # a question may well be "Can you provide …?"
        if refused := refusal_in(answer):
            raise Rejection("refusal", refused)
    if settings.language and not looks_like("\n".join(part for turn in turns for part in turn), settings.language):
        raise Rejection("wrong_language", settings.language)
    found = [(count_words(answer), settings.answer_words[kind], "words in an answer") for _, answer in turns]
    found += [(count_words(asked), settings.question_words, "words in a question") for asked, _ in turns if asked]
    found.append((len(turns), settings.turns[kind], "pairs of question and answer"))
    for number, (least, most), what in found:
        if number < least:
            raise Rejection("too_short", f"{number} {what}, at least {least}")
        if number > most:
            raise Rejection("too_long", f"{number} {what}, at most {most}")
    seen = set()
    for question, answer in turns:
        if not question:
            continue
        if normalise(question) in seen:
            raise Rejection("duplicate_questions", question)
        seen.add(normalise(question))
        if gives_answer_away(question, answer):
            raise Rejection("gives_answer_away", question)
    return turns
