"""`moa-export`: the file is the checkpoint, says where it comes from, and gives nothing away; what a hub gets."""

import json
import os
import subprocess
import sys
import threading
from base64 import b64decode
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from safetensors import safe_open

from calling import call, refused
from moa_train.checkpoint import export_personalized, load_personalized
from moa_train.cli import export
from moa_train.inference.pictures import save_png
from moa_train.inference.weights import load_personalized_prior
from moa_train.model.unet import MoAConfig, add_moa, load_personalized_state_dict, personalized_state_dict
from moa_train.prior.load import load_prior
from moa_train.training.export import export_checkpoint
from moa_train.training.metrics_csv import read_rows
from moa_train.training.privacy import without_private
from tiny import load

HF_TOKEN, WANDB_KEY = "hf_" + "Qx" * 17, "0123456789abcdef" * 2 + "01234567"


@pytest.mark.parametrize("ema", [True, False])
def test_an_export_in_float32_is_the_checkpoint_to_the_bit(world, finished, tmp_path, monkeypatch, ema):
    out = tmp_path / "personalized.safetensors"
    code = call(export.main, monkeypatch, f"ckpt={finished}", f"out={out}", "dtype=float32", f"ema={str(ema).lower()}")
    assert code == 0
    checkpoint = load(finished)
    expected = checkpoint["ema"]["average"] if ema else checkpoint["state_dict"]
    state, metadata = load_personalized(out)
    prior = load_prior(str(world.folder / "prior"))
    unet = add_moa(prior.unet, MoAConfig(**metadata["moa"]))
    load_personalized_state_dict(unet, state)
    loaded = {f"denoiser.unet.{name}": value for name, value in personalized_state_dict(unet).items()}
    assert loaded.keys() == expected.keys()
    assert all(torch.equal(loaded[name], value) for name, value in expected.items())
    assert (metadata["step"], metadata["ema"], metadata["prior"]["weights"]) == (4, ema, prior.identity["weights"])
    assert metadata["config"]["max_steps"] == 4


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_an_export_in_half_precision_is_the_rounded_average(finished, tmp_path, dtype):
    out = tmp_path / "personalized.safetensors"
    assert export_checkpoint(finished / "checkpoints" / "last.ckpt", out, dtype)["step"] == 4
    average = load(finished)["ema"]["average"]
    with safe_open(out, "pt") as file:
        for name in file.keys():  # noqa: SIM118
            assert torch.equal(file.get_tensor(name), average[f"denoiser.unet.{name}"].to(getattr(torch, dtype)))


def test_files_that_are_no_checkpoint_are_refused_in_one_line(finished, tmp_path, monkeypatch, capfd):
    whole = (finished / "checkpoints" / "last.ckpt").read_bytes()
    torch.save({"state_dict": {}}, tmp_path / "foreign.ckpt")
    (tmp_path / "torn.ckpt").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "empty.ckpt").write_bytes(b"")
    for name in ("foreign.ckpt", "torn.ckpt", "empty.ckpt", "nowhere.ckpt"):
        assert name in refused(export.main, monkeypatch, capfd, f"ckpt={tmp_path / name}")
    assert "dtype=int8" in refused(export.main, monkeypatch, capfd, f"ckpt={finished}", "dtype=int8")


def test_an_exported_file_written_again_is_the_same_bytes(finished, tmp_path, monkeypatch):
    first, again, by_command = (tmp_path / f"{name}.safetensors" for name in ("first", "again", "by_command"))
    export_checkpoint(finished / "checkpoints" / "last.ckpt", first, "bfloat16", metrics=finished / "metrics.csv")
    export_personalized(again, *load_personalized(first))
    assert call(export.main, monkeypatch, f"ckpt={first}", f"out={by_command}", "dtype=bfloat16") == 0
    assert first.read_bytes() == again.read_bytes() == by_command.read_bytes()


