"""Clustering against scikit-learn and sorting on dense matrices; the policy; eq. 9 of IICS; speed and memory."""
import warnings

import numpy as np
import pytest
import scipy.sparse as sp
import torch
import torch.nn.functional as F
from hypothesis import given, settings, strategies as st
from sklearn.cluster import DBSCAN, AgglomerativeClustering
from sklearn.metrics import adjusted_rand_score

from measure import peak
from reidnb.practice.benchmarks import _matmul_all, simulate
from reidnb.neighbours.clustering import (
    agglomerative, cluster, cluster_stats, Clusters, dbscan, eps_from_rho,
    inter_camera_distance, k_distances, kmeans, mu_schedule, per_camera, reliable,
    SAME, score_overlap, suggest_eps)
from reidnb.neighbours.nearest import knn
from reidnb.neighbours.reciprocal import jaccard


@st.composite
def graphs(draw):
    "Symmetric similarities on a grid (ties at eps, zero distances, stored zeros), diagonal present or not"
    n, density = draw(st.integers(2, 40)), draw(st.sampled_from([0., .05, .2, .6, 1.]))
    levels = draw(st.sampled_from([1, 4, 20, 10**6]))
    r = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    there = np.triu(r.random((n, n)) < density, 1)
    i, j = np.nonzero(there)
    v = (r.integers(0, levels + 1, len(i))/levels).astype(np.float32)
    own = np.arange(n) if draw(st.booleans()) else np.zeros(0, int)
    rows, cols = np.r_[i, j, own], np.r_[j, i, own]
    S = sp.csr_matrix((np.r_[v, v, np.ones(len(own), np.float32)], (rows, cols)), (n, n))
    u = r.integers(0, 5, n).astype(np.float32)/4 if draw(st.booleans()) else None
    return S, u


def dense(S, u=None, weight=.9):
    D = np.maximum(1 - S.toarray(), 0)
    if u is not None: D = weight*D + (1 - weight)*(u[:, None] + u)
    np.fill_diagonal(D, 0)
    return D.astype(np.float32)


def floor_of(u): return 1. if u is None else .9 + .1*float(np.sort(u)[:2].sum())


@settings(max_examples=200, deadline=None)
@given(graphs(), st.sampled_from([0., .1, .25, .5, .75, .899]), st.integers(1, 6))
def test_dbscan_equals_sklearn_on_the_dense_matrix(graph, eps, min_samples):
    S, u = graph
    D = dense(S, u)
    if u is not None: eps += 1e-4   # the two ways round a sum differently: keep eps off the grid
    oracle = DBSCAN(eps=max(eps, 1e-12), min_samples=min_samples, metric='precomputed').fit_predict(D)
    np.testing.assert_array_equal(dbscan(S, eps, min_samples, offset=u), oracle)


@settings(max_examples=200, deadline=None)
@given(graphs(), st.sampled_from([1e-4, .01, .1, .3, .7, 1.]), st.sampled_from(['mean', 'value']))
def test_eps_equals_sorting_all_pairs(graph, rho, statistic):
    S, u = graph
    d = np.sort(dense(S, u)[np.triu_indices(S.shape[0], 1)])
    d = d[d > SAME].astype(np.float64)
    if not len(d): want = 0
    elif statistic == 'mean': want = d[:max(1, round(rho*len(d)))].mean()
    else: want = d[min(len(d) - 1, round(rho*len(d)))]
    assert abs(eps_from_rho(S, rho, statistic=statistic, offset=u) - want) < 1e-6


