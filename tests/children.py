"Scripts of tests in processes of their own, alone or as several of one run, and what they leave, compared."
import os
import socket
import subprocess
import sys
from pathlib import Path

import torch
from torch.optim.optimizer import register_optimizer_step_pre_hook

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


# What makes a run a continuous function of rounding, so that one process and two can be compared: weights that hardly
# move (Adam makes a step of the size of lr from the rounding of a gradient of 0, and then another image is the hardest),
# and no gates that open or close by rounding (`smooth`)
STILL = dict(optimizer='sgd', lr=1e-5)


def smooth(method):
    "Put a smooth function in the place of every ReLU: a gradient has no jump there"
    for m in [*method.modules()]:
        for k, child in m.named_children():
            if isinstance(child, torch.nn.ReLU): setattr(m, k, torch.nn.SiLU())
    return method


def keep_gradient(run):
    "Save the first gradient that is not 0 as the optimiser meets it (averaged over processes), a tensor a parameter"
    def save(optimizer, args, kwargs):
        grads = [p.grad for g in optimizer.param_groups for p in g['params'] if p.grad is not None]
        if not any(g.any() for g in grads): return
        handle.remove()
        if os.environ.get('RANK', '0') == '0': torch.save([g.clone() for g in grads], Path(run) / 'gradient.pt')
    handle = register_optimizer_step_pre_hook(save)


def gradient_gap(one, two):
    "Largest difference of two saved gradients, parameter by parameter, as a share of its norm (or of 1 % of the whole norm)"
    a, b = (torch.load(Path(d) / 'gradient.pt') for d in (one, two))
    assert [x.shape for x in a] == [x.shape for x in b]
    whole = torch.stack([x.norm() for x in a]).norm()
    return max(((x - y).norm() / max(x.norm(), .01 * whole)).item() for x, y in zip(a, b))


def agree(one, two, least, eps=1e-4):
    "Runs in one process and in two: the first gradient, and every term of every step (at least so many)"
    a, b = ([r for r in read_log(d) if 'loss' in r] for d in (one, two))
    assert len(a) == len(b) >= least
    for i, (x, y) in enumerate(zip(a, b)):
        assert x.keys() == y.keys()
        for k in x: assert abs(x[k] - y[k]) <= eps * (1 + abs(x[k])), (one, i, k, x[k], y[k])
    assert (gap := gradient_gap(one, two)) < eps, (one, gap)


def same(a, b):
    "Equal to the bit, NaN equal to NaN, in nested containers"
    if isinstance(a, torch.Tensor): return a.shape == b.shape and torch.equal(a.isnan(), b.isnan()) and \
        torch.equal(a.nan_to_num(), b.nan_to_num())
    if isinstance(a, dict): return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)): return len(a) == len(b) and all(map(same, a, b))
    return a == b
