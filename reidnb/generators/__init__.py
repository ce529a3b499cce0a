"Pictures made of pictures."
from reidnb import _face

__getattr__, __dir__, __all__ = _face(__name__, {
    'camstyle': 'CamStyleDataset find_fakes fake_name'})
