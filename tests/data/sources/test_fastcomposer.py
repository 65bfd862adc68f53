"""FastComposer's FFHQ becomes shards: nothing invented, nothing lost without a reason, no input a crash."""

import io
import json
import tarfile

import numpy as np
import pytest
from PIL import Image

from fastcomposer_layout import CAPTION, PEOPLE, jpeg, label_map, layout, npy, picture, write_folder, write_tar
from moa_train.data.packing import write_shards
from moa_train.data.schema import check_sample
from moa_train.data.shards import ShardReader
from moa_train.data.sources.archive import open_archive
from moa_train.data.sources.fastcomposer import LISTS, FastComposerSplit, read_splits


def _convert(folder, out, **look):
    """Stored samples by split and key, and what the report tells."""
    archive = open_archive(folder, LISTS["train"])
    stored, reports = {}, {}
    for split, (ids, remarks) in read_splits(archive).items():
        index = write_shards(FastComposerSplit(archive, ids, remarks, **look), out, split)
        reader = ShardReader(index)
        stored[split] = {reader[i].key: (reader[i], reader.read(i)[1]) for i in range(len(reader))}
        reports[split] = index.packing
    return stored, reports


def _one(tmp_path, files, **look):
    """The item that one picture becomes."""
    folder = write_folder(layout({"00001": files}, ["00001"], []), tmp_path / "one")
    return FastComposerSplit(open_archive(folder, LISTS["train"]), ["00001"], **look)[0]


def test_pictures_label_maps_and_nouns_are_what_the_files_say(tmp_path):
    pictures = {f"{i:05d}_x": picture(i) for i in range(5)}
    folder = write_folder(layout(pictures, list(pictures)[:3], list(pictures)[3:]), tmp_path / "in")
    stored, _ = _convert(folder, tmp_path / "out")
    assert {split: sorted(samples) for split, samples in stored.items()} == {
        "train": list(pictures)[:3],
        "validation": list(pictures)[3:],
    }
    for number, key in enumerate(pictures):
        sample, members = (stored["train"] | stored["validation"])[key]
        assert members["jpg"] == jpeg(number)  # byte for byte
        np.testing.assert_array_equal(sample.labels, label_map())
        assert sample.caption == CAPTION
        assert [(s.id, s.noun, s.end, s.bbox, s.area) for s in sample.segments] == [
            (5, "a man", 5, (2, 4, 20, 30), 18 * 26),
            (300, "a woman", 17, (24, 10, 40, 36), 16 * 26),
        ]
        assert check_sample(sample) == []


@pytest.mark.parametrize("root", ["", "./", "ffhq_wild_files/", "./a/b/"])
def test_a_tar_gives_the_same_shards_as_its_folder(tmp_path, root):
    files = layout({f"{i:05d}": picture(i) for i in range(3)}, ["00000", "00001", "00002"], [])
    _, ours = _convert(write_tar(files, tmp_path / "a.tar", root), tmp_path / "tar")
    _convert(write_folder(files, tmp_path / "folder"), tmp_path / "plain")
    shard = "train/train-000000.tar"
    assert (tmp_path / "tar" / shard).read_bytes() == (tmp_path / "plain" / shard).read_bytes()
    assert ours["train"]["left_out"] == {}


def test_a_folder_one_level_down_is_found(tmp_path):
    write_folder(layout({"00000": picture()}, ["00000"], []), tmp_path / "in" / "ffhq_wild_files")
    assert _convert(tmp_path / "in", tmp_path / "out")[0]["train"].keys() == {"00000"}


def test_workers_and_interruptions_change_nothing(tmp_path):
    pictures = {f"{i:05d}": picture(i, caption="none" if i % 5 == 0 else CAPTION) for i in range(30)}
    path = write_tar(layout(pictures, list(pictures), []), tmp_path / "a.tar")
    archive = open_archive(path, LISTS["train"])
    source = FastComposerSplit(archive, list(pictures))

    class Stops(Exception):
        pass

    def stop(done):
        if done == 17:
            raise Stops

    whole = write_shards(source, tmp_path / "whole", "train", shard_bytes=30_000)
    for workers in (0, 2):
        out = tmp_path / str(workers)
        with pytest.raises(Stops):
            write_shards(source, out, "train", shard_bytes=30_000, workers=workers, on_sample=stop)
        again = write_shards(source, out, "train", shard_bytes=30_000, workers=workers)
        assert again.hash == whole.hash
        assert again.packing["left_out"] == whole.packing["left_out"] == {"no person can be used": 6}
        told = [json.loads((folder / "train" / "report.json").read_text()) for folder in (out, tmp_path / "whole")]
        assert told[0] == told[1]
        assert sorted(name["key"] for name in told[0]["names"]) == [f"{i:05d}" for i in range(0, 30, 5)]


def _huge(shape):
    file = io.BytesIO()
    np.lib.format.write_array_header_1_0(file, {"descr": "<i8", "fortran_order": False, "shape": shape})
    return file.getvalue()


