"""Whether a reply is in a language, by its script and the language's commonest words."""

import re
import unicodedata
from collections import Counter


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
