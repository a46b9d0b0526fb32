// The matrix unit of processors with AMX.
#pragma once

#include "vector.h"

namespace KERNEL_ISA {

#if defined(KERNEL_AMX)
constexpr bool kMatrixUnit = true;

// Sets up tiles of 64 bytes a row, and gives them back at the end: of so many rows the first five, for
// sums and what is multiplied from the left, of 16 the others.
class MatrixUnit {
 public:
  explicit MatrixUnit(int rows) {
    struct alignas(64) {
      uint8_t palette = 1, start = 0, reserved[14] = {};
      uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
      uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
    } config;
    for (int i = 0; i < 5; ++i) config.rows[i] = static_cast<uint8_t>(rows);
    _tile_loadconfig(&config);
  }
  ~MatrixUnit() { _tile_release(); }
  MatrixUnit(const MatrixUnit&) = delete;
  MatrixUnit& operator=(const MatrixUnit&) = delete;
};

// The compiler does not know which memory the instructions of the matrix unit read and write.
inline void settle() { asm volatile("" ::: "memory"); }
#else
constexpr bool kMatrixUnit = false;

struct MatrixUnit {
  explicit MatrixUnit(int) {}
};
#endif

}  // namespace KERNEL_ISA
