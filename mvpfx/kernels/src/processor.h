// What the processor can do.
#pragma once

#include <vector>

#include "table.h"

// The kernels that it has instructions for, the fastest first.
std::vector<const Kernels*> available();
