"""The control plane: what should be (rows), who may ask (identity), where it runs (scheduling).

Slices, each one folder: ``identity``, ``fleet``, ``image``, ``scheduling``, ``session``; below them
``http`` (typed endpoints) and ``db`` (the executor); above them ``app``, which puts them together.
"""
