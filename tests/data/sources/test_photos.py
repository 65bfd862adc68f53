"""Photos of any kind become samples; the drawn face of portrait.py stands for a photograph."""

import logging

import numpy as np
import pytest
from PIL import Image

from moa_train.data.schema import check_sample
from moa_train.data.sources.annotators import Segmenter
from moa_train.data.sources.grabcut import find_face, segment_people, segment_person
from moa_train.data.sources.photos import PhotoSource, list_photos
from moa_train.data.sources.pictures import as_rgb, read_photo
from portrait import portrait


def _overlap(a, b):
    return (a & b).sum() / (a | b).sum()


@pytest.mark.parametrize("width", [200, 320, 900])
def test_face_and_person_are_found_at_any_size(width):
    picture, truth = portrait(width, width * 5 // 4)
    image = np.asarray(picture)
    x1, y1, x2, y2 = find_face(image)
    assert abs((x1 + x2) / 2 - width / 2) < 0.05 * width
    assert abs((y1 + y2) / 2 - 0.41 * width * 5 / 4) < 0.08 * width
    mask = segment_person(image)
    assert mask.shape == image.shape[:2]
    assert _overlap(mask, truth) > 0.85


def test_the_mask_is_the_same_each_time():
    image = np.asarray(portrait()[0])
    np.testing.assert_array_equal(segment_person(image), segment_person(image))


def test_a_picture_without_a_face_is_refused():
    image = np.full((200, 300, 3), 120, dtype=np.uint8)
    image[50:150, 100:200] = 30
    with pytest.raises(ValueError, match="no face was found"):
        segment_person(image)


def test_exif_rotation_is_undone(tmp_path):
    picture = portrait()[0]
    exif = Image.Exif()
    exif[0x0112] = 6  # shown after a turn by 90 degrees clockwise
    picture.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "turned.png", exif=exif)
    np.testing.assert_array_equal(read_photo(tmp_path / "turned.png"), np.asarray(picture))


def test_every_kind_of_picture_becomes_rgb():
    colour = Image.new("RGB", (4, 3), (200, 100, 50))
    half = colour.convert("RGBA")
    half.putalpha(0)
    sixteen = Image.fromarray(np.full((3, 4), 51 * 257, dtype=np.uint16))
    expected = {
        "grey": (colour.convert("L"), (124, 124, 124)),
        "cmyk": (colour.convert("CMYK"), (200, 100, 50)),
        "palette": (colour.convert("P", palette=Image.Palette.ADAPTIVE), (200, 100, 50)),
        "transparent": (half, (255, 255, 255)),
        "16 bit": (sixteen, (51, 51, 51)),
        "grey and alpha": (Image.new("LA", (4, 3), (77, 255)), (77, 77, 77)),
    }
    for name, (picture, value) in expected.items():
        values = np.asarray(as_rgb(picture)).astype(int)
        assert values.shape == (3, 4, 3), name
        assert abs(values - value).max() <= 2, name


def test_large_photos_are_reduced_to_the_short_side(tmp_path):
    Image.new("RGB", (300, 200)).save(tmp_path / "a.png")
    assert read_photo(tmp_path / "a.png", max_side=100).shape == (100, 150, 3)
    assert read_photo(tmp_path / "a.png", max_side=500).shape == (200, 300, 3)


def test_photos_are_listed_without_masks_and_other_files(tmp_path):
    (tmp_path / "b").mkdir()
    for name in ("b/x.JPG", "a.png", "a.mask.png", "a.txt"):
        (tmp_path / name).touch()
    assert list_photos(tmp_path) == [tmp_path / "a.png", tmp_path / "b" / "x.JPG"]
    with pytest.raises(ValueError, match="is not a folder"):
        list_photos(tmp_path / "none")
    with pytest.raises(ValueError, match="holds no photo"):
        list_photos((tmp_path / "b" / "x.JPG").unlink() or tmp_path / "b")


def test_a_photo_becomes_a_sound_sample(tmp_path):
    portrait()[0].save(tmp_path / "me.png")
    sample = PhotoSource(tmp_path, [tmp_path / "me.png"], noun="woman")[0].content
    assert check_sample(sample) == []
    assert sample.caption == "a photo of a woman"
    assert sample.source == {"file": "me.png"}


