"""What the tests share: a tiny real pipeline, a few real digits, and a plain way to compute what dmin
computes.
"""
import atexit
import gc
import os
import shutil
import sys
from functools import lru_cache

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel

from dmin import collect
from dmin.core.gradients import flatten_like_gradient
from dmin.reproduction.image_sets import load_images

# for real processes: forks with the libraries in memory, where tools/forked.py offers them
PYTHON = os.environ.get("FORKED_PYTHON", sys.executable)

gc.freeze()   # collecting garbage need not look through the libraries' objects: a tenth of the tests' time
atexit.register(gc.unfreeze)


def make_unet(size=8, seed=0, **config):
    torch.manual_seed(seed)
    usual = dict(
        sample_size=size,
        in_channels=1,
        out_channels=1,
        block_out_channels=(8, 16),
        norm_num_groups=4,
        layers_per_block=1,
        attention_head_dim=8,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"))
    return UNet2DModel(**{**usual, **config})


def make_pipeline(size=8, seed=0, scheduler=DDPMScheduler, pipeline=DDPMPipeline, **config):
    return pipeline(make_unet(size, seed, **config), scheduler())


def one_by_one(parameters, loss_of, n):
    """Gradients (n, d), one sample and one backward pass at a time."""
    rows = []
    for i in range(n):
        grads = torch.autograd.grad(
            loss_of(i), list(parameters.values()), allow_unused=True, materialize_grads=True)
        rows.append(torch.cat([flatten_like_gradient(g) for g in grads]))
    return torch.stack(rows)


@pytest.fixture
def pipe(): return make_pipeline()


RECIPE = dict(v=64, timesteps=2, shard_size=4, progress=False)


@pytest.fixture(scope="session")
def collected(digits, tmp_path_factory):
    """A function of n: the folder of a store of so many digits, by `RECIPE`, which nobody changes."""
    folder = tmp_path_factory.mktemp("collected")

    @lru_cache
    def of(n): return collect(make_pipeline(), digits.select(range(n)), folder / str(n), **RECIPE).folder
    return of


def own_store(folder, pipe, samples, collected):
    """A test's own store of the first digits and such a pipeline: a copy is quicker than collecting again."""
    shutil.copytree(collected(len(samples)), folder)
    return collect(pipe, samples, folder, **RECIPE)


@pytest.fixture(scope="session")
def digits(): return load_images("mnist_5k", size=8).select(range(0, 2000, 50))   # 40
