import json
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pypdf import PdfWriter
from pypdf.generic import DecodedStreamObject, DictionaryObject, NameObject

from kvrag.documents import load, passed_over, split
from kvrag.errors import ConfigError, InputError, MissingExtra


def words(text: str) -> list[str]:
    return text.split()


def write_pdf(path: Path, pages: list[str]) -> None:
    writer = PdfWriter()
    for text in pages:
        page = writer.add_blank_page(300, 300)
        font = DictionaryObject(
            {
                NameObject("/Type"): NameObject("/Font"),
                NameObject("/Subtype"): NameObject("/Type1"),
                NameObject("/BaseFont"): NameObject("/Helvetica"),
            }
        )
        page[NameObject("/Resources")] = DictionaryObject(
            {NameObject("/Font"): DictionaryObject({NameObject("/F1"): font})}
        )
        stream = DecodedStreamObject()
        stream.set_data(f"BT /F1 12 Tf 20 200 Td ({text}) Tj ET".encode())
        page[NameObject("/Contents")] = writer._add_object(stream)
    writer.write(path)


def test_folders_are_read_sorted_and_recursively(tmp_path: Path) -> None:
    (tmp_path / "b.md").write_text("# B")
    (tmp_path / "a.txt").write_text("A")
    (tmp_path / "z.bin").write_bytes(b"\xff")
    (tmp_path / ".hidden.txt").write_text("no")
    (tmp_path / ".git").mkdir()
    (tmp_path / ".git" / "x.txt").write_text("no")
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "C.MARKDOWN").write_text("C")
    found = list(load([tmp_path]))
    assert [d.text for d in found] == ["A", "# B", "C"]
    assert [Path(d.source).name for d in found] == ["a.txt", "b.md", "C.MARKDOWN"]
    assert passed_over([tmp_path, tmp_path / "z.bin"]) == [tmp_path / "z.bin"]  # named itself, it is refused


def test_text_is_kept_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes("\ufeffone\r\n\r\ntwo e\u0301\u2028 ".encode())
    assert next(load([tmp_path / "a.txt"])).text == "one\r\n\r\ntwo e\u0301\u2028 "


def test_json_lines(tmp_path: Path) -> None:
    rows = [{"text": "one\u2028\u0085line", "title": "T", "id": 7}, {"text": "two"}]
    path = tmp_path / "a.jsonl"
    path.write_text("\n\n".join(json.dumps(row, ensure_ascii=False) for row in rows) + "\n", encoding="utf-8")
    one, two = load([path])
    assert (one.text, one.metadata, one.source) == (
        "one\u2028\u0085line",
        {"title": "T", "id": 7},
        f"{path}#line=1",
    )
    assert (two.text, two.source) == ("two", f"{path}#line=3")


def test_pdf(tmp_path: Path) -> None:
    write_pdf(tmp_path / "a.pdf", ["Hello first page", " ", "Third"])
    one, three = load([tmp_path / "a.pdf"])
    assert one.text.strip() == "Hello first page"
    assert three.metadata == {"page": 3}
    assert three.source.endswith("a.pdf#page=3")


def test_pdf_without_pypdf(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_pdf(tmp_path / "a.pdf", ["x"])
    monkeypatch.setitem(sys.modules, "pypdf", None)
    with pytest.raises(MissingExtra, match=r"kvrag\[pdf\]"):
        list(load([tmp_path]))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"good \xff bad", "byte 5"),
        ("a.jsonl", b'{"text": "a"}\n{"text": \n', "line 2: not JSON"),
        ("a.jsonl", b'{"text": 5}', 'line 1: expected an object with "text"'),
        ("a.jsonl", b'["text"]', "line 1"),
        ("a.docx", b"PK", "cannot read this type"),
        ("a.pdf", b"not a pdf", "cannot be read as PDF"),
    ],
)
def test_files_that_cannot_be_read(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=message) as error:
        list(load([tmp_path / name]))
    assert name in str(error.value)


def test_a_path_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such file"):
        list(load([tmp_path / "nothing"]))


TEXT = "One two three.\n\nFour five. Six seven eight nine ten.\n \nEleven twelve.\n\n\n\nThirteen."


def test_paragraphs_are_packed_up_to_the_target() -> None:
    assert split(TEXT, words, 100) == [TEXT]
    assert split(TEXT, words, 100, target=10) == [
        "One two three.\n\nFour five. Six seven eight nine ten.",
        "Eleven twelve.\n\n\n\nThirteen.",
    ]


def test_long_paragraphs_are_cut_at_sentences_then_words_then_anywhere() -> None:
    assert split(TEXT, words, 5)[1:4] == [
        "Four five.",
        "Six seven eight nine ten.",
        "Eleven twelve.\n\n\n\nThirteen.",
    ]
    assert split("a b c d e", words, 2) == ["a b", "c d", "e"]
    assert split("abcdefgh", list, 3) == ["abc", "def", "gh"]


def test_every_paragraph_its_own_chunk() -> None:
    assert split(TEXT, words, 100, by="paragraph") == [
        "One two three.",
        "Four five. Six seven eight nine ten.",
        "Eleven twelve.",
        "Thirteen.",
    ]
    assert len(split(TEXT, words, 5, by="paragraph")) == 5


def test_what_cannot_be_split() -> None:
    assert split(" \n\n ", words, 5) == []
    with pytest.raises(ConfigError, match="at least 1"):
        split("a", words, 0)
    with pytest.raises(ConfigError, match="alone has more"):
        split("é", str.encode, 1)
    with pytest.raises(ConfigError, match="by="):
        split("a", words, 1, by="page")  # type: ignore[arg-type]  # what is tested


PIECES = st.sampled_from(
    ["word", "Ende.", "é", " ", "  ", "\n", "\n\n", "\r\n\r\n", "。", "?", '"', "日本語", "\u2028", "x" * 30]
)


@given(
    st.lists(PIECES, max_size=60).map("".join),
    st.integers(4, 40),
    st.integers(4, 40),
    st.sampled_from(["size", "paragraph"]),
)
def test_chunks_are_verbatim_bounded_and_complete(text: str, limit: int, target: int, by: str) -> None:
    chunks = split(text, str.encode, limit, target=target, by=by)  # type: ignore[arg-type]  # from a strategy
    at = 0
    for chunk in chunks:
        assert chunk
        assert chunk == chunk.strip()
        assert len(chunk.encode()) <= limit
        found = text.index(chunk, at)
        assert not text[at:found].strip()
        at = found + len(chunk)
    assert not text[at:].strip()