def test_the_metadata_say_what_the_weights_are(finished, tmp_path, monkeypatch):
    out = tmp_path / "personalized.safetensors"
    assert call(export.main, monkeypatch, f"ckpt={finished}", f"out={out}", "license=cc-by-4.0") == 0
    _, metadata = load_personalized(out)
    last = read_rows(finished / "metrics.csv")[-1]
    assert metadata["license"] == "cc-by-4.0"
    assert metadata["metrics"]["step"] == 4
    assert metadata["metrics"]["val/masked"] == float(last["val/masked"])
    assert metadata["moa_train_version"] == load(finished)["moa_train"]["moa_train_version"]
    assert metadata["dtype"] == "float16"
    assert not [name for name in metadata["metrics"] if not name.startswith("val/") and name != "step"]


def test_the_metrics_are_of_the_checkpoints_step_or_before(finished, tmp_path):
    steps = {}
    for name in ("step=000003.ckpt", "last.ckpt"):
        metadata = export_checkpoint(
            finished / "checkpoints" / name, tmp_path / "x.safetensors", metrics=finished / "metrics.csv"
        )
        steps[name] = metadata["metrics"]["step"]
    assert steps == {"step=000003.ckpt": 2, "last.ckpt": 4}
    assert load_personalized(tmp_path / "x.safetensors")[1]["license"] is None


def test_weights_that_half_precision_cannot_hold_are_refused(finished, tmp_path):
    state, metadata = load_personalized(export_of(finished, tmp_path, "float32"))
    name = min(state)
    state[name] = torch.full_like(state[name], 1e6)
    export_personalized(tmp_path / "large.safetensors", state, metadata)
    with pytest.raises(ValueError, match=f"{name} has values that float16 cannot hold"):
        export_checkpoint(tmp_path / "large.safetensors", tmp_path / "out.safetensors", "float16")
    assert not (tmp_path / "out.safetensors").exists()


def export_of(run, folder, dtype="float16"):
    export_checkpoint(run / "checkpoints" / "last.ckpt", folder / "personalized.safetensors", dtype)
    return folder / "personalized.safetensors"


# --------------------------------------------------------------------------------------------------- what is given away
@pytest.mark.parametrize(
    ("private", "public"),
    [
        ("/home/alice/models/sd15", "<local>/sd15"),
        ("/home/alice", "<local>"),
        ("~/my models/sd 15", "<local>/sd 15"),
        ("../alice/data", "<local>/data"),
        (r"C:\Users\alice\sd15", "<local>/sd15"),
        (r"\\server\share\alice\x", "<local>/x"),
        ("file:///home/alice/x", "<local>/x"),
        ("/data/a::/home/alice/b,/data/c", "<local>/a::<local>/b,<local>/c"),
        ("pipe:cat /home/alice/train.tar", "pipe:cat <local>/train.tar"),
        ("s3://key:secret@bucket/data?X-Amz-Signature=1", "s3://bucket/data"),
        ("https://host/a?token=abc#part", "https://host/a"),
        (f"login {HF_TOKEN}", "login <removed>"),
        (WANDB_KEY, "<removed>"),
        ("Bearer abc.def", "<removed>"),
    ],
)
def test_what_is_private_is_taken_out_of_text(private, public):
    assert without_private(private) == public
    assert without_private(public) == public


@pytest.mark.parametrize(
    "public",
    ["owner/name", "data/toy/train", "./data", "a man/woman", "hf-hub:owner/name", "1e-4", "moa_train.x.Y", "a, b"],
)
def test_what_is_not_private_stays(public):
    assert without_private(public) == public


def test_settings_that_name_a_secret_or_a_place_of_the_run_are_left_out():
    settings = {
        "data": {"train": {"/home/alice/a": 0.5}, "storage": {"hub_token": "x", "apiKey": "y", "password": "z"}},
        "logger": {"wandb": {"entity": "alice"}},
        "run_dir": "runs/alice",
        "tokens": [1, 2.5, None, True],
        "author": "who wants to be named",
    }
    assert without_private(settings) == {
        "data": {"train": {"<local>/a": 0.5}, "storage": {}},
        "tokens": [1, 2.5, None, True],
        "author": "who wants to be named",
    }


