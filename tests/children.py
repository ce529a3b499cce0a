"Scripts of tests in processes of their own, alone or as several of one run, and what they leave, compared."
import os
import socket
import subprocess
import sys

import torch

from reidnb.training.loop import read_log


def start(script, *args, **env):
    "Start a script, or `-c` and its text, on one CPU thread"
    script = script if isinstance(script, (list, tuple)) else [script]
    env = {**os.environ, 'ACCELERATE_USE_CPU': 'true', 'OMP_NUM_THREADS': '1', 'CUDA_VISIBLE_DEVICES': '', **env}
    return subprocess.Popen([sys.executable, *map(str, [*script, *args])], env=env, stderr=subprocess.PIPE, text=True)


def start_world(script, *args, world=2, **env):
    "Start a script as the processes of one distributed run"
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        port = s.getsockname()[1]
    env |= dict(WORLD_SIZE=str(world), LOCAL_WORLD_SIZE=str(world), MASTER_ADDR='127.0.0.1', MASTER_PORT=str(port))
    return [start(script, *args, RANK=str(r), LOCAL_RANK=str(r), **env) for r in range(world)]


def finish(process, code=0):
    "Wait for one process or a list; each must end with this status"
    for p in process if isinstance(process, list) else [process]:
        err = p.communicate(timeout=300)[1]
        assert p.returncode == code, err[-3000:]


def plain(run, clock=('seconds',)):
    "The log without what a clock measured: every name that holds one of these words"
    return [{k: v for k, v in row.items() if not any(c in k for c in clock)} for row in read_log(run)]


def same(a, b):
    "Equal to the bit, NaN equal to NaN, in nested containers"
    if isinstance(a, torch.Tensor): return a.shape == b.shape and torch.equal(a.isnan(), b.isnan()) and \
        torch.equal(a.nan_to_num(), b.nan_to_num())
    if isinstance(a, dict): return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)): return len(a) == len(b) and all(map(same, a, b))
    return a == b
