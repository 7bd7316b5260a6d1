"""Sphinx configuration."""

project = "pgsignals"
author = "pgsignals contributors"
copyright = author  # noqa: A001

extensions = ["myst_parser", "sphinx.ext.autodoc"]
myst_heading_anchors = 2
# Included by pages.
exclude_patterns = ["_build", "benchmarks/*.md"]
autodoc_member_order = "bysource"
autodoc_typehints = "description"

html_theme = "furo"
html_title = "pgsignals"
html_static_path = ["_static"]
html_css_files = ["tables.css"]