def people(seed, n=160, copies=80, noise=0.):
    "Unit features of 20 people, some rows several times; `noise` as another batch would leave it"
    g = torch.Generator().manual_seed(seed)
    y = torch.randint(20, (n,), generator=g)
    x = F.normalize(torch.randn(20, 48, generator=g)[y] + .8*torch.randn(n, 48, generator=g), dim=1)
    x = torch.cat([x, x[torch.randint(n//4, (copies,), generator=g)]])
    return F.normalize(x + noise*torch.randn(x.shape, generator=g), dim=1) if noise else x


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from([2e-3, .02, .1]), st.sampled_from(['mean', 'value']), st.booleans(),
       st.sampled_from([0., 3e-7]))
def test_the_order_of_the_rows_tells_nothing(seed, rho, statistic, source, noise):
    "Copies among the rows: a permuted similarity gives the same bits, permuted features the same within SAME"
    x = people(seed, noise=noise)
    p = np.random.default_rng(seed).permutation(len(x))
    u = np.random.default_rng(seed).random(len(x)).astype(np.float32) if source else None
    v = None if u is None else u[p]
    S, T = jaccard(x, k1=12), jaccard(x[p], k1=12)
    eps = lambda S, u: eps_from_rho(S, rho, statistic=statistic, offset=u)
    turn = lambda S, u: suggest_eps(k_distances(S, offset=u))
    assert abs(eps(S[p][:, p], v) - eps(S, u)) <= (0 if u is None else 1e-6)   # sums of absent pairs: by groups
    assert turn(S[p][:, p], v) == turn(S, u)
    y, z = dbscan(S, .4, offset=u), dbscan(S[p][:, p], .4, offset=v)
    core = k_distances(S, offset=u) <= .4
    assert adjusted_rand_score(y[p][core[p]], z[core[p]]) == 1 and ((y < 0)[p] == (z < 0)).all()
    copy = 1 - S.toarray()[np.triu_indices(len(x), 1)]
    assert (copy <= SAME).sum() > 10 and eps(S, u) > SAME and (noise or (copy == 0).sum() > 10)
    if u is None:     # which copy of a row is cut from a list is up to the order, so `u` must not tell them apart
        assert abs(eps(T, v) - eps(S, u)) < SAME and abs(turn(T, v) - turn(S, u)) < SAME
        a, b = (quiet(cluster, M, rho=max(rho, .02), least=1) for M in (S, T))
        assert (a.n, a.stats['outliers'], a.stats['largest']) == (b.n, b.stats['outliers'], b.stats['largest'])


def test_copies_but_for_rounding():
    "Which of the two numbers of a pair is read does not matter"
    S = sp.csr_matrix(np.array([[1, 1, .5], [1 - 6e-8, 1, .5], [.5, .5, 1]], np.float32))
    for i in (S, S.T.tocsr()): assert eps_from_rho(i, 1.) == .5


@settings(max_examples=100, deadline=None)
@given(graphs(), st.integers(1, 6))
def test_k_distances_equal_sorted_rows(graph, min_samples):
    S, u = graph
    D = np.sort(np.minimum(dense(S, u), floor_of(u)), 1)
    want = D[:, min_samples - 1] if min_samples <= len(D) else np.full(len(D), floor_of(u))
    got = k_distances(S, min_samples, offset=u)
    np.testing.assert_allclose(got, want, atol=1e-6)
    assert got.min() - 1e-6 <= suggest_eps(got) <= got.max() + 1e-6


@settings(max_examples=100, deadline=None)
@given(graphs(), st.integers(1, 8), st.sampled_from([.01, .5, .89, None]), st.booleans())
def test_cluster_always_gives_a_class_or_an_error(graph, least, eps, earlier):
    S, u = graph
    n = S.shape[0]
    old = np.arange(n)//2 if earlier else None
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        try: c = cluster(S, old, eps=eps, least=least, offset=u, cams=np.arange(n) % 2, pids=np.ones(n, int))
        except ValueError as e:
            assert 'lower min_samples' in str(e)
            return
    y = c.labels
    assert c.n == len(np.unique(y[y >= 0])) >= 1 and y.shape == (n,) and y.dtype == np.int64
    assert c.n >= least or c.notes
    assert bool(c.notes) or not c.kept
    if c.kept: np.testing.assert_array_equal(y, old)
    assert c.stats['clusters'] == c.n and c.stats['outliers'] == (y < 0).sum()


def quiet(f, *args, **kwargs):
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        return f(*args, **kwargs)


def test_policy():
    S = sp.csr_matrix(np.kron(np.eye(6), np.full((5, 5), .4)).astype(np.float32))   # six groups at distance .6
    good = cluster(S, eps=.6001)
    assert good.n == 6 and good.notes == () and not good.kept
    with pytest.warns(UserWarning, match='earlier labels kept'): kept = cluster(S, good, eps=.3)
    assert kept.kept and kept.eps == good.eps and (kept.labels == good.labels).all()
    with pytest.warns(UserWarning, match='eps raised'): up = cluster(S, eps=.3)
    assert up.n == 6 and np.isclose(up.eps, .3*1.1**8)
    assert quiet(cluster, S, np.zeros(30, int), eps=.3, least=6).kept is False    # one old cluster is not enough
    with pytest.warns(UserWarning, match='6 clusters at eps'): few = cluster(S, eps=.61, least=16)
    assert few.n == 6
    with pytest.raises(ValueError, match='lower min_samples'): quiet(cluster, sp.eye(2, format='csr'))
    with pytest.raises(ValueError, match='lower min_samples'): quiet(cluster, torch.eye(2, 4))
    two = quiet(cluster, torch.tensor([[1., 0], [1, 0]]), min_samples=2, least=1)
    assert two.labels.tolist() == [0, 0]
    assert quiet(cluster, F.normalize(torch.ones(9, 4), dim=1), least=2).n == 1    # duplicates: one cluster
    assert isinstance(good, Clusters)
    with pytest.raises(Exception): good.eps = 1.
    with pytest.raises(TypeError, match='k1'): cluster(S, eps=.5, k1=20)


def test_chunks_change_nothing(monkeypatch):
    import reidnb.neighbours.clustering as m
    S = jaccard(F.normalize(torch.randn(200, 8, generator=torch.Generator().manual_seed(0)), dim=1))
    before = eps_from_rho(S), dbscan(S, .5), k_distances(S)
    rows = m._rows
    monkeypatch.setattr(m, '_rows', lambda *a, **k: rows(*a, **(k | dict(size=100))))
    for a, b in zip(before, (eps_from_rho(S), dbscan(S, .5), k_distances(S))): np.testing.assert_array_equal(a, b)


def test_inputs_are_not_changed():
    S = sp.random(30, 30, .3, random_state=0).tocsr()
    S = S.maximum(S.T).tocsr()
    d, i, p = S.data.copy(), S.indices.copy(), S.indptr.copy()
    dbscan(S, .5); eps_from_rho(S); k_distances(S); quiet(cluster, S, least=1, min_samples=1)
    assert (d == S.data).all() and (i == S.indices).all() and (p == S.indptr).all()
    D = torch.rand(20, 20)
    E = D.clone()
    agglomerative(D, 3)
    assert (D == E).all()


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 40), st.integers(1, 45), st.integers(0, 10**6), st.sampled_from(['average', 'complete']))
def test_agglomerative(n, k, seed, how):
    x = np.random.default_rng(seed).random((n, 3))
    D = np.sqrt(((x[:, None] - x)**2).sum(-1))
    y = agglomerative(D, k, linkage=how)
    assert y.max() + 1 == min(n, k) and y[0] == 0
    if 1 < n: assert adjusted_rand_score(y, AgglomerativeClustering(
        min(n, k), metric='precomputed', linkage=how).fit_predict(D)) == 1
    tied = agglomerative(np.ones((n, n)), k)
    assert tied.max() + 1 == min(n, k)


@settings(max_examples=60, deadline=None)
@given(st.integers(2, 25), st.integers(0, 10**6), st.sampled_from([.05, .3, .8]))
def test_a_join_at_the_threshold_is_made(n, seed, rho):
    "scikit-learn stops at it: the same groups a little above, one pair or more less at the tie"
    x = np.random.default_rng(seed).random((n, 3))
    D = np.sqrt(((x[:, None] - x)**2).sum(-1))
    d = np.sort(D[np.triu_indices(n, 1)])
    theirs = lambda t: AgglomerativeClustering(None, metric='precomputed', linkage='single',
                                               distance_threshold=t).fit_predict(D)
    edge = d[0]                                                   # the first join of any linkage
    ours = agglomerative(D, threshold=edge, linkage='single')
    assert ours.max() == n - 2 and theirs(edge).max() == n - 1 and theirs(edge*(1 + 1e-9)).max() == n - 2
    t = d[round(rho*(len(d) - 1))]
    assert adjusted_rand_score(agglomerative(D, threshold=t, linkage='single'), theirs(t*(1 + 1e-9))) == 1


def test_agglomerative_edges():
    assert agglomerative(np.zeros((1, 1)), 5).tolist() == [0]
    assert agglomerative(np.zeros((2, 2)), 1).tolist() == [0, 0]
    assert agglomerative(torch.tensor([[0, -.01], [-.01, 0]]), threshold=0.).tolist() == [0, 0]
    with pytest.raises(ValueError, match='square'): agglomerative(np.zeros((2, 3)), 1)
    with pytest.raises(ValueError, match='NaN'): agglomerative(np.full((3, 3), np.nan), 1)


def test_per_camera():
    r = np.random.default_rng(0)
    for sizes in ([50], [1, 2, 3, 40], [7]*5):
        cams = np.repeat(np.arange(len(sizes)), sizes)
        D = r.random((len(cams), len(cams)))
        D += D.T
        y, counts = per_camera(torch.from_numpy(D), cams, clusters=6)
        for c, n in enumerate(sizes):
            assert counts[c] == min(6, max(1, n//2)) == len(set(y[cams == c])) == y[cams == c].max() + 1


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 30), st.integers(1, 40), st.integers(0, 999))
def test_kmeans(n, k, seed):
    x = torch.randint(3, (n, 2), generator=torch.Generator().manual_seed(seed)).float()
    y = quiet(kmeans, x, k, seed)
    assert y.max() + 1 == len(set(y)) <= min(k, n) and (y == quiet(kmeans, x, k, seed)).all()


def test_kmeans_by_faiss():
    pytest.importorskip('faiss')
    x = torch.cat([torch.randn(20, 4)*.01, torch.randn(30, 4)*.01 + 5])
    assert kmeans(x, 2, backend='faiss').tolist() == [0]*20 + [1]*30


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 60), st.integers(0, 10**6))
def test_stats_equal_a_loop(n, seed):
    r = np.random.default_rng(seed)
    y, p, c = r.integers(-1, 6, n), r.integers(-1, 8, n), r.integers(-1, 3, n)
    s = cluster_stats(y, c, p)
    sizes = [int((y == k).sum()) for k in set(y[y >= 0])]
    assert s['clusters'] == len(sizes) and s['largest'] == max(sizes, default=0)
    use = (y >= 0) & (p > 0)
    if use.any():
        best = sum(np.bincount(p[use & (y == k)]).max() for k in set(y[use]))
        assert np.isclose(s['purity'], best/use.sum())
        assert np.isclose(s['split'], np.mean([len(set(y[use & (p == k)])) for k in set(p[use])]))
        assert np.isclose(s['merged'], np.mean([len(set(p[use & (y == k)])) > 1 for k in set(y[use])]))
    known = (y >= 0) & (c >= 0)
    if known.any(): assert np.isclose(s['cameras'], np.mean([len(set(c[known & (y == k)])) for k in set(y[known])]))


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 30), st.integers(0, 10**6))
def test_reliable_equals_a_loop(n, seed):
    r = np.random.default_rng(seed)
    y, tight, loose = (r.integers(-1, 4, n) for _ in range(3))
    group = lambda v, i: {j for j in range(n) if v[j] == v[i] and v[i] >= 0} | {i}
    iou = lambda a, b: len(a & b)/len(a | b)
    got, _ = reliable(y, tight, loose, (.4, .6))
    want = [y[i] >= 0 and iou(group(y, i), group(loose, i)) >= .4 and iou(group(y, i), group(tight, i)) >= .6
            for i in range(n)]
    assert ((got >= 0) == want).all()
    assert got.max(initial=-1) + 1 == len(set(got[got >= 0]))
    again, limits = reliable(y, tight, loose)
    if limits: assert (reliable(y, tight, loose, limits)[0] == again).all()
    assert reliable(np.full(n, -1), tight, loose)[1] is None


