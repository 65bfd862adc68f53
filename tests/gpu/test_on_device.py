"""What must hold on an accelerator: the same numbers as on the CPU, and the same identities. See scripts/on_gpu.sh.

Runs on `MOA_TEST_DEVICE` (default cuda) and is skipped where torch does not find it. MOA_TEST_DEVICE=cpu compares the
CPU with itself, which shows that the checks run.
"""

import copy
import os
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.append(str(Path(__file__).parents[1]))

import tiny
from moa_train import losses
from moa_train.denoiser import Denoiser
from moa_train.inference.pipeline import MoAPipeline
from moa_train.model.unet import MoAConfig, add_moa, personalized_state_dict, trainable_parameters
from moa_train.prior.load import load_prior
from moa_train.symbols import Conditioning

DEVICE = torch.device(os.environ.get("MOA_TEST_DEVICE", "cuda"))
pytestmark = pytest.mark.skipif(
    DEVICE.type == "cuda" and not torch.cuda.is_available(), reason="torch finds no CUDA device"
)
ROWS, SLOTS = 3, 2


@pytest.fixture(autouse=True)
def full_float32():
    """No TF32: the comparison is with the CPU's float32."""
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    return load_prior(str(tiny.save_prior(tmp_path_factory.mktemp("prior"))))


@pytest.fixture
def prior(loaded):
    """With random personalized weights."""
    prior = copy.deepcopy(loaded)
    torch.manual_seed(0)
    add_moa(prior.unet, MoAConfig(prior.image_encoder.dim, sinusoids=8))
    for value in personalized_state_dict(prior.unet).values():
        value.add_(torch.randn_like(value) * 0.2)
    return prior


def inputs(device, prior_rows=0):
    generator = torch.Generator().manual_seed(0)
    noisy = torch.randn(ROWS, 4, 8, 8, generator=generator)
    conditioning = Conditioning(
        torch.randn(ROWS, 77, tiny.TEXT_DIM, generator=generator),
        torch.randn(ROWS, SLOTS, tiny.IMAGE_DIM, generator=generator),
        torch.tensor([[3, 7]]).expand(ROWS, SLOTS),
        torch.tensor([[True, True], [True, False], [True, True]]),
        prior_rows,
    )
    return noisy.to(device), torch.tensor([10, 500, 990], device=device), conditioning.to(device)


def objective(prediction, seen):
    mask = torch.zeros(ROWS, 1, 8, 8, device=prediction.device)
    mask[..., 2:6, 2:6] = 1.0
    masked = losses.masked_reconstruction(prediction, torch.zeros_like(prediction), mask)
    attention = losses.mean_subject_attention(seen, (8, 8))
    present = torch.ones(ROWS, SLOTS, dtype=torch.bool, device=prediction.device)
    object_ = losses.object_loss(attention, mask.expand(-1, SLOTS, -1, -1), present)
    return (masked + losses.router_loss(losses.mean_prior_routing(seen, (8, 8)), mask) + object_).mean()


def test_prediction_and_observations_equal_the_cpu_s(prior):
    expected, seen = Denoiser(copy.deepcopy(prior.unet))(*inputs("cpu"))
    found, shown = Denoiser(prior.unet.to(DEVICE))(*inputs(DEVICE))
    assert torch.allclose(found.cpu(), expected, atol=2e-4, rtol=1e-4)
    for layer in seen.routing:
        assert torch.allclose(shown.routing[layer].cpu(), seen.routing[layer], atol=1e-4), layer
    for layer in seen.subject_attention:
        assert torch.allclose(shown.subject_attention[layer].cpu(), seen.subject_attention[layer], atol=1e-4), layer


def test_gradients_equal_the_cpu_s(prior):
    gradients = []
    for device in ("cpu", DEVICE):
        unet = copy.deepcopy(prior.unet).to(device)
        objective(*Denoiser(unet)(*inputs(device))).backward()
        trained = [item for group in trainable_parameters(unet).values() for item in group]
        gradients.append({name: parameter.grad.cpu() for name, parameter in trained})
        assert all(p.grad is None for n, p in unet.named_parameters() if n not in gradients[-1])
    scale = max(float(gradient.abs().max()) for gradient in gradients[0].values())
    for name, gradient in gradients[0].items():
        assert torch.allclose(gradients[1][name], gradient, atol=1e-4 * scale, rtol=1e-2), name


def test_rows_of_the_prior_alone_equal_the_plain_unet_bit_for_bit(loaded, prior):
    plain, unet = copy.deepcopy(loaded.unet).to(DEVICE), prior.unet.to(DEVICE)
    noisy, timesteps, conditioning = inputs(DEVICE, prior_rows=ROWS)
    with torch.no_grad():
        expected = plain(noisy, timesteps, conditioning.prior_tokens).sample
        found, _ = Denoiser(unet)(noisy, timesteps, conditioning)
    assert torch.equal(found, expected)


def test_checkpointing_leaves_the_gradients_alone(prior):
    gradients = []
    for checkpointed in (False, True):
        unet = copy.deepcopy(prior.unet).to(DEVICE).train()
        if checkpointed:
            unet.enable_gradient_checkpointing()
        objective(*Denoiser(unet)(*inputs(DEVICE))).backward()
        trained = [item for group in trainable_parameters(unet).values() for item in group]
        gradients.append({name: parameter.grad for name, parameter in trained})
    for name, gradient in gradients[0].items():
        assert torch.allclose(gradients[1][name], gradient, atol=1e-6, rtol=1e-4), name


def test_bfloat16_autocast_trains(prior):
    unet = prior.unet.to(DEVICE)
    parameters = [p for group in trainable_parameters(unet).values() for _, p in group]
    optimizer = torch.optim.AdamW(parameters, lr=1e-3, fused=DEVICE.type == "cuda")
    values = []
    for _ in range(8):
        with torch.autocast(DEVICE.type, torch.bfloat16):
            value = objective(*Denoiser(unet)(*inputs(DEVICE)))
        value.backward()
        optimizer.step()
        optimizer.zero_grad()
        values.append(float(value.detach()))
    assert np.isfinite(values).all()
    assert values[-1] < values[0]


def test_pictures_equal_the_cpu_s_also_when_the_parts_are_offloaded(prior):
    """Noise is drawn on the CPU, so a seed means the same picture everywhere."""
    mask = np.zeros((20, 24), dtype=bool)
    mask[4:16, 6:15] = True
    photo = (np.random.default_rng(0).integers(0, 255, (20, 24, 3), dtype=np.uint8), mask)
    pictures = []
    for device, offloaded in (("cpu", False), (DEVICE, False), (DEVICE, True)):
        parts = copy.deepcopy(prior)
        pipe = MoAPipeline(
            parts.vae, parts.text_encoder, parts.tokenizer, parts.unet, parts.scheduler, parts.image_encoder
        )
        if offloaded:
            pipe.enable_model_cpu_offload(device=device)
        else:
            pipe = pipe.to(device)
        pipe.set_progress_bar_config(disable=True)
        generator = torch.Generator().manual_seed(0)
        made = pipe("a man <1> at sea", [photo], num_inference_steps=3, generator=generator, output_type="np")
        pictures.append((made.images, pipe.routing.mean))
    for images, routing in pictures[1:]:
        assert np.abs(pictures[0][0] - images).max() < 2e-3
        assert torch.allclose(pictures[0][1].cpu(), routing.cpu(), atol=1e-3)
