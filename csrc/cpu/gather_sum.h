// out[t] = sum_k weights[t,k] * rows[dest[t,k]]: decode, and without weights the backward of encode.
#pragma once
#include <ATen/ATen.h>

#include <optional>

namespace tutelx {

// rows [R,D], dest [T,K] int32, weights [T,K] in rows' dtype or float32. Returns [T,D].
at::Tensor gather_sum(const at::Tensor& rows, const at::Tensor& dest, const std::optional<at::Tensor>& weights);

}  // namespace tutelx