def literal(a, b):
    "IICS eq. 9 read aloud"
    return np.stack([np.minimum(x, b).sum(1)/np.maximum(x, b).sum(1) for x in a])


def scores_of(n, cams, classes, sharp, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.cat([(sharp*torch.randn(n, classes, generator=g)).softmax(1) for _ in range(cams)], 1)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 150), st.integers(1, 4), st.integers(1, 40), st.sampled_from([0., .3, 3., 12., 60.]),
       st.integers(0, 10**6))
def test_overlap_equals_eq_9(n, cams, classes, sharp, seed):
    s = scores_of(n, cams, classes, sharp, seed)
    want = literal(s.double().numpy(), s.double().numpy())
    D = torch.cdist(s.double(), s.double(), p=1).numpy()
    np.testing.assert_allclose((2*cams - D)/(2*cams + D), want, atol=1e-6)
    for engine in ('dense', 'sparse', 'auto'):
        got = score_overlap(s, engine=engine).numpy()
        np.testing.assert_allclose(got, want, atol=1.5e-6)
        np.testing.assert_allclose(got.diagonal(), 1, atol=1e-6)
        assert (got >= 0).all() and (got <= 1).all() and np.allclose(got, got.T, atol=1e-7)
    np.testing.assert_allclose(score_overlap(s[:3], s).numpy(), want[:3], atol=1e-6)
    np.testing.assert_allclose(score_overlap(s.double()).numpy(), want, atol=1e-12)


