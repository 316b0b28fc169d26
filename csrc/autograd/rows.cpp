// The backward of encode and decode.
#include <ATen/ATen.h>
#include <torch/csrc/autograd/autograd_not_implemented_fallback.h>
#include <torch/library.h>

#include <tuple>

#include "node.h"

namespace tutelx::autograd {
namespace {

Tensor encode(const Tensor& x, const Tensor& source, const Tensor& dest);
Tensor encode_backward(const Tensor& grad_rows, const Tensor& dest);

// The inverse of `dest`, for the backward of the backward only.
Tensor source_of(const Tensor& dest, int64_t rows) {
  const auto options = dest.options();
  const Tensor flat = dest.reshape({-1}).to(at::kLong);
  const Tensor source = at::full({rows + 1}, -1, options);
  source.index_put_({at::where(flat < 0, rows, flat)}, at::arange(dest.numel(), options));
  return source.slice(0, 0, rows);
}

struct EncodeBackward final : Node {
  SavedVariable dest;

  std::string name() const override { return "tutelx::EncodeBackward"; }
  variable_list apply(variable_list&& grads) override {
    if (!grads[0].defined()) return {Tensor()};
    return {encode_backward(grads[0], dest.unpack())};
  }
  void release_variables() override { dest.reset_data(); }
};

struct EncodeBackwardBackward final : Node {
  SavedVariable dest;
  int64_t rows = 0;

  std::string name() const override { return "tutelx::EncodeBackwardBackward"; }
  variable_list apply(variable_list&& grads) override {
    if (!grads[0].defined()) return {Tensor()};
    const Tensor to = dest.unpack();
    return {encode(grads[0], source_of(to, rows), to)};
  }
  void release_variables() override { dest.reset_data(); }
};

struct DecodeBackward final : Node {
  SavedVariable rows, dest, source, weights;

  std::string name() const override { return "tutelx::DecodeBackward"; }
  variable_list apply(variable_list&& grads) override {
    if (!grads[0].defined()) return {Tensor(), Tensor()};
    static const auto op = operator_handle<std::tuple<Tensor, Tensor>(
        const Tensor&, const Tensor&, const Tensor&, const Tensor&, const Tensor&)>("tutelx::decode_backward");
    auto [grad_rows, grad_weights] = op.call(grads[0], rows.unpack(), dest.unpack(), source.unpack(), weights.unpack());
    return {grad_rows, grad_weights};
  }
  void release_variables() override {
    for (SavedVariable* s : {&rows, &dest, &source, &weights}) s->reset_data();
  }
};

Tensor encode(const Tensor& x, const Tensor& source, const Tensor& dest) {
  static const auto op = operator_handle<Tensor(const Tensor&, const Tensor&, const Tensor&)>("tutelx::encode");
  if (!records(x)) return below(op, x, source, dest);
  const auto [pointer, node] = make_node<EncodeBackward>(x);
  node->dest = saved(dest);
  const Tensor rows = below(op, x, source, dest);
  torch::autograd::set_history(rows, pointer);
  return rows;
}

Tensor encode_backward(const Tensor& grad_rows, const Tensor& dest) {
  static const auto op = operator_handle<Tensor(const Tensor&, const Tensor&)>("tutelx::encode_backward");
  if (!records(grad_rows)) return below(op, grad_rows, dest);
  const auto [pointer, node] = make_node<EncodeBackwardBackward>(grad_rows);
  node->dest = saved(dest);
  node->rows = grad_rows.size(0);
  const Tensor grad_x = below(op, grad_rows, dest);
  torch::autograd::set_history(grad_x, pointer);
  return grad_x;
}

Tensor decode(const Tensor& rows, const Tensor& dest, const Tensor& source, const Tensor& weights) {
  static const auto op =
      operator_handle<Tensor(const Tensor&, const Tensor&, const Tensor&, const Tensor&)>("tutelx::decode");
  if (!records(rows, weights)) return below(op, rows, dest, source, weights);
  const auto [pointer, node] = make_node<DecodeBackward>(rows, weights);
  node->rows = saved(rows);
  node->dest = saved(dest);
  node->source = saved(source);
  node->weights = saved(weights);
  const Tensor y = below(op, rows, dest, source, weights);
  torch::autograd::set_history(y, pointer);
  return y;
}

}  // namespace
}  // namespace tutelx::autograd

TORCH_LIBRARY_IMPL(tutelx, Autograd, m) {
  m.impl("encode", &tutelx::autograd::encode);
  m.impl("encode_backward", &tutelx::autograd::encode_backward);
  m.impl("decode", &tutelx::autograd::decode);
  m.impl("decode_backward", torch::autograd::autogradNotImplementedFallback());
}
