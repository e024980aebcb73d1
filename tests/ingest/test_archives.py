"""Archives: members are read in place, byte for byte, and hostile or damaged archives are refused with the reason."""

import errno
import io
import os
import pickle
import stat
import struct
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from milan.core.errors import UserError
from milan.ingest import archives
from milan.ingest.archives import File, ParquetRow, list_files, parquet_rows, tar_members, tar_texts, zip_members
from tests.conftest import forked
from tests.layouts import WORDS, parquet, tar, zipped

CONTENT = {"b.JPEG": b"bbb", "a.JPEG": b"a" * 700, "empty": b""}


def saved(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


# Tars.


@pytest.mark.parametrize("format", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT, tarfile.USTAR_FORMAT])
def test_a_tar_is_read_in_place_in_its_order(tmp_path, format):
    long = {**CONTENT, "n" * 90 + "/" + "x" * 90 + "é.JPEG": b"long"}
    spans = tar_members(saved(tmp_path / "a.tar", tar(long, format)))
    assert [(span.name, span.read()) for span in spans] == list(long.items())


def test_a_tar_in_a_tar_is_read_in_place(tmp_path):
    outer = saved(tmp_path / "outer.tar", tar({"one.tar": tar({"x": b"1"}), "two.tar": tar(CONTENT), "note": b"n"}))
    two = tar_members(outer)[1]
    spans = tar_members(outer, two)
    assert [(span.name, span.read()) for span in spans] == list(CONTENT.items())
    assert str(spans[0]) == "outer.tar: b.JPEG"
    data = outer.read_bytes()
    assert data[spans[1].offset : spans[1].offset + 700] == b"a" * 700


def test_a_tar_with_two_members_of_one_name_is_refused(tmp_path):
    """As `tar --append` makes it of a file that is in the archive: an image would count twice."""
    path = saved(tmp_path / "twice.tar", tar(CONTENT))
    with tarfile.open(path, "a") as archive:
        archive.addfile(tarfile.TarInfo("empty"))
    with pytest.raises(UserError, match=r"twice\.tar has several members of one name: empty\. Make it again from the files\."):
        tar_members(path)


def test_folders_in_a_tar_are_left_out(tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        folder = tarfile.TarInfo("./some")
        folder.type = tarfile.DIRTYPE
        archive.addfile(folder)
        member = tarfile.TarInfo("./some/x")
        member.size = 1
        archive.addfile(member, io.BytesIO(b"x"))
    assert [(span.name, span.read()) for span in tar_members(tmp_path / "a.tar")] == [("./some/x", b"x")]


@pytest.mark.parametrize("name", ["../x.JPEG", "/etc/x.JPEG", "a/../../x.JPEG", "..", "a\\..\\x.JPEG"])
def test_a_name_that_leads_out_of_the_archive_is_refused(tmp_path, name):
    path = saved(tmp_path / "a.tar", tar({"good": b"1", name: b"2"}))
    with pytest.raises(UserError, match=r"a\.tar has a member named .*x?"):
        tar_members(path)
    zipped(tmp_path / "a.zip", {name: b"2"}, top="")
    with pytest.raises(UserError, match=r"a\.zip has a member named"):
        zip_members(tmp_path / "a.zip")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.tar", "a.zip"]


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE, tarfile.GNUTYPE_SPARSE])
def test_a_member_that_is_no_plain_file_is_refused(tmp_path, kind):
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        member = tarfile.TarInfo("x.JPEG")
        member.type, member.linkname = kind, "/etc/passwd"
        archive.addfile(member)
    with pytest.raises(UserError, match=r"no plain file: 'x\.JPEG'"):
        tar_members(tmp_path / "a.tar")


def whole_tar() -> bytes:
    """Return a tar of CONTENT: header (512 bytes), 3 bytes in 512, header, 700 bytes in 1024, header, end."""
    return tar(CONTENT)