def test_many_rows_cross_the_block_borders():
    for n in (63, 64, 65, 511, 513, 1100):
        s = scores_of(n, 2, 6, 2., n)
        want = literal(s.numpy(), s.numpy())
        for engine in ('dense', 'sparse'): np.testing.assert_allclose(score_overlap(s, engine=engine), want, atol=2e-6)


def test_inter_camera_distance():
    s, f = scores_of(600, 3, 8, 3.), torch.randn(600, 16)
    cams = np.random.default_rng(0).integers(-1, 3, 600)
    cos = 1 - F.normalize(f, dim=1)@F.normalize(f, dim=1).T
    boost = .01*torch.from_numpy(literal(s.numpy(), s.numpy()))
    free = torch.from_numpy((cams[:, None] == cams) | (cams < 0) | (cams < 0)[:, None])
    torch.testing.assert_close(inter_camera_distance(f, s, cams, .01), cos - boost*~free, atol=1e-6, rtol=0)
    torch.testing.assert_close(inter_camera_distance(f, s, cams, .01, across=False), cos - boost, atol=1e-6, rtol=0)
    torch.testing.assert_close(inter_camera_distance(f, s, cams*0, .01), cos, atol=1e-6, rtol=0)
    torch.testing.assert_close(inter_camera_distance(f, s, cams, 0.), cos, atol=1e-6, rtol=0)
    assert mu_schedule(0) == .02 and mu_schedule(39) > 0
    assert all(mu_schedule(r) > mu_schedule(r + 1) for r in range(39))


