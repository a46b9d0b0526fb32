"""How sizes of tensors in a graph hang together: what is dead along a dimension, and what follows.

Reading order: `value` (what is known of one tensor), `rule` (how facts pass a node), the rules,
`reading` (a graph as values and steps), `flow` (the analysis), `rewrite`, `follow`, `proof`.
"""
