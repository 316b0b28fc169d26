// The operators as plain Python functions. The general way through torch.ops costs as much as a small operator does;
// what is called is the same dispatcher entry, so autograd, autocast and fake tensors see no difference. Tracing by
// torch.compile does, and takes the general way.
#include <torch/extension.h>

#include <optional>
#include <string>
#include <tuple>
#include <type_traits>
#include <utility>
#include <vector>

#include "brief_call.h"
#include "operator.h"

namespace tutelx {
namespace {

// What keeps an argument that comes from Python: a list needs a place of its own.
template <class T>
using Held = std::conditional_t<std::is_same_v<T, at::TensorList>, std::vector<Tensor>, T>;

// A function that calls the operator of its name, without the interpreter's lock.
template <class Result, class... Arguments>
void define(pybind11::module_& m, const char* name, Result (*)(Arguments...)) {
  m.def(name, [op = find<Result(Arguments...)>(name)](Held<Arguments>... arguments) -> Result {
    const pybind11::gil_scoped_release no_lock;
    return op.call(arguments...);
  });
}

void define_brief_calls(pybind11::module_& m) {
  pybind11::class_<Unread>(m, "Unread").def("__call__", [](const Unread& self) { return self.tensors; });
  pybind11::class_<BriefCall>(m, "BriefCall")
      .def(pybind11::init<const Tensor&, Tensor, int64_t, std::string, bool, Tensors, Tensors, Tensors, Tensors,
                          Tensors, Tensors, std::string, int64_t, int64_t>())
      .def("is_like", &BriefCall::is_like)
      .def("run", &BriefCall::run);
  m.def("again", &again);
  m.def("are_few", &are_few);
  m.def("state_of", &state_of);
  m.def("is_state_of", &is_state_of);
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
  define(m, "gate",
         static_cast<Four (*)(const Tensor&, int64_t, Text, bool, const OptionalTensor&, int64_t, int64_t, int64_t)>(
             nullptr));
  define(m, "gate_backward",
         static_cast<Tensor (*)(const Tensor&, const Tensor&, const Tensor&, const Tensor&, const Tensor&,
                                const Tensor&, Text, bool)>(nullptr));
  define(m, "linear", static_cast<Tensor (*)(const Tensor&, const Tensor&)>(nullptr));
  using Five = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;
  define(m, "inference",
         static_cast<Five (*)(const Tensor&, const Tensor&, const Tensor&, int64_t, List, List, List, List, List, List,
                              Text, int64_t, int64_t)>(nullptr));
  define(m, "gated_inference", static_cast<GatedInference*>(nullptr));
  define_brief_calls(m);
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
