// Products with few rows, as in decoding, where the machine has the instructions for them.
#pragma once
#include "few_rows_kernel.h"
#include "matrix.h"

namespace tutelx {

// Each element is one sum in a fixed order: its bits do not depend on the rows and columns beside it. A thread uses one
// at a time.
class FewRows {
 public:
  // Whether this machine has products for so many rows, and is the quicker with them.
  static bool can(int64_t rows, at::ScalarType dtype);
  // Copies rows, each with its columns side by side, to where the products want them.
  void lay_out(const Rows& rows);
  // c = rows @ b, where b is a transposed weight [out,in] with its inputs side by side, as the outputs of c are. after:
  // the weight that this thread will probably want next, laid out as b is, or null: its beginning is asked for.
  void times(const Matrix& b, const Matrix& c, const char* after) const;

 private:
  const FewRowsKernel* kernel_ = nullptr;
  LaidOut x_;  // in the thread's own memory
};

}  // namespace tutelx
