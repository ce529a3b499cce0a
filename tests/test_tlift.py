"""TLift against a literal loop: ties, times, cameras, what is missing; its speed and memory."""
import warnings

import numpy as np
import pytest
import torch
from matplotlib.patches import ConnectionPatch
from hypothesis import given, settings, strategies as st

from measure import peak
from reidnb.ranking.lifting import (
    explain_lift, nearby, plot_lift, temporal_probability, tfusion, tlift, TLIFT_APPENDIX, TLIFT_MAIN,
    transfer_times, unit_scores)


def literal(sim, q_cams, q_times, g_cams, g_times, tau=100., sigma=200., k=10, alpha=.2):
    "METHODS 14.2 read aloud: cameras, then queries; nobody without a camera and a time takes part"
    pt = np.zeros(sim.shape)
    known_q, known_g = (q_cams >= 0) & ~np.isnan(q_times), (g_cams >= 0) & ~np.isnan(g_times)
    for cq in np.unique(q_cams[known_q]):
        for cg in np.unique(g_cams[known_g]):
            q, g = np.flatnonzero((q_cams == cq) & known_q), np.flatnonzero((g_cams == cg) & known_g)
            A = sim[np.ix_(q, g)]
            E = np.exp(-(g_times[g][:, None] - g_times[g])**2/sigma**2)
            for a, i in enumerate(q):
                block = A[np.abs(q_times[q] - q_times[i]) < tau]
                thr = np.partition(block.ravel(), -k)[-k] if block.size >= k else block.min()
                pivots = np.nonzero(block >= thr)[1]
                pt[i, g] = E[:, pivots].mean(1)
    return (pt + alpha)*sim, pt


def quiet(f, *args, **kwargs):
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        return f(*args, **kwargs)


@st.composite
def problems(draw):
    "Few levels of score (ties), few different times, cameras that are missing, images without a time"
    Q, G = draw(st.integers(1, 12)), draw(st.integers(1, 30))
    levels, moments = draw(st.sampled_from([1, 2, 4, 10**6])), draw(st.sampled_from([1, 5, 1000]))
    r = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    holes = draw(st.sampled_from([0, .3]))
    def side(n):
        cams, times = r.integers(0, draw(st.integers(1, 4)), n)*draw(st.integers(1, 2)), r.integers(0, moments, n)*1.
        cams[r.random(n) < holes] = -1
        times[r.random(n) < holes] = np.nan
        cams[0], times[0] = max(cams[0], 0), np.nan_to_num(times[0])
        return cams, times
    sim = r.integers(0, levels + 1, (Q, G))/levels
    params = dict(tau=draw(st.sampled_from([1e-3, 1., 3., 100., 1e9])), sigma=draw(st.sampled_from([.5, 200., 1e6])),
                  k=draw(st.integers(1, 400)), alpha=draw(st.sampled_from([0., .2, 3.])))
    return (sim, *side(Q), *side(G)), params


@settings(max_examples=150, deadline=None)
@given(problems())
def test_equals_the_loop(problem):
    args, params = problem
    slow, pt = literal(*args, **params)
    np.testing.assert_allclose(quiet(tlift, *args, **params), slow, atol=1e-12)
    fast = quiet(tlift, args[0].astype(np.float32), *args[1:], **params)
    assert fast.dtype == np.float32
    np.testing.assert_allclose(fast, literal(args[0].astype(np.float32), *args[1:], **params)[0], atol=2e-6)
    small = quiet(tlift, torch.tensor(args[0]), *map(torch.tensor, args[1:]), **params, budget=1)
    assert isinstance(small, torch.Tensor)
    np.testing.assert_allclose(small, slow, atol=1e-12)
    del params['alpha']
    np.testing.assert_allclose(quiet(temporal_probability, *args, **params), pt, atol=1e-12)


