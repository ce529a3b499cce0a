"Matching against literal loops, on anything hypothesis thinks of; tiles, precision, gradients; and the benchmark."
import os
import subprocess
import sys
import threading
import time
from statistics import median

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings, strategies as st

from reidnb.ranking.matching import (
    best_matches, correspondences, global_feature, patches, prefilter, prefilter_recall,
    QAConvMatcher, score_matrix, unit_maps)


def pair(q, g, s):
    "Both maxima of one pair, location by location: `b` then `a`"
    def patch(x, y0, x0):
        d, h, w = x.shape
        out = torch.zeros(d, s, s, dtype=x.dtype)
        for i in range(s):
            for j in range(s):
                r, c = y0+i-s//2, x0+j-s//2
                if 0 <= r < h and 0 <= c < w: out[:, i, j] = x[:, r, c]
        n = out.norm()
        return out if s == 1 or n == 0 else out/n
    def places(x): return [patch(x, r, c) for r in range(x.shape[1]) for c in range(x.shape[2])]
    S = [[float((p*k).sum()) for k in places(q)] for p in places(g)]          # [gallery][query]
    return [max(row) for row in S] + [max(row[i] for row in S) for i in range(len(S[0]))]


def oracle(q, g, s=1): return torch.tensor([[pair(x, y, s) for y in g] for x in q], dtype=q.dtype)


def make(rng, n, d, h, w, kinds):
    "Maps with few distinct places (ties), some of them zero"
    pool = torch.randn(kinds, d, generator=rng)
    x = pool[torch.randint(kinds, (n*h*w,), generator=rng)].view(n, h, w, d).permute(0, 3, 1, 2)
    x = x*(torch.rand(n, 1, h, w, generator=rng) > .1)
    return unit_maps(x)


def worn(h, w, **kw):
    "A matcher in eval mode with statistics and weights of its own"
    torch.manual_seed(h*w)
    m = QAConvMatcher(h, w, **kw)
    for _ in range(5): m(unit_maps(torch.randn(4, 6, h, w)), unit_maps(torch.randn(4, 6, h, w)))
    for p in m.parameters(): p.data += .3*torch.randn_like(p)
    return m.eval()


shapes = st.tuples(st.integers(1, 4), st.integers(1, 4))
cases = st.tuples(st.integers(1, 3), st.integers(1, 4), st.integers(1, 5), shapes, st.integers(1, 30), st.integers(0, 2**31))


@settings(max_examples=60, deadline=None)
@given(cases, shapes, st.sampled_from([1, 3, 5]), st.integers(0, 14))
def test_best_matches_equal_loops(case, other, s, bits):
    "Maps of two different sizes are fine here; the matcher refuses them"
    nq, ng, d, (h, w), kinds, seed = case
    rng = torch.Generator().manual_seed(seed)
    q, g = make(rng, nq, d, h, w, kinds), make(rng, ng, d, *other, kinds)
    v = best_matches(q, g, kernel_size=s, budget=2**bits)
    torch.testing.assert_close(v, oracle(q, g, s), atol=2e-6, rtol=0)
    with torch.enable_grad():
        u = best_matches(q.requires_grad_(), g, kernel_size=s, budget=2**bits)
    torch.testing.assert_close(u, v, atol=2e-6, rtol=0)


@settings(max_examples=60, deadline=None)
@given(cases, st.sampled_from([{}, dict(shared=True), dict(shared=True, shared_bias='twice')]), st.sampled_from([1, 3]),
       st.integers(0, 16))
def test_scores_equal_the_matcher(case, kind, s, bits):
    nq, ng, d, (h, w), kinds, seed = case
    rng = torch.Generator().manual_seed(seed)
    q, g = make(rng, nq, d, h, w, kinds), make(rng, ng, d, h, w, kinds)
    m, budget = worn(h, w, **kind, kernel_size=s), 2**bits
    with torch.no_grad(): z, back, own = (m.score(m(*x)) for x in ((q, g), (g, q), (g, g)))
    torch.testing.assert_close(score_matrix(m, q, g, budget=budget), z, atol=2e-6, rtol=0)
    a, b = score_matrix(m, q, g, both=True, budget=budget)
    torch.testing.assert_close((a, b), (z, back), atol=2e-6, rtol=0)
    mine = score_matrix(m, g, budget=budget)
    torch.testing.assert_close(mine, own, atol=2e-6, rtol=0)
    if kind: assert torch.equal(mine, mine.T)
    assert z.isfinite().all() and ((0 <= z) & (z <= 1)).all()
    for i in range(nq):                                            # a score does not depend on the rest of the batch
        torch.testing.assert_close(score_matrix(m, q[i:i+1], g), z[i:i+1], atol=2e-6, rtol=0)


