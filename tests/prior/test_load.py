"""Where priors come from."""

import pytest
import torch
from transformers import CLIPTokenizer

from moa_train.prior.load import clip_tokenizer, load_prior, weights_fingerprint


def test_clips_tokenizer_gives_open_clips_ids():
    import open_clip

    texts = ["a photo of a man and a woman at the beach", "An astronaut, riding a horse: 1999!", "über-café"]
    ours = clip_tokenizer()
    theirs = open_clip.tokenizer.SimpleTokenizer()
    for text in texts:
        assert ours(text).input_ids[1:-1] == theirs.encode(text)
    assert (ours.bos_token_id, ours.eos_token_id, ours.model_max_length) == (49406, 49407, 77)
    assert isinstance(ours, CLIPTokenizer)


@pytest.mark.parametrize("source", ["nowhere", "./nowhere", "/nowhere/at/all"])
def test_a_source_that_is_nothing_is_refused_with_what_is_expected(source):
    with pytest.raises(ValueError, match=r"neither a folder nor a hub id: give toy, sd15_random"):
        load_prior(source)


def test_a_folder_without_a_part_is_refused_by_the_parts_name(tmp_path):
    with pytest.raises(ValueError, match=r"has no folder unet/"):
        load_prior(str(tmp_path))


def test_the_fingerprint_sees_a_changed_weight_and_not_the_device_or_order():
    a, b = torch.nn.Linear(3, 3), torch.nn.Linear(3, 3)
    b.load_state_dict(a.state_dict())
    assert weights_fingerprint(a) == weights_fingerprint(b)
    with torch.no_grad():
        b.weight[0, 0] += 1
    assert weights_fingerprint(a) != weights_fingerprint(b)


def test_the_bundled_prior_is_within_its_size_and_its_bars():
    import json

    from moa_train.prior.load import toy_prior_folder

    folder = toy_prior_folder()
    size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    assert size <= 30e6
    figures = json.loads((folder / "figures.json").read_text())
    assert figures["vae_psnr_db"] >= 27
    assert figures["prior_context_accuracy"] >= 0.9
