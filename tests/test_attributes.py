"A start without identities: the table of the tool links no two crops, its loss reads no person and no camera, every method takes it."
import importlib.util
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch

from reidnb.core.checkpoints import seed_everything
from reidnb.data.crops import Crops
from reidnb.data.toys import toy_crops
from reidnb.methods.registry import recipe
from reidnb.networks.backbones import make_backbone
from reidnb.networks.weights import PACKAGED, package_weights, read_weights
from reidnb.training.loop import fit
from reidnb.training.models import load_model
from reidnb.world.people import sample_people

ROOT = Path(__file__).parent.parent
spec = importlib.util.spec_from_file_location('pretrain_attributes', ROOT / 'tools' / 'pretrain_attributes.py')
tool = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(tool)


@pytest.fixture(scope='module')
def crops(): return tool.single_crops(40, 7000, (64, 32), each=60)


def quick(**k): return tool.AttributeSettings(**{**dict(height=64, width=32, epochs=2, batch_size=16, warmup=0), **k})


def test_no_person_is_in_two_crops(crops):
    who = crops.extra['who']
    assert len(crops) == crops.n_ids == 40 and not crops.n_cams and not crops.has_times
    assert (who[:, 0] >= 0).all() and (who[:, 1] >= 0).any()   # bystanders count too
    assert len(np.unique(who[who >= 0])) == (who >= 0).sum()
    assert len(np.unique(who[:, 0] // 10**5)) > 1              # more than one camera network
    assert len(set(crops.images)) == 40
    facts = tool.facts(crops)
    assert facts['images'] == facts['ids'] == 40 and facts['seen'] == (who >= 0).sum() and facts['networks'] > 1


def test_what_is_learned_and_what_is_held_out_share_no_camera_network():
    assert tool.HELD + 1500 // 50 < tool.TRAIN


def shuffled(crops):
    rng = np.random.default_rng(0)
    return Crops(crops.images, rng.integers(1, 4, 40), rng.integers(0, 6, 40), extra=crops.extra, name='shuffled')


def losses(crops, k=3):
    seed_everything(0)
    method = tool.Attributes(quick(), crops)
    return [method.loss(b) for b, _ in zip(method.epoch(0), range(k))]


def test_the_loss_reads_no_person_and_no_camera(crops):
    for a, b in zip(losses(crops), losses(shuffled(crops)), strict=True):
        assert list(a) == list(tool.CLASSES) and all(torch.equal(a[k], b[k]) for k in a)


def test_the_targets_are_those_of_the_drawn_people():
    people = sample_people(300, 5, season='autumn')
    y = dict(zip(tool.CLASSES, tool.attributes(people, np.zeros(300)).T))
    dress = people.upper == 15
    assert dress.any() and (y['lower'][dress] == tool.UNSEEN).all() and torch.equal(y['lower'][~dress], people.lower[~dress])
    assert ((y['bag colour'] == tool.UNSEEN) == (people.bag == 0)).all()
    near = (y['upper colour'] == people.shade[:, 2]).float().mean()
    assert .4 < near < 1       # the nearest colour of the palette: a tint may be nearer to another than to its own
    away = dict(zip(tool.CLASSES, tool.attributes(people, np.full(300, np.pi)).T))
    assert torch.equal(y['print'], people.print[:, 0]) and torch.equal(away['print'], people.print[:, 1])
    assert (away['inner colour'] == tool.UNSEEN).all() and (y['inner colour'] != tool.UNSEEN).any()
    most = torch.stack(list(y.values()), 1).max(0).values
    assert all(int(m) < n for m, n in zip(most, tool.CLASSES.values()))


def test_it_trains_through_the_loop_and_goes_on_when_stopped(crops, tmp_path):
    def train(out, *epochs):
        for n in epochs:
            seed_everything(0)
            method = tool.Attributes(quick(epochs=n, decay='none'), crops)
            log = fit(method, out, progress=False)
        return method, log
    whole, log = train(tmp_path / 'a', 2)
    again, _ = train(tmp_path / 'b', 1, 2)
    for k, v in whole.state_dict().items(): assert torch.equal(v, again.state_dict()[k]), k
    assert set(tool.CLASSES) < set(next(r for r in log if 'loss' in r))
    said = tool.accuracy(whole, crops, crops)
    assert {'upper', 'lower', 'upper colour'} < set(said) and all(0 <= v['right'] <= 1 for v in said.values())
    used = tool.for_use(whole).eval()
    assert torch.equal(used.embed(x := torch.randn(2, 3, 64, 32)), whole.eval().embed(x))


def test_the_name_is_known_and_fits_one_network():
    assert make_backbone('small', weights='attributes').report.complete
    assert set(PACKAGED) == {'small', 'attributes'}
    for name in PACKAGED:
        with pytest.raises(ValueError, match=f"weights '{name}' belong to the network 'small', not 'resnet18'"):
            make_backbone('resnet18', weights=name)
    with pytest.raises(FileNotFoundError, match='attributes'): package_weights('nobody')


def test_both_files_hold_the_same_tensors_in_half_precision():
    files = [read_weights(package_weights(k)) for k in PACKAGED]
    for x in zip(*(sorted(f.items()) for f in files), strict=True):
        assert x[0][0] == x[1][0] and x[0][1].shape == x[1][1].shape and x[0][1].dtype == x[1][1].dtype
    assert not torch.equal(*(f['encoder.backbone.conv1.weight'] for f in files))
    assert load_model(package_weights('attributes')).settings.backbone == 'small'


@pytest.mark.parametrize('norm', ['bn', 'ibn-a'])
@pytest.mark.parametrize('name', ['ice-small', 'spcl', 'cap'])
def test_every_method_without_labels_starts_from_it(name, norm):
    cls, s = recipe(name, backbone='small', weights='attributes', height=64, width=32, norm=norm)
    toys = toy_crops(4, n_cams=2, n_each=2)
    blind = Crops(toys.images, None, toys.cams)
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        net = cls(s, blind).encoder.backbone
    want = read_weights(package_weights('attributes'))
    assert torch.equal(net.conv1.weight, want['encoder.backbone.conv1.weight'].float())
    assert norm != 'bn' or net.report.complete and len(net.report.matched) == len(net.state_dict())
