"Person re-identification as a book that runs: what is typed most is handed on here, loaded when asked for."
import sys
from importlib import import_module

__version__ = "0.1.0"


def _face(
    package, # Name of a package
    home, # Module below it -> names it gives, in one string
    rooms=(), # Sub-packages that can be asked for without an import of their own
): # `__getattr__`, `__dir__` and `__all__` of the package
    "A face: names of modules handed on by their package, each module loaded when one of its names is asked for"
    of = {name: module for module, names in home.items() for name in names.split()}
    def get(name):
        if name in rooms: return import_module(f'{package}.{name}')
        if name not in of: raise AttributeError(f'module {package!r} has no attribute {name!r}')
        value = getattr(import_module(f'{package}.{of[name]}'), name)
        setattr(sys.modules[package], name, value)
        return value
    return get, lambda: sorted([*of, *rooms]), list(of)


__getattr__, __dir__, __all__ = _face('reidnb', {
    'data.crops': 'Crops ReIDData', 'data.folders': 'from_folder from_csv make_data', 'datasets.catalogue': 'load register_dataset',
    'world.sites': 'make_site', 'networks.extraction': 'extract', 'ranking.evaluation': 'evaluate',
    'training.settings': 'Settings EncoderSettings', 'training.method': 'Method',
    'training.models': 'load_model save_model', 'training.scoring': 'rank score',
    'training.loop': 'fit', 'training.conformance': 'check_method', 'methods.registry': 'recipe register_method', 'practice.opening': 'open_data',
    'practice.gallery': 'Gallery', 'practice.experiments': 'run_experiment'},
    rooms=('core', 'neighbours', 'data', 'datasets', 'world', 'networks', 'losses', 'ranking', 'viz', 'training',
           'generators', 'methods', 'practice'))