def test_no_secret_and_no_path_of_the_machine_gets_into_the_file_or_its_card(finished, tmp_path, monkeypatch):
    run, home = tmp_path / "home" / "alice" / "run", str(tmp_path)
    checkpoint = load(finished)
    about = checkpoint["moa_train"]
    about["config"] |= {"hub_token": HF_TOKEN, "note": f"uploaded with {HF_TOKEN}", "runs": home}
    about["config"]["logger"] = {"wandb": {"api_key": WANDB_KEY, "save_dir": home}}
    assert home.rpartition("/")[0] in json.dumps(about), "the tiny world lies in a folder of this machine"
    (run / "checkpoints").mkdir(parents=True)
    torch.save(checkpoint, run / "checkpoints" / "last.ckpt")
    (run / "metrics.json").write_text(json.dumps({**EVALUATED, "protocol": {"weights": f"{home}/x", "key": WANDB_KEY}}))
    save_png(run / "samples.png", Image.new("RGB", (8, 8)), {"prior": home, "token": HF_TOKEN})
    assert call(export.main, monkeypatch, f"ckpt={run}", f"hub={tmp_path / 'card'}") == 0
    for path in [run / "personalized.safetensors", *(tmp_path / "card").iterdir()]:
        content = path.read_bytes()
        for private in (HF_TOKEN, WANDB_KEY, home, str(finished), "/pytest-", "alice"):
            assert private.encode() not in content, (path.name, private)


def test_an_image_encoder_of_a_folder_is_the_priors_own_after_the_export_and_a_warning_says_so(
    world, finished, tmp_path, caplog
):
    weights = export_of(finished, tmp_path)
    assert load_personalized(weights)[1]["config"]["image_encoder"]["name"] == "<local>/image_encoder"
    prior, _ = load_personalized_prior(world.folder / "prior", weights)
    assert "an image encoder of their own (<local>/image_encoder)" in caplog.text
    own = load_prior(str(world.folder / "prior")).image_encoder.state_dict()
    assert all(torch.equal(own[name], value) for name, value in prior.image_encoder.state_dict().items())


# -------------------------------------------------------------------------------------------------------------- the hub
QUESTIONS = (
    "identity.moa", "identity.wrong_subject", "identity.prior", "identity.real", "context_difference.moa",
    "context_difference.other_seed", "context_accuracy.moa", "context_accuracy.prior", "context_accuracy.real",
    "routing_iou", "diversity.moa", "diversity.prior", "person_found.moa", "person_found.prior",
)  # fmt: skip
EVALUATED: dict = {"method": "moa", "intervals": {name: [0.125, 0.375] for name in QUESTIONS}, "routing_iou": 0.23456}
for name in QUESTIONS[:9] + QUESTIONS[10:]:
    EVALUATED.setdefault(name.split(".")[0], {})[name.split(".")[1]] = 0.25


def test_a_folder_as_hub_gets_the_card_with_pictures_figures_and_use(finished, tmp_path, monkeypatch, capfd):
    out = tmp_path / "personalized.safetensors"
    settings = [f"ckpt={finished}", f"out={out}", f"hub={tmp_path / 'name'}", "license=mit"]
    assert call(export.main, monkeypatch, *settings) == 0
    folder = tmp_path / "name"
    files = {"README.md", "config.json", "personalized.safetensors", "samples.png", "routing.png"}
    assert {path.name for path in folder.iterdir()} == files
    assert (folder / "personalized.safetensors").read_bytes() == out.read_bytes()
    assert json.loads((folder / "config.json").read_text()) == load_personalized(out)[1]
    with Image.open(folder / "samples.png") as shown, Image.open(finished / "samples" / "step=000004.png") as drawn:
        assert np.array_equal(np.asarray(shown), np.asarray(drawn.convert("RGB")))
        assert not shown.text
    _, front, card = (folder / "README.md").read_text().split("---\n", 2)
    about = yaml.safe_load(front)
    assert (about["license"], about["library_name"], about["pipeline_tag"]) == ("mit", "moa-train", "text-to-image")
    assert "base_model" not in about, "the prior is a folder of this machine"
    assert "# name" in card
    assert "![samples](samples.png)" in card
    masked = float(read_rows(finished / "metrics.csv")[-1]["val/masked"])
    assert f"| masked | {masked:.4g} |" in card
    assert "moa-generate prior=PRIOR weights=personalized.safetensors" in card
    assert "is not an empty folder" in refused(export.main, monkeypatch, capfd, *settings)


