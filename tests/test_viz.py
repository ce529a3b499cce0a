"""Pictures on odd input: one camera, many cameras, no labels, tensors, gaps in the log."""
import base64, io, xml.dom.minidom

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image
from hypothesis import given, settings, strategies as st

from reidnb.data.crops import Crops
from reidnb.data.toys import toy_crops
from reidnb.ranking.evaluation import evaluate
from reidnb.viz.plots import (
    confusion, data_uri, distance_groups, embed_2d, plot_2d, plot_cmc, plot_distances,
    plot_training)
from reidnb.viz.sheets import camera_board, ranked_lists, ranking

crops = toy_crops(n_ids=5, n_cams=3, n_each=3)
query, gallery = crops[np.arange(len(crops)) % 3 == 0], crops[np.arange(len(crops)) % 3 > 0]
dist = np.random.default_rng(0).random((len(query), len(gallery))).astype(np.float32)
GREEN, RED = (0x22, 0x88, 0x33), (0xcc, 0x33, 0x44)
colours = lambda image: {c for _, c in image.getcolors(1 << 20)}


@pytest.fixture(autouse=True)
def nothing_global_changes():
    "A picture leaves matplotlib as it was: no settings changed, no figure kept open"
    before = dict(mpl.rcParams)
    yield
    assert dict(mpl.rcParams) == before and plt.get_fignums() == []


@pytest.mark.parametrize('cross_camera', [True, False])
@pytest.mark.parametrize('row', range(0, len(query), 4))
def test_ranking_gives_the_scored_list(row, cross_camera):
    "Average precision of the drawn list is that of the evaluation"
    pids = gallery.pids.copy(); pids[[1, 5]] = -1; pids[[2, 9]] = 0
    table = gallery.replace(pids=pids)
    order, verdict = ranking(dist, query, table, row, k=len(table), cross_camera=cross_camera)
    at = np.flatnonzero(verdict == 1)+1
    ap = evaluate(dist, query.pids, pids, query.cams, table.cams, cross_camera=cross_camera).ap[row]
    assert np.mean(np.arange(1, len(at)+1)/at) == pytest.approx(ap)
    assert not np.isin(pids[order], -1).any() and (verdict[pids[order] == 0] == 0).all()


def test_tensor_and_array_draw_the_same():
    a, b = (ranked_lists(query, gallery, d, n=2) for d in (dist, torch.tensor(dist)))
    assert a.tobytes() == b.tobytes() and a.mode == 'RGB'


@pytest.mark.parametrize('change', [dict(), dict(cams=None), dict(pids=None), dict(pids=None, cams=None)])
def test_ranked_lists_of_partly_known_tables(change):
    "Without labels nothing is right or wrong; without cameras nothing is removed"
    image = ranked_lists(query.replace(**change), gallery.replace(**change), dist, n=3, k=4)
    assert (GREEN in colours(image) or RED in colours(image)) == ('pids' not in change)


def test_ranked_lists_without_any_match_still_draws():
    assert GREEN not in colours(ranked_lists(query.replace(pids=query.pids+100), gallery, dist, n=2))


def test_ranked_lists_goes_from_best_to_worst():
    best = np.where(query.pids[:, None] == gallery.pids, 0, 1) + dist*1e-3
    best[3] = 1-best[3]                                 # query 3 is all wrong
    alone = ranked_lists(query, gallery, best, queries=[3], k=4)
    both = ranked_lists(query, gallery, best, n=2, k=4)
    assert GREEN not in colours(alone) and both.height > alone.height
    last = both.crop((0, both.height-alone.height+18, *both.size)).resize((50, 50))
    assert np.abs(np.asarray(last, int)-np.asarray(alone.crop((0, 18, *alone.size)).resize((50, 50)), int)).mean() < 12


def test_small_gallery_and_bad_choices():
    assert ranked_lists(query, gallery[[0, 1]], dist[:, :2], k=8, n=1).width < 1000
    with pytest.raises(ValueError, match='must be'): ranked_lists(query, gallery, dist[:, :3])
    with pytest.raises(ValueError, match='empty'): ranked_lists(query, gallery, dist, queries=[])
    with pytest.raises(ValueError, match='nan'): ranked_lists(query, gallery, dist*np.nan)


def test_a_broken_image_is_named(tmp_path):
    (tmp_path/'broken.jpg').write_bytes(b'no picture')
    bad = Crops([tmp_path/'broken.jpg'], pids=[1], cams=[0])
    with pytest.raises(ValueError, match='broken.jpg'): camera_board(bad)
    with pytest.raises(ValueError, match='broken.jpg'): ranked_lists(bad, bad, np.zeros((1, 1)), cross_camera=False)


