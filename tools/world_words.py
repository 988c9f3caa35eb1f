"""The words of the story world and how they follow from its facts; the sentences that stories are made of."""

from __future__ import annotations

import re

NAMES = "Anna Ben Clara Felix Lena Max".split()
# setting: people; places; animals; what is found there for each goal, in the order of GOALS
SETTINGS = {
    "forests": ("hunters", "caves streams", "foxes deer", "nuts wood flowers herbs amber"),
    "harbours": ("sailors", "piers cliffs", "crabs gulls", "fish planks shells seaweed pearls"),
    "villages": ("farmers", "barns ponds", "cows hens", "eggs straw wool honey coins"),
    "cities": ("drivers", "markets towers", "cats dogs", "bread coal rings pills gems"),
    "deserts": ("traders", "wells dunes", "camels snakes", "dates thorns silk cactus gold"),
    "mountains": ("guides", "peaks huts", "goats bears", "cheese pine crystals roots silver"),
}
# One column for each field of the sentences below; the first is the fact itself.
WEATHER = {
    "rain": "poured soaked grey wet mud coats",
    "snow": "fell covered white cold ice hoods",
    "sun": "shone warmed blue warm dust hats",
    "wind": "blew shook wild dry leaves scarves",
    "fog": "hung veiled pale damp grass lamps",
}
MOODS = {
    "happy": "laughed skipped danced loved",
    "sad": "sighed trudged waited missed",
    "angry": "shouted marched growled chased",
    "afraid": "trembled crept hid feared",
    "calm": "smiled strolled slept watched",
}
GOALS = {
    "food": "baskets hungry",
    "fuel": "sacks chilly",
    "gifts": "boxes kind",
    "medicine": "jars sick",
    "goods": "chests poor",
}
COLUMNS = {
    "weather": (WEATHER, ("falls", "meets", "sky", "feel", "ground", "clothes")),
    "mood": (MOODS, ("sound", "move", "act", "love")),
    "goal": (GOALS, ("tool", "need")),
}
# Which facts a field tells: its word is another for every value.
TELLS = {
    **{field: ("setting",) for field in ("setting", "people")},
    **{field: ("setting", field) for field in ("place", "animal")},
    **{field: (kind,) for kind, (_, columns) in COLUMNS.items() for field in (kind, *columns)},
    "thing": ("setting", "goal"),
    "name": ("name",),
}
OPENING = "{name} lived in {setting} ."
INTRODUCTION = (
    "{weather} {falls} .",
    "{name} felt {mood} .",
    "{name} needed {goal} .",
    "{animal} {act} near {place} .",
)
SENTENCES = 9  # after those
# Parts that a sentence is made of, with their weights. OBJECT stands for one of OBJECTS.
SUBJECTS = {
    "{name}": 5,
    "{mood} {name}": 2,
    "{need} {name}": 2,
    "{animal}": 3,
    "{feel} {animal}": 2,
    "{people}": 2,
    "{mood} {people}": 1,
    "{need} {people}": 1,
}
PREDICATES = {
    "{love} OBJECT": 5,
    "saw OBJECT": 2,
    "{move} past OBJECT": 2,
    "{act} near OBJECT": 1,
    "{sound}": 1,
    "carried {tool}": 1,
    "found {thing}": 1,
    "wore {clothes}": 1,
}
WEATHERS = {"{weather} {meets} OBJECT": 1}  # a whole sentence, one in WEATHER_SHARE
WEATHER_SHARE = 0.15
OBJECTS = {
    "{place}": 4,
    "{feel} {place}": 1,
    "{animal}": 3,
    "{feel} {animal}": 1,
    "{setting}": 1,
    "{people}": 1,
    "{mood} {people}": 1,
    "{need} {people}": 1,
    "{name}": 2,
    "{weather}": 1,
    "{feel} {ground}": 1,
    "{ground}": 1,
    "{sky} skies": 1,
    "{thing}": 2,
    "{tool}": 2,
    "{goal}": 1,
    "{clothes}": 1,
}
CLAUSES = {
    "setting": "In {}.",
    "name": "About {}.",
    "weather": "There is {}.",
    "mood": "Feels {}.",
    "goal": "Needs {}.",
    "place": "Near {}.",
    "animal": "With {}.",
}
# What a note says comes next, by the field or word that the prefix ends with; "stop" after all others.
NEXT = {
    **dict.fromkeys(("name", "animal", "people", "weather"), "verb"),  # of a subject
    **dict.fromkeys(("near", "past", "saw", "love", "meets"), "object"),
    **dict.fromkeys(("move", "act"), "place"),
    "feel": "noun",
    "mood": "noun",
    "need": "noun",
    "sky": "skies",
    ".": "sentence",
    "carried": "tool",
    "found": "thing",
    "wore": "clothes",
    "needed": "goal",
    "felt": "mood",
    "lived": "place",
    "in": "setting",
}

VALUES: dict[str, tuple[str, ...]] = {
    "setting": tuple(SETTINGS),
    "name": tuple(NAMES),
    "weather": tuple(WEATHER),
    "mood": tuple(MOODS),
    "goal": tuple(GOALS),
    "place": tuple(w for s in SETTINGS.values() for w in s[1].split()),
    "animal": tuple(w for s in SETTINGS.values() for w in s[2].split()),
}


def vocabulary() -> dict[str, bool]:
    """Every word of stories and notes, as written there -> whether one can begin a text or line."""
    starts = [template.split()[0] for template in CLAUSES.values()] + ["Last", "Ended", "Next", "Now", *NAMES]
    places = [w for k, v in SETTINGS.items() for part in (k, *v) for w in part.split()]
    tables = [w for t in (WEATHER, MOODS, GOALS) for k, v in t.items() for w in (k, *v.split())]
    patterns = [OPENING, *INTRODUCTION, *PREDICATES, *WEATHERS, *OBJECTS]
    fixed = [w for p in patterns for w in p.split() if w[0] != "{" and w not in (".", "OBJECT")]
    clauses = [w for t in CLAUSES.values() for w in re.findall(r"[A-Za-z]+", t)]
    capital = [w.capitalize() for t in (WEATHER, MOODS) for w in t]
    capital += [v.split()[3].capitalize() for v in WEATHER.values()] + [
        v.split()[1].capitalize() for v in GOALS.values()
    ]
    capital += [w.capitalize() for v in SETTINGS.values() for w in (v[0], *v[2].split())]
    labels = ["stop", "name", "weather", "animal", "people", *NEXT.values()]
    words = [*starts, *fixed, *tables, *places, *capital, *clauses, *labels]
    begin = set(starts)
    return {word: word in begin for word in dict.fromkeys(words) if word != "."}
