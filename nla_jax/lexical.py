"""A teacher that needs no model: 2 or 3 short features of a text prefix by fixed rules, mostly for English.

It counts words, keeps track of what is open, and looks at how the text ends; the same prefix always gets the same
words. What it writes is what a reader could check against the text, in under 100 words, in sentences whose form
recurs, which a small AV learns quickly. `VERSION` changes with any change to what is written.
"""

from __future__ import annotations

import re
from collections import Counter

from nla_jax import lexical_words as words
from nla_jax.lexical_ending import ending, shortened
from nla_jax.lexical_structure import open_structure, sentence_state

VERSION = 1
_TAIL = 2000  # characters that are read: what is further back hardly shapes the end
_MOST_WORDS = 99
_WORD = re.compile(r"[^\W\d_]+(?:['\u2019-][^\W\d_]+)*")
_HAN = re.compile(r"[\u3400-\u9fff]{2,}|[\u30a0-\u30ff]{2,}")
_SCRIPTS = (
    ("Chinese", re.compile(r"[\u4e00-\u9fff]")),
    ("Japanese", re.compile(r"[\u3040-\u30ff]")),
    ("Korean", re.compile(r"[\uac00-\ud7af]")),
    ("Cyrillic", re.compile(r"[\u0400-\u04ff]")),
    ("Arabic", re.compile(r"[\u0600-\u06ff]")),
    ("Greek", re.compile(r"[\u0370-\u03ff]")),
    ("Hebrew", re.compile(r"[\u0590-\u05ff]")),
    ("Devanagari", re.compile(r"[\u0900-\u097f]")),
    ("Thai", re.compile(r"[\u0e00-\u0e7f]")),
)
_TURN = re.compile(
    r"(?:<\|im_start\|>|<start_of_turn>|<\|start_header_id\|>|<\|)(system|user|assistant|model|tool)\b"
    r"|^(User|Human|Assistant|System|Q|A)\s*:|(\[INST\])|(\[/INST\])",
    re.MULTILINE,
)
_CODE = re.compile(
    r"[{};=<>()\[\]]|^\s*(?:def|class|import|from|return|if|for|while|const|let|var|public|#include)\b", re.M
)
_CODE_LINE = re.compile(
    r"^\s*(?:def \w+\(|class \w+[:({]|import \w|from \w[\w.]* import |return\b.*[;)\w]$|#include|public |private |"
    r"const |let \w+ =|var \w|function\b.*\(|if .*:$|for .*:$|[\w.\[\]]+ [-+*/]?= \S|[\w.]+\(.*\);?$|"
    r".*[;{}\[\]],?\s*$|\{?\"[\w-]+\":|//|@\w+)"
)
_SPEAKER = re.compile(r"^([A-Z][\w .'\u2019-]{0,40}):\s*$", re.MULTILINE)
_SPEECH = re.compile(r"[\"\u201c\u201d]")
_UNSHOWN = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]")
_OWN_TAGS = re.compile(r"</?explanation>", re.IGNORECASE)
_TAGS = re.compile(r"</?[a-zA-Z][^<>]*>")
_LISTED = re.compile(r"\s*(?:[-*\u2022]|\d+[.)])\s")
_ENDS = re.compile(r"[.!?]\s+|\n")
_SAID = re.compile(r"\b(said|asked|replied|says)\b")


def describe(prefix: str) -> str:
    """Features of a text prefix, separated by an empty line, in under 100 words."""
    tail = prefix[-_TAIL:]
    if len(prefix) > _TAIL:
        tail = tail.partition(" ")[2] or tail  # not from the middle of a word
    # What cannot be quoted: characters that no page shows, and the tags that an explanation stands between.
    tail = _UNSHOWN.sub(" ", tail)
    if "explanation>" in tail.lower():
        tail = _OWN_TAGS.sub("explanation", tail)
    found = _WORD.findall(tail.replace("\u2019", "'"))
    lower = [word.lower() for word in found]
    script = _script(tail[-300:])
    features = [
        _about(tail, found, lower, script),
        open_structure(tail) + " " + sentence_state(tail),
        ending(tail),
    ]
    return _fitted(features)


# -- what it is and what it is about ----------------------------------------------------------------------------------


