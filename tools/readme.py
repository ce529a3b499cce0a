"""Write README.md from nbs/index.ipynb: its prose, its code and its text outputs. Needs only Python.

usage: python tools/readme.py [--check]      --check: fail when README.md is not what it would write
"""
import json
import re
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent


def readme() -> str:
    out = []
    for cell in json.loads((ROOT / 'nbs' / 'index.ipynb').read_text())['cells']:
        source = ''.join(cell['source']).strip()
        if cell['cell_type'] == 'markdown':
            out.append(re.sub(r'\]\(((?:\w+/)*\w+\.ipynb)\)', r'](nbs/\1)', source))
        elif not source.startswith('#| hide'):
            out.append(f'```python\n{source}\n```')
            for o in cell.get('outputs', []):
                if o.get('name') == 'stderr': continue
                text = ''.join(o.get('text') or o.get('data', {}).get('text/plain', ''))
                if text and 'image/jpeg' not in o.get('data', {}): out.append(f'```\n{text.rstrip()}\n```')
    return '\n\n'.join(out) + '\n'


if __name__ == '__main__':
    path = ROOT / 'README.md'
    if '--check' in sys.argv: sys.exit(path.read_text() != readme() and 'README.md is older than nbs/index.ipynb: run tools/readme.py')
    path.write_text(readme())
