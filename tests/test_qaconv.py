"QAConv as a method: its loss against slow transcriptions, its memory, killed runs, two processes, and search."
import os
import signal
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
import torch.nn.functional as F

from children import STILL, agree, finish, keep_gradient, plain, same, smooth, start, start_world
from reidnb.core.precision import safe_bf16
from reidnb.data.crops import ReIDData
from reidnb.data.toys import toy_crops
from reidnb.data.transforms import test_transform as plain_pixels
from reidnb.networks.extraction import extract
from reidnb.ranking.matching import best_matches, global_feature
from reidnb.methods.qaconv import (
    combine_all, contributions, explore_matches, LOSSES, MapEncoder, MatchView, QAConv,
    QAConvSettings)
from reidnb.core.distributed import global_batch_norm, rank_size
from reidnb.practice.gallery import Gallery
from reidnb.core.checkpoints import load_checkpoint
from reidnb.core.checkpoints import seed_everything
from reidnb.training.loop import fit
from reidnb.training.method import Batch
from reidnb.training.models import load_model, save_model
from reidnb.training.scoring import score

torch.set_num_threads(1)
SMALL = dict(backbone='small', weights='none', height=64, width=32, cut_at='layer2', dim=16, batch_size=8, k=2,
             epochs=3, lr=.02, steps=(2,), occlusion='re')


def settings(**changes): return QAConvSettings(**{**SMALL, **changes})


def toy(): return toy_crops(n_ids=8, n_cams=2, n_each=2)


def method(**changes):
    seed_everything(0)
    return QAConv(settings(**changes), toy())


def first_batches(m, n=1): return [b for b, _ in zip(m.epoch(0), range(n))]


# ------------------------------------------------------------------------------------------ runs in processes

class Killed(QAConv):
    "Dies by signal 9 in the middle of an epoch; draws from the global generator as dropout would"
    kill_at = 0

    def loss(self, batch):
        return {k: v * (1 + .1 * torch.rand(())) for k, v in super().loss(batch).items()}

    def after_batch(self, batch):
        super().after_batch(batch)
        self.done = getattr(self, 'done', 0) + 1
        if self.done == self.kill_at: os.kill(os.getpid(), signal.SIGKILL)


def child(out, loss, kill_at=0):
    cls = Killed if loss == 'focal' else QAConv
    s = settings(loss=loss, global_weight=.1, margin=1., **({} if loss == 'focal' else STILL))
    seed_everything(s.seed)
    m = cls(s, toy())
    if loss != 'focal': keep_gradient(out), smooth(m)
    if kill_at: m.kill_at = int(kill_at)
    fit(m, Path(out), progress=False)
    if loss != 'focal': torch.save(batch_gradient(), Path(out) / f'gradient{rank_size()[0]}.pt')
    if torch.distributed.is_initialized(): torch.distributed.destroy_process_group()