@pytest.mark.cuda
def test_overlap_on_a_gpu():
    s = scores_of(2000, 6, 600, 3.)
    np.testing.assert_allclose(score_overlap(s.cuda()).cpu()[:50], literal(s[:50].numpy(), s.numpy()), atol=2e-6)


# --- benchmark

def bench_labels(n=12936, rho=2e-3, min_similarity=0.):
    "Rows (job, seconds ours, seconds of the bare matmul, ratio, peak MB ours, peak MB of it)"
    x, y, c = simulate(n)
    _matmul_all(x[:512])
    _, base, base_mb = peak(lambda: _matmul_all(x))
    near, t0, m0 = peak(lambda: knn(x, k=31))
    S, t1, m1 = peak(lambda: jaccard(x, near=near, min_similarity=min_similarity))
    eps, t2, m2 = peak(lambda: eps_from_rho(S, rho))
    labels, t3, m3 = peak(lambda: dbscan(S, eps))
    print(f'eps {eps:.3f}', cluster_stats(labels, c, y))
    rows = [('neighbours', t0, m0), ('Jaccard from neighbours', t1, m1), ('eps from rho', t2, m2),
            ('DBSCAN', t3, m3), ('all', t0 + t1 + t2 + t3, max(m0, m1, m1 + m2, m1 + m3))]
    return [(f'{job}, {n} x {x.shape[1]}', t, base, t/base, m, base_mb) for job, t, m in rows]


def bench_overlap(n=12936, rows=4, sharp=1., classes=600, cams=6):
    "The same of eq. 9: ours in full, the row-by-row way extrapolated from some rows"
    s = scores_of(n, cams, classes, sharp)
    a = s.numpy()
    want, ref, ref_mb = peak(lambda: literal(a[:rows], a))
    got, t, mb = peak(lambda: score_overlap(s))
    assert np.abs(got[:rows].numpy() - want).max() < 2e-6
    ref *= n/rows
    return [(f'eq. 9, {n} x {a.shape[1]}, {"flat" if sharp < 5 else "sure"} scores', t, ref, ref/t, mb, ref_mb)]


def bench(n=12936): return bench_labels(n) + bench_overlap(n, sharp=1.) + bench_overlap(n, sharp=25.)


def test_the_benchmark_agrees_and_runs():
    assert len(bench_labels(200, rho=.02)) == 5 and len(bench_overlap(200, classes=20)) == 1


if __name__ == '__main__':
    import sys
    jobs = dict(labels=bench_labels, overlap=bench_overlap)
    name, *numbers = sys.argv[1:] or ['all']
    for job, *v in (jobs[name] if name in jobs else bench)(*map(int, numbers)):
        print(f'{job}: %.2f s, other way %.2f s, ratio %.2f, %.0f MB, other way %.0f MB' % tuple(v), flush=True)
