"""Preferences of real people, from the archive that the source distribution of vaderSentiment 3.3.2 contains.

The archive (Hutto & Gilbert 2014) holds 23,703 snippets of movie reviews, product reviews, editorials and tweets, each
rated by some fifteen to a hundred people from -4 to 4. The snippets' own copyright is unclear, so nothing of it is
shipped: it is read where the user has it, in memory, without unpacking anything.

    vaderSentiment-3.3.2.tar.gz
      .../additional_resources/hutto_ICWSM_2014.tar.gz
        .../movieReviewSnippets_GroundTruth.txt         id, mean rating, text
        .../movieReviewSnippets_anonDataRatings.txt     id, mean rating, standard deviation, [each rater's rating]
"""

from __future__ import annotations

import gzip
import io
import json
import os
import re
import tarfile
import zlib
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ..files import FileError
from ..text.datasets import Preference
from ..text.splits import check_split, side

KINDS = {  # the prefix of a file -> what a reward model reads before the text
    "movieReviewSnippets": "Movie review:",
    "amazonReviewSnippets": "Product review:",
    "nytEditorialSnippets": "Editorial:",
    "tweets": "Tweet:",
}
INNER, LIMIT = "hutto_ICWSM_2014.tar.gz", 64 << 20  # bytes that an archive may have, unpacked


class RatedText(NamedTuple):
    """A text, what it is ("Movie review:", ...), the document it is part of, and each rater's rating from -4 to 4."""

    kind: str
    document: str
    text: str
    ratings: tuple[int, ...]


def human_ratings(path: str | os.PathLike) -> list[RatedText]:
    """Every rated text, from vaderSentiment's source archive or the hutto_ICWSM_2014.tar.gz inside it.

    Raises FileError, naming the file and the line, for an archive without the texts and for a line that is not as
    described.
    """
    path = Path(path)
    try:
        members = _members(path.read_bytes(), path)
    except OSError as error:
        raise FileError(f"{path}: cannot be read ({error.strerror or error})") from error
    if INNER in members:
        members = _members(members[INNER], path / INNER)
    found = []
    for prefix, kind in KINDS.items():
        texts = _rows(members, f"{prefix}_GroundTruth.txt", 3, path)
        ratings = _rows(members, f"{prefix}_anonDataRatings.txt", 4, path)
        for number, (id, _, text) in enumerate(texts.values(), start=1):
            where = f"{path}: {prefix}, text {number} ({id})"
            if id not in ratings:
                raise FileError(f"{where} has no ratings")
            found.append(RatedText(kind, f"{prefix} {id.partition('_')[0]}", text, _ratings(ratings[id][3], where)))
    return found


def human_preferences(
    path: str | os.PathLike, split: str = "train", pairs: int = 16000, seed: int = 0
) -> list[Preference]:
    """Pairs of texts of one kind, the chosen one rated higher: {prompt: the kind, chosen, rejected} records.

    A pair is two texts and one rating of each, drawn at random; where the ratings are equal another pair is drawn.
    So the labels have the noise of real people: those who rated the same text disagree as they did. The split ("train",
    "validation", "test") is by document: no text of one is in another. Raises FileError for the archive, ValueError for
    a split that leaves no pair to draw.
    """
    check_split(split)
    rated = [text for text in human_ratings(path) if side(text.document) == split]
    groups = {kind: [text for text in rated if text.kind == kind] for kind in KINDS.values()}
    several = lambda texts: len({t.text for t in texts}) > 1 and len({r for t in texts for r in t.ratings}) > 1  # noqa: E731
    groups = {kind: texts for kind, texts in groups.items() if several(texts)}  # so that some pair can be drawn
    if not groups and pairs:
        raise ValueError(f"{path}: the split {split!r} has no two texts whose ratings differ")
    names = list(groups)
    sizes = np.array([len(groups[name]) for name in names], np.float64)
    rng, found = np.random.default_rng(seed), []
    while len(found) < pairs:
        texts = groups[names[rng.choice(len(names), p=sizes / sizes.sum())]]
        first, second = (texts[i] for i in rng.integers(len(texts), size=2))
        a, b = (t.ratings[rng.integers(len(t.ratings))] for t in (first, second))
        if a != b and first.text != second.text:
            chosen, rejected = (first, second) if a > b else (second, first)
            found.append(Preference(first.kind, f" {chosen.text}", f" {rejected.text}"))
    return found


def _members(data: bytes, path: Path) -> dict[str, bytes]:
    """{file name without its folders: content} of the .txt and .tar.gz files of a compressed archive, in memory."""
    found = {}
    try:
        with gzip.open(io.BytesIO(data)) as file:
            content = file.read(LIMIT + 1)
        if len(content) > LIMIT:
            raise FileError(f"{path}: has more than {LIMIT} bytes unpacked, more than such an archive has")
        with tarfile.open(fileobj=io.BytesIO(content), mode="r:") as archive:
            for member in archive:
                name = member.name.rpartition("/")[2]
                if member.isfile() and not member.issparse() and name.endswith((".txt", ".tar.gz")):
                    found[name] = archive.extractfile(member).read()
    except (tarfile.TarError, EOFError, OSError, zlib.error) as error:
        raise FileError(f"{path}: not a .tar.gz archive, or a damaged one ({error})") from error
    return found


def _rows(members: dict[str, bytes], name: str, columns: int, path: Path) -> dict[str, list[str]]:
    """{id: the line's columns} of a table."""
    if name not in members:
        wanted = f"the source archive vaderSentiment-3.3.2.tar.gz, or {INNER} from inside it"
        raise FileError(f"{path}: holds no {name}; give {wanted}")
    rows = {}
    for number, line in enumerate(members[name].decode("utf-8-sig", errors="replace").split("\n"), start=1):
        if line.strip():
            row = line.rstrip("\r").split("\t", columns - 1)
            if len(row) != columns or not row[-1].strip():
                raise FileError(f"{path}: {name}, line {number}: does not have {columns} columns divided by tabs")
            rows[row[0]] = row
    return rows


def _ratings(text: str, where: str) -> tuple[int, ...]:
    if not re.fullmatch(r"\s*\[-?\d(, -?\d)*\]\s*", text, re.ASCII):
        raise FileError(f"{where}: the ratings are not a list of whole numbers but {text[:40]!r}")
    return tuple(json.loads(text))
