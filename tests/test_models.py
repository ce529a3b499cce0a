"Model files of every earlier layout of the package load, and give what they gave."
import json
from pathlib import Path

import pytest
import safetensors.torch
import torch

from reidnb.methods.registry import RECIPES, recipe
from reidnb.training.models import load_model, save_model

SMALL = Path(__file__).parent.parent / 'reidnb' / 'weights' / 'small.safetensors'


def header(path):
    with safetensors.safe_open(path, 'pt') as f: return f.metadata(), {k: f.get_tensor(k) for k in f.keys()}


def test_the_file_in_the_package_names_the_layout_it_was_made_in():
    meta, state = header(SMALL)
    assert meta['method'] == 'reidnb.methods.baseline:Baseline'
    model = load_model(SMALL)
    assert set(model.state_dict()) == set(state) and all(torch.equal(v, state[k]) for k, v in model.state_dict().items())


@pytest.mark.parametrize('old', ['reidnb.contract:Settings', 'reidnb.training:Settings'])
def test_settings_classes_that_moved_are_found(old, tmp_path):
    from reidnb.data.toys import toy_crops
    from reidnb.training.method import Method, Settings
    class Toy(Method):
        def __init__(self, settings, crops=None):
            super().__init__(settings, crops)
            self.net = torch.nn.Linear(3, 4)
    path = save_model(Toy(Settings(epochs=7), toy_crops()), tmp_path / 'a.safetensors')
    meta, state = header(path)
    path.write_bytes(safetensors.torch.save(state, metadata=meta | {'settings_class': old}))
    assert load_model(path, cls=Toy).settings == Settings(epochs=7)


@pytest.mark.parametrize('old', ['reidnb.methods.qaconv:QAConvMethod', 'reidnb.qaconv:QAConvMethod'])
def test_a_method_whose_class_was_renamed_is_found(old, tmp_path):
    cls, settings = recipe('qaconv-small')
    torch.manual_seed(0)
    made = cls(settings).eval()
    path = save_model(made, tmp_path / 'a.safetensors')
    meta, state = header(path)
    assert meta['method'] == 'reidnb.methods.qaconv:QAConv'
    kind = old.split(':')[0] + ':QAConvSettings'
    path.write_bytes(safetensors.torch.save(state, metadata=meta | {'method': old, 'settings_class': kind}))
    back = load_model(path)
    assert type(back) is cls and back.settings == settings
    x = torch.rand(2, 3, settings.height, settings.width)
    with torch.no_grad(): a, b = made.embed(x), back.embed(x)
    assert torch.equal(a, b) and torch.equal(made.distance(a, a), back.distance(b, b))


@pytest.mark.parametrize('name', [n for n in RECIPES if n.endswith('small')])
def test_every_small_recipe_comes_back_from_its_file(name, tmp_path):
    cls, settings = recipe(name)
    torch.manual_seed(0)
    made = cls(settings).eval()
    back = load_model(save_model(made, tmp_path / 'm.safetensors'))
    assert type(back) is cls and back.settings == settings
    x = torch.rand(2, 3, settings.height, settings.width)
    with torch.no_grad():
        if made.has_features: assert torch.equal(made.embed(x), back.embed(x))
        else: assert all(torch.equal(v, back.state_dict()[k]) for k, v in made.state_dict().items())
    assert json.loads(header(tmp_path / 'm.safetensors')[0]['settings'])['height'] == settings.height