def batch_gradient():
    "Gradient of the in-batch loss by the maps of this process, and by the matcher's weights, averaged as training does"
    (rank, world), m, (x,) = rank_size(), method(loss='triplet', margin=1.), maps(8, shape=(16, 8, 4))
    if world > 1: global_batch_norm(m)
    part = slice(rank * 8 // world, (rank + 1) * 8 // world)
    x = x[part].clone().requires_grad_()
    try: loss = m.train().against_batch(x, (torch.arange(8) // 2)[part])
    except ValueError as e:
        assert world > 1 and 'one process only' in str(e)
        return None
    loss.backward()
    w = m.matcher.fc.weight.grad
    if world > 1: torch.distributed.all_reduce(w)
    return loss.item(), x.grad / world, w / world


def test_killed_and_resumed_equals_never_stopped(tmp_path):
    "Memory, matcher, momentum and random state all come back"
    whole, cut = tmp_path / 'whole', tmp_path / 'cut'
    runs = start(__file__, whole, 'focal'), start(__file__, cut, 'focal', 7)
    finish(runs[0])
    finish(runs[1], -signal.SIGKILL)
    before = load_checkpoint(cut / 'checkpoint.pt')
    assert before['epoch'] == 1 and before['method']['memory.seen'].any()
    finish(start(__file__, cut, 'focal'))
    assert plain(cut) == plain(whole)
    a, b = (load_checkpoint(d / 'checkpoint.pt') for d in (whole, cut))
    for key in ('optimizers', 'method', 'rng', 'epoch', 'step'): assert same(a[key], b[key]), key
    a, b = (safetensors.torch.load_file(d / 'model.safetensors') for d in (whole, cut))
    assert same(a, b)


@pytest.mark.parametrize('loss', ['bce', 'bce+triplet'])
def test_two_processes_equal_one(tmp_path, loss):
    "The memory is gathered, batch norms see all pairs, in-batch pairs cross processes"
    one, two = tmp_path / 'one', tmp_path / 'two'
    runs = [start(__file__, one, loss), *start_world(__file__, two, loss)]
    finish(runs)
    agree(one, two, 9)
    (l, g, w), *parts = [torch.load(d / f'gradient{r}.pt') for d, r in ((one, 0), (two, 0), (two, 1))]
    assert all(abs(p[0] - l) < 1e-5 and torch.allclose(p[2], w, atol=1e-5) for p in parts)
    assert torch.allclose(torch.cat([p[1] for p in parts]), g, atol=1e-5), 'the gradient that crosses processes'
    a, b = (load_checkpoint(d / 'checkpoint.pt')['method'] for d in (one, two))
    assert torch.equal(a['memory.seen'], b['memory.seen'])
    assert (a['memory.maps'] * b['memory.maps']).sum(1).min() > .9999          # cosines of unit locations
    for k in ('matcher.bn1.running_mean', 'matcher.bn1.running_var', 'matcher.bn2.running_var'):
        assert torch.allclose(a[k], b[k], rtol=1e-3, atol=1e-4), (k, a[k], b[k])


# ------------------------------------------------------------------------------------------ matching

def maps(*n, shape=(5, 4, 3), seed=0):
    g = torch.Generator().manual_seed(seed)
    return [F.normalize(torch.randn(k, *shape, generator=g), dim=1) for k in n]


def test_identical_maps_match_everywhere():
    x, = maps(3)
    v = best_matches(x, x)
    assert torch.allclose(v[range(3), range(3)], torch.ones(3, 24), atol=1e-6)


def test_permuted_gallery_places_permute_b_and_keep_a():
    q, g = maps(2, 3)
    order = torch.randperm(12, generator=torch.Generator().manual_seed(1))
    v, w = best_matches(q, g), best_matches(q, g.flatten(2)[..., order].view_as(g))
    assert torch.allclose(v[..., :12][..., order], w[..., :12], atol=1e-6)
    assert torch.allclose(v[..., 12:], w[..., 12:], atol=1e-6)


@pytest.mark.parametrize('kernel_size', [1, 3])
def test_in_chunks_equals_at_once(kernel_size):
    m = method(kernel_size=kernel_size, dim=5)
    q, g = (x.requires_grad_() for x in maps(4, 9, shape=(5, 8, 4)))
    out = []
    for budget in (1, 2**28):
        m.matcher.budget = budget
        z = m.matcher(q, g)
        out.append((z, *torch.autograd.grad(z.sin().sum(), (q, g))))
    for a, b in zip(*out): assert torch.allclose(a, b, atol=1e-5)


def test_shared_weights_are_symmetric_and_separate_ones_are_not():
    f, = maps(6, shape=(16, 8, 4))
    d = {s: method(shared=s).eval().distance(f.flatten(1), f.flatten(1).clone()) for s in (True, False)}
    assert torch.allclose(d[True], d[True].T, atol=1e-6)
    assert (d[False] - d[False].T).abs().max() > 1e-3


def test_distance_is_that_of_the_written_out_score():
    m = method().eval()
    q, g = maps(3, 4, shape=(16, 8, 4))
    want = torch.stack([torch.stack([m.matcher(a[None], b[None])[0, 0] for b in g]) for a in q])
    d = m.distance(q.flatten(1), g.flatten(1))
    assert torch.allclose(d, 1 - torch.sigmoid(want / 10), atol=1e-6) and d.dtype == torch.float32
    own = m.distance(q.flatten(1), x := q.flatten(1))
    assert torch.allclose(m.distance(x, x), own, atol=1e-6)                    # one product for both roles
    half = m.distance(q.flatten(1).half(), g.flatten(1).half())
    assert torch.allclose(half, d, atol=1e-3)


def test_distance_does_not_depend_on_mode_or_batch():
    m = method().train()
    q, g = (x.flatten(1) for x in maps(5, 7, shape=(16, 8, 4)))
    d = m.distance(q, g)
    assert m.matcher.training, 'the mode is put back'
    assert torch.equal(d, m.eval().distance(q, g))
    assert torch.allclose(d, torch.cat([m.distance(x[None], g) for x in q]), atol=1e-6)
    assert torch.allclose(d, torch.cat([m.distance(q, x[None]) for x in g], 1), atol=1e-6)


def test_features_do_not_depend_on_the_batch():
    m, c = method(), toy()
    a, b = (extract(m, c, batch_size=n, dtype=torch.float32) for n in (3, 32))
    assert a.shape == (len(c), 16*8*4) and torch.allclose(a, b, atol=1e-5)
    assert torch.allclose(a.view(-1, 16, 8, 4).norm(dim=1), torch.ones(len(c), 8, 4), atol=1e-5)


def test_global_branch_is_fused():
    m = method(global_weight=.001, global_fusion=.5).eval()
    q, g = maps(3, 4, shape=(16, 8, 4))
    p = 1 - method(global_weight=0.).eval().distance(q.flatten(1), g.flatten(1))
    m.matcher.load_state_dict(method().matcher.state_dict())
    want = 1 - (p + .5 * global_feature(q) @ global_feature(g).T) / 1.5
    assert torch.allclose(m.distance(q.flatten(1), g.flatten(1)), want, atol=1e-6)


@pytest.mark.parametrize('changes', [{}, dict(shared=True), dict(kernel_size=3), dict(global_weight=.1), dict(half='bf16')],
                         ids=lambda c: '-'.join(c) or 'default')
@pytest.mark.parametrize('dtype', [torch.float32, torch.float16])
def test_a_set_with_itself_is_one_product_with_the_same_numbers(changes, dtype, monkeypatch):
    "Re-ranking asks for `distance(x, x)`: pairs are multiplied once for both roles, also where roles matter"
    import reidnb.ranking.matching as matching
    m = method(**changes)
    torch.nn.init.normal_(m.matcher.fc.weight)
    x, = maps(37, shape=m.encoder.shape)
    x, sizes, block = x.flatten(1).to(dtype), [], matching._logit_block
    monkeypatch.setattr(matching, '_logit_block', lambda q, g, *a: (sizes.append(len(q) * len(g)), block(q, g, *a))[1])
    two = m.distance(x, x.clone())
    assert sum(sizes) == 37 * 37
    sizes.clear()
    one = m.distance(x, x)
    assert torch.allclose(one, two, atol=1e-5) and one.shape == (37, 37)
    assert sum(sizes) < .65 * 37 * 37
    assert torch.allclose(one, one.T, atol=1e-5) == bool(changes.get('shared')), 'separate weights have roles'


# ------------------------------------------------------------------------------------------ what a place adds, and looking at it

SWITCHES = [{}, dict(shared=True), dict(shared=True, shared_bias='twice'), dict(kernel_size=3)]


@pytest.mark.parametrize('changes', SWITCHES, ids=lambda c: '-'.join(c) or 'default')
def test_contributions_add_up_to_the_logit(changes):
    m = method(dim=5, **changes).eval()
    torch.nn.init.normal_(m.matcher.fc.weight)
    m.matcher.bn1.running_mean.fill_(.3), m.matcher.bn2.weight.data.fill_(.7)
    q, g = maps(1, 1, shape=m.encoder.shape)
    parts = contributions(q[0], g[0], m.matcher)
    assert parts.shape == (2, *m.encoder.shape[1:]) and len(parts.unique()) > 10
    with torch.no_grad(): z = m.matcher.bn2((parts.sum() + m.matcher.beta)[None])
    assert torch.allclose(z, m.matcher(q, g), atol=1e-4)


def test_contributions_lie_where_the_match_is():
    "One weight of the query side and one of the gallery side: two places, each on its own map"
    m = method(dim=5).eval()
    h, w = m.encoder.shape[1:]
    with torch.no_grad(): m.matcher.fc.weight.zero_()[0, [h * w + 3 * w + 1, 2 * w]] = 1.   # weights are `[b; a]`
    parts = contributions(*(x[0] for x in maps(1, 1, shape=m.encoder.shape)), m.matcher)
    assert parts.nonzero().tolist() == [[0, 3, 1], [1, 2, 0]]


def view(**changes):
    pytest.importorskip('ipywidgets')
    m, c = method().eval(), toy()
    return m, c, explore_matches(m, c[c.cams == 0], c, threshold=-1., **changes)


def test_the_controls_change_the_picture():
    m, c, v = view(lines=4)
    seen = {v.picture.value}
    def now(): seen.add(v.picture.value); return len(seen)
    v.controls['lines'].value = 1
    assert now() == 2
    v.controls['query_row'].value = 3
    assert now() == 3
    v.controls['place'].value = 5
    assert now() == 4
    assert v.text.value.split(', ')[-1] == f'{2 * m.encoder.shape[1] * m.encoder.shape[2]} matches'
    v.controls['threshold'].value = 1.
    assert now() == 5 and v.text.value.endswith(', 0 matches')
    for k, x in dict(lines=4, query_row=0, place=1, threshold=-1.).items(): v.controls[k].value = x
    assert now() == 5, 'the first picture again'


def test_the_ranked_list_leaves_out_the_own_camera():
    m, c, v = view()
    q = c[c.cams == 0]
    hidden = {j for j in range(len(c)) if c.pids[j] == q.pids[0] and c.cams[j] == 0}
    shown, last = [], len(c) - len(hidden)
    for place in range(1, len(c) + 1):
        v.controls['place'].value = place
        shown.append(v.text.value.split(':')[0])
    assert shown[last:] == shown[last - 1:last] * len(hidden), 'beyond the list: its last'
    assert set(shown) == {c.file_name(j) for j in range(len(c)) if j not in hidden} and len(set(shown)) == last
    f = [extract(m, x, height=64, width=32) for x in (q[[0]], c)]
    d = m.distance(*f)[0]
    d[sorted(hidden)] = 9.
    assert shown[:last] == [c.file_name(int(j)) for j in d.argsort(stable=True)[:last]]


@pytest.mark.parametrize('pid,say', [(0, 'a false alarm or a stranger'), (-2, 'not known who'), (99, 'another person')])
def test_the_view_says_who_it_shows(pid, say):
    pytest.importorskip('ipywidgets')
    m, c = method().eval(), toy()
    v = explore_matches(m, c[c.cams == 0], c.replace(pids=np.full(len(c), pid)))
    assert f', {say}, ' in v.text.value


def test_a_view_is_a_picture_unless_someone_looks(monkeypatch):
    for name in ('JPY_SESSION_NAME', 'VSCODE_PID'): monkeypatch.delenv(name, raising=False)
    _, _, v = view()
    assert isinstance(v, MatchView)
    still = v._repr_mimebundle_()
    assert set(still) == {'text/plain', 'image/jpeg'} and sum(map(len, still.values())) < 40_000
    monkeypatch.setenv('JPY_SESSION_NAME', 'chapter.ipynb')
    live = v._repr_mimebundle_()
    assert set(live) == set(still) | {'application/vnd.jupyter.widget-view+json'}
    assert len(str(live['application/vnd.jupyter.widget-view+json'])) < 200


def test_without_widgets_the_way_out_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, 'ipywidgets', None)
    with pytest.raises(ImportError, match='pip install ipywidgets'): explore_matches(method(), toy(), toy())


# ------------------------------------------------------------------------------------------ loss and memory

def test_first_batch_has_no_pair_and_every_weight_a_gradient():
    m = method()
    batch, = first_batches(m)
    loss = m(batch)['focal']
    assert loss.item() == 0
    loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in m.parameters())


def test_second_batch_counts_seen_classes_only():
    "The loss written out pair by pair, with the batch norms of training"
    m = method()
    one, two = first_batches(m, 2)
    m(one), m.after_batch(one)
    seen = sorted(set(m.labels[one.index].tolist()))
    assert m.memory.seen.nonzero()[:, 0].tolist() == seen and m.facts == {'classes_seen': len(seen)}
    twin = method()
    twin.load_state_dict(m.state_dict())
    got = m(two)['focal']
    x, y = twin.encoder(two.images), twin.labels[two.index]
    v = torch.stack([torch.stack([torch.cat([(a.flatten(1).T @ b.flatten(1)).amax(0), (a.flatten(1).T @ b.flatten(1)).amax(1)])
                                  for b in twin.memory.maps[seen]]) for a in x])
    u = (v - v.mean()) / (v.var(unbiased=False) + 1e-5).sqrt()
    z = u @ twin.matcher.fc.weight[0] + twin.matcher.fc.bias
    z = (z - z.mean()) / (z.var(unbiased=False) + 1e-5).sqrt()
    want = 0.
    for i in range(len(y)):
        for n, j in enumerate(seen):
            p = torch.sigmoid(z[i, n])
            p = p if y[i] == j else 1 - p
            want = want - (1 - p) ** 2 * p.log() / len(y)
    assert abs(got.item() - want.item()) < 1e-4


@pytest.mark.parametrize('loss', ['focal', 'bce', 'softmax'])
def test_masked_classes_in_the_statistics(loss):
    "`all`: every class is matched, also on the first batch, and the loss is that of the columns seen"
    a, b = (method(loss=loss, masked_statistics=k) for k in ('seen', 'all'))
    one, two = first_batches(a, 2)
    assert sum(a(one).values()).item() == sum(b(one).values()).item() == 0
    assert a.matcher.bn1.num_batches_tracked == 0 and b.matcher.bn1.num_batches_tracked == 1
    for m in (a, b): m.after_batch(one)
    cols, y = b.memory.seen.nonzero()[:, 0].tolist(), b.labels[two.index].tolist()
    assert 0 < len(cols) < len(b.memory.seen)
    twin = method(loss=loss, masked_statistics='all')
    twin.load_state_dict(b.state_dict())
    z = twin.matcher(twin.encoder(two.images), twin.memory.maps)[:, cols]
    if loss == 'softmax': want = -sum(z[i].log_softmax(0)[cols.index(c)] for i, c in enumerate(y) if c in cols) / len(y)
    else:
        p = torch.sigmoid(torch.stack([z[:, n] * torch.tensor([1. if c == j else -1. for c in y]) for n, j in enumerate(cols)], 1))
        want = -((1 - p) ** (2 if loss == 'focal' else 0) * p.log()).sum() / len(y)
    got, other = sum(b(two).values()), sum(a(two).values())
    assert abs(got.item() - want.item()) < 1e-4 < abs(got.item() - other.item())
    for k in ('bn1', 'bn2'): assert torch.allclose(getattr(b.matcher, k).running_mean, getattr(twin.matcher, k).running_mean, atol=1e-6)


def test_masked_statistics_change_nothing_once_every_class_is_seen():
    x, loss = maps(8, shape=(16, 8, 4))[0], {}
    for k in ('seen', 'all'):
        m = method(masked_statistics=k)
        m.memory.update(x, torch.arange(8))
        loss[k] = m.against_memory(x.flip(1), torch.arange(8)).item()
    assert loss['seen'] == loss['all'] > 0


def test_a_shared_constant_added_twice():
    "The layer on each half, as release 2.1 adds them: same training, every logit of a test shifted by one constant"
    a, b = (method(shared=True, shared_bias=k) for k in ('once', 'twice'))
    batches = first_batches(a, 2)
    losses = [[(m(x)['focal'].item(), m.after_batch(x))[0] for x in batches] for m in (a, b)]
    assert np.allclose(*losses, atol=1e-5) and losses[0][1] > 0
    b.load_state_dict(a.state_dict())
    (x,), a, b = maps(5, shape=a.encoder.shape), a.eval().matcher, b.eval().matcher
    v = b.bn1(best_matches(x, x).view(25, 1, -1)).view(25, 2, -1)
    z = b.bn2(b.fc(v[:, 0]) + b.fc(v[:, 1])).view(5, 5)
    assert torch.allclose(b(x, x), z, atol=1e-5)
    apart = a.fc.bias * a.bn2.weight / (a.bn2.running_var + a.bn2.eps).sqrt()
    assert abs(apart) > .01 and torch.allclose(b(x, x) - a(x, x), apart.expand(5, 5), atol=1e-4)


def test_gamma_zero_is_binary_cross_entropy():
    def loss(**k):
        m = method(**k)
        one, two = first_batches(m, 2)
        m(one), m.after_batch(one)
        return m, two, sum(m(two).values()).item()
    (m, two, a), (_, _, b) = loss(focus=0.), loss(loss='bce')
    assert a == b
    cols = m.memory.seen.nonzero()[:, 0]
    z = m.matcher(m.encoder(two.images), m.memory.maps[cols])
    hit = (m.labels[two.index][:, None] == cols).float()
    assert abs(a - F.binary_cross_entropy_with_logits(z, hit, reduction='sum').item() / len(two)) < 1e-4


def test_a_memory_row_is_the_map_of_the_step_without_gradient():
    m = method()
    for batch in first_batches(m, 2):
        y, keep = m.labels[batch.index], m.memory.maps.clone()
        sum(m(batch).values()).backward()
        maps_then = batch.kept['maps']
        assert torch.equal(m.memory.maps, keep), 'written only after the step'
        m.after_batch(batch)
    last = {int(c): i for i, c in enumerate(y)}
    for c, i in last.items(): assert torch.equal(m.memory.maps[c], maps_then[i])
    assert not m.memory.maps.requires_grad and not maps_then.requires_grad
    rest = [c for c in range(8) if c not in last]
    assert torch.equal(m.memory.maps[rest], keep[rest])


def test_averaged_memory_and_unmasked_classes():
    m = method(keep=.75, mask_unseen=False)
    one, two = first_batches(m, 2)
    assert m(one)['focal'].item() > 0, 'maps of zeros count as negatives'
    m.after_batch(one)
    was = m.memory.maps.clone()
    m(two)
    y, f = two.kept['labels'], two.kept['maps']
    m.after_batch(two)
    again = [int(c) for c in y if was[int(c)].abs().sum() and (y == c).sum() == 1]
    for c in again: assert torch.allclose(m.memory.maps[c], .75*was[c] + .25*f[y == c][0], atol=1e-6)


def test_softmax_over_the_memory():
    m = method(loss='softmax')
    one, two = first_batches(m, 2)
    m(one), m.after_batch(one)
    got = m(two)['softmax'].item()
    cols = m.memory.seen.nonzero()[:, 0].tolist()
    z, y = m.matcher(m.encoder(two.images), m.memory.maps[cols]), m.labels[two.index].tolist()
    want = -sum(z[i].log_softmax(0)[cols.index(c)].item() for i, c in enumerate(y) if c in cols) / len(y)
    assert abs(got - want) < 1e-4


def test_triplet_in_the_batch_leaves_an_image_and_itself_out():
    m = method(loss='triplet', margin=1.)
    assert not hasattr(m, 'memory')
    batch, = first_batches(m)
    y = m.labels[batch.index]
    assert torch.unique(y, return_counts=True)[1].tolist() == [2]*4
    got = m(batch)['triplet'].item()
    x, n = m.encoder(batch.images).detach(), len(y)
    v = best_matches(x, x)
    other = ~torch.eye(n, dtype=torch.bool)
    z = torch.zeros(n, n).masked_scatter(other, m.matcher.logits(v[other]))
    want = [max(0., 1. - (min(z[i, j] for j in range(n) if j != i and y[j] == y[i]) -
                          max(z[i, j] for j in range(n) if y[j] != y[i])).item()) for i in range(n)]
    assert abs(got - sum(want) / n) < 1e-4


@pytest.mark.parametrize('loss', LOSSES)
@pytest.mark.parametrize('precision', ['no', 'bf16'])
def test_every_loss_trains_in_both_precisions(loss, precision):
    m = method(loss=loss, global_weight=.01, half='bf16' if precision == 'bf16' else 'no')
    opt = m.optimizer()
    for batch in first_batches(m, 2):
        opt.zero_grad()
        with torch.autocast('cpu', torch.bfloat16, enabled=precision == 'bf16'), safe_bf16(): terms = m(batch)
        assert set(terms) == {*loss.split('+'), 'global'} and all(t.isfinite() and t.dtype == torch.float32 for t in terms.values())
        sum(terms.values()).backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in m.parameters())
        opt.step(), m.after_batch(batch)
    assert loss == 'triplet' or m.memory.maps.dtype == torch.float32


