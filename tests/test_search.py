"Search against a full sort, on anything hypothesis thinks of; a saved gallery against faults."
import os

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings, strategies as st
from torch import nn

from reidnb.data.crops import Crops
from reidnb.data.toys import toy_crops
from reidnb.neighbours.nearest import nearest
from reidnb.data.crops import ReIDData
from reidnb.methods.registry import recipe
from reidnb.practice.gallery import Gallery, compare_images
from reidnb.training.models import load_model
from reidnb.training.scoring import rank


class Mean(nn.Module):
    def __init__(self): super().__init__(); self.w = nn.Parameter(torch.eye(3))
    def embed(self, images): return F.normalize(images.mean((2, 3)) @ self.w, dim=1)


def brute(q, g, k, hidden=None, group=None):
    "Rows in the order of (distance as float32, row), by sorting everything"
    d = (1-F.normalize(q, dim=1).double() @ F.normalize(g, dim=1).double().T).clamp(min=0).float().numpy()
    out = np.full((len(q), k), -1)
    for i, row in enumerate(d):
        seen, kept = set(), []
        for j in np.argsort(row, kind='stable'):
            if hidden is not None and hidden[i, j]: continue
            if group is not None and group[j] in seen: continue
            if group is not None: seen.add(group[j])
            kept.append(j)
        out[i, :min(k, len(kept))] = kept[:k]
    return out, d


@st.composite
def searches(draw):
    "Few distinct directions, so that most distances are tied"
    n, q, dim = draw(st.integers(1, 120)), draw(st.integers(1, 6)), draw(st.integers(1, 5))
    rng = np.random.default_rng(draw(st.integers(0, 2**32-1)))
    pool = torch.from_numpy(rng.normal(size=(draw(st.integers(1, 40)), dim))).float()
    if draw(st.booleans()): pool[0] = 0
    g = pool[torch.from_numpy(rng.integers(0, len(pool), n))]
    qs = pool[torch.from_numpy(rng.integers(0, len(pool), q))]
    return qs, g, draw(st.integers(1, 140)), 2**draw(st.integers(0, 24)), rng


@settings(max_examples=150, deadline=None)
@given(searches(), st.booleans(), st.booleans())
def test_nearest_equals_a_full_sort(case, hide, grouped):
    q, g, k, budget, rng = case
    mine, cam = rng.integers(-1, 3, len(q)), rng.integers(-1, 3, len(g))
    group = np.unique(rng.integers(0, 5, len(g)), return_inverse=True)[1] if grouped else None
    hidden = (mine[:, None] == cam) & (mine[:, None] >= 0) if hide else None
    rows, dist = nearest(q, g, k, group, [(mine, cam)] if hide else (), budget=budget)
    want, d = brute(q, g, k, hidden, group)
    np.testing.assert_array_equal(rows, want)
    assert rows.shape == dist.shape == (len(q), k)
    found = rows >= 0
    assert np.isinf(dist[~found]).all() and (dist[found] >= 0).all()
    np.testing.assert_allclose(dist[found], np.take_along_axis(d, np.maximum(rows, 0), 1)[found], atol=1e-6)


@settings(max_examples=60, deadline=None)
@given(searches())
def test_memory_does_not_change_the_answer(case):
    q, g, k, budget, _ = case
    a, b = nearest(q, g, k, budget=budget), nearest(q, g, k)
    np.testing.assert_array_equal(a[0], b[0]); np.testing.assert_array_equal(a[1], b[1])


@settings(max_examples=60, deadline=None)
@given(searches())
def test_any_distance(case):
    q, g, k, budget, _ = case
    city = lambda a, b: (a[:, None]-b[None]).abs().sum(2) - 3          # negative values are fine
    rows, dist = nearest(q, g, k, distance=city, budget=budget)
    d = city(q, g).numpy()
    m = min(k, len(g))
    np.testing.assert_array_equal(rows[:, :m], np.argsort(d, 1, kind='stable')[:, :m])
    np.testing.assert_array_equal(dist[:, :m], np.sort(d, 1)[:, :m])


def test_near_ties_are_ordered_in_float64():
    "Distances that float32 products cannot tell apart; 3,000 of them, more than the candidates of the first pass"
    gen = torch.Generator().manual_seed(0)
    base = F.normalize(torch.randn(1, 512, generator=gen), dim=1)
    g = base + 1e-3*torch.randn(3000, 512, generator=gen)
    rows, _ = nearest(base, g, 100)
    rough = (1-base @ F.normalize(g, dim=1).T)[0].argsort(stable=True)[:100]
    assert rough.tolist() != rows[0].tolist(), 'the example is too easy'
    np.testing.assert_array_equal(rows, brute(base, g, 100)[0])


def test_a_distance_that_is_not_a_number_is_named():
    nan = lambda a, b: torch.full((len(a), len(b)), float('nan'))
    with pytest.raises(ValueError, match='distance of query 0 to gallery row 0'):
        nearest(torch.ones(1, 2), torch.ones(3, 2), distance=nan)


def test_unlabelled_crops_without_cameras(tmp_path):
    for i in range(6): toy_crops().image(i).save(tmp_path/f'{i}.png')
    g = Gallery.build(Mean(), Crops(sorted(tmp_path.glob('*.png'))), height=32, width=16)
    hits = g.search(tmp_path/'3.png', k=3)
    assert hits[0][0].file == '3.png' and hits[0][0].distance < 1e-6
    head = str(hits).splitlines()[1]
    assert head.split() == ['rank', 'distance', 'row', 'file']
    assert (hits.rows == g.search([str(tmp_path/'3.png')], k=3).rows).all()
    assert '3.png' not in str(g.search(tmp_path/'3.png', k=6, exclude_same='image')).split('\n', 1)[1]
    for per in ('camera', 'track'):
        with pytest.raises(ValueError, match=f'no gallery crop has a {per}'): g.search(tmp_path/'3.png', per=per)


