"A notebook that fails says which notebook, which cell and which line; `slow` and `cuda` cells are skipped unless asked for."
import json
import shutil
from pathlib import Path

import pytest

pytest_plugins = ['pytester']
ROOT = Path(__file__).parent.parent


@pytest.fixture
def project(pytester):
    shutil.copy(ROOT / 'conftest.py', pytester.path)
    def write(*sources):
        cells = [dict(cell_type='code', id=f'c{i}', metadata={}, source=s, outputs=[], execution_count=None)
                 for i, s in enumerate(sources)]
        nb = dict(cells=cells, metadata={}, nbformat=4, nbformat_minor=5)
        (pytester.path / '10_toy.ipynb').write_text(json.dumps(nb))
        return pytester
    return write


def test_names_notebook_cell_and_line(project):
    r = project('x = 1', 'y = 2\nz = 0\nassert y == z, "two is not zero"').runpytest_subprocess()
    r.assert_outcomes(failed=1)
    r.stdout.fnmatch_lines(['*10_toy.ipynb: cell 2 (id c1), line 3: AssertionError: two is not zero*'])


def test_line_of_a_call_into_a_function(project):
    r = project('def f(v):\n    return 1/v', 'a = 0\n\nf(a)').runpytest_subprocess()
    r.stdout.fnmatch_lines(['*cell 2 (id c1), line 3: ZeroDivisionError*'])


def test_syntax_error(project):
    r = project('x = (').runpytest_subprocess()
    r.assert_outcomes(failed=1)
    r.stdout.fnmatch_lines(['*cell 1 (id c0), line 1: *SyntaxError*'])


def test_slow_and_cuda_cells_are_skipped(project):
    p = project('#| slow\nassert False', '#| cuda\nassert False', '#| eval: false\nassert False', 'assert True')
    p.runpytest_subprocess().assert_outcomes(passed=1)
    r = p.runpytest_subprocess('--slow')
    r.assert_outcomes(failed=1)
    r.stdout.fnmatch_lines(['*cell 1 (id c0), line 2*'])


def test_fresh_namespace(project):
    p = project('left_over = 1')
    cells = [dict(cell_type='code', id='d0', metadata={}, source='assert "left_over" not in globals()',
                  outputs=[], execution_count=None)]
    (p.path / '20_next.ipynb').write_text(json.dumps(dict(cells=cells, metadata={}, nbformat=4, nbformat_minor=5)))
    p.runpytest_subprocess().assert_outcomes(passed=2)