def test_threads_share_the_work(monkeypatch):
    "Several threads, in every grad mode, give the numbers of one, and torch keeps its number of threads"
    import reidnb.ranking.matching as mod
    spread = mod._spread
    monkeypatch.setattr(mod, '_spread', lambda work, n, cost, device: spread(work, n, 1e9, device))
    m, q, g = worn(4, 3), unit_maps(torch.randn(5, 6, 4, 3)), unit_maps(torch.randn(23, 6, 4, 3))
    before, results = torch.get_num_threads(), []
    try:
        for n in (1, 2, 3):
            torch.set_num_threads(n)
            x, y = q.clone().requires_grad_(), g.clone().requires_grad_()
            z = m(x, y); z.square().sum().backward()
            with torch.inference_mode(): s = score_matrix(m, q, g), score_matrix(m, g), m(q, g)
            results.append((z.detach(), x.grad, y.grad, *s))
            assert torch.get_num_threads() == n
            seen = []
            t = threading.Thread(target=lambda: seen.append(torch.get_num_threads())); t.start(); t.join()
            assert seen == [n]
    finally: torch.set_num_threads(before)
    for r in results[1:]: torch.testing.assert_close(r, results[0], atol=1e-5, rtol=1e-5)


@settings(max_examples=30, deadline=None)
@given(cases)
def test_places_may_move(case):
    "Permuting the places of g permutes b and leaves a alone; an image matches itself everywhere"
    nq, ng, d, (h, w), kinds, seed = case
    rng = torch.Generator().manual_seed(seed)
    q, g = make(rng, nq, d, h, w, kinds), make(rng, ng, d, h, w, kinds)
    p, n = torch.randperm(h*w, generator=rng), h*w
    v, u = best_matches(q, g), best_matches(q, g.flatten(2)[:, :, p].view_as(g))
    torch.testing.assert_close(u, torch.cat([v[..., :n][..., p], v[..., n:]], -1), atol=1e-6, rtol=0)
    full = unit_maps(torch.randn(2, d, h, w, generator=rng))
    torch.testing.assert_close(best_matches(full, full).diagonal(dim1=0, dim2=1), torch.ones(2*n, 2), atol=1e-6, rtol=0)


@settings(max_examples=30, deadline=None)
@given(cases, st.sampled_from([1, 3]), st.integers(0, 14))
def test_gradient_equals_plain_differentiation(case, s, bits):
    nq, ng, d, (h, w), _, seed = case
    torch.manual_seed(seed)
    q, g = (torch.randn(n, d, h, w, dtype=torch.double, requires_grad=True) for n in (nq, ng))
    if d == 1: q, g = (x.detach().abs().requires_grad_() for x in (q, g))     # else every value is tied at 1 or -1
    weight = torch.randn(nq, ng, 2*h*w, dtype=torch.double)
    x, y = (patches(m, s) for m in (q, g))
    S = torch.einsum('isd,jrd->ijrs', x, y)
    plain = torch.autograd.grad((torch.cat([S.max(3)[0], S.max(2)[0]], 2)*weight).sum(), (q, g))
    for fixed in ((), (0,), (1,)):
        pair = [m.detach() if k in fixed else m for k, m in enumerate((q, g))]
        ours = torch.autograd.grad((best_matches(*pair, kernel_size=s, budget=2**bits)*weight).sum(),
                                   [m for k, m in enumerate((q, g)) if k not in fixed])
        for a, b in zip(ours, [p for k, p in enumerate(plain) if k not in fixed]):
            torch.testing.assert_close(a, b, atol=1e-10, rtol=0)


@pytest.mark.parametrize('shared', [True, False])
def test_gradcheck_of_the_whole_matcher(shared):
    torch.manual_seed(0)
    m = QAConvMatcher(3, 2, shared=shared).double()
    q, g = (torch.randn(n, 4, 3, 2, dtype=torch.double, requires_grad=True) for n in (2, 3))
    for train in (False, True):
        m.train(train)
        assert torch.autograd.gradcheck(lambda x, y: m(unit_maps(x), unit_maps(y)), (q, g))


