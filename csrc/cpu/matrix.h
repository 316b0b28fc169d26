// Matrices as they lie in memory.
#pragma once
#include <ATen/ATen.h>

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

// Rows of a matrix: its own in order, or those of the tokens that slots belong to.
struct Rows {
  Matrix of;                       // `rows` of it are taken
  const int32_t* slots = nullptr;  // [rows]: row i is slots[i] / choices
  int64_t choices = 1;

  const char* row(int64_t i) const {
    return of.data +
           (slots ? slots[i] / choices : i) * of.row_stride * static_cast<int64_t>(c10::elementSize(of.dtype));
  }
  Rows some(int64_t first, int64_t n) const {
    Rows out = *this;
    out.of.rows = n;
    if (slots)
      out.slots += first;
    else
      out.of = of.block(first, n, 0, of.cols);
    return out;
  }
};

}  // namespace tutelx
