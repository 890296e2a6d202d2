"""How a removed fraction is written: with two decimals, and with more where two would make another fraction of it."""


def ratio_text(ratio: float) -> str:
    """Returns "0.50" for 0.5, and "0.96875" for 0.96875, which two decimals would merge with 0.97."""
    short = f"{ratio:.2f}"
    return short if float(short) == ratio else f"{ratio:g}"
