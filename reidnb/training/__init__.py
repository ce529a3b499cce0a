"What a method must offer, the loop that trains it, the door that scores it."
from reidnb import _face

__getattr__, __dir__, __all__ = _face(__name__, {
    'method': 'Method Settings Batch schedule',
    'models': 'save_model load_model',
    'scoring': 'score score_posts measure Outcome score_tracklets',
    'labelling': 'ClusterSettings pseudo_labels',
    'cards': 'make_card write_card read_cards',
    'loop': 'fit read_log'})
