"""Text comes out of every kind of file as it went in; what cannot be read is told in one line."""

import os
from pathlib import Path

import datasets
import pytest
import text_files
from text_files import ROWS, content, write

from utils import corpus
from utils.data_arguments import DataArguments
from utils.errors import UsageError


@pytest.fixture(autouse=True)
def quiet():
    datasets.disable_progress_bars()
    yield
    datasets.enable_progress_bars()


@pytest.fixture
def load(tmp_path):
    """Calls load_text; returns {split: list of texts}, read to the end."""

    def call(*needed: str, **arguments) -> dict[str, list]:
        texts = corpus.load_text(DataArguments(**arguments), list(needed or ["train"]), str(tmp_path / "cache"))
        assert all(list(next(iter(text))) == ["text"] for text in texts.values())
        return {split: [row["text"] for row in text] for split, text in texts.items()}

    return call


def refusal(load, *needed: str, **arguments) -> str:
    """The message of the UsageError: one line."""
    with pytest.raises(UsageError) as caught:
        load(*needed, **arguments)
    message = str(caught.value)
    assert "\n" not in message and len(message) < 500
    return message


# ---- files ----
@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("compression", text_files.COMPRESS)
@pytest.mark.parametrize("kind", text_files.KINDS)
def test_every_kind_of_file(kind, compression, streaming, tmp_path, load):
    file = write(tmp_path, kind + compression)
    texts = load("train", "validation", train_file=[file], validation_file=[file], streaming=streaming)
    assert texts["train"] == texts["validation"] == [content(kind, row) for row in ROWS]


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("kind", ["lines.txt", "table.csv", "lines.jsonl", "table.parquet"])
def test_several_files_in_the_order_given(kind, streaming, tmp_path, load):
    files = [write(tmp_path, f"{name}{Path(kind).suffix}", [f"of {name}"] * 3) for name in "bca"]
    texts = load(train_file=files, validation_file=files[:1], streaming=streaming)
    assert texts["train"] == [content(kind, f"of {name}") for name in "bca" for _ in range(3)]


def test_globs_are_sorted_and_find_subfolders(tmp_path, monkeypatch):
    (tmp_path / "deep").mkdir()
    for name in ("b.txt", "a.txt", "c.csv", "deep/d.txt"):
        write(tmp_path, name)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert corpus.find_files("--train_file", ["~/*.txt"]) == [str(tmp_path / "a.txt"), str(tmp_path / "b.txt")]
    assert len(corpus.find_files("--train_file", [f"{tmp_path}/**/*.txt"])) == 3
    assert corpus.find_files("--train_file", ["~/c.csv", "~/a*"]) == [str(tmp_path / "c.csv"), str(tmp_path / "a.txt")]


@pytest.mark.parametrize("name", ["part[1].txt", "what?.txt", "a b.txt", ".hidden.txt", "ünï.txt", "UPPER.TXT.gz"])
def test_names_with_odd_characters(name, tmp_path, load):
    plain = write(tmp_path, "plain.txt.gz" if name.endswith(".gz") else "plain.txt")
    os.rename(plain, tmp_path / name)
    for streaming in (False, True):
        texts = load(train_file=[str(tmp_path / name)], streaming=streaming, validation_split_percentage=1)
        assert texts["train"][-1] == ROWS[-1] + "\n"


@pytest.mark.parametrize("keep", [True, False])
@pytest.mark.parametrize("streaming", [False, True])
def test_line_breaks(keep, streaming, tmp_path, load):
    file = tmp_path / "a.txt"
    file.write_bytes("dos\r\nunix\n\nno\u2028break\x0b\nlast".encode())
    texts = load(train_file=[str(file)], validation_file=[str(file)], keep_linebreaks=keep, streaming=streaming)
    lines = ["dos\n", "unix\n", "\n", "no\u2028break\x0b\n", "last"]
    assert texts["train"] == (lines if keep else [line.rstrip("\n") for line in lines])


