"""A small world of stories with known facts, a teacher that writes notes about them, and a corpus of both.

A story has seven facts (`FACT_KINDS`). Nearly all of its words follow from them: the weather decides the sky, the
ground and the clothes, the mood every verb of people and animals, setting and goal together what is found. What a
sentence turns to next is open, and whatever it is, the facts decide the word. A language model has to expect all of
these words at once, so that ordinary next-word prediction makes it keep the facts in mind.

    story = generate(1, seed=0)[0]
    story.text                 "Anna lived in forests. Rain poured. Anna felt sad. Foxes waited near caves. ..."
    story.facts["weather"]     "rain";  story.known["weather"]  characters of the text after which it is known
    note(story, 60, rng)       'In forests. About Anna. There is rain. Last "waited". Next: place.'
    stated(text)               {"weather": {"rain"}, ...}: what an explanation claims, its quotations left out

Text formats of the corpus (`corpus`): a story; `reading`: a prefix in <concept> tags, then its note in <explanation>
tags, as an AV writes; `retelling`: a note in <text> tags, then <summary> and how the story goes on, as an AR reads.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import numpy as np

from nla_jax.errors import InputError
from nla_jax.tools.world_words import (
    CLAUSES,
    COLUMNS,
    GOALS,
    INTRODUCTION,
    MOODS,
    NAMES,
    NEXT,
    OBJECTS,
    OPENING,
    PREDICATES,
    SENTENCES,
    SETTINGS,
    SUBJECTS,
    TELLS,
    VALUES,
    WEATHER,
    WEATHER_SHARE,
    WEATHERS,
)

FACT_KINDS = ("setting", "name", "weather", "mood", "goal", "place", "animal")
CLAUSE_RATES = {"fact": 0.8, "quote": 0.5, "next": 0.4, "now": 0.3}  # how often the teacher writes each
WRONG_RATE = 0.05  # of the facts that a note states

_QUOTED = re.compile(r"\"[^\"]*\"|“[^”]*”|'[^']*'")
_WORD = re.compile(r"[A-Za-z]+")

_KIND_OF = {value.lower(): (kind, value) for kind, values in VALUES.items() for value in values}


@dataclass(frozen=True)
class Word:
    """A word or full stop of a story: its end in the text, the field or fixed word it is, its sentence's subject, and
    whether the sentence has a verb before it."""

    text: str
    end: int
    field: str
    subject: str
    after_verb: bool


@dataclass(frozen=True)
class Story:
    """Facts (kind -> value), and the sentences in the order they are told, with their {fields}. The rest follows."""

    facts: Mapping[str, str]
    plan: tuple[str, ...]

    @cached_property
    def words(self) -> tuple[Word, ...]:
        fields, at = _fields(self.facts), 0
        out: list[Word] = []
        for sentence in self.plan:
            pieces = sentence.split()
            subject = next(p for p in pieces if p in ("{name}", "{animal}", "{people}", "{weather}")).strip("{}")
            verb = pieces.index("{" + subject + "}")
            for i, piece in enumerate(pieces):
                field = piece.strip("{}")
                text = fields[field] if piece[0] == "{" else piece
                text = text[0].upper() + text[1:] if i == 0 else text
                at += len(text) + (1 if out and text != "." else 0)
                out.append(Word(text, at, field, subject, i > verb))
        return tuple(out)

    @cached_property
    def text(self) -> str:
        return "".join(w.text if w.text == "." or not i else f" {w.text}" for i, w in enumerate(self.words))

    @cached_property
    def known(self) -> dict[str, int]:
        """Kind -> number of characters of the text after which the fact is told or follows; kinds never told are
        not there."""
        out: dict[str, int] = {}
        for word in self.words:
            for kind in TELLS.get(word.field, ()):
                out.setdefault(kind, word.end)
        return out

    def to_json(self) -> dict[str, Any]:
        return {"facts": dict(self.facts), "known": self.known, "plan": list(self.plan)}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Story:
        return cls(dict(value["facts"]), tuple(value["plan"]))


def _fields(facts: Mapping[str, str]) -> dict[str, str]:
    people, _, _, things = SETTINGS[facts["setting"]]
    out = {**facts, "people": people, "thing": things.split()[list(GOALS).index(facts["goal"])]}
    for kind, (table, columns) in COLUMNS.items():
        out.update(zip(columns, table[facts[kind]].split(), strict=True))
    return out


def generate(n: int, seed: int) -> list[Story]:
    """`n` stories, always the same for a seed; the first stories do not depend on `n`."""
    rng = np.random.default_rng([seed, 1])
    return [_story(rng) for _ in range(n)]


def _story(rng: np.random.Generator) -> Story:
    u = rng.random(11 + 4 * SENTENCES)
    setting = VALUES["setting"][int(u[0] * len(SETTINGS))]
    facts = {
        "setting": setting,
        "name": NAMES[int(u[1] * len(NAMES))],
        "weather": VALUES["weather"][int(u[2] * len(WEATHER))],
        "mood": VALUES["mood"][int(u[3] * len(MOODS))],
        "goal": VALUES["goal"][int(u[4] * len(GOALS))],
        "place": SETTINGS[setting][1].split()[int(u[5] * 2)],
        "animal": SETTINGS[setting][2].split()[int(u[6] * 2)],
    }
    plan = [OPENING, *(INTRODUCTION[i] for i in np.argsort(u[7:11]))]
    plan += [_sentence(*map(float, v)) for v in u[11:].reshape(-1, 4)]
    return Story(facts, tuple(dict.fromkeys(plan)))  # nothing is told twice


def _sentence(form: float, subject: float, predicate: float, thing: float) -> str:
    who = "{weather}"
    if form < WEATHER_SHARE:
        text = _pick(WEATHERS, predicate)
    else:
        who = _pick(SUBJECTS, subject)
        text = f"{who} {_pick(PREDICATES, predicate)}"
    what = _pick(OBJECTS, thing)
    if what.split()[-1] in who:  # nobody meets himself
        what = "{place}"
    return text.replace("OBJECT", what) + " ."


@cache
def _table(weights: tuple[tuple[str, int], ...]) -> tuple[str, ...]:
    return tuple(text for text, n in weights for _ in range(n))


def _pick(weights: Mapping[str, int], u: float) -> str:
    texts = _table(tuple(weights.items()))
    return texts[int(u * len(texts))]


# -- the teacher -------------------------------------------------------------------------------------------------------


def note(story: Story, upto_char: int, rng: np.random.Generator) -> str:
    """What a teacher writes who sees the first `upto_char` characters of a story: short clauses, each with its stop.

    Facts told so far, the last word in quotation marks (after "Ended" where its sentence is over), what kind of word is
    next, and what the sentence is about, each at its rate in `CLAUSE_RATES`. A fact is wrong at
    WRONG_RATE. InputError if the prefix holds no whole word.
    """
    n = sum(word.end <= upto_char for word in story.words)
    if not n:
        raise InputError("a note on a story", expected="at least its first word", got=f"{upto_char} characters")
    clauses = []
    for kind in FACT_KINDS:
        told = story.known.get(kind, upto_char + 1) <= upto_char
        include, wrong, other = rng.random(3)
        if told and include < CLAUSE_RATES["fact"]:
            value = story.facts[kind]
            if wrong < WRONG_RATE:
                others = [v for v in VALUES[kind] if v != value]
                value = others[int(other * len(others))]
            clauses.append(CLAUSES[kind].format(value))
    quote, following, now = rng.random(3)
    last = story.words[n - 1]
    if quote < CLAUSE_RATES["quote"] or not clauses:
        clauses.append(f'Ended "{story.words[n - 2].text}".' if last.text == "." else f'Last "{last.text}".')
    if following < CLAUSE_RATES["next"]:
        clauses.append(f"Next: {next_label(story, n)}.")
    if now < CLAUSE_RATES["now"]:
        clauses.append(f"Now: {last.subject}.")
    return " ".join(clauses)


def next_label(story: Story, n: int) -> str:
    """What kind of word comes after the first `n` words, as far as they decide it."""
    last = story.words[n - 1]
    if last.field in FACT_KINDS + ("people",) and last.after_verb and last.field != "mood":
        return "stop"
    return NEXT.get(last.field, "stop")


def last_word(prefix: str) -> str:
    """The word that a prefix of a story ends with, full stops not counted; "" if it has none."""
    found = _WORD.findall(prefix)
    return found[-1] if found else ""


def stated(text: str) -> dict[str, set[str]]:
    """Kind -> the values that an explanation states. Words are of one kind each; quotations state nothing."""
    out: dict[str, set[str]] = {}
    for word in _WORD.findall(_QUOTED.sub(" ", text)):
        if word.lower() in _KIND_OF:
            kind, value = _KIND_OF[word.lower()]
            out.setdefault(kind, set()).add(value)
    return out


# -- corpora and files -------------------------------------------------------------------------------------------------

CORPUS_SHARES = {"story": 0.6, "reading": 0.25, "retelling": 0.15}


def corpus(n: int, seed: int) -> Iterator[str]:
    """`n` documents to pre-train a language model on, in the shares of CORPUS_SHARES and formats of the module."""
    rng = np.random.default_rng([seed, 2])
    for _ in range(n):
        story, form = _story(rng), rng.random()
        if form < CORPUS_SHARES["story"]:
            yield story.text
            continue
        cut = story.words[int(rng.integers(2, len(story.words) - 1))].end
        text = note(story, cut, rng)
        if form < CORPUS_SHARES["story"] + CORPUS_SHARES["reading"]:
            yield f"<concept>{story.text[:cut]}</concept><explanation>\n{text}\n</explanation>"
        else:
            yield f"<text> {text}</text><summary>{story.text[cut:]}"


def write_world(out: Path, seed: int, n_stories: int, n_lm: int) -> None:
    """Writes `out`/stories.jsonl (id, text), facts.jsonl (id, facts, known, plan), lm.jsonl (text) and tokenizer/."""
    from nla_jax.tools.world_tokenizer import write_world_tokenizer

    out.mkdir(parents=True, exist_ok=True)
    named = [(f"story-{seed}-{i:06d}", story) for i, story in enumerate(generate(n_stories, seed))]
    _write_lines(out / "stories.jsonl", ({"id": name, "text": story.text} for name, story in named))
    _write_lines(out / "facts.jsonl", ({"id": name, **story.to_json()} for name, story in named))
    _write_lines(out / "lm.jsonl", ({"text": text} for text in corpus(n_lm, seed)))
    write_world_tokenizer(out / "tokenizer")


def read_facts(path: Path) -> dict[str, Story]:
    """The stories of a facts.jsonl by their ids."""
    with path.open(encoding="utf-8") as file:
        return {value["id"]: Story.from_json(value) for value in map(json.loads, file)}


def write_notes(store: Any, facts_file: Path, out: Path, seed: int) -> int:
    """Writes the teacher's note for each row of an extracted store, as `nla teach STORE file:OUT` reads them.

    The store's documents are stories of `facts_file` by their ids; returns how many notes were written. Rows that end
    before the first word get none. InputError for a document that is no such story.
    """
    stories, written = read_facts(facts_file), 0

    def lines() -> Iterator[dict[str, Any]]:
        nonlocal written
        for start in range(0, store.n_rows, 4096):
            table = store.table(slice(start, start + 4096))
            ids = store.doc_ids(table["doc"])
            for i, name in enumerate(ids):
                if name not in stories:
                    raise InputError(f"document {name!r} of {store.path}", expected=f"a story of {facts_file}")
                end, position = int(table["text_end"][i]), int(table["position"][i])
                if end >= stories[name].words[0].end:
                    # By document and position: the rows of other layers at the same place get the same note.
                    key = [seed, 3, int(table["doc"][i]), position]
                    text = note(stories[name], end, np.random.default_rng(key))
                    written += 1
                    yield {"doc_id": name, "position": position, "explanation": text}

    _write_lines(out, lines())
    return written


def _write_lines(path: Path, values: Iterable[Mapping[str, Any]]) -> None:
    with path.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(value, ensure_ascii=False) + "\n" for value in values)
