"""The place that keeps a file from being read is the one that Python's own readers name."""

import re

import pytest
import text_files
from hypothesis import given, settings
from hypothesis import strategies as st

from utils import file_diagnosis
from utils.errors import UsageError
from utils.file_diagnosis import check_encoding, check_short_rows, diagnose

BUILDERS = {"txt": "text", "raw": "text", "csv": "csv", "tsv": "csv", "json": "json", "jsonl": "json"}


def refusal(check, *arguments) -> str:
    with pytest.raises(UsageError) as caught:
        check(*map(str, arguments))
    assert "\n" not in str(caught.value)
    return str(caught.value)


# ---- encoding ----
def expected_offset(content: bytes) -> int | None:
    try:
        content.decode()
    except UnicodeDecodeError as error:
        return error.start
    return None


# Whole characters, broken ones, and what borders on them.
PIECES = st.one_of(
    st.binary(max_size=4),
    st.text(max_size=3).map(lambda text: text.encode("utf-8")),
    st.sampled_from(
        [b"\xe4\xbd", b"\xf0\x9f\x98", b"\xed\xa0\x80", b"\xc3", b"\xf4\x90\x80\x80", b"\xc0\x80", b"\xff"]
    ),
)


@settings(max_examples=400, deadline=None)
@given(content=st.lists(PIECES, max_size=12).map(b"".join), chunk=st.integers(1, 9))
def test_the_offset_is_that_of_decode(content, chunk, tmp_path_factory):
    file = tmp_path_factory.getbasetemp() / "bytes.txt"
    file.write_bytes(content)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(file_diagnosis, "CHUNK", chunk)
        if (offset := expected_offset(content)) is None:
            check_encoding(str(file))
        else:
            message = refusal(check_encoding, file)
            assert f"byte 0x{content[offset]:02x} at byte offset {offset};" in message
            assert f"iconv -f LATIN1 -t UTF-8 {file}" in message


@pytest.mark.parametrize("compression", text_files.COMPRESS)
@pytest.mark.parametrize("before", range(-4, 4))
def test_a_character_across_the_border_of_two_chunks(before, compression, tmp_path):
    start = b"x" * (file_diagnosis.CHUNK + before)
    file = tmp_path / f"a.txt{compression}"
    file.write_bytes(text_files.COMPRESS[compression](start + "😀ü".encode() + b"\n"))
    check_encoding(str(file))
    for broken in (b"\xf0\x9f\x98 ", b"\xf0\x9f\x98"):  # followed by something, and cut off
        file.write_bytes(text_files.COMPRESS[compression](start + broken))
        assert f"byte 0xf0 at byte offset {len(start)};" in refusal(check_encoding, file)


# ---- form ----
@pytest.mark.parametrize("compression", text_files.COMPRESS)
@pytest.mark.parametrize("kind", text_files.KINDS)
def test_nothing_is_found_in_a_good_file(kind, compression, tmp_path):
    file = text_files.write(tmp_path, kind + compression)
    diagnose(file, BUILDERS.get(kind.split(".")[1], "parquet"))


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("bom.json", b'\xef\xbb\xbf[\n{"text": "a"}]'),
        ("strings.json", b'["a", "b"]'),
        ("blank.jsonl", b'{"text": "a"}\n\n \n{"text": "b"}'),
        ("bom.csv", b"\xef\xbb\xbftext\na\n"),
        ("long.csv", b'text\n"' + b"x" * 200_000 + b'"\n'),
        ("breaks.csv", b'id,text\n1,"a\nb, c"\n'),
        ("table.TSV", b"text\ta\nb, c\td\n"),
    ],
)
def test_odd_but_good(name, content, tmp_path):
    (tmp_path / name).write_bytes(content)
    diagnose(str(tmp_path / name), BUILDERS[name.split(".")[1].lower()])


@pytest.mark.parametrize(
    ("name", "content", "place"),
    [
        ("a.jsonl", b'{"text": "a"}\n\n{"text": oops}\n', "line 3 is not JSON: Expecting value at column 10"),
        ("a.json", b'[{"text": "a"},\n\n{"text": oops}]', "line 3 is not JSON: Expecting value at column 10"),
        ("bom.json", b'\xef\xbb\xbf \n[{"text": "a"},\n{"text": oops}]', "line 3 is not JSON"),
        ("mixed.json", b'[{"text": "a"}, "b"]', "item 2"),
        ("a.csv", b'id,text\n1,"a\nb"\n2,c,d\n', "line 4 has 3 columns, its header 2"),
        ("of.tsv.csv", b"id,text\n1,a\t\n2,c,d\n", "line 3 has 3 columns, its header 2"),
        ("a.tsv", b"id\ttext\n1\ta,b\n2\tc\td\n", "line 3 has 3 columns, its header 2"),
        ("a.parquet", b"text", "PAR1"),
        ("a.txt", b"a\n\0", "byte offset 2"),
    ],
)
@pytest.mark.parametrize("compression", text_files.COMPRESS)
def test_the_place_is_named(name, content, place, compression, tmp_path):
    folder = tmp_path / "a.tsv"  # a folder's name says nothing of its files
    folder.mkdir()
    file = folder / f"{name}{compression}"
    file.write_bytes(text_files.COMPRESS[compression](content))
    message = refusal(diagnose, file, BUILDERS.get(name.split(".")[-1], "parquet"))
    assert place in message and message.startswith(f"{file}: ")


def test_rows_without_the_column(tmp_path):
    file = tmp_path / "a.csv"
    file.write_text('text,id\n"a\nb",1\nc\n')
    check_short_rows(str(file), "text")
    check_short_rows(str(file), "no such column")
    assert re.search(
        r"line 4 has 1 columns, its header 2, so that 'id' is missing", refusal(check_short_rows, file, "id")
    )


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
@pytest.mark.parametrize("builder", ["text", "csv", "json", "parquet"])
def test_a_damaged_file_is_called_damaged(builder, suffix, tmp_path):
    content = b"text\n" + b"".join(b"%032x\n" % (i**19 % (2**127 - 1)) for i in range(9000))
    whole = text_files.COMPRESS[suffix](b"PAR1" + content if builder == "parquet" else content)
    file = tmp_path / f"a{suffix}"
    file.write_bytes(whole[:20])
    assert "is not a whole compressed file" in refusal(diagnose, file, builder)
    if builder != "parquet":  # of which only the start is looked at
        file.write_bytes(whole[:-20])
        assert "is not a whole compressed file" in refusal(diagnose, file, builder)
