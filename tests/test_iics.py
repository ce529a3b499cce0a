"IICS from the shell on folders without names, its switches, and the tables it must survive."
import json
import shutil

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from reidnb.core.checkpoints import seed_everything
from reidnb.data.toys import toy_crops
from reidnb.methods.iics import IICS
from reidnb.methods.registry import recipe
from reidnb.practice.cli import main
from reidnb.training.loop import fit, read_log
from reidnb.training.models import load_model

TINY = dict(weights='none', height=64, width=32, epochs=4, intra_epochs=1, inter_epochs=1, iterations=2, per_camera=4,
            intra_clusters=6, inter_clusters=8, p=4, k=2, k1=5, k2=3, pad=2)
SHELL = ' '.join(f'--{k.replace("_", "-")} {v}' for k, v in TINY.items())


def settings(**kw): return recipe('iics-small', **{**TINY, **kw})[1]


def built(crops, **kw):
    seed_everything(0)
    return IICS(settings(**kw), crops)


@pytest.fixture(scope='module')
def cameras(tmp_path_factory):
    "Crops in one sub-folder a camera, nobody named"
    root = tmp_path_factory.mktemp('cameras')
    crops = toy_crops(8, n_cams=3, height=64)
    for i in range(len(crops)):
        folder = root / f'cam{crops.cams[i]}'
        folder.mkdir(exist_ok=True)
        crops.image(i).save(folder / f'{i:04d}.png')
    return root


def test_a_folder_of_cameras_is_trained_and_resumed(cameras, tmp_path, capsys):
    out = tmp_path / 'run'
    assert main(f'train iics-small --data {cameras} --layout camera --out {out} {SHELL} --no-report'.split()) == 0
    rows = read_log(out)
    assert [r['stage'] for r in rows if 'images' in r] == ['intra', 'inter'] * 2
    assert [set(r) & {'intra', 'identity', 'triplet'} for r in rows if 'loss' in r] == [{'intra'}] * 2 + [{'identity', 'triplet'}] * 2 \
        + [{'intra'}] * 2 + [{'identity', 'triplet'}] * 2
    labelled = [r for r in rows if 'clusters' in r]
    assert all(r['seconds_linkage'] >= 0 and r['seconds_features'] > 0 for r in labelled) and 'seconds_overlap' in labelled[1]
    assert not any('purity' in r for r in rows)   # nobody is named
    model = load_model(out)
    assert isinstance(model, IICS) and all(k.startswith('encoder.') for k in model.state_dict())
    assert json.loads((out / 'card.json').read_text())['settings']['norm'] == 'aibn'
    more = f'train iics-small --data {cameras} --layout camera --out {out} {SHELL.replace("--epochs 4", "--epochs 5")} --no-report'
    assert main(more.split()) == 0
    assert [r['stage'] for r in read_log(out) if 'images' in r] == ['intra', 'inter'] * 2 + ['intra']


def test_without_cameras_it_says_what_to_do(cameras, tmp_path, capsys):
    flat = tmp_path / 'flat'
    flat.mkdir()
    for p in cameras.rglob('*.png'): shutil.copy(p, flat / p.name)
    assert main(f'train iics-small --data {flat} --out {tmp_path / "run"} {SHELL}'.split()) == 2
    assert 'give cameras' in capsys.readouterr().err


def run(crops, tmp_path, **kw):
    method = built(crops, **kw)
    log = fit(method, tmp_path / 'r', progress=False)
    assert all(np.isfinite(r['loss']) for r in log if 'loss' in r)
    return method, log


