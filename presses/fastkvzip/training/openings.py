"""How self-generated texts begin: the first words of letters, lists, records, code and so on, with invented details.

By itself a small model writes fluent prose with few names and numbers, but those are what a cache is asked for later.
So each text begins with some, drawn from a seed, and the model continues in that form.
"""

from __future__ import annotations

import random
import re

_OPENINGS = (
    "Dear {name},\n\nThank you for your letter of {date}. Since we moved to {place} I have been thinking about {topic}",
    "{name} grew up in {place}, where {topic} was all that anybody talked about. In {year},",
    "Minutes of the meeting held in {place} on {date}\n\nPresent: {name} {name}, {name} {name} and {name} {name}\n1.",
    "Inventory of {topic}, {place}\n\n- {code}: {number} pieces, shelf {number}\n- {code}: {number} pieces, shelf",
    '{{"id": "{code}", "owner": "{name} {name}", "city": "{place}", "year": {year}, "items": [{{"name": "{topic}",',
    "| name | place | year | amount |\n|---|---|---|---|\n| {name} | {place} | {year} | {number} |\n| {name} |",
    'def {word}_{word}(values, limit={number}):\n    """Sorts out {topic}."""\n    result = []\n',
    "class {name}{name}:\n    def __init__(self, {word}, {word}={number}):\n        self.{word} = {word}\n",
    'import os\n\n{word} = {{"{word}": {number}, "{word}": {number}, "{name}": "{code}"}}\n\nfor key in {word}:\n',
    "{name}: What do you know about {topic}?\n{name}: A little. In {place} they told me that",
    "{place}, {date}. The council decided yesterday to spend {number} thousand crowns on {topic}. {name} {name}, who",
    "How to take care of {topic}\n\n1. Before you begin, you need {number} of these:",
    "Once there was a {word} called {name}, who lived near {place} with {number} {word}s and",
    "Timetable {place} - {place}, valid from {date}\n{time}  {place}\n{time}  {place}\n{time}",
    "Diary of {name} {name}\n\n{date}. Woke at {time}. It rained, and we could not",
    "The history of {topic} begins in {year}, when {name} {name} of {place}",
    "Subject: order {code}\n\nHello {name},\n\nyour order of {date} ({number} units, reference {code}) has",
    "Recipe for {name}'s {word} soup ({number} servings)\n\nIngredients:\n- {number} g",
    "Q: Who wrote about {topic} in {year}?\nA: {name} {name} did, in {place}.\n\nQ:",
    "{date} {time} INFO {word}: started with id {code}\n{date} {time} WARN {word}: {number} retries for {code}\n",
    "In this lesson we look at {topic}. First, recall that",
    "The trial of {name} {name} opened in {place} on {date}. According to the witness {name},",
    "Most people believe that {topic} is simple. There are {number} reasons why",
    "Name: {name} {name}\nBorn: {date}, {place}\nProfession: {word} keeper\nMember since: {year}\nNotes:",
    "Three travellers met at an inn near {place}: {name}, {name} and {name}. The first said",
    'Review of "{topic}" by {name} {name} ({year}). I bought this book in {place} for {number} crowns, and',
)

_TOPICS = (
    "the old railway", "bees and honey", "the lighthouse", "winter storms", "growing tomatoes", "the night sky",
    "coal mining", "river fishing", "glass making", "wild horses", "a lost manuscript", "public libraries",
    "volcanoes", "the printing press", "bread baking", "solar power", "chess openings", "mountain rescue",
    "the stock market", "ancient coins", "vaccines", "telescopes", "bridge building", "school reform", "tea trading",
    "software testing", "whales", "the city walls", "prime numbers", "bicycle repair", "opera singers", "sea trade",
    "weather forecasts", "forest fires", "clock making", "space travel", "migration of birds", "food prices",
    "the water supply", "folk songs", "robots", "insurance claims", "knitting patterns", "local elections",
)  # fmt: skip

_SYLLABLES = (
    "ba", "ber", "ca", "cor", "da", "del", "du", "el", "fa", "fen", "ga", "gor", "ha", "il", "jo", "ka", "kel", "la",
    "lin", "lo", "ma", "mer", "mi", "na", "nor", "o", "pa", "per", "ra", "ri", "ro", "sa", "sen", "ta", "tor", "u",
    "va", "ven", "wil", "ya", "zan",
)  # fmt: skip

_MONTHS = ("January", "March", "April", "June", "July", "September", "October", "December")
_SLOT = re.compile(r"\{(\w+)\}")


def opening(rng: random.Random) -> str:
    """Returns the first words of a text; the same generator state gives the same words."""
    pattern = rng.choice(_OPENINGS)
    return _SLOT.sub(lambda slot: _detail(slot[1], rng), pattern).replace("{{", "{").replace("}}", "}")


def _detail(slot: str, rng: random.Random) -> str:
    word = "".join(rng.choices(_SYLLABLES, k=rng.choice((2, 2, 3))))
    details = {
        "name": word.capitalize(),
        "place": word.capitalize() + rng.choice(("", "ton", " Bay", "stad", " Falls")),
        "word": word,
        "topic": rng.choice(_TOPICS),
        "date": f"{rng.randint(1, 28)} {rng.choice(_MONTHS)} {rng.randint(1850, 2030)}",
        "time": f"{rng.randint(0, 23):02}:{rng.randint(0, 59):02}",
        "year": str(rng.randint(1700, 2030)),
        "number": str(rng.randint(2, 10 ** rng.randint(1, 5))),
        "code": f"{word[:2].upper()}-{rng.randint(100, 99999)}",
    }
    return details[slot]
