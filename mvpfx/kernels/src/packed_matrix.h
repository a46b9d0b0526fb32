// Packing for processors that multiply matrices of bfloat16 in one instruction.
#pragma once

#include "packed.h"
#include "rows.h"

// Packs rows, whose columns are pairs, for the matrix unit, if that takes less time than vectors of floats
// take for so many entries; returns whether it did.
bool pack_matrix(Packed* packed, const Rows& rows, int64_t entries);
