"""Nothing from outside is unpickled: read out of the sources, and tried with files that would run code."""

import ast
import os
from pathlib import Path

import pytest
import torch

import moa_train
import tiny
from moa_train.conditioning.encoders import build_image_encoder
from moa_train.data.storage import Cache
from moa_train.prior.load import load_prior

SOURCES = sorted(Path(moa_train.__file__).parent.rglob("*.py"))
SAFE_BY_ARGUMENT = {"torch.load": ("weights_only", True), "np.load": ("allow_pickle", False)}
UNPICKLERS = {
    "pickle.load",
    "pickle.loads",
    "pickle.Unpickler",
    "torch.jit.load",
    "joblib.load",
    "pd.read_pickle",
    "eval",
}


class Evil:
    """Pickled, it makes a file as soon as it is unpickled."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self):
        return os.mkdir, (str(self.trace),)


def unsafe_calls(text: str) -> list[str]:
    """Calls in a source that may unpickle."""
    found = []
    for call in (node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Call)):
        name = ast.unparse(call.func)
        argument, value = SAFE_BY_ARGUMENT.get(name, (None, None))
        given = [word.value for word in call.keywords if word.arg == argument]
        safe = any(isinstance(each, ast.Constant) and each.value is value for each in given)
        if name in UNPICKLERS or (argument is not None and not safe):
            found.append(f"{name}, line {call.lineno}")
    return found


def test_the_search_finds_what_it_looks_for():
    assert unsafe_calls("import torch\ntorch.load(f)\ntorch.load(f, weights_only=True)") == ["torch.load, line 2"]
    assert unsafe_calls("np.load(f, allow_pickle=True)\npickle.loads(b)") == ["np.load, line 1", "pickle.loads, line 2"]


def test_no_source_unpickles():
    assert len(SOURCES) > 50
    assert {path.name: found for path in SOURCES if (found := unsafe_calls(path.read_text()))} == {}


def test_a_prior_whose_weights_would_run_code_is_refused(tmp_path):
    prior = tiny.save_prior(tmp_path / "prior")
    (prior / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    torch.save({"weight": Evil(tmp_path / "it_ran")}, prior / "unet" / "diffusion_pytorch_model.bin")
    with pytest.raises((ValueError, OSError)):
        load_prior(str(prior))
    assert not (tmp_path / "it_ran").exists()


def test_an_image_encoder_whose_weights_would_run_code_is_refused(tmp_path):
    torch.save({"weight": Evil(tmp_path / "it_ran")}, tmp_path / "weights.pt")
    with pytest.raises(ValueError, match="cannot be loaded"):
        build_image_encoder("ViT-S-32-alt", str(tmp_path / "weights.pt"))
    assert not (tmp_path / "it_ran").exists()


def test_the_planted_object_does_run_where_it_is_unpickled(tmp_path):
    torch.save(Evil(tmp_path / "it_ran"), tmp_path / "weights.pt")
    torch.load(tmp_path / "weights.pt", weights_only=False)
    assert (tmp_path / "it_ran").is_dir()


@pytest.mark.parametrize("sha256", ["../../../../outside", "/" + "a" * 63, "A" * 64, "a" * 63, ""])
def test_an_index_cannot_place_files_outside_the_cache(tmp_path, sha256):
    with pytest.raises(ValueError, match="is not a SHA-256"):
        Cache.at(tmp_path / "cache").open("http://localhost:1/x.tar", sha256)
    assert list(tmp_path.rglob("*")) == []


@pytest.mark.parametrize(
    "url", ["http://host/..", "http://host/../..", "http://host/a/../../b", "s3://bucket/..%2f..%2fx"]
)
def test_a_url_with_dots_stays_in_the_cache(tmp_path, url):
    cache = Cache.at(tmp_path / "cache")
    assert cache.path(url, "0" * 64).resolve().parent == (tmp_path / "cache").resolve()
