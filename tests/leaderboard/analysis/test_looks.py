"""A press keeps its colour in every figure, and no two of a figure share one, for any kind of colour vision."""

from itertools import combinations

import numpy as np
import pytest

from kvzip_press.leaderboard.analysis.looks import COLOURS, FULL_COLOUR, looks

GROUNDS = ("#ffffff", "#171b22")  # of the cards of the page (report/style.css)
VISIONS = {  # Machado, Oliveira and Fernandes 2009, severity 1: what stays of linear RGB
    "trichromacy": np.eye(3),
    "protanopia": np.array(
        [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]]
    ),
    "deuteranopia": np.array(
        [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]]
    ),
    "tritanopia": np.array(
        [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.303900]]
    ),
}
TO_LMS = np.array([[0.41222147, 0.53633254, 0.05144599], [0.2119035, 0.68069955, 0.10739696],
                   [0.08830246, 0.28171884, 0.6299787]])  # fmt: skip
TO_LAB = np.array([[0.21045426, 0.79361779, -0.00407205], [1.9779985, -2.42859221, 0.45059371],
                   [0.02590404, 0.78277177, -0.80867577]])  # fmt: skip


def linear(colour: str) -> np.ndarray:
    parts = np.array([int(colour[place : place + 2], 16) / 255 for place in (1, 3, 5)])
    return np.where(parts <= 0.04045, parts / 12.92, ((parts + 0.055) / 1.055) ** 2.4)


def oklab(rgb: np.ndarray) -> np.ndarray:
    return TO_LAB @ np.cbrt(TO_LMS @ np.clip(rgb, 0, 1))


def contrast(one: str, other: str) -> float:
    low, high = sorted(float(linear(colour) @ (0.2126, 0.7152, 0.0722)) + 0.05 for colour in (one, other))
    return high / low


@pytest.mark.parametrize("side", [0, 1], ids=["light", "dark"])
@pytest.mark.parametrize("vision", VISIONS)
def test_any_two_colours_are_apart_for_each_kind_of_colour_vision(vision: str, side: int) -> None:
    seen = {pair[side]: oklab(VISIONS[vision] @ linear(pair[side])) for pair in (*COLOURS, FULL_COLOUR)}
    distance, *nearest = min((np.linalg.norm(seen[a] - seen[b]), a, b) for a, b in combinations(seen, 2))
    assert len(seen) == len(COLOURS) + 1
    assert distance > (0.07 if vision == "trichromacy" else 0.04), nearest


@pytest.mark.parametrize("side", [0, 1], ids=["light", "dark"])
def test_colours_stand_out_from_their_ground(side: int) -> None:
    for pair in (*COLOURS, FULL_COLOUR):
        assert contrast(pair[side], GROUNDS[side]) >= 3, pair


def test_known_presses_have_their_colours_whatever_is_beside_them() -> None:
    alone = looks(["kvzip"], None)["kvzip"]
    crowd = [*(f"press {i}" for i in range(9)), "full cache", "SnapKV", "KVzip", "random"]
    assert looks(crowd, "full cache")["KVzip"] == looks(crowd[::-1], "full cache")["KVzip"] == alone
    assert looks(["AdaKV (ExpectedAttention)"], None) != looks(["Expected Attention"], None)
    for label, other in (
        ("AdaKV (ExpectedAttention)", "adakv_expected_attention"),
        ("Fast KVzip (gated)", "fastkvzip"),
    ):
        assert looks([label], None)[label] == looks([other], None)[other]


def test_a_stranger_has_the_colour_of_its_name_whatever_the_order() -> None:
    presses = ["mine", "kvzip", "full cache", "yours"]
    assert looks(presses, "full cache") == looks(presses[::-1], "full cache")
    assert looks(presses, "full cache")["mine"] == looks(["mine"], None)["mine"]


def test_no_two_of_sixteen_presses_share_a_colour() -> None:
    """Not even two spellings of one press, nor strangers whose names would give them the same."""
    presses = ["kvzip", "KVzip", "kvzip_head", "kvzip_head, window 16", "random", *(f"press {i}" for i in range(11))]
    found = looks(["full cache", *presses], "full cache")
    assert len({look.colours for look in found.values()}) == 17


def test_more_presses_than_colours_differ_by_line_and_marker() -> None:
    assert len(set(looks([f"press {i}" for i in range(100)], None).values())) == 100
    found = looks([f"press {i}" for i in range(64)], None)
    first = [look for look in found.values() if not look.line]
    assert len(first) == len({look.colours for look in first}) == 16
