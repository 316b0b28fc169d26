// out[t] = sum_k weights[t,k] * rows[dest[t,k]]: decode, and without weights the backward of encode.
#pragma once
#include <ATen/ATen.h>

#include <optional>

namespace tutelx {

// Enough bytes to a task that threads are worth waking, few enough that they balance.
inline int64_t rows_per_task(int64_t row_bytes) {
  return std::max<int64_t>(1, 131072 / std::max<int64_t>(1, row_bytes));
}

// rows [R,D], dest [T,K] int32, weights [T,K] in rows' dtype or float32. Returns [T,D].
at::Tensor gather_sum(const at::Tensor& rows, const at::Tensor& dest, const std::optional<at::Tensor>& weights);

}  // namespace tutelx
