"""Native loops of a training step on a CPU: masks, their gradients, and counting scores.

A small C++ library, in `src`, and `library`, what Python says to it. Without it plain operations of
torch compute the same.
"""
