// Products of 16-bit numbers on machines whose library has none that are quick: widened to float32, tile by tile.
#pragma once
#include "matrix.h"

namespace tutelx {

// Whether a product in float32, with the copies that it takes, is quicker here than the library's own.
bool widens(at::ScalarType dtype);
// c = a @ b, or c += a @ b: summed in float32 and rounded once.
void multiply_wide(const Matrix& a, const Matrix& b, const Matrix& c, bool add);

}  // namespace tutelx
