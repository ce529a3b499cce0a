"""Evaluation against a literal oracle, hidden faults and memory."""
import json, tracemalloc
from itertools import product

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from sklearn.metrics import average_precision_score

from reidnb.ranking.evaluation import (
    cosine_distance, evaluate, evaluate_features, find_matches, negatives_before, Protocol)

TIES = 'stable', 'optimistic', 'pessimistic'


def oracle(dist, q_pids, g_pids, q_cams, g_cams, *, ap, ties, cross_camera, max_rank):
    "The protocol read aloud: one query, one image at a time; the trapezoid as the toolkit integrates it"
    aps, inps, cmcs = [], [], []
    for q, pid in enumerate(q_pids):
        mine = lambda g: g_pids[g] == pid and pid > 0
        kept = [g for g in range(len(g_pids)) if g_pids[g] != -1
                and not (cross_camera and mine(g) and g_cams[g] == q_cams[q])]
        key = dict(stable=lambda g: 0, optimistic=lambda g: not mine(g), pessimistic=mine)[ties]
        kept.sort(key=lambda g: (dist[q][g], key(g), g))
        n = sum(map(mine, kept))
        if n == 0:
            aps.append(np.nan); inps.append(np.nan); continue
        found, area, old_recall, old_precision, curve = 0, 0., 0., 1., []
        for rank, g in enumerate(kept, 1):
            found += bool(mine(g))
            recall, precision = found/n, found/rank
            area += (recall-old_recall)*(precision if ap == 'step' else (old_precision+precision)/2)
            old_recall, old_precision = recall, precision
            curve.append(found > 0)
            if mine(g): last = rank
        aps.append(area); inps.append(n/last)
        cmcs.append([curve[min(k, len(curve)-1)] for k in range(max_rank)])
    return np.array(aps), np.array(inps), np.mean(cmcs, 0) if cmcs else None


@st.composite
def problems(draw):
    Q, G = draw(st.integers(1, 6)), draw(st.integers(1, 25))
    levels = draw(st.sampled_from([1, 2, 5, 1000]))
    ints = lambda lo, hi, n: np.array(draw(st.lists(st.integers(lo, hi), min_size=n, max_size=n)))
    dist = ints(0, levels, Q*G).reshape(Q, G)/8 - 1     # negative distances too
    dtype = draw(st.sampled_from([np.float32, np.float64, np.float16, np.int64]))
    return ((dist*8).astype(dtype), ints(-1, 4, Q), ints(-1, 4, G), ints(0, 2, Q), ints(0, 2, G))


@settings(max_examples=300, deadline=None)
@given(problems(), st.sampled_from(['step', 'trapezoid']), st.sampled_from(TIES), st.booleans(),
       st.integers(1, 30), st.sampled_from([1, 2**28]), st.booleans())
def test_matches_the_oracle(problem, ap, ties, cross_camera, max_rank, budget, as_tensor):
    "Every option, with ties, junk, distractors, dtypes, budgets, numpy and torch"
    rules = dict(ap=ap, ties=ties, cross_camera=cross_camera, max_rank=max_rank)
    want_ap, want_inp, want_cmc = oracle(*problem, **rules)
    dist, *labels = problem
    if as_tensor: dist, labels = torch.as_tensor(dist), [torch.as_tensor(x) for x in labels]
    if np.isnan(want_ap).all():
        with pytest.raises(ValueError, match='no query has a match'): evaluate(dist, *labels, **rules)
        return
    m = evaluate(dist, *labels, **rules, budget=budget)
    np.testing.assert_allclose(m.average_precision, want_ap, atol=1e-12)
    np.testing.assert_allclose(m.inverse_penalty, want_inp, atol=1e-12)
    np.testing.assert_allclose(m.cmc, want_cmc, atol=1e-12)
    assert m.mAP == pytest.approx(np.nanmean(want_ap))
    assert m.n_valid == (~np.isnan(want_ap)).sum() and m.n_query == len(want_ap)
    assert m.n_junk == (problem[2] == -1).sum() and m.n_gallery+m.n_junk == len(problem[2])


@settings(max_examples=150, deadline=None)
@given(problems(), st.sampled_from(TIES), st.booleans())
def test_batched_counting_equals_row_by_row(problem, ties, with_skip):
    "The GPU's road, taken on the CPU"
    dist, *labels = problem
    dist, pairs = dist.astype(np.float32), find_matches(*labels)
    skip = np.arange(dist.shape[1]) % 3 == 0 if with_skip else None
    pairs = pairs if skip is None else (*pairs[:2], pairs[2] & ~skip[pairs[1]])
    np.testing.assert_array_equal(negatives_before(torch.tensor(dist), *pairs, skip, ties),
                                  negatives_before(dist, *pairs, skip, ties))


