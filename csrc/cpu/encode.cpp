// encode: rows[r] = x[source[r] / K], zeros for an empty row. encode_backward: grad_x[t] = sum_k grad_rows[dest[t,k]].
#include <ATen/ATen.h>
#include <ATen/Dispatch.h>
#include <torch/library.h>

#include <cstring>

#include "../check.h"
#include "buffers.h"
#include "forward.h"
#include "gather_sum.h"
#include "inverse.h"
#include "parallel.h"
#include "stream.h"

namespace tutelx {
at::Tensor encode(const at::Tensor& x, const at::Tensor& source, const at::Tensor& dest) {
  check_dim(x, "x", 2);
  check_floating(x, "x");
  check_dim(source, "source", 1);
  check_dim(dest, "dest", 2);
  check_dtype(source, "source", at::kInt);
  check_size(x, "x", 0, dest.size(0), "the map's tokens");
  const at::Tensor in = x.contiguous(), from = source.contiguous();
  const int64_t R = source.size(0), D = x.size(1), T = dest.size(0), K = dest.size(1);
  check_dtype(dest, "dest", at::kInt);
  const at::Tensor to = dest.contiguous();
  const at::Tensor rows = buffer({R, D}, x.options());
  const int64_t row_bytes = D * x.element_size();
  const char* in_bytes = static_cast<const char*>(in.const_data_ptr());
  char* out_bytes = static_cast<char*>(rows.mutable_data_ptr());
  const Inverse inverse(to, from);
  const bool stream = streams(R * row_bytes);
  // By token, so that it comes from memory once for all its rows; then the rows that no slot fills.
  parallel_ranges(T, rows_per_task(K * row_bytes), [&](int64_t begin, int64_t end) {
    inverse.visit(begin, end, [&](int64_t t, int64_t, int64_t row) {
      char* const out = out_bytes + row * row_bytes;
      if (stream)
        stream_copy(out, in_bytes + t * row_bytes, row_bytes);
      else
        std::memcpy(out, in_bytes + t * row_bytes, row_bytes);
    });
    if (stream) finish_streaming();
  });
  inverse.zero_empty(out_bytes, row_bytes);
  return rows;
}

namespace {

at::Tensor encode_backward(const at::Tensor& grad_rows, const at::Tensor& dest) {
  check_dim(grad_rows, "grad_rows", 2);
  check_floating(grad_rows, "grad_rows");
  return gather_sum(grad_rows, dest, std::nullopt);
}

}  // namespace
}  // namespace tutelx

TORCH_LIBRARY_IMPL(tutelx, CPU, m) {
  m.impl("encode", &tutelx::encode);
  m.impl("encode_backward", &tutelx::encode_backward);
}
