// The backward of expert_ffn and expert_linear, whose weights are lists: one gradient for every tensor in them.
#include <ATen/ATen.h>
#include <torch/csrc/autograd/autograd_not_implemented_fallback.h>
#include <torch/library.h>

#include <array>
#include <string>
#include <tuple>

#include "node.h"

namespace tutelx::autograd {
namespace {

// Of the node's outputs: rows first, then the tensors of all lists.
bool needs_weights(const Node& node) {
  for (size_t i = 1; i < node.num_outputs(); ++i)
    if (node.task_should_compute_output(i)) return true;
  return false;
}

// Appends a list's gradients, or as many undefined ones; an empty gradient of a parameter that has elements means that
// its expert has none.
void append(variable_list& out, const std::vector<Tensor>& grads, const std::vector<Tensor>& like) {
  for (size_t i = 0; i < like.size(); ++i) {
    const bool none = grads.empty() || grads[i].sym_sizes() != like[i].sym_sizes();
    out.push_back(none ? Tensor() : grads[i]);
  }
}

// ---- expert_ffn ----------------------------------------------------------------------------------------------------

using Lists = std::array<std::vector<Tensor>, 6>;  // gate, up, down and their biases
using Forward = std::tuple<Tensor, Tensor, Tensor>;
using Backward = std::tuple<Tensor, std::vector<Tensor>, std::vector<Tensor>, std::vector<Tensor>, std::vector<Tensor>,
                            std::vector<Tensor>, std::vector<Tensor>>;

struct ExpertFfnBackward final : Node {
  SavedVariable rows, counts, offsets, gate_pre, up_pre;
  std::array<std::vector<SavedVariable>, 6> lists;
  std::string activation;
  int64_t tile_rows = 0, tile_columns = 0;
  bool zero_unused = true;

  std::string name() const override { return "tutelx::ExpertFfnBackward"; }
  variable_list apply(variable_list&& grads) override {
    if (!grads[0].defined()) return variable_list(num_outputs());
    static const auto op =
        operator_handle<Backward(const Tensor&, const Tensor&, const Tensor&, const Tensor&, at::TensorList,
                                 at::TensorList, at::TensorList, at::TensorList, at::TensorList, at::TensorList,
                                 const Tensor&, const Tensor&, c10::string_view, int64_t, int64_t, bool, bool, bool)>(
            "tutelx::expert_ffn_backward");
    Lists w;
    for (size_t i = 0; i < w.size(); ++i) w[i] = unpacked(lists[i]);
    const bool need_rows = task_should_compute_output(0);
    const auto [grad_rows, gate, up, down, gate_bias, up_bias, down_bias] =
        op.call(grads[0], rows.unpack(), counts.unpack(), offsets.unpack(), w[0], w[1], w[2], w[3], w[4], w[5],
                gate_pre.unpack(), up_pre.unpack(), activation, tile_rows, tile_columns, need_rows,
                needs_weights(*this), zero_unused);
    variable_list out{need_rows ? grad_rows : Tensor()};
    const std::vector<Tensor>* const given[] = {&gate, &up, &down, &gate_bias, &up_bias, &down_bias};
    for (size_t i = 0; i < w.size(); ++i) append(out, *given[i], w[i]);
    return out;
  }
  void release_variables() override {
    for (SavedVariable* s : {&rows, &counts, &offsets, &gate_pre, &up_pre}) s->reset_data();
    for (auto& list : lists)
      for (SavedVariable& s : list) s.reset_data();
  }
};

Forward expert_ffn(const Tensor& rows, const Tensor& counts, const Tensor& offsets, at::TensorList gate,
                   at::TensorList up, at::TensorList down, at::TensorList gate_bias, at::TensorList up_bias,
                   at::TensorList down_bias, c10::string_view activation, int64_t tile_rows, int64_t tile_columns,
                   bool keep, bool zero_unused) {
  static const auto op = operator_handle<Forward(
      const Tensor&, const Tensor&, const Tensor&, at::TensorList, at::TensorList, at::TensorList, at::TensorList,
      at::TensorList, at::TensorList, c10::string_view, int64_t, int64_t, bool, bool)>("tutelx::expert_ffn");
  const bool recorded = records(rows, gate, up, down, gate_bias, up_bias, down_bias);
  const Forward out = below(op, rows, counts, offsets, gate, up, down, gate_bias, up_bias, down_bias, activation,
                            tile_rows, tile_columns, keep || recorded, zero_unused);
  if (!recorded) return out;
  const auto [pointer, node] = make_node<ExpertFfnBackward>(rows, gate, up, down, gate_bias, up_bias, down_bias);
  node->rows = saved(rows);
  node->counts = saved(counts);
  node->offsets = saved(offsets);
  node->gate_pre = saved(std::get<1>(out));
  node->up_pre = saved(std::get<2>(out));
  const at::TensorList lists[] = {gate, up, down, gate_bias, up_bias, down_bias};
  for (size_t i = 0; i < node->lists.size(); ++i) node->lists[i] = saved(lists[i]);
  node->activation = std::string(activation);
  node->tile_rows = tile_rows;
  node->tile_columns = tile_columns;
  node->zero_unused = zero_unused;
  torch::autograd::set_history(std::get<0>(out), pointer);
  return out;
}

// ---- expert_linear -------------------------------------------------------------------------------------------------

struct ExpertLinearBackward final : Node {
  SavedVariable rows, counts, offsets;
  std::vector<SavedVariable> weight, bias;
  int64_t tile_rows = 0, tile_columns = 0;

