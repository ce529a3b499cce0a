"""Find where every numbered equation of the papers lives: the notebook, the function and the tests. Needs only Python.

usage: python tools/equations.py           print the table as markdown
       python tools/equations.py --open    print only the components that no function names yet
A function names its equation in its docstring, as in "(thesis eq. 6.9)" or "(ECN eqs. 6, 7)". The list of equations is tools/equations.csv.
"""
import ast
import csv
import json
import re
import sys
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).parent.parent
CITE = re.compile(r'\b(QAConv|ECN|IICS|thesis) eqs?\. ((?:\d+(?:\.\d+)?)(?:(?:, (?:and )?| and |-)\d+(?:\.\d+)?)*)')
TEST = re.compile(r'^\s*(assert\b|test_\w+\(|with expect_fail)', re.M)


@dataclass
class Symbol:
    """An exported function or class, where it stands and what tests it."""
    name: str
    module: str
    notebook: Path
    section: str
    doc: str
    tests: int = 0
    tested_in: list = field(default_factory=list)


def numbers(text: str) -> list:
    """'6.10-6.12' -> 6.10, 6.11, 6.12; '6, 7' -> 6, 7"""
    out = []
    for part in re.split(r', (?:and )?| and ', text):
        a, _, b = part.partition('-')
        if not b: out.append(a); continue
        chapter, dot, first = a.rpartition('.')
        last = b.rpartition('.')[2]
        out += [f'{chapter}{dot}{n}' for n in range(int(first), int(last)+1)]
    return out


def cited(text: str) -> set:
    """Equations a text names, as (paper, number)"""
    return {(m[1], n) for m in CITE.finditer(' '.join((text or '').split())) for n in numbers(m[2])}


def symbols(path: Path) -> list:
    """The exported functions and classes of a notebook, with the tests that name them"""
    cells, out, section, module = json.loads(path.read_text())['cells'], [], '', ''
    for cell in cells:
        source = ''.join(cell['source'])
        if cell['cell_type'] == 'markdown':
            for m in re.finditer(r'^## (.+)$', source, re.M): section = m[1].strip()
        elif m := re.search(r'^#\|\s*default_exp (\S+)', source, re.M): module = m[1]
        elif re.match(r'#\|\s*exports?\b', source):
            for node in ast.parse(source).body:
                if not isinstance(node, (ast.FunctionDef, ast.ClassDef)) or node.name.startswith('_'): continue
                methods = [n for n in getattr(node, 'body', []) if isinstance(n, ast.FunctionDef)]
                docs = [ast.get_docstring(n) or '' for n in (node, *methods)]
                out.append(Symbol(node.name, module, path, section, ' '.join(docs)))
    for cell in cells:
        source = ''.join(cell['source'])
        if cell['cell_type'] != 'code' or re.match(r'#\|\s*exports?\b', source) or not TEST.search(source): continue
        for s in out:
            if re.search(rf'\b{s.name}\b', source): s.tests += len(TEST.findall(source))
    return out


def table(root: Path = ROOT) -> list:
    """Rows of tools/equations.csv with the symbols that name each equation"""
    found = [s for p in sorted((root/'nbs').rglob('*.ipynb')) if '.ipynb_checkpoints' not in p.parts for s in symbols(p)]
    pytests = {p.name: p.read_text() for p in sorted((root/'tests').glob('test_*.py'))}
    for s in found: s.tested_in = [n for n, t in pytests.items() if re.search(rf'\b{s.name}\b', t)]
    with open(root/'tools'/'equations.csv', newline='') as f: rows = list(csv.DictReader(f))
    known = {(r['paper'], r['number']) for r in rows}
    for s in found:
        if wrong := cited(s.doc)-known: raise ValueError(f'{s.name} in {s.notebook.name} names equations that no paper has: {sorted(wrong)}')
    for r in rows: r['symbols'] = [s for s in found if (r['paper'], r['number']) in cited(s.doc)]
    return rows


def state(row: dict) -> str:
    """'done', or in words what is missing"""
    if row['symbols']: return 'done' if all(s.tests for s in row['symbols']) else 'no test'
    if row['kind'] == 'component': return f"not yet: `{row['home']}`"
    return {'definition': 'a definition, no code', 'training': f"not yet: the loop of `{row['home']}`"}[row['kind']]


def markdown(rows: list, link: str = '') -> str:
    """The table, one row an equation; `link` goes before the path of a notebook"""
    out = ['| equation | what | notebook | function | tests |', '|---|---|---|---|---|']
    for r in rows:
        head = f"| {r['paper']} ({r['number']}) | {r['what']} "
        if not r['symbols']: out.append(f'{head}| {state(r)} | | |'); continue
        pages, names, tests = [], [], []
        for s in r['symbols']:
            where = s.notebook.relative_to(ROOT/'nbs') if s.notebook.is_relative_to(ROOT) else s.notebook
            anchor = re.sub(r'\s+', '-', s.section)
            page = f'[{s.section}]({link}{where}#{anchor})'
            if page not in pages: pages.append(page)
            names.append(f'`{s.module}.{s.name}`')
            tests.append(f'{s.tests} here' + ''.join(f', `{n}`' for n in s.tested_in))
        out.append(f"{head}| {'<br>'.join(pages)} | {'<br>'.join(names)} | {'<br>'.join(tests)} |")
    return '\n'.join(out)


if __name__ == '__main__':
    rows = table()
    if '--open' in sys.argv:
        for r in rows:
            if state(r) != 'done': print(f"{r['paper']} ({r['number']}) {r['what']}: {state(r)}")
    else: print(markdown(rows))
