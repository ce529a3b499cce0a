"Pictures of crops, scores and clusters."
from reidnb import _face

__getattr__, __dir__, __all__ = _face(__name__, {
    'sheets': 'ranked_lists camera_board',
    'plots': 'plot_cmc plot_distances plot_2d plot_training embed_2d',
    'clusters': 'cluster_sheet people_sheet plot_sizes plot_eps'})
