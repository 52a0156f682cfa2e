"""Pixels are not held in memory, either during conversion or while reading."""

import json
import subprocess
import sys

import numpy as np
import pytest

SCRIPT = """
import json, sys
import numpy as np
from ldm.data.dis import MPI3DTrain

def anonymous():
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith("RssAnon")) / 1024

before = anonymous()
dataset = MPI3DTrain(sys.argv[1], factor_sizes=[int(sys.argv[2])])
converted = anonymous()
total = 0
rows = np.random.default_rng(0).permutation(len(dataset))
for start in range(0, len(rows), 256):
    total += int(dataset.fetch(rows[start : start + 256])["image"][:, 0, 0, 0].sum())
print(json.dumps([converted - before, anonymous() - before, total]))
"""


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="RssAnon is Linux's")
def test_memory_does_not_grow_with_the_data_set(tmp_path):
    count = 16384  # 201 MB
    images = np.zeros((count, 64, 64, 3), dtype=np.uint8)
    images[:, 0, 0, 0] = np.arange(count) % 251
    path = tmp_path / "mpi3d_toy.npz"
    np.savez_compressed(path, images=images)
    command = [sys.executable, "-c", SCRIPT, str(path), str(count)]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    converting, reading, total = json.loads(result.stdout)
    assert total == int((np.arange(count) % 251).sum())
    # A block of 16 MiB while converting, a batch while reading: neither grows with the data set.
    assert converting < 60 and reading < 60, (converting, reading)
