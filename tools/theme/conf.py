"""Sphinx settings of the site; tools/docs.py builds with them and adds what settings.ini says."""
import json
from pathlib import Path

from docutils import nodes
from docutils.parsers.rst import roles
from sphinx import addnodes

extensions = ['myst_nb', 'sphinx_copybutton']
nb_execution_mode = 'off'
nb_merge_streams = False
nb_render_markdown_format = 'myst'
nb_mime_priority_overrides = [('html', 'text/markdown', 5)]
myst_enable_extensions = ['dollarmath', 'amsmath', 'colon_fence', 'attrs_inline', 'attrs_block', 'deflist']
myst_heading_anchors = 4
myst_dmath_double_inline = True
add_module_names = False
toc_object_entries_show_parents = 'hide'
html_theme = 'furo'
html_css_files = ['house.css']
html_js_files = ['house.js']
html_favicon = 'static/favicon.svg'
mathjax_path = 'mathjax/tex-svg.js'
mathjax3_config = {'svg': {'fontCache': 'global', 'scale': .95}, 'options': {'enableMenu': False}}
pygments_style, pygments_dark_style = 'friendly', 'github-dark'
copybutton_exclude = '.linenos, .gp'
html_copy_source = html_show_sourcelink = html_show_sphinx = False
html_theme_options = dict(
    navigation_with_keys=True, top_of_page_buttons=[],
    light_css_variables={'color-brand-primary': '#2f5d8a', 'color-brand-content': '#2f5d8a', 'color-brand-visited': '#2f5d8a'},
    dark_css_variables={'color-brand-primary': '#8fb8de', 'color-brand-content': '#8fb8de', 'color-brand-visited': '#8fb8de'})


def api_type(name, rawtext, text, lineno, inliner, options={}, content=[]):
    "The type of a parameter: small code that links nowhere"
    return [nodes.literal(rawtext, text, classes=['api-type'])], []


def around(node):
    "Nodes that a node stands in, from the inside out"
    while node.parent is not None: node = node.parent; yield node


def finish(app, doctree):
    "Words between backticks that name something public become links to it; pictures learn whether they are drawings"
    here = app.env.docname
    for node in list(doctree.findall(nodes.literal)):
        outer = list(around(node))
        if any(isinstance(n, (nodes.title, nodes.reference, addnodes.pending_xref, addnodes.desc_signature)) for n in outer): continue
        kind, target = app.names.get(node.astext().strip().removesuffix('()'), (None, None))
        if kind is None or (kind == 'doc' and target == here): continue
        if {'names', 'api-index'} & {c for n in outer if isinstance(n, nodes.Element) for c in n['classes']}:
            word = nodes.literal('', target.rpartition('.')[2])                # a list of names shows their last part
        else: word = node.deepcopy()
        if kind == 'doc': ref = nodes.reference('', '', internal=True, refuri=app.builder.get_relative_uri(here, target), classes=['name'])
        else:
            ref = addnodes.pending_xref('', refdomain='py', reftype='obj', reftarget=target, refexplicit=True, refwarn=True, refdoc=here)
            word['classes'].append('name')
        ref += word
        node.replace_self(ref)
    for math in doctree.findall(nodes.math_block):      # as it stands: Sphinx would wrap lines in `split`, where MathJax takes no \\tag
        text = math.astext()
        if not math.get('no-wrap') and r'\\' in text:
            math['no-wrap'], math['nowrap'], math.children = True, True, []
            math += nodes.Text(rf'\[{text}\]')
    for image in doctree.findall(nodes.image):
        path = Path(app.srcdir)/image['uri']
        if path.suffix == '.svg' and path.exists() and '<image' not in path.read_text(encoding='utf-8'): image['classes'].append('drawing')


def setup(app):
    app.add_config_value('names_file', '', 'env')
    app.add_config_value('names_hash', '', 'env')
    roles.register_local_role('api-type', api_type)
    def load(app): app.names = json.loads(Path(app.config.names_file).read_text(encoding='utf-8'))
    app.connect('builder-inited', load)
    app.connect('doctree-read', finish)
    return {'parallel_read_safe': True, 'parallel_write_safe': True}
