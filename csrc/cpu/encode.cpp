// encode: rows[r] = x[source[r] / K], zeros for an empty row. encode_backward: grad_x[t] = sum_k grad_rows[dest[t,k]].
#include <ATen/ATen.h>
#include <ATen/Dispatch.h>
#include <torch/library.h>

#include <cstring>

#include "../check.h"
#include "gather_sum.h"
#include "parallel.h"

namespace tutelx {
namespace {

at::Tensor encode(const at::Tensor& x, const at::Tensor& source, const at::Tensor& dest) {
  check_dim(x, "x", 2);
  check_dim(source, "source", 1);
  check_dim(dest, "dest", 2);
  check_dtype(source, "source", at::kInt);
  check_size(x, "x", 0, dest.size(0), "the map's tokens");
  const at::Tensor in = x.contiguous(), from = source.contiguous();
  const int64_t R = source.size(0), D = x.size(1), K = dest.size(1), slots = dest.numel();
  const at::Tensor rows = at::empty({R, D}, x.options());
  const int64_t row_bytes = D * x.element_size();
  const char* in_bytes = static_cast<const char*>(in.const_data_ptr());
  char* out_bytes = static_cast<char*>(rows.mutable_data_ptr());
  const int32_t* slot_of = from.const_data_ptr<int32_t>();
  parallel_ranges(R, rows_per_task(row_bytes), [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
      const int32_t slot = slot_of[r];
      TORCH_CHECK_VALUE(slot < slots, "source[", r, "]=", slot, " is outside the map's ", slots, " slots");
      if (slot < 0)
        std::memset(out_bytes + r * row_bytes, 0, row_bytes);
      else
        std::memcpy(out_bytes + r * row_bytes, in_bytes + slot / K * row_bytes, row_bytes);
    }
  });
  return rows;
}

at::Tensor encode_backward(const at::Tensor& grad_rows, const at::Tensor& dest) {
  check_dim(grad_rows, "grad_rows", 2);
  return gather_sum(grad_rows, dest, std::nullopt);
}

}  // namespace
}  // namespace tutelx

TORCH_LIBRARY_IMPL(tutelx, CPU, m) {
  m.impl("encode", &tutelx::encode);
  m.impl("encode_backward", &tutelx::encode_backward);
}
