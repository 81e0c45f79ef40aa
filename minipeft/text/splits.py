"""Which split a piece of shipped text belongs to: train, validation or test, fixed by its name.

The split is a function of a key (a chapter's name, a headword) alone: the first eight bytes of the key's BLAKE2b
digest, modulo 100, are 0..89 for train, 90..94 for validation and 95..99 for test. A text that is added later moves
no other.
"""

import hashlib

SPLITS = ("train", "validation", "test")


def side(key: str) -> str:
    """The split that `key` belongs to: "train" (90 %), "validation" (5 %) or "test" (5 %)."""
    digest = hashlib.blake2b(key.encode("utf-8"), digest_size=8).digest()
    bucket = int.from_bytes(digest, "big") % 100
    return "train" if bucket < 90 else "validation" if bucket < 95 else "test"


def check_split(split: str) -> None:
    """Raises ValueError where `split` is not one of SPLITS."""
    if split not in SPLITS:
        raise ValueError(f"split must be one of {', '.join(map(repr, SPLITS))}, got {split!r}")