@pytest.mark.parametrize("length", [0, 100, 512, 600, 1024, 1100, 1536, 2000, 2559, 2560, 2700, 3071, 3072])
def test_a_truncated_tar_is_refused_wherever_it_ends(tmp_path, length):
    with pytest.raises(UserError, match=r"a\.tar is not a complete, uncompressed tar .*: fetch .*a\.tar again"):
        tar_members(saved(tmp_path / "a.tar", whole_tar()[:length]))


@pytest.mark.parametrize("place", [0, 1024])
def test_a_broken_header_is_not_the_end(tmp_path, place):
    """tarfile takes it for the end of the archive."""
    data = whole_tar()
    with pytest.raises(UserError, match="is not a complete, uncompressed tar"):
        tar_members(saved(tmp_path / "a.tar", data[:place] + b"\xff" * 512 + data[place + 512 :]))


def test_a_tar_that_exceeds_its_range_in_the_outer_one_is_refused(tmp_path):
    """The inner tar has lost its end, and the bytes behind it in the outer tar are not its own."""
    outer = saved(tmp_path / "outer.tar", tar({"one.tar": tar({"x": b"1"})[:1024], "two.tar": tar(CONTENT)}))
    with pytest.raises(UserError, match=r"outer\.tar: one\.tar is not a complete, uncompressed tar .*fetch .*outer\.tar again"):
        tar_members(outer, tar_members(outer)[0])


def with_size(data: bytes, field: bytes) -> bytes:
    """Replace the size in a tar's first header, and correct the header's checksum."""
    header = bytearray(data[:512])
    header[124:136] = field
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    return bytes(header) + data[512:]


@pytest.mark.parametrize(
    "field", [b"\xff" * 12, b"\xff" * 10 + b"\xfc\x00", b"77777777777\0", b"zzzzzzzzzzz\0", b"\x80" + b"\x7f" * 11]
)
def test_false_sizes_are_refused(tmp_path, field):
    """Below zero (an endless loop in tarfile), larger than the file, no number."""
    with pytest.raises(UserError, match="is not a complete, uncompressed tar"):
        tar_members(saved(tmp_path / "a.tar", with_size(whole_tar(), field)))


def test_damage_of_a_tar_never_ends_in_a_traceback(tmp_path):
    data = tar({**CONTENT, "é" * 60: b"1"}, tarfile.PAX_FORMAT)
    refused = 0
    for place in np.random.default_rng(0).integers(0, len(data), 300):
        try:
            spans = tar_members(saved(tmp_path / "a.tar", data[:place] + bytes([data[place] ^ 0xFF]) + data[place + 1 :]))
            assert all(0 <= span.offset <= span.offset + span.size <= len(data) for span in spans)
        except UserError:
            refused += 1
    assert refused > 30


