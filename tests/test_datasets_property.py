"""Random trees of every public dataset, damaged at random: loading gives the truth, or a message that names the path.

More cases, with a count at the end: `REIDNB_CASES=10000 pytest -s tests/test_datasets_property.py`."""
import collections
import os
import random
import re
import tempfile
import warnings
import zipfile
from pathlib import Path

import numpy as np
import pytest
from dataset_trees import MAKERS, SPLITS, Broken, make, same_walks
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from reidnb.datasets.catalogue import DATASETS, load

CASES = int(os.environ.get('REIDNB_CASES', 300))
HARMLESS = ('none', 'note', 'hidden', 'empty folder', 'truncate image', 'zero image')
DAMAGE = ('remove', 'remove', 'truncate', 'zero', 'rename', 'swap case', 'extra image', 'remove folder', 'garble',
          'cut zip', *HARMLESS)
OUTCOMES = collections.Counter()


def image(path): return path.lower().endswith(('.jpg', '.jpeg', '.png', '.bmp'))


def damage(files, how, r):
    "Do one thing to a tree; the files that it touched"
    paths = sorted(p for p, data in files.items() if data is not None)
    pool = [p for p in paths if image(p)] if how.endswith(' image') and not how.startswith('extra') else paths
    if not pool: return []
    one = r.choice(pool)
    folder = one.rpartition('/')[0]
    where = f"{folder}/" if folder else ''
    if how == 'cut zip': return []
    if how == 'remove': del files[one]
    elif how in ('truncate', 'truncate image'): files[one] = files[one][:r.randint(0, max(len(files[one])-1, 0))]
    elif how in ('zero', 'zero image'): files[one] = b''
    elif how == 'garble':
        at = r.randrange(len(files[one])) if files[one] else 0
        if image(one) or one.endswith('.mat'): return []  # a changed number in a .mat file or pixel cannot be seen
        files[one] = files[one][:at]+bytes([r.choice([0, 10, 32, 45, 255])])+files[one][at+1:]
    elif how == 'rename': files[f"{where}holiday {r.randint(1, 9)}.jpg"] = files.pop(one)
    elif how == 'swap case': files[where+one.rpartition('/')[2].swapcase()] = files.pop(one)
    elif how == 'extra image': files[f"{where}{r.choice(['cat.jpg', 'IMG_0001.PNG', '1.bmp'])}"] = b'x'
    elif how == 'note': files[f"{where}{r.choice(['Thumbs.db', 'readme', 'notes.txt'])}"] = b'x'
    elif how == 'hidden': files[f"{where}.{one.rpartition('/')[2]}"] = b'x'
    elif how == 'empty folder': files[f"{r.choice([where, ''])}nothing here/"] = None
    elif how == 'remove folder':
        for p in paths:
            if folder and p.startswith(where): del files[p]
    return [one]


def write(root, files, zipped, top):
    "Write a tree into a folder or a zip file"
    if not zipped:
        for name, data in files.items():
            path = root/top/name
            if data is None: path.mkdir(parents=True, exist_ok=True); continue
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
        (root/top).mkdir(parents=True, exist_ok=True)
        return
    inside = zipped if zipped != 'flat' else ''
    (root/top).parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile((root/top).with_name(Path(top).name+'.zip'), 'w') as z:
        for name, data in files.items(): z.writestr(f"{inside}/{name}".lstrip('/'), data or b'')


def rows(data):
    "What was loaded, in the form of the truth"
    out = {}
    for k, c in data.subsets.items():
        if c is None: continue
        frame = c.extra.get('frame', np.full(len(c), -1)) if (c.tracks >= 0).any() else [None]*len(c)
        out[k] = [(int(c.pids[i]), int(c.cams[i]), float(c.times[i]) if np.isfinite(c.times[i]) else None, c.file_name(i),
                   None if frame[i] is None else int(frame[i]), int(c.tracks[i]) if c.tracks[i] >= 0 else None) for i in range(len(c))]
    return out


def check(name, seed, how, place, zipped, split):
    "One case: build, damage, load, compare"
    r = random.Random(f"{name} {seed} {how}")
    tree = make(name, seed, split)
    files = dict(tree.files)
    touched = sum((damage(files, h, r) for h in how), [])
    top = '/'.join(r.choices(tree.folders, k=place)) or '.'
    if zipped and top == '.': top = tree.folders[0]
    left = {k: v for k, v in files.items() if v is not None and not re.search(r'(^|/)\.', k)}
    with tempfile.TemporaryDirectory() as tmp, warnings.catch_warnings():
        warnings.simplefilter('ignore')
        root = Path(tmp)/'data'
        root.mkdir()
        write(root, files, zipped and r.choice(['flat', tree.folders[0]]), top)
        cut = None
        if zipped and 'cut zip' in how:
            cut = next(root.rglob('*.zip'))
            cut.write_bytes(cut.read_bytes()[:r.randint(0, cut.stat().st_size-1)])
        try: data = load(name, root, split=split)
        except (ValueError, FileNotFoundError, ImportError) as e:
            said = str(e)
            if type(e) is UnicodeDecodeError: raise
            assert str(root) in said or any(t.rpartition('/')[2] in said for t in touched), f"no path in: {said}"
            if cut:
                assert cut.name in said, f"no name of the zip file in: {said}"
                return 'refused, with the path'
            try: tree.truth(left)
            except Broken: return 'refused, with the path'
            assert any(h not in HARMLESS for h in how), f"refused without need: {said}"
            raise AssertionError(f"refused, but the truth can be read: {said}") from e
        assert not cut, 'a zip file that is cut cannot be read'
        want = tree.truth(left)
        got = rows(data)
        assert {k: same_walks(v) for k, v in got.items()} == {k: same_walks(v) for k, v in want.items()}
        for c in data.subsets.values():
            for i in range(len(c) if c is not None else 0):
                content = c.images[i] if isinstance(c.images[i], bytes) else Path(c.images[i]).read_bytes()
                if len(content) >= 40: continue
                with pytest.raises(ValueError, match=re.escape(c.file_name(i))): c.image(i)
        if DATASETS[name].counts: assert any('WARNING' in n for n in data.notes)
        return 'read, equal to the truth'


cases = st.tuples(st.sampled_from(sorted(MAKERS)), st.integers(0, 10**6), st.lists(st.sampled_from(DAMAGE), min_size=1, max_size=3),
                  st.integers(0, 2), st.sampled_from([False, False, True]), st.integers(0, 19))


@settings(max_examples=CASES, deadline=None, suppress_health_check=list(HealthCheck), print_blob=True)
@given(cases)
def test_truth_or_a_message_with_the_path(case):
    name, seed, how, place, zipped, split = case
    OUTCOMES['cases'] += 1
    outcome = check(name, seed, how, place, zipped, split % SPLITS[name] if name in SPLITS else None)
    OUTCOMES[outcome] += 1
    OUTCOMES[f"  damaged, {outcome}"] += any(h not in HARMLESS for h in how)


@pytest.mark.parametrize('name', sorted(MAKERS))
def test_an_untouched_tree_is_read(name):
    "No excuse without damage: folder and zip file, nested or not"
    for seed in range(3):
        for place, zipped in ((0, False), (1, True), (2, False)):
            assert check(name, seed, [], place, zipped, seed if name in SPLITS else None).startswith('read')


def test_every_dataset_has_a_tree(): assert set(MAKERS) == set(DATASETS)


def test_print_the_count():
    "The last test: what became of the cases (shown with -s)"
    for k, n in OUTCOMES.items(): print(f"{n:7,} {k}")