def test_bf16_run_is_finite(tmp_path):
    m = method(precision='bf16', epochs=1)
    rows = [r for r in fit(m, tmp_path, progress=False) if 'loss' in r]
    assert rows and all(np.isfinite(r['loss']) for r in rows)
    assert all(p.isfinite().all() for p in m.state_dict().values() if p.is_floating_point())


# ------------------------------------------------------------------------------------------ settings, files, search

def test_defaults_are_those_of_the_table():
    s = QAConvSettings()
    want = dict(height=384, width=128, cut_at='layer3', neck='3x3+bn', dim=128, kernel_size=1, shared=False, shared_bias='once', masked_statistics='seen', loss='focal', focus=2.,
                keep=0., mask_unseen=True, occlusion='ro', batch_size=32, optimizer='sgd', lr=.01, backbone_lr=.1,
                weight_decay=5e-4, epochs=60, steps=(40,), gamma=.1, decay='steps', warmup=0, precision='no', clip=0., normalise=False)
    assert {k: getattr(s, k) for k in want} == want
    assert MapEncoder(s).shape == (128, 24, 8)


def test_two_rates():
    m = method(lr=.01, backbone_lr=.1, global_weight=.1)
    body, new = m.optimizer().param_groups
    assert (body['lr_scale'], new['lr_scale']) == (.1, 1.) and body['nesterov'] and body['momentum'] == .9
    ids = [id(p) for g in (body, new) for p in g['params']]
    assert len(set(ids)) == len(ids) == len(list(m.parameters()))
    assert {id(p) for p in m.encoder.backbone.parameters()} == {id(p) for p in body['params']}


