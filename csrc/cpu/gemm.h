// Matrix products on memory that lies where it lies, by the library torch itself uses (MKL, oneDNN, OpenBLAS).
#pragma once
#include <ATen/ATen.h>
#include <ATen/CPUFunctions.h>

#include "few_rows.h"
#include "matrix.h"
#include "wide_products.h"

namespace tutelx {

// a @ b for several b. Runs on the calling thread when it is inside a parallel region.
class Products {
 public:
  // Rows that slots name must be few, and b a weight whose inputs lie side by side.
  explicit Products(const Rows& a) : a_(a) {}

  // c = a @ b. after: as for FewRows.
  void into(const Matrix& b, const Matrix& c, const char* after = nullptr) {
    const bool side_by_side = a_.of.col_stride == 1 && b.row_stride == 1 && c.col_stride == 1;
    if (side_by_side && FewRows::can(a_.of.rows, a_.of.dtype)) {
      if (!laid_out_) few_.lay_out(a_), laid_out_ = true;
      few_.times(b, c, after);
      return;
    }
    TORCH_INTERNAL_ASSERT(!a_.slots);
    if (widens(a_.of.dtype)) return multiply_wide(a_.of, b, c, false);
    at::Tensor out = c.tensor();
    at::cpu::mm_out(out, a_.of.tensor(), b.tensor());
  }

 private:
  Rows a_;
  FewRows few_;
  bool laid_out_ = false;
};

// c = a @ b, or c += a @ b.
inline void multiply(const Matrix& a, const Matrix& b, const Matrix& c, bool add = false) {
  if (!add) return Products(Rows{a}).into(b, c);
  if (widens(a.dtype)) return multiply_wide(a, b, c, true);
  at::Tensor out = c.tensor();
  at::cpu::addmm_out(out, out, a.tensor(), b.tensor());
}

}  // namespace tutelx
