"""Stands in for a trial's `moa-train`: reads the frozen configuration and behaves as its seed says, without a model.

Seed 0 finishes, 1 ends with an error, 2 is killed, 3 has its sweep interrupted, 4 falls behind and waits to be pruned,
5 is asked to end before it listens, 6 when it does.
"""

import os
import signal
import sys
import time
from pathlib import Path

import yaml

arguments = dict(argument.lstrip("-").partition("=")[::2] for argument in sys.argv[1:])
folder = Path(arguments["config-path"])
config = yaml.safe_load((folder / f"{arguments['config-name']}.yaml").read_text())
seed, gap = config["seed"], config["optim"]["lr"]
resumed = "ckpt" in arguments

with (folder / "metrics.csv").open("w") as file:
    file.write(f"step,train/loss,val/identity_gap\n1,0.5,\n2,0.25,{gap if seed != 4 else -1.0}\n")
signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
print(f"attempt {'on its own' if not resumed else arguments['ckpt']} in group {config['group']}", flush=True)
if seed == 1 and not resumed:
    (folder / "checkpoints").mkdir(exist_ok=True)
    (folder / "checkpoints" / "last.ckpt").touch()
    sys.exit("moa-train: error: the prior is missing")
if seed == 5:
    os.kill(os.getpid(), signal.SIGUSR2)
if seed == 6:
    sys.exit(128 + signal.SIGUSR2)
if seed == 2:
    os.kill(os.getpid(), signal.SIGKILL)
if seed == 3 and not resumed:
    (folder / "checkpoints").mkdir(exist_ok=True)
    (folder / "checkpoints" / "last.ckpt").touch()
    os.kill(os.getppid(), signal.SIGINT)
    time.sleep(60)
if seed == 4:
    time.sleep(60)
