// The backward of gate.
#include <ATen/ATen.h>
#include <torch/csrc/autograd/autograd_not_implemented_fallback.h>
#include <torch/library.h>

#include <optional>
#include <string>
#include <tuple>

#include "node.h"

namespace tutelx::autograd {
namespace {

using Gated = std::tuple<Tensor, Tensor, Tensor, Tensor>;

struct GateBackward final : Node {
  SavedVariable logits, expert_ids, logsumexp;
  std::string score;
  bool renormalize = false;

  std::string name() const override { return "tutelx::GateBackward"; }
  // Gradients of weights [T,K], score_sum [E] and logsumexp [T].
  variable_list apply(variable_list&& grads) override {
    if (!grads[0].defined() && !grads[1].defined() && !grads[2].defined()) return {Tensor()};
    static const auto op =
        operator_handle<Tensor(const Tensor&, const Tensor&, const Tensor&, const Tensor&, const Tensor&, const Tensor&,
                               c10::string_view, bool)>("tutelx::gate_backward");
    const Tensor in = logits.unpack(), ids = expert_ids.unpack(), lse = logsumexp.unpack();
    const auto or_zeros = [&](const Tensor& grad, c10::SymIntArrayRef sizes) {
      return grad.defined() ? grad : at::zeros_symint(sizes, lse.options());
    };
    return {op.call(or_zeros(grads[0], ids.sym_sizes()), or_zeros(grads[1], {in.sym_size(1)}),
                    or_zeros(grads[2], lse.sym_sizes()), in, ids, lse, score, renormalize)};
  }
  void release_variables() override {
    for (SavedVariable* s : {&logits, &expert_ids, &logsumexp}) s->reset_data();
  }
};

Gated gate(const Tensor& logits, int64_t k, c10::string_view score, bool renormalize, const std::optional<Tensor>& bias,
           int64_t num_groups, int64_t kept_groups, int64_t best_of_group) {
  static const auto op =
      operator_handle<Gated(const Tensor&, int64_t, c10::string_view, bool, const std::optional<Tensor>&, int64_t,
                            int64_t, int64_t)>("tutelx::gate");
  const Gated out = below(op, logits, k, score, renormalize, bias, num_groups, kept_groups, best_of_group);
  if (!records(logits)) return out;
  const auto& [expert_ids, weights, score_sum, logsumexp] = out;
  const auto [pointer, node] = make_node<GateBackward>(logits);
  node->logits = saved(logits);
  node->expert_ids = saved(expert_ids);
  node->logsumexp = saved(logsumexp.detach());  // itself would keep the node alive that keeps it
  node->score = std::string(score);
  node->renormalize = renormalize;
  for (const Tensor& t : {weights, score_sum, logsumexp}) torch::autograd::set_history(t, pointer);
  return out;
}

}  // namespace
}  // namespace tutelx::autograd

TORCH_LIBRARY_IMPL(tutelx, Autograd, m) {
  m.impl("gate", &tutelx::autograd::gate);
  m.impl("gate_backward", torch::autograd::autogradNotImplementedFallback());
}
