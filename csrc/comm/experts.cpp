#include "experts.h"

#include <ATen/core/dispatch/Dispatcher.h>

#include <tuple>

#include "../check.h"
#include "products.h"

namespace tutelx::comm {
namespace {

using List = std::vector<at::Tensor>;

List list(const at::Tensor& weight) { return weight.defined() ? List{weight} : List{}; }

std::tuple<at::Tensor, at::Tensor, at::Tensor> tiled(const at::Tensor& rows, const at::Tensor& counts,
                                                     const at::Tensor& offsets, const Weights& w,
                                                     const FfnOptions& options, bool keep) {
  static const auto op =
      c10::Dispatcher::singleton()
          .findSchemaOrThrow("tutelx::expert_ffn", "")
          .typed<std::tuple<at::Tensor, at::Tensor, at::Tensor>(
              const at::Tensor&, const at::Tensor&, const at::Tensor&, at::TensorList, at::TensorList, at::TensorList,
              at::TensorList, at::TensorList, at::TensorList, c10::string_view, int64_t, int64_t, bool, bool)>();
  return op.call(rows, counts.to(rows.device()), offsets.to(rows.device()), list(w[0]), list(w[1]), list(w[2]),
                 list(w[3]), list(w[4]), list(w[5]), options.activation, options.tile_rows, options.tile_columns, keep,
                 /*zero_unused=*/true);
}

using Backward = std::tuple<at::Tensor, List, List, List, List, List, List>;

Backward tiled_backward(const at::Tensor& grad_out, const at::Tensor& counts, const at::Tensor& offsets,
                        const Weights& w, const at::Tensor* kept, const FfnOptions& options, bool need_weights) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("tutelx::expert_ffn_backward", "")
                             .typed<Backward(const at::Tensor&, const at::Tensor&, const at::Tensor&, const at::Tensor&,
                                             at::TensorList, at::TensorList, at::TensorList, at::TensorList,
                                             at::TensorList, at::TensorList, const at::Tensor&, const at::Tensor&,
                                             c10::string_view, int64_t, int64_t, bool, bool, bool)>();
  const at::Device device = grad_out.device();
  return op.call(grad_out, kept[0], counts.to(device), offsets.to(device), list(w[0]), list(w[1]), list(w[2]),
                 list(w[3]), list(w[4]), list(w[5]), kept[1], kept[2], options.activation, options.tile_rows,
                 options.tile_columns, /*need_rows=*/true, need_weights, /*zero_unused=*/true);
}

}  // namespace

Kernel parse_kernel(const std::string& name) {
  if (name == "tiled") return Kernel::tiled;
  if (name == "batched") return Kernel::batched;
  TORCH_CHECK_VALUE(name == "each", "kernel='", name, "' is none of 'tiled', 'batched', 'each'");
  return Kernel::each;
}

at::Tensor FfnForward::operator()(int64_t chunk, const at::Tensor& rows) {
  if (!gathered_) weights_ = shards_.finish_gather();
  gathered_ = true;
  const auto [counts, offsets] = traffic_.segments(chunk);
  at::Tensor out, gate_pre, up_pre;
  if (options_.kernel == Kernel::tiled)
    std::tie(out, gate_pre, up_pre) = tiled(rows, counts, offsets, weights_, options_, keep_);
  else
    std::tie(out, gate_pre, up_pre) =
        products(rows, segments_of(offsets, options_.kernel == Kernel::batched), weights_, options_.activation);
  if (keep_) kept.insert(kept.end(), {rows, gate_pre, up_pre});
  return out;
}

at::Tensor FfnBackward::operator()(int64_t chunk, const at::Tensor& grad_out) {
  if (!gathered_) weights_ = shards_.finish_gather();
  gathered_ = true;
  const auto [counts, offsets] = traffic_.segments(chunk);
  const at::Tensor* kept = kept_.data() + 3 * chunk;
  at::Tensor grad_rows;
  Weights grads;
  if (options_.kernel == Kernel::tiled) {
    const Backward result = tiled_backward(grad_out, counts, offsets, weights_, kept, options_, need_weights_);
    grad_rows = std::get<0>(result);
    const auto first = [](const List& l) { return l.empty() ? at::Tensor() : l[0]; };
    grads = {first(std::get<1>(result)), first(std::get<2>(result)), first(std::get<3>(result)),
             first(std::get<4>(result)), first(std::get<5>(result)), first(std::get<6>(result))};
  } else {
    std::tie(grad_rows, grads) =
        products_backward(grad_out, kept[0], kept[1], kept[2], segments_of(offsets, options_.kernel == Kernel::batched),
                          weights_, options_.activation, need_weights_);
  }
  if (need_weights_) add(grads);
  for (int64_t i = 0; i < 3; ++i) kept_[3 * chunk + i].reset();
  return grad_rows;
}

void FfnBackward::add(const Weights& of_chunk) {
  for (size_t kind = 0; kind < sums_.size(); ++kind) {
    const at::Tensor& g = of_chunk[kind];
    if (!g.defined()) continue;
    if (traffic_.chunks() == 1) {
      sums_[kind] = g;
    } else if (!sums_[kind].defined()) {
      sums_[kind] = g.to(g.scalar_type() == at::kDouble ? at::kDouble : at::kFloat);
    } else {
      sums_[kind].add_(g);
    }
  }
}

Weights FfnBackward::gradients() const {
  Weights out;
  for (size_t kind = 0; kind < sums_.size(); ++kind)
    if (sums_[kind].defined()) out[kind] = sums_[kind].to(weights_[kind].scalar_type());
  return out;
}

}  // namespace tutelx::comm
