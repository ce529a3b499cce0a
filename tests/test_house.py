"The house rules: package equals notebooks, notebooks are clean, and the hard limits of the style hold."
import ast
import importlib
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
NOTEBOOKS = sorted(p for p in (ROOT / 'nbs').rglob('*.ipynb') if '.ipynb_checkpoints' not in p.parts)
DIRECTIVE = re.compile(r'^\s*#\s*\|\s*([\w-]+)')
TEST = re.compile(r'^\s*(assert\b|test_\w+\(|with (expect_fail|pytest\.raises)|torch\.testing\.|np\.testing\.)')


def source(cell): return ''.join(cell['source'])
def directives(cell): return {m[1] for line in source(cell).splitlines()[:6] if (m := DIRECTIVE.match(line))}
def name(path): return str(path.relative_to(ROOT / 'nbs'))


@pytest.fixture(scope='module')
def copy(tmp_path_factory):
    "A copy of the project in which the package is exported and the notebooks are cleaned anew"
    d = tmp_path_factory.mktemp('copy')
    for f in ('settings.ini', 'pyproject.toml', 'setup.py'): shutil.copy(ROOT / f, d)
    shutil.copytree(ROOT / 'nbs', d / 'nbs', ignore=shutil.ignore_patterns('.ipynb_checkpoints'))
    shutil.copytree(ROOT / 'reidnb', d / 'reidnb', ignore=shutil.ignore_patterns('__pycache__'))
    for f in (d / 'reidnb').rglob('*.py'):
        if f.name not in ('__init__.py', '__main__.py'): f.unlink()
    code = 'from nbdev.doclinks import nbdev_export; nbdev_export(); from nbdev.clean import nbdev_clean; nbdev_clean()'
    subprocess.run([sys.executable, '-c', code], cwd=d, check=True)
    return d


def test_package_equals_notebooks(copy):
    def modules(root): return {p.relative_to(root).as_posix(): p.read_text() for p in (root / 'reidnb').rglob('*.py')}
    here, there = modules(ROOT), modules(copy)
    differ = sorted(k for k in here.keys() | there.keys() if here.get(k) != there.get(k))
    assert not differ, f'run nbdev_export and commit; these differ from what the notebooks export: {differ}'


def test_notebooks_are_clean(copy):
    dirty = [name(p) for p in NOTEBOOKS if p.read_text() != (copy / 'nbs' / name(p)).read_text()]
    assert not dirty, f'run nbdev_clean and commit: {dirty}'


def exported(cells):
    "Exported cells with their syntax trees"
    return [(c, ast.parse(source(c))) for c in cells if directives(c) & {'export', 'exports', 'exporti'}]


def public(tree):
    return [n for n in tree.body if isinstance(n, (ast.FunctionDef, ast.ClassDef)) and not n.name.startswith('_')]


def undocumented(fn, lines):
    args = [a for a in fn.args.posonlyargs + fn.args.args + fn.args.kwonlyargs if a.arg not in ('self', 'cls')]
    return [a.arg for a in args if '#' not in lines[a.lineno - 1]]


# Python, torch and the contract of a method say once what these do: no docstring is asked for, docments are
INHERITED = {'__init__', 'forward', 'extra_repr', 'epoch', 'loss', 'embed', 'distance', 'after_batch', 'after_step', 'before_load', 'check', 'train'}


def methods(node):
    "A function itself; of a class its constructor and every public method"
    if isinstance(node, ast.FunctionDef): return [node]
    fs = [f for f in node.body if isinstance(f, ast.FunctionDef)]
    return [f for f in fs if f.name == '__init__' or not f.name.startswith('_')]


