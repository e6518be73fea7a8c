"""IFEval: instructions whose obedience a program can check, all 25 kinds of the published file.

A row is {"prompt", "instruction_id_list", "kwargs"}; a reply is scored *strict* (as it is) and *loose* (also without
its first line, its last line, both, and without asterisks: what chat models wrap around what was asked). Prompt level:
every instruction of a prompt obeyed. Two checks are approximations: sentences are counted by their ends instead of by
NLTK, and a language is told by its script or its commonest words instead of by langdetect.

Source: Zhou et al., arXiv 2311.07911, section 2 and table 1.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

Settings = Mapping[str, Any]


def follows(reply: str, instructions: Sequence[str], settings: Sequence[Settings]) -> list[bool]:
    """Return for every instruction whether the reply obeys it, as it is (strict).

    Raises:
        KeyError: an instruction is not among the 25 of the paper.
    """
    return [
        bool(reply.strip()) and CHECKS[name](reply, {k: v for k, v in given.items() if v is not None})
        for name, given in zip(instructions, settings, strict=True)
    ]


def follows_loosely(reply: str, instructions: Sequence[str], settings: Sequence[Settings]) -> list[bool]:
    """Return for every instruction whether the reply, or one with its wrapping taken off, obeys it."""
    lines = reply.split("\n")
    cut = [reply, "\n".join(lines[1:]).strip(), "\n".join(lines[:-1]).strip(), "\n".join(lines[1:-1]).strip()]
    variants = [*cut, *(text.replace("*", "") for text in cut)]
    found = [follows(text, instructions, settings) for text in variants]
    return [any(outcomes) for outcomes in zip(*found, strict=True)]


def _compare(count: int, relation: str, limit: int) -> bool:
    return count < limit if relation == "less than" else count >= limit


def _words(text: str) -> list[str]:
    return re.findall(r"\w+", text)


def _sentences(text: str) -> int:
    return len([part for part in re.split(r"(?<=[.!?])[\"')\]]*\s+|\n+", text.strip()) if part.strip()])


def _count(text: str, word: str) -> int:
    return len(re.findall(rf"\b{re.escape(word)}\b", text, re.IGNORECASE))


def _paragraphs(reply: str, s: Settings) -> bool:
    return len([p for p in re.split(r"\s?\*\*\*\s?", reply.strip()) if p.strip()]) == s["num_paragraphs"]


def _nth_paragraph(reply: str, s: Settings) -> bool:
    parts = [part for part in re.split(r"\n\n", reply) if part.strip()]
    if len(parts) != s["num_paragraphs"] or s["nth_paragraph"] > len(parts):
        return False
    first = re.match(r"['\"]*(\w+)", parts[s["nth_paragraph"] - 1].strip())
    return first is not None and first[1].lower() == s["first_word"].lower()


def _letter(reply: str, s: Settings) -> bool:
    count = reply.lower().count(s["letter"].lower())
    return _compare(count, s["let_relation"], s["let_frequency"])


def _highlights(reply: str, s: Settings) -> bool:
    marked = re.findall(r"\*\*[^\n*]+\*\*|\*[^\n*]+\*", reply)
    return sum(bool(text.strip("*").strip()) for text in marked) >= s["num_highlights"]


def _sections(reply: str, s: Settings) -> bool:
    parts = re.split(rf"\s?{re.escape(s['section_spliter'])}\s?\d+\s?", reply)
    return len(parts) - 1 >= s["num_sections"]


def _json(reply: str, s: Settings) -> bool:
    text = re.sub(r"^```(?:json)?\s*|\s*```$", "", reply.strip(), flags=re.IGNORECASE)
    try:
        json.loads(text)
    except ValueError:
        return False
    return True


def _postscript(reply: str, s: Settings) -> bool:
    marker = s["postscript_marker"].rstrip(".")
    spaced = r"\.?\s?".join(map(re.escape, marker.replace(".", "")))
    return re.search(rf"(?m)\s*{spaced}[\s.:]", reply, re.IGNORECASE) is not None


def _two_responses(reply: str, s: Settings) -> bool:
    parts = reply.split("******")
    inner = [part.strip() for i, part in enumerate(parts) if part.strip() or 0 < i < len(parts) - 1]
    return len(inner) == 2 and all(inner) and inner[0] != inner[1]


def _quoted(reply: str, s: Settings) -> bool:
    text = reply.strip()
    return len(text) > 1 and text[0] == text[-1] == '"'


def _ends(reply: str, s: Settings) -> bool:
    return reply.strip().strip('"').lower().endswith(s["end_phrase"].strip().lower())


def _capital_words(reply: str, s: Settings) -> bool:
    words = [word for word in re.findall(r"[\w']+", reply) if word.isupper()]
    return _compare(len(words), s["capital_relation"], s["capital_frequency"])


_SCRIPTS = {
    "ru": "Ѐ-ӿ", "bg": "Ѐ-ӿ", "uk": "Ѐ-ӿ", "ar": "؀-ۿ", "fa": "؀-ۿ", "ur": "؀-ۿ", "he": "֐-׿",
    "hi": "ऀ-ॿ", "mr": "ऀ-ॿ", "ne": "ऀ-ॿ", "bn": "ঀ-৿", "pa": "਀-੿", "gu": "઀-૿",
    "ta": "஀-௿", "te": "ఀ-౿", "kn": "ಀ-೿", "ml": "ഀ-ൿ", "th": "฀-๿", "ko": "가-힯",
    "ja": "぀-ヿ", "zh": "一-鿿", "el": "Ͱ-Ͽ",
}  # fmt: skip
_COMMON = {
    "en": "the and of to is in that", "de": "der die und das ist nicht ein zu", "fr": "le la les et est des une que",
    "es": "el la los y es que una por", "pt": "o os e uma que não para com", "it": "il la di che e un per non",
    "nl": "de het een en van is niet", "vi": "và của là có không một", "fi": "ja on ei että se oli",
    "sw": "na ya wa kwa ni katika", "pl": "i w nie na się jest", "sv": "och att det som en är inte",
    "tr": "ve bir bu için da",
}  # fmt: skip


def language_is(text: str, language: str) -> bool:
    """Guess whether `text` is in a language (ISO 639-1): by its script, or by which commonest words it has most of."""
    code = language.lower()[:2]
    letters = [letter for letter in text if letter.isalpha()]
    if code in _SCRIPTS:
        script = re.compile(f"[{_SCRIPTS[code]}]")
        return sum(bool(script.match(letter)) for letter in letters) > len(letters) / 2
    words = [word.lower() for word in _words(text)]
    hits = {name: sum(word in common.split() for word in words) for name, common in _COMMON.items()}
    return code in hits and hits[code] > 0 and hits[code] == max(hits.values())


def _constrained(reply: str, s: Settings) -> bool:
    return any(f"my answer is {word}." in reply.strip().lower() for word in ("yes", "no", "maybe"))


def _cased(reply: str, upper: bool) -> bool:
    return (reply.isupper() if upper else reply.islower()) and language_is(reply, "en")


CHECKS: dict[str, Callable[[str, Settings], bool]] = {
    "keywords:existence": lambda r, s: all(re.search(re.escape(w), r, re.IGNORECASE) for w in s["keywords"]),
    "keywords:frequency": lambda r, s: _compare(
        len(re.findall(re.escape(s["keyword"]), r, re.IGNORECASE)), s["relation"], s["frequency"]
    ),
    "keywords:forbidden_words": lambda r, s: not any(_count(r, word) for word in s["forbidden_words"]),
    "keywords:letter_frequency": _letter,
    "language:response_language": lambda r, s: language_is(r, s["language"]),
    "length_constraints:number_sentences": lambda r, s: _compare(
        _sentences(r), s["relation"], s["num_sentences"]
    ),
    "length_constraints:number_paragraphs": _paragraphs,
    "length_constraints:number_words": lambda r, s: _compare(len(_words(r)), s["relation"], s["num_words"]),
    "length_constraints:nth_paragraph_first_word": _nth_paragraph,
    "detectable_content:number_placeholders": lambda r, s: (
        len(re.findall(r"\[.*?\]", r)) >= s["num_placeholders"]
    ),
    "detectable_content:postscript": _postscript,
    "detectable_format:number_bullet_lists": lambda r, s: (
        len(re.findall(r"(?m)^\s*(?:\*[^*\n]|-)", r)) == s["num_bullets"]
    ),
    "detectable_format:constrained_response": _constrained,
    "detectable_format:number_highlighted_sections": _highlights,
    "detectable_format:multiple_sections": _sections,
    "detectable_format:json_format": _json,
    "detectable_format:title": lambda r, s: re.search(r"<<[^\n<>]*\S[^\n<>]*>>", r) is not None,
    "combination:two_responses": _two_responses,
    "combination:repeat_prompt": lambda r, s: (
        r.strip().lower().startswith(s["prompt_to_repeat"].strip().lower())
    ),
    "startend:end_checker": _ends,
    "startend:quotation": _quoted,
    "change_case:english_capital": lambda r, s: _cased(r, True),
    "change_case:english_lowercase": lambda r, s: _cased(r, False),
    "change_case:capital_word_frequency": _capital_words,
    "punctuation:no_comma": lambda r, s: "," not in r,
}
