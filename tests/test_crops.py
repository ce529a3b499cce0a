"""Property and fault tests of reidnb.data.crops, reidnb.data.folders and reidnb.data.checks on random tables and damaged folders."""
import io
import pickle
import shutil
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from reidnb.data.checks import validate
from reidnb.data.crops import concat, contact_sheet, Crops, ReIDData
from reidnb.data.items import CropDataset
from reidnb.data.toys import toy_crops
from reidnb.core.files import list_images
from reidnb.data.folders import from_csv, from_folder, from_regex, make_data
from reidnb.data.splits import join, split_ids, split_query_gallery
from reidnb.data.video import tracklet_data
from reidnb.datasets.catalogue import load
from reidnb.methods.qaconv import combine_all
from reidnb.methods.registry import recipe
from reidnb.practice.experiments import run_experiment
from reidnb.practice.gallery import Gallery
from reidnb.world.sites import make_site, write_market

quick = settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
faults = settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))


JPEGS = toy_crops(n_ids=6, n_cams=2, n_each=1, height=16).images   # twelve different small images


@st.composite
def tables(draw, max_rows=40, cams=4):
    "A random table without pixels worth reading"
    n = draw(st.integers(0, max_rows))
    col = lambda lo, hi: np.array(draw(st.lists(st.integers(lo, hi), min_size=n, max_size=n)), np.int64)
    return Crops([b'%d' % i for i in range(n)], col(-2, 6), col(-1, cams-1), extra={'row': np.arange(n)})


# --- tables -----------------------------------------------------------------------------------------------
@quick
@given(tables(), st.data())
def test_rows_stay_aligned(t, data):
    rows = data.draw(st.lists(st.integers(0, max(len(t)-1, 0)), max_size=20)) if len(t) else []
    part = t[rows]
    assert part.extra['row'].tolist() == rows
    assert part.images == [b'%d' % i for i in rows] and (part.pids == t.pids[rows]).all()
    mask = t.pids > 0
    assert t[mask].fingerprint() == t[np.flatnonzero(mask)].fingerprint()
    assert concat(t[:5], t[5:]).fingerprint() == t.fingerprint()


@quick
@given(tables())
def test_labels_are_contiguous_and_ordered(t):
    y, real = t.labels(), t.pids > 0
    assert (y[~real] == -1).all() and set(y[real]) == set(range(t.n_ids))
    for i in np.flatnonzero(real):
        assert y[i] == len({p for p in t.pids[real] if p < t.pids[i]})


@quick
@given(tables())
def test_every_table_shows_itself(t):
    assert f"{len(t):,} images" in repr(t) and t._repr_markdown_()
    data = ReIDData(train=t, query=t)
    assert 'gallery' in repr(data) and data._repr_markdown_()
    for f in validate(data): assert f.level in ('error', 'warning') and str(f)


def test_pickle_and_paths(tmp_path):
    (tmp_path/'a.jpg').write_bytes(JPEGS[0])
    for images in ([tmp_path/'a.jpg'], JPEGS[:1], np.asarray(Image.open(io.BytesIO(JPEGS[0])))[None]):
        ds = pickle.loads(pickle.dumps(CropDataset(Crops(images), seed=3)))
        image, row = ds[0]
        assert row == 0 and image.shape == (3, 16, 8)


def test_spawned_workers_see_epoch_and_seed():
    ds = CropDataset(Crops(JPEGS), _draw, seed=1)
    loader = torch.utils.data.DataLoader(ds, batch_size=4, num_workers=1, persistent_workers=True,
                                         multiprocessing_context='spawn')
    for epoch in (0, 5):
        ds.set_epoch(epoch)
        there = torch.cat([x for x, _ in loader])
        assert torch.equal(there, torch.stack([ds[i][0] for i in range(len(ds))]))


def _draw(image): return torch.rand(3)


@pytest.mark.parametrize('mode', ['L', 'RGBA', 'P', 'CMYK', '1', 'LA', 'I;16'])
def test_every_colour_mode_becomes_rgb(mode):
    out = io.BytesIO()
    Image.new('L', (4, 8), 7).convert('RGB' if mode == 'CMYK' else 'L').convert(mode).save(
        out, 'JPEG' if mode == 'CMYK' else 'PNG')
    assert Crops([out.getvalue()]).image(0).mode == 'RGB'


