"""Filler prose for generated contexts: sentences about a small town, made from patterns and words."""

import random
from collections.abc import Iterator

_WORDS: dict[str, tuple[str, ...]] = {
    "who": (
        "the baker", "the postman", "an old fisherman", "the schoolteacher", "a young carpenter", "the librarian",
        "the ferry captain", "a travelling salesman", "the gardener", "the night watchman", "the mayor's cousin",
        "a retired nurse", "the clockmaker", "the innkeeper", "a group of students", "the bus driver",
    ),
    "time": (
        "early in the morning", "just before noon", "late in the afternoon", "after supper", "on rainy days",
        "at the end of the week", "during the harvest", "when the market closes", "before the shops open",
        "on the first warm day of spring", "in the quiet weeks of winter", "whenever the wind turns north",
    ),
    "where": (
        "by the stone bridge", "near the fountain", "along the canal", "outside the bakery", "under the chestnut trees",
        "behind the church", "on the hill road", "beside the ferry landing", "at the corner of the square",
        "in the narrow lanes", "past the old mill", "in front of the post office",
    ),
    "thing": (
        "a basket of apples", "two letters", "a newspaper", "a sack of flour", "an umbrella", "a bunch of flowers",
        "a bag of coal", "a jar of honey", "a loaf of bread", "an empty crate", "a roll of cloth", "a wooden toy",
    ),
    "quality": (
        "quiet", "busy", "damp", "bright", "crowded", "pleasant", "dusty", "cheerful", "sleepy", "windy", "calm",
    ),
}  # fmt: skip

_PATTERNS = (
    "{time}, {who} can be seen {where}, carrying {thing} and talking to nobody in particular.",
    "The street is {quality} {time}, and the sound of footsteps carries a long way.",
    "{who} likes to stop {where} and look at the water before going on.",
    "Nobody remembers who built the low wall that stands {where}, but it is repaired every few years.",
    "Visitors often say that the town feels {quality}, and that they would gladly stay another day.",
    "Somebody left {thing} {where}, and it stayed there until {who} took it home.",
    "The weather changes quickly here; a {quality} morning can turn into a storm {time}.",
    "{who} and {who} have played cards together for many years, usually {where}.",
    "There is a bench {where} where people rest their feet and share the news of the day.",
    "The old clock runs a few minutes late, which {who} finds more amusing than useful.",
    "{time}, the windows are opened wide and the smell of fresh bread drifts through the lanes.",
    "Children chase each other {where} until somebody calls them in.",
    "It is a {quality} place {time}, although the season makes a difference.",
    "{who} once tried to sell {thing} here, without much luck.",
    "A thin mist hangs over the river {time}, and the boats wait for it to lift.",
    "The council has talked about new lamps for years, yet the evenings {where} are as dark as ever.",
    "{who} keeps a careful list of everything that needs mending, and the list never gets shorter.",
    "Most families grow some vegetables and trade what they do not need for {thing}.",
    "A dog sleeps {where} and lifts its head only when {who} walks by.",
    "The road was widened some time ago, so that carts no longer have to wait {where}.",
    "{time}, {who} sweeps the steps and greets everyone who passes.",
    "Long ago a flood reached the doors {where}, and a line on the wall still shows how high it came.",
    "People say that the {quality} air is good for the lungs, and perhaps they are right.",
    "{who} waved from the other side of the street and then hurried on with {thing}.",
)


def filler_sentences(rng: random.Random) -> Iterator[str]:
    """Yields sentences without end; patterns repeat once all were used, whole sentences after a few thousand tokens."""
    while True:
        for pattern in rng.sample(_PATTERNS, len(_PATTERNS)):
            yield _fill(pattern, rng)


def _fill(pattern: str, rng: random.Random) -> str:
    for slot, words in _WORDS.items():
        count = pattern.count("{" + slot + "}")
        for word in rng.sample(words, count):
            pattern = pattern.replace("{" + slot + "}", word, 1)
    return pattern[0].upper() + pattern[1:]