def some(seed=0, Q=20, G=300, n_ids=9, n_cams=3):
    rng = np.random.default_rng(seed)
    return (rng.random((Q, G)), rng.integers(1, n_ids, Q), rng.integers(-1, n_ids, G),
            rng.integers(0, n_cams, Q), rng.integers(0, n_cams, G))


def test_agrees_with_scikit_learn():
    dist, qp, gp, qc, gc = some()
    ours = evaluate(dist, qp, gp, qc, gc).average_precision
    for q in range(len(qp)):
        kept = (gp != -1) & ~((gp == qp[q]) & (gc == qc[q]))
        assert ours[q] == pytest.approx(average_precision_score(gp[kept] == qp[q], -dist[q, kept]), abs=1e-12)


@pytest.mark.parametrize('rule', [{}, dict(ap='trapezoid'), dict(cross_camera=False), dict(ties='pessimistic')])
def test_invariances(rule):
    dist, qp, gp, qc, gc = some(1)
    base, rng = evaluate(dist, qp, gp, qc, gc, **rule), np.random.default_rng(0)
    p, r = rng.permutation(len(gp)), rng.permutation(len(qp))
    np.testing.assert_array_equal(evaluate(dist[:, p], qp, gp[p], qc, gc[p], **rule).average_precision, base.average_precision)
    np.testing.assert_array_equal(evaluate(dist[r], qp[r], gp, qc[r], gc, **rule).average_precision, base.average_precision[r])
    np.testing.assert_array_equal(evaluate(5*dist**3-7, qp, gp, qc, gc, **rule).average_precision, base.average_precision)
    np.testing.assert_array_equal(evaluate(np.asfortranarray(dist), qp, gp, qc, gc, **rule).average_precision, base.average_precision)
    np.testing.assert_array_equal(evaluate(dist, qp, gp, qc+7, gc+7, **rule).average_precision, base.average_precision)


def test_perfect_and_worst_ranking():
    ids = np.arange(1, 5); match = ids[:, None] == np.repeat(ids, 3)[None]
    kw = dict(cross_camera=False)
    best, worst = (evaluate(d, ids, np.repeat(ids, 3), **kw) for d in (~match, match))
    assert best.mAP == best.mINP == best.rank(1) == 1
    assert worst.mINP == pytest.approx(3/12) and worst.rank(9) == 0 and worst.rank(10) == 1


def test_ties_bracket_the_stable_score():
    dist, *labels = some(2); dist = dist.round(1)
    lo, mid, hi = (evaluate(dist, *labels, ties=t).mAP for t in ('pessimistic', 'stable', 'optimistic'))
    assert lo < mid < hi


def test_the_matrix_is_not_changed():
    dist, *labels = some(3)
    for d in (dist.astype(np.float32), torch.tensor(dist)):
        before = d.copy() if isinstance(d, np.ndarray) else d.clone()
        evaluate(d, *labels); evaluate(d, *labels, single_gallery_shot=True); assert (before == d).all()
        negatives_before(d, *find_matches(*labels)); assert (before == d).all()
    frozen = dist.copy(); frozen.flags.writeable = False
    evaluate(frozen, *labels)


def test_single_gallery_shot_is_the_mean_over_draws():
    "All draws of a small gallery enumerated: the average of many random draws approaches their mean"
    rng = np.random.default_rng(0)
    gp = np.array([1, 1, 2, 2, 2, 3, 0, -1]); gc = np.array([0, 1, 1, 1, 1, 1, 1, 1])
    qp, qc, dist = np.array([1, 2]), np.array([0, 0]), rng.random((2, 8))
    want = []
    for pick in product(*[np.flatnonzero(gp == p) for p in (1, 2, 3)]):
        ap = []
        for q in range(2):
            own = [g for g in np.flatnonzero((gp == qp[q]) & (gc != qc[q]))]
            others = [g for g in (*pick, 6) if gp[g] != qp[q]]
            ap.append(np.mean([1/(1+sum(dist[q, o] < dist[q, g] for o in others)) for g in own]))
        want.append(np.mean(ap))
    m = evaluate(dist, qp, gp, qc, gc, single_gallery_shot=True, repeats=4000)
    assert m.mAP == pytest.approx(np.mean(want), abs=.01) and m.mAP == pytest.approx(m.mINP)
    assert 'x4000' in str(m)