def test_caption_and_mask_beside_a_photo_are_used(tmp_path):
    Image.new("RGB", (40, 30)).save(tmp_path / "me.png")
    mask = np.zeros((30, 40), dtype=np.uint8)
    mask[5:20, 10:30] = 255
    Image.fromarray(mask).save(tmp_path / "me.mask.png")
    (tmp_path / "me.txt").write_text("many women, one woman\n")
    sample = PhotoSource(tmp_path, [tmp_path / "me.png"], noun="woman")[0].content
    assert check_sample(sample) == []
    np.testing.assert_array_equal(sample.labels, mask // 255)
    assert (sample.caption, sample.segments[0].start) == ("many women, one woman", 16)


def test_what_cannot_be_used_is_left_out_by_name(tmp_path, caplog):
    Image.new("RGB", (200, 200)).save(tmp_path / "plain.png")
    (tmp_path / "broken.jpg").write_bytes(b"no picture")
    portrait()[0].save(tmp_path / "me.png")
    (tmp_path / "me.txt").write_text("a view")
    names = ["plain.png", "broken.jpg", "me.png"]
    source = PhotoSource(tmp_path, [tmp_path / name for name in names], no_noun="leave_out")
    with caplog.at_level(logging.WARNING):
        assert [source[i].content for i in range(3)] == [None, None, None]
    told = [record.getMessage() for record in caplog.records]
    for message, name, why in zip(told, names, ("no face", "cannot", "does not name every subject"), strict=True):
        assert name in message
        assert why in message


def test_a_template_without_the_noun_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"must hold \{noun\}"):
        PhotoSource(tmp_path, [], caption="a photo")


def _beside(folder, name, picture, mask=None, **files):
    """A photo with what lies beside it, as the source makes of it."""
    picture.save(folder / name)
    stem = (folder / name).stem
    if mask is not None:
        Image.fromarray(mask).save(folder / f"{stem}.{'seg' if mask.max() < 255 else 'mask'}.png")
    for suffix, text in files.items():
        (folder / f"{stem}.{suffix}").write_text(text)
    return lambda **settings: PhotoSource(folder, [folder / name], **settings)[0]


def _three():
    """Subjects 2 (left), 3 (right) and 9 (below) of a 40 x 30 photo."""
    labels = np.zeros((30, 40), dtype=np.uint8)
    labels[2:20, 2:12], labels[4:22, 20:38], labels[25:30, 0:40] = 2, 3, 9
    return labels


def _told(item):
    return item.content.caption, [(segment.id, segment.noun, segment.start) for segment in item.content.segments]


def test_several_subjects_get_the_nouns_of_the_caption_in_order(tmp_path):
    make = _beside(tmp_path, "a.png", Image.new("RGB", (40, 30)), _three(), txt="A Woman, two men, a man and a child")
    item = make()
    np.testing.assert_array_equal(item.content.labels, _three())
    assert _told(item)[1] == [(2, "Woman", 2), (3, "man", 20), (9, "child", 30)]
    assert check_sample(item.content) == []


def test_subjects_that_the_caption_does_not_name_follow_the_rule(tmp_path):
    make = _beside(tmp_path, "a.png", Image.new("RGB", (40, 30)), _three(), txt="a man at sea.")
    item = make()
    assert _told(item) == (
        "a man at sea, with a person and a person",
        [(2, "man", 2), (3, "person", 21), (9, "person", 34)],
    )
    assert [remark.reason for remark in item.remarks] == ["the caption did not name every subject; nouns were appended"]
    assert _told(make(no_noun="keep")) == ("a man at sea.", [(2, "man", 2)])
    assert make(no_noun="leave_out").remarks[0].reason == "the caption does not name every subject"
    assert _told(make(noun="owl"))[0] == "a man at sea, with an owl and an owl and an owl"
    with pytest.raises(ValueError, match="no_noun is 'drop'"):
        make(no_noun="drop")


def test_the_template_names_every_subject(tmp_path):
    make = _beside(tmp_path, "a.png", Image.new("RGB", (40, 30)), _three())
    assert _told(make(noun="dog"))[0] == "a photo of a dog, with a dog and a dog"
    assert make(noun="dog").remarks == ()


def test_a_json_beside_a_photo_gives_caption_and_nouns(tmp_path):
    make = _beside(
        tmp_path,
        "a.png",
        Image.new("RGB", (40, 30)),
        _three(),
        json='{"caption": "a cat, a fox and a man", "nouns": ["man", "fox", "cat"]}',
    )
    assert _told(make())[1] == [(2, "man", 19), (3, "fox", 9), (9, "cat", 2)]


