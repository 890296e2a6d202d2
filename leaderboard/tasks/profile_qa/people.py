"""The invented people: names, and attributes with their sentence, question and values."""

from dataclasses import dataclass

NAMES = (
    "Alda", "Boris", "Carla", "Dmitri", "Elena", "Felix", "Greta", "Hugo", "Irene", "Jonas", "Karin", "Leon", "Marta",
    "Nils", "Olga", "Pablo", "Rosa", "Stefan", "Tessa", "Ulrich", "Vera", "Walter", "Yara", "Zoe",
)  # fmt: skip


@dataclass(frozen=True)
class Attribute:
    """One thing that is told about a person.

    Attributes:
        key: Its name in question ids.
        sentence: How the page says it; has ``{name}`` and ``{value}``.
        question: How it is asked; has ``{name}``.
        answer_prefix: How the answer starts; has ``{name}``.
        values: What it can be.
    """

    key: str
    sentence: str
    question: str
    answer_prefix: str
    values: tuple[str, ...]


ATTRIBUTES = (
    Attribute(
        "birthplace",
        "{name} was born in {value} and still speaks of it often.",
        "Where was {name} born?",
        "{name} was born in",
        (
            "Lisbon",
            "Prague",
            "Cairo",
            "Lima",
            "Oslo",
            "Dublin",
            "Athens",
            "Havana",
            "Naples",
            "Delhi",
            "Geneva",
            "Riga",
        ),
    ),
    Attribute(
        "job",
        "For a living, {name} works as a {value}, which leaves little free time.",
        "What does {name} do for a living?",
        "For a living, {name} works as a",
        ("dentist", "pilot", "plumber", "lawyer", "farmer", "chef", "tailor", "painter", "nurse", "judge", "barber"),
    ),
    Attribute(
        "pet",
        "At home {name} keeps a {value} as a pet.",
        "What pet does {name} keep at home?",
        "At home {name} keeps a",
        ("parrot", "turtle", "rabbit", "snake", "hamster", "goat", "pony", "lizard", "spider", "crab", "ferret"),
    ),
    Attribute(
        "instrument",
        "In the evenings {name} plays the {value} with the window open.",
        "What does {name} play in the evenings?",
        "In the evenings {name} plays the",
        ("drums", "cello", "harp", "trumpet", "organ", "banjo", "tuba", "oboe", "bass", "horn", "fiddle"),
    ),
    Attribute(
        "dish",
        "At every party {name} cooks {value} for the guests.",
        "What does {name} cook at every party?",
        "At every party {name} cooks",
        ("soup", "pizza", "curry", "sushi", "pasta", "salad", "stew", "pancakes", "tacos", "rice", "beans"),
    ),
    Attribute(
        "car",
        "To work {name} drives a {value} car that is older than it looks.",
        "What car does {name} drive to work?",
        "To work {name} drives a",
        ("blue", "green", "yellow", "white", "orange", "purple", "silver", "brown", "pink", "grey"),
    ),
    Attribute(
        "friend",
        "The best friend of {name} is {value}, who lives next door.",
        "Who is the best friend of {name}?",
        "The best friend of {name} is",
        ("Anna", "Peter", "Lucy", "Mark", "Nora", "Paul", "Ruth", "Simon", "Clara", "David", "Emma", "George"),
    ),
    Attribute(
        "holiday",
        "Every summer {name} travels to {value} for a few weeks.",
        "Where does {name} travel every summer?",
        "Every summer {name} travels to",
        (
            "Spain",
            "Norway",
            "Japan",
            "Egypt",
            "Canada",
            "Brazil",
            "Greece",
            "Kenya",
            "Iceland",
            "Peru",
            "India",
            "Cuba",
        ),
    ),
    Attribute(
        "subject",
        "At university {name} studied {value} for some years.",
        "What did {name} study at university?",
        "At university {name} studied",
        ("physics", "history", "biology", "music", "law", "medicine", "geology", "economics", "chemistry", "botany"),
    ),
    Attribute(
        "sport",
        "On Sundays {name} goes out for {value} with old friends.",
        "What does {name} go out for on Sundays?",
        "On Sundays {name} goes out for",
        ("tennis", "rowing", "golf", "hockey", "chess", "boxing", "sailing", "fencing", "skiing", "rugby"),
    ),
)

MAX_PEOPLE = min(len(attribute.values) for attribute in ATTRIBUTES)
"""People on one page, each with a value of their own in every attribute."""