def drawn(dist, q_pids, g_pids, q_cams, g_cams, *, ties, cross_camera, repeats, seed):
    "Ranks of every query in each gallery it draws, by sorting; empty without a match"
    ranks, people = [], {p: np.flatnonzero(g_pids == p) for p in np.unique(g_pids[g_pids > 0])}
    for q, pid in enumerate(q_pids):
        mine = [g for g in people.get(pid, []) if not cross_camera or g_cams[g] != q_cams[q]]
        rng = np.random.default_rng((seed, q))
        for _ in range(repeats):
            own, *others = rng.random(1 + len(people))
            if not mine: ranks.append(np.nan); continue
            hit, kept = mine[int(own*len(mine))], list(np.flatnonzero(g_pids == 0))
            kept += [at[int(u*len(at))] for u, (p, at) in zip(others, people.items()) if p != pid]
            key = dict(stable=lambda g: 0, optimistic=lambda g: g != hit, pessimistic=lambda g: g == hit)[ties]
            ranks.append(1 + sorted([hit, *kept], key=lambda g: (dist[q][g], key(g), g)).index(hit))
    return np.array(ranks, float).reshape(len(q_pids), repeats)


@settings(max_examples=200, deadline=None)
@given(problems(), st.sampled_from(['step', 'trapezoid']), st.sampled_from(TIES), st.booleans(), st.integers(0, 99),
       st.integers(1, 5), st.sampled_from([1, 2**28]), st.booleans())
def test_drawn_galleries_match_the_oracle(problem, ap, ties, cross_camera, seed, repeats, budget, as_tensor):
    rules = dict(ties=ties, cross_camera=cross_camera)
    ranks = drawn(*problem, **rules, repeats=repeats, seed=seed)
    dist, *labels = problem
    if np.isnan(ranks).all(): return
    shot = dict(single_gallery_shot=True, repeats=repeats, seed=seed, max_rank=7)
    if as_tensor: dist = torch.as_tensor(dist)
    m = evaluate(dist, *labels, ap=ap, **rules, **shot, budget=budget)
    one = 1/ranks if ap == 'step' else (np.where(ranks > 1, 0, 1) + 1/ranks)/2
    np.testing.assert_allclose(m.average_precision, one.mean(1), atol=1e-12)
    np.testing.assert_allclose(m.inverse_penalty, (1/ranks).mean(1), atol=1e-12)
    valid = ~np.isnan(ranks[:, 0])
    np.testing.assert_allclose(m.cmc, [(ranks[valid] <= k).mean() for k in range(1, 8)], atol=1e-12)
    assert m.multi_shot_mAP == evaluate(dist, *labels, ap=ap, **rules).mAP and m.n_valid == valid.sum()
    assert f'(of drawn galleries; multi-shot {100*m.multi_shot_mAP:.1f} %)' in str(m)


def test_each_query_draws_for_itself(monkeypatch):
    "Equal queries see different galleries, the first ones the same with fewer queries or smaller pieces"
    import reidnb.ranking.evaluation as module
    dist, qp, gp, qc, gc = some(7, Q=1, G=300, n_ids=60)
    gp[:2], gc[:2], qp[0], qc[0] = 5, 1, 5, 0
    ask = lambda n: (np.repeat(dist, n, 0), np.repeat(qp, n), gp, np.repeat(qc, n), gc)
    shot = dict(single_gallery_shot=True, repeats=3)
    many, few = evaluate(*ask(200), **shot), evaluate(*ask(9), **shot, budget=1)
    assert len(np.unique(many.average_precision)) > 20
    np.testing.assert_array_equal(few.average_precision, many.average_precision[:9])
    whole = module._drawn_ranks
    monkeypatch.setattr(module, '_drawn_ranks', lambda *a: whole(*a, size=1))
    np.testing.assert_array_equal(evaluate(*ask(9), **shot).average_precision, few.average_precision)


@pytest.mark.parametrize('repeats', [10, 400])
def test_memory_of_drawn_galleries(repeats):
    fq, fg, labels = market(60)
    dist = cosine_distance(fq, fg)
    tracemalloc.start(); evaluate(dist, *labels, single_gallery_shot=True, repeats=repeats, budget=2**22)
    peak = tracemalloc.get_traced_memory()[1]; tracemalloc.stop()
    assert peak < 2**22 + 2**22


def test_single_gallery_shot_repeats_with_its_seed():
    dist, *labels = some(4)
    a, b, c = (evaluate(dist, *labels, single_gallery_shot=True, seed=s) for s in (0, 0, 1))
    np.testing.assert_array_equal(a.cmc, b.cmc); assert a.mAP != c.mAP


