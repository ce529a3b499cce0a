"What is registered outside the package: entry points, files, the shell; and what a model file may not name."
import os
import subprocess
import sys

import pytest
import torch

from reidnb.core.plugins import load_plugins
from reidnb.data.toys import toy_crops
from reidnb.training.method import Method
from reidnb.training.models import load_model, save_model
from reidnb.training.settings import Settings

PLUGIN = """
from dataclasses import dataclass
from reidnb import Method, Settings, register_method
@dataclass(frozen=True)
class StripeSettings(Settings):
    stripes:int=4 # Parts from top to bottom
@register_method('{name}', StripeSettings, stripes=2, height=32, width=16)
class Stripes(Method):
    "Mean colours of stripes"
    def embed(self, images): return images.unflatten(2, (self.settings.stripes, -1)).mean((3, 4)).flatten(1)
"""


@pytest.fixture
def installed(tmp_path, monkeypatch):
    "A package that names its module as an entry point, as `pip install` leaves it"
    (tmp_path/'stripes_of_a_test.py').write_text(PLUGIN.format(name='test-stripes'))
    info = tmp_path/'stripes_of_a_test-1.0.dist-info'
    info.mkdir()
    (info/'METADATA').write_text('Metadata-Version: 2.1\nName: stripes-of-a-test\nVersion: 1.0\n')
    (info/'entry_points.txt').write_text('[reidnb_plugins]\nstripes = stripes_of_a_test\n')
    monkeypatch.syspath_prepend(str(tmp_path))
    return tmp_path


def test_an_installed_package_registers_its_method(installed):
    from reidnb.methods.registry import RECIPES, recipe
    assert 'test-stripes' not in RECIPES
    cls, settings = recipe('test-stripes')   # a name nobody knows is looked for in plugins
    assert cls.__module__ == 'stripes_of_a_test' and settings.stripes == 2
    crops = toy_crops(3, 2, 1)
    method = cls(settings)
    assert method.extract(crops).shape == (len(crops), 6)
    path = save_model(method, installed/'stripes.safetensors')
    assert type(load_model(path)) is cls
    del RECIPES['test-stripes']


def test_the_shell_takes_a_file(tmp_path):
    file = tmp_path/'stripes_of_a_shell.py'
    file.write_text(PLUGIN.format(name='shell-stripes'))
    run = lambda *words, **env: subprocess.run([sys.executable, '-m', 'reidnb.practice.cli', *words], capture_output=True,
                                               text=True, env=os.environ | env)
    assert 'shell-stripes' in run('--plugins', str(file), 'train', '--help').stdout
    assert 'shell-stripes' in run('train', '--help', REIDNB_PLUGINS=str(file)).stdout
    assert 'shell-stripes' not in run('train', '--help').stdout
    code = (f"import os; os.environ['REIDNB_PLUGINS'] = {str(file)!r}\nfrom reidnb import recipe, save_model\n"
            f"c, s = recipe('shell-stripes'); save_model(c(s), {str(tmp_path/'m.safetensors')!r})")
    subprocess.run([sys.executable, '-c', code], check=True)
    ask = ['eval', str(tmp_path/'m.safetensors'), '--data', 'world:campus', '--train-people', '2', '--test-people', '4']
    done = run(*ask)
    assert done.returncode == 2 and 'not registered' in done.stderr and 'Traceback' not in done.stderr
    done = run('--plugins', str(file), *ask)
    assert done.returncode == 0 and 'mAP' in done.stdout, done.stderr
    done = run('--plugins', str(tmp_path/'gone.py'), *ask)
    assert done.returncode == 2 and 'no plugin' in done.stderr


@pytest.mark.parametrize('name,say', [('os:system', 'not registered'), ('reidnb.core.files:write_atomic', 'is no method'),
                                      ('reidnb.training.settings:Settings', 'is no method'), ('reidnb.x:y', 'x')])
def test_a_crafted_header_runs_nothing(tmp_path, name, say):
    "A header may name methods of this package and registered ones; nothing else is imported or built"
    import safetensors.torch
    meta = {'method': name, 'settings_class': 'reidnb.training.settings:Settings', 'settings': '{}'}
    safetensors.torch.save_file({'x': torch.zeros(1)}, tmp_path/'m.safetensors', meta)
    with pytest.raises((ValueError, ImportError), match=say): load_model(tmp_path/'m.safetensors')


def test_settings_of_a_file_are_checked(tmp_path):
    import safetensors.torch
    meta = {'method': 'reidnb.methods.baseline:Baseline', 'settings_class': 'reidnb.methods.baseline:BaselineSettings',
            'settings': '{"height": -3}'}
    safetensors.torch.save_file({'x': torch.zeros(1)}, tmp_path/'m.safetensors', meta)
    with pytest.raises(ValueError, match='height=-3 is not a whole number at least 1'): load_model(tmp_path/'m.safetensors')


def test_nothing_is_loaded_where_nothing_is_listed(monkeypatch):
    monkeypatch.delenv('REIDNB_PLUGINS', raising=False)
    assert load_plugins() == []
    assert issubclass(Method, torch.nn.Module) and Settings().epochs == 60
