"""Every side of every benchmark runs, and ours and the published way give the same numbers."""
import subprocess
import sys

import numpy as np
import pytest
import torch

from reidnb.practice.benchmarks import _run, JOBS, simulate, table


@pytest.mark.parametrize('job,side', [(j, s) for j in JOBS for s in JOBS[j].sides])
def test_a_side_runs(job, side):
    seconds, megabytes = _run(job, side, .01, torch.get_num_threads())
    assert seconds > 0 and megabytes < 500


@pytest.mark.parametrize('job', [j for j in JOBS if 'published' in JOBS[j].sides])
def test_the_two_ways_agree(job):
    inputs, sides = JOBS[job].make(.01), JOBS[job].sides
    with torch.no_grad(): ours, theirs = sides['ours'](*inputs), sides['published'](*inputs)
    if job == 'jaccard': ours = 1 - ours.toarray()
    if isinstance(theirs, tuple): theirs = theirs[0]
    if job == 'qaconv': theirs = torch.sigmoid(theirs/10)
    ours, theirs = np.asarray(ours), np.asarray(theirs)
    assert np.abs(ours[:len(theirs)] - theirs).max() < 1e-4


def test_simulated_features_are_people_and_cameras():
    x, y, c = simulate(600, people=30, dim=64)
    s = (x@x.T).numpy()
    same, cam = y[:, None] == y, c[:, None] == c
    assert s[same].mean() > s[~same].mean() + .3 and s[~same & cam].mean() > s[~same & ~cam].mean()
    assert table([]).count('\n') == 1


@pytest.mark.slow
def test_from_the_shell():
    r = subprocess.run([sys.executable, '-m', 'reidnb.practice.cli', *'bench evaluate --scale .01 --threads 1'.split()],
                       capture_output=True, text=True)
    assert r.returncode == 0 and 'one argsort' in r.stdout, r.stderr[-500:]
