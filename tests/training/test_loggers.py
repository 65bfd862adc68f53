"""A logger that fails does not end a run: no server, a full disk; `metrics.csv` is whole."""

import json
import logging
import os
import shutil
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from moa_train.training.loggers import TensorBoard, Wandb
from moa_train.training.metrics_csv import read_rows

STEPS = 4


def train(world, run_dir, *settings, before=(), **environment):
    """`moa-train` in a process of its own, after a shell's commands; a run that hangs is a TimeoutExpired."""
    arguments = world.overrides(f"max_steps={STEPS}", f"run_dir={run_dir}", *settings)
    script = " && ".join([*before, 'exec "$@"'])
    command = ["sh", "-c", script, "sh", sys.executable, "-m", "moa_train.train", *arguments]
    if before:
        command = ["unshare", "--user", "--map-root-user", "--mount", *command]
    done = subprocess.run(
        command, env={**os.environ, **environment}, capture_output=True, text=True, check=False, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert [row["step"] for row in read_rows(run_dir / "metrics.csv")] == [str(n) for n in range(1, STEPS + 1)]
    assert "Traceback" not in (run_dir / "train.log").read_text()
    return [line for line in (run_dir / "train.log").read_text().splitlines() if " WARNING " in line]


@pytest.mark.slow
def test_without_wandbs_server_the_run_goes_on_offline_and_says_so_once(world, tmp_path):
    settings = ("logger=wandb", "logger.wandb.offline=false")
    closed = {"WANDB_MODE": "online", "WANDB_BASE_URL": "http://127.0.0.1:9", "WANDB_API_KEY": "0" * 40}
    warnings = train(world, tmp_path / "run", *settings, **closed)
    assert len([line for line in warnings if "wandb cannot be reached" in line]) == 1
    (kept,) = (tmp_path / "run" / "wandb").glob("offline-run-*/*.wandb")
    assert kept.stat().st_size > 0


class WandbServer:
    """Answers as much of wandb's protocol as a run needs to begin, then hangs up on everybody."""

    def __init__(self):
        self.begun = threading.Event()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self):
                body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
                if outer.begun.is_set():
                    self.close_connection = True
                    return  # no answer
                answer = json.dumps({"data": outer.answer(body.decode(errors="replace"))}).encode()
                self.send_response(200)
                self.send_header("Content-Length", str(len(answer)))
                self.end_headers()
                self.wfile.write(answer)
                if b"mutation UpsertBucket" in body:
                    outer.begun.set()

            def log_message(self, *arguments):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    @staticmethod
    def answer(query):
        entity = {"id": "e", "name": "me"}
        bucket = {"id": "r", "name": "r", "config": "{}", "project": {"id": "p", "name": "p", "entity": entity}}
        viewer = {"id": "u", "entity": "me", "username": "me", "flags": "{}", "teams": {"edges": []}}
        return {"viewer": viewer} if "viewer" in query else {"upsertBucket": {"bucket": bucket, "inserted": True}}

    def close(self):
        self.server.shutdown()
        self.server.server_close()


@pytest.mark.slow
def test_when_wandbs_server_dies_during_a_run_the_run_goes_on_and_ends(world, tmp_path):
    server = WandbServer()
    online = {"WANDB_MODE": "online", "WANDB_BASE_URL": server.url, "WANDB_API_KEY": "0" * 40}
    try:
        settings = ("logger=wandb", "logger.wandb.offline=false", "logger.wandb.finish_timeout=2.0")
        warnings = train(world, tmp_path / "run", *settings, **online)
    finally:
        server.close()
    assert server.begun.is_set()  # the run had begun online
    assert not [line for line in warnings if "cannot be reached" in line]
    (kept,) = (tmp_path / "run" / "wandb").glob("run-*/*.wandb")
    assert kept.stat().st_size > 0


def can_mount() -> bool:
    """Whether this user may mount a small disk of their own."""
    command = ["unshare", "--user", "--map-root-user", "--mount", "mount", "-t", "tmpfs", "none", "/mnt"]
    return (
        shutil.which("unshare") is not None
        and subprocess.run(command, capture_output=True, check=False).returncode == 0
    )


@pytest.mark.slow
@pytest.mark.skipif(not can_mount(), reason="needs a disk that it can fill: unshare --mount is not allowed here")
@pytest.mark.parametrize("name", ["wandb", "tensorboard"])
def test_on_a_full_disk_the_run_goes_on_without_the_logger(world, tmp_path, name):
    disk = tmp_path / "disk"
    disk.mkdir()
    fill = (f"mount -t tmpfs -o size=64k none {disk}", f"(cat /dev/zero > {disk}/fill || true) 2>/dev/null")
    warnings = train(world, tmp_path / "run", f"logger={name}", f"logger.{name}.save_dir={disk}", before=fill)
    assert [line for line in warnings if "failed" in line and "metrics.csv" in line] != [] or name == "wandb"


def test_a_logger_is_called_no_more_once_it_failed(tmp_path, caplog, monkeypatch):
    log = TensorBoard(save_dir=str(tmp_path), name="", version="")
    calls = []

    def fail(*values):
        calls.append(values)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(log.experiment, "add_scalar", fail)
    with caplog.at_level(logging.WARNING):
        for step in range(3):
            log.log_metrics({"a": 1.0}, step)
        log.save()
        log.finalize("success")
    assert len(calls) == 1
    (record,) = caplog.records
    assert record.getMessage().startswith("TensorBoard failed (OSError: [Errno 28] No space left")


def test_wandbs_server_is_waited_for_a_bounded_time():
    settings = Wandb(project="p")._wandb_init["settings"]
    assert 0 < settings.init_timeout <= 60
    assert 0 < settings.finish_timeout <= 120
