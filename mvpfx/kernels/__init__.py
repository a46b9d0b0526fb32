"""Native kernels for sparse weights on a CPU: a small C++ library, and what Python says to it.

Reading order: `library` (how it is found and called), `tiles` (the layout it computes in),
`weight` (sparse weights as it reads them), `operators` (what torch.compile sees); then how a graph
becomes chains: `recognition` and `idioms` (what a node is in tiles), `tiling`, `plan`, `chain`.
"""