BAD = {
    'pid without label': (dict(g=[1, -2, 1]), r'g_pids\[1\] is -2'),
    'query without label': (dict(q=[-2, 1]), r'q_pids\[0\] is -2'),
    'unknown camera': (dict(gc=[1, -1, 1]), 'cross_camera=False'),
    'no cameras': (dict(qc=None), 'q_cams is missing'),
    'fractions': (dict(g=[1., 1.5, 2]), 'whole numbers'),
    'words': (dict(g=['a', 'b', 'c']), 'whole numbers'),
    'too few pids': (dict(g=[1, 1]), r'dist is \(2, 3\)'),
    'too few cameras': (dict(gc=[1, 1]), 'g_cams has 2 labels for 3'),
    'two-dimensional': (dict(q=[[1], [1]]), 'one row of labels'),
    'nan': (dict(d=[[0, 1, 2], [0, np.nan, 2]]), 'query 1 to gallery image 1 is nan'),
    'inf': (dict(d=[[0, 1, np.inf], [0, 1, 2]]), 'query 0 to gallery image 2 is inf'),
    'one-dimensional': (dict(d=[0, 1, 2]), r'\(Q,G\)'),
    'ap': (dict(ap='area'), "ap='area'"), 'ties': (dict(ties='random'), "ties='random'"),
    'max_rank': (dict(max_rank=0), 'max_rank=0'), 'repeats': (dict(repeats=0), 'repeats=0'),
    'same camera': (dict(gc=[0, 0, 0]), 'query 0 is pid 1 in camera 0'),
    'strangers': (dict(g=[7, 8, 9]), 'no person is in both'),
    'all junk': (dict(g=[-1, -1, -1]), 'no query has a match'),
}


@pytest.mark.parametrize('case', BAD)
@pytest.mark.parametrize('kind', [np.array, torch.tensor])
def test_bad_input_is_named(case, kind):
    what, message = BAD[case]
    args = dict(d=[[0., 1, 2], [0, 1, 2]], q=[1, 1], g=[1, 1, 2], qc=[0, 0], gc=[1, 1, 1]) | what
    d, q, g, qc, gc = (args.pop(k) for k in ('d', 'q', 'g', 'qc', 'gc'))
    with pytest.raises(ValueError, match=message): evaluate(kind(d), q, g, qc, gc, **args)


def test_empty_input():
    with pytest.raises(ValueError, match='empty'): evaluate(np.zeros((0, 3)), [], [1, 2, 3], [], [0, 0, 0])
    with pytest.raises(ValueError, match='empty'): evaluate(np.zeros((2, 0)), [1, 2], [], [0, 0], [])


def test_distractors_and_junk():
    m = evaluate([[.1, .2, .3, .4], [.1, .2, .3, .4]], [1, 0], [-1, 0, 1, 0], [0, 0], [1, 1, 1, 1])
    assert m.average_precision[0] == .5 and np.isnan(m.average_precision[1])              # junk in front ignored, distractor counted
    assert (m.n_valid, m.n_query, m.n_gallery, m.n_junk) == (1, 2, 3, 1)
    same = evaluate([[.1, .2]], [1], [0, 1], [0], [0], cross_camera=False)
    assert same.average_precision[0] == .5                                 # a distractor in the query's camera stays


def test_card_is_json():
    dist, *labels = some(5)
    m = evaluate(dist, *labels, max_rank=7)
    card = json.loads(json.dumps(m.to_dict(per_query=True)))
    assert card['mAP'] == m.mAP and len(card['cmc']) == 7 and card['protocol']['ap'] == 'step'
    assert Protocol(**card['protocol']) == m.protocol and len(card['average_precision']) == len(card['inverse_penalty']) == len(dist)
    assert list(m.to_dict()) == ['mAP', 'cmc', 'mINP', 'n_valid', 'n_query', 'n_gallery', 'n_junk', 'protocol']
    assert (m.R1, m.R5) == (m.rank(1), m.rank(5)) == (card['cmc'][0], card['cmc'][4])
    with pytest.raises(ValueError, match='rank 10 is outside 1 to 7: evaluate with max_rank=10'): m.R10


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 1000), st.integers(1, 20000))
def test_streamed_features_equal_the_matrix(seed, budget):
    _, *labels = some(seed)
    rng = np.random.default_rng(seed)
    q, g = rng.integers(-4, 5, (20, 4)).astype(np.float32), rng.integers(-4, 5, (300, 4)).astype(np.float32)
    exact = lambda a, b: (a[:, None]-b[None]).abs().sum(2)   # whole numbers: no rounding, many ties
    whole = evaluate(exact(*map(torch.tensor, (q, g))), *labels)
    parts = evaluate_features(q, g, *labels, distance=exact, budget=budget)
    np.testing.assert_array_equal(whole.average_precision, parts.average_precision); np.testing.assert_array_equal(whole.cmc, parts.cmc)


