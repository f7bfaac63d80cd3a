"""Every test runs on one torch thread, with no network and no hub."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch
from hypothesis import settings

# a deadline measures the machine, not the code
settings.register_profile("patient", deadline=None)
settings.load_profile("patient")
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def same_weights_every_time():
    """Layers are initialised from torch's global generator."""
    torch.manual_seed(0)
