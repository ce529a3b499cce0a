"Killing, resuming, a full disk, and two processes: real runs of `fit` in processes of their own."
import os
import signal
import sys
from pathlib import Path

import pytest
import safetensors.torch
import torch

from children import agree, finish, plain, same, start, start_world
from reidnb.core.checkpoints import load_checkpoint, save_checkpoint

CHILD = Path(__file__).parent / 'train_child.py'


@pytest.fixture(scope='module')
def whole(tmp_path_factory):
    "A run of four epochs that nobody stopped"
    out = tmp_path_factory.mktemp('runs') / 'whole'
    finish(start(CHILD, out, 4))
    return out


@pytest.mark.parametrize('step', [6, 11])
def test_killed_and_resumed_equals_never_stopped(whole, tmp_path, step):
    out = tmp_path / 'killed'
    finish(start(CHILD, out, 4, step), -signal.SIGKILL)
    assert not (out / 'model.safetensors').exists()
    rows = (out / 'log.jsonl').read_text().count('"loss"')
    assert (step - 1) // 4 * 4 <= rows < step   # all rows that the checkpoint counts on; a block may be lost
    finish(start(CHILD, out, 4))
    assert plain(out) == plain(whole)
    a, b = (safetensors.torch.load_file(d / 'model.safetensors') for d in (whole, out))
    assert same(a, b)
    a, b = (load_checkpoint(d / 'checkpoint.pt') for d in (whole, out))
    for key in ('optimizers', 'method', 'rng', 'epoch', 'step'): assert same(a[key], b[key]), key


def test_killed_in_the_first_epoch_starts_anew(whole, tmp_path):
    out = tmp_path / 'early'
    finish(start(CHILD, out, 4, 2), -signal.SIGKILL)
    assert not (out / 'checkpoint.pt').exists()
    finish(start(CHILD, out, 4))
    assert plain(out) == plain(whole)


def test_loader_processes_do_not_change_the_run(whole, tmp_path):
    sys.path.insert(0, str(CHILD.parent))
    from dataclasses import replace

    import train_child
    from reidnb.training.loop import fit
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    method = train_child.build(4)
    train_child.seed_everything(0)
    method = train_child.Killed(replace(method.settings, workers=2), method.crops)
    fit(method, tmp_path / 'workers', progress=False)
    torch.set_num_threads(threads)
    assert plain(tmp_path / 'workers') == plain(whole)


def test_two_processes_equal_one(tmp_path):
    "Batch norm over both, triplets over both: gradient and loss of the global batch are those of one process"
    one, two = tmp_path / 'one', tmp_path / 'two'
    finish([start(CHILD, one, 2, 'still'), *start_world(CHILD, two, 2, 'still')])
    agree(one, two, 4)
    a, b = (safetensors.torch.load_file(d / 'model.safetensors') for d in (one, two))
    assert a.keys() == b.keys() and any(k.endswith('running_mean') for k in a)
    for k in a: assert torch.allclose(a[k], b[k], rtol=1e-4, atol=1e-4), k


def test_full_disk_keeps_the_last_checkpoint(whole, tmp_path, monkeypatch):
    "Every write fails after half its bytes: the run stops with one clear line, the old checkpoint stays whole"
    path = tmp_path / 'checkpoint.pt'
    save_checkpoint(path, {'epoch': 1})
    def full(fd): raise OSError(28, 'No space left on device')
    monkeypatch.setattr(os, 'fsync', full)
    with pytest.raises(OSError, match='the old file is unchanged'): save_checkpoint(path, {'epoch': 2})
    monkeypatch.undo()
    assert load_checkpoint(path) == {'epoch': 1} and [p.name for p in tmp_path.iterdir()] == ['checkpoint.pt']


@pytest.mark.parametrize('cut', [0, 1, 100, 5000])
def test_damaged_checkpoint_is_named(whole, tmp_path, cut):
    path = tmp_path / 'checkpoint.pt'
    path.write_bytes((whole / 'checkpoint.pt').read_bytes()[:cut])
    with pytest.raises(ValueError, match='not a whole checkpoint'): load_checkpoint(path)