@pytest.mark.parametrize('dtype,eps', [(torch.bfloat16, 4e-3), (torch.float16, 6e-4)])
def test_half_precision(dtype, eps):
    "A unit vector rounded to p bits moves a cosine by at most 2^(1-p) or so; logits and gradients follow"
    torch.manual_seed(0)
    q, g = unit_maps(torch.randn(6, 128, 12, 4)), unit_maps(torch.randn(9, 128, 12, 4))
    torch.testing.assert_close(best_matches(q, g, half=dtype), best_matches(q, g), atol=eps, rtol=0)
    m = QAConvMatcher(12, 4); m(q, g); m.eval()
    exact = score_matrix(m, q, g)
    torch.testing.assert_close(score_matrix(m, q, g, half=dtype), exact, atol=1e-3, rtol=0)
    torch.testing.assert_close(score_matrix(m, q.to(dtype), g.to(dtype)), exact, atol=1e-3, rtol=0)   # maps stored in half
    q.requires_grad_()
    full, = torch.autograd.grad(best_matches(q, g).sum(), q)
    some, = torch.autograd.grad(best_matches(q, g, half=dtype).sum(), q)
    assert F.cosine_similarity(full.flatten(), some.flatten(), dim=0) > .97


def test_autocast_changes_nothing_but_the_maps():
    q, g = unit_maps(torch.randn(3, 8, 4, 2)), unit_maps(torch.randn(4, 8, 4, 2))
    m = worn(4, 2)
    for train in (False, True):
        m.train(train)
        with torch.autocast('cpu', dtype=torch.bfloat16): z = m(q.requires_grad_(), g)
        z.sum().backward()
        assert z.dtype == torch.float32 and q.grad.isfinite().all()
        if not train: torch.testing.assert_close(z, m(q, g), atol=1e-6, rtol=0)


def test_training_learns_and_saves(tmp_path):
    "Places shared by the images of a person are found; the trained matcher survives a file"
    torch.manual_seed(0)
    people = torch.randn(12, 16, 6)
    def images():
        x = torch.randn(12, 16, 24)
        for i in range(12): x[i, :, torch.randperm(24)[:6]] = people[i]
        return unit_maps(x.view(12, 16, 6, 4))
    m, y = QAConvMatcher(6, 4), torch.eye(12)
    opt = torch.optim.SGD(m.parameters(), .05, momentum=.9)
    for _ in range(60):
        loss = F.binary_cross_entropy_with_logits(m(images(), images(), detach=True), y, reduction='none').sum(1).mean()
        opt.zero_grad(); loss.backward(); opt.step()
    q, g = images(), images()
    s = score_matrix(m.eval(), q, g)
    assert (s.argmax(1) == torch.arange(12)).float().mean() > .9
    torch.save(m.state_dict(), tmp_path/'m.pt')
    again = QAConvMatcher(6, 4); again.load_state_dict(torch.load(tmp_path/'m.pt'))
    assert torch.equal(score_matrix(again.eval(), q, g), s)


@settings(max_examples=40, deadline=None)
@given(cases, st.integers(1, 5))
def test_prefilter(case, top):
    nq, ng, d, (h, w), kinds, seed = case
    rng = torch.Generator().manual_seed(seed)
    q, g = make(rng, nq, d, h, w, kinds), make(rng, ng, d, h, w, kinds)
    m = worn(h, w)
    full, some = score_matrix(m, q, g), score_matrix(m, q, g, top=top)
    kept, cosine = prefilter(q, g, top)
    assert kept.shape == (nq, min(top, ng))
    torch.testing.assert_close(some.gather(1, kept), full.gather(1, kept), atol=1e-6, rtol=0)
    rest = torch.ones_like(full, dtype=torch.bool).scatter(1, kept, False)
    assert (some[rest] < 0).all() or top >= ng
    torch.testing.assert_close(cosine, global_feature(q) @ global_feature(g).T)
    wanted = torch.rand(nq, ng, generator=rng) > .5
    if wanted.any():
        share = [sum(wanted[i, j].item() for j in kept[i].tolist())/wanted[i].sum().item() for i in range(nq) if wanted[i].any()]
        assert prefilter_recall(kept, wanted) == pytest.approx(sum(share)/len(share), abs=1e-6)


