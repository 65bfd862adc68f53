"""Exports come back to the bit; what is not a whole export is refused in one line; a kill leaves the old file."""

import json
import os
import pickle
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from moa_train.checkpoint import atomic_write, export_personalized, load_personalized

METADATA = {"moa": {"image_dim": 4}, "prior": {"name": "toy", "weights": "abc"}, "step": 7, "note": "ä"}


@pytest.fixture
def state():
    return {"a.weight": torch.randn(3, 4), "b": torch.randn(5).bfloat16(), "transposed": torch.randn(2, 3).T}


@pytest.fixture
def exported(tmp_path, state):
    path = tmp_path / "personalized.safetensors"
    export_personalized(path, state, METADATA)
    return path


def test_a_pickle_is_refused_without_running_what_is_in_it(tmp_path):
    class Bomb:
        def __reduce__(self):
            return Path.touch, (tmp_path / "ran",)

    (tmp_path / "weights.safetensors").write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(ValueError, match="may run code"):
        load_personalized(tmp_path / "weights.safetensors")
    assert not (tmp_path / "ran").exists()
    pickle.loads((tmp_path / "weights.safetensors").read_bytes())
    assert (tmp_path / "ran").exists(), "the pickle would have run"


def test_an_export_comes_back_to_the_bit(exported, state):
    loaded, metadata = load_personalized(exported)
    assert loaded.keys() == state.keys()
    for name, value in state.items():
        assert loaded[name].dtype == value.dtype
        assert torch.equal(loaded[name], value)
    assert {key: metadata[key] for key in METADATA} == METADATA
    assert metadata["dtype"] == "bfloat16+float32"


def test_any_safetensors_reader_opens_an_export(exported, state):
    with safe_open(exported, framework="np") as file:
        assert set(file.keys()) == set(state)
        assert json.loads(file.metadata()["moa_train"])["format"] == "moa_train.personalized"


def one_line(path):
    with pytest.raises(ValueError, match=r".") as error:
        load_personalized(path)
    assert "\n" not in str(error.value)
    assert str(path) in str(error.value)
    return str(error.value)


def test_what_is_not_a_whole_export_is_refused(exported, tmp_path, state):
    assert "not a file" in one_line(tmp_path / "missing.safetensors")
    pickled, saved, foreign = (tmp_path / name for name in ("pickle.pt", "torch.pt", "foreign.safetensors"))
    pickled.write_bytes(pickle.dumps(state))
    torch.save(state, saved)
    save_file({"a": torch.zeros(1)}, foreign)
    for path in (pickled, saved):
        assert "may run code when it is read: give the .safetensors file that moa-export ckpt=" in one_line(path)
    assert "give the .safetensors file that moa-export wrote" in one_line(foreign)
    save_file({"a": torch.zeros(1)}, foreign, metadata={"moa_train": "{no json"})
    assert "not JSON" in one_line(foreign)
    save_file({"a": torch.zeros(1)}, foreign, metadata={"moa_train": "[1]"})
    assert "export it again" in one_line(foreign)
    content = exported.read_bytes()
    for length in (0, 5, 40, len(content) - 1):
        exported.write_bytes(content[:length])
        assert "not a whole safetensors file" in one_line(exported)


def test_other_versions_and_lacking_metadata_are_named(tmp_path):
    path = tmp_path / "file.safetensors"
    for header, match in (
        ({"format": "moa_train.personalized", "version": 99}, "version 99"),
        ({"format": "other", "version": 1}, "other version 1"),
        ({"format": "moa_train.personalized", "version": 1, "moa": {}, "step": 1}, "lacks prior"),
    ):
        save_file({"a": torch.zeros(1)}, path, metadata={"moa_train": json.dumps(header)})
        assert match in one_line(path)
    with pytest.raises(ValueError, match="lacks prior, step"):
        export_personalized(path, {}, {"moa": {}})


def test_a_failing_writer_leaves_the_old_file_and_no_temporary(tmp_path):
    path = tmp_path / "file"
    path.write_text("old")

    def fail(temporary):
        temporary.write_text("half")
        raise RuntimeError("disk full")

    with pytest.raises(RuntimeError, match="disk full"):
        atomic_write(path, fail)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]
    atomic_write(path, lambda temporary: temporary.write_text("new"))
    assert path.read_text() == "new"
    assert list(tmp_path.iterdir()) == [path]


def test_the_temporary_lies_beside_the_target_and_is_on_the_disk_before_the_rename(tmp_path, monkeypatch):
    events = []
    fsync, replace = os.fsync, Path.replace
    monkeypatch.setattr(os, "fsync", lambda descriptor: (events.append("fsync"), fsync(descriptor)))
    monkeypatch.setattr(Path, "replace", lambda self, target: (events.append("rename"), replace(self, target))[1])
    parents = []

    def write(temporary):
        parents.append(temporary.parent)
        temporary.write_text("new")
        events.append("write")

    atomic_write(tmp_path / "folder" / "file", write)
    assert parents == [tmp_path / "folder"]
    assert events == ["write", "fsync", "rename", "fsync"]


def test_a_kill_between_writing_and_renaming_leaves_the_old_file(tmp_path):
    path = tmp_path / "file"
    path.write_text("old")
    program = (
        "import os, signal, sys\n"
        "from pathlib import Path\n"
        "from moa_train.checkpoint import atomic_write\n"
        "Path.replace = lambda self, target: os.kill(os.getpid(), signal.SIGKILL)\n"
        "atomic_write(sys.argv[1], lambda temporary: temporary.write_text('new'))\n"
    )
    source = Path(sys.modules["moa_train.checkpoint"].__file__).parents[1]
    environment = {**os.environ, "PYTHONPATH": str(source)}
    done = subprocess.run([sys.executable, "-c", program, str(path)], env=environment, check=False)
    assert done.returncode == -signal.SIGKILL
    assert path.read_text() == "old"
