"""Values of options that several commands share."""

import argparse


def parse_seed(text: str) -> int:
    """A seed: tables hold it as a signed integer of 64 bits, generators take no negative one.

    Raises:
        ArgumentTypeError: it is no whole number in [0, 2^63).
    """
    if not (text.isascii() and text.isdigit() and len(text) < 20 and int(text) < 2**63):
        raise argparse.ArgumentTypeError(f"seed is {text!r}; expected a whole number from 0 to {2**63 - 1}")
    return int(text)
