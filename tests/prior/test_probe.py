"""The measuring networks' geometry and files."""

import numpy as np
import pytest
import torch

from moa_train.prior.probe import Probe, crop_people, load_probe, save_probe


def test_a_crop_is_the_square_around_the_mask_with_its_margin():
    picture = torch.zeros(1, 3, 64, 64)
    picture[:, 0] = torch.linspace(0, 1, 64)[None, :]
    picture[:, 1] = torch.linspace(0, 1, 64)[:, None]
    mask = torch.zeros(1, 64, 64, dtype=torch.bool)
    mask[0, 20:40, 24:34] = True
    crop = crop_people(picture, mask)[0]
    # Centre (29, 30), half side 1.1 * 20 / 2 = 11; pixel centres of a linear ramp are interpolated exactly.
    lines = (np.arange(64) + 0.5) / 64 * 22 - 11
    np.testing.assert_allclose(crop[0, 0].numpy(), (29 + lines - 0.5) / 63, atol=1e-5)
    np.testing.assert_allclose(crop[1, :, 0].numpy(), (30 + lines - 0.5) / 63, atol=1e-5)


def test_an_empty_mask_takes_the_whole_picture():
    picture = torch.rand(1, 3, 64, 64)
    crop = crop_people(picture, torch.zeros(1, 64, 64, dtype=torch.bool))
    assert crop.shape == (1, 3, 64, 64)
    torch.testing.assert_close(crop.mean(), picture.mean(), atol=0.02, rtol=0)


def test_a_saved_probe_measures_the_same_within_half_precision(tmp_path):
    probe = Probe(16, ("here", "there")).eval()
    save_probe(probe, tmp_path)
    loaded = load_probe(tmp_path)
    pictures = torch.rand(2, 3, 64, 64)
    assert loaded.contexts == ("here", "there")
    torch.testing.assert_close(loaded.identity(pictures), probe.identity(pictures), atol=5e-3, rtol=0)
    torch.testing.assert_close(loaded.person(pictures), probe.person(pictures), atol=5e-3, rtol=0)
    torch.testing.assert_close(loaded.context(pictures), probe.context(pictures), atol=5e-3, rtol=0)
    assert not any(parameter.requires_grad for parameter in loaded.parameters())


def test_a_folder_without_a_probe_is_refused_by_name(tmp_path):
    with pytest.raises(ValueError, match=r"no probe in .*expected probe\.safetensors"):
        load_probe(tmp_path)
