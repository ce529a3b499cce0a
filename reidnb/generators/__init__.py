"Pictures made of pictures."
from reidnb import _face

__getattr__, __dir__, __all__ = _face(__name__, {
    'stargan': 'StyleGenerator StyleCritic gradient_penalty',
    'fakes': 'find_fakes fake_name histogram_fakes true_fakes fake_error',
    'camstyle': 'CamStyle CamStyleSettings restyle stylise open_fakes CamStyleDataset'})
