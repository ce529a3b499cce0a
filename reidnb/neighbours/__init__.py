"Exact neighbours, sparse similarity, clusters."
from reidnb import _face

__getattr__, __dir__, __all__ = _face(__name__, {
    'nearest': 'Neighbours knn knn_given',
    'reciprocal': 'expand encode overlap jaccard source_term',
    'clustering': 'Clusters cluster dbscan agglomerative per_camera kmeans suggest_eps score_overlap '
        'reliable'})
