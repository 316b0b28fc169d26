// Matrix products on memory that lies where it lies, by the library torch itself uses (MKL, oneDNN, OpenBLAS).
#pragma once
#include <ATen/ATen.h>
#include <ATen/CPUFunctions.h>

namespace tutelx {

// A view of a matrix with any strides, counted in elements.
struct Matrix {
  char* data;
  int64_t rows, cols, row_stride, col_stride;
  at::ScalarType dtype;

  Matrix block(int64_t row, int64_t n_rows, int64_t col, int64_t n_cols) const {
    const int64_t offset = row * row_stride + col * col_stride;
    return {
        data + offset * static_cast<int64_t>(c10::elementSize(dtype)), n_rows, n_cols, row_stride, col_stride, dtype};
  }
  Matrix transposed() const { return {data, cols, rows, col_stride, row_stride, dtype}; }
  at::Tensor tensor() const {
    return at::from_blob(data, {rows, cols}, {row_stride, col_stride}, at::TensorOptions().dtype(dtype));
  }
};

inline Matrix matrix_of(const at::Tensor& t) {
  return {static_cast<char*>(t.data_ptr()), t.size(0), t.size(1), t.stride(0), t.stride(1), t.scalar_type()};
}

// c = a @ b where a has few rows, b is a transposed weight [out,in] with its inputs side by side, and the machine has
// the instructions; elsewhere does nothing and returns false. Each element is one sum in a fixed order: its bits do not
// depend on the rows and columns beside it.
bool multiply_few_rows(const Matrix& a, const Matrix& b, const Matrix& c);

// c = a @ b, or c += a @ b. Runs on the calling thread when it is inside a parallel region.
inline void multiply(const Matrix& a, const Matrix& b, const Matrix& c, bool add = false) {
  if (!add && multiply_few_rows(a, b, c)) return;
  at::Tensor out = c.tensor();
  if (add)
    at::cpu::addmm_out(out, out, a.tensor(), b.tensor());
  else
    at::cpu::mm_out(out, a.tensor(), b.tensor());
}

}  // namespace tutelx