def faults(path):
    "Every hard limit that a notebook breaks, in words"
    text = path.read_text()
    cells = json.loads(text)['cells']
    code = [c for c in cells if c['cell_type'] == 'code' and source(c).strip()]
    out = []
    def limit(what, value, most): out.append(f'{value} {what}, limit {most}') if value > most else None
    limit('cells', len(cells), 110)
    if 'widgets' in json.loads(text)['metadata']: out.append('holds the state of widgets')
    limit('bytes', len(text.encode()), 600_000 if {'methods', 'results'} & set(path.parts) else 250_000)
    if 'methods' in path.parts: limit('cells of a chapter', len(cells), 60)
    if {'results', 'tutorials'} & set(path.parts) and exported(cells): out.append('exports something')
    limit('hidden cells', sum('hide' in directives(c) for c in code), 8)
    limit('characters in a line', max((len(s) for c in code for s in source(c).splitlines()), default=0), 110)
    markdown = sum(c['cell_type'] == 'markdown' for c in cells) / len(cells)
    if markdown < .25: out.append(f'{markdown:.0%} markdown, at least 25 %')
    symbols, tests = 0, sum(bool(TEST.match(s)) for c in code for s in source(c).splitlines())
    for c, tree in exported(code):
        lines = source(c).splitlines()
        limit('lines in an exported cell', sum(bool(s.strip()) and not DIRECTIVE.match(s) for s in lines), 40)
        for n in public(tree):
            symbols += 1
            if not ast.get_docstring(n): out.append(f'{n.name} has no docstring')
            for f in methods(n):
                out += [f'{n.name}.{f.name}({a}) has no docment' for a in undocumented(f, lines)]
                if f.name not in INHERITED and not ast.get_docstring(f): out.append(f'{n.name}.{f.name} has no docstring')
    limit('exported symbols', symbols, 15)
    if tests < symbols: out.append(f'{tests} tests for {symbols} exported symbols')
    if any(o['output_type'] == 'error' for c in code for o in c.get('outputs', [])): out.append('a saved error output')
    if any(s in text for s in ('/work/', '/root/', '/home/', '/tmp/')): out.append('a path of somebody\'s machine')
    return out


@pytest.mark.parametrize('path', NOTEBOOKS, ids=name)
def test_hard_limits(path): assert not faults(path)


def test_numbers_never_repeat():
    "Notebook numbers order the book: unique inside a folder, two digits, and not in the title"
    for folder in {p.parent for p in NOTEBOOKS}:
        numbers = [p.name[:2] for p in NOTEBOOKS if p.parent == folder and p.name[0].isdigit()]
        assert len(numbers) == len(set(numbers)), f'{folder.name}: {sorted(numbers)}'


def test_import_needs_no_notebook_tools():
    "`import reidnb` and its public modules load without nbdev, jupyter or IPython"
    mods = [f'{p.parent.name}.{p.stem}' for p in MODULES] + list(floors())
    code = ('import sys\nfor m in ("nbdev","execnb","IPython","jupyterlab","notebook"): sys.modules[m]=None\n'
            'import reidnb\n' + ''.join(f'import reidnb.{m}\n' for m in mods))
    subprocess.run([sys.executable, '-c', code], check=True, cwd=ROOT)


def test_every_public_name_is_indexed():
    "The nbdev index knows every exported function, so links in the docs resolve"
    index = (ROOT / 'reidnb' / '_modidx.py').read_text()
    for path in NOTEBOOKS:
        cells = [c for c in json.loads(path.read_text())['cells'] if c['cell_type'] == 'code']
        for c, tree in exported(cells):
            for n in public(tree): assert f'.{n.name}' in index, f'{n.name} of {name(path)} is not in _modidx.py'


def test_readme_comes_from_the_index():
    r = subprocess.run([sys.executable, 'tools/readme.py', '--check'], cwd=ROOT, capture_output=True, text=True)
    assert r.returncode == 0, r.stderr


def test_equations_page_is_current():
    "The saved table of nbs/equations.ipynb is what tools/equations.py makes of the notebooks now"
    r = subprocess.run([sys.executable, 'tools/equations.py'], cwd=ROOT, capture_output=True, text=True, check=True)
    outputs = [o for c in json.loads((ROOT / 'nbs' / 'equations.ipynb').read_text())['cells'] for o in c.get('outputs', [])]
    saved = [''.join(o['data']['text/markdown']) for o in outputs if 'text/markdown' in o.get('data', {})]
    assert saved == [r.stdout.rstrip('\n')], 'run nbs/equations.ipynb again and save it'


