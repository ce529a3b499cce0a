"The public data sets, read as they are."
from reidnb import _face

__getattr__, __dir__, __all__ = _face(__name__, {
    'specs': 'DatasetSpec',
    'catalogue': 'DATASETS load register_dataset datasets_table find_spec',
    'videos': 'write_mars'})
