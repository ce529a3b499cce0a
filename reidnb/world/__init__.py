"A world without real people: rendered crops, cameras, clocks."
from reidnb import _face

__getattr__, __dir__, __all__ = _face(__name__, {
    'people': 'sample_people People',
    'rendering': 'render',
    'plans': 'SITES plan_site',
    'sites': 'make_site people_of truth under_camera recolour projection write_market'})
