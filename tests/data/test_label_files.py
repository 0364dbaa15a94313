"""Label files as programs write them, read without images."""

from __future__ import annotations

import codecs
import json
from pathlib import Path

import pytest

from moco.csv_files import csv_text, guarded, unguarded
from moco.data.label_meaning import ClassNames
from moco.errors import LONGEST, UserError
from moco.labels.label_files import read_lines, read_table

ROWS = [["image", "label"], ["1.png", "Möwe"], ["2.png", ""], ["17.png", "3.0"]]


def text(separator: str = ",", rows: list[list[str]] = ROWS) -> str:
    return "".join(separator.join(row) + "\n" for row in rows)


def read(path: Path, content: str | bytes) -> tuple[list[tuple[str, str]], list[str]]:
    """(name, label) of each line, and what was said."""
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    said: list[str] = []
    return [(line.name, line.label) for line in read_lines(path, said.append)], said


def refused(path: Path, content: str | bytes) -> UserError:
    with pytest.raises(UserError) as caught:
        read(path, content)
    error = caught.value
    line = f"error: {error} [{error.code}]"
    assert len(line) <= LONGEST and line.isprintable() and str(path)[:50] in line
    return error


WRITTEN = {
    "comma": text(),
    "semicolons, as a German spreadsheet": text(";"),
    "tabs": text("\t"),
    "a line that names the separator": "sep=;\n" + text(";"),
    "Windows' line ends": text().replace("\n", "\r\n"),
    "UTF-8 with its mark": codecs.BOM_UTF8 + text().encode(),
    "UTF-16": text("\t").encode("utf-16"),
    "UTF-16, big end first": codecs.BOM_UTF16_BE + text("\t").encode("utf-16-be"),
    "empty last rows": text(";") + ";\n;\n  ; \n\n",
    "pandas' index": "," + text().replace("\n", "\n0,", 3),
    "empty columns": text().replace("\n", ",,\n"),
    "quotes": text().replace("1.png", '"1.png"').replace("image", '"image"'),
    "other columns": "label,by,image\nMöwe,me,1.png\n,,2.png\n3.0,,17.png\n",
}
ARRAY = [{"image": "1.png", "label": "Möwe"}, {"image": "2.png", "label": None}, {"image": "17.png", "label": 3.0}]
JSON = {
    "a list": ARRAY,
    "an object of lists": {name: [row[name] for row in ARRAY] for name in ("image", "label")},
    "pandas' object of objects": {
        name: {str(number): row[name] for number, row in enumerate(ARRAY)} for name in ("image", "label")
    },
}


@pytest.mark.fault("odd-tables", 1)
@pytest.mark.parametrize("form", WRITTEN)
def test_a_table_is_read_as_programs_write_it(form: str, tmp_path: Path) -> None:
    for name in ("labels.csv", "labels.tsv", "labels.txt"):
        assert read(tmp_path / name, WRITTEN[form]) == ([(row[0], row[1]) for row in ROWS[1:]], [])


@pytest.mark.fault("odd-tables", 1)
@pytest.mark.parametrize("form", JSON)
def test_json_is_read_in_every_form(form: str, tmp_path: Path) -> None:
    expected = [(row[0], row[1]) for row in ROWS[1:]]
    for indent in (None, 2):
        for encoding in ("utf-8", "utf-8-sig", "utf-16"):
            content = json.dumps(JSON[form], ensure_ascii=False, indent=indent).encode(encoding)
            assert read(tmp_path / "labels.json", content) == (expected, []), (indent, encoding)
    lines = "\n".join(json.dumps(row) for row in ARRAY)
    assert read(tmp_path / "labels.json", lines) == read(tmp_path / "labels.jsonl", lines) == (expected, [])
    assert read(tmp_path / "labels.jsonl", '{"image": "a\u2028b.png", "label": 1}') == ([("a\u2028b.png", "1")], [])


@pytest.mark.fault("odd-tables", 1)
def test_windows_old_encoding_is_a_guess_and_told(tmp_path: Path) -> None:
    found, said = read(tmp_path / "labels.csv", text(";").encode("cp1252"))
    assert found[0] == ("1.png", "Möwe")
    assert len(said) == 1 and "labels.csv:2" in said[0] and "cp1252" in said[0] and "guess" in said[0]