@pytest.mark.parametrize('cut,stride,size', [('layer2', 2, (8, 4)), ('layer3', 2, (4, 2)), ('layer3', 1, (8, 4)), ('layer4', 1, (4, 2)),
                                             ('layer4', 2, (2, 1))])
def test_size_of_the_map(cut, stride, size):
    e = MapEncoder(settings(cut_at=cut, last_stride=stride)).eval()
    assert e.shape == (16, *size) and e(torch.zeros(1, 3, 64, 32)).shape[1:] == (16, *size)
    with pytest.raises(ValueError, match='give maps'): e(torch.zeros(1, 3, 128, 64))


@pytest.mark.parametrize('normalise', [False, True])
def test_pixels_are_normalised_in_one_place(normalise):
    "Loader and `extract` give what the backbone reads: normalised crops, or the published network's pixels in [0,1]"
    m, crops = method(normalise=normalise, occlusion='none'), toy()
    read, seen, given = plain_pixels(64, 32, **({} if normalise else dict(mean=None))), [], []
    m.encoder.backbone.register_forward_pre_hook(lambda net, a: seen.append(a[0]))
    m.encoder.register_forward_pre_hook(lambda net, a: given.append(a[0]))
    batch, = first_batches(m)
    m(batch), m.extract(crops)
    assert all(a is b for a, b in zip(seen, given))   # nothing stands between
    want = torch.stack([read(crops.image(i)) for i in batch.index.tolist()])
    assert torch.allclose(given[0].mean((2, 3)), want.mean((2, 3)), atol=1e-4)     # a flip may be among them
    assert torch.allclose(given[1], torch.stack([read(crops.image(i)) for i in range(len(crops))]), atol=1e-5)
    assert (given[1].min() < 0) == normalise
    assert not any('pixels' in k for k in m.state_dict())