@pytest.mark.filterwarnings('ignore')
def test_poor_tables_are_survived(tmp_path):
    "One camera; a camera of three images; equal images; a camera with more clusters asked for than images"
    crops = toy_crops(8, n_cams=3, height=64)
    one, log = run(crops[crops.cams == 0], tmp_path / 'one')
    assert len(one.heads) == 1 and not any('seconds_overlap' in r for r in log)
    few = crops[np.r_[np.flatnonzero(crops.cams < 2), np.flatnonzero(crops.cams == 2)[:3]]]
    three, log = run(few, tmp_path / 'three')
    assert [h[1].out_features for h in three.heads] == [6, 6, 1]   # half of its crops at most
    same = crops.replace(images=np.stack([np.asarray(crops.image(0))] * len(crops)))
    run(same, tmp_path / 'same')
    many, log = run(crops, tmp_path / 'many', intra_clusters=500, inter_clusters=500)
    sizes = [int((crops.cams == c).sum()) for c in range(3)]
    assert [h[1].out_features for h in many.heads] == [n // 2 for n in sizes]


@pytest.mark.filterwarnings('ignore')
@pytest.mark.parametrize('change', [
    dict(inter_epochs=0, epochs=2), dict(intra_epochs=0, epochs=2, similarity='feature'), dict(similarity='overlap'), dict(across=False),
    dict(rerank=False), dict(norm='bn'), dict(norm='in'), dict(norm='ibn-a'), dict(norm_share='none'), dict(norm_share='layer'),
    dict(norm_learned=False), dict(norm_stages=(4,)), dict(intra_threshold=.3, inter_threshold=.3), dict(mirror=False), dict(truth=True),
    dict(truth=True, intra_epochs=0, inter_epochs=2, epochs=2), dict(weight=0.), dict(mu=0.)], ids=lambda d: '-'.join(f'{k}={v}' for k, v in d.items()))
def test_every_switch_runs_both_stages(change, tmp_path):
    crops = toy_crops(8, n_cams=3, height=64)
    method, log = run(crops, tmp_path, **change)
    terms = set().union(*(r for r in log if 'loss' in r))
    assert ('intra' in terms) == bool(method.settings.intra_epochs) and ('identity' in terms) == bool(method.settings.inter_epochs)
    assert ('triplet' in terms) == bool(method.settings.inter_epochs and method.settings.weight)
    learned = any(k.endswith('alpha') for k, _ in method.named_parameters())
    assert learned == (method.settings.norm == 'aibn' and method.settings.norm_learned)


def test_alphas_are_shared_as_said():
    crops = toy_crops(4, n_cams=2, height=64)
    count = {k: len([1 for n, _ in built(crops, norm_share=k).named_parameters() if n.endswith('alpha')]) for k in ('none', 'bottleneck', 'layer')}
    assert count['none'] == 6 and count['bottleneck'] == count['layer'] == 2   # two blocks of two norms and a shortcut, one block a layer


def test_labels_do_not_depend_on_the_order_of_the_table():
    "Random features, plain distances (re-ranked ones tie): the same groups for any order of the rows"
    crops = toy_crops(10, n_cams=3, height=64)
    m = built(crops, rerank=False)
    f = torch.randn(len(crops), m.encoder.dim)
    m.begin('intra', torch.from_numpy(m.intra(f, {})))
    order = torch.from_numpy(np.random.default_rng(0).permutation(len(crops)))
    m2 = built(crops[order.numpy()], rerank=False)
    m2.heads = m.heads
    pairs = lambda y: y[:, None] == y
    for one, two in ((m.intra(f, {}) + 100 * crops.cams, m2.intra(f[order], {}) + 100 * crops.cams[order]),
                     (m.inter(f, 0, {}), m2.inter(f[order], 0, {}))):
        assert (pairs(one[order]) == pairs(two)).all()


def test_stage_two_reads_the_heads_in_eval_mode_and_leaves_no_trace():
    crops = toy_crops(6, n_cams=3, height=64)
    m = built(crops).train()
    list(m.epoch(0))
    before = {k: v.clone() for k, v in m.state_dict().items()}
    f = torch.randn(len(crops), m.encoder.dim)
    by_hand = torch.cat([F.softmax(F.batch_norm(f, h[0].running_mean, h[0].running_var, h[0].weight, h[0].bias) @ h[1].weight.T, 1) for h in m.heads], 1)
    assert torch.allclose(m.scores(f), by_hand, atol=1e-6)
    m.inter(f, 0, {})
    assert all(torch.equal(v, before[k]) for k, v in m.state_dict().items())