@settings(max_examples=50, deadline=None)
@given(problems(), st.integers(0, 10**6))
def test_the_explanation_adds_up(problem, seed):
    args, params = problem
    lifted = quiet(tlift, *args, **params)
    known = [np.flatnonzero((c >= 0) & ~np.isnan(t)) for c, t in ((args[1], args[2]), (args[3], args[4]))]
    i, j = (int(np.random.default_rng(seed).choice(x)) for x in known)
    e = quiet(explain_lift, *args, i, j, **params)
    assert abs(e.lifted - lifted[i, j]) < 1e-12
    assert i in e.near and (np.abs(args[2][e.near] - args[2][i]) < params['tau']).all()
    assert sum(row[1] for row in e.table()) == len(e.pivots) >= min(params['k'], len(e.near)*len(e.seen[1]))


@settings(max_examples=50, deadline=None)
@given(problems(), st.integers(0, 10**6))
def test_invariances(problem, seed):
    "A camera's clock, the order of queries and gallery, a common factor of the scores"
    (sim, qc, qt, gc, gt), params = problem
    r = np.random.default_rng(seed)
    out = quiet(tlift, sim, qc, qt, gc, gt, **params)
    late = r.integers(-10**4, 10**4, 100)*1.    # whole seconds, so that differences stay exact
    np.testing.assert_allclose(quiet(tlift, sim, qc, qt + late[qc], gc, gt + late[gc], **params), out, atol=1e-9)
    a, b = r.permutation(len(qc)), r.permutation(len(gc))
    np.testing.assert_allclose(quiet(tlift, sim[np.ix_(a, b)], qc[a], qt[a], gc[b], gt[b], **params),
                               out[np.ix_(a, b)], atol=1e-12)
    np.testing.assert_allclose(quiet(tlift, sim/4, qc, qt, gc, gt, **params), out/4, atol=1e-12)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.integers(-1, 2), st.sampled_from([0., .1, .2, .3, .6, 1e6, 1e6 + .1, np.nan])), max_size=20),
       st.sampled_from([.1, .2, 1., np.inf]))
def test_windows_use_the_very_difference(rows, tau):
    "The border of R is the rounded difference compared with tau, not t - tau"
    cams, times = np.array([c for c, _ in rows], dtype=int), np.array([t for _, t in rows], dtype=float)
    order, first, last = nearby(cams, times, tau)
    known = (cams >= 0) & ~np.isnan(times)
    assert sorted(order) == np.flatnonzero(known).tolist()
    for a, i, j in zip(order, first, last):
        assert set(order[i:j]) == set(np.flatnonzero(known & (cams == cams[a]) & (np.abs(times - times[a]) < tau)))


def test_exact_checks_of_the_facts():
    "METHODS 13: p_t = 1 at the only pivot's time; a huge alpha keeps the ranking; K beyond the block takes all"
    r = np.random.default_rng(0)
    sim, zero = r.random((1, 8)), np.zeros(8, int)
    gt = r.uniform(0, 500, 8)
    pt = temporal_probability(sim, [0], [3.], zero, gt, k=1)
    assert pt[0, sim.argmax()] == 1
    assert (tlift(sim, [0], [3.], zero, gt, alpha=1e9).argsort() == sim.argsort()).all()
    every = temporal_probability(sim, [0], [3.], zero, gt, k=1000)
    np.testing.assert_allclose(every[0], np.exp(-(gt[:, None] - gt)**2/200**2).mean(0))
    np.testing.assert_allclose(temporal_probability(sim, [0], [3.], zero, gt, k=8), every)


def test_ties_enlarge_the_pivots_and_images_repeat():
    sim = np.array([[.9, .5, .5, .1], [.9, .5, .2, .1]])
    args = sim, [0, 0], [0., 1.], [0]*4, [0., 100, 200, 300]
    e = explain_lift(*args, 0, 0, k=3)      # .9 .9 .5 .5 .5: the third score ties twice
    assert [row[:2] for row in e.table()] == [(0, 2), (1, 2), (2, 1)]
    assert abs(temporal_probability(*args, k=3)[0, 0] - (2 + 2*np.exp(-.25) + np.exp(-1))/5) < 1e-12


def test_a_block_of_equal_scores():
    "Everything ties, in several windows and cameras: all images are pivots, at any budget"
    r = np.random.default_rng(0)
    args = np.full((60, 300), .5), r.integers(0, 2, 60), r.uniform(0, 500, 60), r.integers(0, 3, 300), r.uniform(0, 500, 300)
    for budget in (1, 10**4, 2**28):
        np.testing.assert_allclose(tlift(*args, budget=budget), literal(*args)[0], atol=1e-12)


