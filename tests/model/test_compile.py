"""Blocks compiled by inductor, whose code the machine's C++ compiler builds, compute what the eager ones compute."""

import shutil

import jaxtyping
import pytest
import torch

from moa_train.denoiser import Denoiser
from moa_train.model.unet import compile_blocks

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler"),
]


@pytest.fixture
def compiler(tmp_path, monkeypatch):
    """Starts afresh, and leaves shape checks alone, which else are compiled, too."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    jaxtyping.config.update("jaxtyping_disable", True)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield torch._dynamo.utils.counters
    torch._dynamo.reset()
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.mark.filterwarnings("ignore")  # of the compiler's own dependencies
def test_inductor_s_blocks_give_the_eager_prediction_routing_and_attention(tools, compiler):
    denoiser = Denoiser(tools.trained())
    given = (*tools.latents(), tools.make_conditioning())
    with torch.no_grad():
        expected, seen = denoiser(*given)
        compile_blocks(denoiser.unet, fullgraph=True)
        prediction, shown = denoiser(*given)
    assert compiler["stats"]["unique_graphs"] > 0
    torch.testing.assert_close(prediction, expected, rtol=1e-4, atol=1e-5)
    for name in ("routing", "subject_attention"):
        found, eager = getattr(shown, name), getattr(seen, name)
        assert found.keys() == eager.keys() != set()
        for layer, value in eager.items():
            torch.testing.assert_close(found[layer], value, rtol=1e-4, atol=1e-5)
