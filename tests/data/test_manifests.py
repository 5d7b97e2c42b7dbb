"""Tables as spreadsheets save them."""

from __future__ import annotations

import pytest

from tl_keras.data.manifests import has_control, one_spelling, read_table
from tl_keras.errors import UserError


def read(folder, content: bytes):
    (folder / "t.csv").write_bytes(content)
    return read_table(folder / "t.csv", asked="--slices=t.csv")


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
@pytest.mark.parametrize("delimiter", [",", ";", "\t"])
def test_what_spreadsheets_write_is_read(tmp_path, encoding, delimiter):
    text = f'Path {delimiter}Label\r\n a b.jpg {delimiter}"x\ny"\r\n'
    table = read(tmp_path, text.encode(encoding))
    assert table.names == {"path": "Path", "label": "Label"}
    assert (table.rows[0][0], table.cell(0, "path"), table.cell(0, "label"), table.cell(0, "split")) == (
        3,
        "a b.jpg",
        "x\ny",
        "",
    )


@pytest.mark.parametrize(
    ("content", "ids"),
    [
        (b"id,path\n1,a.jpg\n2,b.jpg\n", ["1", "2"]),
        (b"id,path\n,./a.jpg\n,x/../b.jpg\n", ["a.jpg", "b.jpg"]),
        (b"id,x\n1,y\n1,z\n", ["1", "1"]),
        (b"path\nsub\\a.jpg\n\n", ["sub/a.jpg"]),
        ("path\ncafe\u0301.jpg\n".encode(), ["caf\u00e9.jpg"]),
    ],
)
def test_ids_are_given_or_tidy_paths(tmp_path, content, ids):
    assert read(tmp_path, content).ids() == ids


def test_a_backslash_that_is_in_a_files_name_stays(tmp_path):
    (tmp_path / "a\\b.jpg").write_text("")
    assert read(tmp_path, b"path\na\\b.jpg\n").file(0) == "a\\b.jpg"


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (b"caf\xe9\n", "t.csv is not UTF-8: "),
        (b'id,camera\n1,"A\n' + b"x" * 200_000, "is not valid CSV: field larger than field limit"),
        (b"id,Camera,camera\n1,A,B\n", "t.csv has several columns with the same name: Camera, camera. Rename them."),
    ],
)
def test_what_is_no_such_table(tmp_path, content, text):
    with pytest.raises(UserError) as caught:
        read(tmp_path, content)
    assert text in str(caught.value)
    with pytest.raises(UserError, match="--slices=gone.csv can't be read: No such file or directory. Check the path."):
        read_table(tmp_path / "gone.csv", asked="--slices=gone.csv")


def test_spellings_and_control_characters():
    assert one_spelling("cafe\u0301") == "caf\u00e9"
    assert [has_control(text) for text in ("a b", "a\u00a0\u202fb", "a\nb", "a\udcffb", "a\u2028b")] == [
        False,
        False,
        True,
        True,
        True,
    ]
