"""Figures as inline SVG: drawn for a column of a page, with a text for whoever cannot see them.

drawing    what all have in common: sizes, texts, axes, the frame with its name
heat       a heat map: rows, columns, a colour for each cell
lines      lines over two axes
bars       a bar for each row
"""
