"""Pictures on odd input: one camera, many cameras, no labels, tensors, gaps in the log."""
import base64, io, re, warnings, xml.dom.minidom
from pathlib import Path

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image
from hypothesis import Phase, given, settings, strategies as st

from reidnb.core.figures import PALETTE, RIGHT, caption, contact_sheet, data_uri, legend_strip, picture, tile, tile_sheet
from reidnb.data.crops import Crops
from reidnb.data.toys import toy_crops
from reidnb.ranking.evaluation import evaluate
from reidnb.ranking.matching import draw_matches, Matches
from reidnb.viz.clusters import cluster_sheet, people_sheet, plot_eps, plot_sizes
from reidnb.viz.plots import (
    confusion, distance_groups, embed_2d, plot_2d, plot_cmc, plot_distances,
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
    ap = evaluate(dist, query.pids, pids, query.cams, table.cams, cross_camera=cross_camera).average_precision[row]
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
    alone = ranked_lists(query, gallery, best, queries=[3], k=4, legend=False)
    both = ranked_lists(query, gallery, best, n=2, k=4, legend=False)
    assert GREEN not in colours(alone) and both.height > alone.height
    last = both.crop((0, both.height-alone.height+18, *both.size)).resize((50, 50))
    assert np.abs(np.asarray(last, int)-np.asarray(alone.crop((0, 18, *alone.size)).resize((50, 50)), int)).mean() < 12


PINK = (255, 0, 255)


def pink(n, size=(64, 32), **columns):
    "A table of crops of one plain colour, which no frame, badge or letter has"
    return Crops(np.full((n, *size, 3), PINK, np.uint8), **columns)


def blocks(image, height, width):
    "Places of whole pink blocks; fails when a pink pixel lies outside of them"
    at = (np.asarray(image) == PINK).all(2)
    found = []
    while at.any():
        y, x = np.argwhere(at)[0]
        assert at[y:y+height, x:x+width].sum() == height*width, f'something covers the crop at {x}, {y}'
        at[y:y+height, x:x+width] = False
        found.append((int(y), int(x)))
    return found


@pytest.mark.parametrize('height', [None, 40, 130])
def test_nothing_covers_a_crop(height):
    "Each sheet, with all its marks, letters and its legend, shows every pixel of every crop; 96 high or more by default"
    kw = {} if height is None else dict(height=height)
    q, g = pink(2, pids=[1, 2], cams=[0, 1]), pink(8, pids=[1, 1, 2, 2, 3, -2, 0, 1], cams=[1, 2, 0, 2, 1, 0, 3, 1])
    d = np.arange(16.).reshape(2, 8)
    labels = np.array([0, 0, 0, 1, 1, -1, 0, 1])
    sheets = [(ranked_lists(q, g, d, **kw), 18, 112), (camera_board(g, **kw), 8, 96),
              (contact_sheet(g, frames=PALETTE[:7]+[RIGHT], labels=[f'a long label {i}' for i in range(8)],
                             legend={'right': RIGHT, 'left': PALETTE[0]}, **kw), 8, 96),
              (cluster_sheet(g, labels, which=[0, 1, -1], **kw), 8, 96),
              (people_sheet(g, labels, people=[1, 2, 3], **kw), 6, 96)]
    for image, n, default in sheets:
        h = height or default
        assert h >= 96 or height
        assert len(blocks(image, h, h//2)) == n


@pytest.mark.parametrize('mark', [-1, 0, 1])
@pytest.mark.parametrize('lines', [(), ('cam 3',), ('cam 3', '0.2'), ('', 'a line that is wider than the image itself')])
@pytest.mark.parametrize('size', [(64, 32), (20, 90), (3, 200), (200, 3), (96, 48)])
def test_a_tile_leaves_its_crop_alone(mark, lines, size):
    "The whole image at the top, its frame around it, text and badge below"
    image = Image.new('RGB', size[::-1], PINK)
    t, w = tile(image, '#228833', lines, mark, height=96), min(max(1, round(96*size[1]/size[0])), 96)
    (y, x), = blocks(t, 96, w)
    assert y == 3
    around = np.asarray(t)[:102, x-3:x+w+3].copy(); around[3:99, 3:w+3] = GREEN
    assert (around == GREEN).all()
    left = np.asarray(t)[:102].copy(); left[:, x-3:x+w+3] = 255
    assert (left == 255).all()                                # nothing stands beside the frame either
    below = np.asarray(t)[102:]
    assert (below.min() < 100 if any(lines) else mark >= 0 or (below == 255).all())
    assert ((below == GREEN).all(2).any(), (below == RED).all(2).any()) == (mark == 1, mark == 0)


def test_legends_name_the_frames_that_occur():
    "Added below and never over a sheet; a kind of frame that is not drawn is not named"
    for draw in (lambda **kw: ranked_lists(query, gallery, dist, n=2, **kw),
                 lambda **kw: cluster_sheet(gallery, gallery.pids, **kw),
                 lambda **kw: people_sheet(gallery, np.arange(len(gallery)), people=[1, 2], **kw)):
        told, bare = draw(), draw(legend=False)
        assert told.height > bare.height and told.width >= bare.width
        assert told.crop((0, 0, *bare.size)).tobytes() == bare.tobytes()
    pure = cluster_sheet(gallery, gallery.pids)               # a cluster a person: nobody else
    assert GREEN in colours(pure) and RED not in colours(pure)
    narrow = ranked_lists(query, gallery, dist, queries=[0], k=1)
    foot = narrow.crop((0, narrow.height-30, *narrow.size))
    assert (np.asarray(foot)[:, -6:] == 255).all()            # a line longer than the sheet is not cut


@settings(max_examples=50, deadline=None)
@given(st.lists(st.text('abc xyz', min_size=1, max_size=30), min_size=1, max_size=6, unique=True), st.integers(1, 600))
def test_a_legend_keeps_its_width(texts, width):
    alone = [legend_strip({t: PALETTE[0]}, 1).width for t in texts]
    strip = legend_strip(dict.fromkeys(texts, PALETTE[0]), width)
    assert strip.width <= max(width, *alone)
    assert strip.height <= len(texts)*legend_strip({texts[0]: PALETTE[0]}, 1).height


def test_a_sheet_of_ragged_rows():
    a, b = Image.new('RGB', (30, 20), PINK), Image.new('RGB', (10, 50), PINK)
    sheet = tile_sheet([[a, None, b], [b]], ['x', '', 'y'], legend={'one': RIGHT, 'two': (RIGHT, 1)})
    assert (np.asarray(sheet) == PINK).all(2).sum() == 30*20+2*10*50
    assert caption(['a', 'b', 'c'], 96).size == (104, 96)


@pytest.mark.parametrize('n', [0, 1, 30])
def test_matches_have_names_and_a_legend(n):
    "The lines are the picture; names stand above it, the legend below"
    place = torch.randint(0, 4, (n, 2), generator=torch.Generator().manual_seed(n))
    found = Matches(place, place, torch.rand(n), torch.arange(n) % 2 == 0, None, (4, 4))
    grey = Image.new('RGB', (32, 64), '#888888')
    told, bare = (draw_matches(grey, grey, found, None, legend=k) for k in (True, False))
    assert bare.size == (2*128+60, 256) and told.crop((0, 17, bare.width, 17+256)).tobytes() == bare.tobytes()
    tiny = draw_matches(grey, grey, found, height=20, gap=2)  # the legend is wider than the picture
    assert tiny.width > 2*10+2


def labelled(fig):
    "Each panel has names on both axes, and each curve is told: by a legend, or alone by the axis"
    return all(ax.get_xlabel() and ax.get_ylabel() and (ax.get_legend() or len(ax.lines) == 1) for ax in fig.axes)


def test_every_plot_names_its_axes_and_curves():
    m = evaluate(dist, query.pids, gallery.pids, query.cams, gallery.cams)
    log = [dict(epoch=e, step=e, loss=1/(1+e), a=.1, b=.2, lr=.1, mAP=.5, R1=.6) for e in range(4)]
    for fig in (plot_cmc(m), plot_distances(dist, query.pids, gallery.pids, query.cams, gallery.cams),
                plot_2d(np.random.default_rng(0).random((30, 2)), np.arange(30) % 3, np.arange(30) % 5),
                plot_training(log), plot_sizes([0, 0, 1], [1, 2, 2]), plot_sizes([0, 0, 1]),
                plot_eps([.1, .2, .3, .9], .2)):
        assert labelled(fig)
    fig = plot_2d(np.random.default_rng(0).random((30, 2)), np.arange(30) % 3, np.arange(30) % 5)
    told = [t.get_text() for t in fig.axes[0].get_legend().get_texts()]
    assert told[:3] == ['cam 0', 'cam 1', 'cam 2'] and len(told) == 4 and 'person' in told[3]


def test_a_figure_survives_pickling_and_a_plain_one_stays_as_it_is():
    import pickle
    fig = picture(3, 2); fig.subplots().plot([1, 2])
    assert pickle.loads(pickle.dumps(fig))._repr_svg_() == fig._repr_svg_()
    plain = Figure(layout='constrained'); plain.subplots().plot([1, 2])
    assert data_uri(plain).startswith('data:image/svg') and plain.get_layout_engine() is not None


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


STAGES, TERMS = ['intra', 'inter', 'warm up'], ['ce', 'triplet', 'pull']
TURNS = {'critic': ['critic/real', 'critic/fake'], 'generator': ['generator/fool', 'generator/cycle']}
value = st.floats(-100, 100, width=32)


@st.composite
def logs(draw):
    "Rows of a run: stages or none, turns or one, keys that come and go, one epoch after another"
    stages, turns = draw(st.booleans()), draw(st.booleans())
    rows, epoch = [], 0
    for _ in range(draw(st.integers(1, 25))):
        epoch += draw(st.integers(0, 1))
        row = dict(epoch=epoch, step=len(rows))
        names = draw(st.lists(st.sampled_from([*TURNS] if turns else TERMS), min_size=1, unique=True))
        terms = {k: draw(value) for n in names for k in (TURNS[n] if turns else [n])}
        row |= dict(loss=sum(terms.values()), **terms)
        row |= {f'lr/{n}': draw(st.floats(0, 1)) for n in names} if turns else dict(lr=draw(st.floats(0, 1)))
        if stages: row['stage'] = draw(st.sampled_from(STAGES))
        rows.append(row)
        if draw(st.booleans()): rows.append(dict(epoch=epoch, images=9, seconds=1., clusters=7))
        if draw(st.integers(0, 5)) == 0: rows.append(dict(epoch=epoch, mAP=draw(st.floats(0, 1))))
    return rows


@settings(max_examples=40, deadline=None, phases=[Phase.explicit, Phase.reuse, Phase.generate])
@given(logs())
def test_any_log_is_drawn_as_it_is(log):
    "No warning; the thin lines are the terms of each stage, with gaps where the log has none"
    steps = [r for r in log if 'loss' in r]
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        fig = plot_training(log)
        fig.draw_without_rendering()
    turns = len({k.split('/')[0] for r in steps for k in r if '/' in k and not k.startswith('lr/')}) > 1
    want = {}
    for stage in {r.get('stage') for r in steps}:
        keys = sorted({k for r in steps if r.get('stage') == stage for k in r}-{'epoch', 'step', 'lr', 'loss', 'stage'})
        keys = [k for k in keys if not k.startswith('lr/')]
        for key in keys if turns else ['loss']+keys*(len(keys) > 1):
            want[stage, key] = [r[key] if r.get('stage') == stage and key in r else np.nan for r in steps]
    rates = [ax for ax in fig.axes if ax.get_title('left') == 'learning rate']
    thin = [line for ax in fig.axes for line in ax.lines if line.get_linewidth() == .5]
    drawn = sorted(tuple(np.nan_to_num(line.get_ydata(), nan=1e9)) for line in thin)
    assert drawn == sorted(tuple(np.nan_to_num(v, nan=1e9)) for v in want.values())
    assert all(len(line.get_xdata()) == len(steps) for line in thin)
    unit = 10.**int(rates[0].get_ylabel().split('1e')[1])
    shown = np.concatenate([line.get_ydata() for line in rates[0].lines])*unit
    given = [v for r in steps for k, v in r.items() if k.split('/')[0] == 'lr']
    np.testing.assert_allclose(np.sort(shown[np.isfinite(shown)]), np.sort(given), rtol=1e-12)
    lines = [line for ax in fig.axes if ax not in rates and 'mAP' not in ax.get_title('left') for line in ax.lines]
    for y, mean in zip(*([line.get_ydata() for line in lines[i::2]] for i in (0, 1)), strict=True):
        assert np.nanmin(y)-1e-6 <= np.nanmin(mean) and np.nanmax(mean) <= np.nanmax(y)+1e-6   # a gap is no zero


def test_a_stage_is_not_joined_with_the_next():
    "Forty rounds of two stages: each line is a piece a round, and its mean knows only its own rows"
    log = [dict(epoch=e, loss=[1., 5.][e % 2], lr=[.1, .5][e % 2], stage=['intra', 'inter'][e % 2])
           for e in range(80) for _ in range(10)]
    fig = plot_training(log)
    for ax in fig.axes:
        for line in ax.lines:
            y = line.get_ydata(); ok = np.isfinite(y)
            assert len(np.unique(y[ok].round(9))) == 1
            assert (np.diff(np.r_[0, ok.astype(int)]) == 1).sum() == 40
        grounds, = ax.collections
        assert len(grounds.get_paths()) == 40
    assert 'intra\xa01\xa0to\xa01' in fig.axes[0].get_title('left')
    assert len(data_uri(fig)) < 150_000


def test_a_turn_that_skips_batches_has_gaps_and_no_total():
    log = [dict(epoch=0, step=i, loss=9., **{'critic/real': 1., 'lr/critic': .1},
                **({'generator/fool': 2., 'lr/generator': .2} if i % 5 == 4 else {})) for i in range(30)]
    critic, generator, rate = plot_training(log).axes
    thin, mean = generator.lines
    assert np.flatnonzero(np.isfinite(thin.get_ydata())).tolist() == thin.get_markevery() == [4, 9, 14, 19, 24, 29]
    assert set(mean.get_ydata()) == {2.} and len(mean.get_xdata()) == 30      # never pulled down by zeros
    assert {v for ax in (critic, generator) for line in ax.lines for v in line.get_ydata() if v == v} == {1., 2.}
    assert len(rate.lines) == 2 and [t.get_text() for t in rate.get_legend().get_texts()] == ['critic', 'generator']


def test_the_first_loss_is_no_empty_memory():
    rows = lambda values: [dict(epoch=0, loss=v) for v in values]
    title = lambda values: plot_training(rows(values)).axes[0].get_title('left')
    assert title([0.]+[8.]*10+[2.]*10) == 'loss from 8 to 2'
    assert title([4.]*10+[0.]*10) == 'loss from 4 to 0' and title([0.]) == 'loss from 0 to 0'


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


# Colours that are no part of a figure of the house
OTHER_COLOURS = {'core/figures.py': 'the palette itself', 'data/toys.py': 'clothes and skin of the drawn people'}


def test_the_palette_stands_once():
    "A module that draws names its colours; it does not write them down again"
    root = Path(__file__).parent.parent/'reidnb'
    found = {p.relative_to(root).as_posix() for p in root.rglob('*.py') if re.search(r'[\'"]#([0-9a-fA-F]{3}){1,2}\b', p.read_text())}
    assert 'core/figures.py' in found and not found-set(OTHER_COLOURS)


@pytest.mark.parametrize('terms', [1, 2, 7])
@pytest.mark.parametrize('rise', [1, -1])
def test_the_legend_of_a_run_covers_no_curve(terms, rise):
    log = [dict(epoch=e, step=e, loss=5+rise*e, lr=.1, mAP=.1*e, R1=.9-.1*e, **{f'term {k}': k+rise*e/9. for k in range(terms)}) for e in range(8)]
    fig = plot_training(log)
    fig.draw_without_rendering()
    for ax in (fig.axes[0], fig.axes[2]):
        legend = ax.get_legend().get_window_extent()
        assert not legend.overlaps(ax.get_window_extent()) and legend.y0 >= 0 and not legend.overlaps(ax.xaxis.label.get_window_extent())


def run_of_stages(terms, turns):
    "A log of two alternating stages, and of two turns"
    names = [f'{turn}/{k}' for turn in ('critic', 'generator') for k in terms] if turns else terms
    rates = {'lr/critic': .1, 'lr/generator': .2} if turns else {'lr': .1}
    return [dict(epoch=e, loss=5-e/9, stage=['intra', 'inter'][e//2 % 2], mAP=.1*e, R1=.9-.1*e, **rates,
                 **{k: j+e/9. for j, k in enumerate(names)}) for e in range(9)]


@pytest.mark.parametrize('terms', [['ce'], ['ce', 'triplet'], ['a long name of a term', 'ce', 'triplet'],
                                   [f'a long name of term {k}' for k in range(12)]])
@pytest.mark.parametrize('turns', [False, True])
def test_no_legend_lies_on_a_panel(terms, turns):
    m = evaluate(dist, query.pids, gallery.pids, query.cams, gallery.cams)
    for fig in (plot_training(run_of_stages(terms, turns)), plot_cmc({'a': m, 'a name of many letters': m, 'b': m}),
                plot_eps([.1, .2, .3, .9], .2)):
        with warnings.catch_warnings():
            warnings.simplefilter('error')               # a panel that its legend leaves no room
            fig.draw_without_rendering()
        legends = [ax.get_legend().get_window_extent() for ax in fig.axes if ax.get_legend()]
        assert legends and not any(k.overlaps(ax.get_window_extent()) for k in legends for ax in fig.axes)
        assert not any(a.overlaps(b) for i, a in enumerate(legends) for b in legends[:i])
        assert all(k.y0 >= 0 and k.x0 >= 0 and k.x1 <= fig.bbox.width for k in legends)


def test_densities_hold_all_pairs():
    "A density over its range sums to 1 however the distances lie, and the width of a single value is a few steps"
    rng = np.random.default_rng(0)
    for v in (rng.normal(size=100_000), rng.random(50), np.full(9, .3), np.r_[np.zeros(5), np.ones(5)]):
        fig = plot_distances({'same person': np.sort(v), 'other person': np.array([-9., 9.])})
        x, y = fig.axes[0].lines[0].get_xydata().T
        assert y.sum()*(x[1]-x[0]) == pytest.approx(1, abs=.03)