def test_the_model_file_holds_no_memory(tmp_path):
    m = method(global_weight=.1)
    for batch in first_batches(m, 2): m(batch), m.after_batch(batch)
    m.eval()
    names = safetensors.torch.load_file(save_model(m, tmp_path / 'm.safetensors')).keys()
    assert not any(k.startswith(('memory', 'classifier')) for k in names) and any(k.startswith('matcher') for k in names)
    again, c = load_model(tmp_path / 'm.safetensors'), toy()
    f = extract(m, c, height=64, width=32)
    assert torch.equal(extract(again, c, height=64, width=32), f) and torch.equal(again.distance(f, f), m.distance(f, f))


def test_search_and_score(tmp_path):
    m, c = method(), toy()
    fit(m, tmp_path, progress=False)
    g = Gallery.build(m, c)
    hits = g.search(c[:3], k=4)
    d = m.distance(f := extract(m, c, height=64, width=32), f)
    assert hits.rows.tolist() == d[:3].sort(dim=1, stable=True)[1][:, :4].tolist()
    data = ReIDData(query=c[c.cams == 0], gallery=c[c.cams == 1])
    assert abs(score(m, data, batch_size=3).mAP - score(m, data, batch_size=64).mAP) < 1e-6


@pytest.mark.parametrize('change,say', [(dict(loss='arc'), 'one of'), (dict(batch_size=1), 'at least 2'), (dict(neck='fc'), 'neck'),
                                        (dict(loss='triplet', k=1), 'a triplet needs'), (dict(half='int8'), 'half'), (dict(last_stride=3), 'one of 1, 2'),
                                        (dict(optimizer='lamb'), 'lamb'), (dict(occlusion='fog'), 'fog'), (dict(masked_statistics='none'), "'seen', 'all'"), (dict(shared_bias='twice'), 'where shared=True'),
                                        (dict(backbone='tiny'), 'tiny')])