@settings(max_examples=30, deadline=None)
@given(cases, st.sampled_from([1, 3]))
def test_correspondences_are_the_maxima(case, s):
    _, _, d, (h, w), kinds, seed = case
    rng = torch.Generator().manual_seed(seed)
    q, g = make(rng, 1, d, h, w, kinds)[0], make(rng, 1, d, h, w, kinds)[0]
    m = worn(h, w, kernel_size=s)
    c = correspondences(q, g, -2, m)
    assert len(c) == 2*h*w and c.from_query.sum() == h*w
    x, y = patches(q[None], s)[0], patches(g[None], s)[0]
    at = lambda p: p[:, 0]*w+p[:, 1]
    torch.testing.assert_close((x[at(c.query)]*y[at(c.gallery)]).sum(1), c.similarity, atol=1e-6, rtol=0)
    v = best_matches(q[None], g[None], kernel_size=s)[0, 0]
    torch.testing.assert_close(torch.cat([c.similarity[~c.from_query], c.similarity[c.from_query]]), v, atol=1e-6, rtol=0)
    z = m.bn2((c.contribution.sum()+m.beta).view(1, 1))
    torch.testing.assert_close(z.flatten(), m.logits(v[None]), atol=1e-4, rtol=1e-4)
    assert (correspondences(q, g, .5).similarity > .5).all()


def test_empty_and_wrong():
    m = worn(3, 2)
    q = unit_maps(torch.randn(2, 6, 3, 2))
    assert score_matrix(m, q, q[:0]).shape == (2, 0) and score_matrix(m, q[:0], q).shape == (0, 2)
    assert score_matrix(m, q[:0]).shape == (0, 0) and best_matches(q, q[:0]).shape == (2, 0, 12)
    for fault, call in {'training mode': lambda: score_matrix(QAConvMatcher(3, 2), q, q),
                        'weights for (3, 2)': lambda: m(q, unit_maps(torch.randn(2, 6, 2, 3))),
                        'use unit_maps first': lambda: score_matrix(m, 2*q, q),
                        'must be odd': lambda: QAConvMatcher(3, 2, kernel_size=2)}.items():
        with pytest.raises(ValueError) as e: call()
        assert fault in str(e.value)


def test_memory_of_training_is_bounded():
    "What is kept for the backward pass: the maxima and two bytes per position, not the blocks"
    torch.manual_seed(0)
    q, g = unit_maps(torch.randn(4, 8, 16, 8)).requires_grad_(), unit_maps(torch.randn(60, 8, 16, 8))
    kept = {}
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.setdefault(t.data_ptr(), t) is None or t, lambda t: t):
        best_matches(q, g)
    bytes_ = sum(t.numel()*t.element_size() for t in kept.values())
    assert bytes_ < 2*(4*60*256*2 + (q.numel()+g.numel())*4*3)


def test_kernel_steps_aside_without_triton():
    code = ("import sys; sys.modules['triton'] = None\nimport torch, reidnb.ranking.matching\n"
            "from reidnb.ranking.matching_kernel import fits\nassert not fits(torch.randn(2, 192, 8))")
    subprocess.run([sys.executable, '-c', code], check=True)


@pytest.mark.cuda
def test_cuda_equals_cpu():
    for shape in ((24, 8), (16, 8), (8, 4), (9, 5), (24, 12)):
        m = worn(*shape); q, g = (unit_maps(torch.randn(n, 6, *shape)) for n in (19, 35))
        want, own = score_matrix(m, q, g), score_matrix(m, g)
        m.cuda()
        for half, eps in ((None, 1e-5), (torch.float16, 1e-3), (torch.bfloat16, 1e-3)):
            for kernel in (True, False):
                for x, y in ((q, g), (q.cuda(), g.cuda())):
                    torch.testing.assert_close(score_matrix(m, x, y, half=half, kernel=kernel).cpu(), want, atol=eps, rtol=0)
                    torch.testing.assert_close(score_matrix(m, y, half=half, kernel=kernel).cpu(), own, atol=eps, rtol=0)


# --- the benchmark: the published way, literally, beside ours ------------------------------------------------------

class Peak:
    "Largest resident memory above the start, in MB, while the block runs (Linux)"
    def __enter__(self):
        self.start, self.top, self.on = self.now(), 0, True
        self.thread = threading.Thread(target=self.watch, daemon=True); self.thread.start()
        return self
    def now(self): return int(open('/proc/self/statm').read().split()[1])*os.sysconf('SC_PAGE_SIZE')/1e6
    def watch(self):
        while self.on: self.top = max(self.top, self.now()-self.start); time.sleep(.002)
    def __exit__(self, *_): self.on = False; self.thread.join(); self.mb = self.top


