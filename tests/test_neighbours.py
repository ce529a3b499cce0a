"""Neighbours, Jaccard similarity and re-ranking against literal loops on inputs that hypothesis makes."""
import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st

from reidnb.neighbours.nearest import knn, knn_given
from reidnb.neighbours.reciprocal import encode, expand, jaccard, overlap, reciprocal
from reidnb.ranking.reranking import rerank, rerank_all, rerank_distances, rerank_top


@st.composite
def points(draw, most=40):
    "Integer coordinates, so distances are exact and tie often; a block of copies now and then"
    n, d = draw(st.integers(1, most)), draw(st.integers(1, 4))
    r = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    x = r.integers(0, draw(st.sampled_from([1, 2, 4, 50])) + 1, (n, d)).astype(np.float32)
    if draw(st.booleans()): x[:n//2] = x[0]
    return x


def square(x, y=None): return ((x[:, None].astype(float) - (x if y is None else y))**2).sum(2)


def order_of(D):
    "Columns by distance; of equal ones the row itself first, then by index"
    j = np.arange(len(D))
    return np.stack([np.lexsort((j, j != i, D[i])) for i in range(len(D))])


def literal(D, rank, k1, k2, columns):
    "Steps 1 to 5 of METHODS 0.6 with sets, and the sums of minima of every pair"
    n = len(D)
    V = np.zeros((n, n))
    def R(i, k): return {j for j in rank[i][:k] if i in rank[j][:k]}
    for i in range(n):
        r = R(i, columns)
        e = set(r)
        for j in r:
            h = R(j, round(k1/2) + 1)
            if 3*len(h & r) > 2*len(h): e |= h
        e = sorted(e)
        V[i, e] = np.exp(-D[i, e])/np.exp(-D[i, e]).sum()
    V = np.stack([V[rank[i][:k2]].mean(0) for i in range(n)])
    return np.minimum(V[:, None], V).sum(2)


@settings(max_examples=150, deadline=None)
@given(points(), st.integers(1, 50), st.sampled_from([1, 2**12, 2**28]))
def test_knn_is_a_stable_sort(x, k, budget):
    D = square(x)
    near, k = knn(x, k=k, budget=budget), min(k, len(x))
    order = order_of(D)[:, :k]
    assert near.index.numpy().tolist() == order.tolist()
    assert np.array_equal(near.distance.numpy(), np.take_along_axis(D, order, 1))
    assert np.array_equal(near.far.numpy(), D.max(1))
    given_ = knn_given(lambda a, b: D[a:b] - 3, len(x), k=k, budget=budget)
    assert given_.index.equal(near.index) and given_.distance.equal(near.distance - 3)


@settings(max_examples=100, deadline=None)
@given(points(25), st.integers(0, 2**32 - 1), st.sampled_from([1, 2**28]))
def test_knn_of_two_sets(x, seed, budget):
    y = np.random.default_rng(seed).integers(0, 4, (17, x.shape[1])).astype(np.float32)
    assert knn(x, y, k=5, budget=budget).index.tolist() == square(x, y).argsort(1, kind='stable')[:, :5].tolist()


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from([3, 40, 300]), st.integers(1, 40), st.sampled_from([0., 3e-7]),
       st.sampled_from(['torch', 'two sets']), st.sampled_from([1, 2**28]))
def test_copies_tie_wherever_they_stand(seed, dim, k, noise, kind, budget):
    "Permuted rows keep their lists: the same distances to the last bit, and of copies the same contents"
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(70, dim, generator=g)[torch.randint(70, (130,), generator=g)]
    if not noise: x[100:] = x[0]                              # more copies than candidates to spare
    x += noise*torch.randn(x.shape, generator=g)
    p = torch.randperm(len(x), generator=g)
    own = kind == 'torch'
    a, b = (knn(z, None if own else z, k=k, budget=budget) for z in (x, x[p]))
    assert b.distance.equal(a.distance[p])
    if not noise: assert x[p][b.index].equal(x[a.index[p]])   # points a bit apart can be at one distance
    D = (x[:, None] - x).double().square().sum(2).numpy()
    order = order_of(D) if own else D.argsort(1, kind='stable')
    assert a.index.numpy().tolist() == order[:, :k].tolist()


@settings(max_examples=120, deadline=None)
@given(points(), st.integers(1, 30), st.integers(1, 8), st.booleans(), st.booleans())
def test_jaccard_is_the_loop(x, k1, k2, self_in_k1, softmax):
    if softmax: x = torch.nn.functional.normalize(torch.tensor(x) + .1, dim=1).numpy()
    near = knn(x, k=len(x))
    D = square(x)
    if not softmax: D = D/D.max(1, keepdims=True).clip(1e-12)
    m = literal(D, near.index.tolist(), k1, k2, k1 if self_in_k1 else k1 + 1)
    J = jaccard(x, k1=k1, k2=k2, self_in_k1=self_in_k1, weights='softmax' if softmax else 'exp')
    assert np.abs(J.toarray() - m/(2 - m)).max() < 2e-6
    assert (J != J.T).nnz == 0 and np.allclose(J.diagonal(), 1, atol=1e-5) and (J.data > 0).all()


