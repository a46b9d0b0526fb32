// The same threads as those of the kernels; a file of its own, since two libraries build it.
#include "../../kernels/src/parallel.cpp"
