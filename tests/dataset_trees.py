"""Small trees in the true layouts of the public datasets, and what must come out of them, read the slow way.

`make(name, seed)` gives `Tree`: `files` maps path -> bytes, `truth(files)` maps part -> rows
(person, camera, seconds, file, frame, tracklet), computed from whatever files are left. `truth` raises `Broken`
where loading must fail. Nothing here uses `reidnb`."""
import io
import random
import re
from dataclasses import dataclass
from typing import Callable

import numpy as np
from PIL import Image
from scipy.io import loadmat, savemat

IMAGE = ('.jpg', '.jpeg', '.png', '.bmp')


class Broken(Exception):
    "Loading must fail"


@dataclass
class Tree:
    name: str
    files: dict
    truth: Callable
    folders: tuple      # names that the folder may have


def jpeg(k, kind='JPEG'):
    out = io.BytesIO()
    Image.new('RGB', (4, 8), (k*37 % 256, k*91 % 256, k*11 % 256)).save(out, kind)
    return out.getvalue()


PIXELS = [jpeg(k) for k in range(24)]


def mat(**variables):
    out = io.BytesIO()
    savemat(out, variables)
    return out.getvalue()


def read(files, path, *names):
    if path not in files: raise Broken
    try: out = loadmat(io.BytesIO(files[path]), variable_names=names)
    except Exception as e: raise Broken from e
    if any(n not in out for n in names): raise Broken
    return [out[n] for n in names]


def lines(files, path, n=1):
    if path not in files: raise Broken
    try: rows = [x.rsplit(maxsplit=n) for x in files[path].decode().splitlines() if x.strip()]
    except UnicodeDecodeError as e: raise Broken from e
    if not rows or any(len(r) != n+1 or not all(re.fullmatch(r'-?\d+', x) for x in r[1:]) for r in rows): raise Broken
    return [(r[0], *map(int, r[1:])) for r in rows]


def below(files, top):
    "Images below a folder, sorted"
    out = sorted(f for f in files if f.startswith(top+'/') and f.lower().endswith(IMAGE))
    if not out: raise Broken
    return out


def base(path): return path.rpartition('/')[2]


def known(attrs, paths):
    "Facts of paths, whatever their case; a stranger breaks"
    low = {k.lower(): v for k, v in attrs.items()}
    if any(p.lower() not in low for p in paths): raise Broken
    return [(p, low[p.lower()]) for p in paths]


def pictures(paths): return {p: PIXELS[i % 24] for i, p in enumerate(paths)}


# ------------------------------------------------------------------ one folder a part

