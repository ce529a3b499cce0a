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
from reidnb.data.splits import split_ids, split_query_gallery

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