def test_camera_board_shows_different_people_first():
    many = toy_crops(n_ids=6, n_cams=1, n_each=5)
    board, one = camera_board(many, n=6), camera_board(many[many.pids == 1], n=6)
    assert board.size[1] == one.size[1] and len(colours(board)) > len(colours(one))
    wide = Crops(np.zeros((2, 20, 90, 3), np.uint8), cams=[0, 1])
    assert camera_board(wide).width < 400


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 10**6), st.booleans())
def test_groups_hold_each_pair_once(seed, square):
    "Against a double loop"
    rng = np.random.default_rng(seed); Q, G = rng.integers(2, 9, 2)
    G = Q if square else G
    d, qp, gp = rng.random((Q, G)), rng.integers(-1, 4, Q), rng.integers(-2, 4, G)
    qc, gc = rng.integers(0, 2, Q), rng.integers(0, 2, G)
    if square: gp, gc = qp, qc
    want = {}
    for i in range(Q):
        for j in range(G):
            if (square and i >= j) or min(qp[i], gp[j]) < 0 or qp[i] == gp[j] == 0: continue
            key = f"{'same' if qp[i] == gp[j] else 'other'} person, {'same' if qc[i] == gc[j] else 'other'} camera"
            want.setdefault(key, []).append(d[i, j])
    got = distance_groups(d, qp, None if square else gp, qc, None if square else gc)
    assert got.keys() == want.keys()
    for k in want: np.testing.assert_array_equal(got[k], np.sort(want[k]))


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(0, 5), min_size=1, max_size=20), st.lists(st.integers(0, 5), min_size=1, max_size=20))
def test_confusion_counts_pairs(near, far):
    want = np.mean([(f < n) + .5*(f == n) for n in near for f in far])
    assert confusion(near, far) == pytest.approx(want)
    assert confusion(near, far) + confusion(far, near) == pytest.approx(1)


def test_groups_of_a_large_matrix_are_sampled():
    big = torch.rand(3000, 500)
    groups = distance_groups(big, np.arange(3000) % 50, np.arange(500) % 50, max_pairs=100_000)
    assert sum(map(len, groups.values())) == pytest.approx(100_000, rel=.1)
    assert set(groups) == {'same person, same camera', 'other person, same camera'}


@pytest.mark.parametrize('d', [np.zeros((4, 4)), np.ones((4, 4))*7, np.eye(4)])
def test_distances_without_spread_draw(d):
    text = data_uri(plot_distances(d, [1, 1, 2, 2], q_cams=[0, 1, 0, 1]))
    assert 'nan' not in base64.b64decode(text.split(',')[1]).decode()


def test_embeddings():
    rng = np.random.default_rng(0); f = rng.normal(size=(40, 6))*[9, 3, 1, 1, 1, 1]
    pca = embed_2d(torch.tensor(f))
    assert pca.shape == (40, 2) and pca[:, 0].var() > pca[:, 1].var() > f[:, 2].var()
    np.testing.assert_allclose(embed_2d(f+5), pca, atol=1e-9)            # a shift changes nothing
    assert embed_2d(f[:3, :1]).shape == (3, 2) and embed_2d(np.ones((5, 4))).shape == (5, 2)
    assert embed_2d(f[:4], 'tsne').shape == (4, 2) and np.isfinite(embed_2d(np.ones((5, 4)), 'tsne')).all()
    with pytest.raises(ValueError, match='3 rows'): embed_2d(f[:2])


@pytest.mark.parametrize('n_cams', [1, 3, 8, 20])
@pytest.mark.parametrize('labels', ['none', 'one', 'many', 'unknown'])
def test_planes(n_cams, labels):
    points, cams = np.random.default_rng(0).random((60, 2)), np.arange(60) % n_cams
    pids = dict(none=None, one=np.ones(60, int), many=np.arange(60) % 7, unknown=np.full(60, -2))[labels]
    fig = plot_2d(points, cams, pids)
    assert len(fig.axes[0].collections) == n_cams and 'nan' not in fig.axes[0].get_title('left')


def test_training_logs_with_gaps():
    log = [dict(epoch=e, step=3*e+i, loss=1/(1+e), **{'loss/ce': .5, 'loss/triplet': .1, 'note': 'x'}, lr=.1)
           for e in range(4) for i in range(3)]
    log[5]['loss'] = float('nan'); del log[7]['loss/ce']
    log += [dict(epoch=1, mAP=.5), dict(epoch=3, mAP=.4, R1=.6), dict(epoch=3, images=9, seconds=1.)]
    fig = plot_training(log)
    assert len(fig.axes) == 3 and 'best mAP 50.0 %, epoch 2' in fig.axes[2].get_title('left')
    assert [t.get_text() for t in fig.axes[0].get_legend().get_texts()] == ['loss', 'ce', 'triplet']
    assert 'nan' not in fig.axes[0].get_title('left')
    long = plot_training([dict(epoch=i//500, step=i, loss=1., lr=.1) for i in range(20000)])
    assert len(data_uri(long)) < 100_000                    # a long run is a small picture
    with pytest.raises(ValueError, match='0 rows'): plot_training([])


def test_pictures_are_small_valid_and_repeat():
    m = evaluate(dist, query.pids, gallery.pids, query.cams, gallery.cams)
    figures = [plot_cmc({'a & b <c>': m, 'other': m}), plot_distances(dist, query.pids, gallery.pids, query.cams, gallery.cams),
               plot_2d(np.random.default_rng(0).random((3000, 2)), np.arange(3000) % 6)]
    for fig in figures:
        assert isinstance(fig, Figure)
        text = data_uri(fig)
        assert text == data_uri(fig) and len(text) < 200_000
        xml.dom.minidom.parseString(base64.b64decode(text.split(',')[1]))
    image = ranked_lists(query, gallery, dist)
    back = Image.open(io.BytesIO(base64.b64decode(data_uri(image).split(',')[1])))
    assert back.size == image.size
    plain = Figure(); plain.subplots().plot([1, 2])
    assert data_uri(plain).startswith('data:image/svg')
