"What a method must offer, the loop that trains it, the door that scores it."
from reidnb import _face

__getattr__, __dir__, __all__ = _face(__name__, {
    'settings': 'Settings EncoderSettings schedule',
    'method': 'Method Batch',
    'models': 'save_model load_model start_from register_classes',
    'scoring': 'rank Ranking score embed_tracklets',
    'labelling': 'ClusterSettings pseudo_labels',
    'cards': 'make_card write_card read_cards',
    'loop': 'fit read_log',
    'conformance': 'check_method'})
