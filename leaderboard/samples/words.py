"""Plain words for keys, lists and entries; pairs of them give some fifteen thousand names."""

import random
from collections.abc import Iterator

from kvzip_press.errors import InvalidArgumentError

ADJECTIVES = (
    "amber", "ancient", "azure", "bitter", "blank", "bold", "brave", "brief", "bright", "broad", "calm", "careful",
    "cheap", "chilly", "clean", "clever", "cloudy", "coarse", "cosy", "crisp", "curious", "daring", "deep", "distant",
    "double", "dry", "dusty", "eager", "early", "empty", "even", "fair", "famous", "fancy", "fierce", "fluffy", "fresh",
    "gentle", "giant", "golden", "grand", "happy", "harsh", "heavy", "hidden", "hollow", "humble", "hungry", "icy",
    "jolly", "keen", "kind", "large", "lazy", "light", "little", "lively", "lonely", "loud", "loyal", "lucky", "magic",
    "mellow", "mighty", "modern", "muddy", "narrow", "neat", "noble", "noisy", "old", "pale", "patient", "plain",
    "polite", "proud", "quick", "quiet", "rapid", "rare", "rough", "royal", "rusty", "sharp", "shiny", "silent", "slim",
    "slow", "smooth", "soft", "solid", "sour", "steady", "steep", "stormy", "strict", "sunny", "sweet", "swift",
    "tender", "thick", "tiny", "tired", "vivid", "warm", "weary", "wild", "wise", "wooden", "young",
)  # fmt: skip

NOUNS = (
    "anchor", "apple", "arrow", "badge", "balcony", "basket", "beacon", "bell", "bicycle", "blanket", "bottle",
    "branch", "brick", "bridge", "brush", "bucket", "button", "cabin", "camera", "candle", "canoe", "canyon", "carpet",
    "castle", "cellar", "chair", "cherry", "chimney", "circle", "cliff", "clock", "cloud", "coat", "compass", "copper",
    "cottage", "cradle", "crown", "curtain", "desert", "diamond", "door", "dragon", "drawer", "drum", "eagle", "engine",
    "falcon", "feather", "fence", "flag", "forest", "fork", "fountain", "garden", "gate", "glacier", "glove", "guitar",
    "hammer", "harbour", "hat", "helmet", "hill", "horse", "island", "jacket", "jungle", "kettle", "key", "ladder",
    "lake", "lamp", "lantern", "leaf", "lemon", "letter", "library", "lion", "lock", "magnet", "marble", "market",
    "meadow", "mirror", "monkey", "moon", "mountain", "needle", "ocean", "orchard", "oven", "owl", "painting", "palace",
    "paper", "pearl", "pencil", "pepper", "piano", "pillow", "planet", "pocket", "pond", "puzzle", "rabbit", "river",
    "rocket", "roof", "rope", "saddle", "salmon", "scarf", "shadow", "shell", "ship", "silver", "spoon", "statue",
    "stone", "sugar", "table", "temple", "tiger", "tower", "train", "tunnel", "valley", "velvet", "village", "violin",
    "wagon", "wheel", "whistle", "window", "winter", "wolf", "yard",
)  # fmt: skip


def word_pairs(rng: random.Random, joiner: str = "-") -> Iterator[str]:
    """Yields names such as "amber-lantern", each once, in random order.

    Raises:
        InvalidArgumentError: There are no more, after some fifteen thousand.
    """
    pairs = range(len(ADJECTIVES) * len(NOUNS))
    for pair in rng.sample(pairs, len(pairs)):
        adjective, noun = divmod(pair, len(NOUNS))
        yield f"{ADJECTIVES[adjective]}{joiner}{NOUNS[noun]}"
    raise InvalidArgumentError(f"expected a context with fewer than {len(pairs)} names; a shorter one, or hex keys")


def hex_ids(rng: random.Random) -> Iterator[str]:
    """Yields identifiers in the form of a UUID, without end; duplicates are not to be expected."""
    while True:
        digits = f"{rng.getrandbits(128):032x}"
        yield "-".join((digits[:8], digits[8:12], digits[12:16], digits[16:20], digits[20:]))