def test_upright_by_exif():
    exif, out = Image.Exif(), io.BytesIO()
    exif[274] = 6
    Image.new('RGB', (8, 4)).save(out, 'JPEG', exif=exif)
    assert Crops([out.getvalue()]).image(0).size == (4, 8)


@quick
@given(st.lists(st.tuples(st.integers(1, 80), st.integers(1, 80)), min_size=1, max_size=9),
       st.integers(1, 5), st.integers(8, 40))
def test_contact_sheet_takes_any_sizes(sizes, ncol, height):
    sheet = contact_sheet([Image.new('RGB', s) for s in sizes], ncol, height, labels=range(len(sizes)))
    assert sheet.height >= height*-(-len(sizes)//ncol)


# --- several data sets -------------------------------------------------------------------------------------
@quick
@given(st.lists(tables(12), min_size=2, max_size=3), st.data())
def test_joined_in_any_order_everybody_stays_who_he_is(sets, data):
    "Data sets in pieces, in any order: new numbers and (data set, old number) are one to one"
    pieces = []
    for name, t in zip('abc', sets):
        t = t.replace(tracks=t.pids*(t.pids > 0)-(t.pids <= 0), dataset=name,
                      extra={'raw_pid': np.array([str(p) if p > 0 else '' for p in t.pids], 'U9'),
                             'was': np.array([(ord(name), *x) for x in zip(t.pids, t.cams)], int).reshape(-1, 3)})
        cut = data.draw(st.integers(0, len(t)))
        pieces += [t[:cut], t[cut:]]
    pieces = data.draw(st.permutations(pieces))
    both = concat(*pieces)
    sets_, pids, cams = both.extra['was'].T
    assert (both.pids[pids <= 0] == pids[pids <= 0]).all() and (both.cams[cams < 0] == -1).all()
    for now, then, real in ((both.pids, pids, pids > 0), (both.cams, cams, cams >= 0), (both.tracks, pids, pids > 0)):
        pairs = set(zip(now[real].tolist(), sets_[real].tolist(), then[real].tolist()))
        assert len(pairs) == len({x[0] for x in pairs}) == len({x[1:] for x in pairs})
    first = sets_ == ord(pieces[0].dataset)   # the first data set keeps its numbers
    assert (both.pids[first] == pids[first]).all() and (both.cams[first] == cams[first]).all()
    names = both.extra['raw_pid']
    assert all(n == (str(p) if p > 0 else '') if f else n.split(' ')[-1] == (str(p) if p > 0 else '')
               for n, p, f in zip(names, pids, first))
    assert both[::2].dataset == concat(*pieces).dataset and concat(both, both).n_ids == both.n_ids
    other = concat(*[p.replace(pids=p.pids+(p.pids > 0)) for p in pieces])
    if other.dataset != both.dataset:   # the same members counted on from elsewhere: another numbering
        with pytest.raises(ValueError, match='in two ways'): concat(both, other)


def test_three_and_three_people_are_six():
    "Case C17: two data sets that both count from 1"
    a, b = toy_crops(3, 2, 2, name='market'), toy_crops(3, 2, 2, seed=1, name='duke')
    assert concat(a, b).n_ids == 6 and concat(a, b).n_cams == 4 and concat(b, a).n_ids == 6
    assert concat(a, b, same=True).n_ids == 3 and concat(a, a).n_ids == 3 and concat(a, a, same=False).n_ids == 6
    mixed = combine_all(ReIDData(train=a, query=b[b.cams == 0], gallery=b[b.cams == 1])).train
    assert (mixed.n_ids, mixed.n_cams, len(mixed)) == (6, 4, 24)
    own = combine_all(ReIDData(train=a, query=a[a.cams == 0], gallery=a[a.cams == 1])).train   # others, same numbers
    assert (own.n_ids, own.n_cams) == (6, 2)
    q, g = (b[b.cams == c].replace(dataset=n) for c, n in ((0, 'query'), (1, 'gallery')))   # read one by one
    assert combine_all(ReIDData(train=a, query=q, gallery=g)).train.n_ids == 6
    assert make_data(query=q, gallery=g).cross_camera
    asked = tracklet_data(ReIDData(query=q, gallery=g))
    assert asked.query.n_ids == asked.gallery.n_ids == len(np.union1d(asked.query.pids, asked.gallery.pids)) == 3
    two = join(*[ReIDData(train=x, query=x, gallery=x, name=x.name) for x in (a, b)])
    assert (two.n_ids, two.n_cams) == (6, 4) and (two.pids[:12] == a.pids).all()


def test_every_loader_says_whose_numbers(tmp_path):
    site, other = (make_site('campus', n_train=4, n_test=4, height=32, width=16, seed=s) for s in (0, 1))
    assert {c.dataset for c in site.subsets.values()} == {'world:campus'}
    assert other.train.dataset == 'world:campus seed 1' and join(site, other).n_ids == 8
    root = write_market(site, tmp_path/'shop')
    assert {c.dataset for c in load('market1501', root).subsets.values()} == {'market1501'}
    assert load('market-style', root).query.dataset == 'market-style:shop'   # a layout, not a data set
    build(tmp_path/'x', 'person/camera')
    assert from_folder(tmp_path/'x').dataset == 'x' and from_regex(tmp_path/'x', '(?P<pid>ann|bob)/').dataset == 'x'
    assert {c.dataset for c in make_data(tmp_path/'x', name='mine').subsets.values()} == {'mine'}
    (tmp_path/'list.csv').write_text('path,pid\nx/ann/door/p1_c0_000.jpg,1\n')
    assert from_csv(tmp_path/'list.csv').dataset == 'list'
    ann, bob = from_folder(tmp_path/'x'/'ann', 'camera'), from_folder(tmp_path/'x'/'bob', 'camera')
    both = make_data(query=ann, gallery=bob)   # numbered together: one numbering, neither of the two
    assert both.query.dataset == both.gallery.dataset == 'ann + bob'
    with pytest.raises(ValueError, match='in two ways'): concat(both.query, ann)


class Grey(torch.nn.Module):
    size = (16, 8)
    def embed(self, x): return torch.nn.functional.adaptive_avg_pool2d(x, 4).flatten(1)


def test_galleries_keep_whose_numbers(tmp_path):
    "Saved and loaded, a file of before without the key, and new crops of the same user"
    import json

    import safetensors.torch
    crops = toy_crops(3, 2, 1, height=16, name='shop')
    path = Gallery.build(Grey(), crops).save(tmp_path/'g.safetensors')
    assert Gallery.load(path).crops.dataset == 'shop'
    with safetensors.safe_open(path, 'pt') as f:
        meta, state = json.loads(f.metadata()['gallery']), {k: f.get_tensor(k) for k in f.keys()}
    del meta['dataset']
    path.write_bytes(safetensors.torch.save(state, metadata={'gallery': json.dumps(meta)}))
    old = Gallery.load(path, Grey())
    assert old.crops.dataset == ''
    more = Gallery.build(Grey(), crops).add(toy_crops(3, 2, 1, height=16, name='shop, a day later'))
    assert (more.crops.n_ids, more.crops.n_cams, more.crops.dataset) == (3, 2, 'shop')


def drawn(top, seed, people=8):
    "A folder of drawn people with names that do not depend on the pictures"
    for p in range(people):
        for c in range(2):
            for k in range(3):
                f = top/f'p{p}'/f'cam{c}'/f'{k}.jpg'
                f.parent.mkdir(parents=True, exist_ok=True)
                shade = np.random.default_rng([seed, p, c, k]).integers(0, 255, (4, 2, 3), np.uint8)
                Image.fromarray(shade).resize((32, 64), 0).save(f)
    return make_data(top, name='mine')


def test_a_run_does_not_go_on_with_other_pictures(tmp_path):
    "Case C11: equal names, ids and cameras, other pictures"
    a, b = drawn(tmp_path/'a', 0), drawn(tmp_path/'b', 1)
    assert a.fingerprint() != b.fingerprint()
    shutil.copytree(tmp_path/'a', tmp_path/'c')
    assert make_data(tmp_path/'c', name='mine').fingerprint() == a.fingerprint()   # the folder moved
    s1, s2 = (recipe('baseline-small', epochs=e, p=4, k=2, decay='none')[1] for e in (1, 2))
    go = lambda data, s: run_experiment('baseline-small', data, tmp_path/'run', s, before=False, progress=False)
    go(a, s1)
    with pytest.raises(ValueError, match='other crops'): go(b, s2)
    go(a, s2)


@faults
@given(st.integers(1, 700), st.data())
def test_what_a_fingerprint_sees(n, data):
    "Another size is seen in every file, other bytes of equal size in the files that are read"
    i = data.draw(st.integers(0, n-1))
    read = i in {k*n//256 for k in range(256)} if n > 256 else True
    with tempfile.TemporaryDirectory() as tmp:
        files = [Path(tmp)/f'{k}.jpg' for k in range(n)]
        for f in files: f.write_bytes(b'same')
        crops = Crops(files)
        was = crops.fingerprint()
        files[i].write_bytes(b'else')
        assert (crops.fingerprint() != was) == read
        files[i].write_bytes(b'longer')
        assert crops.fingerprint() != was
        files[i].unlink()
        with pytest.raises(FileNotFoundError, match=f'{i}.jpg is missing: was the folder moved'): crops.fingerprint()


# --- splits -----------------------------------------------------------------------------------------------
@quick
@given(tables(), st.integers(0, 5), st.sampled_from([None, True, False]))
def test_every_query_has_a_match(t, seed, cross):
    try: query, gallery = split_query_gallery(t, seed, cross)
    except ValueError as e:
        real = t[t.pids > 0]
        pairs = set(zip(real.pids, real.cams))
        two = len({p for p, _ in pairs}) < len(pairs)
        assert 'no query can be made' in str(e) or 'have no camera' in str(e)
        if cross is False: assert len(real) == real.n_ids
        if cross and 'no query' in str(e): assert not two
        return
    assert sorted([*query.extra['row'], *gallery.extra['row']]) == list(range(len(t)))
    used = cross if cross is not None else real_crosses(t)
    for p, c in zip(query.pids, query.cams):
        assert p > 0 and ((gallery.pids == p) & (gallery.cams != c if used else True)).any()
    assert (split_query_gallery(t, seed, cross)[0].extra['row'] == query.extra['row']).all()
    if used:
        for p in np.unique(t.pids[t.pids > 0]):   # as many queries as can be
            n = [int(((t.pids == p) & (t.cams == c)).sum()) for c in np.unique(t.cams[t.pids == p])]
            big = sum(x > 1 for x in n)
            best = 0 if len(n) < 2 else len(n) if big >= 2 else len(n)-1
            assert (query.pids == p).sum() == best


def real_crosses(t):
    "Some person in two cameras, all cameras of people known"
    real = t[t.pids > 0]
    pairs = set(zip(real.pids, real.cams))
    return (real.cams >= 0).all() and len({p for p, _ in pairs}) < len(pairs)


@quick
@given(tables(), st.floats(0, 1), st.integers(0, 3))
def test_split_ids_shares_no_person(t, share, seed):
    try: train, test = split_ids(t, share, seed)
    except ValueError as e:
        assert t.n_ids < 2 and str(t.n_ids) in str(e)
        return
    assert len(train)+len(test) == len(t) and not set(train.pids[train.pids > 0]) & set(test.pids)


@quick
@given(tables())
def test_made_data_is_sound(t):
    "make_data never yields an error that validate finds, except what cannot be known from a table"
    if not len(t): return
    try: data = make_data(t)
    except ValueError as e:
        assert 'people' in str(e) or 'no query' in str(e) or 'are junk' in str(e)
        return
    total = sum(len(c) for c in data.subsets.values() if c is not None)
    assert total+sum(data.dropped.values()) == len(t)
    bad = [f for f in data.validate() if f.level == 'error' and 'two ids' not in f.what]
    assert not bad, bad


@quick
@given(tables(12, 3), tables(12, 3), st.booleans())
def test_unanswerable_queries_are_found(query, gallery, cross):
    "The rows of the findings are the queries a literal search cannot answer"
    findings = validate(ReIDData(query=query, gallery=gallery, cross_camera=cross))
    if not (len(query) and len(gallery) and query.labelled): return
    blind = any((((c.cams < 0) & (c.pids > 0)).any()) for c in (query, gallery))
    if cross and blind:
        assert any('unknown' in f.what and f.level == 'error' for f in findings)
        return
    found = [i for f in findings if 'queries' in f.what for i in f.rows['query']]
    slow = [i for i, (p, c) in enumerate(zip(query.pids, query.cams)) if p > 0 and not any(
        p == q and (c != d or not cross) for q, d in zip(gallery.pids, gallery.cams))]
    assert sorted(found) == slow
    if len(slow) == (query.pids > 0).sum(): assert any(f.level == 'error' for f in findings)


@quick
@given(st.lists(st.tuples(st.integers(0, 6), st.integers(1, 2)), max_size=8), st.lists(st.integers(0, 6), max_size=5))
def test_copies_are_found(train, gallery):
    "Equal bytes, their ids and parts, against a literal comparison"
    a = Crops([b'%03d' % x for x, _ in train], [p for _, p in train])
    b = Crops([b'%03d' % x for x in gallery], [9]*len(gallery))
    found = {(k, i) for f in validate(ReIDData(train=a, gallery=b)) if 'the same image' in f.what
             for k, rows in f.rows.items() for i in rows}
    every = [('train', i, x) for i, x in enumerate(a.images)]+[('gallery', i, x) for i, x in enumerate(b.images)]
    assert found == {(k, i) for k, i, x in every if sum(x == y for _, _, y in every) > 1}


# --- damaged folders --------------------------------------------------------------------------------------
DAMAGES = ('delete', 'truncate', 'zero', 'rename', 'hidden', 'foreign', 'garbage')


def damage(files, how, k):
    "Spoil one file; returns (files left as images, name of a file that must be reported or None)"
    f = files[k % len(files)]
    rest = [x for x in files if x != f]
    if how == 'delete': f.unlink(); return rest, None
    if how == 'truncate': f.write_bytes(f.read_bytes()[:len(f.read_bytes())//2]); return files, f
    if how == 'zero': f.write_bytes(b''); return files, f
    if how == 'garbage': f.write_bytes(b'no image at all'); return files, f
    if how == 'hidden': f.rename(f.with_name('.'+f.name)); return rest, None
    if how == 'foreign': f.rename(f.with_suffix('.txt')); return rest, None
    new = f.with_name(f"copy of {f.name}")
    f.rename(new)
    return [*rest, new], None


def build(root, layout):
    "A folder of twelve crops: two people in two cameras"
    files = []
    for i, x in enumerate(JPEGS):
        person, cam = ('ann', 'bob')[i % 2], ('door', 'yard')[i//2 % 2]
        sub = {'': '', 'person': person, 'person/camera': f"{person}/{cam}"}[layout]
        f = Path(root)/sub/f"p{i % 2+1}_c{i//2 % 2}_{i:03d}.jpg"
        f.parent.mkdir(parents=True, exist_ok=True)
        f.write_bytes(x)
        files.append(f)
    return files


@faults
@given(st.sampled_from(['', 'person', 'person/camera']),
       st.lists(st.tuples(st.sampled_from(DAMAGES), st.integers(0, 11)), max_size=5))
def test_damaged_folder_is_read_right_or_named(layout, damages):
    with tempfile.TemporaryDirectory() as tmp:
        root = Path(tmp)/'crops'
        files, bad = build(root, layout), set()
        for how, k in damages:
            old = files[k % len(files)]
            files, spoilt = damage(files, how, k)
            if how == 'rename' and old in bad: bad.add(files[-1])   # a renamed file stays broken
            bad.discard(old)
            if spoilt: bad.add(spoilt)
        crops = from_folder(root, layout)
        assert sorted(crops.images) == sorted(map(str, files))
        if any(how == 'foreign' for how, _ in damages): assert 'no images, left out' in crops.notes[0]
        for i in range(len(crops)):   # every image is read, or the error names it
            if Path(crops.images[i]) in bad:
                with pytest.raises(ValueError, match=Path(crops.images[i]).name): crops.image(i)
            else: assert crops.image(i).size == (8, 16)
            if layout: assert crops.extra['raw_pid'][i] in crops.images[i]
        found = {crops.images[i] for f in validate(crops, read_images=True) if f.level == 'error'
                 and ('readable' in f.what or 'zero' in f.what) for i in f.rows['train']}
        assert found == set(map(str, bad))


@faults
@given(st.lists(st.tuples(st.sampled_from(DAMAGES), st.integers(0, 11)), max_size=4), st.booleans())
def test_damaged_names_are_counted(damages, skip):
    with tempfile.TemporaryDirectory() as tmp:
        files = build(tmp, '')
        for how, k in damages: files, _ = damage(files, how, k)
        wrong = [f for f in files if f.name.startswith('copy')]
        try: crops = from_regex(tmp, r'^p(?P<pid>\d)_c(?P<cam>\d)_(?P<frame>\d+)', fps=10, skip=skip)
        except ValueError as e:
            assert wrong and f"{len(wrong)} of {len(files)} names" in str(e) and 'copy of p' in str(e)
            assert not skip or len(wrong) == len(files)
            return
        assert len(crops) == len(files)-len(wrong) and (skip or not wrong)
        for i in range(len(crops)):
            p, c, frame = crops.file_name(i)[:-4].split('_')
            assert (crops.pids[i], crops.extra['raw_cam'][i]) == (int(p[1]), c[1])
            assert crops.times[i] == int(frame)/10


@faults
@given(st.lists(st.sampled_from(['ok', 'gone', 'no pid', 'bad time', 'short']), min_size=1, max_size=6))
def test_damaged_table_names_its_line(lines):
    with tempfile.TemporaryDirectory() as tmp:
        build(tmp, '')
        path, text = Path(tmp)/'list.csv', ['path,pid,time']
        for i, kind in enumerate(lines):
            f = f"p{i % 2+1}_c{i//2 % 2}_{i:03d}.jpg"
            text.append({'ok': f"{f},ann,{i}", 'gone': f"no_{f},ann,{i}", 'no pid': f"{f},,{i}",
                         'bad time': f"{f},ann,noon", 'short': f}[kind])
        path.write_text('\n'.join(text))
        try: crops = from_csv(path)
        except (ValueError, FileNotFoundError) as e:
            kind = next(k for k in ('short', 'gone', 'bad time') if k in lines)
            assert 'list.csv' in str(e) and f"line {2+lines.index(kind)}" in str(e)
            return
        assert not {'short', 'gone', 'bad time'} & set(lines)
        assert (crops.pids > 0).tolist() == [k == 'ok' for k in lines]
        assert crops.times.tolist() == list(range(len(lines)))


def test_roots_that_are_wrong(tmp_path):
    with pytest.raises(FileNotFoundError, match='photos'): from_folder(tmp_path/'photos')
    with pytest.raises(ValueError, match='no image below'): from_folder(tmp_path)
    with pytest.raises(FileNotFoundError, match='list.csv'): from_csv(tmp_path/'list.csv')
    (tmp_path/'empty.csv').write_text('path,pid\n')
    with pytest.raises(ValueError, match='no rows'): from_csv(tmp_path/'empty.csv')
    (tmp_path/'latin.csv').write_bytes('path,pid\nmüller.jpg,1\n'.encode('latin-1'))
    with pytest.raises(ValueError, match='latin.csv is not UTF-8'): from_csv(tmp_path/'latin.csv')
    with pytest.raises(ValueError, match='not a regular expression'):
        build(tmp_path/'x', '')
        from_regex(tmp_path/'x', '(?P<pid>')


def test_links_in_circles(tmp_path):
    build(tmp_path/'x', 'person')
    (tmp_path/'x'/'loop').symlink_to(tmp_path/'x', target_is_directory=True)
    (tmp_path/'x'/'ann'/'loop').symlink_to(tmp_path/'x'/'ann', target_is_directory=True)
    assert len(list_images(tmp_path/'x')[0]) == 12


def test_parts_read_alone_are_numbered_together(tmp_path):
    for part, people in (('train', 'xy'), ('query', 'bc'), ('gallery', 'abc')):
        for k, p in enumerate(people):
            (tmp_path/part/p).mkdir(parents=True)
            (tmp_path/part/p/'1.jpg').write_bytes(JPEGS[k]+part.encode())
    data = make_data(tmp_path)
    names = {int(i): str(n) for c in data.subsets.values() for i, n in zip(c.pids, c.extra['raw_pid'])}
    assert names == {1: 'a', 2: 'b', 3: 'c', 4: 'x', 5: 'y'}
    assert not data.cross_camera and not [f for f in data.validate() if f.level == 'error']


def test_ids_that_look_special(tmp_path):
    for p in ('0', '-1', '7'):
        (tmp_path/p).mkdir()
        (tmp_path/p/'1.jpg').write_bytes(JPEGS[0])
    crops = from_folder(tmp_path)
    assert (crops.pids > 0).all() and 'distractors=' in crops.notes[0]
    crops = from_folder(tmp_path, distractors=('0',), junk=('-1',))
    assert sorted(crops.pids) == [-1, 0, 7] and not crops.notes


def test_folder_moved_after_loading(tmp_path):
    build(tmp_path/'x', 'person')
    crops = from_folder(tmp_path/'x')
    shutil.move(tmp_path/'x', tmp_path/'y')
    with pytest.raises(FileNotFoundError, match='moved'): crops.image(0)
    assert len(validate(crops)[0].rows['train']) == 12
