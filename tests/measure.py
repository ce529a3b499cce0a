"""What several test files need: seconds and memory of a call, and a loss with its gradient."""
import time
from pathlib import Path

import numpy as np


def peak(f):
    "Result, seconds, and memory needed beyond what was held, MB (NaN where Linux does not say)"
    status = lambda key: next(int(s.split()[1])/1e3 for s in Path('/proc/self/status').read_text().splitlines()
                              if s.startswith(key))
    try:
        Path('/proc/self/clear_refs').write_text('5')
        held = status('VmRSS')
    except OSError: held = None
    t = time.perf_counter()
    out = f()
    t = time.perf_counter() - t
    return out, t, np.nan if held is None else status('VmHWM') - held


def value_and_gradient(loss, f):
    "A scalar loss and its gradient with respect to the features, both finite"
    x = f.detach().clone().requires_grad_()
    v = loss(x)
    v.backward()
    assert v.shape == () and v.isfinite() and x.grad.isfinite().all()
    return v.item(), x.grad
