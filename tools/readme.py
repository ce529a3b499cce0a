"""Write README.md from nbs/index.ipynb: its prose, its code, its text outputs, and its pictures as files in nbs/images/. Needs only Python.

usage: python tools/readme.py [--check]      --check: fail when a file is not what it would write
A picture is the saved output of a cell that says `#| label: name`; with `#| echo: false` its code is left out, with `#| layout: half` two stand side by side.
"""
import base64
import json
import re
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
MARK = re.compile(r'^#\|\s*([\w-]+):?[ \t]*(.*)$', re.M)


def beside(pictures: list) -> str:
    """Markdown of pictures with their captions: one below the other, halves side by side"""
    out = []
    while pictures:
        n = 2 if len(pictures) > 1 and all(p['layout'] == 'half' for p in pictures[:2]) else 1
        row, pictures = pictures[:n], pictures[n:]
        width = ' width="420"' if n == 2 else ''
        tags = [f'<img src="{p["path"]}"{width} alt="{p["cap"]}">' for p in row]
        out.append('\n'.join([f'| {" | ".join(tags)} |', '|' + '---|'*n, f'| {" | ".join(p["cap"] for p in row)} |']))
    return '\n\n'.join(out)


def readme() -> tuple:
    """The text, and {path: bytes} of the pictures it shows"""
    out, waiting, files = [], [], {}
    for cell in json.loads((ROOT / 'nbs' / 'index.ipynb').read_text(encoding='utf-8'))['cells']:
        source = ''.join(cell['source']).strip()
        marks, code = dict(MARK.findall(source)), re.sub(r'^#\|.*\n?', '', source, flags=re.M).strip()
        if cell['cell_type'] == 'code' and 'hide' not in marks:
            if 'label' in marks:
                for o in cell.get('outputs', []):
                    if not (data := o.get('data', {}).get('image/jpeg')): continue
                    path = f"nbs/images/{marks['label']}.jpg"
                    files[path] = base64.b64decode(''.join(data))
                    waiting.append(dict(path=path, cap=marks.get('fig-cap', ''), layout=marks.get('layout')))
            if marks.get('echo') == 'false': continue
        if waiting: out.append(beside(waiting)); waiting = []
        if cell['cell_type'] == 'markdown':
            out.append(re.sub(r'\]\(((?:\w+/)*\w+\.ipynb)\)', r'](nbs/\1)', source))
        elif 'hide' not in marks:
            out.append(f'```python\n{code}\n```')
            for o in cell.get('outputs', []):
                if o.get('name') == 'stderr': continue
                text = ''.join(o.get('text') or o.get('data', {}).get('text/plain', ''))
                if text and 'image/jpeg' not in o.get('data', {}): out.append(f'```\n{text.rstrip()}\n```')
    return '\n\n'.join(out) + '\n', files


if __name__ == '__main__':
    text, files = readme()
    files['README.md'] = text.encode('utf-8')
    old = [str(p.relative_to(ROOT)) for p in (ROOT / 'nbs' / 'images').glob('*') if p.relative_to(ROOT).as_posix() not in files]
    if '--check' in sys.argv:
        new = [p for p, b in files.items() if not (ROOT / p).exists() or (ROOT / p).read_bytes() != b]
        sys.exit(', '.join(new + old) + ' differ from what nbs/index.ipynb shows: run tools/readme.py' if new + old else 0)
    for p in old: (ROOT / p).unlink()
    for p, b in files.items():
        (ROOT / p).parent.mkdir(parents=True, exist_ok=True)
        (ROOT / p).write_bytes(b)
