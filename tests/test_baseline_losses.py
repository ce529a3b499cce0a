"""The losses of the baseline: they fall, resume bit for bit, agree in two processes, and stay out of the model file.

As a script, `test_baseline_losses.py OUT` trains every loss in one of two processes.
"""
import json
import os
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
import safetensors
import safetensors.torch
import torch
import torch.nn.functional as F

from children import STILL, agree, finish, keep_gradient, same, smooth, start_world
from reidnb.training.models import load_model, save_model
from reidnb.data.toys import toy_crops
from reidnb.methods.baseline import Baseline, BaselineSettings
from reidnb.core.checkpoints import load_checkpoint, seed_everything
from reidnb.training.loop import fit, read_log

LOSSES = get_args(BaselineSettings.__dataclass_fields__['loss'].type)
STATEFUL = {'center': 'centres.centres', 'class_memory': 'memory.memory.maps'}
TOY = toy_crops(n_ids=8, n_cams=2, n_each=2)
torch.set_num_threads(1)


def settings(loss, **k):
    base = dict(backbone='small', weights='none', height=32, width=16, p=4, k=2, pad=2, erase=.3, epochs=4, warmup=1,
                steps=(), lr=1e-3, center_weight=.05)
    return BaselineSettings(loss=loss, **{**base, **k})


def build(loss, cls=Baseline, **k):
    seed_everything(0)
    return cls(settings(loss, **k), TOY)


def first(m): return next(iter(m.epoch(0)))
def steps(log): return [r for r in log if 'loss' in r]
def plain(log): return [{k: v for k, v in r.items() if k != 'seconds'} for r in log]


def train_all(out):
    "Every loss, in one process or as one of two; what each process holds is saved"
    rank = int(os.environ.get('RANK', 0))
    for loss, neck in [*((k, 'bn') for k in LOSSES), *((k, 'none') for k in STATEFUL)]:
        m, run = smooth(build(loss, neck=neck, epochs=1, **STILL)), Path(out) / f'{loss}-{neck}'
        keep_gradient(run)
        fit(m, run, progress=False)
        torch.save(m.state_dict(), run / f'state{rank}.pt')


if __name__ == '__main__':
    train_all(sys.argv[1])
    torch.distributed.destroy_process_group()
    sys.exit()


# What each loss is

@pytest.mark.parametrize('neck', ['bn', 'none'])
def test_terms_are_their_equations(neck):
    "Loops over the images of a batch, straight from the equations"
    m = {k: build(k, neck=neck, arc_margin=.3, arc_scale=20., smoothing=0.) for k in LOSSES}
    batch = first(m['softmax'])
    for k, x in m.items(): assert x(batch).keys() == dict(
        softmax={'identity'}, arc={'arc'}, center={'identity', 'center'}, triplet={'triplet'},
        class_memory={'class_memory'}).get(k, {'identity', 'triplet'}), k
    y = m['softmax'].labels[batch.index].tolist()
    f, g = (x.detach() for x in build('softmax', neck=neck).encoder(batch.images))
    assert (neck == 'none') == torch.equal(f, g)
    def close(loss, term, want): assert build_value(loss, term) == pytest.approx(float(want), rel=1e-4), (loss, term)
    def build_value(loss, term):
        return build(loss, neck=neck, arc_margin=.3, arc_scale=20., smoothing=0.)(batch)[term].item()
    z = m['softmax'].classifier(g).detach()
    close('softmax', 'identity', -np.mean([float(r.log_softmax(0)[c]) for r, c in zip(z, y)]))
    angle = (F.normalize(g, dim=1) @ F.normalize(m['arc'].classifier.weight, dim=1).T).clamp(-1, 1).acos()
    arc = []
    for t, c in zip(angle.detach(), y):
        moved = 20 * torch.stack([torch.cos(t[j] + .3 * (j == c)) for j in range(8)])
        arc.append(float(torch.logsumexp(moved, 0) - moved[c]))
    close('arc', 'arc', np.mean(arc))
    close('center', 'center', .05 / 2 * f.square().sum(1).mean())   # centres begin at 0
    close('center', 'identity', build_value('softmax', 'identity'))
    d = torch.cdist(f, f)
    same = torch.tensor(y)[:, None] == torch.tensor(y)
    hard = [F.relu(d[i][same[i]].max() - d[i][~same[i]].min() + .3) for i in range(len(y))]
    close('triplet', 'triplet', torch.stack(hard).mean())


