"MMCL: labels equal a walk down sorted lists, the loss equals its loop, nothing breaks at the edges."
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from reidnb.losses.multilabel import mmcl_loss, mmcl_targets

torch.set_num_threads(1)
QUIET = settings(max_examples=60, deadline=None)


def walk(M, index, t):
    M = F.normalize(M, dim=1)
    S = (M@M.T).fill_diagonal_(1.)
    order = [sorted(range(len(M)), key=lambda j, i=i: -float(S[i, j])) for i in range(len(M))]
    out = set()
    for b, i in enumerate(index.tolist()):
        if i < 0: continue
        k = max(1, sum(float(S[i, j]) > t for j in range(len(M))))
        for j in order[i][:k]:
            if i not in order[j][:k]: break
            out.add((b, j))
    return out


@QUIET
@given(st.integers(1, 30), st.integers(0, 6), st.integers(2, 4), st.floats(-.5, .95), st.integers(1, 9), st.integers(0, 2**31))
def test_targets_are_the_walk(n, b, d, t, chunk, seed):
    g = torch.Generator().manual_seed(seed)
    M, index = torch.randn(n, d, generator=g, dtype=torch.float64), torch.randint(-1, n, (b,), generator=g)
    T = mmcl_targets(M.requires_grad_(), index, threshold=t, chunk=chunk)
    assert T.dtype == torch.int64 and not T.requires_grad
    assert sorted(map(tuple, T.T.tolist())) == sorted(walk(M.detach(), index, t))


@QUIET
@given(st.integers(1, 6), st.integers(1, 40), st.floats(.01, 1), st.floats(0, 1), st.integers(0, 2**31))
def test_loss_is_its_loop(b, n, ratio, share, seed):
    g = torch.Generator().manual_seed(seed)
    s = (2*torch.rand(b, n, generator=g, dtype=torch.float64)-1)
    T = (torch.rand(b, n, generator=g) < share).nonzero().T
    terms = []
    for i in range(b):
        own = set(T[1, T[0] == i].tolist())
        neg = sorted((s[i, j] for j in range(n) if j not in own), key=float)[::-1]
        neg = neg[:max(1, math.ceil(ratio*len(neg)-1e-3))]
        if not own: continue
        terms.append(5*sum((1-s[i, j])**2 for j in own)/len(own)+(sum((1+x)**2 for x in neg)/len(neg) if neg else 0))
    x = s.clone().requires_grad_()
    loss = mmcl_loss(x, T, ratio=ratio)
    loss.backward()
    slow = torch.as_tensor(sum(terms)/max(len(terms), 1), dtype=torch.float64)
    torch.testing.assert_close(loss.detach(), slow)
    assert x.grad.isfinite().all()
    p = torch.randperm(T.shape[1], generator=g)
    torch.testing.assert_close(mmcl_loss(s, T[:, p], ratio=ratio), slow)


def test_zero_memory_gives_single_labels():
    "Rows not yet visited are zero: similar to nobody, each image keeps its own label"
    assert mmcl_targets(torch.zeros(9, 4), torch.tensor([2, 5])).tolist() == [[0, 1], [2, 5]]


def test_duplicates_are_labels_of_each_other():
    M = torch.eye(4)[[0, 0, 0, 1]]
    assert {*map(tuple, mmcl_targets(M, torch.tensor([0])).T.tolist())} == {(0, 0), (0, 1), (0, 2)}


@pytest.mark.parametrize('bad', [4, -2])
def test_rows_out_of_range_are_named(bad):
    with pytest.raises(ValueError, match=fr'memory row {bad} is outside 0\.\.3'): mmcl_targets(torch.eye(4), torch.tensor([0, bad]))


@pytest.mark.parametrize('n, counted', [(1, 1), (50, 1), (100, 1), (101, 2), (150, 2), (200, 2), (300, 3), (12935, 130)])
def test_the_share_is_rounded_up(n, counted):
    s = torch.linspace(0, -.5, n+1)[None].requires_grad_()
    mmcl_loss(s, torch.tensor([[0], [0]])).backward()
    assert int((s.grad[0, 1:] > 0).sum()) == counted
