"""A training run that is killed and started again in another process ends with the weights it would have had.

"""
import os
import signal
import subprocess

from conftest import PYTHON

RUN = """
import hashlib, sys
from dmin.reproduction.image_sets import load_images
from dmin.families.ddpm import tiny_ddpm
from dmin.training import finetune
pipe = tiny_ddpm(channels=(16, 32))
finetune(pipe, load_images("mnist_5k", size=16).select(range(64)), steps=16, batch_size=8, folder=sys.argv[1], save_every=3, progress=False,
      callback=lambda step, loss: print("step", step, flush=True))
print("weights", hashlib.sha256(b"".join(p.detach().numpy().tobytes() for p in pipe.unet.parameters())).hexdigest())
"""


def run(folder):
    return subprocess.run(
        [PYTHON, "-c", RUN, str(folder)], capture_output=True, text=True, check=True
    ).stdout.split("\n")


def test_killed_and_resumed(tmp_path):
    whole = run(tmp_path / "whole")
    process = subprocess.Popen(
        [PYTHON, "-c", RUN, str(tmp_path / "killed")], stdout=subprocess.PIPE, text=True)
    for line in process.stdout:
        if line == "step 7\n": break
    os.kill(process.pid, signal.SIGKILL)
    process.stdout.read()   # until it has ended
    assert process.wait() == -signal.SIGKILL
    rest = run(tmp_path / "killed")
    assert rest[0] not in ("step 0", "weights") and rest[0].startswith("step ")
    assert rest[-2] == whole[-2] and rest[-2].startswith("weights ")