  std::string name() const override { return "tutelx::ExpertLinearBackward"; }
  variable_list apply(variable_list&& grads) override {
    if (!grads[0].defined()) return variable_list(num_outputs());
    static const auto op = operator_handle<std::tuple<Tensor, std::vector<Tensor>, std::vector<Tensor>>(
        const Tensor&, const Tensor&, const Tensor&, const Tensor&, at::TensorList, at::TensorList, int64_t, int64_t,
        bool, bool)>("tutelx::expert_linear_backward");
    const std::vector<Tensor> w = unpacked(weight), b = unpacked(bias);
    const bool need_rows = task_should_compute_output(0);
    const auto [grad_rows, grad_weight, grad_bias] =
        op.call(grads[0], rows.unpack(), counts.unpack(), offsets.unpack(), w, b, tile_rows, tile_columns, need_rows,
                needs_weights(*this));
    variable_list out{need_rows ? grad_rows : Tensor()};
    append(out, grad_weight, w);
    append(out, grad_bias, b);
    return out;
  }
  void release_variables() override {
    for (SavedVariable* s : {&rows, &counts, &offsets}) s->reset_data();
    for (auto* list : {&weight, &bias})
      for (SavedVariable& s : *list) s.reset_data();
  }
};

Tensor expert_linear(const Tensor& rows, const Tensor& counts, const Tensor& offsets, at::TensorList weight,
                     at::TensorList bias, int64_t tile_rows, int64_t tile_columns) {
  static const auto op = operator_handle<Tensor(const Tensor&, const Tensor&, const Tensor&, at::TensorList,
                                                at::TensorList, int64_t, int64_t)>("tutelx::expert_linear");
  const Tensor out = below(op, rows, counts, offsets, weight, bias, tile_rows, tile_columns);
  if (!records(rows, weight, bias)) return out;
  const auto [pointer, node] = make_node<ExpertLinearBackward>(rows, weight, bias);
  node->rows = saved(rows);
  node->counts = saved(counts);
  node->offsets = saved(offsets);
  node->weight = saved(weight);
  node->bias = saved(bias);
  node->tile_rows = tile_rows;
  node->tile_columns = tile_columns;
  torch::autograd::set_history(out, pointer);
  return out;
}

}  // namespace
}  // namespace tutelx::autograd

TORCH_LIBRARY_IMPL(tutelx, Autograd, m) {
  m.impl("expert_ffn", &tutelx::autograd::expert_ffn);
  m.impl("expert_linear", &tutelx::autograd::expert_linear);
  for (const char* name : {"expert_ffn_backward", "expert_linear_backward"})
    m.impl(name, torch::autograd::autogradNotImplementedFallback());
}
