"The public data sets, read as they are."
from reidnb import _face

__getattr__, __dir__, __all__ = _face(__name__, {
    'specs': 'DatasetSpec',
    'catalogue': 'DATASETS load datasets_table find_spec',
    'videos': 'write_mars'})
