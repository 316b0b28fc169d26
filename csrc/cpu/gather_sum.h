// out[t] = sum_k weights[t,k] * rows[dest[t,k]]: decode, and without weights the backward of encode.
#pragma once
#include <ATen/ATen.h>

#include <optional>

namespace tutelx {

// The sums of some tokens at a time, for a caller that has its own threads.
class GatherSum {
 public:
  // dest [T,K] int32, weights [T,K] in the dtype of `options` or float32; dim: D.
  GatherSum(const at::Tensor& dest, const std::optional<at::Tensor>& weights, int64_t dim, at::TensorOptions options);

  // rows [R,D] contiguous. Each token is summed once.
  void tokens(const at::Tensor& rows, int64_t begin, int64_t end) const;
  const at::Tensor& out() const { return out_; }  // [T,D]

 private:
  at::Tensor dest_, weights_, out_;
};

// rows [R,D], dest [T,K] int32, weights [T,K] in rows' dtype or float32. Returns [T,D].
at::Tensor gather_sum(const at::Tensor& rows, const at::Tensor& dest, const std::optional<at::Tensor>& weights);

}  // namespace tutelx
