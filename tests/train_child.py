"""A training run in a process of its own, for the tests that kill it or run several at once.

usage: train_child.py OUT EPOCHS [KILL_AT_STEP|still]
"""
import os
import signal
import sys
from pathlib import Path

import torch

from children import STILL, keep_gradient, smooth
from reidnb.data.toys import toy_crops
from reidnb.methods.baseline import Baseline, BaselineSettings
from reidnb.core.checkpoints import seed_everything
from reidnb.training.loop import fit

torch.set_num_threads(1)


class Killed(Baseline):
    "Dies by signal 9 in the middle of an epoch, as a power cut would"
    kill_at = 0
    def loss(self, batch):   # one draw from the global generator, which a resumed run must find where it was
        return {k: v * (1 + .1 * torch.rand(())) for k, v in super().loss(batch).items()}

    def after_batch(self, batch):
        self.done = getattr(self, 'done', 0) + 1
        if self.done == self.kill_at: os.kill(os.getpid(), signal.SIGKILL)


def build(epochs, **changes):
    base = dict(epochs=epochs, warmup=2, steps=(3,), backbone='small', weights='none', p=4, k=2, height=64, width=32,
                erase=.5, lr=1e-3)
    settings = BaselineSettings(**{**base, **changes})
    seed_everything(settings.seed)
    return Killed(settings, toy_crops(n_ids=8, n_cams=2, n_each=2))


if __name__ == '__main__':
    still = 'still' in sys.argv
    method = build(int(sys.argv[2]), **(STILL if still else {}))
    if still: keep_gradient(sys.argv[1]), smooth(method)
    elif len(sys.argv) > 3: method.kill_at = int(sys.argv[3])
    fit(method, Path(sys.argv[1]), progress=False)
    torch.distributed.is_initialized() and torch.distributed.destroy_process_group()
