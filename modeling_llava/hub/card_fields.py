"""Fields of a card for which the Hub has a list of values; it rejects others after the repository was created."""

import difflib
import re


LICENSES = frozenset(
    "apache-2.0 mit openrail bigscience-openrail-m creativeml-openrail-m bigscience-bloom-rail-1.0 bigcode-openrail-m afl-3.0 "
    "artistic-2.0 bsl-1.0 bsd bsd-2-clause bsd-3-clause bsd-3-clause-clear c-uda cc cc0-1.0 cc-by-2.0 cc-by-2.5 cc-by-3.0 "
    "cc-by-4.0 cc-by-sa-3.0 cc-by-sa-4.0 cc-by-nc-2.0 cc-by-nc-3.0 cc-by-nc-4.0 cc-by-nd-4.0 cc-by-nc-nd-3.0 "
    "cc-by-nc-nd-4.0 cc-by-nc-sa-2.0 cc-by-nc-sa-3.0 cc-by-nc-sa-4.0 cdla-sharing-1.0 cdla-permissive-1.0 "
    "cdla-permissive-2.0 wtfpl ecl-2.0 epl-1.0 epl-2.0 etalab-2.0 eupl-1.1 eupl-1.2 agpl-3.0 gfdl gpl gpl-2.0 gpl-3.0 lgpl "
    "lgpl-2.1 lgpl-3.0 isc h-research intel-research lppl-1.3c ms-pl apple-ascl apple-amlr mpl-2.0 odc-by odbl openmdw-1.0 "
    "openmdw-1.1 openrail++ osl-3.0 postgresql ofl-1.1 ncsa unlicense zlib pddl lgpl-lr deepfloyd-if-license "
    "fair-noncommercial-research-license llama2 llama3 llama3.1 llama3.2 llama3.3 llama4 grok2-community gemma unknown "
    "other".split()
)
"""https://huggingface.co/docs/hub/repositories-licenses"""

LANGUAGES = frozenset(
    "aa ab ae af ak am an ar as av ay az ba be bg bi bm bn bo br bs ca ce ch co cr cs cu cv cy da de dv dz ee el en eo es et "
    "eu fa ff fi fj fo fr fy ga gd gl gn gu gv ha he hi ho hr ht hu hy hz ia id ie ig ii ik io is it iu ja jv ka kg ki kj kk "
    "kl km kn ko kr ks ku kv kw ky la lb lg li ln lo lt lu lv mg mh mi mk ml mn mr ms mt my na nb nd ne ng nl nn no nr nv ny "
    "oc oj om or os pa pi pl ps pt qu rm rn ro ru rw sa sc sd se sg si sk sl sm sn so sq sr ss st su sv sw ta te tg th ti tk "
    "tl tn to tr ts tt tw ty ug uk ur uz ve vi vo wa wo xh yi yo za zh zu code multilingual".split()
)
"""ISO 639-1, and the Hub's own two. Of ISO 639-2 and 639-3, any three lower-case letters are taken."""


def check_card_fields(license: str | list[str] | None, language: str | list[str] | None, where: str = "") -> None:
    """
    Raises:
        ValueError: the Hub does not know one of them; names similar ones. `where` is the file they come from, by default
            the options of `llava publish`.
    """
    for value in _values(license):
        if value not in LICENSES:
            simple = re.sub(r"\b(?:the|licen[cs]e|version)\b", "", value.lower())
            simple = re.sub(r"[\s_-]+", "-", re.sub(r"\bv\.?(?=\d)", "", simple)).strip("-")
            close = [simple] if simple in LICENSES else difflib.get_close_matches(simple, LICENSES, 3, 0.5)
            raise ValueError(
                f"{where or '--license'} {value!r} is not an identifier of a license on the Hub"
                f"{': is it ' + ' or '.join(close) + '?' if close else '.'} A license without one is other."
            )
    for value in _values(language):
        if value not in LANGUAGES and not re.fullmatch(r"[a-z]{3}", value):
            from transformers.models.whisper.tokenization_whisper import TO_LANGUAGE_CODE

            first = re.split(r"[-_,\s]", value.lower())[0]
            code = TO_LANGUAGE_CODE.get(value.lower(), first if first in LANGUAGES else None)
            raise ValueError(
                f"{where or '--language'} {value!r} is not the ISO 639 code of a language"
                f"{f': is it {code}?' if code else ', such as en.'} For several languages: multilingual."
            )


def _values(value: str | list[str] | None) -> list[str]:
    return [str(one) for one in (value if isinstance(value, list) else [] if value is None else [value])]