def test_settings_that_cannot_work_say_so(change, say):
    with pytest.raises(ValueError, match=say): method(**change).optimizer()


def test_too_few_people_and_unlabelled_crops():
    c = toy()
    with pytest.raises(ValueError, match='at least 2'): QAConv(settings(), c[c.pids == 1])
    mixed = c.replace(pids=np.where(c.pids > 4, -2, c.pids))
    m = QAConv(settings(batch_size=4), mixed)
    assert all((m.labels[b.index] >= 0).all() for b in m.epoch(0)) and len(m.memory.seen) == 4


def test_combine_all_keeps_people_apart():
    c = toy()
    data = ReIDData(c[c.pids <= 4], c[(c.pids > 4) & (c.cams == 0)].replace(pids=c.pids[(c.pids > 4) & (c.cams == 0)] - 4),
                    c[(c.pids > 4) & (c.cams == 1)].replace(pids=c.pids[(c.pids > 4) & (c.cams == 1)] - 4), name='toy')
    joined = combine_all(data)
    assert len(joined.train) == len(c) and joined.train.n_ids == 8 and joined.query is joined.gallery is None
    assert 'never test' in joined.notes[-1]
    clear = ReIDData(c[c.pids <= 4], c[(c.pids > 4) & (c.cams == 0)], c[(c.pids > 4) & (c.cams == 1)])
    assert sorted(set(combine_all(clear).train.pids)) == list(range(1, 9))


def test_an_epoch_is_the_same_twice():
    m = method()
    a, b = ([x.index.tolist() for x in m.epoch(1)] for _ in range(2))
    assert a == b and a != [x.index.tolist() for x in m.epoch(0)]
    assert isinstance(next(iter(m.epoch(0))), Batch) and replace(m.settings, seed=1) != m.settings


if __name__ == '__main__': child(*sys.argv[1:])