def test_missing_times_are_counted_and_left_out():
    sim = np.full((3, 4), .5)
    args = [0, 0, -1], [0., np.nan, 0.], [0, 0, 1, -1], [0., np.nan, 5., 0.]
    with pytest.warns(UserWarning, match='2 of 3 queries and 2 of 4 gallery images'): out = tlift(sim, *args)
    np.testing.assert_allclose(out[1:], .1)
    np.testing.assert_allclose(out[0], [.6, .1, .6, .1])


@pytest.mark.parametrize('change, words', [
    (dict(sim=np.full((2, 3), 1.5)), 'scores run from 1.5 to 1.5'), (dict(sim=np.full((2, 3), np.nan)), 'from nan'),
    (dict(sim=np.zeros(3)), r'must be \(Q,G\)'), (dict(q_cams=[0]), r'query: \(1,\) cameras'),
    (dict(g_times=[0., 1, np.inf]), '1 gallery times are infinite'), (dict(q_cams=[.5, 1]), 'cameras are float64'),
    (dict(g_cams=[-1]*3), 'no gallery image has'), (dict(tau=0), 'tau=0'), (dict(sigma=-1.), 'sigma=-1.0'),
    (dict(k=0), 'k=0'), (dict(k=1.5), 'k=1.5'), (dict(alpha=-.1), 'alpha=-0.1'), (dict(tau=np.nan), 'tau=nan')])
def test_faults_are_named(change, words):
    args = dict(sim=np.full((2, 3), .5), q_cams=[0, 1], q_times=[0., 1], g_cams=[0, 1, 2], g_times=[0., 1, 2]) | change
    with pytest.raises(ValueError, match=words): tlift(**args)


def test_empty_sides_and_kinds_of_input():
    assert tlift(np.zeros((0, 3)), [], [], [0, 0, 1], [0., 1, 2]).shape == (0, 3)
    assert tlift(np.zeros((2, 0)), [0, 1], [0., 1], [], []).shape == (2, 0)
    args = [0, 0], [0., 10], [0, 0, 1], [0., 30, 5]
    want = tlift(np.full((2, 3), .5), *args)
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        out = tlift(torch.full((2, 3), .5, dtype=dtype), *args)
        assert out.dtype == torch.float32
        np.testing.assert_allclose(out, want, atol=1e-6)
    view = np.full((3, 2), .5)[::-1].T
    view.flags.writeable = False
    np.testing.assert_allclose(tlift(view, *args), want)
    x = torch.full((2, 3), .5, requires_grad=True)
    assert not tlift(x, *args).requires_grad and (x == .5).all()


@pytest.mark.cuda
def test_the_gpu_gives_the_same():
    r = np.random.default_rng(0)
    sim = r.integers(0, 50, (200, 2000))/50     # ties too
    args = r.integers(0, 4, 200), r.uniform(0, 900, 200), r.integers(0, 4, 2000), r.uniform(0, 900, 2000)
    for params in (TLIFT_APPENDIX, TLIFT_MAIN):
        for dtype, eps in ((torch.float32, 2e-6), (torch.float64, 1e-12)):
            s = torch.tensor(sim, dtype=dtype)
            out = tlift(s.cuda(), *args, **params)
            assert out.is_cuda
            np.testing.assert_allclose(out.cpu(), tlift(s, *args, **params), atol=eps)


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 10**6), st.floats(.005, .9), st.floats(.01, 100), st.floats(-50, 50))
def test_unit_scores(seed, mean, scale, shift):
    s = np.random.default_rng(seed).normal(size=(7, 40))*scale + shift
    u = unit_scores(s, max(mean, .01))
    assert 0 <= u.min() and u.max() == 1 and abs(u.mean() - max(mean, .01)) < .01
    order = s.ravel().argsort()
    assert (np.diff(u.ravel()[order]) >= 0).all()
    assert (unit_scores(np.full((2, 3), 4.)) == 1).all()