def test_class_memory_meets_the_step_before():
    "The first batch costs 0; the next one meets the rows that `after_batch` wrote, and no unseen person"
    m = build('class_memory', neck='none').train()
    one, two = list(m.epoch(0))[:2]
    assert m(one)['class_memory'].item() == 0 and not m.memory.memory.seen.any()
    m.after_batch(one)
    f, y = one.kept['newest'], one.kept['labels']
    assert sorted(set(y.tolist())) == m.memory.memory.seen.nonzero()[:, 0].tolist()
    for c in set(y.tolist()): assert torch.equal(m.memory.memory.maps[c], f[y == c][-1])
    got = m(two)['class_memory'].item()
    g, t = two.kept['newest'], two.kept['labels']
    seen = m.memory.memory.seen.nonzero()[:, 0]
    c = F.normalize(g, dim=1) @ F.normalize(m.memory.memory.maps[seen], dim=1).T
    z, want = (c - c.mean()) / (c.var(unbiased=False) + 1e-5).sqrt(), 0.
    for i in range(len(t)):
        for j, s in enumerate(seen):
            p = torch.sigmoid(z[i, j]) if s == t[i] else 1 - torch.sigmoid(z[i, j])
            want -= float((1 - p)**2 * torch.log(p)) / len(t)
    assert got == pytest.approx(want, rel=1e-3)


def test_center_rate_and_unit():
    m = build('center', center_rate=0.)
    m(first(m))
    assert not m.centres.centres.any()
    m = build('center', center_unit=True, center_weight=2., center_rate=1.)
    assert m(first(m))['center'].item() == pytest.approx(1, rel=1e-5)   # unit features, centres at 0
    assert m.centres.centres.norm(dim=1).max() <= 1
    kept = m.centres.centres.clone()
    m.eval()(first(m))
    assert torch.equal(kept, m.centres.centres)


def test_sampler_classifier_and_neck_of_each_loss():
    for loss in LOSSES:
        y = (m := build(loss)).labels[first(m).index]
        assert (set(torch.unique(y, return_counts=True)[1].tolist()) == {2}) == ('triplet' in loss), loss
        neck = [p.requires_grad for p in m.encoder.neck.parameters()]
        assert any(neck) == (loss != 'triplet')
        assert not list(build(loss, neck='none').encoder.neck.parameters())
    assert build('softmax').classifier.bias is None and build('softmax', neck='none').classifier.bias is not None
    plain_feature = build('softmax', neck='none').eval()
    images = first(plain_feature).images
    want = F.normalize(plain_feature.encoder.backbone(images).mean((2, 3)), dim=1)
    assert torch.allclose(plain_feature.embed(images), want, atol=1e-6)


@pytest.mark.parametrize('loss, new', [('softmax', 1), ('center', 2), ('class_memory', 2), ('triplet', 0)])
def test_new_layers_have_their_rate(loss, new):
    "Every parameter in one group, and only those of the backbone at the plain rate; `new`: tensors that are not its"
    m = build(loss, backbone_lr=.1, neck='bn' if loss == 'softmax' else 'none')
    groups = m.optimizer().param_groups
    plain, other = (([*groups[0]['params']], [*groups[1]['params']]) if len(groups) == 2 else (groups[0]['params'], []))
    if other: assert (groups[0]['lr_scale'], groups[1]['lr_scale']) == (.1, 1) and groups[1]['weight_decay'] == groups[0]['weight_decay']
    assert [id(p) for p in plain] == [id(p) for p in m.encoder.backbone.parameters()]
    assert len(other) == new + (loss == 'softmax')   # and the scale of the neck
    wanted = {id(p) for p in m.parameters() if p.requires_grad}
    assert {id(p) for p in plain + other} == wanted
    assert len(build(loss).optimizer().param_groups) == 1


def test_wrong_settings_are_named():
    with pytest.raises(ValueError, match="'arcface'.*class_memory"): build('arcface')
    with pytest.raises(ValueError, match='nothing to learn'): build('triplet', triplet=0.)
    with pytest.raises(ValueError, match='neck'): build('arc', neck='layer')
    with pytest.raises(ValueError, match='margin'): m = build('arc', arc_margin=2.); m(first(m))


# Runs

@pytest.mark.parametrize('loss', LOSSES)
def test_loss_falls(loss, tmp_path):
    "From its worst epoch: the class memory begins empty, where its loss is 0"
    m = build(loss, neck='none', epochs=10, p=4, k=4, smoothing=0., erase=0., lr=2e-3)
    log = steps(fit(m, tmp_path, progress=False))
    epoch = [np.mean([r['loss'] for r in log if r['epoch'] == n]) for n in range(10)]
    assert epoch[-1] < .8 * max(epoch), epoch


class Stopped(Baseline):
    "Raises in the middle of an epoch"
    left = 10**9
    def after_batch(self, batch):
        super().after_batch(batch)
        self.left -= 1
        if not self.left: raise KeyboardInterrupt