def test_the_card_has_the_measured_figures_and_names_a_prior_of_the_hub(finished, tmp_path, monkeypatch):
    state, metadata = load_personalized(export_of(finished, tmp_path))
    metadata["prior"]["name"] = "owner/prior"
    export_personalized(tmp_path / "run" / "mine.safetensors", state, metadata)
    (tmp_path / "run" / "metrics.json").write_text(json.dumps(EVALUATED))
    Image.new("RGB", (8, 8)).save(tmp_path / "run" / "samples.png")
    weights = tmp_path / "run" / "mine.safetensors"
    settings = [f"ckpt={weights}", f"out={weights}", f"hub={tmp_path / 'hub'}", "pictures=false"]
    assert call(export.main, monkeypatch, *settings) == 0
    assert {path.name for path in (tmp_path / "hub").iterdir()} == {
        "README.md", "config.json", "metrics.json", "mine.safetensors"
    }  # fmt: skip
    _, front, card = (tmp_path / "hub" / "README.md").read_text().split("---\n", 2)
    assert yaml.safe_load(front)["base_model"] == "owner/prior"
    assert "license" not in yaml.safe_load(front)
    assert "Licence: not stated" in card
    assert "| Did the router find the person? | MoA | 0.2346 | 0.125 – 0.375 |" in card
    assert 'from_pretrained("owner/prior", weights="mine.safetensors")' in card


def test_figures_of_something_else_are_named(finished, tmp_path, monkeypatch, capfd):
    weights = export_of(finished, tmp_path)
    (tmp_path / "metrics.json").write_text('{"loss": 1.0}')
    told = refused(export.main, monkeypatch, capfd, f"ckpt={weights}", f"hub={tmp_path / 'hub'}")
    assert "metrics.json is not what moa-eval writes" in told


@pytest.mark.parametrize("hub", ["name", "a/b/c", "user/na me"])
def test_a_hub_that_is_neither_repository_nor_folder_is_refused_before_anything_is_written(
    finished, tmp_path, monkeypatch, capfd, hub
):
    out = tmp_path / "personalized.safetensors"
    told = refused(export.main, monkeypatch, capfd, f"ckpt={finished}", f"out={out}", f"hub={hub}")
    assert "expected a repository, user/name, or a folder" in told
    assert not out.exists()


class Hub(BaseHTTPRequestHandler):
    """As much of the hub's protocol as an upload of small files speaks."""

    files: dict[str, bytes] = {}  # noqa: RUF012 (one server a test)
    created: list[str] = []  # noqa: RUF012

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        address = f"http://{self.headers['Host']}/user/name"
        if self.path.endswith("/preupload/main"):
            asked = json.loads(body)["files"]
            answer = {"files": [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in asked]}
        elif self.path.endswith("/commit/main"):
            operations = [json.loads(line) for line in body.splitlines()]
            files = [operation["value"] for operation in operations if operation["key"] == "file"]
            self.files |= {file["path"]: b64decode(file["content"]) for file in files}
            answer = {"commitUrl": f"{address}/commit/1", "commitOid": "1", "success": True}
        elif self.path == "/api/repos/create":
            self.created.append(json.loads(body)["name"])
            answer = {"url": address}
        else:
            answer = {}
        self._answer(answer)

    def do_GET(self):
        self._answer({"id": "user/name", "sha": "0", "siblings": []})

    def _answer(self, answer):
        data = json.dumps(answer).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_):
        pass


def test_a_repository_gets_exactly_the_files_of_a_folder(finished, tmp_path, monkeypatch):
    settings = [f"ckpt={finished}", f"out={tmp_path / 'personalized.safetensors'}"]
    assert call(export.main, monkeypatch, *settings, f"hub={tmp_path / 'name'}") == 0
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}"
    environment = {**os.environ, "HF_ENDPOINT": address, "HF_TOKEN": HF_TOKEN, "HF_HUB_OFFLINE": "0"}
    command = [sys.executable, "-m", "moa_train.export", *settings, "hub=user/name"]
    try:
        done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=tmp_path)
    finally:
        server.shutdown()
        server.server_close()
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == f"{address}/user/name/commit/1"
    assert Hub.created == ["name"]
    assert Hub.files == {path.name: path.read_bytes() for path in (tmp_path / "name").iterdir()}
