// clear_empty: zeros in the rows that no slot fills, in place.
#include <ATen/ATen.h>
#include <torch/library.h>

#include <cstring>

#include "../check.h"
#include "parallel.h"

namespace tutelx {
namespace {

constexpr int64_t kRowsPerTask = 256;

void clear_empty(at::Tensor& rows, const at::Tensor& source) {
  check_dim(rows, "rows", 2);
  check_dim(source, "source", 1);
  check_dtype(source, "source", at::kInt);
  check_size(rows, "rows", 0, source.size(0), "the map's rows");
  TORCH_CHECK_VALUE(rows.is_contiguous(), "rows has strides ", rows.strides(), ", expected contiguous rows");
  const at::Tensor from = source.contiguous();
  const int32_t* slot_of = from.const_data_ptr<int32_t>();
  const int64_t row_bytes = rows.size(1) * rows.element_size();
  char* bytes = static_cast<char*>(rows.mutable_data_ptr());
  parallel_ranges(rows.size(0), kRowsPerTask, [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
      if (slot_of[r] < 0) std::memset(bytes + r * row_bytes, 0, row_bytes);
    }
  });
}

}  // namespace
}  // namespace tutelx

TORCH_LIBRARY_IMPL(tutelx, CPU, m) { m.impl("clear_empty", &tutelx::clear_empty); }
