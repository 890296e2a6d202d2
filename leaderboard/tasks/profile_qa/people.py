"""The invented people: names, and attributes with their sentence, question and values."""

from dataclasses import dataclass

NAMES = (
    "Alda", "Boris", "Carla", "Dmitri", "Elena", "Felix", "Greta", "Hugo", "Irene", "Jonas", "Karin", "Leon", "Marta",
    "Nils", "Olga", "Pablo", "Rosa", "Stefan", "Tessa", "Ulrich", "Vera", "Walter", "Yara", "Zoe",
)  # fmt: skip


@dataclass(frozen=True)
class Attribute:
    """One thing that the page tells about a person.

    Attributes:
        key: The attribute's name in question ids.
        sentence: The sentence on the page; has ``{name}`` and ``{value}``.
        question: The question; has ``{name}``.
        answer_prefix: How the answer starts; has ``{name}``.
        values: The possible values.
    """

    key: str
    sentence: str
    question: str
    answer_prefix: str
    values: tuple[str, ...]


ATTRIBUTES = (
    Attribute(
        "birthplace",
        "{name} was born in the city of {value} and still speaks of it often.",
        "Where was {name} born?",
        "{name} was born in the city of",
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
        "At home {name} keeps a pet {value} in the kitchen.",
        "What pet does {name} keep at home?",
        "At home {name} keeps a pet",
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
        "At every party {name} cooks a pot of {value} for the guests.",
        "What does {name} cook at every party?",
        "At every party {name} cooks a pot of",
        ("soup", "curry", "stew", "rice", "beans", "pasta", "chili", "noodles", "porridge", "potatoes", "lentils"),
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
        "The best friend of {name} is called {value} and lives next door.",
        "What is the best friend of {name} called?",
        "The best friend of {name} is called",
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
        "drink",
        "Every morning {name} drinks a cup of {value} before leaving the house.",
        "What does {name} drink every morning?",
        "Every morning {name} drinks a cup of",
        ("cocoa", "milk", "broth", "cider", "lemonade", "water", "wine", "juice", "vinegar", "honey", "soda"),
    ),
)

MAX_PEOPLE = min(len(attribute.values) for attribute in ATTRIBUTES)
"""People on one page, each with a value of their own in every attribute."""
