"""What holds for every test: shapes and types of annotated functions are checked, nothing goes to the network."""

import logging
import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["WANDB_MODE"] = "offline"
os.environ["MPLBACKEND"] = "agg"
os.environ["OMP_NUM_THREADS"] = "1"  # of the processes that tests start, too: `make test` runs two tests at once

import torch
from jaxtyping import install_import_hook

install_import_hook("moa_train", "beartype.beartype")
torch.set_num_threads(1)


def pytest_runtest_teardown():
    """Commands that run in the tests' process set what holds for all of it.

    The number of threads, on which the last bits of sums depend, and the level of logging, by Hydra.
    """
    torch.set_num_threads(1)
    logging.root.setLevel(logging.WARNING)