@settings(max_examples=120, deadline=None)
@given(points(), st.data())
def test_rerank_is_the_loop(x, data):
    if len(x) < 2: x = np.concatenate([x, x + 1])
    Q = data.draw(st.integers(1, len(x) - 1))
    k1, k2, lambda_ = data.draw(st.integers(1, 25)), data.draw(st.integers(1, 7)), data.draw(st.sampled_from([0, .3, 1]))
    D = square(x)
    D = D/D.max(1, keepdims=True).clip(1e-12)
    m = literal(D, order_of(square(x)).tolist(), k1, k2, k1 + 1)
    want = ((1 - lambda_)*(1 - m/(2 - m)) + lambda_*D)
    kw = dict(k1=k1, k2=k2, lambda_=lambda_)
    S = square(x)
    for got in (rerank(x[:Q], x[Q:], **kw), rerank_distances(S[:Q, Q:], S[:Q, :Q], S[Q:, Q:], **kw),
                rerank_all(S, normalise='max', **kw)[:Q, Q:], rerank_all(S - 2, **kw)[:Q, Q:]):
        assert np.abs(got - want[:Q, Q:]).max() < 2e-6


@settings(max_examples=60, deadline=None)
@given(points(), st.integers(1, 10), st.integers(1, 10))
def test_reciprocal_and_expansion(x, k, half):
    index = knn(x, k=max(k, half)).index
    R, H = reciprocal(index, k), reciprocal(index, half)
    assert (R != R.T).nnz == 0
    E = expand(R, H)
    assert ((R > 0).astype(int) - (E > 0).astype(int)).max() <= 0                     # a set only grows


@pytest.mark.parametrize('threads', [1, 3])
def test_threads_and_budget_change_nothing(threads):
    x = torch.nn.functional.normalize(torch.randn(500, 16, generator=torch.Generator().manual_seed(0)), dim=1)
    near = knn(x, k=31)
    V = encode(near, lambda i, j: (x[i] - x[j]).square().sum(1).numpy(), k1=30, scale=None)
    old = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        parts = [np.concatenate(overlap(V, lambda a, b, m: m, budget=b)) for b in (1, 2**16, 2**28)]
    finally: torch.set_num_threads(old)
    assert all(np.array_equal(p, parts[0]) for p in parts)


def test_memory_stays_in_the_budget():
    "Neighbours of 6,000 rows without their 144 MB of distances"
    import subprocess
    import sys
    code = '''if 1:
        import torch; torch.set_num_threads(1)   # each thread has buffers of its own
        from reidnb.neighbours.nearest import knn
        def peak(reset=False):
            if reset: open('/proc/self/clear_refs', 'w').write('5')
            return next(int(s.split()[1]) for s in open('/proc/self/status') if s.startswith('VmHWM'))/1e3
        x = torch.randn(6000, 64); knn(x[:500], k=5)
        before = peak(True); knn(x, k=20, budget=2**24); print(peak()-before)'''
    if not sys.platform.startswith('linux'): pytest.skip('reads /proc')
    out = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True)
    assert float(out.stdout) < 40


def test_a_million_is_a_search_of_candidates():
    "The top of a large gallery: memory grows with the candidates, and a far crowd changes nothing"
    g = torch.Generator().manual_seed(0)
    q, near = torch.randn(3, 8, generator=g), torch.randn(300, 8, generator=g)
    crowd = torch.randn(50_000, 8, generator=g) + 100
    i, d = rerank_top(q, near, top=120)
    j, e = rerank_top(q, torch.cat([near, crowd]), top=120)
    assert i.equal(j) and torch.allclose(d, e, atol=1e-5)


def test_faiss_agrees():
    pytest.importorskip('faiss')
    x = torch.nn.functional.normalize(torch.randn(400, 16, generator=torch.Generator().manual_seed(0)), dim=1)
    assert knn(x, k=9, backend='faiss').index.equal(knn(x, k=9).index)
    a, b = jaccard(x, backend='faiss'), jaccard(x)
    assert np.abs((a - b).toarray()).max() < 1e-5


@pytest.mark.cuda
def test_the_device_changes_nothing():
    x = torch.nn.functional.normalize(torch.randn(3000, 64, generator=torch.Generator().manual_seed(0)), dim=1)
    a, b = knn(x, k=31), knn(x.cuda(), k=31)
    assert (a.index != b.index.cpu()).float().mean() < 1e-3
    assert np.abs((jaccard(x.cuda()) - jaccard(x)).toarray()).mean() < 1e-5
    assert rerank(x[:100].cuda(), x[100:].cuda()).is_cuda