def test_streaming_reads_a_memory_map_and_names_a_bad_feature(tmp_path):
    _, *labels = some(6); rng = np.random.default_rng(6)
    q, g = rng.standard_normal((20, 8)).astype(np.float32), rng.standard_normal((300, 8)).astype(np.float32)
    np.save(tmp_path/'g.npy', g); mapped = np.load(tmp_path/'g.npy', mmap_mode='r')
    want = evaluate(cosine_distance(q, g), *labels)
    assert evaluate_features(q, mapped, *labels, budget=9*300*3).mAP == pytest.approx(want.mAP, abs=1e-6)
    q[17, 3] = np.inf
    with pytest.raises(ValueError, match='query image 17 has inf in dimension 3'):
        evaluate_features(q, g, *labels, budget=9*300*3)
    with pytest.raises(TypeError): evaluate_features(q, g, *labels, rule='step')


def test_cosine_distance():
    rng = np.random.default_rng(0); q, g = rng.standard_normal((5, 7)), rng.standard_normal((9, 7))
    want = 1 - (q/np.linalg.norm(q, axis=1)[:, None])@(g/np.linalg.norm(g, axis=1)[:, None]).T
    got = cosine_distance(q, g)
    assert got.dtype == np.float32 and isinstance(got, np.ndarray)
    np.testing.assert_allclose(got, want, atol=1e-6)
    half = cosine_distance(torch.tensor(q).half(), torch.tensor(g).half())
    assert half.dtype == torch.float32
    with torch.autocast('cpu', dtype=torch.bfloat16):
        np.testing.assert_allclose(cosine_distance(torch.tensor(q), torch.tensor(g)), want, atol=1e-6)
    x = torch.tensor(q, requires_grad=True); cosine_distance(x, torch.tensor(g)).sum().backward()
    assert x.grad.isfinite().all()
    with pytest.raises(ValueError, match='7 dimensions, gallery features 3'): cosine_distance(q, g[:, :3])
    with pytest.raises(ValueError, match=r'\(N,D\)'): cosine_distance(q[0], g)


def market(n_query=600, seed=0):
    "Labels and features with the statistics of Market-1501"
    rng = np.random.default_rng(seed); person, place = rng.standard_normal((751, 64)), rng.standard_normal((6, 64))
    def draw(n, distractors):
        pids, cams = rng.integers(1, 751, n), rng.integers(0, 6, n); pids[:distractors] = 0
        code = np.where(pids[:, None] > 0, person[pids], rng.standard_normal((n, 64)))
        return (code + .6*place[cams] + rng.standard_normal((n, 64))).astype(np.float32), pids, cams
    (fq, pq, cq), (fg, pg, cg) = draw(n_query, 0), draw(15913, 2798)
    return fq, fg, (pq, pg, cq, cg)


@pytest.mark.parametrize('budget', [2**22, 2**25])
def test_extra_memory_stays_within_the_budget(budget):
    fq, fg, labels = market()
    dist = cosine_distance(fq, fg)
    tracemalloc.start(); evaluate(dist, *labels, budget=budget)
    peak = tracemalloc.get_traced_memory()[1]; tracemalloc.stop()
    assert peak < budget + 2**21                            # labels and pair lists come on top


@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a GPU')
@pytest.mark.parametrize('ties', TIES)
def test_gpu_gives_the_same_numbers(ties):
    fq, fg, labels = market()
    dist = torch.tensor(cosine_distance(fq, fg)).mul(100).round() if ties != 'stable' else torch.tensor(cosine_distance(fq, fg))
    a, b = evaluate(dist, *labels, ties=ties), evaluate(dist.cuda(), *labels, ties=ties)
    np.testing.assert_array_equal(a.average_precision, b.average_precision); np.testing.assert_array_equal(a.cmc, b.cmc)
    c = evaluate_features(fq, torch.tensor(fg).cuda(), *labels, ties=ties)
    assert c.mAP == pytest.approx(evaluate_features(fq, fg, *labels, ties=ties).mAP, abs=1e-5)