@pytest.mark.parametrize('loss', ['arc', *STATEFUL])
def test_stopped_and_resumed_equals_never_stopped(loss, tmp_path):
    whole = build(loss)
    fit(whole, tmp_path / 'whole', progress=False)
    cut = build(loss, Stopped)
    cut.left = len(steps(read_log(tmp_path / 'whole'))) // 2 + 1
    with pytest.raises(KeyboardInterrupt): fit(cut, tmp_path / 'cut', progress=False)
    at = load_checkpoint(tmp_path / 'cut' / 'checkpoint.pt')
    assert 0 < at['epoch'] < 4
    if loss in STATEFUL: assert at['method'][STATEFUL[loss]].any()
    fit(build(loss, Stopped), tmp_path / 'cut', progress=False)
    assert plain(read_log(tmp_path / 'whole')) == plain(read_log(tmp_path / 'cut'))
    a, b = (load_checkpoint(tmp_path / d / 'checkpoint.pt') for d in ('whole', 'cut'))
    for k in ('method', 'optimizers', 'rng', 'step'): assert same(a[k], b[k]), k


def test_two_processes_equal_one(tmp_path):
    "Every loss: gradient and values of one process in every step, and the same centres and memories in both"
    pair = start_world(__file__, tmp_path / 'two')
    train_all(tmp_path / 'one')
    finish(pair)
    runs = sorted(p.name for p in (tmp_path / 'one').iterdir())
    assert len(runs) == len(LOSSES) + len(STATEFUL)
    for name in runs:
        agree(tmp_path / 'one' / name, tmp_path / 'two' / name, 4)
        a, b = (torch.load(tmp_path / 'two' / name / f'state{r}.pt') for r in range(2))
        assert same(a, b), name
        state = torch.load(tmp_path / 'one' / name / 'state0.pt')
        for k in state:
            if k.startswith(('centres', 'memory')): assert torch.allclose(
                state[k].float(), a[k].float(), rtol=1e-4, atol=1e-4), (name, k)


@pytest.mark.parametrize('loss', LOSSES)
def test_bf16_is_finite(loss, tmp_path):
    m = build(loss, precision='bf16', epochs=1)
    assert all(np.isfinite(r['loss']) for r in steps(fit(m, tmp_path, progress=False)))
    assert all(v.isfinite().all() for v in m.state_dict().values())
    for k, v in m.state_dict().items():
        if v.is_floating_point(): assert v.dtype == torch.float32, k


# Settings of before, files

def test_softmax_is_a_triplet_of_weight_0(tmp_path):
    "The old way to ask for softmax alone gives the same run, bit for bit"
    logs = [fit(build(loss, triplet=w, epochs=1), tmp_path / loss, progress=False)
            for loss, w in (('softmax', 1.), ('softmax+triplet', 0.))]
    assert plain(logs[0]) == plain(logs[1])
    assert BaselineSettings().loss == 'softmax+triplet' and BaselineSettings().neck == 'bn'


@pytest.mark.parametrize('loss', LOSSES)
def test_model_file_is_for_use(loss, tmp_path):
    "No classifier, centres or memory in the file; the checkpoint has them; the features are the method's"
    m = build(loss, neck='none' if loss == 'class_memory' else 'bn')
    m.train()(batch := first(m))
    m.after_batch(batch)
    m.eval()
    path = save_model(m, tmp_path / 'm.safetensors')
    keys = safetensors.torch.load_file(path).keys()
    assert keys and all(k.startswith('encoder.') for k in keys)
    assert {k.split('.')[0] for k in m.state_dict()} - {'encoder'} == (
        {'centres', 'classifier'} if loss == 'center' else {'memory'} if loss == 'class_memory' else
        set() if loss == 'triplet' else {'classifier'})
    again = load_model(path)
    assert again.settings == m.settings and torch.equal(again.embed(batch.images), m.embed(batch.images))


def test_old_model_files_load(tmp_path):
    "Files whose settings know no `loss`, and which hold their classifier"
    assert load_model('small').settings.loss == 'softmax+triplet'
    m = build('softmax+triplet', neck='bn').eval()
    path = save_model(m, tmp_path / 'new.safetensors')
    with safetensors.safe_open(path, 'pt') as f: meta = f.metadata()
    new = {'neck', 'loss', 'arc_margin', 'arc_scale', 'center_weight', 'center_rate', 'center_unit', 'focal_gamma', 'backbone_lr'}
    meta['settings'] = json.dumps({k: v for k, v in asdict(m.settings).items() if k not in new})
    safetensors.torch.save_file({k: v.contiguous() for k, v in m.state_dict().items()}, tmp_path / 'old.safetensors', meta)
    old = load_model(tmp_path / 'old.safetensors')
    assert replace(old.settings, center_weight=.05) == m.settings
    images = first(build('softmax')).images
    assert torch.equal(old.embed(images), m.embed(images))