def published_scores(m, q, g, chunk=16):
    "The product of all pairs of a chunk at once, both maxima, then the layers (METHODS 14.1)"
    q, g, out = q.flatten(2), g.flatten(2), []
    with torch.no_grad():
        for j in range(0, len(g), chunk):
            S = torch.einsum('pds,gdr->pgrs', q, g[j:j+chunk])
            out.append(m.logits(torch.cat([S.max(3)[0], S.max(2)[0]], 2)))
    return torch.sigmoid(torch.cat(out, 1)/10)


def published_logits(m, q, g, chunk=16):
    "The same with a gradient, for training"
    out = []
    for j in range(0, len(g), chunk):
        S = torch.einsum('bds,gdr->bgrs', q.flatten(2), g[j:j+chunk].flatten(2))
        out.append(torch.cat([S.max(3)[0], S.max(2)[0]], 2))
    return m.logits(torch.cat(out, 1))


def alternately(jobs, repeats):
    "Median seconds and peak MB of every job, run in turn"
    seconds, peaks = {k: [] for k in jobs}, {k: 0 for k in jobs}
    for _ in range(repeats):
        for k, f in jobs.items():
            with Peak() as p:
                t = time.perf_counter(); f(); t = time.perf_counter()-t
            seconds[k].append(t); peaks[k] = max(peaks[k], p.mb)
    return {k: median(v) for k, v in seconds.items()}, peaks


def bench(full=True, repeats=3):
    "Rows (job, seconds ours, seconds reference, ratio, peak MB ours, peak MB reference, note)"
    torch.manual_seed(0)
    nq, ng, d, h, w = (64, 256, 128, 24, 8) if full else (8, 32, 128, 12, 4)
    q, g = unit_maps(torch.randn(nq, d, h, w)), unit_maps(torch.randn(ng, d, h, w))
    m = QAConvMatcher(h, w); m(q[:4], g[:4]); m.eval()
    a, b = (x.flatten(2).transpose(1, 2).reshape(-1, d).contiguous() for x in (q, g))
    space = torch.empty(len(a), 16*h*w)
    def bare():
        for j in range(0, len(b), 16*h*w): torch.mm(a, b[j:j+16*h*w].T, out=space[:, :len(b[j:j+16*h*w])])
    sec, mb = alternately({'ours': lambda: score_matrix(m, q, g), 'published': lambda: published_scores(m, q, g), 'bare': bare,
                           'both': lambda: score_matrix(m, q, g, both=True), 'own': lambda: score_matrix(m, g),
                           'top': lambda: score_matrix(m, q, g, top=ng//8)}, repeats)
    pairs = nq*ng
    name = f'QAConv {nq} x {ng} maps of {d}x{h}x{w}'
    rows = [(name, sec['ours'], sec['published'], sec['published']/sec['ours'], mb['ours'], mb['published'],
             f'{pairs/sec["ours"]:,.0f} pairs/s; {sec["bare"]/sec["ours"]:.0%} of the matmul rate ({sec["bare"]:.2f} s)'),
            (name+', both directions', sec['both'], 2*sec['published'], 2*sec['published']/sec['both'], mb['both'], mb['published'], ''),
            (f'QAConv {ng} x {ng}, with itself', sec['own'], sec['published']*ng/nq, sec['published']*ng/nq/sec['own'],
             mb['own'], mb['published'], 'reference scaled from query x gallery'),
            (name+f', top {ng//8}', sec['top'], sec['published'], sec['published']/sec['top'], mb['top'], mb['published'], '')]
    n, c = (8, 64) if full else (4, 16)
    x, memory, y = q[:n].clone().requires_grad_(), g[:c], torch.eye(n, c)
    m.train()
    def step(f):
        def go():
            x.grad = None
            F.binary_cross_entropy_with_logits(f(), y).backward()
        return go
    sec, mb = alternately({'ours': step(lambda: m(x, memory)), 'published': step(lambda: published_logits(m, x, memory))}, repeats)
    rows.append((f'QAConv training step {n} x {c}', sec['ours'], sec['published'], sec['published']/sec['ours'],
                 mb['ours'], mb['published'], 'forward and backward, memory side fixed'))
    return rows


def test_benchmark_agrees_and_runs():
    torch.manual_seed(0)
    q, g = unit_maps(torch.randn(5, 8, 6, 2)), unit_maps(torch.randn(33, 8, 6, 2))
    m = worn(6, 2)
    torch.testing.assert_close(published_scores(m, q, g), score_matrix(m, q, g), atol=1e-6, rtol=0)
    torch.testing.assert_close(published_logits(m, q, g), m(q, g), atol=1e-5, rtol=0)
    assert len(bench(full=False, repeats=1)) == 5