@pytest.mark.fault("odd-tables", 12)
def test_what_is_no_label_file_says_how_to_get_one(tmp_path: Path) -> None:
    for name, content, code in (
        ("labels.xlsx", b"PK\x03\x04rest", "E-LABEL-WORKBOOK"),
        ("labels.xls", b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1", "E-LABEL-WORKBOOK"),
        ("labels.csv", b"\x1f\x8b\x08", "E-LABEL-WORKBOOK"),
        ("labels.csv", text().encode("utf-16-le"), "E-LABEL-FILE"),
        ("labels.csv", b"image,label\n1.png,\x81\xff\n", "E-LABEL-FILE"),
        ("labels.csv", "", "E-LABEL-HEADER"),
        ("labels.csv", "image;label;label\n", "E-LABEL-HEADER"),
        ("labels.csv", "picture,label\n1.png,2\n", "E-LABEL-HEADER"),
        ("labels.csv", "image;label\n1.png,2\n", "E-LABEL-ROW"),
        ("labels.csv", "image,label\n1,png,2\n", "E-LABEL-ROW"),
        ("labels.json", '[{"image": "1.png", "label": 1},]', "E-LABEL-FILE"),
        ("labels.json", '{"image": ["1.png", "2.png"], "label": [1]}', "E-LABEL-ROW"),
        ("labels.json", '{"17.png": 3}', "E-LABEL-ROW"),
        ("labels.jsonl", '{"image": "1.png", "label": 1, "image": "2.png"}', "E-LABEL-FILE"),
        ("labels.jsonl", '{"image": "1.png", "label": 2.5}', "E-LABEL-ROW"),
        ("labels.jsonl", '{"image": "1.png", "label": true}', "E-LABEL-ROW"),
    ):
        assert refused(tmp_path / name, content).code == code, (name, content)


@pytest.mark.fault("odd-tables", 1)
def test_what_a_folder_of_label_files_leaves_out_is_told(tmp_path: Path) -> None:
    folder, said = tmp_path / "rounds", list[str]()
    folder.mkdir()
    (folder / "1.tsv").write_text(text("\t"))
    (folder / "2.json").write_text(json.dumps(ARRAY))
    (folder / "notes.txt").write_text("image,label\n9.png,1\n")
    assert len(read_lines(folder, said.append)) == 6
    assert len(said) == 1 and "1 file(s)" in said[0] and "notes.txt" in said[0]
    (folder / "3.xlsx").write_bytes(b"PK\x03\x04")
    with pytest.raises(UserError) as caught:
        read_lines(folder, said.append)
    assert caught.value.code == "E-LABEL-WORKBOOK"


@pytest.mark.fault("long-cells", 8)
def test_no_message_is_longer_than_300_characters(tmp_path: Path) -> None:
    """A JSON array in a file called .csv was once quoted whole: 114 kB on one line."""
    long = "x" * 120_000
    array = json.dumps([{"image": f"{number}.png", "label": 1} for number in range(3000)])
    assert "E-LABEL-HEADER" in refused(tmp_path / "labels.csv", array).code
    for name, content in (
        ("labels.csv", f"{long},label\n"),
        ("labels.csv", f"image,label,{long}\n1.png\n"),
        ("labels.csv", f"image,label,{long * 2}\n1.png,2\n"),
        ("labels.jsonl", f'{{"image": {{"a": "{long}"}}, "label": 1}}'),
        ("labels.jsonl", "\u0007" * 5000),
    ):
        refused(tmp_path / name, content)
    with pytest.raises(UserError) as caught:
        ClassNames([long, "b" * 200, *map(str, range(20, 200))]).find("labels.csv:2", long[1:])
    assert len(f"error: {caught.value} [{caught.value.code}]") <= LONGEST
    with pytest.raises(UserError) as caught:
        raise UserError("params.yaml:3: " + "\n" * 400 + "; set data.path")
    assert len(f"error: {caught.value}") <= LONGEST
    assert str(caught.value).startswith("params.yaml:3:") and str(caught.value).endswith("; set data.path")


@pytest.mark.fault("numbers-as-names", 12)
def test_where_names_are_numbers_a_label_is_a_name(tmp_path: Path) -> None:
    padded = [f"{number:02}" for number in range(1, 11)]
    for classes, label in (
        (padded, "1"), (padded, "0"), (padded, "1.0"), (padded, "1e0"), (padded, "001"), (["1", "2", "3"], "0"),
        (["1.0", "2.0"], "1"), (["1e3", "2e3"], "1"), (["true", "false"], "1"), (["cat", "3"], "0"),
        (["-1", "1"], "0"), ([" 1", "cat"], "0"), (["1,5", "2,5"], "1"), (["\u0661", "\u0662"], "1"),
    ):  # fmt: skip
        with pytest.raises(UserError) as caught:
            ClassNames(classes).find("labels.csv:2", label)
        assert caught.value.code == "E-LABEL-NUMBERS" and "labels.csv:2" in str(caught.value), (classes, label)
        assert classes[0] in str(caught.value), "the table of names"
    with pytest.raises(UserError, match="did you mean '01'"):
        ClassNames(padded).find("labels.csv:2", "1")


@pytest.mark.fault("numbers-as-names", 14)
def test_what_a_label_means(tmp_path: Path) -> None:
    plain, numbers = ["cat", "Cat", "01b", "caf\u00e9 "], [str(number) for number in range(12)]
    for classes, label, expected in (
        (plain, "Cat", (1, False)), (plain, " cat ", (0, False)), (plain, "cafe\u0301", (3, False)),
        (plain, "caf\u00e9 ", (3, False)), (plain, "1", (1, True)), (plain, "1.0", (1, True)),
        (plain, "3,0", (3, True)), (plain, "03", (3, True)), (numbers, "11", (11, False)), (numbers, "3.0", (3, False)),
        (numbers, "03", (3, True)), (["1", "2", "3"], "3.0", (2, False)), (["1", "2", "3"], "1", (0, False)),
        (["01", "1"], "1", (1, False)), (["a", "a "], "a ", (1, False)),
    ):  # fmt: skip
        assert ClassNames(classes).find("here", label) == expected, (classes, label)
    for classes, label, code in (
        (plain, "CAT", "E-LABEL-CLASS"), (plain, "4", "E-LABEL-RANGE"), (plain, "-1", "E-LABEL-RANGE"),
        (plain, "1.5", "E-LABEL-CLASS"), (plain, "1e0", "E-LABEL-CLASS"), (["a", "a "], " a", "E-LABEL-CLASS"),
        (numbers, "12", "E-LABEL-RANGE"),
    ):  # fmt: skip
        with pytest.raises(UserError) as caught:
            ClassNames(classes).find("here", label)
        assert caught.value.code == code, (classes, label)


NAMES = [
    "=HYPERLINK(\"http://a\").png", "+1.png", "-2+3.png", "@SUM(A1).png", "\t=1.png", "\r=1.png", "'=1.png", "''=1.png",
    "-0.5", "'-0.5", "'quoted'.png", "a;=1.png", "a;'=1.png", "a\t@b.png", "a\n=b.png", "\uff1d1+1", "plain, name.png",
    ' "q".png', "-", "=", "'",
]  # fmt: skip


@pytest.mark.fault("formulas", 21)
def test_names_that_begin_like_formulas_are_written_as_text_and_read_as_they_were(tmp_path: Path) -> None:
    path = tmp_path / "request.csv"
    path.write_text(csv_text([["image", "label"], *([name, "-0.5"] for name in NAMES)]), newline="")
    assert [line.name for line in read_table(path, lambda _: None).lines()] == NAMES
    assert {line.label for line in read_table(path, lambda _: None).lines()} == {"-0.5"}
    for name in NAMES:
        safe = guarded(name)
        assert unguarded(safe) == name
        for cell in [safe, *safe.replace("\n", ";").replace("\t", ";").split(";")[1:]]:  # as other readers split it
            assert name == "-0.5" or cell[:1] not in (*"=+-@\t\r\uff1d", ""), (name, safe)
    assert guarded("-1.5e-05") == "-1.5e-05" and guarded("name-of=a+file.png") == "name-of=a+file.png"