def test_links_between_notebooks_lead_somewhere():
    "Relative links in markdown cells point at files that exist"
    broken = []
    for path in NOTEBOOKS:
        for c in json.loads(path.read_text())['cells']:
            if c['cell_type'] != 'markdown': continue
            for target in re.findall(r'\]\(([\w./-]+\.(?:ipynb|md))\)', source(c)):
                if not (path.parent / target).exists() and not (ROOT / target).exists(): broken.append(f'{name(path)}: {target}')
    assert not broken, broken


def known(dotted):
    "Whether `reidnb.a.b` is a module of the package, or a name that a module or a face holds"
    parts = dotted.split('.')
    for n in range(len(parts), 0, -1):
        at = ROOT.joinpath(*parts[:n])
        if not at.with_suffix('.py').exists() and not (at / '__init__.py').exists(): continue
        if n == len(parts): return True
        value = importlib.import_module('.'.join(parts[:n]))
        for k in parts[n:]:
            if not hasattr(value, k): return False
            value = getattr(value, k)
        return True
    return False


def slips(cells):
    "What goes wrong in the sources of a page and is not seen on it: (number of the cell, in words)"
    for n, c in enumerate(cells):
        s, lines = source(c), source(c).splitlines()
        if m := re.search(r'[^\x20-\x7e\n\xa0-\U0010ffff]', s): yield n, f'control character {m[0]!r}, a lost backslash?'
        if c['cell_type'] == 'code':
            yield from ((n, f'a heading in code: {t}') for t in lines if re.match(r'\s*#\s+#+ ', t))
        if c['cell_type'] != 'markdown': continue
        if m := re.search(r'\$[^$\n]*(?<![\\A-Za-z])(ho|heta|ambda|igma|lpha|psilon|abla|rac|imes|qrt)(?![A-Za-z])', s):
            yield n, f'a lost backslash: {m[0]}'
        text = re.sub(r'^```.*?^```', lambda m: '\n' * m[0].count('\n'), s, flags=re.M | re.S).strip('\n').split('\n')
        yield from ((n, f'a heading that is not the first line of its cell: {t}') for t in text[1:] if re.match(r'#{1,6} ', t))
        yield from ((n, f'no {t}') for t in re.findall(r'(?<![/\w])reidnb(?:\.[A-Za-z_]\w*)+', s) if not known(t))


@pytest.mark.parametrize('path', NOTEBOOKS, ids=name)
def test_slips_of_the_pen(path): assert not list(slips(json.loads(path.read_text())['cells']))


@pytest.mark.parametrize('kind,text', [
    ('markdown', 'where $\rho$ is'), ('markdown', 'a\tb'), ('markdown', 'where $ ho_1$ is'), ('markdown', '$\frac12$'),
    ('markdown', 'text\n\n## Limits'), ('markdown', 'see `reidnb.contract`'), ('markdown', '`reidnb.networks.small_net()`'),
    ('markdown', 'reidnb.core.files.no_such'), ('code', 'x = 1\n# ## Export -')])
def test_slips_are_found(kind, text): assert list(slips([dict(cell_type=kind, source=[text])]))


def test_what_is_no_slip():
    fine = ['## Limits\n\ntext', '```bash\n# ## a comment\n```\nand', r'$\rho\frac{1}{2}\sqrt x$', '`reidnb.networks.make_backbone`, '
            '`reidnb.core.files`, https://reidnb.github.io', 'Radenović, 1 × 2 → ½ … “so”']
    assert not list(slips([dict(cell_type='markdown', source=[t]) for t in fine]))


def floors():
    "Wing -> (floor, rooms in order), from the table of CONTRIBUTING.md"
    rows = re.findall(r'^\| (\d+) \| `(\w+)` \| ([\w, ]+) \|$', (ROOT / 'CONTRIBUTING.md').read_text(), re.M)
    return {wing: (int(floor), rooms.split(', ')) for floor, wing, rooms in rows}


