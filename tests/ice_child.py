"""A run of ICE, SpCL or CAP in a process of its own, for the tests that kill it or run several at once.

usage: ice_child.py METHOD OUT EPOCHS [KILL_AT_STEP|still]
"""
import os
import signal
import sys
from pathlib import Path

import torch

from children import STILL, keep_gradient, smooth
from reidnb.data.toys import toy_crops
from reidnb.methods.ice import ICE, ICESettings
from reidnb.methods.proxies import CAP, CAPSettings, SpCL, SpCLSettings
from reidnb.core.checkpoints import seed_everything
from reidnb.training.loop import fit

torch.set_num_threads(1)
SMALL = dict(backbone='small', weights='none', height=64, width=32, p=4, k=2, k1=10, k2=3, iterations=4, warmup=1,
             lr=1e-3, steps=())
METHODS = {'ice': (ICE, ICESettings, dict(keep=.9, eps=.5)), 'cap': (CAP, CAPSettings, dict(inter_from=1)),
           'spcl': (SpCL, SpCLSettings, dict(eps=.5))}


def build(name, epochs, kill_at=0, **changes):
    cls, settings, differ = METHODS[name]
    class Killed(cls):
        "Dies by signal 9 in the middle of an epoch, as a power cut would"
        done = 0
        def after_batch(self, batch):
            super().after_batch(batch)
            self.done += 1
            if self.done == kill_at: os.kill(os.getpid(), signal.SIGKILL)
    s = settings(**{**SMALL, **differ, 'epochs': epochs, **changes})
    seed_everything(s.seed)
    return Killed(s, toy_crops(n_ids=8, n_cams=2, n_each=3))


if __name__ == '__main__':
    still = 'still' in sys.argv
    method = build(sys.argv[1], int(sys.argv[3]), int(sys.argv[4]) if len(sys.argv) > 4 and not still else 0,
                   **(STILL if still else {}))
    if still: keep_gradient(sys.argv[2]), smooth(method)
    fit(method, Path(sys.argv[2]), progress=False)
    torch.distributed.is_initialized() and torch.distributed.destroy_process_group()