@pytest.mark.parametrize("streaming", [False, True])
def test_the_text_column(streaming, tmp_path, load):
    file = tmp_path / "a.csv"
    file.write_text("title,text,n\n" + "head,body,1\n" * 40)
    good = {"train_file": [str(file)], "validation_file": [str(file)], "streaming": streaming}
    assert load(**good)["train"] == ["body"] * 40
    assert load(**good, text_column="title")["train"] == ["head"] * 40
    message = refusal(load, **good, text_column="boddy")
    assert message == "--text_column boddy: no such column; the train text has title, text, n"
    assert "--text_column n: holds int" in refusal(load, **good, text_column="n")
    file.write_text("title,body,n\n" + "head,body,1\n" * 40)
    assert load(**good)["train"] == ["head"] * 40


def test_missing_texts_stay_missing(tmp_path, load):
    file = tmp_path / "a.jsonl"
    file.write_text('{"text": "a"}\n{"text": null}\n{"id": 1}\n{"text": ""}\n')
    for streaming in (False, True):
        texts = load(train_file=[str(file)], validation_file=[str(file)], streaming=streaming)
        assert texts["train"] == ["a", None, None, ""]


def test_a_changed_file_is_read_again(tmp_path, load):
    for name in ("a.txt", "a.parquet.gz"):
        for rows in (["old"] * 30, ["new and longer"] * 30):
            file = write(tmp_path, name, rows)
            assert load(train_file=[file])["train"][0].strip() == rows[0]