def _about(tail: str, found: list[str], lower: list[str], script: str | None) -> str:
    kind = _register(tail, lower, script)
    topics = _pairs(tail) if script in ("Chinese", "Japanese") else _topics(tail, found, lower)
    sentence = kind[0].upper() + kind[1:]
    if not topics:
        return f"{sentence}, with no topic words yet."
    names = [f"{word} ({count} times)" if count > 1 else word for word, count in topics]
    text = f"{sentence}, about {_listed(names)}."
    latest = None if script is not None else _latest(found, lower)
    if latest and latest.lower() != topics[0][0].lower():
        text += f" The latest topic word is {latest}."
    return text


def _topics(tail: str, found: list[str], lower: list[str], most: int = 4) -> list[tuple[str, int]]:
    """The content words that weigh most, with their counts: frequent, recent, long and capitalised ones do."""
    n = len(lower)
    weight: dict[str, float] = {}
    for i, word in enumerate(lower):
        if len(word) > 2 and word not in words.STOP:
            # The last words count about four times as much as those 200 words back.
            weight[word] = weight.get(word, 0.0) + 1.0 / (0.6 + (n - i) / 100.0)
    counts = Counter(lower)
    shown: dict[str, str] = {}
    for original, word in zip(found, lower, strict=True):
        # A name keeps its capital; a word that also occurs without one was only the first of a sentence.
        if word in weight and (word not in shown or original == word):
            shown[word] = original
    ranked = sorted(weight, key=lambda w: (-weight[w] * min(len(w), 9) * (1.3 if shown[w][0].isupper() else 1.0), w))
    return [(shortened(shown[word], 24), counts[word]) for word in ranked[:most]]


def _pairs(tail: str, most: int = 4) -> list[tuple[str, int]]:
    """The most frequent pairs of characters of a script that writes no spaces, the later ones first."""
    pairs = Counter(run[i : i + 2] for run in reversed(_HAN.findall(tail)) for i in range(len(run) - 1))
    return pairs.most_common(most)  # in the order of their first count where counts are equal


def _latest(found: list[str], lower: list[str]) -> str | None:
    for original, word in zip(reversed(found[-40:]), reversed(lower[-40:]), strict=True):
        if len(word) > 2 and word not in words.STOP:
            return shortened(original, 24)
    return None


def _script(text: str) -> str | None:
    """The script of a text when most of its letters are not Latin."""
    if text.isascii():
        return None
    letters = sum(c.isalpha() for c in text)
    best, most = None, 0
    for name, pattern in _SCRIPTS:
        count = len(pattern.findall(text))
        # A Japanese text has kana among its Chinese characters.
        if count > most or (name == "Japanese" and count * 8 > letters):
            best, most = name, count
    return best if letters and most * 3 > letters else None


def _register(tail: str, lower: list[str], script: str | None) -> str:
    recent = tail[-1200:]
    lines = [line for line in recent.split("\n") if line.strip()]
    last = set(lower[-200:])
    form = _form(recent, lines)
    if script is not None:
        return (
            f"{form} in {script} script" if script not in ("Chinese", "Japanese", "Korean") else f"{form} in {script}"
        )
    if form == "code":
        return f"code{_code_kind(recent)}"
    recent_words = lower[-200:]
    language = _language(recent_words)
    if language is not None:
        return f"{form} in {language}"
    manner = _manner(recent, recent_words, last)
    person, tense = _person(recent_words), _tense(recent_words)
    article = "an" if manner[0] in "aeiou" else "a"
    detail = " and ".join(part for part in (person, tense) if part)
    return f"{article} {manner} {form}" + (f" in the {detail}" if detail else "")


def _form(recent: str, lines: list[str]) -> str:
    turns = [m for m in _TURN.finditer(recent)]
    if turns:
        turn = turns[-1]
        name = (turn[1] or turn[2] or ("user" if turn[3] else "assistant")).lower()
        name = {"human": "user", "q": "question", "a": "answer", "model": "assistant"}.get(name, name)
        return (
            f"chat in the {name}'s turn"
            if name not in ("question", "answer")
            else f"{name} in a list of questions and answers"
        )
    speakers = _SPEAKER.findall(recent)
    if len(speakers) >= 2:
        return f"play where {shortened(' '.join(speakers[-1].split()), 30)} speaks"
    coded = sum(1 for line in lines[-12:] if _CODE_LINE.match(line))
    if lines and coded * 2 > len(lines[-12:]) and len(_CODE.findall(recent)) * 25 > len(recent):
        return "code"
    if len(_TAGS.findall(recent)) >= 4:
        return "marked-up page"
    short = [line for line in lines[-8:] if len(line) < 64]
    if len(lines) >= 4 and len(short) == len(lines[-8:]):
        if all(_LISTED.match(line) for line in lines[-3:]):
            return "list"
        if sum(line.lstrip()[0].isupper() for line in short) * 4 >= len(short) * 3:
            return (
                "passage of verse"
                if sum(len(line.split()) >= 4 for line in short) * 2 > len(short)
                else "list of short lines"
            )
        return "text in short lines"
    if len(_SPEECH.findall(recent)) >= 4:
        return "story with spoken dialogue" if _SAID.search(recent) else "text with quotations"
    return "text"


