"""The file every published version carries as its `model.py`, self-contained on purpose.

Triton runs the copy inside the version's folder: a later change here never reaches a version
that is already published.
"""
