#include "choice.h"

#include <ATen/Dispatch.h>

#include <algorithm>
#include <limits>

#include "../check.h"

namespace tutelx {
namespace {

template <class W>
TUTELX_INLINE void add_bias(const W* score, W factor, const W* bias, W* value, int64_t E) {
  for (int64_t e = 0; e < E; ++e) value[e] = score[e] * factor + bias[e];
}
TUTELX_SIMD void add_bias_simd(const float* score, float factor, const float* bias, float* value, int64_t E) {
  add_bias(score, factor, bias, value, E);
}
TUTELX_SIMD void add_bias_simd(const double* score, double factor, const double* bias, double* value, int64_t E) {
  add_bias(score, factor, bias, value, E);
}

template <class W>
std::vector<W> lowest(int64_t n) {
  return std::vector<W>(padded(n), -std::numeric_limits<W>::infinity());
}

}  // namespace

void ChoiceRule::check(int64_t num_experts, int64_t k) const {
  check_groups(num_experts, k, groups, kept, best_of);
  if (!bias) return;
  check_dim(*bias, "bias", 1);
  check_size(*bias, "bias", 0, num_experts, "num_experts");
  AT_DISPATCH_FLOATING_TYPES(bias->scalar_type(), "gate", [&] {
    const scalar_t* const b = bias->const_data_ptr<scalar_t>();
    for (int64_t e = 0; e < num_experts; ++e)
      TORCH_CHECK_VALUE(b[e] < std::numeric_limits<scalar_t>::infinity(), "bias[", e, "]=", b[e],
                        " is not a number the gate can compare");
  });
}

template <class W>
Chooser<W>::Chooser(const ChoiceRule& rule, int64_t num_experts)
    : E_(num_experts),
      groups_(rule.groups),
      kept_(rule.kept),
      size_(num_experts / rule.groups),
      two_(rule.best_of == 2 && size_ > 1),
      bias_(rule.bias.value_or(at::Tensor())),
      value_(lowest<W>(num_experts)),
      of_group_(lowest<W>(rule.groups)),
      candidate_(lowest<W>(rule.kept * size_)),
      group_(rule.kept) {}

template <class W>
void Chooser<W>::choose(const W* logit, const W* score, W factor, int64_t K, int32_t* ids) {
  if (bias_.defined()) add_bias_simd(score, factor, bias_.const_data_ptr<W>(), value_.data(), E_);
  if (kept_ == groups_) return choose_best(value_.data(), largest(value_.data(), padded(E_)), E_, K, ids, scratch_);
  const W* const value = bias_.defined() ? value_.data() : logit;
  keep_groups(value);
  W* at = candidate_.data();
  for (const int32_t g : group_) at = std::copy_n(value + g * size_, size_, at);
  std::fill(at, candidate_.data() + candidate_.size(), -std::numeric_limits<W>::infinity());
  choose_best(candidate_.data(), largest(candidate_.data(), candidate_.size()), kept_ * size_, K, ids, scratch_);
  for (int64_t k = 0; k < K; ++k) ids[k] = static_cast<int32_t>(group_[ids[k] / size_] * size_ + ids[k] % size_);
}

template <class W>
void Chooser<W>::keep_groups(const W* value) {
  for (int64_t g = 0; g < groups_; ++g, value += size_) {
    W first = value[0], second = -std::numeric_limits<W>::infinity();
    for (int64_t i = 1; i < size_; ++i) {
      second = std::max(second, std::min(first, value[i]));
      first = std::max(first, value[i]);
    }
    of_group_[g] = two_ ? first + second : first;
  }
  std::fill(of_group_.begin() + groups_, of_group_.end(), -std::numeric_limits<W>::infinity());
  choose_best(of_group_.data(), largest(of_group_.data(), of_group_.size()), groups_, kept_, group_.data(), scratch_);
  std::sort(group_.begin(), group_.end());
}

template class Chooser<float>;
template class Chooser<double>;

}  // namespace tutelx
