// The door for what holds state between ranks: messages, the exchange, the pipeline. Nothing here needs the GIL but
// the experts that are Python.
#include <ATen/core/LegacyTypeDispatch.h>
#include <torch/extension.h>

#include <optional>

#include "comm/exchange.h"
#include "comm/experts.h"
#include "comm/messages.h"
#include "comm/pipeline.h"
#include "comm/traffic.h"
#include "comm/weights.h"

namespace tutelx::comm {
namespace {

using Optional = std::vector<std::optional<at::Tensor>>;
using ReleaseGil = py::gil_scoped_release;
// What runs here is a kernel of one autograd node, which is Python's.
using BelowAutograd = at::AutoDispatchBelowADInplaceOrView;

Weights weights_of(const Optional& given) {
  Weights out;
  TORCH_CHECK_VALUE(given.size() == out.size(), given.size(), " weights were given, expected ", out.size());
  for (size_t i = 0; i < given.size(); ++i)
    if (given[i]) out[i] = *given[i];
  return out;
}

Optional optional(const Weights& weights) {
  Optional out;
  for (const at::Tensor& w : weights) out.push_back(w.defined() ? std::optional(w) : std::nullopt);
  return out;
}

at::Tensor all_to_all(Exchange& exchange, const at::Tensor& rows, const std::vector<std::vector<int64_t>>& counts) {
  const BelowAutograd guard;
  RowCounts c(exchange.world());
  TORCH_CHECK_VALUE(static_cast<int64_t>(counts.size()) == c.world(), "counts has ", counts.size(), " rows, expected ",
                    c.world());
  for (int64_t from = 0; from < c.world(); ++from) {
    TORCH_CHECK_VALUE(static_cast<int64_t>(counts[from].size()) == c.world(), "counts[", from, "] has ",
                      counts[from].size(), " entries, expected ", c.world());
    for (int64_t to = 0; to < c.world(); ++to) c.at(from, to) = counts[from][to];
  }
  const std::unique_ptr<Transfer> transfer = exchange.start(rows, c);
  for (int64_t step = 1; step < exchange.steps(); ++step) transfer->advance();
  return transfer->finish();
}

std::tuple<at::Tensor, Kept> ffn_forward(Exchange* exchange, const Traffic& traffic, WeightShards& shards,
                                         const at::Tensor& rows, const Optional& weights, const FfnOptions& options,
                                         bool keep) {
  const BelowAutograd guard;
  shards.start_gather(weights_of(weights));
  FfnForward experts(traffic, shards, options, keep);
  const at::Tensor out = run_pipeline(exchange, traffic, rows, std::ref(experts));
  return {out, experts.kept};
}

std::tuple<at::Tensor, Optional> ffn_backward(Exchange* exchange, const Traffic& traffic, WeightShards& shards,
                                              const at::Tensor& grad_out, const Kept& kept, const Optional& weights,
                                              const FfnOptions& options, bool need_weights) {
  const BelowAutograd guard;
  TORCH_CHECK_VALUE(static_cast<int64_t>(kept.size()) == 3 * traffic.chunks(), kept.size(),
                    " tensors were kept, expected 3 for each of ", traffic.chunks(), " chunks");
  shards.start_gather(weights_of(weights));
  FfnBackward experts(traffic, shards, options, kept, need_weights);
  const at::Tensor grad_rows = run_pipeline(exchange, traffic, grad_out, std::ref(experts));
  if (!need_weights) return {grad_rows, optional({})};
  return {grad_rows, optional(shards.reduce(experts.gradients()))};
}

at::Tensor run_with(Exchange* exchange, const Traffic& traffic, const at::Tensor& rows, const py::function& experts) {
  const ReleaseGil release;
  return run_pipeline(exchange, traffic, rows, [&](int64_t chunk, const at::Tensor& arrived) {
    const py::gil_scoped_acquire acquire;
    return experts(chunk, arrived).cast<at::Tensor>();
  });
}

Messages messages(const Group& group, const at::Tensor& message, int64_t capacity, const at::Device& device) {
  return gather_messages(group, message, capacity, device);
}

void translate(std::exception_ptr pointer) {
  try {
    if (pointer) std::rethrow_exception(pointer);
  } catch (const RankFailed& error) {
    const py::object type = py::module_::import("tutelx.errors").attr("RankFailedError");
    PyErr_SetString(type.ptr(), error.what());
  }
}

}  // namespace
}  // namespace tutelx::comm

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  using namespace tutelx::comm;
  py::register_exception_translator(&translate);
  const auto no_gil = py::call_guard<ReleaseGil>();

  m.def(
      "gather_messages",
      [](const Group& group, const at::Tensor& message, int64_t capacity, const at::Device& device) {
        Messages out = messages(group, message, capacity, device);
        return std::make_tuple(out.table, out.missing);
      },
      no_gil);

  py::class_<Exchange>(m, "Exchange")
      .def(py::init<Group>())
      .def(py::init<Group, Group, Group>())
      .def_property_readonly("bytes_sent", &Exchange::bytes_sent)
      .def("all_to_all", &all_to_all, no_gil);

  py::class_<Traffic>(m, "Traffic")
      .def(py::init<const at::Tensor&, const at::Tensor&, int64_t, int64_t, int64_t, int64_t, bool>(), no_gil)
      .def_property_readonly("chunks", &Traffic::chunks)
      .def("rows_sent", &Traffic::rows_sent)
      .def("rows_received", &Traffic::rows_received)
      .def("send_order", &Traffic::send_order, no_gil)
      .def("segments", &Traffic::segments, no_gil);

  py::class_<WeightShards>(m, "WeightShards")
      .def(py::init([](Group group, const std::vector<std::array<int64_t, 4>>& shares, int64_t per_expert,
                       int64_t model_begin, int64_t model_dim) {
        std::vector<Share> list;
        for (const auto& [rank, experts, hidden, model] : shares) list.push_back({rank, experts, hidden, model});
        return WeightShards(std::move(group), std::move(list), per_expert, model_begin, model_dim);
      }))
      .def_property_readonly("bytes_sent", &WeightShards::bytes_sent);

  py::class_<FfnOptions>(m, "FfnOptions")
      .def(py::init([](std::string activation, const std::string& kernel, int64_t tile_rows, int64_t tile_columns) {
             return FfnOptions{std::move(activation), parse_kernel(kernel), tile_rows, tile_columns};
           }),
           py::kw_only(), py::arg("activation"), py::arg("kernel"), py::arg("tile_rows"), py::arg("tile_columns"));

  m.def("ffn_forward", &ffn_forward, no_gil);
  m.def("ffn_backward", &ffn_backward, no_gil);
  m.def("run_with", &run_with);
}
