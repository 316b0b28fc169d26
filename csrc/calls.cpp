// The operators as plain Python functions. The general way through torch.ops costs as much as a small operator does;
// what is called is the same dispatcher entry, so autograd, autocast and fake tensors see no difference. Tracing by
// torch.compile does, and takes the general way.
#include <ATen/autocast_mode.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/csrc/profiler/orchestration/observer.h>
#include <torch/extension.h>

#include <algorithm>
#include <initializer_list>
#include <optional>
#include <string>
#include <tuple>
#include <type_traits>
#include <utility>
#include <vector>

#include "module_state.h"

namespace tutelx {
namespace {

using at::Tensor;

// What keeps an argument that comes from Python: a list needs a place of its own.
template <class T>
using Held = std::conditional_t<std::is_same_v<T, at::TensorList>, std::vector<Tensor>, T>;

template <class Function>
c10::TypedOperatorHandle<Function> find(const char* name) {
  return c10::Dispatcher::singleton()
      .findSchemaOrThrow((std::string("tutelx::") + name).c_str(), "")
      .template typed<Function>();
}

// A function that calls the operator of its name, without the interpreter's lock.
template <class Result, class... Arguments>
void define(pybind11::module_& m, const char* name, Result (*)(Arguments...)) {
  m.def(name, [op = find<Result(Arguments...)>(name)](Held<Arguments>... arguments) -> Result {
    const pybind11::gil_scoped_release no_lock;
    return op.call(arguments...);
  });
}

using Tensors = std::vector<Tensor>;

bool wants_gradient(const Tensor& t) { return at::GradMode::is_enabled() && t.requires_grad(); }
bool want_gradients(const Tensors& tensors) { return std::any_of(tensors.begin(), tensors.end(), wants_gradient); }

// Whether a call is one of decoding, for which there are quicker ways: few tokens x [T,D] on a CPU, of a dtype that
// products with few rows have (csrc/cpu/few_rows.h), nothing that a gradient is wanted of, no autocast.
bool are_few(const Tensor& x, const Tensors& others) {
  constexpr int64_t most_tokens = 64;
  return x.dim() == 2 && x.size(0) <= most_tokens && x.is_cpu() &&
         (x.scalar_type() == at::kFloat || x.scalar_type() == at::kBFloat16 || x.scalar_type() == at::kHalf) &&
         !wants_gradient(x) && !want_gradients(others) && !at::autocast::is_autocast_enabled(at::kCPU);
}

using Eight = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;
using GatedInference = Eight(const Tensor&, const Tensor&, int64_t, c10::string_view, bool, at::TensorList,
                             at::TensorList, at::TensorList, at::TensorList, at::TensorList, at::TensorList,
                             c10::string_view, int64_t, int64_t);

// What keeps weights from being used as they are, asked in one call: each question from Python costs what a small
// operator does.
bool fit(const Tensor& x, const Tensor& router, std::initializer_list<const Tensors*> weights) {
  if (!are_few(x, {router}) || router.scalar_type() != x.scalar_type()) return false;
  return std::all_of(weights.begin(), weights.end(), [&](const Tensors* some) {
    return (some->empty() || some->front().scalar_type() == x.scalar_type()) && !want_gradients(*some);
  });
}

// What an operator gave, not made Python objects of before somebody looks at it.
struct Unread {
  Eight tensors;
};

// gated_inference, or nothing where an ordinary call would do something else besides: y, and all it gave.
void define_gated_inference_if_few(pybind11::module_& m) {
  pybind11::class_<Unread>(m, "Unread").def("__call__", [](const Unread& self) { return self.tensors; });
  m.def("gated_inference_if_few",
        [op = find<GatedInference>("gated_inference")](
            const Tensor& x, const Tensor& router, int64_t k, c10::string_view score, bool renormalize,
            const Tensors& gate, const Tensors& up, const Tensors& down, const Tensors& gate_bias,
            const Tensors& up_bias, const Tensors& down_bias, c10::string_view activation, int64_t tile_rows,
            int64_t tile_columns) -> std::optional<std::pair<Tensor, Unread>> {
          if (torch::profiler::impl::profilerEnabled() ||
              !fit(x, router, {&gate, &up, &down, &gate_bias, &up_bias, &down_bias}))
            return std::nullopt;
          const pybind11::gil_scoped_release no_lock;
          const at::AutoDispatchBelowAutograd no_graph;
          Eight given = op.call(x, router, k, score, renormalize, gate, up, down, gate_bias, up_bias, down_bias,
                                activation, tile_rows, tile_columns);
          const Tensor y = std::get<0>(given);
          return std::pair(y, Unread{std::move(given)});
        });
}

}  // namespace
}  // namespace tutelx

PYBIND11_MODULE(_calls, m) {
  using namespace tutelx;
  using Pair = std::tuple<Tensor, Tensor>;
  using Four = std::tuple<Tensor, Tensor, Tensor, Tensor>;
  using OptionalTensor = std::optional<Tensor>;
  using Text = c10::string_view;
  using List = at::TensorList;
  define(m, "gate", static_cast<Four (*)(const Tensor&, int64_t, Text, bool)>(nullptr));
  define(m, "gate_backward",
         static_cast<Tensor (*)(const Tensor&, const Tensor&, const Tensor&, const Tensor&, const Tensor&,
                                const Tensor&, Text, bool)>(nullptr));
  define(m, "linear", static_cast<Tensor (*)(const Tensor&, const Tensor&)>(nullptr));
  using Five = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;
  define(m, "inference",
         static_cast<Five (*)(const Tensor&, const Tensor&, const Tensor&, int64_t, List, List, List, List, List, List,
                              Text, int64_t, int64_t)>(nullptr));
  define(m, "gated_inference", static_cast<GatedInference*>(nullptr));
  define_gated_inference_if_few(m);
  m.def("are_few", &are_few);
  m.def("state_of", &state_of);
  m.def("is_state_of", &is_state_of);
  define(m, "route",
         static_cast<Four (*)(const Tensor&, int64_t, std::optional<int64_t>, bool, const OptionalTensor&)>(nullptr));
  define(m, "encode", static_cast<Tensor (*)(const Tensor&, const Tensor&, const Tensor&)>(nullptr));
  define(m, "encode_backward", static_cast<Tensor (*)(const Tensor&, const Tensor&)>(nullptr));
  define(m, "decode", static_cast<Tensor (*)(const Tensor&, const Tensor&, const Tensor&, const Tensor&)>(nullptr));
  define(m, "decode_backward",
         static_cast<Pair (*)(const Tensor&, const Tensor&, const Tensor&, const Tensor&, const Tensor&)>(nullptr));
  define(m, "activation", static_cast<Tensor (*)(const Tensor&, const OptionalTensor&, Text)>(nullptr));
  define(m, "activation_backward",
         static_cast<Pair (*)(const Tensor&, const Tensor&, const OptionalTensor&, Text)>(nullptr));
}
