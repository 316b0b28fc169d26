// What few_rows.cpp asks of an instruction set.
#pragma once
#include "matrix.h"

namespace tutelx {

constexpr int64_t kMostRows = 96;
constexpr int64_t kLine = 64, kChunk = 2048;  // bytes; a chunk: the most of a row's inputs that lie side by side

// Rows as the products want them: [chunk][row], of so many bytes each before they were laid out.
struct LaidOut {
  const char* rows = nullptr;
  int64_t count = 0, bytes = 0, chunk = 0;
};

struct FewRowsKernel {
  void (*lay_out)(const Rows& rows, int64_t bytes, int64_t chunk, char* to);
  void (*multiply)(const LaidOut& x, const Matrix& b, const Matrix& c, const char* after);
  int64_t row_stride;  // bytes between two rows of a chunk
};

// Null where this machine, or the compiler, has no such instructions for a dtype.
const FewRowsKernel* few_rows_avx512(at::ScalarType dtype);
const FewRowsKernel* few_rows_avx2(at::ScalarType dtype);

}  // namespace tutelx
