// The backward of activation.
#include <ATen/ATen.h>
#include <torch/csrc/autograd/autograd_not_implemented_fallback.h>
#include <torch/library.h>

#include <optional>
#include <string>
#include <tuple>

#include "node.h"

namespace tutelx::autograd {
namespace {

struct ActivationBackward final : Node {
  SavedVariable gate, up;
  std::string kind;
  bool gated = false;

  std::string name() const override { return "tutelx::ActivationBackward"; }
  variable_list apply(variable_list&& grads) override {
    if (!grads[0].defined()) return {Tensor(), Tensor()};
    static const auto op = operator_handle<std::tuple<Tensor, Tensor>(
        const Tensor&, const Tensor&, const std::optional<Tensor>&, c10::string_view)>("tutelx::activation_backward");
    std::optional<Tensor> other;
    if (gated) other = up.unpack();
    auto [grad_gate, grad_up] = op.call(grads[0], gate.unpack(), other, kind);
    return {grad_gate, gated ? grad_up : Tensor()};
  }
  void release_variables() override {
    gate.reset_data();
    up.reset_data();
  }
};

Tensor activation(const Tensor& gate, const std::optional<Tensor>& up, c10::string_view kind) {
  static const auto op =
      operator_handle<Tensor(const Tensor&, const std::optional<Tensor>&, c10::string_view)>("tutelx::activation");
  if (!records(gate, up)) return below(op, gate, up, kind);
  const auto [pointer, node] = make_node<ActivationBackward>(gate, up);
  node->gate = saved(gate);
  node->gated = up.has_value();
  if (up) node->up = saved(*up);
  node->kind = std::string(kind);
  const Tensor out = below(op, gate, up, kind);
  torch::autograd::set_history(out, pointer);
  return out;
}

}  // namespace
}  // namespace tutelx::autograd

TORCH_LIBRARY_IMPL(tutelx, Autograd, m) {
  m.impl("activation", &tutelx::autograd::activation);
  m.impl("activation_backward", torch::autograd::autogradNotImplementedFallback());
}
