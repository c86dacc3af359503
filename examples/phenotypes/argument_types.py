"""Types for argparse: numbers within bounds, and a sentence for the others. Imports nothing that takes time."""

import argparse
import math
from collections.abc import Callable


def number(minimum: float, below: float = math.inf) -> Callable[[str], float]:
    """A finite number, at least `minimum` and less than `below`."""

    def parse(text: str) -> float:
        allowed = f"a number of at least {minimum:g}" + (f" and less than {below:g}" if below < math.inf else "")
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not (math.isfinite(value) and minimum <= value < below):
            raise argparse.ArgumentTypeError(f"{text!r} isn't {allowed}")
        return value

    return parse


def whole(minimum: int) -> Callable[[str], int]:
    """A whole number, at least `minimum`, that fits into 32 bits (as JAX's seeds have to)."""

    def parse(text: str) -> int:
        if not (text.isascii() and text.isdecimal() and minimum <= int(text) < 2**31):
            raise argparse.ArgumentTypeError(f"{text!r} isn't a whole number of at least {minimum} and less than 2**31")
        return int(text)

    return parse
