"""Faults of every kind: validation names them, reading refuses the sample, and no other sample changes."""

import io
import json
import shutil
import tarfile
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from moa_train.data.packing import write_shards
from moa_train.data.repair import repair
from moa_train.data.schema import BadSample, check_sample, decode_sample, encode_sample
from moa_train.data.shards import ShardIndex, ShardReader
from moa_train.data.validate import find_problems, index_folder

SHARD = "train-000000.tar"


def _read(folder, count=23) -> dict[int, dict[str, bytes] | None]:
    """Members of each sample by number, None where reading refuses it; nothing but BadSample may be raised."""
    reader = ShardReader(ShardIndex.load(folder))
    read = {}
    for number in range(count):
        read[number], error = _sample(reader, number)
        assert error is None or (str(error).startswith("shard train-0000") and str(error).isprintable())
    reader.close()
    return read


def _sample(reader, number):
    try:
        reader[number]
        return reader.read(number)[1], None
    except BadSample as error:
        return None, error


def _members(path):
    with tarfile.open(path) as tar:
        return [(info.name, tar.extractfile(info).read()) for info in tar]


def _write(path, members):
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))


@pytest.fixture
def folder(packed):
    return Path(packed.storage.location)


def _owner(path):
    """For each byte of a shard the number of the sample it is part of; -1: of none (padding, end of archive)."""
    owner = np.full(path.stat().st_size, -1)
    with tarfile.open(path) as tar:
        for place, info in enumerate(tar.getmembers()):
            owner[info.offset : info.offset_data + info.size] = place // 3
    return owner


def test_no_flipped_bit_at_200_places_reaches_a_sample(folder):
    count = ShardIndex.load(folder).shards[0].count
    sound, path = _read(folder, count), folder / SHARD
    content, owner = path.read_bytes(), _owner(path)
    rng = np.random.default_rng(0)
    for place, bit in zip(rng.integers(0, len(content), 200), rng.integers(0, 8, 200), strict=True):
        spoilt = bytearray(content)
        spoilt[place] ^= 1 << int(bit)
        path.write_bytes(spoilt)
        read = _read(folder, count)
        assert [n for n in sound if read[n] not in (sound[n], None)] == []
        assert {n for n in sound if read[n] is None} == ({owner[place]} - {-1}), place


@pytest.mark.parametrize("seed", range(6))
def test_a_flipped_bit_is_named_with_shard_and_key(folder, seed):
    path = folder / SHARD
    names, owner = [name for name, _ in _members(path)], _owner(path)
    content = bytearray(path.read_bytes())
    place = int(np.random.default_rng(seed).choice(np.flatnonzero(owner >= 0)))
    content[place] ^= 16
    path.write_bytes(content)
    problems = list(find_problems(folder))
    key = names[3 * owner[place]].split(".")[0]
    assert f"{SHARD} - its SHA-256 is not the index's: the content was changed" in problems
    assert any(problem.startswith(f"{SHARD} {key} ") or "damaged tar header" in problem for problem in problems)
    assert all(problem.startswith(SHARD) for problem in problems)


def test_a_silently_decodable_change_is_refused_and_named(folder):
    path = folder / SHARD
    members = _members(path)
    other = encode_sample(decode_sample("x", {n.partition(".")[2]: c for n, c in members[3:6]}))["png"]
    key = members[0][0].split(".")[0]
    content = path.read_bytes().replace(members[0][1], other) if len(other) == len(members[0][1]) else None
    if content is None:  # another caption of the same length: JSON that decodes and passes every check
        content = path.read_bytes().replace(members[2][1], members[2][1].replace(b"at sea", b"at bay"))
    path.write_bytes(content)
    assert any(f"{SHARD} {key} its " in problem and "CRC-32" in problem for problem in find_problems(folder))
    with pytest.raises(BadSample, match=f"shard {SHARD}, key {key}: .* was changed since it was indexed"):
        ShardReader(ShardIndex.load(folder))[0]
    count = len(ShardIndex.load(folder))
    clean, report = repair(folder, folder.parent / "clean")
    assert key not in {ShardReader(clean).read(number)[0] for number in range(len(clean))}
    assert len(clean) == count - 1
    assert report.told()["left_out"] == {"changed since it was indexed": 1}


