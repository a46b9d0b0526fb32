// All kernels, for the instruction set that the including file has chosen: KERNEL_ISA (namespace),
// KERNEL_VECTOR_BYTES, KERNEL_WIDE, KERNEL_ROWS and KERNEL_TABLE.
#include "attention.h"
#include "edges.h"
#include "multiply.h"
#include "multiply_matrix.h"
#include "norm.h"
#include "table.h"

#define KERNEL_TEXT_(x) #x
#define KERNEL_TEXT(x) KERNEL_TEXT_(x)

const Kernels KERNEL_TABLE = {KERNEL_TEXT(KERNEL_ISA),
                              KERNEL_ISA::kHasHalves,
                              KERNEL_ISA::kMatrixUnit,
                              KERNEL_ISA::kTile,
                              KERNEL_ISA::multiply,
                              KERNEL_ISA::pair_features,
                              KERNEL_ISA::normalize,
                              KERNEL_ISA::combine,
                              KERNEL_ISA::rotate,
                              KERNEL_ISA::attend,
                              KERNEL_ISA::enter<float>,
                              KERNEL_ISA::enter<uint16_t>,
                              KERNEL_ISA::leave<float>,
                              KERNEL_ISA::leave<uint16_t>};