@pytest.mark.parametrize(
    ("files", "reason"),
    [
        ({"json": "[1]"}, "its .json is not a mapping with caption"),
        ({"json": '{"caption": "x", "nouns": [1]}'}, "its .json is not a mapping with caption"),
        ({"json": "{"}, "its caption cannot be read"),
        ({"json": '{"caption": "x", "nouns": ["a"]}'}, "its .json names another number of subjects"),
        ({"txt": "a man <1>"}, "it would not be a sound sample"),
    ],
)
def test_what_lies_beside_a_photo_and_cannot_be_used_is_told(tmp_path, files, reason):
    item = _beside(tmp_path, "a.png", Image.new("RGB", (40, 30)), _three(), **files)()
    assert item.content is None
    assert item.remarks[0].reason.startswith(reason)


def test_damaged_captions_and_masks_are_told(tmp_path):
    make = _beside(tmp_path, "a.png", Image.new("RGB", (40, 30)), _three())
    (tmp_path / "a.txt").write_bytes(b"a m\xffn")
    assert make().remarks[0].reason == "its caption cannot be read"
    (tmp_path / "a.txt").unlink()
    for content, reason in ((b"no", "its mask cannot be read"), (None, "its mask is empty")):
        Image.new("L", (40, 30)).save(tmp_path / "a.seg.png")
        if content is not None:
            (tmp_path / "a.seg.png").write_bytes(content)
        assert make().remarks[0].reason == reason
    Image.new("RGB", (40, 30)).save(tmp_path / "a.seg.png")
    assert make().remarks[0].reason == "its mask cannot be read"


def test_transparency_serves_as_the_mask(tmp_path):
    picture = Image.new("RGBA", (40, 30), (200, 10, 10, 0))
    picture.paste((10, 200, 10, 255), (5, 6, 25, 28))
    item = _beside(tmp_path, "a.png", picture)()
    assert item.content.segments[0].bbox == (5, 6, 25, 28)
    assert (item.content.image[0, 0] == 255).all()
    assert item.remarks[0].reason == "its transparency was taken as its mask"


def test_odd_photos_are_handled_or_refused_by_name(tmp_path):
    frames = [Image.new("RGB", (40, 30), (shade, 0, 0)) for shade in (10, 200)]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    Image.new("L", (40, 30), 255).save(tmp_path / "a.mask.png")
    item = PhotoSource(tmp_path, [tmp_path / "a.gif"])[0]
    assert item.remarks[0].reason == "it is animated; its first frame was taken"
    assert abs(int(item.content.image[0, 0, 0]) - 10) < 3
    Image.new("1", (20_000, 20_000)).save(tmp_path / "bomb.png")
    whole = (tmp_path / "cut.png", Image.effect_noise((60, 60), 90))
    whole[1].save(whole[0])
    whole[0].write_bytes(whole[0].read_bytes()[:1500])
    Image.new("F", (40, 30)).save(tmp_path / "float.tif")
    (tmp_path / "empty.jpg").touch()
    (tmp_path / "phone.HEIC").write_bytes(b"ftypheic")
    for name, why in {
        "bomb.png": "pixels",
        "cut.png": "broken",
        "float.tif": "floating-point",
        "empty.jpg": "broken",
        "phone.HEIC": "convert it to JPEG",
    }.items():
        item = PhotoSource(tmp_path, [tmp_path / name])[0]
        assert item.content is None
        assert item.key == name
        assert why in str(item.remarks[0])


def test_two_people_have_masks_that_do_not_overlap():
    one, truth = portrait(320, 400)
    image = np.concatenate([np.asarray(one)] * 2, axis=1)
    left, right = sorted(segment_people(image), key=lambda mask: np.flatnonzero(mask.any(axis=0)).mean())
    assert not (left & right).any()
    assert _overlap(left[:, :320], truth) > 0.8
    assert _overlap(right[:, 320:], truth) > 0.8
    assert len(segment_people(image, 1)) == 1


def test_of_too_many_subjects_the_largest_stay_from_left_to_right(tmp_path):
    Image.new("RGB", (60, 40)).save(tmp_path / "crowd.png")
    masks = [np.zeros((40, 60), dtype=bool) for _ in range(3)]
    masks[0][:, 40:60], masks[1][:10, 30:35], masks[2][:, :15] = True, True, True
    (path,) = list_photos(tmp_path)

    class Given(Segmenter):
        def __call__(self, image):
            return masks

    item = PhotoSource(tmp_path, [path], max_people=2, segmenter=Given("none"))[0]
    labels = item.content.labels
    assert sorted(np.unique(labels).tolist()) == [0, 1, 2]
    np.testing.assert_array_equal(labels == 1, masks[2])
    np.testing.assert_array_equal(labels == 2, masks[0])
    assert any("max_people" in str(remark) for remark in item.remarks)
