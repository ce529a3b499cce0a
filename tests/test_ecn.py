"ECN and CamStyle from the shell: a generator is trained, stopped, used, and its fakes serve a run of two tables."
import json

import numpy as np
import pytest
import torch

from reidnb.core.checkpoints import seed_everything
from reidnb.data.crops import ReIDData
from reidnb.data.toys import toy_crops
from reidnb.generators.camstyle import CamStyle, CamStyleSettings, find_fakes, open_fakes, stylise
from reidnb.methods.ecn import ECN, ECNSettings
from reidnb.practice.cli import main
from reidnb.practice.comparisons import Side, compare
from reidnb.training.loop import fit, read_log
from reidnb.training.models import load_model

GAN = '--height 32 --width 16 --layers 2 --channels 4 --blocks 1 --epochs 2 --iterations 3 --batch-size 8 --n-critic 2'
ECN_OPTIONS = ('--weights none --height 64 --width 32 --epochs 2 --iterations 3 --batch-size 8 --embedding 32 --neighbours-from 1 '
               '--neighbours 3 --no-report')


@pytest.fixture(scope='module')
def worlds(tmp_path_factory):
    "Two rendered sites as folders in the layout of Market-1501"
    root = tmp_path_factory.mktemp('worlds')
    for site in ('campus', 'station'):
        assert main(f'world --site {site} --out {root} --train-people 6 --test-people 4'.split()) == 0
    return root


def test_the_whole_way_from_folders(worlds, capsys):
    "train camstyle, stylise twice, train ecn with a source and with the run's fakes"
    run, data = worlds / 'gan', worlds / 'campus'
    assert main(f'train camstyle-small --data {data} --out {run} {GAN}'.split()) == 0
    assert 'makes no features: nothing was scored' in capsys.readouterr().out
    assert main(f'stylise {run} --data {data}'.split()) == 0
    first = capsys.readouterr().out
    fakes = sorted((run / 'fakes').glob('*_fake_*.jpg'))
    n = len(list((data / 'bounding_box_train').glob('*.jpg')))
    assert len(fakes) == 5 * n and f'{5 * n:,} fakes of {n:,} crops' in first
    fakes[0].unlink()
    assert main(f'stylise {run} --data {data}'.split()) == 0
    assert f'{5 * n - 1:,} of them from before' in capsys.readouterr().out and fakes[0].exists()
    for styles in (run, run / 'fakes'):
        out = worlds / f'ecn-{styles.name}'
        assert main(f'train ecn-small --source {worlds / "station"} --data {data} --out {out} --styles {styles} {ECN_OPTIONS}'.split()) == 0
        assert [sorted(set(r) & {'source', 'target'}) for r in read_log(out) if 'loss' in r] == [['source', 'target']] * 6
        assert json.loads((out / 'card.json').read_text())['source']['ids'] == 6
    assert main(f'eval {out} --data {data}'.split()) == 0


def test_a_model_of_another_kind_is_no_generator(worlds, capsys):
    assert main(f'stylise small --data {worlds / "campus"}'.split()) == 2
    assert 'no generator' in capsys.readouterr().err


def test_the_model_file_of_ecn_holds_the_encoder_alone(worlds):
    model = load_model(worlds / 'ecn-gan')
    assert isinstance(model, ECN) and all(k.startswith('encoder.') for k in model.state_dict())


def test_fakes_do_not_depend_on_how_many_are_made_at_once(tmp_path):
    crops = toy_crops(4, n_cams=3, n_each=2, height=32)
    model = CamStyle(CamStyleSettings(height=32, width=16, layers=2, channels=4, blocks=1), crops).eval()
    a, b = (stylise(model, crops, tmp_path / str(n), batch_size=n, progress=False) for n in (1, 5))
    assert len(a) == len(b) == 2 * len(crops)
    assert all(np.array_equal(a.image(i), b.image(i)) for i in range(len(a)))
    assert len(find_fakes(crops, tmp_path / '1')) == len(a)


def test_what_is_no_source_of_fakes(tmp_path):
    crops = toy_crops(2, n_cams=2, n_each=1)
    with pytest.raises(FileNotFoundError, match='no folder'): open_fakes(tmp_path / 'nothing', crops)
    with pytest.raises(ValueError, match="no column 'recipe'"): open_fakes('truth', crops)


def test_the_place_of_the_data_set_in_the_name_of_the_styles(tmp_path):
    crops, source = toy_crops(3, n_cams=2, n_each=2, height=32), toy_crops(3, n_cams=2, n_each=2, seed=1, height=32)
    model = CamStyle(CamStyleSettings(height=32, width=16, layers=2, channels=4, blocks=1), crops).eval()
    stylise(model, crops, tmp_path / 'styles-toy', progress=False)
    s = ECNSettings(backbone='small', weights='none', height=64, width=32, embedding=8, batch_size=4, frozen_stages=0,
                    styles=f'{tmp_path}/styles-{{}}')
    batch = next(ECN(s, crops, source).train().epoch(0))
    assert batch.extra['fake'].dtype == torch.bool and batch.source is not None


def test_a_comparison_with_a_source(tmp_path):
    "Sides share the source; one has the names of the site itself"
    def site(seed, name):
        train, other = (toy_crops(4, n_cams=2, n_each=2, seed=2 * seed + k, height=32).replace(dataset=name) for k in range(2))
        other = other.replace(pids=other.pids + 100)
        return ReIDData(train, other[::2], other[1::2], name=name)
    test, validation, source = site(0, 'a'), site(1, 'b'), toy_crops(4, n_cams=2, n_each=2, seed=9, height=32).replace(dataset='c')
    rate = {'lr': (.01,)}
    sides = {'given': Side('ecn-small', {'weight': 0.}, rate), 'own': Side('ecn-small', {'weight': 0.}, rate, own=True)}
    base = dict(backbone='small', weights='none', height=64, width=32, batch_size=8, embedding=16, epochs=1, steps=(), iterations=2)
    found = compare(tmp_path / 'c.json', sides, test, validation, source=source, trials=1, workers=1, report=None, **base)
    assert set(found.sides) == {'given', 'own'} and found.card['settings']['source'] == source.fingerprint()
    with pytest.raises(ValueError, match='other source'):
        compare(tmp_path / 'c.json', sides, test, validation, source=source[:-1], trials=1, workers=1, report=None, **base)


@pytest.mark.parametrize('turn', CamStyle.turns)
def test_a_run_that_is_killed_in_a_turn_goes_on(turn, tmp_path):
    "Killed inside the critic's turn or the generator's, and begun again, a run ends as if nobody had killed it"
    class Killed(BaseException): pass
    crops = toy_crops(4, n_cams=3, n_each=2, height=32)
    s = CamStyleSettings(height=32, width=16, layers=2, channels=4, blocks=1, batch_size=8, epochs=3, iterations=4, n_critic=2)
    def run(folder, at=None):
        seed_everything(0)
        method, made = CamStyle(s, crops), []
        loss = method.loss
        def watched(batch, which):
            found = loss(batch, which)
            made.append(which == turn and bool(found))
            if at and sum(made) == at: raise Killed
            return found
        method.loss = watched
        fit(method, folder, progress=False)
        return method.state_dict()
    whole = run(tmp_path / 'whole')
    with pytest.raises(Killed): run(tmp_path / 'cut', at=6 if turn == 'critic' else 3)   # in the second epoch
    assert (tmp_path / 'cut' / 'checkpoint.pt').exists()
    again = run(tmp_path / 'cut')
    assert all(torch.equal(v, again[k]) for k, v in whole.items())