def _exif_rotated():
    file, exif = io.BytesIO(), Image.Exif()
    exif[0x0112] = 6
    Image.open(io.BytesIO(jpeg())).save(file, "JPEG", exif=exif, quality="keep")
    return file.getvalue()


SPOILED = {
    "no jpg": ({"jpg": None}, "the .jpg is missing"),
    "no json": ({"json": None}, "the .json is missing"),
    "no npy": ({"npy": None}, "the .npy is missing"),
    "empty jpg": ({"jpg": b""}, "the picture cannot be read"),
    "cut jpg": ({"jpg": jpeg()[:700]}, "the picture cannot be read"),
    "text for a jpg": ({"jpg": b"<html>not found"}, "the picture cannot be read"),
    "empty json": ({"json": b""}, "the .json cannot be read"),
    "not UTF-8": ({"json": b'{"caption": "\xff"}'}, "the .json cannot be read"),
    "deep json": ({"json": b"[" * 100_000}, "the .json cannot be read"),
    "json list": ({"json": b"[]"}, "the .json does not hold a caption and segments"),
    "caption of a wrong type": ({"json": b'{"caption": 3, "segments": []}'}, "the .json does not hold"),
    "blank caption": (picture(caption="  "), "the caption is empty"),
    "half a character": ({"json": b'{"caption": "a \\ud800 man", "segments": []}'}, "the caption cannot be used"),
    "a marker": (picture(caption=CAPTION + " <1>"), "the caption cannot be used"),
    "empty npy": ({"npy": b""}, "the label map cannot be read"),
    "cut npy": ({"npy": npy(label_map())[:500]}, "the label map cannot be read"),
    "pickled npy": ({"npy": npy(np.array([[object()]]))}, "the label map cannot be read"),
    "float npy": ({"npy": npy(label_map().astype(float))}, "the label map cannot be read"),
    "terabytes": ({"npy": _huge((10**6, 10**6))}, "the label map cannot be read"),
    "negative": ({"npy": npy(label_map() - 1)}, "the label map's values do not fit 16 bits"),
    "17 bits": ({"npy": npy(label_map() * 1000)}, "the label map's values do not fit 16 bits"),
    "another size": ({"npy": npy(label_map(50, 40))}, "the label map has another size than the picture"),
    "nobody": (picture(segments=PEOPLE[2:]), "no person is marked"),
    "no segments": (picture(segments=[]), "no person is marked"),
    "empty masks": (picture(labels=np.zeros((40, 48), int)), "no person can be used"),
}


@pytest.mark.parametrize("name", SPOILED)
def test_what_cannot_be_used_is_left_out_with_its_reason(tmp_path, name):
    changes, reason = SPOILED[name]
    files = {suffix: content for suffix, content in (picture() | changes).items() if content is not None}
    item = _one(tmp_path, files)
    assert item.content is None
    assert item.key == "00001"
    assert item.remarks[0].reason.startswith(reason)


def test_a_picture_with_too_many_pixels_is_left_out(tmp_path):
    assert _one(tmp_path, picture(), max_megapixels=0.001).remarks[0].reason == "the picture cannot be read"
    assert _one(tmp_path, picture(), max_megapixels=0.002).content is not None  # 48 x 40 are 0.00192


def _segments(tmp_path, segments, labels=None):
    item = _one(tmp_path, picture(segments=segments, labels=labels))
    return [s["id"] for s in json.loads(item.content["json"])["segments"]], [remark.reason for remark in item.remarks]


def test_of_two_with_one_end_the_larger_stays(tmp_path):
    man, woman, _ = PEOPLE
    same_end = woman | {"start": 2, "end": 5}
    for order in ([man, same_end], [same_end, man]):
        kept, reasons = _segments(tmp_path, order)
        assert kept == [5]  # 468 pixels against 416
        assert reasons == ["two segments end at one place in the caption; the larger was kept"]
    labels = label_map()
    labels[0:40, 22:48] = 300
    assert _segments(tmp_path, [man, same_end], labels)[0] == [300]
    blank = woman | {"start": 2, "end": 6}  # "man ": ends where "a man" does
    assert _segments(tmp_path, [man, blank])[0] == [5]


@pytest.mark.parametrize(
    ("spoiled", "reason"),
    [
        ({"end": 99}, "a segment's offsets lie outside the caption"),
        ({"start": -1}, "a segment's offsets lie outside the caption"),
        ({"start": 9, "end": 9}, "a segment's offsets lie outside the caption"),
        ({"start": 5, "end": 6}, "a segment's offsets lie outside the caption"),  # a space
        ({"id": 9}, "a segment's mask is empty"),
        ({"id": 0}, "a segment's mask is empty"),
        ({"id": 5}, "a segment id is given twice"),
        ({"id": "300"}, "a segment is malformed"),
        ({"end": None}, "a segment is malformed"),
        ({"id": True}, "a segment is malformed"),
    ],
)
def test_a_segment_that_cannot_be_used_is_remarked_and_the_rest_kept(tmp_path, spoiled, reason):
    assert _segments(tmp_path, [PEOPLE[0], PEOPLE[1] | spoiled]) == ([5], [reason])