def flat(r, name, parts, make_name, people, cams, seconds=None, junk=False, distractors=False, prefix=''):
    attrs = {}
    for part, sub in parts.items():
        own = people[:len(people)//2] if part == 'train' else people[len(people)//2:]
        if part == 'gallery': own = own+([0] if distractors else [])+([-1] if junk else [])
        for _ in range(r.randint(2, 7)):
            p, c, s, f = r.choice(own), r.choice(cams), r.randint(1, 3), r.randint(0, 99999)
            attrs[f"{prefix}{sub}/{make_name(p, c, s, f, r)}"] = dict(part=part, pid=p, cam=cams.index(c), s=s, f=f)

    def truth(files):
        out = {}
        have = {part: known(attrs, below(files, prefix+sub)) for part, sub in parts.items()}
        for part, rows in have.items():
            if any(p.count('/') != (prefix+parts[part]).count('/')+1 for p, _ in rows): raise Broken
        every = [a for rows in have.values() for _, a in rows]
        for part, rows in have.items():
            out[part] = [(a['pid'], a['cam'], seconds(a, every) if seconds else None, base(p), None, None)
                         for p, a in rows if a['pid'] != -1]
        return out
    return pictures(attrs), truth


THREE = {'train': 'bounding_box_train', 'query': 'query', 'gallery': 'bounding_box_test'}
DUKE = [5542, 3606, 27243, 31181, 0, 22401, 18967, 46765]


def market_seconds(a, every):
    last = {}
    for b in every: last[b['cam'], b['s']] = max(last.get((b['cam'], b['s']), 0), b['f'])
    return (a['f']+sum(last.get((a['cam'], k), 0) for k in range(1, a['s'])))/25


def duke_seconds(a, every=None): return (a['f']+DUKE[a['cam']])/59.94


def market1501(r):
    def name(p, c, s, f, r): return f"{'-1' if p == -1 else f'{p:04d}'}_c{c}s{s}_{f:06d}_{r.randint(0, 9):02d}.jpg"+r.choice(['', '', '.jpg'])
    return flat(r, 'market1501', THREE, name, [1, 2, 3, 4], [1, 2, 3, 4, 5, 6], market_seconds, True, True)


def market_style(r):
    def name(p, c, s, f, r): return f"{p:04d}_c{c}_{f}_{r.randint(0, 9)}.png"
    return flat(r, 'market-style', THREE, name, [1, 2, 3, 4], list(range(1, 21)), None, False, True)


def duke(r):
    def name(p, c, s, f, r): return f"{p:04d}_c{c}_f{f:07d}.jpg"
    return flat(r, 'duke', THREE, name, [1, 2, 3, 7139], list(range(1, 9)), duke_seconds)


def personx(r):
    def name(p, c, s, f, r): return f"{p:04d}_c{c}s1_{f}.jpg"
    return flat(r, 'personx', THREE, name, [1, 2, 3, 4], [3, 4, 8, 10, 11, 12])


def msmt_market(r):
    def name(p, c, s, f, r): return f"{p:04d}_c{c:02d}_{f}.jpg"
    return flat(r, 'msmt17-market', THREE, name, [1, 2, 3, 4], list(range(1, 16)))


def cuhk_folders(r):
    def name(p, c, s, f, r): return f"{p:04d}_c{c}_{f}.png"
    return flat(r, 'cuhk', THREE, name, [1, 2, 3, 4], [1, 2], prefix=r.choice(['', 'detected/', 'cuhk03_np_detected/']))


def clonedperson(r):
    first = {2: 0, 4: 4, 5: 8, 9: 12, 11: 16, 12: 20}
    def name(p, c, s, f, r): return f"{p:06d}_s{c[0]:02d}_c{c[1]:02d}_f{f:06d}.jpg"
    pairs = sorted(((s, c) for s in first for c in range(4)), key=lambda x: first[x[0]]+x[1])
    return flat(r, 'clonedperson', {'train': 'train', 'query': 'test/query', 'gallery': 'test/gallery'}, name,
                [700000, 700001, 705227, 705228], pairs, lambda a, e: a['f']/24)


def randperson(r):
    start = [0, 160000, 340000, 490000, 640000, 1070000, 1330000, 1590000, 1890000, 3190000, 3490000]
    n = [2, 2, 2, 2, 1, 1, 2, 1, 1, 1, 4]
    pairs = [(s, c) for s in range(11) for c in range(n[s])]
    swap = r.random() < .5
    def name(p, c, s, f, r):
        a, b = f"s{c[0]:02d}", f"c{c[1]:02d}"
        return f"{p-1:06d}_{b if swap else a}_{a if swap else b}_f{f:06d}.jpg"
    return flat(r, 'randperson', {'train': r.choice(['subset', 'randperson_subset', 'images/subset'])}, name, [1, 2, 3, 8000],
                pairs, lambda a, e: (start[pairs[a['cam']][0]]+a['f'])/24)


# ------------------------------------------------------------------ lists

def msmt(r, train, test):
    attrs, lists = {}, {k: [] for k in ('train', 'val', 'query', 'gallery')}
    for k in lists:
        for _ in range(r.randint(1, 4)):
            p, c, f = r.randint(0, 3), r.randint(1, 15), r.randint(0, 9999)
            rel = f"{p:04d}/{p:04d}_{r.randint(0, 99):03d}_{c:02d}_0{r.randint(1, 9)}{r.randint(10, 28)}" \
                  f"{r.choice(['morning', 'noon', 'afternoon'])}_{f:04d}_{r.randint(0, 3)}.jpg"
            top = train if k in ('train', 'val') else test
            if f"{top}/{rel}" in attrs: continue
            attrs[f"{top}/{rel}"] = c-1
            lists[k].append(f"{rel} {p}")
    files = pictures(attrs) | {f"list_{k}.txt": '\n'.join(v).encode() for k, v in lists.items()}

    def truth(files):
        out, after = {}, 1041
        for part, ls in (('train', ['train', 'val']), ('query', ['query']), ('gallery', ['gallery'])):
            top, rows = (train if part == 'train' else test), []
            there = below(files, top)
            if part == 'train' and any(f"list_{x}.txt" not in files for x in ls):
                there = [f[len(top)+1:] for f in there]
                if not all(re.fullmatch(r'\d+/[^/]+', f) for f in there): raise Broken
                rows = [(f, int(f.split('/')[0])) for f in there]
            else:
                for x in ls: rows += lines(files, f"list_{x}.txt")
            rows = [(f"{top}/{f}", p) for f, p in rows if f"{top}/{f}" in files and f.lower().endswith(IMAGE)]
            if not rows: raise Broken
            low = {k.lower(): v for k, v in attrs.items()}
            if any(f.lower() not in low or p < 0 for f, p in rows): raise Broken
            if part == 'train': after = max(after, max(p for _, p in rows)+1)
            out[part] = [(p+1+(0 if part == 'train' else after), low[f.lower()], None, base(f), None, None) for f, p in rows]
        return out
    return files, truth


def unreal(r):
    attrs, text = {}, []
    for _ in range(r.randint(1, 6)):
        p, c = r.randint(0, 20), r.randint(0, 33)
        f = f"unreal_v{r.randint(1, 4)}.{r.randint(1, 3)}/images/{p}_c{c:03d}_{r.randint(0, 999)}.jpg"
        if f in attrs: continue
        attrs[f] = c
        text.append(f"{f} {p} {c}")
    files = pictures(attrs) | {'list_unreal_train.txt': '\n'.join(text).encode()}

    def truth(files):
        rows = [x for x in lines(files, 'list_unreal_train.txt', 2)]
        if any(p < 0 or not 0 <= c < 34 for _, p, c in rows): raise Broken
        rows = [x for x in rows if x[0] in files]
        if not rows: raise Broken
        return {'train': [(p+1, c, None, base(f), None, None) for f, p, c in rows]}
    return files, truth


# ------------------------------------------------------------------ CUHK03 from .mat

def cell(items, shape=None):
    out = np.empty(len(items), object)
    for i, x in enumerate(items): out[i] = x
    return out.reshape(shape or (-1, 1))


def hdf5(variables):
    "The same as a file of version 7.3"
    import h5py
    out = io.BytesIO()
    with h5py.File(out, 'w') as f:
        refs = f.create_group('#refs#')
        def put(group, name, x):
            x = np.asarray(x) if not isinstance(x, np.ndarray) else x
            if x.dtype.kind == 'U':
                d = group.create_dataset(name, data=np.array([[ord(c)] for c in str(x.ravel()[0])], np.uint16))
                d.attrs['MATLAB_class'] = np.bytes_(b'char')
            elif x.dtype == object:
                d = group.create_dataset(name, x.T.shape, dtype=h5py.ref_dtype)
                for i, v in np.ndenumerate(x.T): d[i] = put(refs, f"r{len(refs)}", v).ref
            elif x.size == 0:
                d = group.create_dataset(name, data=np.array([0, 0], np.uint64)); d.attrs['MATLAB_empty'] = 1
            else: d = group.create_dataset(name, data=x.T)
            return d
        for k, v in variables.items(): put(f, k, v)
    return out.getvalue()


def cuhk_mat(r, kind):
    new = r.random() < .4
    try: import h5py # noqa: F401
    except ImportError: new = False
    pairs, listed = [], []
    for pair in range(1, 6):
        rows = r.randint(1, 3)
        pictures = np.empty((rows, 10), object)
        for i, j in np.ndindex(rows, 10):
            empty = r.random() < .7
            pictures[i, j] = np.zeros((0, 0)) if empty else np.full((3, 2, 3), r.randint(0, 255), np.uint8)
            view, column = 1+(j > 4), j+1
            if not empty or r.random() < .05:
                listed.append((f"{pair}_{i+1:03d}_{view}_{column:02d}.png", 10*pair+i, view-1, not empty))
        pairs.append(pictures)
    if not any(x[3] for x in listed): listed.append(('1_001_1_01.png', 10, 0, True)); pairs[0][0, 0] = np.zeros((3, 2, 3), np.uint8)
    part = [r.choice(['train', 'query', 'gallery']) for _ in listed]
    index = {k: [i+1 for i, x in enumerate(part) if x == k] for k in ('train', 'query', 'gallery')}
    for k in index:
        if not any(listed[i-1][3] for i in index[k]): index[k] = [next(i+1 for i, x in enumerate(listed) if x[3])]
    split = mat(filelist=cell([x[0] for x in listed]), labels=np.array([[x[1]] for x in listed]),
                **{f"{k}_idx": np.array(v)[:, None] for k, v in index.items()})
    key = {'detected': 'detected', 'labelled': 'labeled'}[kind]
    pixels = (hdf5 if new else lambda v: mat(**v))({key: cell(pairs, (5, 1))})
    where = r.choice(['cuhk-03.mat', 'cuhk03_release/cuhk-03.mat'])
    other = f"cuhk03_new_protocol_config_{key}.mat"
    whole = {where: pixels, other: split}

    def truth(files):
        if any(files.get(k) != v for k, v in whole.items()):
            if any(k not in files for k in whole) or new: raise Broken
            read(files, where, key), read(files, other, 'filelist', 'labels', 'train_idx', 'query_idx', 'gallery_idx')
        return {k: [(listed[i-1][1], listed[i-1][2], None, listed[i-1][0], None, None) for i in v if listed[i-1][3]]
                for k, v in index.items()}
    return dict(whole), truth


# ------------------------------------------------------------------ two sides

def half(ids, split):
    ids = sorted(set(ids))
    return set(sorted(ids, key=lambda i: np.random.default_rng([split, i]).random())[:len(ids)//2])


def ask(rows, train, asks):
    "rows: (path, pid, cam, side)"
    both = {p for _, p, _, s in rows if s == 0 and p > 0} & {p for _, p, _, s in rows if s == 1 and p > 0}
    out = {'train': [], 'query': [], 'gallery': []}
    for f, p, c, s in rows:
        row = (p, c, None, base(f), None, None)
        if p in both and p in train: out['train'].append(row)
        elif p in both and s == asks: out['query'].append(row)
        elif s != asks and (p in both or p == 0): out['gallery'].append(row)
    return out


def viper(r, split):
    attrs = {}
    for p in r.sample(range(0, 900), r.randint(2, 8)):
        for k, s in enumerate('ab'): attrs[f"cam_{s}/{p:03d}_{r.choice([0, 45, 90])}.bmp"] = (p+1, k, k)
    def truth(files):
        rows = [(f, *a) for s in 'ab' for f, a in known(attrs, below(files, f"cam_{s}"))]
        return ask(rows, half([x[1] for x in rows], split//2), split % 2)
    return pictures(attrs), truth


def prid(r, split):
    attrs = {}
    for k, s in enumerate('ab'):
        for p in sorted({1, 2, 3, *r.sample(range(4, 750), 8)}): attrs[f"single_shot/cam_{s}/person_{p:04d}.png"] = (p, k, k)
    def truth(files):
        rows = [(f, *a) for s in 'ab' for f, a in known(attrs, below(files, f"single_shot/cam_{s}"))]
        train = half([p for _, p, _, _ in rows if p <= 200], split)
        return ask([(f, p if p <= 200 else 0 if s == 1 else -2, c, s) for f, p, c, s in rows], train, 0)
    return pictures(attrs), truth


def cuhk01(r, split):
    attrs = {f"campus/{p:04d}00{k}.png": (p, (k-1)//2, (k-1)//2) for p in r.sample(range(1, 972), r.randint(2, 7)) for k in (1, 2, 3, 4)}
    def truth(files):
        rows = [(f, *a) for f, a in known(attrs, below(files, 'campus'))]
        return ask(rows, half([x[1] for x in rows], split), 0)
    return pictures(attrs), truth


def grid(r, split):
    people = r.sample(range(1, 251), r.randint(2, 6))
    attrs = {}
    for k, d in enumerate(('probe', 'gallery')):
        for p in people:
            c = r.randint(1, 8)
            attrs[f"{d}/{p:04d}_{c}_{r.randint(0, 99999)}.jpeg"] = (p, c-1, k)
    for _ in range(r.randint(0, 4)):
        c = r.randint(1, 8)
        attrs[f"gallery/0000_{c}_{r.randint(0, 99999)}.jpeg"] = (0, c-1, 1)
    train = [sorted(r.sample(people, len(people)//2)) for _ in range(10)]
    deep = r.random() < .5
    value = cell([{'a': [[1.5]], 'b': [[0]], 'c': [t]} if deep else np.array([t]) for t in train], (1, 10))
    files = pictures(attrs) | {'features_and_partitions.mat': mat(trainIdxAll=value)}
    def truth(files):
        rows = [(f, *a) for d in ('probe', 'gallery') for f, a in known(attrs, below(files, d))]
        read(files, 'features_and_partitions.mat', 'trainIdxAll')
        if not set(train[split]) & {p for _, p, _, s in rows if s == 0}: raise Broken
        return ask(rows, set(train[split]), 0)
    return files, truth


# ------------------------------------------------------------------ video

def mars(r):
    files, table = {}, {}
    for part in ('train', 'test'):
        names, rows = [], []
        for t in range(r.randint(2, 5)):
            p = r.choice([1, 2] if part == 'train' else [3, 4, 0, -1])
            c, n = r.randint(1, 6), r.randint(1, 4)
            rows.append([len(names)+1, len(names)+n, p, c])
            names += [f"{'00-1' if p == -1 else f'{p:04d}'}C{c}T{t:04d}F{k+1:03d}.jpg" for k in range(n)]
        files |= pictures([f"bbox_{part}/{n[:4]}/{n}" for n in names])
        files[f"info/{part}_name.txt"] = '\n'.join(names).encode()
        files[f"info/tracks_{part}_info.mat"] = mat(**{f"track_{part}_info": np.array(rows)})
        table[part] = len(rows)
    query = sorted(r.sample(range(1, table['test']+1), r.randint(1, table['test'])))
    files['info/query_IDX.mat'] = mat(query_IDX=np.array([query]))

    def truth(files):
        out = {'train': [], 'query': [], 'gallery': []}
        asked, = read(files, 'info/query_IDX.mat', 'query_IDX')
        for part in ('train', 'test'):
            if f"info/{part}_name.txt" not in files: raise Broken
            names = files[f"info/{part}_name.txt"].decode('utf-8', 'replace').split()
            rows, = read(files, f"info/tracks_{part}_info.mat", f"track_{part}_info")
            there, n = set(below(files, f"bbox_{part}")), 0
            for t, (a, b, p, c) in enumerate(np.asarray(rows, int).tolist()):
                if b > len(names): raise Broken
                for f in names[a-1:b]:
                    m = re.fullmatch(r'(00-1|\d{4})C(\d)T(\d+)F(\d+)\..*', f)
                    if not m or int(m[1].replace('00-1', '-1')) != p or int(m[2]) != c: raise Broken
                    if f"bbox_{part}/{f[:4]}/{f}" not in there: continue
                    n += 1
                    to = 'train' if part == 'train' else 'query' if t+1 in asked else 'gallery'
                    if p != -1: out[to].append((p, c-1, None, f, int(m[4]), (part, t)))
            if not n: raise Broken
        return out
    return files, truth


def duke_video(r):
    attrs = {}
    for part, people in (('train', [1, 2]), ('query', [3, 4]), ('gallery', [3, 4, 7000])):
        for t in range(r.randint(1, 4)):
            p, c = r.choice(people), r.randint(1, 8)
            first, x = r.choice([1, 2]), r.randint(1, 90000)
            for k in range(r.randint(1, 3)):
                u = r.choice(['', '_'])
                attrs[f"{part}/{p:04d}/{t+1:04d}/{p:04d}{u}C{c}{u}F{first+k:04d}{u}X{x+12*k}.jpg"] = \
                    dict(pid=p, cam=c-1, frame=first+k, f=x+12*k, track=(part, p, t))
    def truth(files):
        return {part: [(a['pid'], a['cam'], duke_seconds(a), base(f), a['frame'], a['track'])
                       for f, a in known(attrs, below(files, part))] for part in ('train', 'query', 'gallery')}
    return pictures(attrs), truth


def first_asks(rows, train, test):
    out = {'train': [], 'query': [], 'gallery': []}
    for f, (p, c, k) in rows:
        to = 'train' if p in train else ('query', 'gallery')[c] if p in test else None
        if to: out[to].append((p, c, None, base(f), k, (p, c)))
    return out


def ilids(r, split):
    people = sorted(r.sample(range(1, 320), 2*r.randint(1, 3)))
    top, attrs = r.choice(['sequences', 'i-LIDS-VID/sequences']), {}
    for c in (0, 1):
        for p in people:
            for k in range(r.randint(1, 3)): attrs[f"{top}/cam{c+1}/person{p:03d}/cam{c+1}_person{p:03d}_{317+k:05d}.png"] = (p, c, 317+k)
    sets = [r.sample(range(1, len(people)+1), len(people)) for _ in range(10)]
    where = r.choice(['', 'train-test people splits/'])+'train_test_splits_ilidsvid.mat'
    def truth(files):
        rows = [x for c in (1, 2) for x in known(attrs, below(files, f"{top}/cam{c}"))]
        order = np.asarray(read(files, where, 'ls_set')[0])
        if order.shape != (10, len(people)): raise Broken
        for c in (0, 1):
            if sorted({p for _, (p, k, _) in rows if k == c}) != people: raise Broken
        order = [people[i-1] for i in order[split]]
        return first_asks(rows, set(order[len(order)//2:]), set(order[:len(order)//2]))
    return pictures(attrs) | {where: mat(ls_set=np.array(sets))}, truth


def prid_video(r, split):
    attrs, top = {}, r.choice(['multi_shot', 'prid_2011/multi_shot'])
    for i, p in enumerate([*r.sample(range(1, 201), r.randint(3, 4)), 201, 400]):
        for c in (0, 1):
            for k in range(21 if i < 2 else r.choice([21, 22, 20])):
                attrs[f"{top}/cam_{'ab'[c]}/person_{p:04d}/{k+1:04d}.png"] = (p, c, k+1)
    def truth(files):
        rows = [x for s in 'ab' for x in known(attrs, below(files, f"{top}/cam_{s}"))]
        n = {}
        for _, (p, c, _) in rows: n[p, c] = n.get((p, c), 0)+1
        people = [p for p in {a[0] for _, a in rows} if p <= 200 and min(n.get((p, 0), 0), n.get((p, 1), 0)) > 20]
        if len(people) < 2: raise Broken
        train = half(people, split)
        return first_asks(rows, train, set(people)-train)
    return pictures(attrs), truth


def lsvid(r):
    paths, lists, cams = [], {'train': [], 'test': []}, {}
    for part in lists:
        for t in range(r.randint(1, 4)):
            p, c = (r.choice([0, 1]) if part == 'train' else r.choice([2, 3, -1])), r.randint(1, 15)
            prefix = f"{part}/{max(p, 0):04d}/{max(p, 0):04d}_{t:03d}_{c:02d}_0303"
            cams[prefix] = c-1
            lists[part].append(f"{prefix} {p}")
            paths += [f"{prefix}{r.choice(['morning', 'noon'])}_{k:04d}_0.jpg" for k in range(r.randint(1, 4))]
    n = len(lists['test'])
    query = sorted(r.sample(range(1, n+1), r.randint(1, n)))
    new = r.random() < .5
    try: import h5py # noqa: F401
    except ImportError: new = False
    value = np.array([query], float)
    where = r.choice(['info/data/info_test.mat', 'test/data/info_test.mat'])
    top = r.choice(['', 'info/'])
    whole = (hdf5 if new else lambda v: mat(**v))({'query': value})
    files = pictures(paths) | {where: whole} | {f"{top}list_sequence/list_seq_{k}.txt": '\n'.join(v).encode() for k, v in lists.items()}

    def truth(files):
        out, after = {'train': [], 'query': [], 'gallery': []}, 0
        if where not in files: raise Broken
        if files[where] != whole:
            if new: raise Broken
            read(files, where, 'query')
        images = sorted(f for f in files if f.lower().endswith(IMAGE))
        for part in ('train', 'test'):
            rows, seen = lines(files, f"{top}list_sequence/list_seq_{part}.txt"), []
            for t, (prefix, p) in enumerate(rows):
                frames = [f for f in images if f.startswith(prefix)]
                seen += frames
                if p < -1: raise Broken
                for k, f in enumerate(frames):
                    m = re.fullmatch(r'\d+_\d+_(\d+)_\d{4}(morning|noon)_\d+_\d\.jpg', base(f), re.I)
                    if not m: raise Broken
                    to = 'train' if part == 'train' else 'query' if t+1 in query else 'gallery'
                    if part == 'train': after = max(after, p+1)
                    if p != -1: out[to].append([p+1, int(m[1])-1, None, base(f), k, (part, t)])
            if not seen or len(set(seen)) < len(seen): raise Broken
            if part == 'test' and len(rows) < max(query): raise Broken
        for k in ('query', 'gallery'):
            for x in out[k]: x[0] += after
        return {k: [tuple(x) for x in v] for k, v in out.items()}
    return files, truth


MAKERS = {
    'market1501': market1501, 'market-style': market_style, 'dukemtmc-reid': duke, 'personx': personx,
    'msmt17-market': msmt_market, 'cuhk03-np-detected': lambda r: r.choice([cuhk_folders, lambda r: cuhk_mat(r, 'detected')])(r),
    'cuhk03-np-labelled': lambda r: cuhk_mat(r, 'labelled'), 'clonedperson': clonedperson, 'randperson': randperson,
    'msmt17-v1': lambda r: msmt(r, 'train', 'test'), 'msmt17-v2': lambda r: msmt(r, 'mask_train_v2', 'mask_test_v2'),
    'unrealperson': unreal, 'viper': viper, 'prid2011': prid, 'cuhk01': cuhk01, 'grid': grid, 'mars': mars,
    'dukemtmc-videoreid': duke_video, 'ilids-vid': ilids, 'prid2011-video': prid_video, 'ls-vid': lsvid,
}
SPLITS = {'viper': 20, 'prid2011': 10, 'cuhk01': 10, 'grid': 10, 'ilids-vid': 10, 'prid2011-video': 10}
FOLDERS = {
    'market1501': ('market1501', 'Market-1501-v15.09.15', 'market'), 'market-style': ('market-style',),
    'dukemtmc-reid': ('DukeMTMC-reID', 'dukemtmc', 'duke'), 'personx': ('PersonX',), 'msmt17-market': ('msmt17', 'msmt'),
    'cuhk03-np-detected': ('cuhk03', 'CUHK03-NP'), 'cuhk03-np-labelled': ('cuhk03',), 'clonedperson': ('ClonedPerson',),
    'randperson': ('RandPerson',), 'msmt17-v1': ('MSMT17_V1', 'msmt17'), 'msmt17-v2': ('MSMT17_V2', 'msmt'),
    'unrealperson': ('unreal', 'UnrealPerson'), 'viper': ('VIPeR',), 'prid2011': ('prid_2011', 'prid2011'), 'cuhk01': ('CUHK01',),
    'grid': ('underground_reid', 'GRID'), 'mars': ('mars', 'MARS'), 'dukemtmc-videoreid': ('DukeMTMC-VideoReID',),
    'ilids-vid': ('ilids-vid', 'iLIDS-VID'), 'prid2011-video': ('prid2011', 'prid_2011'), 'ls-vid': ('LS-VID', 'lsvid'),
}


def make(name, seed=0, split=None):
    "A tree of a dataset; the same for the same seed"
    r = random.Random(f"{name} {seed}")
    files, truth = MAKERS[name](r, split or 0) if name in SPLITS else MAKERS[name](r)
    return Tree(name, files, truth, FOLDERS[name])


def same_walks(rows):
    "Name a tracklet by its first file, so that numbers do not matter"
    first = {}
    for row in rows: first[row[5]] = min(first.get(row[5], row[3]), row[3])
    return sorted((p, c, t if t is None else round(t, 6), f, k, first[w] if w is not None else None) for p, c, t, f, k, w in rows)