# ---- datasets that were saved ----
@pytest.mark.parametrize("streaming", [False, True])
def test_a_saved_dataset(streaming, tmp_path, load, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    rows = datasets.Dataset.from_dict({"id": range(200), "text": [f"row {i}" for i in range(200)]})
    rows.save_to_disk(tmp_path / "one")
    texts = load("train", "validation", dataset_name="~/one", streaming=streaming)
    assert sorted(texts["train"] + texts["validation"]) == sorted(rows["text"])
    assert len(texts["validation"]) == 10

    halves = {"train": rows.select(range(100)), "validation": rows.select(range(100, 200))}
    datasets.DatasetDict(halves).save_to_disk(tmp_path / "two")
    texts = load("train", "validation", dataset_name=str(tmp_path / "two"), streaming=streaming)
    assert texts == {split: list(half["text"]) for split, half in halves.items()}


def test_a_saved_dataset_without_the_split(tmp_path, load):
    datasets.DatasetDict(test=datasets.Dataset.from_dict({"text": ["a"]})).save_to_disk(tmp_path / "d")
    message = refusal(load, "validation", dataset_name=str(tmp_path / "d"))
    assert message == f"--do_eval: --dataset_name {tmp_path / 'd'} has no validation text; its splits are test"


@pytest.mark.parametrize("name", ["no/such-dataset", "nosuchdataset", "./nosuchfolder"])
def test_a_dataset_that_is_not_there(name, load):
    assert f"--dataset_name {name}: " in refusal(load, dataset_name=name)


def test_a_cache_that_cannot_be_written_is_not_the_texts_fault(tmp_path, load):
    (tmp_path / "text.txt").write_text("some words\n")
    (tmp_path / "cache").write_text("a file")
    message = refusal(load, train_file=[str(tmp_path / "text.txt")])
    assert message.startswith(f"{tmp_path / 'cache'}") and "--cache_dir" in message and "text.txt" not in message


def test_damaged_and_misplaced_datasets(tmp_path, load):
    file = write(tmp_path, "a.txt")
    assert "give it to --train_file" in refusal(load, dataset_name=file)
    datasets.Dataset.from_dict({"text": ["a"]}).save_to_disk(tmp_path / "d")
    next((tmp_path / "d").glob("*.arrow")).write_bytes(b"no arrow")
    assert f"--dataset_name {tmp_path / 'd'}: " in refusal(load, dataset_name=str(tmp_path / "d"))


# ---- the validation split ----
LENGTHS = [2, 3, 9, 10, 11, 19, 20, 29, 30, 31, 49, 50, 51, 70, 99, 100, 101, 130, 149, 150, 151, 199, 250, 1010, 1030]


@pytest.mark.parametrize("percentage", [1, 5, 33, 50, 99])
def test_the_split_is_that_of_datasets(percentage, tmp_path, load):
    for length in LENGTHS:
        rows = [f"row {i}" for i in range(length)]
        datasets.Dataset.from_dict({"text": rows}).save_to_disk(tmp_path / str(length))
        [cut] = datasets.ReadInstruction.from_spec(f"train[:{percentage}%]").to_absolute({"train": length})
        for split, expected in (("validation", rows[: cut.to]), ("train", rows[cut.to :])):
            asked = {"dataset_name": str(tmp_path / str(length)), "validation_split_percentage": percentage}
            if expected:
                assert load(split, **asked)[split] == expected
            else:
                refusal(load, split, **asked)


def test_the_split_of_a_file_is_that_of_datasets(tmp_path, load):
    file = write(tmp_path, "a.txt", [f"row {i}" for i in range(130)])
    texts = load("train", "validation", train_file=[file])
    for split, part in (("validation", "train[:5%]"), ("train", "train[5%:]")):
        theirs = datasets.load_dataset(
            "text", data_files=[file], split=part, keep_linebreaks=True, cache_dir=str(tmp_path / "other")
        )
        assert texts[split] == list(theirs["text"])


def test_the_split_of_a_stream(tmp_path, load):
    rows = [f"row {i}" for i in range(250)]
    texts = load("train", "validation", train_file=[write(tmp_path, "a.csv", rows)], streaming=True)
    assert texts["validation"] == rows[:5] + rows[100:105] + rows[200:205]
    assert texts["train"] == rows[5:100] + rows[105:200] + rows[205:]


@pytest.mark.parametrize("streaming", [False, True])
def test_a_corpus_too_short_to_split(streaming, tmp_path, load):
    file = write(tmp_path, "a.txt", ["one", "two", "three"])
    message = refusal(load, "train", "validation", train_file=[file], streaming=streaming)
    assert "--validation_split_percentage 5" in message and "--validation_file" in message
    if not streaming:
        assert load("train", train_file=[file])["train"] == ["one\n", "two\n", "three\n"]


# ---- what cannot be read ----
LATIN = "caf\xe9".encode("latin-1")
LINES, LINES_JSON, ARRAY = (text_files.KINDS[kind](ROWS) for kind in ("lines.txt", "lines.jsonl", "array.json"))
TABLE, TABS, PARQUET = (text_files.KINDS[kind](ROWS) for kind in ("table.csv", "table.tsv", "table.parquet"))
GZ, ZST = text_files.COMPRESS[".gz"], text_files.COMPRESS[".zst"]
NOISE = b"".join(b"%032x\n" % (i**19 % (2**127 - 1)) for i in range(9000))  # 290 kB that compress to half

UNREADABLE = {
    "empty.txt": (b"", "is empty"),
    "empty.jsonl.gz": (GZ(b""), "is empty"),
    "empty.txt.zst": (ZST(b""), "is empty"),
    "header.csv": (b"id,text\n", "no row"),
    "blank.csv": (b"\n\n", "no row"),
    "empty.json": (b"[]", "no row"),
    "blank.jsonl": (b"\n\n", "no row"),
    "zero.txt": (b"abc\0def\n", "zero byte at byte offset 3"),
    "zero.csv": (b"id,text\n1,a\0\n", "zero byte at byte offset 11"),
    "image.json": (b"\x89PNG\r\n\x1a\n\0\0", "zero byte at byte offset 8"),
    "utf16.txt": ("abc".encode("utf-16"), "iconv -f UTF-16"),
    "latin.txt": (LINES + LATIN, f"byte 0xe9 at byte offset {len(LINES) + 3}"),
    "latin.txt.gz": (GZ(LINES + LATIN), f"byte 0xe9 at byte offset {len(LINES) + 3}"),
    "latin.txt.zst": (ZST(LINES + LATIN), f"byte 0xe9 at byte offset {len(LINES) + 3}"),
    "latin.csv": (TABLE + b"9," + LATIN + b" x\n", f"byte 0xe9 at byte offset {len(TABLE) + 5}"),
    "latin.jsonl": (LINES_JSON + b'{"text": "' + LATIN + b' x"}', f"byte 0xe9 at byte offset {len(LINES_JSON) + 13}"),
    "latin.json": (ARRAY.replace(b"row 7", LATIN), "byte 0xe9 at byte offset"),
    "wrong.json": (ARRAY.replace(b'"row 7', b"row 7"), "line 32 is not JSON"),
    "wrong.jsonl": (LINES_JSON + b'{"text": \n' + LINES_JSON, "line 41 is not JSON"),
    "wrong.jsonl.gz": (GZ(LINES_JSON + b'{"text": \n' + LINES_JSON), "line 41 is not JSON"),
    "cut.json": (ARRAY[:-30], "line 160 is not JSON"),
    "cut.jsonl": (LINES_JSON[:-9], "line 40 is not JSON"),
    "numbers.jsonl": (b"1\n2\n", "line 1 is not an object"),
    "mixed.jsonl": (LINES_JSON + b"3\n", "line 41 is not an object"),
    "mixed.json": (b'[{"text": "a"}, 3]', "item 2"),
    "typed.jsonl": (LINES_JSON + b'{"text": 5}\n', "--text_column"),
    "dates.jsonl": (b'{"text": "2020-01-01"}\n' * 40, "--text_column text: holds"),
    "long.csv": (TABLE + b"8,a,b\n" + TABLE, "line 42 has 3 columns, its header 2"),
    "long.tsv": (TABS + b"8\ta\tb\n", "line 42 has 3 columns, its header 2"),
    "longfirst.csv": (b"id,text\n1,a,b\n2,c,d\n", "line 2 has 3 columns, its header 2"),
    "long.csv.gz": (GZ(TABLE + b"8,a,b\n"), "line 42 has 3 columns, its header 2"),
    "open.csv": (TABLE + b'8,"never closed\n', "EOF inside string"),
    "cut.txt.gz": (GZ(LINES)[:-20], "not a whole compressed file"),
    "cut.txt.zst": (ZST(LINES)[:-20], "not a whole compressed file"),
    "late.txt.gz": (GZ(NOISE)[:-50], "not a whole compressed file"),
    "late.txt.zst": (ZST(NOISE)[:-50], "not a whole compressed file"),
    "late.csv.zst": (ZST(b"text\n" + NOISE)[:-50], "not a whole compressed file"),
    "sum.txt.gz": (GZ(NOISE)[:-8] + bytes(8), "not a whole compressed file"),
    "cut.parquet.zst": (ZST(PARQUET)[:-50], "not a whole compressed file"),
    "plain.csv.gz": (TABLE, "not a whole compressed file"),
    "packed.jsonl": (GZ(LINES_JSON), "rename it to"),
    "text.parquet": (LINES, "not a parquet file"),
    "cut.parquet": (PARQUET[:-20], "cannot be read as parquet"),
    "a.pdf": (b"x", "unknown kind of file, .pdf"),
    "README": (b"x", "unknown kind of file, without a suffix"),
}


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("name", UNREADABLE)
def test_a_file_that_cannot_be_read(name, streaming, tmp_path):
    content, expected = UNREADABLE[name]
    (tmp_path / name).write_bytes(content)
    good = write(tmp_path, "good.txt")

    def read_all(**arguments):
        text = corpus.load_text(DataArguments(**arguments), ["train"], str(tmp_path / "cache"))["train"]
        list(text)

    message = refusal(read_all, train_file=[str(tmp_path / name)], validation_file=[good], streaming=streaming)
    assert expected in message
    assert name in message or "--text_column" in message


def test_a_row_that_ends_too_early(tmp_path, load):
    file = tmp_path / "a.csv"
    file.write_text("id,text\n1,one\n2,two\nhalf of a line\n3,three\n")
    assert "line 4 has 1 columns, its header 2" in refusal(load, train_file=[str(file)])
    file.write_text("id,text\n" + "1,one\n2,\n" * 20)  # empty fields are no mistake
    assert load(train_file=[str(file)], validation_split_percentage=5)["train"].count(None) == 19


def test_files_that_are_not_there(tmp_path, load):
    text, table = write(tmp_path, "a.txt"), write(tmp_path, "a.csv")
    assert refusal(load, train_file=["/no/file.txt"]) == "--train_file /no/file.txt: no such file"
    assert "download it first" in refusal(load, train_file=["https://example.org/file.txt"])
    assert refusal(load, train_file=["/no/*.txt"]) == "--train_file /no/*.txt: matches no file"
    assert "--validation_file /no/file.txt" in refusal(load, train_file=[text], validation_file=["/no/file.txt"])
    folder = refusal(load, train_file=[str(tmp_path)])
    assert "is a folder" in folder and f"{tmp_path}/*.txt" in folder and "--dataset_name" in folder
    mixed = refusal(load, train_file=[text, table])
    assert "different kinds" in mixed and text in mixed and table in mixed
    assert "different kinds" in refusal(load, train_file=[table, write(tmp_path, "a.tsv")])


# ---- several files by weight ----
def mix(tmp_path, **more) -> dict:
    for name, count in (("a", 30), ("b", 300)):
        (tmp_path / f"{name}.txt").write_text("".join(f"{name} {number}\n" for number in range(count)))
    arguments = {"data_mix": [f"{tmp_path / 'a.txt'}=3", f"{tmp_path / 'b.txt'}=1"], **more}
    return corpus.load_text(DataArguments(**arguments), ["train", "validation"], str(tmp_path / "cache"), seed=7)


@pytest.mark.parametrize("streaming", [False, True])
def test_a_mix_draws_by_weight_until_all_is_read(tmp_path, streaming):
    text = mix(tmp_path, streaming=streaming, validation_split_percentage=10)
    train = [row["text"].strip() for row in text["train"]]
    validation = [row["text"].strip() for row in text["validation"]]
    of_a = [document for document in train if document.startswith("a")]
    assert len(of_a) / len(train) == pytest.approx(0.75, abs=0.05)
    assert set(train) | set(validation) == {f"a {i}" for i in range(30)} | {f"b {i}" for i in range(300)}
    assert not set(train) & set(validation)
    # In each file's own order, again and again.
    first = of_a[: len(set(of_a))]
    assert of_a == (first * (len(of_a) // len(first) + 1))[: len(of_a)]
    assert train == [row["text"].strip() for row in text["train"]]


def test_a_mix_with_a_validation_file_keeps_it(tmp_path):
    (tmp_path / "v.txt").write_text("v\n")
    assert mix(tmp_path, validation_file=[str(tmp_path / "v.txt")])["validation"]["text"] == ["v\n"]


@pytest.mark.parametrize("part", ["a.txt", "a.txt=0", "a.txt=-1", "a.txt=x", "=1", "a.txt=inf"])
def test_a_part_of_a_mix_without_a_weight_is_refused(part):
    with pytest.raises(UsageError, match="--data_mix"):
        DataArguments(data_mix=[part])


def test_a_mix_and_another_source_are_refused():
    with pytest.raises(UsageError, match="give one source"):
        DataArguments(data_mix=["a.txt=1"], train_file=["b.txt"])