def imports(path):
    "Modules of the package that a module imports, anywhere in it, as (line, 'wing.room' or 'wing' or '')"
    here = path.relative_to(ROOT).with_suffix('').parts
    for n in ast.walk(ast.parse(path.read_text())):
        if isinstance(n, ast.Import): found = [a.name for a in n.names]
        elif isinstance(n, ast.ImportFrom):
            base = '.'.join(here[:-n.level]) + '.' * bool(n.module) if n.level else ''
            found = [f'{base}{n.module or ""}'] + [f'{base}{n.module or ""}.{a.name}' for a in n.names]
            found = [f for f in found if (ROOT / (f.replace('.', '/') + '.py')).exists()] or found[:1]
        else: continue
        yield from ((n.lineno, f[7:]) for f in found if f == 'reidnb' or f.startswith('reidnb.'))


MODULES = [p for p in sorted((ROOT / 'reidnb').glob('*/*.py')) if p.name != '__init__.py']


def test_arrows_only_go_down():
    "A room imports from lower floors, and in its wing from rooms before it; never a face"
    order = floors()
    assert {p.parent.name for p in MODULES} <= set(order), 'a wing is missing in CONTRIBUTING.md'
    wrong = []
    for path in MODULES:
        wing, room = path.parent.name, path.stem
        for line, target in imports(path):
            to, _, name = target.partition('.')
            if target == '': continue                     # `import reidnb` itself: version and place
            if not name: wrong.append(f'{wing}.{room}:{line} imports the face {to}')
            elif to == wing: ok = order[wing][1].index(name) < order[wing][1].index(room)
            else: ok = order[to][0] < order[wing][0]
            if name and not ok: wrong.append(f'{wing}.{room}:{line} imports {target}')
    assert not wrong, wrong


def test_no_private_name_crosses_a_module():
    "Nor does a notebook's test take a private name of another module"
    wrong = []
    for path in MODULES:
        for n in ast.walk(ast.parse(path.read_text())):
            if isinstance(n, ast.ImportFrom) and (n.level or (n.module or '').startswith('reidnb')):
                wrong += [f'{path.parent.name}.{path.stem}:{n.lineno} {a.name}' for a in n.names if a.name.startswith('_')]
    assert not wrong, wrong


def test_one_meaning_a_name():
    "No two modules define the same public function or class, and no face hands on a name equal to a module of its own"
    home = {}
    for path in MODULES:
        for n in public(ast.parse(path.read_text())):
            if not any('patch' in ast.dump(d) for d in n.decorator_list): home.setdefault(n.name, []).append(path.stem)
    assert not {k: v for k, v in home.items() if len(v) > 1}
    for wing in floors():
        if not (ROOT / 'reidnb' / wing).exists(): continue
        face = __import__(f'reidnb.{wing}', fromlist=['x'])
        rooms = {p.stem for p in (ROOT / 'reidnb' / wing).glob('*.py')}
        assert not rooms & set(face.__all__), wing
        for name in face.__all__: getattr(face, name)


def test_help_loads_neither_torch_nor_the_methods():
    "`import reidnb` and `reidnb --help` answer at once: they load no library that takes a second"
    code = ('import sys, reidnb\nassert not {m for m in sys.modules if m.startswith(("torch", "numpy", "reidnb."))}\n'
            'from reidnb.practice.cli import main\ntry: main(["--help"])\nexcept SystemExit: pass\n'
            'heavy = [m for m in sys.modules if m.split(".")[0] in ("torch", "torchvision", "scipy", "sklearn", "matplotlib")]\n'
            'assert not heavy, heavy\n'
            'rooms = [m for m in sys.modules if m.startswith("reidnb.")]\n'
            'assert rooms == ["reidnb.practice", "reidnb.practice.cli"], rooms')
    r = subprocess.run([sys.executable, '-c', code], cwd=ROOT, capture_output=True, text=True)
    assert r.returncode == 0, r.stderr
    for command in ('demo', 'world', 'train', 'eval', 'search', 'match', 'bench'): assert command in r.stdout