def test_segments_of_any_type_are_no_crash(tmp_path):
    for nonsense in (None, 3, "x", [], {}, {"coco_label": 3}, {"coco_label": ["person"]}):
        assert _segments(tmp_path, [PEOPLE[0], nonsense]) == ([5], ["a segment is malformed"])


def test_pictures_of_nobody_are_kept_when_asked_for(tmp_path):
    item = _one(tmp_path, picture(segments=PEOPLE[2:]), no_person="keep")
    assert json.loads(item.content["json"])["segments"] == []
    with pytest.raises(ValueError, match="no_person is 'drop'; expected one of leave_out, keep"):
        _one(tmp_path, picture(), no_person="drop")


def test_reduced_label_maps_hold_no_new_values(tmp_path):
    item = _one(tmp_path, picture(), max_side=20)
    labels = np.asarray(Image.open(io.BytesIO(item.content["seg.png"])))
    assert labels.shape == (20, 24)
    np.testing.assert_array_equal(labels, label_map()[1::2, 1::2])  # nearest, at half the size
    assert Image.open(io.BytesIO(item.content["jpg"])).size == (24, 20)


def test_a_picture_is_written_anew_only_where_others_would_see_another(tmp_path):
    grey = io.BytesIO()
    Image.open(io.BytesIO(jpeg())).convert("L").save(grey, "JPEG", quality=90)
    for content in (grey.getvalue(), _exif_rotated()):
        stored = _one(tmp_path, picture() | {"jpg": content}).content["jpg"]
        assert stored != content
        with Image.open(io.BytesIO(stored)) as new, Image.open(io.BytesIO(content)) as old:
            assert (new.mode, new.size) == ("RGB", (48, 40))  # the label map fits the pixels as they were stored
            assert new.getexif().get(0x0112, 1) == 1
            assert abs(np.asarray(new).astype(int) - np.asarray(old.convert("RGB"))).mean() < 12


def test_lists_are_cleaned_and_nobody_is_in_two_splits(tmp_path):
    pictures = {f"0000{i}": picture(i) for i in range(4)}
    files = layout(pictures, ["00000", "00001", "00000", "../etc", "00002", " ", "00009"], ["00002", "00003"])
    stored, reports = _convert(write_folder(files, tmp_path / "in"), tmp_path / "out")
    assert {split: sorted(samples) for split, samples in stored.items()} == {
        "train": ["00000", "00001"],
        "validation": ["00002", "00003"],
    }
    assert reports["train"]["left_out"] == {
        "the .jpg is missing": 1,
        "the id cannot name a sample": 1,
        "the id is listed for validation, too": 1,
        "the id is listed twice": 1,
    }


def test_without_a_list_of_its_own_training_is_the_rest(tmp_path):
    files = layout({f"0000{i}": picture(i) for i in range(3)}, ["00000", "00001"], ["00002"])
    del files["image_ids_train.txt"]
    splits = read_splits(open_archive(write_folder(files, tmp_path), LISTS["train"]))
    assert {split: ids for split, (ids, _) in splits.items()} == {
        "train": ["00000", "00001"],
        "validation": ["00002"],
    }


def test_archives_that_cannot_be_used_are_refused(tmp_path):
    files = layout({"00000": picture()}, ["00000"], [])
    whole = write_tar(files, tmp_path / "a.tar").read_bytes()
    (tmp_path / "cut.tar").write_bytes(whole[:3000])
    (tmp_path / "noise.tar").write_bytes(b"x" * 2000)
    damaged = bytearray(whole)
    damaged[whole.index(b"00000/00000.json") + 150] ^= 1  # in the checksum of the second header
    (tmp_path / "damaged.tar").write_bytes(damaged)
    write_tar(files, tmp_path / "a.tgz", mode="w:gz")
    for name, told in {
        "cut.tar": "is not a tar that can be read|ends early",
        "noise.tar": "is not a tar that can be read",
        "damaged.tar": "has a damaged header at byte",
        "a.tgz": "is compressed.*run gunzip first",
        "none": "neither a folder nor a tar",
    }.items():
        with pytest.raises(ValueError, match=told):
            open_archive(tmp_path / name, LISTS["train"])
    with tarfile.open(tmp_path / "cut2.tar", "w") as tar:
        tar.addfile(tarfile.TarInfo("x"))
    content = (tmp_path / "cut2.tar").read_bytes()[:512]
    (tmp_path / "cut2.tar").write_bytes(content)  # ends between two files: no error of the tar reader's own
    with pytest.raises(ValueError, match="ends early at byte 512"):
        open_archive(tmp_path / "cut2.tar", LISTS["train"])
    with pytest.raises(ValueError, match="lists no pictures"):
        read_splits(open_archive(tmp_path, LISTS["train"]))