def test_a_compressed_tar_is_refused_as_such(tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w:gz") as archive:
        archive.addfile(tarfile.TarInfo("x"))
    with pytest.raises(UserError, match="uncompressed"):
        tar_members(tmp_path / "a.tar")


def test_a_member_of_an_archive_that_has_shrunk_cannot_be_read(tmp_path):
    path = saved(tmp_path / "a.tar", whole_tar())
    spans = tar_members(path)
    path.write_bytes(whole_tar()[:1600])
    assert spans[0].read() == b"bbb"
    with pytest.raises(ValueError, match="ends inside it"):
        spans[1].read()
    path.unlink()
    with pytest.raises(OSError):
        spans[0].read()


def test_small_texts_of_a_compressed_tar(tmp_path):
    with tarfile.open(tmp_path / "kit.tar.gz", "w:gz") as archive:
        for name, data in {"kit/data/b.txt": b"bee", "kit/data/a.txt": b"ay"}.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    path = tmp_path / "kit.tar.gz"
    assert tar_texts(path, "data/a.txt", "data/b.txt") == [b"ay", b"bee"]
    with pytest.raises(UserError, match=r"kit\.tar\.gz holds no data/c\.txt"):
        tar_texts(path, "data/c.txt")
    saved(path, path.read_bytes()[:60])
    with pytest.raises(UserError, match=r"kit\.tar\.gz cannot be read"):
        tar_texts(path, "data/a.txt")


def test_a_decompression_bomb_as_devkit_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(archives, "LIMIT", 10_000)
    with tarfile.open(tmp_path / "kit.tar.gz", "w:gz") as archive:
        member = tarfile.TarInfo("kit/data/a.txt")
        member.size = 1 << 20
        archive.addfile(member, io.BytesIO(bytes(1 << 20)))
    with pytest.raises(UserError, match="larger than any devkit"):
        tar_texts(tmp_path / "kit.tar.gz", "data/a.txt")


# Zips.


def test_a_zip_is_read_in_place(tmp_path):
    members = zip_members(zipped(tmp_path / "a.zip", CONTENT))
    assert [(m.name, m.read()) for m in members] == [(f"ADEChallengeData2016/{name}", data) for name, data in CONTENT.items()]
    assert str(members[0]) == "a.zip: ADEChallengeData2016/b.JPEG"


def test_a_link_in_a_zip_is_refused(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        info = zipfile.ZipInfo("x.jpg")
        info.external_attr = (stat.S_IFLNK | 0o777) << 16
        archive.writestr(info, "/etc/passwd")
    with pytest.raises(UserError, match=r"member that is a link: 'x\.jpg'"):
        zip_members(tmp_path / "a.zip")


def change_directory_entry(data: bytes, offset: int, value: bytes) -> bytes:
    """Replace bytes of the first entry in a zip's central directory."""
    place = data.index(b"PK\x01\x02") + offset
    return data[:place] + value + data[place + len(value) :]


def test_a_zip_that_declares_an_impossible_size_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(archives, "LIMIT", 1 << 16)
    zipped(tmp_path / "a.zip", {"x.jpg": bytes(1 << 17)})
    with pytest.raises(UserError, match="would unpack to 131,072 bytes"):
        zip_members(tmp_path / "a.zip")


def test_a_member_is_read_no_further_than_its_declared_size(tmp_path):
    """Its 16 MiB of zeros are declared as 1000 bytes."""
    path = zipped(tmp_path / "a.zip", {"x.jpg": bytes(1 << 24)})
    saved(path, change_directory_entry(path.read_bytes(), 24, struct.pack("<I", 1000)))
    (member,) = zip_members(path)
    with pytest.raises(ValueError, match="CRC"):
        member.read()


def test_a_locked_zip_is_refused_as_such(tmp_path):
    path = zipped(tmp_path / "a.zip", {"x.jpg": b"1"})
    saved(path, change_directory_entry(path.read_bytes(), 8, struct.pack("<H", 1)))
    with pytest.raises(UserError, match="locked with a password"):
        zip_members(path)


def test_damage_of_a_zip_never_ends_in_a_traceback(tmp_path):
    data = zipped(tmp_path / "a.zip", CONTENT).read_bytes()
    variants = [data[:n] for n in range(0, len(data), 7)]
    variants += [data[:n] + bytes([data[n] ^ 0xFF]) + data[n + 1 :] for n in range(len(data))]
    faults = 0
    for k, variant in enumerate(variants):
        try:
            for member in zip_members(saved(tmp_path / f"{k % 2}.zip", variant)):
                member.read()
        except (UserError, ValueError, OSError):
            faults += 1
    assert faults > 100


# Parquet.


FILES = {f"n01440764/{i}.JPEG": bytes([i]) * (i + 1) for i in range(200)}


@pytest.mark.parametrize("plain", [False, True])
@pytest.mark.parametrize("rows_a_group", [200, 90, 7])
def test_rows_are_read_in_any_order(tmp_path, plain, rows_a_group):
    parquet(tmp_path / "a.parquet", FILES, WORDS, plain, rows_a_group)
    rows, labels, names = parquet_rows(tmp_path / "a.parquet")
    assert labels == [0] * 200 and names == WORDS
    assert [row.name for row in rows] == ([None] * 200 if plain else list(FILES))
    assert [row.read() for row in rows] == list(FILES.values())
    for number in (199, 0, 64, 63, 130, 6, 7, 199, 89, 90):
        assert rows[number].read() == bytes([number]) * (number + 1)


def test_memory_holds_a_batch_and_never_a_whole_row_group(tmp_path, monkeypatch):
    parquet(tmp_path / "a.parquet", FILES, None, rows_a_group=200)
    batch_sizes = []
    monkeypatch.setattr(archives, "BATCH", 8)
    rows = archives.ParquetImages(tmp_path / "a.parquet")
    for number in range(200):
        rows.image(number)
        batch_sizes.append(len(rows.batch))
    assert max(batch_sizes) == 8


def test_missing_columns_and_columns_of_another_type_are_named(tmp_path):
    for name, table in {"img": {"img": [b"1"], "label": [0]}, "words": {"image": [b"1"], "label": ["tench"]}}.items():
        pq.write_table(pa.table(table), tmp_path / f"{name}.parquet")
        with pytest.raises(UserError, match=rf"{name}\.parquet must have the columns image .* and label"):
            parquet_rows(tmp_path / f"{name}.parquet")


@pytest.mark.parametrize("data", [b"", b"PAR1", b"no parquet at all", None])
def test_a_file_that_is_no_parquet_is_named(tmp_path, data):
    parquet(tmp_path / "a.parquet", FILES, None)
    saved(tmp_path / "a.parquet", (tmp_path / "a.parquet").read_bytes()[:-20] if data is None else data)
    with pytest.raises(UserError, match=r"a\.parquet is not a complete parquet file"):
        parquet_rows(tmp_path / "a.parquet")


def test_a_damaged_row_group_concerns_its_own_rows_alone(tmp_path):
    path = tmp_path / "a.parquet"
    parquet(path, FILES, None, plain=True, rows_a_group=50)
    rows, _, _ = parquet_rows(path)
    column = pq.ParquetFile(path).metadata.row_group(1).column(0)
    start = column.dictionary_page_offset or column.data_page_offset
    data = bytearray(path.read_bytes())
    data[start : start + column.total_compressed_size] = b"\xff" * column.total_compressed_size
    path.write_bytes(data)
    good = []
    for row in rows:
        try:
            assert row.read() == FILES[f"n01440764/{row.number}.JPEG"]
            good.append(row.number)
        except (ValueError, OSError):
            pass
    assert good == [*range(50), *range(100, 200)]


def test_an_empty_row_is_an_error_and_a_path_that_is_no_text_is_no_name(tmp_path):
    rows = [{"bytes": b"1", "path": 5}, None]
    kind = pa.struct({"bytes": pa.binary(), "path": pa.int64()})
    pq.write_table(pa.table({"image": pa.array(rows, kind), "label": [0, 1]}), tmp_path / "a.parquet")
    (there, missing), _, _ = parquet_rows(tmp_path / "a.parquet")
    assert (there.name, missing.name, there.read()) == (None, None, b"1")
    with pytest.raises(ValueError, match="no bytes"):
        missing.read()


def test_a_row_without_bytes_is_an_error(tmp_path):
    rows = [{"bytes": None, "path": "elsewhere.JPEG"}, None, {"bytes": b"1", "path": None}]
    kind = pa.struct({"bytes": pa.binary(), "path": pa.string()})
    pq.write_table(pa.table({"image": pa.array(rows[:1] + rows[2:], kind), "label": [0, 1]}), tmp_path / "a.parquet")
    (missing, there), _, names = parquet_rows(tmp_path / "a.parquet")
    assert names is None and there.read() == b"1"
    assert str(missing) == "a.parquet: row 0 (elsewhere.JPEG)" and str(there) == "a.parquet: row 1"
    with pytest.raises(ValueError, match="no bytes"):
        missing.read()


# Any place.


def places(root: Path) -> list:
    """Return the same image as a place of each kind."""
    parquet(root / "a.parquet", {"n01440764/x.JPEG": b"x" * 9}, None)
    return [
        File(saved(root / "x.JPEG", b"x" * 9)),
        tar_members(saved(root / "a.tar", tar({"x.JPEG": b"x" * 9})))[0],
        zip_members(zipped(root / "a.zip", {"x.JPEG": b"x" * 9}))[0],
        ParquetRow(root / "a.parquet", 0, None),
    ]


@pytest.mark.parametrize("kind", range(4))
def test_places_can_be_pickled_and_their_identity_follows_changes(tmp_path, kind):
    place = places(tmp_path)[kind]
    path = getattr(place, "archive", None) or place.path
    assert pickle.loads(pickle.dumps(place)) == place and place.read() == b"x" * 9
    before = place.identity()
    assert place.identity() == before
    os.utime(path, ns=(1, 1))
    assert place.identity() != before
    path.unlink()
    assert place.identity() != before  # without an error, which reading will raise


def read_both(first, second, expected) -> None:
    for _ in range(300):
        assert first.read() == expected[0] and second.read() == expected[1]


def test_processes_do_not_move_each_other_s_position_in_an_archive(tmp_path):
    data = {"a.jpg": os.urandom(30_000), "b.jpg": os.urandom(30_000)}
    members = zip_members(zipped(tmp_path / "a.zip", data))
    assert members[0].read() == data["a.jpg"]  # opened before the fork
    import multiprocessing

    child = multiprocessing.get_context("fork").Process(target=read_both, args=(*members, list(data.values())))
    child.start()
    read_both(*members, list(data.values()))
    child.join()
    assert child.exitcode == 0 and forked(read_both, *members, list(data.values())) == 0


def test_a_folder_and_a_zip_are_listed_alike(tmp_path):
    files = {"images/b.jpg": b"b", "images/.hidden.jpg": b"h", "a.txt": b"a", ".git/x.jpg": b"g"}
    zipped(tmp_path / "a.zip", files, top="./")
    for name, data in files.items():
        (tmp_path / "folder" / name).parent.mkdir(parents=True, exist_ok=True)
        saved(tmp_path / "folder" / name, data)
    for root in (tmp_path / "folder", tmp_path / "a.zip"):
        assert [(name, place.read()) for name, place in list_files(root).files.items()] == [("a.txt", b"a"), ("images/b.jpg", b"b")]


def test_a_folder_that_cannot_be_listed_is_named(tmp_path, monkeypatch):
    """It is not left out silently, with the images in it."""
    (tmp_path / "shut").mkdir()
    (tmp_path / ".hidden" / "shut").mkdir(parents=True)
    listing = list_files(tmp_path)
    assert (listing.files, listing.folders, listing.lost) == ({}, {"shut"}, {})
    scandir = os.scandir

    def refused(path):
        if Path(path).name == "shut":
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refused)
    listing = list_files(tmp_path)
    for area in ("", "shut"):
        with pytest.raises(UserError, match=r"shut cannot be read: Permission denied\. Mend or remove it\."):
            listing.refuse_lost(area)
    listing.refuse_lost("shu", "shut/below")


HIDDEN = ["._x.jpg", ".DS_Store", ".ipynb_checkpoints/x.jpg", "__MACOSX/x.jpg", "Thumbs.db", "a/@eaDir/x.jpg", "a/Desktop.ini", "Icon\r"]


def test_what_systems_leave_is_passed_over_in_folders_tars_and_zips(tmp_path):
    files = {"a/x.jpg": b"x"} | dict.fromkeys(HIDDEN, b"\0\5\x16\7")
    for name, data in files.items():
        (tmp_path / "folder" / name).parent.mkdir(parents=True, exist_ok=True)
        saved(tmp_path / "folder" / name, data)
    archive = zipped(tmp_path / "a.zip", files, top="")
    for root in (tmp_path / "folder", archive):
        listing = list_files(root)
        assert (list(listing.files), listing.folders, listing.lost, listing.rings) == (["a/x.jpg"], {"a"}, {}, [])
    for top in ("", "./"):
        path = saved(tmp_path / "a.tar", tar({top + name: data for name, data in files.items()}))
        assert [member.name for member in tar_members(path)] == [f"{top}a/x.jpg"]
    assert [member.name for member in zip_members(archive)] == ["a/x.jpg"]


def test_links_are_followed_and_rings_are_not(tmp_path):
    """disk/ lies outside the set. set/a and set/b link to one another, and set/up to the set itself."""
    root = tmp_path / "set"
    for folder in (tmp_path / "disk" / "deep", root / "a", root / "b"):
        folder.mkdir(parents=True)
        saved(folder / "x.jpg", folder.name.encode())
    (root / "photos").symlink_to(tmp_path / "disk")
    (root / "one.jpg").symlink_to(tmp_path / "disk" / "deep" / "x.jpg")
    (root / "a" / "b").symlink_to("../b")
    (root / "b" / "a").symlink_to("../a")
    (root / "up").symlink_to("..")
    (root / "up.jpg").symlink_to("gone.jpg")
    (root / "class").symlink_to("/nowhere/class")
    listing = list_files(root)
    expected = {"a/b/x.jpg": b"b", "a/x.jpg": b"a", "b/a/x.jpg": b"a", "b/x.jpg": b"b", "one.jpg": b"deep", "photos/deep/x.jpg": b"deep"}
    below = {name: data for name, data in listing.files.items() if not name.startswith("up/")}
    assert {name: place.read() for name, place in below.items()} == expected
    assert {"a/b/a", "b/a/b", "up/set"} <= set(listing.rings)
    assert listing.lost["class"] == "(a link to /nowhere/class) cannot be read: No such file or directory"
    assert listing.lost["up.jpg"].startswith("(a link to gone.jpg)")
    with pytest.raises(UserError, match=r"set/class \(a link to /nowhere/class\) cannot be read.*; .*up\.jpg .*Mend or remove them\."):
        listing.refuse_lost("")


def test_links_that_cross_in_many_ways_end(tmp_path):
    """Ten folders that each link to all others have ten million ways through them."""
    for k in range(10):
        (tmp_path / str(k)).mkdir()
        for other in set(range(10)) - {k}:
            (tmp_path / str(k) / f"to{other}").symlink_to(f"../{other}")
        saved(tmp_path / str(k) / "x.jpg", b"x")
    files = list_files(tmp_path).files
    assert {f"{k}/x.jpg" for k in range(10)} <= files.keys() and len(files) <= 10 * archives.FOLLOWED


def test_unread_files_are_counted_by_kind_in_one_line(tmp_path, capsys):
    for name in ("a.jpg", "b.jpg", "c.JPG", "sub/note\n.txt", "caf\udce9.txt", "README"):
        (tmp_path / "sub").mkdir(exist_ok=True)
        saved(tmp_path / name, b"")
    listing = list_files(tmp_path)
    listing.tell_unread([listing.files["a.jpg"]], lambda name: name == "README", ["x.tar/list"])
    assert capsys.readouterr().out == (
        f"Not read in {tmp_path}: 2 .jpg (such as b.jpg), 2 .txt (such as caf\\udce9.txt), 1 without a suffix (such as x.tar/list).\n"
    )
    listing.tell_unread(listing.files.values(), lambda _: False)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("depth", [20, 200_000])
def test_metadata_nested_without_end_names_no_classes(tmp_path, depth):
    parquet(tmp_path / "a.parquet", FILES, None)
    table = pq.read_table(tmp_path / "a.parquet").replace_schema_metadata({"huggingface": "[" * depth + "]" * depth})
    pq.write_table(table, tmp_path / "a.parquet")
    assert parquet_rows(tmp_path / "a.parquet")[2] is None


def test_a_pipe_is_refused_and_does_not_block(tmp_path):
    os.mkfifo(tmp_path / "x.jpg")
    with pytest.raises(ValueError, match="no file, but a folder or a pipe"):
        File(tmp_path / "x.jpg").read()
    with pytest.raises(UserError, match=r"x\.jpg cannot be read: no file, but"):
        tar_members(tmp_path / "x.jpg")
    for reader, message in ((tar_texts, "cannot be read"), (zip_members, "is not a complete zip"), (parquet_rows, "is not a complete parquet")):
        with pytest.raises(UserError, match=rf"x\.jpg {message}.* \(no file, but"):
            reader(tmp_path / "x.jpg")