def test_same_image_by_bytes_path_and_pixels():
    crops = toy_crops()
    g = Gallery.build(Mean(), crops, height=32, width=16)
    assert 5 not in g.search(crops.images[5], k=16, exclude_same='image').rows
    pixels = Crops(np.stack([np.asarray(crops.image(i)) for i in range(8)]))
    g = Gallery.build(Mean(), pixels, height=32, width=16)
    assert 5 not in g.search(np.asarray(crops.image(5))[None], k=8, exclude_same='image').rows


def test_gallery_file_keeps_everything(tmp_path):
    names = [f'b\u00e4r {i}, "x".jpg' for i in range(4)]
    for n, im in zip(names, toy_crops().images): (tmp_path/n).write_bytes(im)
    crops = Crops([tmp_path/n for n in names], [1, 0, -1, -2], [0, 1, -1, 2], [1.5, np.nan, 2, 3], [3, -1, 0, 0],
                  {'raw_cam': np.array(['door', 'yard', '', 'hall']), 'frame': np.arange(4)}, 'mine', ['one note'])
    g = Gallery.build(Mean(), crops, height=32, width=16)
    back = Gallery.load(g.save(tmp_path/'new folder'/'g.safetensors'), Mean())
    for k in ('pids', 'cams', 'times', 'tracks'): np.testing.assert_array_equal(getattr(back.crops, k), getattr(crops, k))
    assert (back.crops.name, back.crops.notes, back.size) == ('mine', ['one note'], (32, 16))
    assert [back.crops.file_name(i) for i in range(4)] == names
    assert list(back.crops.extra['raw_cam']) == ['door', 'yard', '', 'hall'] and back.crops.extra['frame'][3] == 3
    assert torch.equal(back.features, g.features)
    assert 'door' in str(back.search(tmp_path/names[0]))


def test_a_full_disk_leaves_the_old_gallery(tmp_path, monkeypatch):
    g = Gallery.build(Mean(), toy_crops(), height=32, width=16)
    f = g.save(tmp_path/'g.safetensors'); old = f.read_bytes()
    def full(*a): raise OSError(28, 'No space left on device')
    monkeypatch.setattr(os, 'fsync', full)
    with pytest.raises(OSError, match='old file is unchanged'): g[:3].save(f)
    assert f.read_bytes() == old and list(tmp_path.iterdir()) == [f]


@pytest.mark.parametrize('content', [b'', b'not a gallery', b'\xff'*64])
def test_a_foreign_file_is_refused(tmp_path, content):
    (tmp_path/'x').write_bytes(content)
    with pytest.raises(ValueError, match='not a whole gallery file'): Gallery.load(tmp_path/'x')


def test_no_hit_is_said():
    crops = toy_crops(n_ids=2, n_cams=1)
    g = Gallery.build(Mean(), crops, height=32, width=16)
    hits = g.search(crops[[0]], exclude_same='camera')
    assert hits[0] == [] and 'no hit' in str(hits)


def test_compare_is_symmetric_and_zero_on_itself():
    crops, m = toy_crops(), Mean()
    a, b = crops.image(0), crops.image(9)
    size = dict(height=32, width=16)
    assert compare_images(m, a, a, **size) < 1e-6
    assert abs(compare_images(m, a, b, **size)-compare_images(m, b, a, **size)) < 1e-6
    with pytest.raises(FileNotFoundError, match='gone.jpg'): compare_images(m, a, 'gone.jpg', **size)


def test_a_model_is_asked_for_its_size():
    "Case C24 (two sizes for one question): without a word about sizes, images are read as the model was trained"
    model, crops = load_model('small'), toy_crops(4, 2, 2)
    a, b = crops.image(0), crops.image(9)
    right = compare_images(model, a, b)
    assert right == pytest.approx(compare_images(model, a, b, height=model.settings.height, width=model.settings.width), abs=1e-6)
    assert right == pytest.approx(rank(model, ReIDData(query=crops[[0]], gallery=crops)).dist[0, 9], abs=1e-5)
    with pytest.warns(UserWarning, match='trained at 128x64 and reads 256x128'):
        assert abs(compare_images(model, a, b, height=256, width=128) - right) > 1e-3


def test_a_matcher_ranks_by_its_own_distance(tmp_path):
    "A gallery of QAConv's maps, built, saved and loaded, ranks as the method does, not by the cosine of flattened maps"
    torch.manual_seed(0)
    cls, settings = recipe('qaconv-small', weights='none')
    model, crops = cls(settings).eval(), toy_crops(6, 2, 2)
    gallery = Gallery.build(model, crops)
    want = model.distance(*(model.extract(c) for c in (crops[:3], crops)))
    for g in (gallery, Gallery.load(gallery.save(tmp_path/'g.safetensors'), model)):
        hits = g.search(crops[:3], len(crops))
        np.testing.assert_allclose(hits.distances, want.sort(1).values, atol=1e-5)
    with pytest.raises(ValueError, match='give its model, or `distance`'): Gallery.load(tmp_path/'g.safetensors')
