// The operators' CUDA implementations: checks, outputs and scratch from torch, then one launch.
// The only file where torch meets the kernels.
//
// Legend: T tokens, K choices a token, E experts, C capacity, R rows, D model dim, H expert hidden dim.
#include <ATen/ATen.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include <optional>
#include <string_view>
#include <tuple>

#include "../check.h"
#include "../kernels/launch.h"

namespace tutelx {
namespace {

using at::Tensor;
using kernels::DType;
using OptionalTensor = std::optional<Tensor>;

// ---- Between torch and the kernels ---------------------------------------------------------------------------------

DType dtype_of(const Tensor& t, const char* name) {
  switch (t.scalar_type()) {
    case at::kFloat:
      return DType::f32;
    case at::kDouble:
      return DType::f64;
    case at::kBFloat16:
      return DType::bf16;
    case at::kHalf:
      return DType::f16;
    default:
      TORCH_CHECK_TYPE(false, name, " is ", t.scalar_type(), ", expected float32, float64, bfloat16 or float16");
  }
}

// What sums and scores are kept in.
at::ScalarType wide_type(const Tensor& t) { return t.scalar_type() == at::kDouble ? at::kDouble : at::kFloat; }

cudaStream_t stream_of(const Tensor& t) { return c10::cuda::getCurrentCUDAStream(t.get_device()).stream(); }

void check_device(const Tensor& t, const char* name, const Tensor& other, const char* other_name) {
  TORCH_CHECK_VALUE(t.device() == other.device(), name, " is on ", t.device(), ", ", other_name, " is on ",
                    other.device());
}

int32_t* ints(const Tensor& t) { return t.mutable_data_ptr<int32_t>(); }
const int32_t* const_ints(const Tensor& t) { return t.const_data_ptr<int32_t>(); }

Tensor scratch(size_t bytes, const Tensor& like) {
  return at::empty({static_cast<int64_t>(bytes)}, like.options().dtype(at::kByte));
}

// An index tensor of the dispatch map, contiguous, on the device of the numbers it indexes.
Tensor map_tensor(const Tensor& t, const char* name, int64_t dim, const Tensor& numbers, const char* numbers_name) {
  check_dim(t, name, dim);
  check_dtype(t, name, at::kInt);
  check_device(t, name, numbers, numbers_name);
  return t.contiguous();
}

// ---- route ---------------------------------------------------------------------------------------------------------

std::tuple<Tensor, Tensor, Tensor, Tensor> route(const Tensor& expert_ids, int64_t num_experts,
                                                 std::optional<int64_t> capacity, bool padded,
                                                 const OptionalTensor& order) {
  check_dim(expert_ids, "expert_ids", 2);
  check_dtype(expert_ids, "expert_ids", at::kInt);
  const int64_t T = expert_ids.size(0), K = expert_ids.size(1), E = num_experts;
  TORCH_CHECK_VALUE(E >= 1 && E <= kernels::kRouteMaxExperts, "num_experts=", E, " is outside [1, ",
                    kernels::kRouteMaxExperts, "]");
  TORCH_CHECK_VALUE(!capacity || *capacity > 0, "capacity=", capacity.value_or(0), " must be at least 1");
  check_index_range(T * K, "T*K");
  const c10::cuda::CUDAGuard guard(expert_ids.device());
  const cudaStream_t stream = stream_of(expert_ids);

  const Tensor ids = expert_ids.contiguous();
  Tensor order_T;
  if (order) {
    order_T = map_tensor(*order, "order", 1, expert_ids, "expert_ids");
    check_size(*order, "order", 0, T, "T");
  }
  const Tensor dest = at::empty({T, K}, ids.options());
  const Tensor counts = at::empty({E}, ids.options()), offsets = at::empty({E + 1}, ids.options());
  const Tensor memory = scratch(kernels::route_scratch_bytes(T, K, E), ids);
  kernels::RouteArguments a{};
  a.expert_ids = const_ints(ids);
  a.order = order ? const_ints(order_T) : nullptr;
  a.T = T;
  a.K = K;
  a.E = E;
  a.capacity = padded ? capacity.value_or(0) : capacity.value_or(-1);
  a.padded = padded;
  a.dest = ints(dest);
  a.counts = ints(counts);
  a.offsets = ints(offsets);
  a.scratch = memory.mutable_data_ptr();

  // A padded map that drops nothing has the demand's maximum as its capacity: the one case that waits for the device.
  const bool capacity_from_counts = padded && !capacity;
  if (capacity_from_counts) {
    C10_CUDA_CHECK(kernels::launch_route_count(a, stream));
    a.capacity = counts.max().item<int32_t>();
  }
  const int64_t R = padded ? E * a.capacity : T * K;
  check_index_range(R, "rows");
  const Tensor source = at::empty({R}, ids.options());
  a.source = ints(source);
  C10_CUDA_CHECK(capacity_from_counts ? kernels::launch_route_assign(a, stream) : kernels::launch_route(a, stream));
  return {dest, source, counts, offsets};
}

// ---- encode --------------------------------------------------------------------------------------------------------

Tensor encode(const Tensor& x, const Tensor& source, const Tensor& dest) {
  check_dim(x, "x", 2);
  check_dim(dest, "dest", 2);
  check_size(x, "x", 0, dest.size(0), "the map's tokens");
  const c10::cuda::CUDAGuard guard(x.device());
  const Tensor in = x.contiguous(), to = map_tensor(dest, "dest", 2, x, "x");
  const Tensor from = map_tensor(source, "source", 1, x, "x");
  const int64_t T = dest.size(0), K = dest.size(1), R = source.size(0), D = x.size(1);
  const Tensor rows = at::empty({R, D}, x.options());
  C10_CUDA_CHECK(kernels::launch_encode(in.const_data_ptr(), const_ints(to), const_ints(from), rows.mutable_data_ptr(),
                                        T, K, R, D, dtype_of(x, "x"), stream_of(x)));
  return rows;
}

void clear_empty(Tensor& rows, const Tensor& source) {
  check_dim(rows, "rows", 2);
  check_size(rows, "rows", 0, source.size(0), "the map's rows");
  TORCH_CHECK_VALUE(rows.is_contiguous(), "rows has strides ", rows.strides(), ", expected contiguous rows");
  const c10::cuda::CUDAGuard guard(rows.device());
  const Tensor from = map_tensor(source, "source", 1, rows, "rows");
  C10_CUDA_CHECK(kernels::launch_clear_empty(rows.mutable_data_ptr(), const_ints(from), rows.size(0), rows.size(1),
                                             dtype_of(rows, "rows"), stream_of(rows)));
}

Tensor encode_backward(const Tensor& grad_rows, const Tensor& dest) {
  check_dim(grad_rows, "grad_rows", 2);
  const c10::cuda::CUDAGuard guard(grad_rows.device());
  const Tensor in = grad_rows.contiguous(), to = map_tensor(dest, "dest", 2, grad_rows, "grad_rows");
  const int64_t T = dest.size(0), K = dest.size(1), R = grad_rows.size(0), D = grad_rows.size(1);
  const Tensor grad_x = at::empty({T, D}, grad_rows.options());
  C10_CUDA_CHECK(kernels::launch_encode_backward(in.const_data_ptr(), const_ints(to), grad_x.mutable_data_ptr(), T, K,
                                                 R, D, dtype_of(grad_rows, "grad_rows"), stream_of(grad_rows)));
  return grad_x;
}

// ---- decode --------------------------------------------------------------------------------------------------------

void check_weights(const Tensor& weights, const Tensor& rows, const Tensor& dest) {
  TORCH_CHECK_VALUE(weights.sizes() == dest.sizes(), "weights has shape ", weights.sizes(), ", the map has ",
                    dest.sizes());
  TORCH_CHECK_TYPE(weights.scalar_type() == rows.scalar_type() || weights.scalar_type() == at::kFloat, "weights is ",
                   weights.scalar_type(), ", expected ", rows.scalar_type(), " (as rows) or float32");
  check_device(weights, "weights", rows, "rows");
}

Tensor decode(const Tensor& rows, const Tensor& dest, const Tensor& source, const Tensor& weights) {
  check_dim(rows, "rows", 2);
  check_size(rows, "rows", 0, source.size(0), "the map's rows");
  check_weights(weights, rows, dest);
  const c10::cuda::CUDAGuard guard(rows.device());
  const Tensor in = rows.contiguous(), to = map_tensor(dest, "dest", 2, rows, "rows"), w = weights.contiguous();
  const int64_t T = dest.size(0), K = dest.size(1), R = rows.size(0), D = rows.size(1);
  const Tensor y = at::empty({T, D}, rows.options());
  C10_CUDA_CHECK(kernels::launch_decode(in.const_data_ptr(), const_ints(to), w.const_data_ptr(), y.mutable_data_ptr(),
                                        T, K, R, D, dtype_of(rows, "rows"), dtype_of(weights, "weights"),
                                        stream_of(rows)));
  return y;
}

std::tuple<Tensor, Tensor> decode_backward(const Tensor& grad_y, const Tensor& rows, const Tensor& dest,
                                           const Tensor& source, const Tensor& weights) {
  check_dim(grad_y, "grad_y", 2);
  check_dim(rows, "rows", 2);
  const Tensor to = map_tensor(dest, "dest", 2, rows, "rows"), from = map_tensor(source, "source", 1, rows, "rows");
  check_size(grad_y, "grad_y", 0, dest.size(0), "the map's tokens");
  check_size(grad_y, "grad_y", 1, rows.size(1), "rows.size(1)");
  check_size(rows, "rows", 0, source.size(0), "the map's rows");
  check_dtype(grad_y, "grad_y", rows.scalar_type());
  check_device(grad_y, "grad_y", rows, "rows");
  check_weights(weights, rows, dest);
  const c10::cuda::CUDAGuard guard(rows.device());
  const Tensor dy = grad_y.contiguous(), in = rows.contiguous(), w = weights.contiguous();
  const int64_t T = dest.size(0), K = dest.size(1), R = rows.size(0), D = rows.size(1);
  const Tensor grad_rows = at::empty({R, D}, rows.options()), grad_weights = at::empty({T, K}, weights.options());
  C10_CUDA_CHECK(kernels::launch_decode_backward(dy.const_data_ptr(), in.const_data_ptr(), const_ints(to),
                                                 const_ints(from), w.const_data_ptr(), grad_rows.mutable_data_ptr(),
                                                 grad_weights.mutable_data_ptr(), T, K, R, D, dtype_of(rows, "rows"),
                                                 dtype_of(weights, "weights"), stream_of(rows)));
  return {grad_rows, grad_weights};
}

// ---- gate ----------------------------------------------------------------------------------------------------------

kernels::Score parse_score(std::string_view score) {
  TORCH_CHECK_VALUE(score == "softmax" || score == "sigmoid", "score='", score, "' is neither softmax nor sigmoid");
  return score == "softmax" ? kernels::Score::softmax : kernels::Score::sigmoid;
}

void check_gate(const Tensor& logits, int64_t k) {
  check_dim(logits, "logits", 2);
  const int64_t E = logits.size(1);
  TORCH_CHECK_VALUE(E >= 1 && E <= kernels::kGateMaxExperts, "logits.size(1)=", E, " is outside [1, ",
                    kernels::kGateMaxExperts, "], the number of experts the CUDA gate can handle");
  TORCH_CHECK_VALUE(k >= 1 && k <= E, "top_k=", k, " is outside [1, num_experts=", E, "]");
  check_index_range(logits.size(0) * k, "T*K");
}

std::tuple<Tensor, Tensor, Tensor, Tensor> gate(const Tensor& logits, int64_t k, c10::string_view score,
                                                bool renormalize, const OptionalTensor& bias, int64_t num_groups,
                                                int64_t kept_groups, int64_t best_of_group) {
  check_gate(logits, k);
  check_groups(logits.size(1), k, num_groups, kept_groups, best_of_group);
  TORCH_CHECK_VALUE(num_groups <= kernels::kGateMaxGroups, "num_groups=", num_groups, " exceeds ",
                    kernels::kGateMaxGroups, ", the number of groups the CUDA gate can handle");
  if (bias) {
    check_dim(*bias, "bias", 1);
    check_size(*bias, "bias", 0, logits.size(1), "num_experts");
    check_device(*bias, "bias", logits, "logits");
  }
  const c10::cuda::CUDAGuard guard(logits.device());
  const int64_t T = logits.size(0), E = logits.size(1);
  const DType dtype = dtype_of(logits, "logits");
  const Tensor in = logits.contiguous();
  const auto wide = in.options().dtype(wide_type(in));
  const Tensor expert_ids = at::empty({T, k}, in.options().dtype(at::kInt)), weights = at::empty({T, k}, wide),
               score_sum = at::empty({E}, wide), logsumexp = at::empty({T}, wide);
  const Tensor memory = scratch(kernels::gate_scratch_bytes(T, E, dtype), in);
  const Tensor added = bias ? bias->to(wide_type(in)).contiguous() : Tensor();
  const kernels::GateChoice choice{bias ? added.const_data_ptr() : nullptr, num_groups, kept_groups, best_of_group};
  C10_CUDA_CHECK(kernels::launch_gate(in.const_data_ptr(), ints(expert_ids), weights.mutable_data_ptr(),
                                      score_sum.mutable_data_ptr(), logsumexp.mutable_data_ptr(),
                                      memory.mutable_data_ptr(), T, E, k, parse_score(score), renormalize, choice,
                                      dtype, stream_of(in)));
  return {expert_ids, weights, score_sum, logsumexp};
}

Tensor gate_backward(const Tensor& grad_weights, const Tensor& grad_score_sum, const Tensor& grad_logsumexp,
                     const Tensor& logits, const Tensor& expert_ids, const Tensor& logsumexp, c10::string_view score,
                     bool renormalize) {
  const Tensor ids = map_tensor(expert_ids, "expert_ids", 2, logits, "logits");
  check_gate(logits, ids.size(1));
  const int64_t T = logits.size(0), E = logits.size(1), K = ids.size(1);
  check_gate_gradients(grad_weights, grad_score_sum, grad_logsumexp, logits, expert_ids, logsumexp);
  const c10::cuda::CUDAGuard guard(logits.device());
  const auto widened = [&](const Tensor& t, const char* name) {
    check_device(t, name, logits, "logits");
    return t.to(wide_type(logits)).contiguous();
  };
  const Tensor dweights = widened(grad_weights, "grad_weights"), dsum = widened(grad_score_sum, "grad_score_sum"),
               dlse = widened(grad_logsumexp, "grad_logsumexp"), lse = widened(logsumexp, "logsumexp");
  const Tensor in = logits.contiguous(), grad_logits = at::empty_like(in);
  C10_CUDA_CHECK(kernels::launch_gate_backward(dweights.const_data_ptr(), dsum.const_data_ptr(), dlse.const_data_ptr(),
                                               in.const_data_ptr(), const_ints(ids), lse.const_data_ptr(),
                                               grad_logits.mutable_data_ptr(), T, E, K, parse_score(score), renormalize,
                                               dtype_of(in, "logits"), stream_of(in)));
  return grad_logits;
}

// ---- activation ----------------------------------------------------------------------------------------------------

kernels::Activation parse_activation(std::string_view kind) {
  if (kind == "silu") return kernels::Activation::silu;
  if (kind == "gelu") return kernels::Activation::gelu;
  if (kind == "gelu_tanh") return kernels::Activation::gelu_tanh;
  if (kind == "relu") return kernels::Activation::relu;
  TORCH_CHECK_VALUE(false, "activation='", kind, "' is none of silu, gelu, gelu_tanh, relu");
}

// A tensor as rows of H elements a fixed stride apart. One half of a [.., 2H] tensor is that without a copy.
struct Rows {
  Tensor tensor;  // keeps a copy alive
  int64_t stride;
};

Rows rows_of(const Tensor& t) {
  const int64_t dims = t.dim();
  bool evenly_spaced = dims >= 2 && t.stride(dims - 1) == 1;
  for (int64_t i = 0; evenly_spaced && i + 2 < dims; ++i) {
    evenly_spaced = t.stride(i) == t.stride(i + 1) * t.size(i + 1);
  }
  if (evenly_spaced) return {t, t.stride(dims - 2)};
  return {t.contiguous(), dims == 0 ? 1 : t.size(dims - 1)};
}

struct ActivationCall {
  Rows gate, up;
  kernels::ActivationArguments arguments;
};

ActivationCall activation_call(const Tensor& gate, const OptionalTensor& up, std::string_view kind) {
  ActivationCall call{rows_of(gate), {}, {}};
  kernels::ActivationArguments& a = call.arguments;
  a.kind = parse_activation(kind);
  a.dtype = dtype_of(gate, "gate");
  a.H = gate.dim() == 0 ? 1 : gate.size(-1);
  a.N = a.H == 0 ? 0 : gate.numel() / a.H;
  a.gate = call.gate.tensor.const_data_ptr();
  a.gate_stride = call.gate.stride;
  if (up) {
    TORCH_CHECK_VALUE(up->sizes() == gate.sizes(), "up has shape ", up->sizes(), ", gate has ", gate.sizes());
    check_dtype(*up, "up", gate.scalar_type());
    check_device(*up, "up", gate, "gate");
    call.up = rows_of(*up);
    a.up = call.up.tensor.const_data_ptr();
    a.up_stride = call.up.stride;
  }
  return call;
}

Tensor activation(const Tensor& gate, const OptionalTensor& up, c10::string_view kind) {
  const c10::cuda::CUDAGuard guard(gate.device());
  const ActivationCall call = activation_call(gate, up, kind);
  const Tensor out = at::empty(gate.sizes(), gate.options());
  C10_CUDA_CHECK(kernels::launch_activation(call.arguments, out.mutable_data_ptr(), call.arguments.H, stream_of(gate)));
  return out;
}

std::tuple<Tensor, Tensor> activation_backward(const Tensor& grad, const Tensor& gate, const OptionalTensor& up,
                                               c10::string_view kind) {
  TORCH_CHECK_VALUE(grad.sizes() == gate.sizes(), "grad has shape ", grad.sizes(), ", gate has ", gate.sizes());
  check_dtype(grad, "grad", gate.scalar_type());
  check_device(grad, "grad", gate, "gate");
  const c10::cuda::CUDAGuard guard(gate.device());
  const ActivationCall call = activation_call(gate, up, kind);
  const int64_t H = call.arguments.H;
  const Rows dout = rows_of(grad);
  const Tensor grad_gate = at::empty(gate.sizes(), gate.options());
  const Tensor grad_up = up ? at::empty(gate.sizes(), gate.options()) : at::empty({0}, gate.options());
  C10_CUDA_CHECK(kernels::launch_activation_backward(call.arguments, dout.tensor.const_data_ptr(), dout.stride,
                                                     grad_gate.mutable_data_ptr(), H,
                                                     up ? grad_up.mutable_data_ptr() : nullptr, H, stream_of(gate)));
  return {grad_gate, grad_up};
}

}  // namespace
}  // namespace tutelx

TORCH_LIBRARY_IMPL(tutelx, CUDA, m) {
  m.impl("route", &tutelx::route);
  m.impl("encode", &tutelx::encode);
  m.impl("encode_backward", &tutelx::encode_backward);
  m.impl("clear_empty", &tutelx::clear_empty);
  m.impl("decode", &tutelx::decode);
  m.impl("decode_backward", &tutelx::decode_backward);
  m.impl("gate", &tutelx::gate);
  m.impl("gate_backward", &tutelx::gate_backward);
  m.impl("activation", &tutelx::activation);
  m.impl("activation_backward", &tutelx::activation_backward);
}
