"""Captions and masks by transformers' own pipelines, on tiny models with random weights."""

import pickle

import numpy as np
import pytest
import torch
from PIL import Image

from moa_train.data.schema import check_sample
from moa_train.data.sources.annotators import Captioner, Segmenter
from moa_train.data.sources.photos import PhotoSource

WORDS = [
    "[PAD]",
    "[UNK]",
    "[CLS]",
    "[SEP]",
    "[MASK]",
    "[DEC]",
    "[ENC]",
    "a",
    "man",
    "and",
    "woman",
    "photo",
    "sea",
    ".",
]


@pytest.fixture(scope="module")
def captioner(tmp_path_factory):
    from transformers import (
        BertTokenizerFast,
        BlipConfig,
        BlipForConditionalGeneration,
        BlipImageProcessor,
        BlipProcessor,
    )

    folder = tmp_path_factory.mktemp("blip")
    tokenizer = BertTokenizerFast(vocab={word: place for place, word in enumerate(WORDS)}, bos_token="[DEC]")
    small = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    ids = {"bos_token_id": 5, "eos_token_id": 3, "sep_token_id": 3, "pad_token_id": 0}
    text = {**small, **ids, "vocab_size": len(WORDS), "max_position_embeddings": 32, "encoder_hidden_size": 16}
    torch.manual_seed(0)
    config = BlipConfig(text_config=text, vision_config={**small, "image_size": 32, "patch_size": 16})
    BlipForConditionalGeneration(config).save_pretrained(folder)
    BlipProcessor(BlipImageProcessor(size={"height": 32, "width": 32}), tokenizer).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def segmenter(tmp_path_factory):
    from transformers import SegformerConfig, SegformerForSemanticSegmentation, SegformerImageProcessor

    folder = tmp_path_factory.mktemp("segformer")
    names = {0: "wall", 1: "Person", 2: "child"}
    torch.manual_seed(0)
    config = SegformerConfig(
        num_encoder_blocks=2, depths=[1, 1], sr_ratios=[2, 1], hidden_sizes=[8, 8], patch_sizes=[3, 3], strides=[2, 2],
        num_attention_heads=[1, 1], mlp_ratios=[1, 1], decoder_hidden_size=8, id2label=names,
        label2id={name: number for number, name in names.items()},
    )  # fmt: skip
    SegformerForSemanticSegmentation(config).save_pretrained(folder)
    SegformerImageProcessor(size={"height": 32, "width": 32}).save_pretrained(folder)
    return str(folder)


@pytest.fixture
def image():
    return np.random.default_rng(0).integers(0, 256, (40, 50, 3), dtype=np.uint8)


def _classes(folder, image):
    """The class of each pixel, by the model itself."""
    from transformers import SegformerForSemanticSegmentation, SegformerImageProcessor

    model = SegformerForSemanticSegmentation.from_pretrained(folder).eval()
    inputs = SegformerImageProcessor.from_pretrained(folder)(images=[Image.fromarray(image)], return_tensors="pt")
    with torch.no_grad():
        logits = model(**inputs).logits
    return torch.nn.functional.interpolate(logits, image.shape[:2], mode="bilinear").argmax(1)[0].numpy()


def test_a_mask_is_what_the_model_calls_by_the_label(segmenter, image):
    classes = _classes(segmenter, image)
    assert {1, 2} <= set(np.unique(classes).tolist())
    (mask,) = Segmenter(segmenter, ["person"], device="cpu")(image)
    np.testing.assert_array_equal(mask, classes == 1)
    both = Segmenter(segmenter, ["person", "child"], device="cpu")(image)
    np.testing.assert_array_equal(np.stack(both), np.stack([classes == 1, classes == 2]))
    with pytest.raises(ValueError, match=r"knows none of dog.*Person, child, wall"):
        Segmenter(segmenter, ["dog"], device="cpu")(image)


def test_a_caption_is_what_the_model_generates(captioner, image):
    from transformers import BlipForConditionalGeneration, BlipProcessor

    model, processor = (
        BlipForConditionalGeneration.from_pretrained(captioner).eval(),
        BlipProcessor.from_pretrained(captioner),
    )
    inputs = processor(images=Image.fromarray(image), text="", return_tensors="pt")
    expected = processor.decode(
        model.generate(**inputs, max_new_tokens=6, do_sample=False)[0], skip_special_tokens=True
    )
    caption = Captioner(captioner, max_tokens=6, device="cpu")(image)
    assert caption == expected.strip(" .")
    assert set(caption.split()) <= set(WORDS)


def test_photos_are_captioned_and_segmented_by_models_in_a_worker_too(captioner, segmenter, image, tmp_path):
    Image.fromarray(image).save(tmp_path / "a.png")
    source = PhotoSource(tmp_path, [tmp_path / "a.png"], captioner=Captioner(captioner, device="cpu"),
                         segmenter=Segmenter(segmenter, ["person", "child"], device="cpu"))  # fmt: skip
    first = source[0].content
    again = pickle.loads(pickle.dumps(source))[0].content
    assert check_sample(first) == []
    assert len(first.segments) == 2
    assert first.caption == again.caption
    np.testing.assert_array_equal(first.labels > 0, np.isin(_classes(segmenter, image), [1, 2]))


def test_a_model_that_is_not_there_is_told(tmp_path, image):
    for role in (Captioner, Segmenter):
        with pytest.raises(ValueError, match=rf"{role.__name__.lower()} .*none cannot be loaded as image-"):
            role(str(tmp_path / "none"), device="cpu")(image)
