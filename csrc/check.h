// Checks at the door. Each message names what was given and what was expected.
#pragma once
#include <ATen/ATen.h>

#include <limits>

namespace tutelx {

inline void check_dim(const at::Tensor& t, const char* name, int64_t dim) {
  TORCH_CHECK_VALUE(t.dim() == dim, name, " has ", t.dim(), " dimensions, expected ", dim);
}

inline void check_size(const at::Tensor& t, const char* name, int64_t dim, int64_t size, const char* what) {
  TORCH_CHECK_VALUE(t.size(dim) == size, name, ".size(", dim, ")=", t.size(dim), " differs from ", what, "=", size);
}

inline void check_dtype(const at::Tensor& t, const char* name, at::ScalarType dtype) {
  TORCH_CHECK_TYPE(t.scalar_type() == dtype, name, " is ", t.scalar_type(), ", expected ", dtype);
}

inline void check_floating(const at::Tensor& t, const char* name) {
  const at::ScalarType d = t.scalar_type();
  TORCH_CHECK_TYPE(d == at::kFloat || d == at::kDouble || d == at::kBFloat16 || d == at::kHalf, name, " is ", d,
                   ", expected float32, float64, bfloat16 or float16");
}

// Rows and slots are numbered with int32.
inline void check_index_range(int64_t count, const char* name) {
  TORCH_CHECK_VALUE(count <= std::numeric_limits<int32_t>::max(), name, "=", count, " exceeds the int32 limit ",
                    std::numeric_limits<int32_t>::max());
}

// Which groups of experts a token's K choices lie in.
inline void check_groups(int64_t num_experts, int64_t k, int64_t groups, int64_t kept, int64_t best_of) {
  TORCH_CHECK_VALUE(groups >= 1 && num_experts % groups == 0, "num_experts=", num_experts,
                    " is no multiple of num_groups=", groups);
  TORCH_CHECK_VALUE(kept >= 1 && kept <= groups, "kept_groups=", kept, " is outside [1, num_groups=", groups, "]");
  TORCH_CHECK_VALUE(k <= kept * (num_experts / groups), "top_k=", k, " exceeds the ", kept * (num_experts / groups),
                    " experts of kept_groups=", kept, " groups");
  TORCH_CHECK_VALUE(best_of == 1 || best_of == 2, "best_of_group=", best_of, " is neither 1 nor 2");
}

// What gate_backward is given, against logits [T,E] and expert_ids [T,K].
inline void check_gate_gradients(const at::Tensor& grad_weights, const at::Tensor& grad_score_sum,
                                 const at::Tensor& grad_logsumexp, const at::Tensor& logits,
                                 const at::Tensor& expert_ids, const at::Tensor& logsumexp) {
  const int64_t T = logits.size(0), E = logits.size(1);
  check_size(expert_ids, "expert_ids", 0, T, "T");
  TORCH_CHECK_VALUE(grad_weights.sizes() == expert_ids.sizes(), "grad_weights has shape ", grad_weights.sizes(),
                    ", expert_ids has ", expert_ids.sizes());
  check_size(grad_score_sum, "grad_score_sum", 0, E, "E");
  check_size(grad_logsumexp, "grad_logsumexp", 0, T, "T");
  check_size(logsumexp, "logsumexp", 0, T, "T");
}

}  // namespace tutelx
