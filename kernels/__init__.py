"""Triton kernels of fastcl; installed as ``fastcl.kernels``.

tile        what every kernel does to a tile: rows, scores, the pair rule
sweep       log-sum-exp of rows and columns, and its completion
product     weights times rows: every backward, a queue's forward, sums
topk        selections
classify    losses and derivatives of pairs, from log-sum-exps
normalize   unit rows
configs     tiles, warps and stages, from the table in ``configs.json``
problem     operands as the kernels read them, and the tile they run with
launch      grids, slots for partial results and their sum
"""