def _code_kind(recent: str) -> str:
    kinds = (
        (" in Python", r"^\s*(?:def \w+\(|from \w[\w.]* import|import \w+$|class \w+.*:$|elif |self\.)"),
        (" in C or C++", r"^\s*#include|std::|\bint main\("),
        (" in JavaScript", r"\b(?:const|let) \w+ =|=>|function\s*\w*\(|console\."),
        (" in Java or C#", r"\b(?:public|private) (?:static |final )*(?:class|void|int|String)\b"),
        (" in SQL", r"\bSELECT\b.*\bFROM\b|\bCREATE TABLE\b"),
        (" in JSON", r"^\s*[\[{]?\s*\"[\w-]+\":"),
        (" in CSS", r"^[.#]?[\w-]+\s*\{\s*$|^\s*[\w-]+:\s[^;]+;$"),
    )
    return next((name for name, pattern in kinds if re.search(pattern, recent, re.MULTILINE)), "")


def _manner(recent: str, lower: list[str], last: set[str]) -> str:
    if len(last & words.ARCHAIC) >= 2:
        return "archaic"
    if last & words.CASUAL or recent.count("!") >= 3:
        return "casual"
    # The sentence in progress gives orders where it opens with one.
    opening = _ENDS.split(recent[-300:].rstrip())[-1].split()
    if opening and opening[0].lower().strip("\"'\u201c*-") in words.IMPERATIVES and len(opening) > 1:
        return "instructing"
    if recent.count("?") >= 2:
        return "questioning"
    contracted = sum("'" in word for word in lower)
    if lower and contracted * 40 > len(lower):
        return "conversational"
    long = sum(len(word) > 8 for word in lower)
    if len(lower) >= 6 and long * 6 > len(lower):
        return "formal"
    return "plain"


def _language(lower: list[str]) -> str | None:
    """A language other than English whose small words are the most frequent ones."""
    if len(lower) < 6:
        return None
    english = sum(word in words.STOP for word in lower)
    if english * 3 > len(lower):
        return None
    scores = {name: sum(word in small for word in lower) for name, small in words.LANGUAGES.items()}
    best = max(scores, key=lambda name: (scores[name], name))
    return best if scores[best] > english and scores[best] * 6 > len(lower) else None


def _person(lower: list[str]) -> str | None:
    recent = lower[-120:]
    counts = {
        "first person": sum(word in words.FIRST for word in recent),
        "second person": sum(word in words.SECOND for word in recent),
        "third person": sum(word in words.THIRD for word in recent),
    }
    best = max(counts, key=lambda name: counts[name])
    return best if counts[best] >= 1 else None


def _tense(lower: list[str]) -> str | None:
    recent = lower[-80:]
    counts = {
        "past tense": sum(w in words.PAST or (w.endswith("ed") and len(w) > 4) for w in recent) * 0.8,
        "present tense": float(sum(w in words.PRESENT for w in recent)),
        "future tense": float(sum(w in words.FUTURE for w in recent)),
    }
    best = max(counts, key=lambda name: counts[name])
    return best if counts[best] > 0 else None


# -- wording ----------------------------------------------------------------------------------------------------------


def _listed(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def _fitted(features: list[str]) -> str:
    """The features within the limit of words; whole sentences go from the middle one, then from the others."""
    order = (1, 0, 2)
    while sum(len(feature.split()) for feature in features) > _MOST_WORDS:
        for i in order:
            sentences = re.split(r"(?<=\.) (?=[A-Z])", features[i])
            if len(sentences) > 1:
                features[i] = " ".join(sentences[:-1])
                break
        else:
            break
    return "\n\n".join(features)