@pytest.mark.parametrize('seed', range(4))
def test_no_line_crosses_a_name_in_the_picture(seed):
    "The names A and X, and the heads of their arrows"
    r = np.random.default_rng(seed)
    qt, gt = r.uniform(0, 300, 30), r.uniform(0, [900, 150][seed % 2], 200)
    e = explain_lift(r.random((30, 200)), np.zeros(30, int), qt, np.ones(200, int), gt, seed, seed)
    fig = plot_lift(e, r.integers(0, 3, 30), r.integers(0, 3, 200))
    fig.draw_without_rendering()
    lines = [a for a in fig.get_children() if isinstance(a, ConnectionPatch)]
    paths = [a.get_transform().transform_path(a.get_path()) for a in lines]
    named = [t.get_window_extent() for ax in fig.axes for t in ax.texts]
    heads = [ln.get_window_extent() for ax in fig.axes for ln in ax.lines if ln.get_marker() in ('v', '^')]
    assert len(lines) == len(e.pivots) and len(named) == len(heads) == 2
    assert not any(path.intersects_bbox(box) for path in paths for box in named + heads)
    assert not any(box.overlaps(other) for box in named for other in heads)
    width, height = fig.get_size_inches()*fig.dpi
    assert all(0 <= b.x0 and b.x1 <= width and 0 <= b.y0 and b.y1 <= height for b in named)


@pytest.mark.parametrize('ep, en', [(0, 0), (.2, .3)])
def test_tfusion_against_the_formula(ep, en):
    "Counted pair by pair, with error rates, sessions and images without a time; no transfer: looks decide"
    r = np.random.default_rng(0)
    Q, G = 15, 60
    sim, qc, gc = r.random((Q, G)), r.integers(0, 3, Q), r.integers(0, 3, G)
    qt, gt, session = r.uniform(0, 2000, Q), r.uniform(0, 2000, G), (r.integers(0, 2, Q), r.integers(0, 2, G))
    gt[4], gc[5] = np.nan, -1
    model = quiet(transfer_times, sim, qc, qt, gc, gt, sessions=session, horizon=9000., fps=10.)
    out = quiet(tfusion, sim, qc, qt, gc, gt, sessions=session, times=model, window=800., fps=10., ep=ep, en=en)
    want, still = np.zeros((Q, G)), 0
    for i in range(Q):
        for j in range(G):
            dt, P = gt[j] - qt[i], {}
            ok = qc[i] != gc[j] >= 0 and session[0][i] == session[1][j] and abs(dt) <= 900
            for kind in ('positive', 'random', 'different'):
                x, total = model.lists.get((kind, qc[i], gc[j]), []), model.leaving.get((kind, qc[i]), 0)
                P[kind] = sum(abs(v - dt) <= 80 for v in x)/total if ok and total else 1
            still += not ok
            want[i, j] = max(0, ((1-ep)*P['positive'] - en*P['different'])*(sim[i, j] + ep/(1-ep-en))
                             / max(P['random'], 2e-5))
    assert want.max() > 0 and 0 < still < Q*G
    np.testing.assert_allclose(out, want/want.max(), atol=1e-9)


def test_tfusion_ranks_one_camera_by_looks():
    "No image of the query's own camera is a transfer: their order is that of looks, and none is 0"
    r = np.random.default_rng(2)
    sim, qc, gc = r.uniform(.1, 1, (30, 90)), r.integers(0, 3, 30), r.integers(0, 3, 90)
    out = tfusion(sim, qc, r.uniform(0, 900, 30), gc, r.uniform(0, 900, 90))
    for i in range(30):
        same = gc == qc[i]
        assert (out[i, same] > 0).all() and (out[i, same].argsort() == sim[i, same].argsort()).all()


