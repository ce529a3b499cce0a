"Scores, re-ranking, lifting by time, matching."
from reidnb import _face

__getattr__, __dir__, __all__ = _face(__name__, {
    'evaluation': 'Protocol Metrics evaluate evaluate_features cosine_distance',
    'reranking': 'rerank rerank_distances rerank_all rerank_top',
    'lifting': 'tlift tfusion temporal_probability',
    'matching': 'QAConvMatcher score_matrix correspondences draw_matches',
    'postprocessing': 'POSTS postprocess'})
