// Calls of few tokens without a gradient, as in decoding, made as one operator. What one needs but its tokens is taken
// from Python once, and what could keep the next from being like it is asked in one call: each question from Python
// costs what a small operator does.
#pragma once
#include <ATen/Parallel.h>
#include <ATen/autocast_mode.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/profiler/orchestration/observer.h>
#include <torch/extension.h>

#include <algorithm>
#include <array>
#include <optional>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "module_state.h"
#include "operator.h"

namespace tutelx {

using at::Tensor;
using Tensors = std::vector<Tensor>;

inline bool wants_gradient(const Tensor& t) { return at::GradMode::is_enabled() && t.requires_grad(); }
inline bool want_gradients(const Tensors& tensors) {
  return std::any_of(tensors.begin(), tensors.end(), wants_gradient);
}

// Whether a call is one of decoding, for which there are quicker ways: few tokens x [T,D] on a CPU, of a dtype that
// products with few rows have (csrc/cpu/few_rows.h), nothing that a gradient is wanted of, no autocast.
inline bool are_few(const Tensor& x, const Tensors& others) {
  constexpr int64_t most_tokens = 64;
  return x.dim() == 2 && x.size(0) <= most_tokens && x.is_cpu() &&
         (x.scalar_type() == at::kFloat || x.scalar_type() == at::kBFloat16 || x.scalar_type() == at::kHalf) &&
         !wants_gradient(x) && !want_gradients(others) && !at::autocast::is_autocast_enabled(at::kCPU);
}

using Eight = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;
using GatedInference = Eight(const Tensor&, const Tensor&, int64_t, c10::string_view, bool, at::TensorList,
                             at::TensorList, at::TensorList, at::TensorList, at::TensorList, at::TensorList,
                             c10::string_view, int64_t, int64_t);

// What an operator gave, not made Python objects of before somebody looks at it.
struct Unread {
  Eight tensors;
};

// gated_inference of any tokens.
class BriefCall {
 public:
  using Found = std::pair<Tensor, Unread>;

  // x: such tokens.
  BriefCall(const Tensor& x, Tensor router, int64_t k, std::string score, bool renormalize, Tensors gate, Tensors up,
            Tensors down, Tensors gate_bias, Tensors up_bias, Tensors down_bias, std::string activation,
            int64_t tile_rows, int64_t tile_columns)
      : like_(Kind::of(x)),
        router_(std::move(router)),
        k_(k),
        score_(std::move(score)),
        renormalize_(renormalize),
        weights_{std::move(gate),      std::move(up),      std::move(down),
                 std::move(gate_bias), std::move(up_bias), std::move(down_bias)},
        activation_(std::move(activation)),
        tile_rows_(tile_rows),
        tile_columns_(tile_columns) {}

  // Whether x [..., M] is as many tokens of the same dtype, in the same modes.
  bool is_like(const Tensor& x) const { return Kind::of(x) == like_; }

  // y [..., M] and all that the operator gave, or nothing where an ordinary call would do something else besides.
  std::optional<Found> run(const Tensor& x) const {
    static const auto op = find<GatedInference>("gated_inference");
    const Tensor tokens = x.dim() == 2 ? x : x.reshape({-1, x.size(-1)});
    if (torch::profiler::impl::profilerEnabled() || !fits(tokens)) return std::nullopt;
    const pybind11::gil_scoped_release no_lock;
    const at::AutoDispatchBelowAutograd no_graph;
    const auto& [gate, up, down, gate_bias, up_bias, down_bias] = weights_;
    Eight given = op.call(tokens, router_, k_, score_, renormalize_, gate, up, down, gate_bias, up_bias, down_bias,
                          activation_, tile_rows_, tile_columns_);
    const Tensor y = std::get<0>(given);
    return Found(x.dim() == 2 ? y : y.reshape(x.sizes()), Unread{std::move(given)});
  }

 private:
  struct Kind {
    int64_t elements, last, threads;
    at::ScalarType dtype;
    bool grad;

    static Kind of(const Tensor& x) {
      return {x.numel(), x.dim() > 0 ? x.size(-1) : 0, at::get_num_threads(), x.scalar_type(),
              at::GradMode::is_enabled()};
    }
    bool operator==(const Kind& o) const {
      return elements == o.elements && last == o.last && threads == o.threads && dtype == o.dtype && grad == o.grad;
    }
  };

  // Whether the weights are used as they are.
  bool fits(const Tensor& tokens) const {
    if (!are_few(tokens, {router_}) || router_.scalar_type() != tokens.scalar_type()) return false;
    return std::all_of(weights_.begin(), weights_.end(), [&](const Tensors& some) {
      return (some.empty() || some.front().scalar_type() == tokens.scalar_type()) && !want_gradients(some);
    });
  }

  Kind like_;
  Tensor router_;
  int64_t k_;
  std::string score_;
  bool renormalize_;
  std::array<Tensors, 6> weights_;
  std::string activation_;
  int64_t tile_rows_, tile_columns_;
};

// A call that ran: what was asked as its top_k, the call, and the decision that it ran by.
using Kept = std::tuple<pybind11::handle, const BriefCall*, pybind11::handle>;
inline Kept kept(pybind11::handle entry) {
  return {PyTuple_GET_ITEM(entry.ptr(), 0), &pybind11::cast<const BriefCall&>(PyTuple_GET_ITEM(entry.ptr(), 1)),
          PyTuple_GET_ITEM(entry.ptr(), 2)};
}

// y, its decision and all that the operator gave, of a call like one that was kept, if the layer is as it was then.
inline pybind11::object again(pybind11::handle layer, const pybind11::tuple& settings, const pybind11::tuple& state,
                              const pybind11::tuple& calls, pybind11::handle x, pybind11::handle top_k) {
  if (!THPVariable_CheckExact(x.ptr())) return pybind11::none();
  const Tensor& tokens = THPVariable_Unpack(x.ptr());
  for (const pybind11::handle entry : calls) {
    const auto [asked, call, decision] = kept(entry);
    if (!call->is_like(tokens) || Py_TYPE(asked.ptr()) != Py_TYPE(top_k.ptr()) || !asked.equal(top_k)) continue;
    if (!is_state_of(state, layer, settings)) break;
    auto found = call->run(tokens);
    if (!found) break;
    return pybind11::make_tuple(std::move(found->first), decision, std::move(found->second));
  }
  return pybind11::none();
}

}  // namespace tutelx
