"""A handful of general facts people try on any chat model."""

from __future__ import annotations

import random

from assets.training.items import Item, phrase_fact, pick

CAPITALS = dict(
    pair.split(":")
    for pair in (
        "France:Paris Germany:Berlin Italy:Rome Spain:Madrid Portugal:Lisbon Austria:Vienna "
        "Poland:Warsaw Greece:Athens Norway:Oslo Sweden:Stockholm Finland:Helsinki "
        "Denmark:Copenhagen Ireland:Dublin Hungary:Budapest Belgium:Brussels Japan:Tokyo "
        "China:Beijing Egypt:Cairo Kenya:Nairobi Canada:Ottawa Peru:Lima Cuba:Havana Turkey:Ankara "
        "Russia:Moscow Ukraine:Kyiv Australia:Canberra England:London Switzerland:Bern "
        "Netherlands:Amsterdam Chile:Santiago"
    ).split()
)
DAYS = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split()
MONTHS = (
    "January February March April May June July August September October November December"
).split()
OPPOSITES = tuple(
    tuple(pair.split("/"))
    for pair in (
        "hot/cold big/small fast/slow open/closed light/dark up/down happy/sad early/late old/new "
        "hard/soft full/empty wet/dry high/low left/right near/far strong/weak rich/poor "
        "long/short "
        "loud/quiet clean/dirty day/night good/bad thick/thin sweet/sour first/last"
    ).split()
)
SOUNDS = dict(
    pair.split(":")
    for pair in (
        "cat:meow dog:woof cow:moo duck:quack sheep:baa pig:oink owl:hoot lion:roar horse:neigh "
        "frog:ribbit mouse:squeak wolf:howl"
    ).split()
)


def knowledge(rng: random.Random) -> Item:
    """One fact in one phrasing."""
    kind = pick(rng, ("capital", "capital", "calendar", "calendar", "opposite", "sound"))
    if kind == "capital":
        country = pick(rng, tuple(CAPITALS))
        return phrase_fact(
            rng,
            "knowledge",
            country,
            (
                "(What is|What's|Tell me|Name|Do you know|Which city is|Say) the capital (city|) "
                f"of {country}?",
                f"(Capital|The capital) of {country}?",
                f"{CAPITALS[country]} is the capital of (which|what) country?",
                f"(Which|What) (city|) is {country}'s capital?",
            ),
            f"The capital of {country} is {CAPITALS[country]}.",
        )
    if kind == "calendar":
        names, noun = pick(rng, ((DAYS, "day"), (MONTHS, "month")))
        i, step = rng.randrange(len(names)), pick(rng, (1, -1))
        word = "after" if step == 1 else "before"
        near = (
            "(after|next after|right after)" if step == 1 else "(before|just before|right before)"
        )
        return phrase_fact(
            rng,
            "knowledge",
            f"{names[i]} {word}",
            (
                f"(What|Which) ({noun}|) (comes|is) {near} {names[i]}?",
                f"(Tell me|Name|Give me) the {noun} {near} {names[i]}.",
            ),
            f"{word.capitalize()} {names[i]} comes {names[(i + step) % len(names)]}.",
        )
    if kind == "opposite":
        pair = pick(rng, OPPOSITES)
        a, b = pair if rng.random() < 0.5 else pair[::-1]
        return phrase_fact(
            rng,
            "knowledge",
            f"opposite {a}",
            (
                f"(What is|What's|Give me|Tell me|Name|) the opposite of {a}?",
                f"Opposite of {a}?",
                f"What is (not|the reverse of) {a}?",
            ),
            f"The opposite of {a} is {b}.",
        )
    animal = pick(rng, tuple(SOUNDS))
    return phrase_fact(
        rng,
        "knowledge",
        f"sound {animal}",
        (
            f"(What|Which) (sound|noise) does (a|the) {animal} make?",
            f"What does (a|the) {animal} (say|sound like)?",
            f"How does (a|the) {animal} (sound|go)?",
        ),
        f"The {animal} says {SOUNDS[animal]}.",
    )


TASKS = {"knowledge": (knowledge, 3.5)}