def test_truncation_at_and_inside_every_member(folder):
    count = ShardIndex.load(folder).shards[0].count
    sound, path = _read(folder, count), folder / SHARD
    content, owner = path.read_bytes(), _owner(path)
    with tarfile.open(path) as tar:
        cuts = [cut for info in tar for cut in (info.offset, info.offset + 100, info.offset_data + info.size // 2)]
    for number, cut in enumerate(cuts):
        path.write_bytes(content[:cut])
        read = _read(folder, count)
        lost = set(owner[cut:][owner[cut:] >= 0].tolist())
        assert {n for n in sound if read[n] is None} == lost
        assert all(read[n] == sound[n] for n in sound if n not in lost)
        if number % 5 == 0:
            assert any("truncated" in problem for problem in find_problems(folder)), cut


def _json_with(**changes):
    return lambda members: [
        (n, json.dumps(json.loads(c) | changes).encode() if n.endswith(".json") and i == 2 else c)
        for i, (n, c) in enumerate(members)
    ]


def _content(place, content):
    return lambda members: [(n, content if i == place else c) for i, (n, c) in enumerate(members)]


def _named(place, rename):
    return lambda members: [(rename(n) if i == place else n, c) for i, (n, c) in enumerate(members)]


def _bomb(pixels: int) -> bytes:
    """A PNG of so many pixels a side in a kilobyte."""

    def chunk(kind, data):
        return len(data).to_bytes(4, "big") + kind + data + zlib.crc32(kind + data).to_bytes(4, "big")

    side = pixels.to_bytes(4, "big")
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", side + side + b"\x08\0\0\0\0")
        + chunk(b"IDAT", zlib.compress(bytes(10**6)))
        + chunk(b"IEND", b"")
    )


def _npy(array) -> bytes:
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


def _with_latents(content):
    return lambda members: [*members[:3], (members[0][0].replace(".png", ".latent.npy"), content), *members[3:]]


FAULTS = {
    "picture is a bomb": (_content(0, _bomb(40_000)), "DecompressionBombError"),
    "mask is a bomb": (_content(1, _bomb(10_000)), "10000 x 10000 pixels, at most"),
    "0-byte picture": (_content(0, b""), "is empty (0 bytes)"),
    "0-byte JSON": (_content(2, b""), "is empty (0 bytes)"),
    "PostScript": (_content(0, b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 16 16\n"), "cannot identify"),
    "not UTF-8": (_content(2, b'{"caption": "\xff\xfe"}'), "UnicodeDecodeError"),
    "half a surrogate": (_json_with(caption="\ud800"), "UnicodeEncodeError"),
    "caption is a number": (_json_with(caption=3), "caption is 3, expected text"),
    "width is text": (_json_with(width="16"), "width is '16', expected a whole number"),
    "height is true": (_json_with(height=True), "height is True, expected a whole number"),
    "segments is text": (_json_with(segments="none"), "segments is a str, expected a list"),
    "a segment is a list": (_json_with(segments=[[1]]), "segment 0 is a list, expected an object"),
    "a segment is bare": (_json_with(segments=[{}]), "KeyError"),
    "JSON is a list": (_content(2, b"[]"), "the content is a list, expected an object"),
    "JSON is deep": (_content(2, b"[" * 100_000), "RecursionError"),
    "an infinite width": (_content(2, b'{"caption": "", "segments": [], "width": 1e999, "height": 2}'), "width is inf"),
    "no picture": (lambda m: m[1:], "has 0 pictures"),
    "no mask": (lambda m: [m[0], *m[2:]], "seg.png is missing"),
    "no JSON": (lambda m: [*m[:2], *m[3:]], "json is missing"),
    "two pictures": (lambda m: [(m[0][0].replace(".png", ".jpg"), m[0][1]), *m], "has 2 pictures"),
    "members swapped": (lambda m: [m[0], m[4], m[2], m[3], m[1], *m[5:]], "seg.png is missing"),
    "path out": (_named(0, lambda n: f"../{n}"), "leads out of the folder"),
    "absolute path": (_named(0, lambda n: f"/etc/{n}"), "leads out of the folder"),
    "a line break in a name": (_named(0, lambda n: f"a\nb{n}"), "unprintable"),
    "latents of objects": (_with_latents(_npy(np.array([[[[{}]]]]))), "expected float16"),
    "latents of floats": (_with_latents(_npy(np.zeros((2, 4, 2, 2), np.float32))), "expected float16"),
    "latents cut": (_with_latents(_npy(np.zeros((2, 4, 2, 2), np.float16))[:-2]), "bytes of values"),
    "latents of NaN": (_with_latents(_npy(np.full((2, 4, 2, 2), np.nan, np.float16))), "latents hold NaN"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_each_fault_is_named_and_left_out_and_changes_no_other_sample(folder, fault):
    change, told = FAULTS[fault]
    path = folder / SHARD
    before = _members(path)
    path.unlink()
    _write(path, change(before))
    first = before[0][0].split(".")[0]
    problems = list(find_problems(folder))
    assert any(told in problem and first in problem for problem in problems), problems
    assert all(problem.isprintable() for problem in problems)
    for number, read in _read(folder).items():  # offsets moved: refused, never another sample
        assert read is None or first not in str(read.keys()), number

    with pytest.raises(ValueError, match="has an index already"):
        index_folder(folder, "train")
    assert index_folder(folder, "train", overwrite=True)[0] is None
    index, _ = index_folder(folder, "train", overwrite=True, leave_out=True)
    assert list(find_problems(folder)) == []
    reader = ShardReader(index)
    sound = {n: c for n, c in before if not n.startswith(first)}
    for number in range(len(reader)):
        key, members = reader.read(number)
        assert check_sample(reader[number]) == []
        assert key != first
        for suffix, content in members.items():
            assert sound.get(f"{key}.{suffix}", content) == content
    assert len(index) in (22, 21)  # swapping spoils two


def test_the_index_of_another_set_is_refused(folder, tmp_path, make_sample):
    others = [make_sample(i) for i in range(100, 123)]
    other = Path(write_shards(others, tmp_path / "other", "train", shard_bytes=20_000).storage.location)
    for name in ("index.json", "train-members.npy"):
        shutil.copy(other / name, folder / name)
    assert all(read is None for read in _read(folder).values())
    problems = list(find_problems(folder))
    assert any("index of another set" in problem or "CRC-32" in problem for problem in problems)


@pytest.mark.parametrize(
    "change",
    [
        {"shards": 3},
        {"shards": [{"name": 1}]},
        {"members": None},
        {"members": {"file": "../x", "sha256": ""}},
        {"samples": "x"},
    ],
)
def test_an_index_of_wrong_types_is_refused_by_name(folder, change):
    told = json.loads((folder / "index.json").read_text())
    (folder / "index.json").write_text(json.dumps(told | change))
    with pytest.raises(ValueError, match=r"index\.json is damaged"):
        ShardIndex.load(folder)
    assert any(problem.startswith("index.json - ") for problem in find_problems(folder))


def test_a_set_without_checksums_is_read_and_validation_says_so(folder, caplog):
    index = ShardIndex.load(folder)
    fields = [name for name in index.members.dtype.names if not name.endswith("_crc")]
    sound = _read(folder)
    index.members = np.array(index.members)[fields].astype([(n, index.members.dtype[n]) for n in fields])
    index.save()
    assert _read(folder) == sound
    assert "no checksums" in caplog.text
    assert [problem.split(":")[0] for problem in find_problems(folder)] == ["index.json - has no checksums of samples"]
    index_folder(folder, "train", overwrite=True)
    assert list(find_problems(folder)) == []


def test_a_picture_with_alpha_is_refused(make_sample):
    members = encode_sample(make_sample(0))
    file = io.BytesIO()
    Image.new("RGBA", (16, 16)).save(file, "PNG")
    with pytest.raises(BadSample, match="this one is RGBA"):
        decode_sample("00000", members | {"png": file.getvalue()})
