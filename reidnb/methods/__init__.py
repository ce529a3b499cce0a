"The methods, one a chapter."
from reidnb import _face

__getattr__, __dir__, __all__ = _face(__name__, {
    'registry': 'RECIPES recipe register_method',
    'baseline': 'Baseline BaselineSettings',
    'qaconv': 'QAConv QAConvSettings explore_matches',
    'scr': 'SCR SCRSettings',
    'ecn': 'ECN ECNSettings',
    'iics': 'IICS IICSSettings',
    'proxies': 'SpCL SpCLSettings CAP CAPSettings',
    'ice': 'ICE ICESettings'})
