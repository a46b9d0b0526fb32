// What the processor can do.
#pragma once

#include "table.h"

// The kernels of its best instruction set.
const Kernels* best();
