"Grids keep what a method tells of its epochs, go on where they stopped, and read old cards."
import json

import pytest

from reidnb.practice.ablations import grid_epochs, grid_table, plot_grid, run_grid
from reidnb.data.crops import ReIDData
from reidnb.data.toys import toy_crops

TINY = dict(height=64, width=32, epochs=2, iterations=2, steps=(), p=2, k=2, k1=8, backbone='small', weights='none',
            warmup=0)


@pytest.fixture(scope='module')
def site():
    toy = toy_crops(10, 2, 3)
    test = toy[toy.pids > 6]
    return ReIDData(train=toy[toy.pids <= 6], query=test[test.cams == 0], gallery=test[test.cams == 1], name='toy')


@pytest.fixture
def grid(site, tmp_path):
    def run(variants=None, seeds=(0,), tests=None, **changes):
        variants, tests = variants or {'SpCL': {}}, tests or {'a': site, 'b': site}
        return run_grid(tmp_path / 'card.json', 'spcl', variants, site, tests, seeds=seeds, report=None, **TINY | changes)
    run.path = tmp_path / 'card.json'
    return run


def test_the_first_row_of_a_run_holds_its_epochs(grid):
    rows = grid()['metrics']['rows']
    assert [('epochs' in r) for r in rows] == [True, False], 'two tests, one run'
    assert len(rows[0]['epochs']) == 2
    for epoch in rows[0]['epochs']:
        assert {'clusters', 'outliers', 'eps'} <= epoch.keys()
        assert not any(k.startswith(('seconds', 'share')) for k in epoch), 'clock times change from run to run'
    assert grid_epochs(grid.path, 'SpCL', 'clusters') == [e['clusters'] for e in rows[0]['epochs']]
    assert len(json.dumps(rows[0]['epochs'])) < 1000


def test_a_method_that_tells_nothing_adds_nothing(site, tmp_path):
    rows = run_grid(tmp_path / 'c.json', 'baseline-small', {'x': {}}, site, {'a': site}, report=None, epochs=1, height=64,
                    width=32, warmup=0, weights='none', p=4)['metrics']['rows']
    assert not any('epochs' in r for r in rows)
    with pytest.raises(ValueError, match="no 'clusters' of 'x' with seed 0"): grid_epochs(tmp_path / 'c.json', 'x', 'clusters')


def test_an_old_card_reads_and_goes_on(grid):
    card = grid()
    for r in card['metrics']['rows']: r.pop('epochs', None)     # as before epochs were kept
    grid.path.write_text(json.dumps(card))
    assert grid()['metrics']['rows'] == card['metrics']['rows'], 'nothing is trained again'
    rows = grid(seeds=(0, 1))['metrics']['rows']
    assert [(r['seed'], 'epochs' in r) for r in rows] == [(0, False), (0, False), (1, True), (1, False)]
    assert grid_table(grid.path).rows[0][0] == 'SpCL' and plot_grid(grid.path, test='a')
    with pytest.raises(ValueError, match='old card'): grid_epochs(grid.path, 'SpCL', 'clusters')
    assert len(grid_epochs(grid.path, 'SpCL', 'clusters', seed=1)) == 2


def test_a_card_of_other_settings_is_refused(grid):
    grid()
    with pytest.raises(ValueError, match="holds 'SpCL' with other settings"): grid({'SpCL': dict(eps=.4)})