def test_tfusion_follows_the_clock_and_not_its_shuffled_copy():
    "Everybody takes 60 s from camera 0 to camera 1, and looks are weak; the window is in frames"
    r = np.random.default_rng(0)
    pids, qt = np.arange(200), r.uniform(0, 4000, 200)
    sim = np.clip(r.normal(size=(200, 200)) + 2.5*np.eye(200), -3, 4.8)/8 + .4
    first = lambda s: (s.argmax(1) == pids).mean()
    side = np.zeros(200, int), qt, np.ones(200, int), qt + 60 + r.normal(0, 3, 200)
    wrong = *side[:3], r.permutation(side[3])
    looks, with_time, shuffled = first(sim), first(tfusion(sim, *side)), first(tfusion(sim, *wrong))
    assert with_time > looks + .2 and shuffled < looks + .05
    frames, seconds = tfusion(sim, *side, window=100), tfusion(sim, *side, window=1000, fps=250., horizon=400_000.)
    np.testing.assert_allclose(frames, seconds)


def test_random_differences_fill_the_windows():
    "The floor of the random density is the exception"
    r = np.random.default_rng(3)
    sim, qc, gc, qt, gt = r.random((150, 400)), r.integers(0, 5, 150), r.integers(0, 5, 400), r.uniform(0, 900, 150), r.uniform(0, 900, 400)
    m = transfer_times(sim, qc, qt, gc, gt)
    p = np.concatenate([m.density('random', (gt[gc == d] - qt[qc == c][:, None]).ravel(), c, d, 28.)
                        for c in range(5) for d in range(5) if c != d])
    assert (p < 2e-5).mean() < .02


def test_transfer_times_keep_their_pairs():
    r = np.random.default_rng(1)
    sim, qc, gc = r.random((20, 80)), r.integers(0, 3, 20), r.integers(0, 3, 80)
    m = transfer_times(sim, qc, r.uniform(0, 500, 20), gc, r.uniform(0, 500, 80), horizon=2500., top=5, draws=7)
    assert all(c != d for _, c, d in m.lists)
    assert all((np.abs(x) <= 100).all() and (np.diff(x) >= 0).all() for x in m.lists.values())
    for (kind, c), n in m.leaving.items():
        assert n == sum(len(x) for (k, a, _), x in m.lists.items() if (k, a) == (kind, c))
    count = lambda kind: sum(n for (k, _), n in m.leaving.items() if k == kind)
    assert 0 < count('positive') <= 20*5 and 0 < count('random') <= 20*7 and 0 < count('different') <= 20*7


def simulate(Q, G, cams=8, ids=702, seed=0):
    "Clustered scores with a mean of 0.08; everybody passes a camera once, at a moment of 5,000 s"
    r = np.random.default_rng(seed)
    centre, start, offset = r.normal(size=(ids, 64)), r.uniform(0, 5000, ids), r.normal(0, 200, (ids, cams))
    def part(n):
        pid, cam = r.integers(0, ids, n), r.integers(0, cams, n)
        f = centre[pid] + 1.2*r.normal(size=(n, 64))
        f = (f/np.linalg.norm(f, axis=1, keepdims=True)).astype(np.float32)
        return f, cam, np.round((start[pid] + offset[pid, cam] + r.uniform(0, 10, n))*60)/60
    (q, *qs), (g, *gs) = part(Q), part(G)
    return 1/(1 + np.exp(3 - 10*(q @ g.T))), *qs, *gs


def bench(Q=2228, G=17661, cams=8, repeats=3):
    "Rows (job, seconds ours, seconds reference, ratio, peak MB ours, peak MB reference); the result counts as memory"
    args, rows = simulate(Q, G, cams), []
    tlift(*simulate(50, 200, cams))
    for name, params in dict(appendix=TLIFT_APPENDIX, main=TLIFT_MAIN).items():
        ours, loop = [], []
        for _ in range(repeats):
            a, *x = peak(lambda: tlift(*args, **params))
            ours.append(x)
            b, *y = peak(lambda: literal(*args, **params)[0])
            loop.append(y)
            assert np.abs(a - b).max() < 1e-6
            del a, b
        (t, m), (u, n) = np.median(ours, 0), np.median(loop, 0)
        rows.append((f'TLift {Q} x {G}, {cams} cameras, {name}', t, u, u/t, m, n))
    return rows


def test_the_benchmark_agrees_and_runs(): assert len(bench(40, 300, repeats=1)) == 2


if __name__ == '__main__':
    for job, *x in bench(): print(f'{job}: %.2f s, loop %.1f s, ratio %.1f, %.0f MB, loop %.0f MB' % tuple(x))
