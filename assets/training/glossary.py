"""How people ask about the words of the app."""

from __future__ import annotations

import random

from assets.training.items import Item, blur, expand, phrase_fact, pick, roughen
from assets.training.terms import DIFFERENCES, TERMS

ASK_TERM = (
    "(What is|What's|what exactly is|So what is|Sorry, what is|What was|Tell me what is) {t} "
    "(again|exactly|actually|here||||)?",
    "(What are|What is) {t}?",
    "(What|So what|And what) does {t} (mean|stand for|do|tell me|show|mean here|mean in the panel|"
    "mean in this app|do for me|do in PreScope)?",
    "(Explain|Describe|Define|Please explain|Briefly explain|Explain to me) {t} (to me|please|in "
    "simple words|in one sentence|simply|like I am five|for a beginner|||||).",
    "(Can|Could|Would) you (explain|describe|define|tell me about|explain to me) {t} (please|in "
    "simple words||||)?",
    "(Tell me|Tell me more|Talk to me|Teach me) about {t}.",
    "(What is|What's) the (meaning|purpose|point|idea|role|job|use|definition) of {t}?",
    "(What is|What's) {t} (good for|used for|about|for|there for)?",
    "Why (do we need|do I need|is there|does the app have|does PreScope use|do you use|would I "
    "want) {t}?",
    "Why (is|are) {t} (important|useful|there|shown|in the panel|needed)?",
    "Why does {t} matter (to me|here||)?",
    "(I see|I keep seeing|There is|The panel shows|The app shows|The screen says|It says) {t} (in "
    "the panel|in the app|on the screen|here|||). (What is that?|What does it mean?|What is it?|"
    "What does that mean?|Please explain.|Is that important?)",
    "(I don't understand|I do not get|I don't get|I am confused by|No idea about|I have never "
    "heard of|I forgot) {t}.",
    "(I don't know|I want to know|I would like to know|I wonder|Do you know|Can you tell me|Could "
    "you tell me|Please tell me|Tell me|I'm curious) what {t} (is|means|does).",
    "How (does|do|would) {t} work (in PreScope|in this app|here||)?",
    "(What about|And what about|And|How about|Now) {t}?",
    "{t}?",
    "{t}",
    "{t} (meaning|definition|explained|what is that|what is it|mean what)?",
    "(Meaning|Definition) of {t}?",
    "(Hey|Hello|Hi|Quick question|One question|One more question|Next question)(,|:|!) what (is|"
    "does) {t} (mean|do for me||)?",
    "(Help me understand|Help me with|I need help with|I want to learn about|Let us talk about) "
    "{t}.",
    "What (should I|can you|do you) (know|tell me|say|know|think) about {t}?",
    "What do (you|they|people) mean (by|with) {t}?",
    "What does {t} have to do with (this app|experts|the model|speed)?",
    "(Is|Are) {t} (good or bad|important|a good thing|something bad)?",
)

ASK_DIFFERENCE = (
    "(What is|What's|Tell me|Explain|Please explain) the difference between {a} and {b}?",
    "(How|In what way) (is|are) {a} different from {b}?",
    "{a} (vs|vs.|versus|or|compared to) {b}?",
    "(Compare|Please compare|Can you compare) {a} (and|with) {b}.",
    "(Is|Are) {a} the same (as|thing as) {b}?",
    "(What is|What's) {a} and what is {b}?",
    "(I confuse|I mix up|I always mix up|I don't see the difference between) {a} and {b}.",
)


def term(rng: random.Random) -> Item:
    """A question about one word of the app."""
    name = pick(rng, tuple(TERMS))
    aliases, answer = TERMS[name]
    alias = pick(rng, aliases.split("|"))
    clean = expand(rng, pick(rng, ASK_TERM).replace("{t}", alias))
    if clean[0].islower() and rng.random() < 0.3:
        clean = clean[0].upper() + clean[1:]
    return Item("term", ("term", name, clean.lower()), roughen(rng, blur(rng, clean)), answer)


def difference(rng: random.Random) -> Item:
    """A question that sets two words of the app against each other."""
    pair = pick(rng, tuple(DIFFERENCES))
    first, second = (pick(rng, side.split("|")) for side in pair)
    if rng.random() < 0.4:
        first, second = second, first
    pattern = pick(rng, ASK_DIFFERENCE).replace("{a}", first).replace("{b}", second)
    return phrase_fact(rng, "difference", "/".join(pair), (pattern,), DIFFERENCES[pair])


def hit_rate(rng: random.Random) -> Item:
    """Work out the hit rate from the panel's hits and misses."""
    total = pick(rng, (10, 100))
    hits = rng.randint(1, total - 1)
    misses = total - hits
    question = roughen(
        rng,
        expand(
            rng,
            pick(
                rng,
                (
                    "(The panel shows|I see|There were|I have|We had) {h} hits and {m} misses. "
                    "(What is the hit rate?|What hit rate is that?|Is that good?|How good is "
                    "that?)",
                    "(What is|What's) the hit rate (with|for|of|at) {h} hits and {m} misses?",
                    "{h} hits, {m} misses. (Hit rate?|What is the hit rate?)",
                    "(Calculate|Compute) the hit rate (for|of) {h} hits and {m} misses.",
                ),
            ),
        ),
    ).format(h=hits, m=misses)
    percent = hits * 100 // total
    verdict = "good" if percent >= 75 else "fair" if percent >= 50 else "low"
    answer = (
        f"{hits} hits and {misses} misses make {total} uses. {hits} of {total} is "
        f"**{percent} percent**. That is {verdict}."
    )
    return Item("hit_rate", ("hit_rate", hits, misses), question, answer)


TASKS = {"term": (term, 15.0), "difference": (difference, 3.0), "hit_rate": (hit_rate, 2.0)}
